"""What travels with a checkpoint, and how it is published."""
