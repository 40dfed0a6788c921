"""Retention on a grid in plain torch, one row of the grid at a time."""

import torch


def grid_retention(q, k, v, decay, scale, height, width, causal):
    """The contract of ops.grid_retention in code; computes in float32 (float64 for float64 inputs)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    qf, kf, vf = q.to(work) * scale, k.to(work), v.to(work)
    kf, vf = kf.repeat_interleave(group, 2), vf.repeat_interleave(group, 2)
    x = torch.arange(width, device=q.device)
    across = x[:, None] - x  # (width, width), from key to query
    outs = []
    for y in range(height):
        last = y + 1 if causal else height
        down = y - torch.arange(last, device=q.device)
        apart = across.abs()[:, None, :] + down.abs()[:, None]  # (width, last, width)
        weights = (decay[:, None, None] * apart.flatten(1)).exp()  # (H, width, last * width)
        if causal:
            weights = weights * (across >= 0)[:, None, :].expand_as(apart).flatten(1)
        row, keys = slice(y * width, (y + 1) * width), slice(0, last * width)
        scores = torch.einsum("bihd,bjhd->bhij", qf[:, row], kf[:, keys]) * weights
        outs.append(torch.einsum("bhij,bjhm->bihm", scores, vf[:, keys]))
    out = torch.cat(outs, 1) if outs else (qf[..., :1] * vf)
    return out.to(q.dtype)


def quadrant_recurrence(q, k, v, decay, scale, height, width):
    """The causal form token by token: S_(y,x) = g S_(y-1,x) + g S_(y,x-1) - g^2 S_(y-1,x-1) + k v^T, g = e^decay.

    What decoding keeps is one row of states, (width, B, H, D, M). Heads of q, k and v alike.
    """
    g = decay.exp()[:, None, None]
    nothing = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])
    above, outs = [nothing] * width, []
    for y in range(height):
        row, corner, left = [], nothing, nothing
        for x in range(width):
            t = y * width + x
            s = g * above[x] + g * left - g * g * corner + k[:, t, :, :, None] * v[:, t, :, None, :]
            outs.append(scale * torch.einsum("bhd,bhdm->bhm", q[:, t], s))
            corner, left = above[x], s
            row.append(s)
        above = row
    return torch.stack(outs, 1)
