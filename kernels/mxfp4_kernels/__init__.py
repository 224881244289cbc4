"""MXFP4 kernels: a folder an op, each with the reference that defines it and the Triton kernel that is the same, faster.

The references of quantising and measuring are `mxfp4_rl.quant`'s own; `mxfp4_rl.quant.quantize` and `fake_quantize` come here
by themselves for tensors on CUDA.
"""
