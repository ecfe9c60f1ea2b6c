"""Decoding strategies, one file per strategy."""

from .drafting.custom_decode import tidar
from .drafting.decode_tidar import TiDARGenerateOutput, decode_tidar
from .row_streamer import RowStreamer

__all__ = ["RowStreamer", "TiDARGenerateOutput", "decode_tidar", "tidar"]
