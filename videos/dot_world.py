"""A minimal environment with actions, which move a dot: for trying out and testing models that learn from actions."""

import numpy as np

from config import FRAME_SIZE

RADIUS, STEP = 5, 6
"""The dot's radius, and its longest move along an axis, in pixels."""


class DotWorld:
    """A white dot on black. An action (right, down), each in [-1, 1], moves it by up to STEP pixels; walls stop it."""

    def reset(self, seed: int) -> np.ndarray:
        """Put the dot at a random position, and return the first frame, uint8 [64, 64, 1]."""
        self.position = np.random.default_rng(seed).uniform(RADIUS, FRAME_SIZE - 1 - RADIUS, 2)
        return self.render()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Move the dot, and return the next frame, uint8 [64, 64, 1]."""
        moved = self.position + STEP * np.clip(action, -1, 1)
        self.position = np.clip(moved, RADIUS, FRAME_SIZE - 1 - RADIUS)
        return self.render()

    def render(self) -> np.ndarray:
        """Return the frame, uint8 [64, 64, 1]. The dot has a soft edge, so that small moves are visible."""
        y, x = np.mgrid[:FRAME_SIZE, :FRAME_SIZE]
        distance = np.hypot(x - self.position[0], y - self.position[1])
        return np.rint(255 * np.clip(RADIUS + 0.5 - distance, 0, 1)).astype(np.uint8)[..., None]
