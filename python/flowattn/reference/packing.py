"""Packing plans and row gathers in plain torch: the oracle and the fallback."""

import torch

TILE = 128  # query rows of one entry of the tile list; csrc/common/packing.h says the same
MASK, LENGTHS, CU_SEQLENS = range(3)  # what `source` holds


def tile_capacity(capacity, batch):
    """Most entries a tile list can need: every sequence may end in a partial tile, and so may the unused tail."""
    return capacity // TILE + batch + 1


def pack_plan(source, kind, padded_len, capacity):
    """See ops.packing._build for the meaning of the six results."""
    device = source.device
    if kind == MASK:
        keep = source
    else:
        lengths = source.diff() if kind == CU_SEQLENS else source
        keep = torch.arange(padded_len, device=device) < lengths[:, None]
    batch = keep.shape[0]
    lengths = keep.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(cu[-1])
    flat = keep.flatten()
    ranks = flat.cumsum(0) - 1
    inverse = ranks.masked_fill(~flat, -1)
    indices = torch.full((capacity,), -1, device=device)
    indices[:total] = flat.nonzero().squeeze(1)
    position_ids = torch.where(indices >= 0, indices % max(padded_len, 1), 0)
    entries = [
        (b, row, int(cu[b]), int(lengths[b]))
        for b in torch.sort(lengths, descending=True, stable=True).indices.tolist()
        for row in range(0, int(lengths[b]), TILE)
    ]
    real = len(entries)  # the tail's tiles serve capacity mode and are not counted
    entries += [(batch, row, total, capacity - total) for row in range(0, capacity - total, TILE)]
    tiles = torch.zeros(tile_capacity(capacity, batch), 4, dtype=torch.int32, device=device)
    tiles[:, 0] = batch
    if entries:
        tiles[: len(entries)] = torch.tensor(entries, dtype=torch.int32, device=device)
    longest = int(lengths.max()) if batch else 0
    stats = torch.tensor([total, real, longest], dtype=torch.int32, device=device)
    return *(x.to(torch.int32) for x in (cu, indices, inverse, position_ids)), tiles, stats


def gather_rows(src, index, fill):
    """out[i] = src.flatten(0, 1)[index[i]], or `fill` where index[i] is out of range; src (B, S, H, D)."""
    rows = src.reshape(-1, *src.shape[2:])
    bad = (index < 0) | (index >= rows.shape[0])
    if rows.shape[0] == 0:
        return src.new_full((index.shape[0], *src.shape[2:]), fill)
    out = rows[index.masked_fill(bad, 0).long()]
    return out.masked_fill(bad[:, None, None], fill)
