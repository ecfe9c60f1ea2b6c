"""TiDAR: drafts by masks, verified in the same forward."""
