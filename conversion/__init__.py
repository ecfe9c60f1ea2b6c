"""Converts checkpoints to TiDAR and back; uploads to the Hub."""

from .convert import Conversion, convert, to_ar
from .push import push

__all__ = ["Conversion", "convert", "push", "to_ar"]
