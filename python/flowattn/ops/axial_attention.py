"""Softmax attention along one axis of a grid, read in place, and what the Axial Transformer needs beside it."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.axial_attention import axial_attention as reference
from flowattn.triton_kernels.axial_attention_configs import padded_width, short

_OP = "axial_attention"
_LAYOUTS = ("channels_last", "channels_first")
_fwd, _bwd, _packed_bwd = (op(f"axial_attention{name}") for name in ("_fwd", "_bwd", "_qkvpacked_bwd"))
_fwd_triton, _bwd_triton, _packed_bwd_triton = (
    op(f"axial_attention{name}_triton") for name in ("_fwd", "_bwd", "_qkvpacked_bwd")
)


def axial_attention(
    q,
    k,
    v,
    axis,
    *,
    causal=False,
    exclusive=False,
    scale=None,
    bias=None,
    rope=None,
    rope_interleaved=False,
    layout="channels_last",
    return_lse=False,
):
    """Attend along one axis of a grid, the others being batch: o_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j.

    Shapes: q (B, N_1..N_r, H, D), any r >= 1; k (B, .., Hkv, D) and v (B, .., Hkv, Dv) with Hkv | H, equal to q on
        every grid axis but `axis`, where they may have another length m. Returns (B, N_1..N_r, H, Dv).
    axis: a grid axis as a tensor dim, 1..r in channels_last; negative counts from the end.
    Dtypes: q, k, v alike, float16, bfloat16, float32 or (CPU and reference) float64. Scores, softmax and sums run in
        float32.
    Layout: "channels_last": last dim contiguous, any other strides, each tensor its own, expanded dims too; no copy is
        made. "channels_first": (B, H, D, N_1..N_r), axis 3..r+2; whatever of q, k, v is not channels-last in memory is
        transposed by one copy, and the result is channels-last in memory, so that a chain of calls copies once.
    causal: query i sees key j where j <= i + m - n (n queries): the last of both stand at the same position.
    exclusive: causal without the diagonal, j < i + m - n.
    scale: multiplies q . k; default D ** -0.5.
    bias: added to the scores, in the dtype of q or float32, with gradient; broadcasts to (the other axes.., H, n, m).
        The gradient of dims of size 1 is summed in place; that of a tensor expanded beforehand has the expanded size.
    rope: (cos, sin), each (max(n, m), R) with 2R <= D: rotary position tables of this axis; query i takes row
        i + max(n, m) - n, key j row j + max(n, m) - m. Pairs are channels (c, c + R), or (2c, 2c + 1) with
        rope_interleaved; channels from 2R on are left alone. No gradient for the tables.
    return_lse: also return the log-sum-exp of the scores (B, N_1..N_r, H), float32, natural log, differentiable.

    A query that sees no key gives 0 and LSE -inf, with zero gradients. Empty axes are legal.
    Gradients: q, k, v, bias; deterministic, for any number of threads. Not differentiable twice.
    Cost: 2 H (D + Dv) FLOPs a visible pair forward, 2.5 times that backward; reads q, k, v and writes the result once
        for axes up to 256. Memory O(tokens); the gradient of a shared bias needs up to 16 partial sums of its size.
    Source: Ho et al., Axial Attention in Multidimensional Transformers (2019); FlashAttention-2 (Dao 2023).

    >>> x = torch.randn(2, 6, 5, 4, 8)  # B, height, width, heads, D
    >>> axial_attention(x, x, x, 1).shape  # each column attends
    torch.Size([2, 6, 5, 4, 8])
    """
    call = _prepare(
        q, k, v, axis, causal=causal, exclusive=exclusive, scale=scale, bias=bias, rope=rope,
        rope_interleaved=rope_interleaved, layout=layout,
    )  # fmt: skip
    out, lse = _run(call, None)
    if layout == "channels_first":
        out, lse = out.movedim((-2, -1), (1, 2)), lse.movedim(-1, 1)
    return (out, lse) if return_lse else out


def axial_attention_qkvpacked(qkv, axis, **options):
    """axial_attention of the three parts of qkv (B, N_1..N_r, 3, H, D), read in place.

    Its gradient is written straight into a tensor of that shape, where the one of three separate views would be summed
    from three zero-padded ones. Options, dtypes and result as in axial_attention; channels-last only.

    >>> qkv = torch.randn(2, 6, 5, 3, 4, 8, requires_grad=True)
    >>> axial_attention_qkvpacked(qkv, 2, causal=True).sum().backward()
    >>> qkv.grad.shape
    torch.Size([2, 6, 5, 3, 4, 8])
    """
    rule = "qkv must have shape (B, N_1..N_r, 3, H, D)"
    checks.require(qkv.dim() >= 5 and qkv.shape[-3] == 3, _OP, rule, tuple(qkv.shape))
    checks.require("layout" not in options, _OP, "packed qkv is channels-last", "layout")
    return_lse = options.pop("return_lse", False)
    if axis < 0:  # counts from the end of qkv, which has a dim more than its parts
        axis += qkv.dim()
        checks.require(axis < qkv.dim() - 3, _OP, "axis must be a grid axis of qkv", axis - qkv.dim())
    (qkv,) = checks.autocast(qkv)
    out, lse = _run(_prepare(*qkv.unbind(-3), axis, **options), qkv)
    return (out, lse) if return_lse else out


def axial_attention_sum(q, k, v, axes, **options):
    """The sum over `axes` of axial_attention along each, with shared q, k and v, which must have equal grids.

    The results are added in float32 and rounded once. Each axis has a softmax, an LSE and a gradient of its own.

    >>> x = torch.randn(2, 6, 5, 4, 8)
    >>> axial_attention_sum(x, x, x, (1, 2)).shape
    torch.Size([2, 6, 5, 4, 8])
    """
    checks.require(len(axes) > 0, _OP, "axes must name at least one axis", axes)
    checks.require("return_lse" not in options, _OP, "each axis has its own LSE", "return_lse")
    first, *others = axes
    total = axial_attention(q, k, v, first, **options)
    wide, dtype = checks.state_dtype(total), total.dtype
    for axis in others:
        total = total.to(wide) + axial_attention(q, k, v, axis, **options)
    return total.to(dtype)


@torch.no_grad()
def axial_attention_step(q, k, v, k_cache, v_cache, axis, position, *, scale=None):
    """Store the keys and values of one position in their caches, then attend to all positions up to it.

    Shapes: q (B, N_1..N_r, H, D), k and v (B, .., Hkv, D or Dv), all of length 1 along `axis`; the caches have the
        length of the whole axis instead, and are changed in place at `position`, a host int. Returns q's shape with
        width Dv.
    Cost: reads the first position + 1 entries of the caches in place. No gradient.
    Source: Ho et al. 2019, section 3.2.2, sampling with one row or pixel at a time.

    >>> q = torch.randn(2, 1, 5, 4, 8)
    >>> cache = torch.zeros(2, 6, 5, 4, 8)
    >>> axial_attention_step(q, q, q, cache, cache.clone(), 1, 0).equal(q)  # the first position sees itself alone
    True
    """
    length = k_cache.shape[axis]
    checks.require(0 <= position < length, _OP, f"position must lie in the cache, 0..{length - 1}", position)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.narrow(axis, position, 1).copy_(new)
    seen = (cache.narrow(axis, 0, position + 1) for cache in (k_cache, v_cache))
    return axial_attention(q, *seen, axis, scale=scale)


def axial_shift(x, axis, *, add=None):
    """Shift by one along `axis`: out[0] = 0, out[i] = x[i - 1]; with `add`, a tensor of x's shape, plus that.

    The last entry of x is dropped. Any dtype; differentiable. Cost: one pass over x and the result; the sum with `add`
    takes no pass of its own.

    >>> axial_shift(torch.tensor([[1.0, 2.0, 3.0]]), 1)
    tensor([[0., 1., 2.]])
    """
    checks.require(-x.dim() <= axis < x.dim(), "axial_shift", f"axis must be a dim of x, {x.dim()} dims", axis)
    axis %= x.dim()
    if add is None:
        return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (1, -1)) if x.shape[axis] else x.clone()
    checks.require(add.shape == x.shape, "axial_shift", f"add must have the shape of x, {tuple(x.shape)}", add.shape)
    out, rest = add.clone(), max(x.shape[axis] - 1, 0)
    out.narrow(axis, x.shape[axis] - rest, rest).add_(x.narrow(axis, 0, rest))
    return out


def _run(call, qkv):
    """(out, lse) of a checked call; `qkv` is the packed tensor of which q, k and v are views, or None."""
    backend = _TABLE.choose(*call)
    if backend.name == "reference":
        with torch.autocast(call[0].device.type, enabled=False):  # its products stay in float32
            return reference(*call)
    if not checks.needs_grad(*call[:4]):
        return backend.fwd(*call)
    if qkv is None:
        return _AxialAttention.apply(backend, *call)
    return _Packed.apply(backend, qkv, *call[3:])


class _AxialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, *options):
        out, lse = backend.fwd(q, k, v, *options)
        _save(ctx, (q, k, v), out, lse, options, backend.bwd[0])
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        dq, dk, dv, dbias = _backward(ctx, dout, dlse)
        return None, dq, dk, dv, dbias, *[None] * 6


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, qkv, *options):
        out, lse = backend.fwd(*qkv.unbind(-3), *options)
        _save(ctx, (qkv,), out, lse, options, backend.bwd[1])
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        dqkv, dbias = _backward(ctx, dout, dlse)
        return None, dqkv, dbias, *[None] * 6


def _save(ctx, inputs, out, lse, options, bwd):
    bias, cos, sin, *ctx.options = options
    ctx.save_for_backward(*inputs, out, lse, bias, cos, sin)
    ctx.bwd = bwd
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    """What the backward op returns, its last tensor as the gradient of the bias, or None."""
    *inputs, out, lse, bias, cos, sin = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:
        dout = dout.contiguous()
    want = bias is not None and ctx.needs_input_grad[1 + len(inputs)]
    *gradients, dbias = ctx.bwd(dout, dlse, *inputs, out, lse, bias, cos, sin, *ctx.options, want)
    return *gradients, dbias.to(bias.dtype) if want else None


def _channels_last(q, k, v, axis):
    """q, k, v (B, H, D, N..) as (B, N.., H, D) with contiguous channels, and the axis among those dims."""
    tensors = [x.movedim((1, 2), (-2, -1)) if x.dim() >= 4 else x for x in (q, k, v)]
    dims = q.dim()
    axis = axis + dims if axis < 0 else axis
    if not 3 <= axis < dims:
        checks.fail(_OP, f"axis must be a grid axis, 3..{dims - 1} in channels_first", axis)
    return *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors), axis - 2


def _prepare(
    q, k, v, axis, *, causal=False, exclusive=False, scale=None, bias=None, rope=None, rope_interleaved=False,
    layout="channels_last", return_lse=False,
):  # fmt: skip
    """The public arguments, checked, as those of the private op: channels last."""
    checks.require(layout in _LAYOUTS, _OP, f"layout must be one of {_LAYOUTS}", repr(layout))
    if layout == "channels_first":
        q, k, v, axis = _channels_last(q, k, v, axis)
    names, (q, k, v) = ("q", "k", "v"), checks.autocast(q, k, v)
    checks.float_dtype(_OP, "q", q)
    checks.same_dtype_device(_OP, names, (q, k, v))
    dims = q.dim()
    for name, x in zip(names, (q, k, v)):
        if x.dim() != dims or dims < 4:
            checks.fail(_OP, f"{name} must have shape (B, N_1..N_r, heads, width), as q", tuple(x.shape))
    axis = axis + dims if axis < 0 else axis
    if not 1 <= axis <= dims - 3:
        rule = f"axis must be a grid axis, 1..{dims - 3}: not the batch, heads or channels"
        checks.fail(_OP, rule, axis)
    checks.last_dim_contiguous(_OP, names, (q, k, v))
    _check_shapes(q, k, v, axis)
    n, m = q.shape[axis], k.shape[axis]
    if bias is not None:
        bias = _bias(q, bias, axis, m)
    cos, sin = (None, None) if rope is None else _rope(q, rope, max(n, m))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return q, k, v, bias, cos, sin, axis, scale, 2 if exclusive else int(bool(causal)), bool(rope_interleaved)


def _check_shapes(q, k, v, axis):
    def others(x):
        return tuple(x.shape[:axis]) + tuple(x.shape[axis + 1 : -2])

    if others(k) != others(q) or v.shape[:-1] != k.shape[:-1]:
        got = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
        checks.fail(_OP, f"q, k, v must agree on every grid axis but {axis}, k and v on that and the heads too", got)
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv == 0 or heads % heads_kv != 0:
        checks.fail(_OP, "the heads of k must divide the heads of q", (heads, heads_kv))
    if k.shape[-1] != q.shape[-1]:
        checks.fail(_OP, f"k must have the width of q, {q.shape[-1]}", k.shape[-1])
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        checks.fail(_OP, "head widths must be positive", (q.shape[-1], v.shape[-1]))


def _bias(q, bias, axis, m):
    """The bias with every dim of (other axes.., H, n, m), the first ones of size 1 where it is broadcast."""
    if bias.dtype not in (q.dtype, checks.state_dtype(q)):
        rule = f"bias must have the dtype of q, {q.dtype}, or {checks.state_dtype(q)}"
        checks.fail(_OP, rule, bias.dtype, error=TypeError)
    if bias.device != q.device:
        checks.fail(_OP, f"bias must be on the device of q, {q.device}", bias.device)
    full = (*q.shape[:axis], *q.shape[axis + 1 : -2], q.shape[-2], q.shape[axis], m)
    shape = (1,) * (len(full) - bias.dim()) + tuple(bias.shape)
    if len(shape) != len(full) or any(size not in (1, whole) for size, whole in zip(shape, full)):
        checks.fail(_OP, f"bias must broadcast to {full}, (other axes.., H, n, m)", tuple(bias.shape))
    bias = bias.reshape(shape) if bias.dim() < len(full) else bias
    return bias.expand(*shape[:-2], *full[-2:])


def _rope(q, rope, rows):
    cos, sin = rope
    fits = cos.shape == sin.shape and cos.dim() == 2 and cos.shape[0] == rows and 0 < 2 * cos.shape[1] <= q.shape[-1]
    if not fits:
        rule = f"rope must be (cos, sin), each ({rows}, R) with 2R <= {q.shape[-1]}"
        checks.fail(_OP, rule, (tuple(cos.shape), tuple(sin.shape)))
    if cos.device != q.device or sin.device != q.device:
        checks.fail(_OP, f"rope must be on the device of q, {q.device}", (cos.device, sin.device))
    return (table.detach().to(checks.state_dtype(q)).contiguous() for table in (cos, sin))


def _refuse_cpu(q, *rest):
    return _native.refuse_cpu(q)


def _refuse_triton(q, k, v, bias, cos, sin, axis, *rest):
    reason = dispatch.refuse_triton(q)
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    if reason is None and max(q.shape[-1], v.shape[-1]) > 256:
        reason = f"head width must be at most 256; got {max(q.shape[-1], v.shape[-1])}"
    if reason is None and bias is not None and not _fits_program(q, k, v, axis):
        got = f"{k.shape[axis]} keys of width {max(q.shape[-1], v.shape[-1])}"
        reason = f"with a bias one program must hold all keys of a line; got {got}"
    return reason


def _fits_program(q, k, v, axis):
    """Whether the kernels that take a bias, forward and backward, do."""
    width, lengths = padded_width(q.shape[-1], v.shape[-1]), (q.shape[axis], k.shape[axis])
    return all(short(q.dtype, width, *lengths, backward, alone=True) for backward in (False, True))


def _probe(device):
    x = torch.zeros(1, 2, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x, 1


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cpu", _refuse_cpu, _fwd, (_bwd, _packed_bwd)),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, (_bwd_triton, _packed_bwd_triton)),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("axial_attention_fwd")
def _fwd_fake(q, k, v, *rest):
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=checks.state_dtype(q))


def _dbias_fake(q, bias, want):
    return q.new_empty(bias.shape if want and bias is not None else 0, dtype=checks.state_dtype(q))


@fake("axial_attention_bwd")
def _bwd_fake(dout, dlse, q, k, v, out, lse, bias, cos, sin, axis, scale, mask, interleaved, want_dbias):
    gradients = (x.new_empty(x.shape) for x in (q, k, v))
    return *gradients, _dbias_fake(q, bias, want_dbias)


@fake("axial_attention_qkvpacked_bwd")
def _packed_bwd_fake(dout, dlse, qkv, out, lse, bias, cos, sin, axis, scale, mask, interleaved, want_dbias):
    return qkv.new_empty(qkv.shape), _dbias_fake(qkv, bias, want_dbias)
