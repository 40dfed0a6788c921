"""Packing plans and row gathers in plain torch: the oracle and the fallback."""

import torch

from flowattn import checks

TILE = 128  # query rows of one entry of the tile list; csrc/common/packing.h says the same
MASK, LENGTHS, CU_SEQLENS = range(3)  # what `source` holds
_PLAN = "pack_plan"
BUCKETS = 256  # the tile list is sorted by counting lengths in units of 2 ** tile_shift


def tile_capacity(capacity, batch):
    """Most entries a tile list can need: every sequence may end in a partial tile, and so may the unused tail."""
    return capacity // TILE + batch + 1


def tile_shift(padded_len):
    return max(0, padded_len.bit_length() - (BUCKETS - 1).bit_length())


def pack_plan(source, kind, padded_len, capacity):
    """cu_seqlens, indices, inverse, position_ids and tiles of ops.packing.PackPlan, and stats (3,).

    stats: tokens, entries of the tile list that belong to sequences (the tail's come after them), longest sequence.
    """
    device = source.device
    if kind == MASK:
        keep = source != 0
    else:
        lengths = source.diff() if kind == CU_SEQLENS else source
        _check_lengths(source, kind, lengths, padded_len)
        keep = torch.arange(padded_len, device=device) < lengths[:, None]
    batch = keep.shape[0]
    lengths = keep.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(cu[-1])
    checks.require(total <= capacity, _PLAN, f"capacity={capacity} must hold all tokens", total)
    flat = keep.flatten()
    ranks = flat.cumsum(0) - 1
    inverse = ranks.masked_fill(~flat, -1)
    indices = torch.full((capacity,), -1, device=device)
    indices[:total] = flat.nonzero().squeeze(1)
    position_ids = torch.where(indices >= 0, indices % max(padded_len, 1), 0)
    entries = [
        (b, row, int(cu[b]), int(lengths[b]))
        for b in torch.sort(lengths >> tile_shift(padded_len), descending=True, stable=True).indices.tolist()
        for row in range(0, int(lengths[b]), TILE)
    ]
    real = len(entries)
    entries += [(batch, row, total, capacity - total) for row in range(0, capacity - total, TILE)]
    tiles = torch.zeros(tile_capacity(capacity, batch), 4, dtype=torch.int32, device=device)
    tiles[:, 0] = batch
    if entries:
        tiles[: len(entries)] = torch.tensor(entries, dtype=torch.int32, device=device)
    longest = int(lengths.max()) if batch else 0
    stats = torch.tensor([total, real, longest], dtype=torch.int32, device=device)
    return *(x.to(torch.int32) for x in (cu, indices, inverse, position_ids)), tiles, stats


def _check_lengths(source, kind, lengths, padded_len):
    if kind == CU_SEQLENS:
        checks.require(source[0] == 0, _PLAN, "cu_seqlens must start at 0", int(source[0]))
    if lengths.shape[0]:
        shortest, longest = (int(x) for x in lengths.aminmax())
        checks.require(shortest >= 0, _PLAN, "lengths must be >= 0", shortest)
        checks.require(longest <= padded_len, _PLAN, f"no sequence may be longer than max_seqlen={padded_len}", longest)


def gather_rows(src, index, fill):
    """out[i] = src.flatten(0, 1)[index[i]], or `fill` where index[i] is out of range; src (B, S, H, D)."""
    rows = src.flatten(0, 1)
    if rows.shape[0] == 0:
        return src.new_full((index.shape[0], *src.shape[2:]), fill)
    bad = (index < 0) | (index >= rows.shape[0])
    out = rows[index.masked_fill(bad, 0).long()]
    return torch.where(bad[:, None, None], out.new_full((), fill), out)  # masked_fill takes no float8
