"""Linear attention and retention: q (k v^T summed over keys), in chunks, with states that carry over."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.linear_attention import (
    BIDIRECTIONAL,
    CAUSAL,
    FEATURE_MAPS,
    NON_CAUSAL,
    REVERSE,
    feature,
)
from flowattn.reference.linear_attention import linear_attention as reference

_OP = "linear_attention"
_TENSORS = 9  # tensors among the arguments of the private ops: q .. cu_seqlens
_fwd, _bwd = op("linear_attention_fwd"), op("linear_attention_bwd")
_fwd_triton, _bwd_triton = op("linear_attention_fwd_triton"), op("linear_attention_bwd_triton")


class LinearState(NamedTuple):
    """What linear attention knows of the tokens it has read; float32 (float64 for float64 inputs)."""

    s: torch.Tensor  # (S, H, D, M) sum of decayed k v^T
    z: torch.Tensor | None = None  # (S, H, D) sum of decayed k, kept where there is a normaliser


def linear_attention(
    q,
    k,
    v,
    *,
    causal=True,
    feature_map="identity",
    normalize=False,
    scale=None,
    decay=None,
    eps=1e-6,
    key_mask=None,
    token_scale=None,
    initial_state=None,
    output_final_state=False,
    reverse=False,
    cu_seqlens=None,
):
    """Attend without a softmax, on phi(q) and phi(k): S_t = e^g_t S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t.

    Shapes: q (B, T, H, D); k (B, T, Hkv, D) and v (B, T, Hkv, M) with Hkv | H; returns (B, T, H, M). Packed, with
        cu_seqlens: (T, H, D) or (1, T, H, D), and so on. Without causal and decay, k and v may have another length.
    Dtypes: q, k, v alike, float16, bfloat16, float32 or (CPU and reference) float64. phi, decays, normalisers, sums and
        states run in float32 (float64); half-precision products take operands rounded after phi.
    Layout: last dim contiguous, any other strides, so (B, H, T, D) tensors come as x.transpose(1, 2); no copy.
    causal: True: o_t sums over the tokens up to t; False: over all tokens; with decay, key j then weighs
        e^(sum of g between i and j) on both sides (retention in both directions).
    feature_map: phi, one of "identity", "elu1" (elu(x) + 1), "relu", "relu_eps" (relu(x) + 1e-6), "sigmoid", "exp",
        "softmax" (over D), or a function that is applied to q and k beforehand. "exp" limits the exponent to 80; with a
        normaliser it first subtracts the maximum of each query and, where not causal, of each head's keys.
    normalize: divide by scale q_t . z_t + eps with z_t = e^g_t z_(t-1) + k_t. It is taken as it comes: phi >= 0 keeps
        it positive, with "identity" it can cross zero. scale then cancels, but for eps.
    scale: default D ** -0.5, with normalize 1.
    decay: g <= 0, natural log: (H,) one a head, or (B, T, H), packed (T, H), one a token. The gate of a token acts on
        the state before it, the initial state too. Below -1e4 (Triton: -100) it counts as that.
    key_mask (B, T), packed (T,), bool: False leaves a key out.
    token_scale (B, T), packed (T,): multiplies o_t.
    initial_state: LinearState(s, z) or (s, z) before the first token, s (S, H, D, M), z (S, H, D) if normalize; S = B,
        or the number of packed sequences.
    output_final_state: also return the LinearState after the last token.
    reverse: from the last token to the first within each sequence: flip, run, flip. Nothing changes where not causal.
    cu_seqlens (S+1,) int32 or int64: sequence s owns rows cu[s]..cu[s+1]; rows from cu[S] on give 0, gradient 0.

    A sequence without tokens returns its initial state. On the CPU a bad cu_seqlens raises ValueError.
    Gradients: q, k, v, decay, token_scale, the states; once (no gradient of a gradient). Deterministic. Host sync:
        none, except in the reference.
    Cost: O(T D M) FLOPs, O(T (D + M)) memory. Reads q, k, v once and writes o once; a call with few heads is split over
        T and reads k, v twice. On a GPU the backward of a learned decay, of float32 and float16 and of D <= 64 keeps
        T D M / 32 numbers of states a head, in the dtype of the products.
    Source: Katharopoulos et al., Transformers are RNNs (2020), sections 3.2 to 3.4; Sun et al., Retentive Network
        (2023), section 2.1; Yang et al., Gated Linear Attention (2024), for the chunks and the gradient of gates.

    >>> k, v = torch.ones(1, 3, 1, 1), torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> linear_attention(k, k, v, normalize=True, eps=0.0).flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    packed = cu_seqlens is not None and q.dim() == 3
    call = _prepare(
        q, k, v, causal=causal, feature_map=feature_map, normalize=normalize, scale=scale, decay=decay, eps=eps,
        key_mask=key_mask, token_scale=token_scale, initial_state=initial_state, output_final_state=output_final_state,
        reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out, s, z = _run(call)
    if packed:
        out = out[0]
    return (out, LinearState(s, z if normalize else None)) if output_final_state else out


def linear_attention_step(
    q, k, v, state=None, *, feature_map="identity", normalize=False, scale=None, decay=None, eps=1e-6, token_scale=None
):
    """Take one token of each sequence: the new state is e^g s + k v^T, and o = scale q . s with it.

    Shapes: q (B, H, D), k (B, Hkv, D), v (B, Hkv, M); decay (H,) or (B, H); token_scale (B,). state: the LinearState
        so far, None before the first token. Returns (o (B, H, M), the new LinearState).
    Everything else, gradients included, is as in linear_attention, of which this is one step.
    Cost: the state is read and written once.

    >>> one, state = torch.ones(1, 1, 1), None
    >>> for _ in range(3):
    ...     o, state = linear_attention_step(one, one, one, state)
    >>> o.item(), state.s.item()
    (3.0, 3.0)
    """
    name = "linear_attention_step"
    checks.require(q.dim() == 3, name, "q must have shape (B, H, D)", tuple(q.shape))
    checks.require(k.dim() == 3 and v.dim() == 3, name, "k and v must have shape (B, Hkv, width)", tuple(k.shape))
    if decay is not None and decay.dim() == 2:
        decay = decay.unsqueeze(1)
    out, state = linear_attention(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), feature_map=feature_map, normalize=normalize, scale=scale,
        decay=decay, eps=eps, token_scale=None if token_scale is None else token_scale.unsqueeze(1),
        initial_state=state, output_final_state=True,
    )  # fmt: skip
    return out.squeeze(1), state


def _run(call):
    """(out, s, z) of a checked call."""
    backend = _TABLE.choose(*call)
    mode, decay, row_scale = call[-2], call[3], call[5]
    if mode == BIDIRECTIONAL:
        fused = backend.name == "triton" and decay.shape[:2] == (1, 1) and not checks.needs_grad(decay, row_scale)
        if not fused:
            return _both_directions(*call)
    if checks.needs_grad(row_scale):  # a factor of the result: its gradient needs no kernel
        out, s, z = _run((*call[:5], None, *call[6:]))
        return (out * row_scale[..., None, None]).to(out.dtype), s, z
    if backend.name == "reference":
        with torch.autocast(call[0].device.type, enabled=False):  # its products stay in float32
            return reference(*call)
    if checks.needs_grad(*call[:_TENSORS]):
        return _LinearAttention.apply(backend, *call)
    out, _, s, z = backend.fwd(*call)
    return out, s, z


def _both_directions(
    q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize
):
    """Forward + reverse - diagonal in two calls, added before anything is rounded or divided.

    Triton has a kernel that reads q, k, v for both directions at once, for decays that are one a head and not learned.
    """
    dtype, work, group = q.dtype, checks.state_dtype(q), q.shape[2] // k.shape[2]
    q, k, v = (x.to(work) for x in (q, k, v))
    values = F.pad(v, (0, 1), value=1.0) if normalize else v  # the column of ones sums up the weights
    rest = (decay, key_weight, None, None, None, cu_seqlens, 1.0, 0.0, map_q, map_k)
    sides = (_run((q, k, values, *rest, side, False)) for side in (CAUSAL, REVERSE))
    (forward, s, z), (reverse, _, _) = sides
    keys = feature(k, FEATURE_MAPS[map_k]).repeat_interleave(group, 2)
    diagonal = (feature(q, FEATURE_MAPS[map_q]) * keys).sum(-1, keepdim=True)
    if key_weight is not None:
        diagonal = diagonal * key_weight[..., None, None]
    if cu_seqlens is not None:
        used = torch.arange(q.shape[1], device=q.device) < cu_seqlens[-1]
        diagonal = diagonal.masked_fill(~used[:, None, None], 0.0)
    y = forward + reverse - diagonal * values.repeat_interleave(group, 2)
    y = y[..., :-1] * (scale / (scale * y[..., -1:] + eps)) if normalize else y * scale
    if row_scale is not None:
        y = y * row_scale[..., None, None]
    return y.to(dtype), s, z


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *call):
        out, den, s, z = backend.fwd(*call)
        ctx.save_for_backward(*call[:_TENSORS], out, den, s, z)
        ctx.bwd, ctx.options = backend.bwd, call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, s, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, ds, dz):
        q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, out, den, s, z = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        # Without a normaliser z is empty, and torch.compile hands in its gradient all the same.
        ds, dz = (None if x is None or x.dim() < 3 else x.contiguous() for x in (ds, dz))
        want_ddecay = ctx.needs_input_grad[4]
        dq, dk, dv, ddecay, ds0, dz0 = ctx.bwd(
            dout, ds, dz, q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, out, den, s, z, *ctx.options,
            want_ddecay,
        )  # fmt: skip
        if not want_ddecay:
            ddecay = None
        elif decay.shape != ddecay.shape:
            ddecay = ddecay.sum_to_size(decay.shape)
        states = (None if s0 is None else ds0, None if z0 is None else dz0)
        return (None, dq, dk, dv, ddecay, None, None, *states, None, *[None] * len(ctx.options))


def _prepare(
    q, k, v, *, causal=True, feature_map="identity", normalize=False, scale=None, decay=None, eps=1e-6, key_mask=None,
    token_scale=None, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None,
):  # fmt: skip
    """The public signature, checked, as the arguments of the private op."""
    packed = cu_seqlens is not None and q.dim() == 3
    if packed:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        decay = decay.unsqueeze(0) if decay is not None and decay.dim() == 2 else decay
        key_mask, token_scale = (x if x is None or x.dim() != 1 else x.unsqueeze(0) for x in (key_mask, token_scale))
    known = isinstance(feature_map, str) and feature_map in FEATURE_MAPS and feature_map != "exp_shifted"
    if not known and not callable(feature_map):
        rule = f"feature_map must be a function or one of {', '.join(x for x in FEATURE_MAPS if x != 'exp_shifted')}"
        checks.fail(_OP, rule, repr(feature_map))
    if not known:
        q, k = feature_map(q), feature_map(k)
    q, k, v = _check_tensors(q, k, v)
    (_, length, heads, width), work = q.shape, checks.state_dtype(q)
    bidirectional = not causal and decay is not None
    if (causal or decay is not None or cu_seqlens is not None) and k.shape[1] != length:
        checks.fail(_OP, "q and k must have one length if causal, with decay or cu_seqlens", (length, k.shape[1]))
    states = q.shape[0]
    if cu_seqlens is not None:
        cu_seqlens, _, states = checks.scan_sequences(_OP, q, cu_seqlens, None)
    if decay is not None:
        decay = _check_decay(decay, q).to(work)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            checks.fail(_OP, "key_mask must be bool, True = keep", key_mask.dtype, error=TypeError)
        key_mask = _check_rows("key_mask", key_mask, k).to(work)
    if token_scale is not None:
        token_scale = _check_rows("token_scale", token_scale, q).to(work)
    if bidirectional and (initial_state is not None or output_final_state):
        rule = "states have a direction: none with causal=False and decay"
        checks.fail(_OP, rule, "initial_state or output_final_state", error=NotImplementedError)
    s0 = z0 = None
    if initial_state is not None:
        s0, z0 = _check_state(initial_state, (states, heads, width, v.shape[3]), normalize, q)
    map_q = map_k = feature_map if known else "identity"
    if feature_map == "exp" and normalize:
        map_q = "exp_shifted"
        if not causal:
            k = _shift_keys(k, key_mask, cu_seqlens)
    if scale is None:
        scale = 1.0 if normalize else width**-0.5
    mode = BIDIRECTIONAL if bidirectional else NON_CAUSAL if not causal else REVERSE if reverse else CAUSAL
    return (
        q, k, v, decay, key_mask, token_scale, s0, z0, cu_seqlens, float(scale), float(eps),
        FEATURE_MAPS.index(map_q), FEATURE_MAPS.index(map_k), mode, bool(normalize),
    )  # fmt: skip


def _check_tensors(q, k, v):
    names, tensors = ("q", "k", "v"), checks.autocast(q, k, v)
    q, k, v = tensors
    shapes = of_q, of_k, of_v = q.shape, k.shape, v.shape
    for name, shape in zip(names, shapes):
        if len(shape) != 4:
            checks.fail(_OP, f"{name} must have shape (B, T, heads, width)", tuple(shape))
    checks.float_dtype(_OP, "q", q)
    checks.same_dtype_device(_OP, names, tensors)
    checks.last_dim_contiguous(_OP, names, tensors)
    (batch, _, heads, width), (batch_k, _, heads_kv, width_k) = of_q, of_k
    if batch_k != batch or width_k != width:
        checks.fail(_OP, "k must have the batch and width of q", (tuple(of_q), tuple(of_k)))
    if of_v[:3] != of_k[:3]:
        checks.fail(_OP, "v must have the batch, length and heads of k", (tuple(of_k), tuple(of_v)))
    if heads_kv == 0 or heads % heads_kv != 0:
        checks.fail(_OP, "the heads of k must divide the heads of q", (heads, heads_kv))
    if width == 0 or of_v[3] == 0:
        checks.fail(_OP, "head widths must be positive", (width, of_v[3]))
    return tensors


def _check_decay(decay, q):
    """decay as (B, T, H), with 1 for the dims in which it is constant."""
    checks.float_dtype(_OP, "decay", decay)
    checks.require(decay.device == q.device, _OP, f"decay must be on the device of q, {q.device}", decay.device)
    shapes = ((q.shape[2],), tuple(q.shape[:3]))
    if tuple(decay.shape) not in shapes:
        checks.fail(_OP, f"decay must have shape {shapes[0]} or {shapes[1]}", tuple(decay.shape))
    return decay.view(1, 1, -1) if decay.dim() == 1 else decay


def _check_rows(name, x, tokens):
    checks.require(x.device == tokens.device, _OP, f"{name} must be on the device of q, {tokens.device}", x.device)
    checks.require(
        x.shape == tokens.shape[:2], _OP, f"{name} must have shape {tuple(tokens.shape[:2])}", tuple(x.shape)
    )
    return x


def _check_state(state, shape, normalize, q):
    rule = "initial_state must be a LinearState (s, z)"
    checks.require(isinstance(state, tuple) and len(state) == 2, _OP, rule, type(state).__name__, error=TypeError)
    s, z = state
    s = checks.scan_state(_OP, "s of initial_state", s, shape, q).contiguous()
    if not normalize:
        return s, None
    checks.require(z is not None, _OP, "z of initial_state must be a tensor with normalize", None, error=TypeError)
    if z.dim() == 4 and z.shape[1] == 1:  # (B, 1, H, D), as other libraries keep it
        z = z.squeeze(1)
    return s, checks.scan_state(_OP, "z of initial_state", z, shape[:3], q).contiguous()


def _shift_keys(k, key_weight, cu_seqlens):
    """k less the largest entry of each sequence and head, a constant, so that exp cannot overflow."""
    top = k.detach().amax(-1).to(checks.state_dtype(k))  # (B, T, Hkv)
    if key_weight is not None:
        top = top.masked_fill(key_weight[..., None] == 0, float("-inf"))
    if cu_seqlens is None:
        top = top.amax(1, keepdim=True) if k.shape[1] else top[:, :0]
    else:
        rows = torch.arange(k.shape[1], device=k.device, dtype=cu_seqlens.dtype)
        owner = torch.bucketize(rows, cu_seqlens[1:], right=True)[None, :, None].expand_as(top)
        largest = top.new_full((1, cu_seqlens.shape[0], top.shape[2]), float("-inf"))
        top = largest.scatter_reduce(1, owner, top, "amax").gather(1, owner)
    top = top.masked_fill(top == float("-inf"), 0.0)
    return (k - top[..., None]).to(k.dtype)


def _refuse_cpu(q, *rest):
    return _native.refuse_cpu(q)


def _refuse_triton(q, k, v, *rest):
    reason, widest = dispatch.refuse_triton(q), max(q.shape[3], v.shape[3])
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    if reason is None and widest > 256:
        reason = f"head widths must be at most 256; got {widest}"
    map_q, map_k = rest[-4:-2]
    if reason is None and q.shape[3] > 128 and max(map_q, map_k) >= FEATURE_MAPS.index("exp_shifted"):
        reason = "maps over whole rows need head widths up to 128 (pass a function as feature_map)"
    return reason


def _probe(device):
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, _bwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("linear_attention_fwd")
def _fwd_fake(
    q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize
):  # fmt: skip
    (batch, length, heads, width), value_width = q.shape, v.shape[3]
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = {"dtype": checks.state_dtype(q)}
    den = q.new_empty((batch, length, heads) if normalize else 0, **wide)
    directed = mode != BIDIRECTIONAL
    z = q.new_empty((states, heads, width) if normalize and directed else 0, **wide)
    s = q.new_empty((states, heads, width, value_width) if directed else 0, **wide)
    return q.new_empty((batch, length, heads, value_width)), den, s, z


@fake("linear_attention_bwd")
def _bwd_fake(
    dout, ds, dz, q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, out, den, s, z, scale, eps, map_q, map_k,
    mode, normalize, want_ddecay,
):  # fmt: skip
    ddecay = s.new_empty(q.shape[:3] if want_ddecay else 0)
    ds0, dz0 = (s.new_empty(0 if x is None else x.shape) for x in (s0, z0))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ddecay, ds0, dz0
