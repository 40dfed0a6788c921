"""Selective scan in plain torch, one token at a time: the oracle and the fallback."""

import torch
import torch.nn.functional as F

from flowattn.reference.linear_scan import sequences


def scan(d, u, A, B, C, state, slots, reverse):
    """Whole rows: d and u (B, L, E), B and C (B, L, E, N), state (B, E, N), slots: a list of L numbers.

    Returns y (B, L, E), the last state, and the states after the tokens whose slot is not -1, by slot.
    """
    length, ys, kept = u.shape[1], [None] * u.shape[1], {}
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(d[:, t, :, None] * A)
        state = decay * state + (d[:, t] * u[:, t])[..., None] * B[:, t]
        ys[t] = (state * C[:, t]).sum(-1)
        if slots[t] >= 0:
            kept[slots[t]] = state
    return torch.stack(ys, 1), state, kept


def selective_scan(
    u, delta, A, B, C, skip, z, delta_bias, initial, cu_seqlens, slots, num_slots, softplus, reverse, time_last
):
    """The contract of ops.selective_scan in code: (out, final, states); float32 (float64 for float64 inputs)."""
    dtype, work = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    if time_last:
        u, delta, z = (None if x is None else x.transpose(1, 2) for x in (u, delta, z))
        B, C = (x.permute(0, 3, 1, 2) for x in (B, C))
    u, delta = u.to(work), delta.to(work)
    B, C = (x.to(work).repeat_interleave(u.shape[2] // x.shape[2], 2) for x in (B, C))  # a group's row for each channel
    batch, length, channels = u.shape
    d = delta if delta_bias is None else delta + delta_bias
    d = F.softplus(d) if softplus else d
    rows = sequences(batch, length, cu_seqlens) if cu_seqlens is not None else [(slice(None), 0, length)]
    slots = [-1] * length if slots is None else slots.tolist()
    if initial is None:
        states = batch if cu_seqlens is None else len(rows)
        initial = u.new_zeros(states, channels, A.shape[1])
    ys, finals, kept = [], [], {}
    for s, (_, begin, end) in enumerate(rows):
        state = initial if cu_seqlens is None else initial[s : s + 1]
        if begin < end:
            part = slice(begin, end)
            inputs = d[:, part], u[:, part], A, B[:, part], C[:, part]
            y, state, some = scan(*inputs, state, slots[part], reverse)
            ys.append(y)
            kept |= some
        finals.append(state)
    used = rows[-1][2] if rows else 0
    hidden = torch.ones((), dtype=torch.bool, device=u.device)  # rows of no sequence: zeros, and so the gradients
    beyond = (u * d * B.sum(-1) * C.sum(-1))[:, used:].masked_fill(hidden, 0.0)
    out = torch.cat([*ys, beyond], 1)
    out = out if skip is None else torch.cat([(out + skip * u)[:, :used], beyond], 1)
    if z is not None:
        out = torch.cat([(out * F.silu(z.to(work)))[:, :used], beyond], 1)
    out = out.to(dtype)
    nothing = u.new_zeros(batch, channels, A.shape[1])
    states = [kept.get(i, nothing) for i in range(num_slots)]
    states = torch.stack(states, 1) if states else nothing.new_zeros(batch, 0, *nothing.shape[1:])
    final = torch.cat(finals) if finals else initial
    return out.transpose(1, 2) if time_last else out, final, states
