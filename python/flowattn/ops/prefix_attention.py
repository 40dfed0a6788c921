"""Softmax attention of one query over every prefix, as a scan."""

from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference import prefix_attention as reference

_fwd, _bwd = op("prefix_attention_fwd"), op("prefix_attention_bwd")
_scores_fwd, _scores_bwd = op("aaren_scores_fwd"), op("aaren_scores_bwd")


class PrefixState(NamedTuple):
    """What a set of tokens leaves behind: m (S, H), u = sum exp(s_i - m) (S, H), w = sum exp(s_i - m) v_i (S, H, D).

    float32 (float64 for float64 values). Any m serves that no score exceeds by much; the ops return the largest score,
    -inf for no token. It is a gauge: only u * exp(m) and w * exp(m) have a meaning, and no gradient passes through m.
    """

    m: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor

    def read(self):
        """The attention output of the set: w / u (S, H, D), 0 for no token."""
        return reference.read_out(self)[0]


def prefix_attention(
    scores,
    values,
    *,
    mask=None,
    cu_seqlens=None,
    reset=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    return_lse=False,
):
    """Average the values of every prefix with softmax weights: o_t = sum_{i<=t} exp(s_i - L_t) v_i.

    L_t = log sum_{i<=t} exp(s_i). It equals causal attention in which every query is the same, in O(T) time and with a
    state of D + 2 numbers a head.

    Shapes: scores (B, T, H), values (B, T, H, D); packed, with cu_seqlens, (T, H) and (T, H, D), or with a leading dim
        of 1, which is returned alike. Returns o in the shape of values.
    Dtypes: values float16, bfloat16, float32 or (CPU and reference) float64; scores the same or float32, natural log.
        Sums and states run in float32 or wider; only the stored o is rounded.
    Layout: last dim of values contiguous, any other strides, no copy.
    mask (B, T) or (B, T, H), packed (T,) or (T, H), bool, True = keep. A token with False, or with score -inf, is as if
        it were not there: its value enters no product, its gradients are 0, its output is that of its prefix.
    cu_seqlens (S+1,) int32 or int64: sequence s owns rows cu[s]..cu[s+1]; rows from cu[S] on give 0 and LSE -inf.
    reset (B, T), packed (T,), bool: the scan forgets everything before (reverse: after) such a token, its initial
        state too.
    initial_state: the PrefixState that each sequence continues, S = B or the number of packed sequences.
    output_final_state: also return the PrefixState after each sequence.
    reverse: suffixes instead of prefixes, within each sequence.
    return_lse: also return L (B, T, H), packed (T, H), in the dtype of the state, differentiable.

    A prefix without a token left gives 0 and LSE -inf, with zero gradients. A NaN or +inf score, or a NaN value, makes
    its head NaN from there to the end of its sequence. On the CPU a bad cu_seqlens raises ValueError; on a GPU it gives
    wrong results, but reads nothing out of bounds.
    Gradients: scores, values, u and w of the initial state, through LSE and final state too. Deterministic, on the CPU
    for any number of threads, on a GPU in every schedule. Host sync: none, except in the reference.
    Cost: reads scores and values once, writes o once; backward reads values, o and its gradient, writes two gradients.
    On the CPU sequences beyond 4096 tokens are cut into chunks where there are fewer rows than threads.
    Source: Feng et al., Attention as an RNN (2024), section 3.2: the scan over (m, u, w); here in the equivalent form
    o_t = a_t o_{t-1} + g_t v_t with scalars a_t = exp(L_{t-1} - L_t) and g_t = exp(s_t - L_t).

    >>> o = prefix_attention(torch.zeros(1, 3, 1), torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1, 1))
    >>> o.flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    call = _prepare(
        scores, values, mask=mask, cu_seqlens=cu_seqlens, reset=reset, initial_state=initial_state, reverse=reverse
    )
    return _run(_TABLE.choose(*call), call, values.dim() == 3, output_final_state, return_lse)


def aaren_attention(
    query,
    keys,
    values,
    *,
    scale=None,
    mask=None,
    cu_seqlens=None,
    reset=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    return_lse=False,
):
    """Attend with one query per head to every prefix: prefix_attention with s_t = scale * q_h . k_t.

    Shapes: query (H, K), or (B, H, K) for a query of each batch row; keys (B, T, H, K); values (B, T, H, D). Packed,
        with cu_seqlens: keys (T, H, K), values (T, H, D), or with a leading dim of 1, and query (H, K).
    Dtypes: query, keys and values alike; the scores are float32 (float64) and are never rounded to half.
    scale: default K ** -0.5.

    The other arguments, the results and the rules are those of prefix_attention. The gradient of the query is summed
    in a fixed order.
    Cost: that of prefix_attention and one read of the keys; backward reads and writes one tensor of their size more.
    Source: Feng et al., Attention as an RNN (2024), section 3.3 (Aaren).

    >>> q, k, v = torch.randn(2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 4)
    >>> aaren_attention(q, k, v).shape
    torch.Size([1, 5, 2, 4])
    """
    query, keys, scale = _prepare_query(query, keys, values, scale, cu_seqlens)
    backend = _AAREN_TABLE.choose(query, keys, scale)
    if backend.name == "reference":
        scores = reference.aaren_scores(query, keys, scale)
    elif checks.needs_grad(query, keys):
        scores = _AarenScores.apply(backend, query, keys, scale)
    else:
        scores = backend.fwd(query, keys, scale)
    return prefix_attention(
        scores if values.dim() == 4 else scores[0], values, mask=mask, cu_seqlens=cu_seqlens, reset=reset,
        initial_state=initial_state, output_final_state=output_final_state, reverse=reverse, return_lse=return_lse,
    )  # fmt: skip


def prefix_attention_step(state, scores, values):
    """Take one token of a stream: returns (o (B, H, D), the next PrefixState).

    Shapes: state PrefixState with S = B, or None before the first token; scores (B, H); values (B, H, D). The sequence
    of outputs is that of prefix_attention on all tokens at once. Dtypes and gradients: those of prefix_attention.
    Cost: memory and time O(H D) for each sequence, whatever came before.

    >>> o, state = prefix_attention_step(None, torch.zeros(1, 1), torch.ones(1, 1, 4))
    >>> o, state = prefix_attention_step(state, torch.zeros(1, 1), 3 * torch.ones(1, 1, 4))
    >>> o.flatten().tolist(), state.u.item()
    ([2.0, 2.0, 2.0, 2.0], 2.0)
    """
    rule = "values must have shape (B, H, D)"
    checks.require(values.dim() == 3, "prefix_attention_step", rule, tuple(values.shape))
    rule = f"scores must have shape {tuple(values.shape[:2])}"
    checks.require(scores.shape == values.shape[:2], "prefix_attention_step", rule, tuple(scores.shape))
    out, state = prefix_attention(
        scores.unsqueeze(1), values.unsqueeze(1), initial_state=state, output_final_state=True
    )
    return out.squeeze(1), state


def prefix_state_merge(a, b):
    """Merge the states of two sets of tokens into that of both: shapes as in PrefixState, in any common leading dims.

    Associative and commutative up to rounding. Differentiable in u and w.

    >>> state = PrefixState(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, 4))
    >>> prefix_state_merge(state, state).u.item()
    2.0
    """
    for name, x, y in zip(("m", "u", "w"), a, b):
        rule = f"{name} of both states must have one shape"
        checks.require(x.shape == y.shape, "prefix_state_merge", rule, (tuple(x.shape), tuple(y.shape)))
    return PrefixState(*reference.merge(a, b))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, reverse, return_lse, scores, values, mask, reset, cu_seqlens, m0, u0, w0):
        result = backend.fwd(scores, values, mask, reset, cu_seqlens, m0, u0, w0, reverse, True, return_lse)
        out, m, u, lse, m_final, u_final, w_final = result
        ctx.save_for_backward(scores, values, mask, reset, cu_seqlens, m0, out, m, u, u_final)
        ctx.bwd, ctx.reverse = backend.bwd, reverse
        ctx.mark_non_differentiable(m_final)
        ctx.set_materialize_grads(False)
        return out, lse, m_final, u_final, w_final

    @staticmethod
    def backward(ctx, dout, dlse, _, du_final, dw_final):
        out, reverse = ctx.saved_tensors[6], ctx.reverse
        if dout is None:
            dout = out.new_zeros(out.shape[-1:]).expand_as(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        if dw_final is not None:
            dw_final = dw_final.contiguous()
        dscores, dvalues, du0, dw0 = ctx.bwd(dout, dlse, du_final, dw_final, *ctx.saved_tensors, reverse)
        if ctx.saved_tensors[5] is None:
            du0 = dw0 = None
        return None, None, None, dscores, dvalues, None, None, None, None, du0, dw0


class _AarenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, keys, scale):
        ctx.save_for_backward(query, keys)
        ctx.bwd, ctx.scale = backend.bwd, scale
        return backend.fwd(query, keys, scale)

    @staticmethod
    def backward(ctx, dscores):
        return None, *ctx.bwd(dscores, *ctx.saved_tensors, ctx.scale), None


def _run(backend, call, packed, output_final_state, return_lse):
    """Call the backend; arrange the results as the public functions return them."""
    scores, values, mask, reset, cu_seqlens, m0, u0, w0, reverse = call
    if backend.name == "reference":
        out, lse, *state = reference.prefix_attention(*call)
    elif checks.needs_grad(scores, values, u0, w0):
        out, lse, *state = _PrefixAttention.apply(backend, reverse, return_lse, *call[:-1])
    else:
        out, _, _, lse, *state = backend.fwd(*call, False, return_lse)
    if packed:
        out, lse = out[0], lse[0] if return_lse else None
    extras = [PrefixState(*state)] if output_final_state else []
    if return_lse:
        extras.append(lse)
    return (out, *extras) if extras else out


def _prepare(
    scores, values, *, mask=None, cu_seqlens=None, reset=None, initial_state=None, output_final_state=False,
    reverse=False, return_lse=False,
):  # fmt: skip
    """The public signature, checked, as the arguments of the private op, all with batch and time dims."""
    name = "prefix_attention"
    checks.float_dtype(name, "values", values)
    state_dtype = checks.state_dtype(values)
    if torch.is_autocast_enabled(values.device.type) and scores.is_floating_point():
        scores = scores.to(state_dtype)  # values of either precision meet scores of the other
    rule = f"scores must have the dtype of values, {values.dtype}, or {state_dtype}"
    checks.require(scores.dtype in (values.dtype, state_dtype), name, rule, scores.dtype, error=TypeError)
    checks.require(
        scores.device == values.device, name, f"scores must be on the device of values, {values.device}", scores.device
    )
    rule = "values must have shape (B, T, H, D)" + ("" if cu_seqlens is None else " or, packed, (T, H, D)")
    packed = cu_seqlens is not None and values.dim() == 3
    checks.require(packed or values.dim() == 4, name, rule, tuple(values.shape))
    rule = f"scores must have the shape of values without its last dim, {tuple(values.shape[:-1])}"
    checks.require(scores.shape == values.shape[:-1], name, rule, tuple(scores.shape))
    if packed:
        scores, values = scores.unsqueeze(0), values.unsqueeze(0)
        mask = mask.unsqueeze(0) if mask is not None else None
    checks.last_dim_contiguous(name, ("values",), (values,))
    cu_seqlens, reset, states = checks.scan_sequences(name, values, cu_seqlens, reset)
    if mask is not None:
        checks.require(mask.dtype == torch.bool, name, "mask must be bool, True = keep", mask.dtype, error=TypeError)
        checks.require(
            mask.device == values.device, name, f"mask must be on the device of values, {values.device}", mask.device
        )
        batch_time, fits = scores.shape[:2], mask.shape == scores.shape[:2] or mask.shape == scores.shape
        rule = f"mask must have shape {tuple(batch_time)} or {tuple(scores.shape)}"
        checks.require(fits, name, rule, tuple(mask.shape))
        mask = mask if mask.dim() == 3 else mask.unsqueeze(-1).expand(scores.shape)
    m0, u0, w0 = _state(name, initial_state, states, values)
    return scores, values, mask, reset, cu_seqlens, m0, u0, w0, bool(reverse)


def _state(name, state, states, values):
    if state is None:
        return None, None, None
    rule = "initial_state must be a PrefixState (m, u, w)"
    checks.require(isinstance(state, tuple) and len(state) == 3, name, rule, type(state).__name__, error=TypeError)
    heads, width = values.shape[2:]
    shapes = ((states, heads), (states, heads), (states, heads, width))
    return tuple(
        checks.scan_state(name, f"{part} of initial_state", x, shape, values)
        for part, x, shape in zip("muw", state, shapes)
    )


def _prepare_query(query, keys, values, scale, cu_seqlens):
    name = "aaren_attention"
    query, keys = checks.autocast(query, keys)
    checks.float_dtype(name, "keys", keys)
    checks.same_dtype_device(name, ("keys", "query"), (keys, query))
    if cu_seqlens is not None and keys.dim() == 3:
        keys = keys.unsqueeze(0)
    checks.require(keys.dim() == 4, name, "keys must have shape (B, T, H, K)", tuple(keys.shape))
    batch, _, heads, width = keys.shape
    shapes = ((heads, width), (batch, heads, width))
    rule = f"query must have shape {shapes[0]} or {shapes[1]}"
    checks.require(tuple(query.shape) in shapes, name, rule, tuple(query.shape))
    checks.require(width > 0, name, "the key width must be positive", width)
    checks.last_dim_contiguous(name, ("query", "keys"), (query, keys))
    return query if query.dim() == 3 else query.unsqueeze(0), keys, width**-0.5 if scale is None else float(scale)


def _prepare_aaren(query, keys, values, *, scale=None, cu_seqlens=None, **options):
    """The call tuple for dispatch.explain."""
    return _prepare_query(query, keys, values, scale, cu_seqlens)


def _refuse_cpu(first, *rest):
    return _native.refuse_cpu(first)


def _refuse_cuda(_, wide, *rest):
    """`wide`: values, or the keys of aaren_scores."""
    reason = _native.refuse_cuda(wide)
    if reason is None and wide.dtype == torch.float64:
        return "no float64"
    if reason is None and wide.shape[-1] == 0:
        return "no rows without columns"
    return reason


def _probe(device):
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x[..., 0], x


def _probe_aaren(device):
    _, x = _probe(device)
    return x[0, 0], x, x


_TABLE = dispatch.Table(
    "prefix_attention",
    _prepare,
    dispatch.Backend("cuda", _refuse_cuda, _fwd, _bwd),
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)
_AAREN_TABLE = dispatch.Table(
    "aaren_attention",
    _prepare_aaren,
    dispatch.Backend("cuda", _refuse_cuda, _scores_fwd, _scores_bwd),
    dispatch.Backend("cpu", _refuse_cpu, _scores_fwd, _scores_bwd),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe_aaren,
)


@fake("prefix_attention_fwd")
def _fwd_fake(scores, values, mask, reset, cu_seqlens, m0, u0, w0, reverse, keep_sums, keep_lse):
    batch, length, heads, width = values.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = {"dtype": checks.state_dtype(values)}
    m, u, lse = (
        values.new_empty((batch, length if keep else 0, heads), **wide) for keep in (keep_sums, keep_sums, keep_lse)
    )
    m_final, u_final = (values.new_empty((states, heads), **wide) for _ in range(2))
    w_final = values.new_empty((states, heads, width), **wide)
    return values.new_empty(values.shape), m, u, lse, m_final, u_final, w_final


@fake("prefix_attention_bwd")
def _bwd_fake(dout, dlse, du_final, dw_final, scores, values, mask, reset, cu_seqlens, m0, out, m, u, u_final, reverse):
    states = 0 if m0 is None else m0.shape[0]
    heads, width = values.shape[2:]
    wide = {"dtype": checks.state_dtype(values)}
    du0, dw0 = values.new_empty((states, heads), **wide), values.new_empty((states, heads, width), **wide)
    return scores.new_empty(scores.shape), values.new_empty(values.shape), du0, dw0


@fake("aaren_scores_fwd")
def _scores_fake(query, keys, scale):
    return keys.new_empty(keys.shape[:3], dtype=checks.state_dtype(keys))


@fake("aaren_scores_bwd")
def _scores_bwd_fake(dscores, query, keys, scale):
    return query.new_empty(query.shape), keys.new_empty(keys.shape)
