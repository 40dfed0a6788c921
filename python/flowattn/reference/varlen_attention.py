"""Padding-free attention in plain torch, one sequence at a time: the oracle and the fallback."""

import torch

from flowattn.reference.dropout import keep_mask


def visible(lq, lk, window_left, window_right, top_left, device=None):
    """Mask (lq, lk), True = keep: i + shift - left <= j <= i + shift + right; -1 = unbounded."""
    shift = 0 if top_left else lk - lq
    distance = torch.arange(lk, device=device) - torch.arange(lq, device=device)[:, None] - shift  # j - (i + shift)
    keep = torch.ones(lq, lk, dtype=torch.bool, device=device)
    if window_left >= 0:
        keep &= distance >= -window_left
    if window_right >= 0:
        keep &= distance <= window_right
    return keep


def attend(q, k, v, keep, scale, *, softcap=0.0, bias=None, dropout=None):
    """One sequence: q (Lq, H, D), k, v (Lk, Hkv, D), keep (Lq, Lk), bias (H, Lq, Lk) -> out (Lq, H, D), lse (H, Lq).

    dropout (H, Lq, Lk): factors of the probabilities, 0 or 1 / (1 - p).
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group != 1 else x for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~keep, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if k.shape[0] else scores.new_zeros((*scores.shape[:2], 1))
    top = top.masked_fill(top == float("-inf"), 0.0)  # a row that sees no key
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    probabilities = weights / total.masked_fill(empty, 1.0)
    if dropout is not None:
        probabilities = probabilities * dropout
    out = torch.einsum("hij,jhd->ihd", probabilities, v)
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, float("-inf"))
    return out, lse.squeeze(-1)


def position_bias(b, lq, lk, shift, work, device, alibi_slopes, bias, rel_table, rel_lut):
    """What is added to the scores of sequence b: a sum that broadcasts to (H, lq, lk), or None."""
    parts = []
    distance = torch.arange(lk, device=device) - torch.arange(lq, device=device)[:, None] - shift
    if alibi_slopes is not None:
        slopes = (alibi_slopes[b] if alibi_slopes.dim() == 2 else alibi_slopes).to(work)
        parts.append(-slopes[:, None, None] * distance.abs())
    if rel_table is not None:
        reach = rel_lut.shape[0] // 2
        buckets = rel_lut[distance.clamp(-reach, reach) + reach].long()
        parts.append(rel_table.to(work)[buckets].permute(2, 0, 1))
    if bias is not None:
        if bias.shape[-2] < lq or bias.shape[-1] < lk:
            rule = f"bias must cover the longest sequences, {lq} queries and {lk} keys"
            raise ValueError(f"varlen_attention: {rule}; got {tuple(bias.shape)}")
        row = bias if bias.dim() == 3 else bias[b if bias.shape[0] > 1 else 0]
        parts.append(row[:, :lq, :lk].to(work))
    return sum(parts[1:], parts[0]) if parts else None


def disentangled_bias(q, k, scale, shift, position_keys, position_queries, lut):
    """scale * (q_i . position_keys[x] + k_j . position_queries[x]) of a sequence, x = lut[j - i - shift]: (H, lq, lk).

    q (lq, H, D), k (lk, Hkv, D); the tables are (rows, H, D), either may be None.
    """
    (lq, heads, _), lk, reach = q.shape, k.shape[0], lut.shape[0] // 2
    distance = torch.arange(lk, device=q.device) - torch.arange(lq, device=q.device)[:, None] - shift
    rows = lut[distance.clamp(-reach, reach) + reach].long().expand(heads, lq, lk)
    total = q.new_zeros(heads, lq, lk)
    if position_keys is not None:
        total = total + torch.einsum("ihd,rhd->hir", q, position_keys.to(q.dtype)).gather(2, rows)
    if position_queries is not None:
        k = k.repeat_interleave(heads // k.shape[1], 1)
        by_key = torch.einsum("jhd,rhd->hjr", k, position_queries.to(q.dtype))
        total = total + by_key.gather(2, rows.transpose(1, 2)).transpose(1, 2)
    return total * scale


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window_left, window_right, top_left, *, softcap=0.0, alibi_slopes=None,
    bias=None, rel_table=None, rel_lut=None, dropout_p=0.0, rng=None, position_keys=None, position_queries=None,
):  # fmt: skip
    """The contract of ops.varlen_attention in code; computes in float32 (float64 for float64 inputs)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, starts_q, starts_k = q.shape[1], cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        lq, lk = rows.stop - rows.start, keys.stop - keys.start
        shift = 0 if top_left else lk - lq
        parts = q[rows].to(work), k[keys].to(work), v[keys].to(work)
        added = position_bias(b, lq, lk, shift, work, q.device, alibi_slopes, bias, rel_table, rel_lut)
        if position_keys is not None or position_queries is not None:
            content = disentangled_bias(*parts[:2], scale, shift, position_keys, position_queries, rel_lut)
            added = content if added is None else added + content
        dropout = keep_mask(rng, dropout_p, b, heads, lq, lk).to(work) / (1 - dropout_p) if dropout_p else None
        keep = visible(lq, lk, window_left, window_right, top_left, q.device)
        out, lse = attend(*parts, keep, scale, softcap=softcap, bias=added, dropout=dropout)
        outs.append(out)
        lses.append(lse)
    rest = q.shape[0] - starts_q[-1]  # rows beyond the last sequence: zeros
    learned = (x for x in (q, k, v, bias, rel_table, position_keys, position_queries) if x is not None)
    nothing = sum(x[:0].sum(dtype=work) for x in learned)  # 0, and a gradient even where there are no sequences
    outs.append(q.new_zeros((rest, heads, v.shape[-1]), dtype=work) + nothing)
    lses.append(q.new_full((heads, rest), float("-inf"), dtype=work) + nothing)
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)
