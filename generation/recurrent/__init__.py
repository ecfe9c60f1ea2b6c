"""Decoders of recurrent-depth models, one file per policy."""
