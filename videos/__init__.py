"""Sources of frames: decoded videos, published datasets, generated digits, recorded environments."""
