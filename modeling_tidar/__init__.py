"""A TiDAR model: what its checkpoint is, its masks, and its forward (arXiv 2511.08923)."""
