"""Flow-Attention: linear attention whose weights compete by flow conservation; whole, causal, or token by token."""

import math
from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference import flow_attention as reference

_OP = "flow_attention"
_fwd, _bwd = op("flow_attention_fwd"), op("flow_attention_bwd")
_causal_fwd, _causal_bwd = op("causal_flow_attention_fwd"), op("causal_flow_attention_bwd")
_triton_fwd = op("flow_attention_fwd_triton"), op("causal_flow_attention_fwd_triton")
_triton_bwd = op("flow_attention_bwd_triton"), op("causal_flow_attention_bwd_triton")

# What the published models pass: flow_attention(q, k, v, **FLOW_PRESETS["nlp"]).
FLOW_PRESETS = {
    "core": {},
    "vision": {"extra_eps": 1e-6},
    "timeseries": {"clamp": None},
    "lra": {"clamp": None, "feature_map": "relu", "competition_axis": "heads"},
    "gpt": {"causal": True},
    "nlp": {"causal": True, "clamp": 5.0},
    "rl": {"causal": True, "clamp": 10.0},
}


class FlowState(NamedTuple):
    """What the causal form keeps of the tokens seen: the sums of k, q, b k and a q, of exp(P), and of k (w v)^T.

    k1, q1, k2, q2 (S, H, D), e (S, H), s (S, H, D, M): float32 (float64 for float64 inputs); n (S,), tokens: int64.
    """

    k1: torch.Tensor
    q1: torch.Tensor
    k2: torch.Tensor
    q2: torch.Tensor
    e: torch.Tensor
    n: torch.Tensor
    s: torch.Tensor


def flow_attention(
    q,
    k,
    v,
    *,
    causal=False,
    feature_map="sigmoid",
    clamp=1.0,
    eps=1e-6,
    extra_eps=0.0,
    competition_axis="tokens",
    key_mask=None,
    query_mask=None,
    cu_seqlens=None,
    initial_state=None,
    output_final_state=False,
):
    """Attend in linear time, with each source's weight a softmax over sources of the flow that leaves it.

    With q and k after the feature map and x (+) y = sum over features of (x + eps)(y + eps): I_l = q_l (+) sum k and
    O_s = k_s (+) sum q are the flows in and out, J_l = q_l (+) sum k/O and P_s = k_s (+) sum q/I the conserved ones:
        y_l = sigmoid(J_l L/S) / I_l * sum_s (q_l . k_s) w_s v_s,  w = S softmax(clamp(P)).
    The causal form replaces every sum by a running one and L, S by the number of tokens so far; reference/
    flow_attention.py writes both out.

    Shapes: q (B, L, H, D), k (B, S, Hkv, D), v (B, S, Hkv, M) with Hkv | H; returns (B, L, H, M). Packed, with
        cu_seqlens: (T, H, D) or (1, T, H, D). L and S are equal in the causal form and in packed tensors.
    Dtypes: float16, bfloat16, float32, or (CPU and reference) float64, all equal; sums, flows and weights float32.
    Layout: last dim contiguous, any other strides, no copy.
    feature_map: "sigmoid", or "relu" for relu(x) + 1e-6. clamp: bound of P, None for none; its gradient is 1 on the
        bound. The causal form cannot subtract a maximum from its running sum: None is 60 there.
    extra_eps: added once more to I, O, J and P, in the causal form before J and P are divided by the tokens so far.
    competition_axis="heads": the softmax runs over the heads instead, as in the code released for Long Range Arena;
        only the reference does that, and only without causal.
    key_mask (B, S), query_mask (B, L), packed (T,), bool, True = keep: hidden sources and sinks count nowhere; L and S
        count the rest. A hidden query gives 0; so do all queries where no source is left. In the causal form a token
        that either mask hides takes no part, as if it were not there.
    cu_seqlens (N+1,) int32 or int64: sequence s owns rows cu[s]..cu[s+1]; rows from cu[N] on give 0, gradient 0.
    initial_state, output_final_state: causal only; a FlowState of the tokens before, and after. None is zeros.
    `FLOW_PRESETS` holds the options of the published models.

    Gradients: q, k, v and the float parts of the state. Deterministic. Host sync: none, except in the reference.
    Cost: (L + S) D M multiply-adds a head, memory O(L + S), without the (T, D, M) tensors of the published code. Whole:
    three reductions, so up to four passes over q and k. Causal: one pass from left to right; on a GPU five, which work
    on all parts of a sequence at once.
    Source: Wu et al., Flowformer: Linearizing Transformers with Conservation Flows (2022).

    >>> q = torch.zeros(1, 3, 1, 2)
    >>> flow_attention(q, q, torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)).flatten() / torch.sigmoid(torch.ones(()))
    tensor([3.0000, 3.0000, 3.0000])
    """
    packed = q.dim() == 3
    call = _prepare(
        q, k, v, causal=causal, feature_map=feature_map, clamp=clamp, eps=eps, extra_eps=extra_eps,
        competition_axis=competition_axis, key_mask=key_mask, query_mask=query_mask, cu_seqlens=cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state,
    )  # fmt: skip
    y, *finals = _run(_TABLE.choose(*call), call)
    y = y[0] if packed else y
    if not output_final_state:
        return y
    sums, total, state = finals
    return y, FlowState(*sums.unbind(2), total, _count_after(call), state)


def flow_attention_step(q, k, v, state=None, *, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0):
    """One token of the causal form: (y, state after it).

    Shapes: q (B, H, D), k (B, Hkv, D), v (B, Hkv, M); y (B, H, M). state: a FlowState, or None before the first token.
    Dtypes, options and gradients as in flow_attention. Cost: reads and writes the state, D (M + 4) + 1 numbers a head,
    whatever the number of tokens before.

    >>> v = torch.full((1, 1, 1), 2.0)
    >>> y, state = flow_attention_step(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), v)
    >>> round(y.item() / torch.sigmoid(torch.tensor(1.0)).item(), 4), state.n.tolist()
    (2.0, [1])
    """
    checks.require(q.dim() == 3, "flow_attention_step", "q must have shape (B, H, D)", tuple(q.shape))
    y, state = flow_attention(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal=True, feature_map=feature_map, clamp=clamp, eps=eps,
        extra_eps=extra_eps, initial_state=state, output_final_state=True,
    )  # fmt: skip
    return y.squeeze(1), state


def _run(backend, call):
    """(y,) or, causal, (y, sums, total, state)."""
    causal = call[_CAUSAL]
    if backend.name == "reference":
        with torch.autocast(call[0].device.type, enabled=False):  # its products stay in float32
            if not causal:
                return (reference.flow_attention(*call[:6], *call[_CAUSAL + 1 :]),)
            return reference.causal_flow_attention(*_causal_arguments(call))
    if not causal:
        arguments = (*call[:6], *call[_CAUSAL + 1 : -1])
        if checks.needs_grad(*call[:3]):
            return (_FlowAttention.apply(backend.bwd[0], backend.fwd[0], *arguments),)
        return backend.fwd[0](*arguments)[:1]
    arguments = _causal_arguments(call)
    if checks.needs_grad(*call[:3], *call[6:8], call[9]):
        return _CausalFlowAttention.apply(backend.bwd[1], backend.fwd[1], *arguments)
    y, _, *finals = backend.fwd[1](*arguments)
    return y, *finals


def _causal_arguments(call):
    """Those of causal_flow_attention_fwd: one mask, since a token is a source and a sink."""
    q, k, v, key_mask, query_mask, cu_seqlens = call[:6]
    mask = query_mask if key_mask is None else key_mask if query_mask is None else key_mask & query_mask
    return (q, k, v, mask, cu_seqlens, *call[6:_CAUSAL], *call[_CAUSAL + 1 : -1])


def _count_after(call):
    q, _, _, mask, cu_seqlens, _, _, count, *_ = _causal_arguments(call)
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if mask is None and cu_seqlens is None:
        seen = torch.full((states,), q.shape[1], dtype=torch.int64, device=q.device)
    elif mask is None:
        seen = cu_seqlens.diff().long()
    elif cu_seqlens is None:
        seen = mask.sum(1)
    else:
        before = torch.nn.functional.pad(mask[0].long().cumsum(0), (1, 0))
        seen = before[cu_seqlens.long()].diff()
    return seen if count is None else count + seen


def _heads_of(x, heads):
    """The gradient of shared key/value heads (B, S, heads, D): the sum over the query heads that read each."""
    return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3)


class _FlowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bwd, fwd, q, k, v, key_mask, query_mask, cu_seqlens, *options):
        y, *saved = fwd(q, k, v, key_mask, query_mask, cu_seqlens, *options)
        ctx.save_for_backward(q, k, v, key_mask, query_mask, cu_seqlens, *saved)
        ctx.bwd, ctx.options = bwd, options
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        dq, dk, dv = ctx.bwd(dy if dy.stride(-1) == 1 else dy.contiguous(), *saved, *ctx.options)
        heads = saved[1].shape[2]
        return (None, None, dq, _heads_of(dk, heads), _heads_of(dv, heads), *[None] * (3 + len(ctx.options)))


class _CausalFlowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bwd, fwd, q, k, v, mask, cu_seqlens, sums, total, count, state, *options):
        y, flows, *finals = fwd(q, k, v, mask, cu_seqlens, sums, total, count, state, *options)
        ctx.save_for_backward(q, k, v, mask, cu_seqlens, sums, total, count, state, flows)
        ctx.bwd, ctx.options = bwd, options
        ctx.set_materialize_grads(False)
        return y, *finals

    @staticmethod
    def backward(ctx, dy, dsums, dtotal, dstate):
        q, k, v, *rest = ctx.saved_tensors
        if dy is None:
            dy = q.new_zeros(v.shape[-1:]).expand(*q.shape[:3], v.shape[-1])
        elif dy.stride(-1) != 1:
            dy = dy.contiguous()
        finals = (None if x is None else x.contiguous() for x in (dsums, dtotal, dstate))
        dq, dk, dv, dsums, dtotal, dstate = ctx.bwd(dy, *finals, q, k, v, *rest, *ctx.options)
        heads = k.shape[2]
        states = (dsums, dtotal, None, dstate) if rest[2] is not None else (None,) * 4
        grads = (dq, _heads_of(dk, heads), _heads_of(dv, heads), None, None, *states)
        return (None, None, *grads, *[None] * len(ctx.options))


_CAUSAL = 10  # place of `causal` in a call


def _prepare(
    q, k, v, *, causal=False, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0, competition_axis="tokens",
    key_mask=None, query_mask=None, cu_seqlens=None, initial_state=None, output_final_state=False,
):  # fmt: skip
    """The public signature, checked: q, k, v (B, T, H, D), masks, cu_seqlens, the state's four tensors, options."""
    for name, value, known in (
        ("feature_map", feature_map, ("sigmoid", "relu")),
        ("competition_axis", competition_axis, ("tokens", "heads")),
    ):
        if value not in known:
            checks.fail(_OP, f"{name} must be one of {', '.join(known)}", repr(value))
    clamp = math.inf if clamp is None else float(clamp)
    checks.require(clamp > 0, _OP, "clamp must be positive or None", clamp)
    checks.require(eps >= 0 and extra_eps >= 0, _OP, "eps and extra_eps must be >= 0", (eps, extra_eps))
    over_heads = competition_axis == "heads"
    if over_heads and causal:
        rule = 'competition_axis="heads" has no causal form'
        checks.fail(_OP, rule, "causal=True", error=NotImplementedError)
    if not causal and (initial_state is not None or output_final_state):
        checks.fail(_OP, "only the causal form has a state", "causal=False")
    q, k, v = _check_tensors(q, k, v, cu_seqlens, causal)
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(_OP, "cu_seqlens", cu_seqlens, q.shape[1], q.device)
    key_mask = _check_mask("key_mask", key_mask, k, cu_seqlens)
    query_mask = _check_mask("query_mask", query_mask, q, cu_seqlens)
    state = _check_state(initial_state, q, v, cu_seqlens)
    options = (bool(causal), feature_map == "relu", clamp, float(eps), float(extra_eps), over_heads)
    return (q, k, v, key_mask, query_mask, cu_seqlens, *state, *options)


def _check_tensors(q, k, v, cu_seqlens, causal):
    names, tensors = ("q", "k", "v"), checks.autocast(q, k, v)
    if q.dim() == 3 and cu_seqlens is not None:
        tensors = tuple(x.unsqueeze(0) for x in tensors)
    for name, x in zip(names, tensors):
        if x.dim() != 4:
            checks.fail(_OP, f"{name} must have shape (B, T, H, D), packed (T, H, D)", tuple(x.shape))
    q, k, v = tensors
    checks.float_dtype(_OP, "q", q)
    checks.same_dtype_device(_OP, names, tensors)
    checks.last_dim_contiguous(_OP, names, tensors)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        checks.fail(_OP, "k must have the batch and width of q", (tuple(q.shape), tuple(k.shape)))
    if v.shape[:3] != k.shape[:3]:
        checks.fail(_OP, "v must have the batch, tokens and heads of k", (tuple(k.shape), tuple(v.shape)))
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        checks.fail(_OP, "the heads of k must divide the heads of q", (q.shape[2], k.shape[2]))
    if q.shape[3] == 0 or v.shape[3] == 0:
        checks.fail(_OP, "head widths must be positive", (q.shape[3], v.shape[3]))
    if (causal or cu_seqlens is not None) and q.shape[1] != k.shape[1]:
        checks.fail(_OP, "q and k must have one length where causal or packed", (q.shape[1], k.shape[1]))
    if cu_seqlens is not None and q.shape[0] != 1:
        checks.fail(_OP, "packed tensors must have a leading dim of 1 or none", q.shape[0])
    return tensors


def _check_mask(name, mask, x, cu_seqlens):
    if mask is None:
        return None
    checks.require(mask.dtype == torch.bool, _OP, f"{name} must be bool, True = keep", mask.dtype, error=TypeError)
    checks.require(mask.device == x.device, _OP, f"{name} must be on the device of q, {x.device}", mask.device)
    if cu_seqlens is not None and mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if mask.shape != x.shape[:2]:
        checks.fail(_OP, f"{name} must have shape {tuple(x.shape[:2])}", tuple(mask.shape))
    return mask


def _check_state(state, q, v, cu_seqlens):
    """(sums (S, H, 4, D), total (S, H), count (S,), state (S, H, D, M)), or four times None."""
    if state is None:
        return (None,) * 4
    if not isinstance(state, (tuple, list)) or len(state) != len(FlowState._fields):
        checks.fail(_OP, "initial_state must be a FlowState", type(state).__name__, error=TypeError)
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, width = q.shape[2:]
    vectors, (e, n, s) = state[:4], state[4:]
    vectors = [
        checks.scan_state(_OP, f"initial_state.{name}", x, (states, heads, width), q)
        for name, x in zip(FlowState._fields, vectors)
    ]
    e = checks.scan_state(_OP, "initial_state.e", e, (states, heads), q)
    s = checks.scan_state(_OP, "initial_state.s", s, (states, heads, width, v.shape[3]), q)
    if n.dtype != torch.int64:
        checks.fail(_OP, "initial_state.n must be int64", n.dtype, error=TypeError)
    if n.shape != (states,) or n.device != q.device:
        checks.fail(_OP, f"initial_state.n must have shape {(states,)} on {q.device}", (tuple(n.shape), n.device))
    return torch.stack(vectors, 2), e.contiguous(), n.contiguous(), s.contiguous()


def _refuse_heads(call):
    return "the softmax runs over the tokens of a head" if call[-1] else None


def _refuse_cpu(*call):
    return _native.refuse_cpu(call[0]) or _refuse_heads(call)


def _refuse_triton(*call):
    q, _, v = call[:3]
    reason = dispatch.refuse_triton(q) or _refuse_heads(call)
    if reason is None and max(q.shape[3], v.shape[3]) > 128:
        reason = f"head widths must be at most 128; got {max(q.shape[3], v.shape[3])}"
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    return reason


def _probe(device):
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    # Entry points of the whole and the causal form.
    dispatch.Backend("cpu", _refuse_cpu, (_fwd, _causal_fwd), (_bwd, _causal_bwd)),
    dispatch.Backend("triton", _refuse_triton, _triton_fwd, _triton_bwd),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


def _states(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@fake("flow_attention_fwd")
def _fwd_fake(q, k, v, key_mask, query_mask, cu_seqlens, *options):
    (batch, sinks, heads, width), sources, width_v = q.shape, k.shape[1], v.shape[3]
    shapes = ((2, batch, heads, sinks), (2, batch, heads, sources))
    states = _states(q, cu_seqlens)
    shapes = (*shapes, (states, heads, 4, width), (states, heads), (states, heads, width, width_v))
    saved = (q.new_empty(shape, dtype=checks.state_dtype(q)) for shape in shapes)
    return q.new_empty((batch, sinks, heads, width_v)), *saved


@fake("flow_attention_bwd")
def _bwd_fake(dy, q, k, v, *rest):
    shapes = (q.shape, (*k.shape[:2], *q.shape[2:]), (*k.shape[:2], q.shape[2], v.shape[3]))
    return tuple(q.new_empty(shape) for shape in shapes)


def _state_fakes(q, v, states):
    heads, width = q.shape[2:]
    shapes = ((states, heads, 4, width), (states, heads), (states, heads, width, v.shape[3]))
    return tuple(q.new_empty(shape, dtype=checks.state_dtype(q)) for shape in shapes)


@fake("causal_flow_attention_fwd")
def _causal_fwd_fake(q, k, v, mask, cu_seqlens, *rest):
    batch, length, heads, _ = q.shape
    flows = q.new_empty((5, batch, heads, length), dtype=checks.state_dtype(q))
    finals = _state_fakes(q, v, _states(q, cu_seqlens))
    return q.new_empty((batch, length, heads, v.shape[3])), flows, *finals


@fake("causal_flow_attention_bwd")
def _causal_bwd_fake(dy, dsums, dtotal, dstate, q, k, v, mask, cu_seqlens, sums, *rest):
    return *_bwd_fake(dy, q, k, v), *_state_fakes(q, v, 0 if sums is None else sums.shape[0])
