"""Decoding strategies: one file a strategy."""

from .decode_tidar import decode_tidar, tidar
from .outputs import TiDARGenerateOutput
from .row_streamer import RowStreamer

__all__ = ["RowStreamer", "TiDARGenerateOutput", "decode_tidar", "tidar"]
