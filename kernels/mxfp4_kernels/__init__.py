"""MXFP4 kernels: a folder an op, each with the reference that defines it and the Triton kernel that is the same, faster.

No kernel is here yet: every operation runs the reference in `mxfp4_rl.quant`, on the CPU and on the GPU alike.
"""
