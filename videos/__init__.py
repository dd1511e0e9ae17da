"""Where frames come from: decoded videos, published datasets, generated digits."""
