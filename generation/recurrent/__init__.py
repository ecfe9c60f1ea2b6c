"""How recurrent-depth models decode: one file a policy."""
