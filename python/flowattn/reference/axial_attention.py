"""Attention along one axis of a grid in plain torch: the oracle and the fallback."""

import torch


def visible(n, m, mask, device=None):
    """Bool (n, m), True = keep. mask 0: a query sees all keys, 1: those up to its own position, 2: those before it.

    The last query and the last key stand at the same position.
    """
    if mask == 0:
        return torch.ones(n, m, dtype=torch.bool, device=device)
    distance = torch.arange(m, device=device) - torch.arange(n, device=device)[:, None] - (m - n)  # j - i - shift
    return distance <= (0 if mask == 1 else -1)


def rotate(x, cos, sin, interleaved, *, inverse=False, axis=-2):
    """Turn the first 2R channels of x (.., 2R or more) by the angles of the last rows of the tables, one for each place
    along `axis`, or turn them back.

    cos, sin (rows, R). Channel pairs are (2c, 2c + 1) if interleaved, else (c, c + R).
    """
    length, others, width = x.shape[axis], (1,) * (x.dim() - axis % x.dim() - 2), cos.shape[-1]
    cos, sin = (t[t.shape[0] - length :].to(x.dtype).reshape(length, *others, width) for t in (cos, sin))
    turned, rest = x[..., : 2 * width], x[..., 2 * width :]
    a, b = turned.unflatten(-1, (width, 2)).unbind(-1) if interleaved else turned.split(width, -1)
    sin = -sin if inverse else sin
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)


def attend(q, k, v, bias, keep, scale):
    """q (..., H, n, D), k (..., H, m, D), v (..., H, m, Dv), keep (n, m) -> out (..., H, n, Dv), lse (..., H, n)."""
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~keep, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if k.shape[-2] else scores.new_zeros((*scores.shape[:-1], 1))
    top = top.masked_fill(top == float("-inf"), 0.0)  # a row that sees no key
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = weights / total.masked_fill(empty, 1.0) @ v
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, float("-inf"))
    return out, lse.squeeze(-1)


def lines(x, axis, work):
    """x (grid..., H, D) -> (other axes..., H, length of `axis`, D) in the dtype `work`."""
    return x.to(work).movedim(axis, -2)


def axial_attention(q, k, v, bias, cos, sin, axis, scale, mask, interleaved):
    """The contract of ops.axial_attention in code; computes in float32 (float64 for float64 inputs)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group, dtype = q.shape[-2] // k.shape[-2], q.dtype
    q, k, v = (lines(x, axis, work) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    if cos is not None:
        q, k = (rotate(x, cos, sin, interleaved) for x in (q, k))
    bias = None if bias is None else bias.to(work)
    out, lse = attend(q, k, v, bias, visible(q.shape[-2], k.shape[-2], mask, q.device), scale)
    return out.to(dtype).movedim(-2, axis), lse.movedim(-1, axis)
