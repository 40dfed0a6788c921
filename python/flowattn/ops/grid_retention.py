"""Retention on a grid of tokens: weights decay with the distance in rows plus that in columns."""

import torch
from torch.autograd.function import once_differentiable

from flowattn import checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.grid_retention import grid_retention as reference

_OP = "grid_retention"
_fwd_triton = op("grid_retention_fwd_triton")
ALL, UPPER_LEFT, LOWER_RIGHT = range(3)  # which keys a query sees, itself included


def grid_retention(q, k, v, decay, grid, *, causal=False, scale=None):
    """Weigh each pair of tokens by their distance on a grid: o_i = scale sum_j e^(g (|dy| + |dx|)) (q_i . k_j) v_j.

    Shapes: q (B, T, H, D), k (B, T, Hkv, D), v (B, T, Hkv, M) with Hkv | H, tokens row by row; grid (height, width)
        with height * width = T; returns (B, T, H, M).
    Dtypes: q, k, v alike, float16, bfloat16, float32 or (reference) float64; decay any of them. Scores run in float32.
    Layout: last dim contiguous, any other strides, no copy.
    decay (H,): the log decays g <= 0, one a head.
    causal: only keys that lie neither below nor to the right of the query. One token at a time this is
        S_(y,x) = e^g S_(y-1,x) + e^g S_(y,x-1) - e^2g S_(y-1,x-1) + k v^T, o = scale S^T q.
    scale: default D ** -0.5.

    Gradients: q, k, v, once; of decay in the reference alone. Deterministic. Host sync: none.
    Cost: 2 T^2 H (D + M) FLOPs; no (T, T) tensor is stored on a GPU, in the reference one row of the grid times T.
    Source: retention (Sun et al., Retentive Network, 2023, section 2.1) with the Manhattan distance of Fan et al., RMT
        (2024), and without the softmax of the latter.

    >>> ones = torch.ones(1, 4, 1, 1)
    >>> grid_retention(ones, ones, ones, torch.tensor([0.5]).log(), (2, 2)).flatten().tolist()
    [2.25, 2.25, 2.25, 2.25]
    """
    call = _prepare(q, k, v, decay, grid, causal=causal, scale=scale)
    backend = _TABLE.choose(*call)
    if backend.name == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference(*call)
    if checks.needs_grad(*call[:3]):
        return _GridRetention.apply(backend, *call)
    *tensors, causal = call
    return backend.fwd(*tensors, UPPER_LEFT if causal else ALL)


class _GridRetention(torch.autograd.Function):
    """Every gradient is the op itself with its inputs in other places, the weights being symmetric."""

    @staticmethod
    def forward(ctx, backend, q, k, v, decay, scale, height, width, causal):
        ctx.save_for_backward(q, k, v, decay)
        ctx.run, ctx.options, ctx.causal = backend.fwd, (scale, height, width), causal
        return backend.fwd(q, k, v, decay, scale, height, width, UPPER_LEFT if causal else ALL)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, decay = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        back = (decay, *ctx.options, LOWER_RIGHT if ctx.causal else ALL)
        dq = ctx.run(dout, v, k, decay, *ctx.options, UPPER_LEFT if ctx.causal else ALL)
        dk, dv = ctx.run(v, dout, q, *back), ctx.run(k, q, dout, *back)
        group = q.shape[2] // k.shape[2]
        if group > 1:
            dk, dv = (x.unflatten(2, (-1, group)).float().sum(3).to(q.dtype) for x in (dk, dv))
        return None, dq, dk, dv, *[None] * 5


def _prepare(q, k, v, decay, grid, *, causal=False, scale=None):
    """The public arguments, checked, as those of the reference."""
    names, tensors = ("q", "k", "v"), checks.autocast(q, k, v)
    for name, x in zip(names, tensors):
        checks.require(x.dim() == 4, _OP, f"{name} must have shape (B, T, heads, width)", tuple(x.shape))
    q, k, v = tensors
    checks.float_dtype(_OP, "q", q)
    checks.same_dtype_device(_OP, names, tensors)
    checks.last_dim_contiguous(_OP, names, tensors)
    height, width = (int(n) for n in grid)
    checks.require(height * width == q.shape[1], _OP, f"grid must hold the {q.shape[1]} tokens of q", (height, width))
    fits = k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3] and v.shape[:3] == k.shape[:3]
    checks.require(fits, _OP, "k and v must have the tokens of q, k its width", (tuple(k.shape), tuple(v.shape)))
    heads, heads_kv = q.shape[2], k.shape[2]
    checks.require(heads_kv and heads % heads_kv == 0, _OP, "the heads of k must divide those of q", (heads, heads_kv))
    checks.require(q.shape[3] and v.shape[3], _OP, "head widths must be positive", (q.shape[3], v.shape[3]))
    checks.float_dtype(_OP, "decay", decay)
    checks.require(decay.shape == (heads,), _OP, f"decay must have shape ({heads},)", tuple(decay.shape))
    checks.require(decay.device == q.device, _OP, f"decay must be on the device of q, {q.device}", decay.device)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return q, k, v, decay.to(checks.state_dtype(q)), scale, height, width, bool(causal)


def _refuse_triton(q, k, v, decay, *rest):
    reason, widest = dispatch.refuse_triton(q), max(q.shape[3], v.shape[3])
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    if reason is None and widest > 256:
        reason = f"head widths must be at most 256; got {widest}"
    if reason is None and checks.needs_grad(decay):
        reason = "no gradient of decay"
    return reason


def _probe(device):
    x = torch.zeros(1, 4, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x, torch.zeros(1, device=device), (2, 2)


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("triton", _refuse_triton, _fwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("grid_retention_fwd")
def _fwd_fake(a, b, c, decay, scale, height, width, visible):
    return a.new_empty((*a.shape[:2], decay.shape[0], c.shape[3]))
