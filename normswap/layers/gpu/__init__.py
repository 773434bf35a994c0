"""Normalisers as Triton kernels, for NVIDIA GPUs.

The eager form of each layer is the reference and the fall-back: whatever is unusual (float64, odd
strides, no Triton, no C compiler) goes that way. Nothing here is imported before a CUDA tensor
comes. Statistics are float32, sums have a fixed order: the same input gives the same bits.
"""
