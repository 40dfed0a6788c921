"""Flow-Attention in plain torch, float32 or float64: the oracle and the fallback.

With phi the feature map and x (+) y the sum over features of (x + e)(y + e), up to `extra` added to the whole sum:

    non-causal                                   causal, n_i the tokens up to i
    I_l = q_l (+) sum_s k_s                      I_i = q_i (+) K1_i, K1_i = sum_{j <= i} k_j
    O_s = k_s (+) sum_l q_l                      O_i = k_i (+) Q1_i
    a = 1 / I, b = 1 / O                         a = n / I, b = n / O
    J_l = q_l (+) sum_s b_s k_s                  J_i = (q_i (+) K2_i) / n_i, K2_i = sum_{j <= i} b_j k_j
    P_s = k_s (+) sum_l a_l q_l                  P_i = (k_i (+) Q2_i) / n_i
    A = sigmoid(J L / S)                         A = sigmoid(J)
    w = S softmax(clamp(P))                      x = exp(clamp(P)), w_i = n_i x_i / sum_{j <= i} x_j
    y_l = A_l / I_l sum_s (q_l . k_s) w_s v_s    y_i = A_i / I_i sum_{j <= i} (q_i . k_j) w_j v_j

Source: Wu et al., Flowformer: Linearizing Transformers with Conservation Flows (2022), equations 4 to 8.
"""

import torch

from flowattn.reference.linear_scan import sequences

RELU_EPS = 1e-6
CAUSAL_LIMIT = 60.0  # bounds exp(P) where the causal form is not clamped: its running sum has no maximum to subtract


def feature_map(x, relu):
    return torch.relu(x) + RELU_EPS if relu else torch.sigmoid(x)


def _prepare(q, k, v, key_mask, query_mask, relu):
    """phi(q), phi(k) and v in the working dtype, k and v with the heads of q, zeros where masked; the masks."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    keep_q, keep_k = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        for x, mask in ((q, query_mask), (k, key_mask))
    )
    # Hidden before and after phi: whatever stands there, NaN included, reaches no result and no gradient.
    hidden_q, hidden_k = (~keep[..., None, None] for keep in (keep_q, keep_k))
    fq, fk, v = (x.to(work).masked_fill(hidden, 0.0) for x, hidden in ((q, hidden_q), (k, hidden_k), (v, hidden_k)))
    fq, fk = feature_map(fq, relu).masked_fill(hidden_q, 0.0), feature_map(fk, relu).masked_fill(hidden_k, 0.0)
    return fq, fk.repeat_interleave(group, 2), v.repeat_interleave(group, 2), keep_q, keep_k


def _flow(x, total, eps, extra):
    """x (+) total over the last dim."""
    return ((x + eps) * (total + eps)).sum(-1) + extra


def _flow_attention(q, k, v, key_mask, query_mask, relu, clamp, eps, extra, over_heads):
    """Whole rows: q (B, L, H, D), k (B, S, Hkv, D), v (B, S, Hkv, M) -> (B, L, H, M)."""
    fq, fk, v, keep_q, keep_k = _prepare(q, k, v, key_mask, query_mask, relu)
    sinks, sources = (keep.sum(1)[:, None, None].clamp(min=1).to(fq.dtype) for keep in (keep_q, keep_k))
    hidden_q, hidden_k = ~keep_q[..., None], ~keep_k[..., None]
    alone_q, alone_k = (
        hidden | other.all(1, keepdim=True) for hidden, other in ((hidden_q, hidden_k), (hidden_k, hidden_q))
    )
    incoming = _flow(fq, fk.sum(1, keepdim=True), eps, extra).masked_fill(alone_q, 1.0)  # (B, L, H)
    outgoing = _flow(fk, fq.sum(1, keepdim=True), eps, extra).masked_fill(alone_k, 1.0)  # (B, S, H)
    conserved_q = _flow(fq, (fk / outgoing[..., None]).sum(1, keepdim=True), eps, extra)
    conserved_k = _flow(fk, (fq / incoming[..., None]).sum(1, keepdim=True), eps, extra)
    allocation = torch.sigmoid(conserved_q * (sinks / sources))
    scores = conserved_k.clamp(-clamp, clamp)
    if over_heads:
        weights = torch.softmax(scores, -1) * sources
    elif scores.shape[1] == 0:
        weights = scores
    else:
        scores = scores.masked_fill(hidden_k, float("-inf"))
        top = scores.detach().amax(1, keepdim=True)
        x = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
        total = x.sum(1, keepdim=True)
        weights = sources * x / total.masked_fill(total == 0, 1.0)
    kv = torch.einsum("bshd,bshm->bhdm", fk, v * weights[..., None])
    return torch.einsum("blhd,bhdm->blhm", fq * (allocation / incoming)[..., None], kv)


def flow_attention(q, k, v, key_mask, query_mask, cu_seqlens, relu, clamp, eps, extra, over_heads=False):
    """The non-causal contract of ops.flow_attention in code; `clamp` infinity for none."""
    options = (relu, clamp, eps, extra, over_heads)
    if cu_seqlens is None:
        return _flow_attention(q, k, v, key_mask, query_mask, *options).to(q.dtype)
    outs = []
    for _, begin, end in sequences(1, q.shape[1], cu_seqlens):
        part = slice(begin, end)
        masks = (None if mask is None else mask[:, part] for mask in (key_mask, query_mask))
        outs.append(_flow_attention(q[:, part], k[:, part], v[:, part], *masks, *options).to(q.dtype))
    return _with_tail(outs, q, v, cu_seqlens)


def _with_tail(outs, q, v, cu_seqlens):
    """The results of the sequences and zeros for the rows beyond the last, on the graph of q and v."""
    tail = slice(int(cu_seqlens[-1]), None)
    zeros = q[:, tail, :, :1] * v[:, tail, :1, :]
    outs.append(zeros.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0))
    return torch.cat(outs, 1)


def _prefix_sum(x, start):
    """start + the running sum over time, summed in float64: a million float32 additions lose up to three digits."""
    return (start[:, None].double() + x.double().cumsum(1)).to(x.dtype)


def _causal(q, k, v, mask, sums, total, count, state, relu, clamp, eps, extra):
    """Whole rows (B, T, H, D) from sums (B, H, 4, D), total (B, H), count (B,) and state (B, H, D, M)."""
    fq, fk, v, keep, _ = _prepare(q, k, v, mask, mask, relu)
    k1, q1, k2, q2 = sums.unbind(2)
    n = (count[:, None] + keep.cumsum(1)).clamp(min=1).to(fq.dtype)[..., None]  # (B, T, 1)
    hidden = ~keep[..., None]
    k1, q1 = _prefix_sum(fk, k1), _prefix_sum(fq, q1)
    incoming = _flow(fq, k1, eps, extra).masked_fill(hidden, 1.0)  # (B, T, H)
    outgoing = _flow(fk, q1, eps, extra).masked_fill(hidden, 1.0)
    k2, q2 = _prefix_sum(fk * (n / outgoing)[..., None], k2), _prefix_sum(fq * (n / incoming)[..., None], q2)
    conserved_q, conserved_k = _flow(fq, k2, eps, extra) / n, _flow(fk, q2, eps, extra) / n
    x = torch.exp(conserved_k.clamp(-clamp, clamp)).masked_fill(hidden, 0.0)
    total = _prefix_sum(x, total)
    weighted = v * (n * x / total.masked_fill(hidden, 1.0))[..., None]
    products = torch.einsum("bihd,bjhd->bhij", fq, fk).tril()
    y = torch.einsum("bhij,bjhm->bihm", products, weighted) + torch.einsum("bihd,bhdm->bihm", fq, state)
    y = y * (torch.sigmoid(conserved_q) / incoming)[..., None]
    state = state + torch.einsum("bthd,bthm->bhdm", fk, weighted)
    return y, torch.stack([s[:, -1] for s in (k1, q1, k2, q2)], 2), total[:, -1], state


def causal_flow_attention(q, k, v, mask, cu_seqlens, sums, total, count, state, relu, clamp, eps, extra):
    """The causal contract in code: (y, sums, total, state) after the last token; no initial state is zeros."""
    clamp = min(clamp, CAUSAL_LIMIT)
    (rows, length, heads, width), width_v = q.shape, v.shape[3]
    states = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sums is None:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        sums = q.new_zeros((states, heads, 4, width), dtype=work)
        total, count = sums.new_zeros((states, heads)), sums.new_zeros((states,), dtype=torch.int64)
        state = sums.new_zeros((states, heads, width, width_v))
    options = (relu, clamp, eps, extra)
    if length == 0:
        return q[..., :1] * k[:, :, :1, :1] * v[:, :, :1], sums, total, state
    if cu_seqlens is None:
        y, *finals = _causal(q, k, v, mask, sums, total, count, state, *options)
        return y.to(q.dtype), *finals
    outs, finals = [], []
    for s, (_, begin, end) in enumerate(sequences(1, length, cu_seqlens)):
        part, one = slice(begin, end), slice(s, s + 1)
        start = (sums[one], total[one], count[one], state[one])
        if begin == end:
            finals.append((start[0], start[1], start[3]))
            continue
        pieces = (q[:, part], k[:, part], v[:, part], None if mask is None else mask[:, part])
        y, *final = _causal(*pieces, *start, *options)
        outs.append(y.to(q.dtype))
        finals.append(final)
    ends = (torch.cat(x) for x in zip(*finals)) if finals else (sums, total, state)
    return _with_tail(outs, q, v, cu_seqlens), *ends
