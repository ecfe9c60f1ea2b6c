"""Another checkpoint becomes ours; ours travels to the Hub."""
