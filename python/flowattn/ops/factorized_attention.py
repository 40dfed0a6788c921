"""The factorized kernel integral of FactFormer and IFactFormer: one small kernel matrix per axis of a grid."""

import torch
from torch.autograd.function import once_differentiable

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.factorized_attention import factorized_attention as reference

_OP = "factorized_attention"
_fwd, _bwd = op("factorized_attention_fwd"), op("factorized_attention_bwd")
_fwd_triton, _bwd_triton = op("factorized_attention_fwd_triton"), op("factorized_attention_bwd_triton")


def factorized_attention(v, kernels, axes, *, mode="parallel"):
    """Apply a kernel matrix along each of some axes of a grid: y_a[.., i, ..] = sum_j K_a[b, h, i, j] v[.., j, ..].

    Shapes: v (B, N_1..N_r, H, C), any r >= 1; kernels: one (B, H, N_out, N_in) for each of `axes`, which are dims of v
        (negative ones count from the end), N_in the size of that dim.
    mode "parallel" (IFactFormer-m): every kernel is applied to v itself, N_out = N_in; returns
        (B, N_1..N_r, H, len(axes) * C), the results side by side within each head, in the order of `axes`.
    mode "chained" (FactFormer): each kernel is applied to the result of the one before, in the order of `axes`; returns
        (B, .., H, C) with N_out in place of N_in, which may differ.
    Dtypes: v float16, bfloat16, float32 or (CPU and reference) float64; kernels float32 (float64 for float64 v) or
        bfloat16, never float16: at the usual initialisation they are subnormal there. Sums run in float32; a Triton
        kernel rounds the kernels to bfloat16 where v is bfloat16.
    Layout: last dim of v contiguous, any other strides.
    Gradients: v, kernels; deterministic, for any number of threads. Not differentiable twice. No host sync.
    Cost: 2 H C tokens sum(N_out) FLOPs forward, twice that backward; v is read once an axis.
    Source: Li et al., Scalable Transformer for PDE Surrogate Modeling (FactFormer, 2023), equation 9; Yang et al.,
        IFactFormer-m (2024), equation 14.

    >>> v = torch.randn(2, 6, 5, 4, 8)  # B, height, width, heads, channels
    >>> rows, columns = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 5, 5)
    >>> factorized_attention(v, (rows, columns), (1, 2)).shape
    torch.Size([2, 6, 5, 4, 16])
    >>> factorized_attention(v, (rows, columns), (1, 2), mode="chained").shape
    torch.Size([2, 6, 5, 4, 8])
    """
    checks.require(mode in ("parallel", "chained"), _OP, 'mode must be "parallel" or "chained"', repr(mode))
    checks.require(len(kernels) == len(axes) > 0, _OP, "there must be one kernel an axis", (len(kernels), len(axes)))
    if mode == "parallel":
        return _parallel(v, kernels, axes, True)
    for kernel, axis in zip(kernels, axes):
        v = _parallel(v, (kernel,), (axis,), False)
    return v


def axis_means(x, axes=None):
    """The mean of x (B, N_1..N_r, D) over all its grid axes but one, for each of `axes` (all by default): (B, N_a, D).

    Sums nest, so that two passes over x serve any number of axes. Linear maps commute with them: the mean of x W is the
    mean of x, times W, which replaces a product on the whole grid by one on N_a rows.

    >>> [m.shape for m in axis_means(torch.randn(2, 6, 5, 8))]
    [torch.Size([2, 6, 8]), torch.Size([2, 5, 8])]
    """
    dims = x.dim()
    checks.require(dims >= 3, "axis_means", "x must have shape (B, N_1..N_r, D)", tuple(x.shape))
    wanted = range(1, dims - 1) if axes is None else axes
    means, left = {}, x  # left: x after the mean over the axes behind the one at hand
    for axis in range(dims - 2, 0, -1):
        means[axis] = left if axis == 1 else left.mean(tuple(range(1, axis)))
        left = left.mean(axis)
    return [means[axis % dims] for axis in wanted]


def _parallel(v, kernels, axes, square):
    v, kernels, axes = call = _check(v, kernels, axes, square)
    backend = _TABLE.choose(*call)
    if backend.name == "reference":
        with torch.autocast(v.device.type, enabled=False):
            return reference(*call)
    if checks.needs_grad(v, *kernels):
        return _FactorizedAttention.apply(backend, axes, v, *kernels)
    return backend.fwd(v, kernels, axes)


class _FactorizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, axes, v, *kernels):
        ctx.save_for_backward(v, *kernels)
        ctx.bwd, ctx.axes = backend.bwd, axes
        return backend.fwd(v, list(kernels), axes)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        v, *kernels = ctx.saved_tensors
        if dout.stride(-1) != 1 and dout.shape[-1] > 1:
            dout = dout.contiguous()
        dv, dkernels = ctx.bwd(dout, v, kernels, ctx.axes)
        return None, None, dv, *dkernels


def _check(v, kernels, axes, square):
    """The arguments of the private op."""
    checks.float_dtype(_OP, "v", v)
    if v.dim() < 4:
        checks.fail(_OP, "v must have shape (B, N_1..N_r, H, C)", tuple(v.shape))
    checks.last_dim_contiguous(_OP, ("v",), (v,))
    dims, wide = v.dim(), checks.state_dtype(v)
    axes = [axis + dims if axis < 0 else axis for axis in axes]
    for index, (kernel, axis) in enumerate(zip(kernels, axes)):
        if not 1 <= axis <= dims - 3:
            checks.fail(_OP, f"axes must be grid axes, 1..{dims - 3}: not the batch, heads or channels", axis)
        if kernel.dtype not in (wide, torch.bfloat16):
            rule = f"kernels must be {wide} or bfloat16"
            checks.fail(_OP, rule, kernel.dtype, "call .float() on it", error=TypeError)
        if kernel.device != v.device:
            checks.fail(_OP, f"kernels must be on the device of v, {v.device}", kernel.device)
        n = v.shape[axis]
        fits = kernel.dim() == 4 and kernel.shape[:2] == (v.shape[0], v.shape[-2]) and kernel.shape[3] == n
        if not fits or (square and kernel.shape[2] != n):
            rule = f"kernel {index} must have shape {(v.shape[0], v.shape[-2], n if square else 'N_out', n)}"
            checks.fail(_OP, rule, tuple(kernel.shape))
    return v, [kernel.to(wide).contiguous() for kernel in kernels], axes


def _prepare(v, kernels, axes, *, mode="parallel"):
    return _check(v, kernels[:1] if mode == "chained" else kernels, axes, mode == "parallel")


def _refuse_cpu(v, kernels, axes):
    return _native.refuse_cpu(v)


def _refuse_triton(v, kernels, axes):
    return dispatch.refuse_triton(v) or ("no float64" if v.dtype == torch.float64 else None)


def _probe(device):
    v = torch.zeros(1, 2, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    kernel = torch.zeros(1, 1, 2, 2, device=device)
    return v, (kernel, kernel), (1, 2)


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, _bwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


def out_shape(v, kernels, axes):
    """Shape of the private op's result: one kernel may change the size of its axis."""
    shape = [*v.shape[:-1], v.shape[-1] * len(axes)]
    if len(axes) == 1:
        shape[axes[0]] = kernels[0].shape[2]
    return shape


@fake("factorized_attention_fwd")
def _fwd_fake(v, kernels, axes):
    return v.new_empty(out_shape(v, kernels, axes))


@fake("factorized_attention_bwd")
def _bwd_fake(dout, v, kernels, axes):
    return v.new_empty(v.shape), [kernel.new_empty(kernel.shape) for kernel in kernels]
