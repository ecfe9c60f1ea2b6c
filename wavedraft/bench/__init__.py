"""Ways to decode the same prompts, timed: what `wavedraft bench` measures (measure) and what is said of it (report)."""
