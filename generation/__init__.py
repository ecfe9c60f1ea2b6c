"""Decoding strategies: one file a strategy."""
