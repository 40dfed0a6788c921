"""The factorized kernel integral in plain torch: the oracle and the fallback."""

import torch


def apply_kernel(v, kernel, axis):
    """y[.., i, .., h, c] = sum_j kernel[b, h, i, j] v[.., j, .., h, c] along `axis` of v (B, grid.., H, C)."""
    lines = v.movedim(axis, -2)  # (B, other axes.., H, N, C)
    ones = (1,) * (lines.dim() - 4)
    kernel = kernel.reshape(kernel.shape[0], *ones, *kernel.shape[1:])
    return (kernel @ lines).movedim(-2, axis)


def factorized_attention(v, kernels, axes):
    """The parallel form: every kernel applied to v, side by side in the channels of each head."""
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    parts = [apply_kernel(v.to(work), kernel.to(work), axis) for kernel, axis in zip(kernels, axes)]
    return torch.cat(parts, -1).to(v.dtype)
