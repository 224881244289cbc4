"""Quantise: codes and scales, or the operand they stand for."""
