"""Decoding strategies: one file a strategy."""

from .drafting.decode_tidar import decode_tidar, tidar
from .drafting.outputs_tidar import TiDARGenerateOutput
from .row_streamer import RowStreamer

__all__ = ["RowStreamer", "TiDARGenerateOutput", "decode_tidar", "tidar"]
