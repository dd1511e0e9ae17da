"""Models over sequences: their interface, noise, long videos in chunks, step by step."""
