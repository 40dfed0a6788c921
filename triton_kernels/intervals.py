"""Masks as key intervals, and where a program's tile lies in a packed batch.

Query row i of a sequence sees the keys [first(i), last(i)), both non-decreasing in i. A tile of rows visits the union
of its rows' intervals; blocks inside their intersection need no element test. Causal and window masks are this one
thing; a mask of two intervals a row runs the key loop twice.
"""

import triton
import triton.language as tl

TILE = 128  # rows of one slot or tile-list entry; python/flowattn/reference/packing.py says the same


@triton.jit
def _bounded_start(cu, b, total):
    """Start of sequence b, clamped so that no offset, however wrong, leaves the tensor."""
    return tl.minimum(tl.maximum(tl.load(cu + b), 0), total)


@triton.jit
def _search(slot, cu, batch, total, steps, TILE: tl.constexpr):
    """Sequence of a slot: b owns the slots from start_b // TILE + b on; b = batch is the unused tail."""
    low, high = 0, batch
    for _ in range(steps):
        middle = (low + high + 1) // 2
        below = _bounded_start(cu, middle, total) // TILE + middle <= slot
        low = tl.where(below & (low < high), middle, low)
        high = tl.where(below | (low >= high), high, middle - 1)
    return low


@triton.jit
def locate(slot, tiles, cu, batch, total, steps, TILE: tl.constexpr):
    """(sequence, first row, start, length) of a slot; the tail is sequence `batch`."""
    if tiles is not None:
        b = tl.load(tiles + slot * 4)
        row = tl.load(tiles + slot * 4 + 1)
        start = tl.load(tiles + slot * 4 + 2)
        length = tl.load(tiles + slot * 4 + 3)
    else:
        b = _search(slot, cu, batch, total, steps, TILE)
        start = _bounded_start(cu, b, total)
        end = _bounded_start(cu, tl.minimum(b + 1, batch), total)
        end = tl.where(b == batch, total, end)
        row = tl.maximum(slot - start // TILE - b, 0) * TILE
        length = tl.maximum(end - start, 0)
    return b, row, start, length


@triton.jit
def other_side(b, cu, batch, total):
    """(start, length) of sequence b on the other side; length 0 for the tail, which sees nothing."""
    start = _bounded_start(cu, b, total)
    end = _bounded_start(cu, tl.minimum(b + 1, batch), total)
    return start, tl.maximum(end - start, 0)


@triton.jit
def tile_interval(
    row, rows, length, shift, left, right, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """(begin, full_begin, full_end, end) of the keys of rows [row, row + rows), in whole blocks but for `end`.

    Blocks in [full_begin, full_end) are seen by every row, the rest of [begin, end) by some.
    """
    begin, full_begin, end, inner_end = 0, 0, length, length
    if HAS_LEFT:
        begin = tl.maximum(row + shift - left, 0) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(row + rows - 1 + shift - left, 0), BLOCK) * BLOCK
    if HAS_RIGHT:
        end = tl.minimum(tl.maximum(row + rows + shift + right, 0), length)
        inner_end = tl.minimum(tl.maximum(row + shift + right + 1, 0), length)
    full_end = tl.maximum(inner_end // BLOCK * BLOCK, full_begin)
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK) * BLOCK)
    full_end = tl.minimum(full_end, tl.cdiv(end, BLOCK) * BLOCK)
    return begin, full_begin, full_end, end


@triton.jit
def visible(rows, keys, length, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Element mask of a block: rows and keys are index blocks that broadcast against each other."""
    keep = keys < length
    if HAS_LEFT:
        keep = keep & (keys >= rows + shift - left)
    if HAS_RIGHT:
        keep = keep & (keys <= rows + shift + right)
    return keep


@triton.jit
def owned_tile(
    cu, cu_other, tiles, batch, total, total_other, steps, HEADS: tl.constexpr, SELF: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(sequence, head, first row, start, length, start and length on the other side) of this program's BLOCK rows.

    Heads are neighbours, then the blocks of a tile. A first row past the length means that there is nothing to do.
    """
    program = tl.program_id(0)
    slot = program // HEADS
    b, row, start, length = locate(slot // (TILE // BLOCK), tiles, cu, batch, total, steps, TILE)
    row += slot % (TILE // BLOCK) * BLOCK
    if SELF:
        start_other, length_other = start, tl.where(b == batch, 0, length)
    else:
        start_other, length_other = other_side(b, cu_other, batch, total_other)
    return b, program % HEADS, row, start, length, start_other, length_other
