"""Models that the paper compares the Clockwork VAE with."""
