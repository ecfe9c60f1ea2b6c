"""Decoding strategies: one file a strategy."""

from .decode_tidar import decode_tidar
from .outputs import TiDARGenerateOutput

__all__ = ["TiDARGenerateOutput", "decode_tidar"]
