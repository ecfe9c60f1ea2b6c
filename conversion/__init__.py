"""Another checkpoint becomes ours; ours travels to the Hub."""

from .convert import Conversion, convert, to_ar

__all__ = ["Conversion", "convert", "to_ar"]
