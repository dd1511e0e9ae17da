"""Models of sequences: their interface and noise, long videos in chunks, and use step by step."""
