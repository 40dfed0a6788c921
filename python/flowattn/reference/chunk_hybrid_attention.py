"""Softmax attention inside chunks and a decayed linear state across them, in plain torch: the oracle and the fallback.

With G the running sum of g = logsigmoid(gate) / 16 inside chunk n and K times D ** -0.5:

    o_n = softmax(Q_n K_n^T) V_n + (Q_n * exp(G)) S_n
    S_{n+1} = exp(mean g_n) S_n + K_n^T V_n

Source: ARFlow (Hui et al. 2025), hybrid linear attention, as its released code trains it: the query is decayed by the
running sum of g, the state by its mean.
"""

import torch
import torch.nn.functional as F

GATE_SCALE = 16.0


def chunk_hybrid_attention(q, k, v, gate, state, chunk):
    """The contract of ops.chunk_hybrid_attention in code: (o, last state); k and v may have fewer heads."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group, dtype = q.shape[2] // k.shape[2], q.dtype
    q, k, v = (x.to(work).transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    k = k * k.shape[3] ** -0.5
    decay = F.logsigmoid(gate.to(work)).transpose(1, 2) / GATE_SCALE  # (B, H, T)
    if state is None:
        state = q.new_zeros((*q.shape[:2], q.shape[3], v.shape[3]))
    outs = [q[:, :, :0, :1] * v[:, :, :0, :1].expand(-1, -1, -1, v.shape[3])]
    for begin in range(0, q.shape[2], chunk):
        qn, kn, vn, g = (x[:, :, begin : begin + chunk] for x in (q, k, v, decay))
        inner = torch.softmax(qn @ kn.mT, -1) @ vn
        outs.append(inner + (qn * torch.exp(g.cumsum(2))[..., None]) @ state)
        state = torch.exp(g.mean(2))[..., None, None] * state + kn.mT @ vn
    return torch.cat(outs, 2).transpose(1, 2).to(dtype), state
