"""Fused token-wise ops of an encoder layer in plain torch: the oracle and the fallback, differentiable by autograd."""

import torch
import torch.nn.functional as F


def _wide(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def _add(z, term):
    return z if term is None else z + term


def bias_gelu(x, bias, tanh):
    """gelu(x + bias) for x (N, d), in float32 or, for float64 inputs, float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    u = _add(x.to(dtype), _wide(bias, dtype))
    return F.gelu(u, approximate="tanh" if tanh else "none").to(x.dtype)


def bias_residual_layer_norm(x, bias, residual, weight, ln_bias, index, eps, want_sum):
    """(y, z): z[i] = (x + bias + residual)[index[i]], y = LayerNorm(z); rows whose index is out of range are 0.

    x and residual (N, d); index (R,) or None, which means every row in order. z is None unless want_sum.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = _add(_add(x.to(dtype), _wide(bias, dtype)), _wide(residual, dtype))
    unused = None
    if index is not None:
        rows = z.shape[0]
        unused = ((index < 0) | (index >= rows))[:, None]
        z = torch.cat([z, z.new_zeros(1, z.shape[1])])[torch.where(unused[:, 0], rows, index)]
    # Shifted first: a constant row becomes 0 exactly, where 1 / sqrt(eps) would blow up the rounding of its mean.
    centred = z - z[..., :1].detach()
    centred = centred - centred.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = _add(y if weight is None else y * weight.to(dtype), _wide(ln_bias, dtype))
    if unused is not None:
        y = y.masked_fill(unused, 0)
    return y.to(x.dtype), z.to(x.dtype) if want_sum else None
