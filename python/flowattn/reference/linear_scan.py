"""First-order linear scan in plain torch, one token at a time: the oracle and the fallback."""

import torch


def sequences(batch, tokens, cu_seqlens):
    """(row, begin, end) of every sequence: the rows of a padded batch, or the pieces of a packed one."""
    if cu_seqlens is None:
        return [(b, 0, tokens) for b in range(batch)]
    ends = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in zip(ends, ends[1:])]


def scan(gates, tokens, initial, reset, reverse):
    """A batch of whole rows: gates and tokens (B, T, H, D), initial (B, H, D) or None, reset (B, T) or None.

    `fresh` (B,) marks the rows in which nothing has been summed yet: there the gate is not applied, so that a gate of
    any value, infinity too, acts only on a state.
    """
    length = tokens.shape[1]
    h = torch.zeros_like(tokens[:, 0]) if initial is None else initial
    fresh = torch.full(tokens.shape[:1], initial is None, device=tokens.device)
    outs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        if reset is not None:
            fresh = fresh | reset[:, t]
        stop = fresh[:, None, None]
        kept = gates[:, t].masked_fill(stop, 0.0) * h.masked_fill(stop, 0.0)
        h = kept + tokens[:, t]
        fresh = torch.zeros_like(fresh)
        outs[t] = h
    return torch.stack(outs, 1), h


def linear_scan(gates, tokens, initial, cu_seqlens, reset, log_gate, reverse):
    """The contract of ops.linear_scan in code; computes in float32 (float64 for float64 inputs)."""
    work = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    a = torch.exp(gates.to(work)) if log_gate else gates.to(work)
    x, batch, length = tokens.to(work), tokens.shape[0], tokens.shape[1]
    a = a.expand(x.shape)
    if cu_seqlens is None:
        if length == 0:
            empty = x.new_zeros((batch, *x.shape[2:])) if initial is None else initial.clone()
            return (a * x).to(tokens.dtype), empty
        out, final = scan(a, x, initial, reset, reverse)
        return out.to(tokens.dtype), final
    outs, finals = [], []
    for s, (_, begin, end) in enumerate(sequences(batch, length, cu_seqlens)):
        start = None if initial is None else initial[s : s + 1]
        if begin == end:
            finals.append(x.new_zeros((1, *x.shape[2:])) if start is None else start)
            continue
        flags = None if reset is None else reset[:, begin:end]
        out, final = scan(a[:, begin:end], x[:, begin:end], start, flags, reverse)
        outs.append(out)
        finals.append(final)
    hidden = torch.ones(
        (), dtype=torch.bool, device=x.device
    )  # rows beyond the last sequence: zeros, and so the gradients
    outs.append((a * x)[:, int(cu_seqlens[-1]) :].masked_fill(hidden, 0.0))
    final = torch.cat(finals) if finals else x.new_zeros((0, *x.shape[2:]))
    return torch.cat(outs, 1).to(tokens.dtype), final
