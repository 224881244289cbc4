"""FP8 containers: MXFP4 operands without a lost bit, for FP8 matrix products."""
