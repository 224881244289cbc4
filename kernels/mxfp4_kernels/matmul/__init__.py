"""W4A4 matrix products of FP8 containers."""
