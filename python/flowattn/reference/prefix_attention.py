"""Prefix attention in plain torch, one token at a time: the oracle and the fallback."""

import torch

NEGATIVE_INFINITY = float("-inf")


def rescale(old, new):
    """exp(old - new) for gauges old <= new, 0 where nothing was summed under the old one."""
    nothing = old == NEGATIVE_INFINITY
    return torch.exp((old - new).masked_fill(nothing, 0.0)).masked_fill(nothing, 0.0)


def merge(a, b):
    """The state (m, u, w) of two sets of tokens together. m is a gauge: no gradient passes through it."""
    (m1, u1, w1), (m2, u2, w2) = a, b
    m = torch.maximum(m1, m2).detach()
    c1, c2 = rescale(m1.detach(), m), rescale(m2.detach(), m)
    return m, c1 * u1 + c2 * u2, c1[..., None] * w1 + c2[..., None] * w2


def identity(states, heads, width, dtype, device):
    """The state of no token."""
    m = torch.full((states, heads), NEGATIVE_INFINITY, dtype=dtype, device=device)
    return m, torch.zeros_like(m), torch.zeros((states, heads, width), dtype=dtype, device=device)


def read_out(state):
    """(out, lse) of a state; nothing summed gives 0 and -inf."""
    m, u, w = state
    empty = u == 0
    safe = u.masked_fill(empty, 1.0)
    return (w / safe[..., None]).masked_fill(empty[..., None], 0.0), (m + torch.log(safe)).masked_fill(
        empty, NEGATIVE_INFINITY
    )


def scan(scores, values, reset, state, reverse):
    """A batch of whole rows: scores (B, T, H), -inf where masked, values (B, T, H, D), reset (B, T) or None."""
    length = scores.shape[1]
    nothing = identity(scores.shape[0], *values.shape[2:], values.dtype, values.device)
    outs, lses = [None] * length, [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        if reset is not None:
            restart = reset[:, t, None]
            m, u, w = (
                torch.where(restart[..., None] if x.dim() == 3 else restart, y, x) for x, y in zip(state, nothing)
            )
            state = m, u, w
        masked = scores[:, t] == NEGATIVE_INFINITY
        s = scores[:, t].masked_fill(masked, 0.0)
        leaf_m = scores[:, t].detach()
        leaf_u = torch.exp(s - s.detach()).masked_fill(masked, 0.0)  # 1, with the gradient of exp(s - m)
        leaf_w = leaf_u[..., None] * values[:, t].masked_fill(masked[..., None], 0.0)
        state = merge(state, (leaf_m, leaf_u, leaf_w))
        outs[t], lses[t] = read_out(state)
    return torch.stack(outs, 1), torch.stack(lses, 1), state


def prefix_attention(scores, values, mask, reset, cu_seqlens, m0, u0, w0, reverse):
    """The contract of ops.prefix_attention in code: (out, lse, m, u, w); float32 (float64 for float64 inputs)."""
    work = torch.float64 if values.dtype == torch.float64 else torch.float32
    s, v = scores.to(work), values.to(work)
    if mask is not None:
        s = s.masked_fill(~mask, NEGATIVE_INFINITY)
    batch, length, heads, width = v.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    start = identity(states, heads, width, work, v.device)
    if m0 is not None:
        start = (m0.masked_fill(u0 == 0, NEGATIVE_INFINITY).detach(), u0, w0)
    if cu_seqlens is None and length > 0:
        out, lse, state = scan(s, v, reset, start, reverse)
        return out.to(values.dtype), lse, *state
    ends = [0] * (states + 1) if cu_seqlens is None else cu_seqlens.tolist()
    outs, lses, finals = [], [], []
    for i, (begin, end) in enumerate(zip(ends, ends[1:])):
        state = tuple(x[i : i + 1] for x in start)
        if begin < end:
            flags = None if reset is None else reset[:, begin:end]
            out, lse, state = scan(s[:, begin:end], v[:, begin:end], flags, state, reverse)
            outs.append(out)
            lses.append(lse)
        finals.append(state)
    hidden = torch.ones(
        (), dtype=torch.bool, device=v.device
    )  # rows beyond the last sequence: zeros, and so the gradients
    outs.append(v[:, ends[-1] :].masked_fill(hidden, 0.0))
    lses.append(s[:, ends[-1] :].masked_fill(hidden, NEGATIVE_INFINITY))
    state = tuple(torch.cat(x) for x in zip(*finals)) if finals else start
    return torch.cat(outs, 1).to(values.dtype), torch.cat(lses, 1), *state


def aaren_scores(query, keys, scale):
    """scale * q_h . k_t in float32 (float64): query (1 or B, H, K), keys (B, T, H, K) -> (B, T, H)."""
    work = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return (query.to(work)[:, None] * keys.to(work)).sum(-1) * scale
