"""Execution of a forward. Nothing here changes a token."""
