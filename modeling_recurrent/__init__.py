"""Recurrent-depth models: prelude, a shared core run many times, coda (arXiv 2502.05171)."""
