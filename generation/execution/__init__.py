"""How a forward is run. Nothing here changes a token."""
