"""Flow-Attention from its definition, with loops over tokens, in float64: what the reference is checked against."""

import torch


def phi(x, feature_map):
    return x.clamp(min=0) + 1e-6 if feature_map == "relu" else torch.sigmoid(x)


def flow(x, total, eps, extra):
    return ((x + eps) * (total + eps)).sum() + extra


def whole(q, k, v, *, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0):
    """One head: q (L, D), k (S, D), v (S, M) -> (L, M)."""
    q, k, v = phi(q.double(), feature_map), phi(k.double(), feature_map), v.double()
    (sinks, _), sources = q.shape, k.shape[0]
    incoming = [flow(q[i], k.sum(0), eps, extra_eps) for i in range(sinks)]
    outgoing = [flow(k[s], q.sum(0), eps, extra_eps) for s in range(sources)]
    k_sum = sum(k[s] / outgoing[s] for s in range(sources))
    q_sum = sum(q[i] / incoming[i] for i in range(sinks))
    conserved = torch.stack([flow(k[s], q_sum, eps, extra_eps) for s in range(sources)])
    if clamp is not None:
        conserved = conserved.clamp(-clamp, clamp)
    weights = sources * torch.softmax(conserved, 0)
    rows = []
    for i in range(sinks):
        allocation = torch.sigmoid(flow(q[i], k_sum, eps, extra_eps) * sinks / sources)
        rows.append(allocation / incoming[i] * sum((q[i] @ k[s]) * weights[s] * v[s] for s in range(sources)))
    return torch.stack(rows)


def causal(q, k, v, *, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0):
    """One head: q, k (T, D), v (T, M) -> (T, M)."""
    q, k, v = phi(q.double(), feature_map), phi(k.double(), feature_map), v.double()
    k1, q1, k2, q2 = (torch.zeros_like(q[0]) for _ in range(4))
    total, state, rows = 0.0, torch.zeros(q.shape[1], v.shape[1], dtype=torch.float64), []
    for i in range(q.shape[0]):
        n = i + 1
        k1, q1 = k1 + k[i], q1 + q[i]
        incoming, outgoing = flow(q[i], k1, eps, extra_eps), flow(k[i], q1, eps, extra_eps)
        k2, q2 = k2 + n / outgoing * k[i], q2 + n / incoming * q[i]
        x = torch.exp((flow(k[i], q2, eps, 0) / n + extra_eps / n).clamp(-clamp, clamp))
        total = total + x
        state = state + torch.outer(k[i], n * x / total * v[i])
        allocation = torch.sigmoid((flow(q[i], k2, eps, extra_eps)) / n)
        rows.append(allocation / incoming * (q[i] @ state))
    return torch.stack(rows)


def heads(form, q, k, v, **options):
    """`form` for every row and head of (B, T, H, ...) tensors."""
    group = q.shape[2] // k.shape[2]
    return torch.stack(
        [
            torch.stack([form(q[b, :, h], k[b, :, h // group], v[b, :, h // group], **options)
                         for h in range(q.shape[2])], 1)
            for b in range(q.shape[0])
        ]
    )  # fmt: skip
