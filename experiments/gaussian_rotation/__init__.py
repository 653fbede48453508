"""Gaussian transport with rotated pairs: what the gradient variance says, what noise selects, what networks learn."""
