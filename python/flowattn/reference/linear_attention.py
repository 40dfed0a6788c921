"""Linear attention in plain torch, chunk by chunk: the fallback, and what the kernels compute."""

import torch

from flowattn.reference.linear_scan import sequences

CHUNK = 64
# exp_shifted: exp(x - max over the features), the maximum taken as a constant; a normaliser cancels it.
FEATURE_MAPS = ("identity", "elu1", "relu", "relu_eps", "sigmoid", "exp", "exp_shifted", "softmax")
NON_CAUSAL, CAUSAL, REVERSE, BIDIRECTIONAL = range(4)  # the private ops' modes
LARGEST_EXPONENT = 80.0
LOWEST_DECAY = -1e4  # log decays below are all the same 0, and minus infinity would make differences NaN


def feature(x, name):
    """phi(x) in the dtype of x, which is float32 or float64."""
    if name == "elu1":
        return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 rounds to 0 where exp(x) does not
    if name == "relu":
        return x.relu()
    if name == "relu_eps":
        return x.relu() + 1e-6
    if name == "sigmoid":
        return x.sigmoid()
    if name == "exp":
        return x.clamp(max=LARGEST_EXPONENT).exp()
    if name == "exp_shifted":
        return (x - x.detach().amax(-1, keepdim=True)).exp()
    if name == "softmax":
        return x.softmax(-1)
    return x


def recurrence(q, k, v, decay, s, z):
    """(y, c, s, z) of y_t = S_t^T q_t and c_t = q_t . z_t, S_t = e^g_t S_(t-1) + k_t v_t^T, z_t = e^g_t z_(t-1) + k_t.

    q, k (B, T, H, D), v (B, T, H, M), decay (B, T, H) or None; s (B, H, D, M) and z (B, H, D) before the first token.
    """
    ys, cs = [], []
    for begin in range(0, q.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        qc, kc, vc = q[:, part], k[:, part], v[:, part]
        scores = torch.einsum("bihd,bjhd->bhij", qc, kc).tril()
        before = after = torch.ones_like(qc[..., 0])  # e^G_i and e^(G_last - G_i)
        if decay is not None:
            # Differences of running sums lose what the sums' last digits say, so these are kept in float64.
            total = decay[:, part].double().clamp(min=LOWEST_DECAY).cumsum(1).transpose(1, 2)  # (B, H, C)
            apart = total[..., :, None] - total[..., None, :]
            lower = torch.ones_like(apart, dtype=torch.bool).tril()
            scores = scores * apart.masked_fill(~lower, float("-inf")).exp().to(scores.dtype)
            before = total.exp().transpose(1, 2).to(q.dtype)
            after = (total[..., -1:] - total).exp().transpose(1, 2).to(q.dtype)
        qc, kc = qc * before[..., None], kc * after[..., None]
        ys.append(torch.einsum("bhij,bjhm->bihm", scores, vc) + torch.einsum("bihd,bhdm->bihm", qc, s))
        cs.append(scores.sum(-1).transpose(1, 2) + torch.einsum("bihd,bhd->bih", qc, z))
        kept = before[:, -1]
        s = kept[..., None, None] * s + torch.einsum("bjhd,bjhm->bhdm", kc, vc)
        z = kept[..., None] * z + kc.sum(1)
    y = torch.cat(ys, 1) if ys else q.new_zeros((*q.shape[:3], v.shape[3]))
    return y, torch.cat(cs, 1) if cs else q.new_zeros(q.shape[:3]), s, z


def one_mode(q, k, v, decay, s, z, mode):
    """`recurrence` of mapped inputs with one head each, in any mode but the bidirectional."""
    if mode == NON_CAUSAL:
        s, z = s + torch.einsum("bjhd,bjhm->bhdm", k, v), z + k.sum(1)
        return torch.einsum("bihd,bhdm->bihm", q, s), torch.einsum("bihd,bhd->bih", q, z), s, z
    if mode == CAUSAL:
        return recurrence(q, k, v, decay, s, z)
    flipped = (x if x is None else x.flip(1) for x in (q, k, v, decay))
    y, c, s, z = recurrence(*flipped, s, z)
    return y.flip(1), c.flip(1), s, z


def linear_attention(
    q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize
):
    """The contract of ops.linear_attention in code: (out, s, z). Computes in float32 (float64 for float64 inputs)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, group = q.shape[0], q.shape[2], q.shape[2] // k.shape[2]
    qf, kf, vf = feature(q.to(work), FEATURE_MAPS[map_q]), feature(k.to(work), FEATURE_MAPS[map_k]), v.to(work)
    if key_weight is not None:
        kf = kf * key_weight[..., None, None]
    kf, vf = kf.repeat_interleave(group, 2), vf.repeat_interleave(group, 2)
    if decay is not None:
        decay = decay.expand(q.shape[:3])
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    s = qf.new_zeros((states, heads, q.shape[3], v.shape[3])) if s0 is None else s0
    z = qf.new_zeros((states, heads, q.shape[3])) if z0 is None else z0
    if cu_seqlens is None:
        y, c, s, z = one_mode(qf, kf, vf, decay, s, z, mode)
    else:
        parts = []
        for i, (_, begin, end) in enumerate(sequences(batch, q.shape[1], cu_seqlens)):
            rows, one = slice(begin, end), slice(i, i + 1)
            part = (x if x is None else x[:, rows] for x in (qf, kf, vf, decay))
            parts.append(one_mode(*part, s[one], z[one], mode))
        end = int(cu_seqlens[-1])
        nothing = (qf[:, end:, :, :1] * vf[:, end:]).masked_fill(torch.ones_like(vf[:, end:], dtype=torch.bool), 0.0)
        parts.append((nothing, torch.ones_like(nothing[..., 0]), s[:0], z[:0]))
        y, c, s, z = (torch.cat(x, dim) for x, dim in zip(zip(*parts), (1, 1, 0, 0)))
    if normalize:
        y = y * (scale / (scale * c + eps))[..., None]
    else:
        y = y * scale
    if row_scale is not None:
        y = y * row_scale[..., None, None]
    return y.to(q.dtype), s, z
