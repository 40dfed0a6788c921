"""Gradients of the tables of a disentangled bias: sums of dS times queries, or times keys, by distance, then by row.

Tiles whose first query and key are as far apart have the same S distances near and far. One program owns such a
diagonal of tiles, of one head, in all sequences, and computes their dS anew: two products and two terms more instead of
atomics, and the same bits in every run. Beyond the reach of the lut all distances take one row, so the diagonals there
belong to the last program on their side. A second kernel adds up the distances that share a row of the table.
"""

import triton
import triton.language as tl

from .attention_scores import at_head
from .disentangled_attention import UNSPECIALIZED
from .disentangled_attention_blocks import tile_gradients, upright_keys, upright_queries
from .disentangled_attention_configs import tables_config
from .intervals import other_side
from .launch import Launcher, alignments
from .varlen_attention_blocks import load_rows, scaled

# Programs wanted on a large GPU. A constant, so that the order of the sums depends on shapes alone.
PROGRAMS = 2048


@triton.jit
def _rows_inside(base, row, stride, length, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, S: tl.constexpr):
    """load_rows of S rows that may begin before the sequence."""
    offs, cols = tl.arange(0, S), tl.arange(0, BLOCK_COLS)
    inside = (row + offs >= 0) & (row + offs < length)
    pointers = base + (tl.cast(row, tl.int64) + offs)[:, None] * stride + cols[None, :]
    return tl.load(pointers, mask=inside[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "diagonals", "sequence_splits", "tile_splits"))
def disentangled_tables_gradient_kernel(
    q, k, v, do, lse, delta,
    key_parts,  # (splits, diagonals, H, 2 S, D): the sums of the distances near and far of a diagonal, or None
    query_parts,  # the same of the second table
    cu_q, cu_k, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, scale, left, right, scores, positions, bias_q, bias_k, reach, threshold, table_rows,
    diagonals, sequence_splits, tile_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    h, slot = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    diagonal, split = slot % diagonals - diagonals // 2, slot // diagonals
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    near_keys = tl.zeros([S, BD], tl.float32)
    far_keys = tl.zeros([S, BD], tl.float32)
    near_queries = tl.zeros([S, BD], tl.float32)
    far_queries = tl.zeros([S, BD], tl.float32)
    for b in range(split % sequence_splits, batch, sequence_splits):
        start, length_q = other_side(b, cu_q, batch, total_q)
        start_k, length_k = other_side(b, cu_k, batch, total_k)
        start, start_k = tl.cast(start, tl.int64), tl.cast(start_k, tl.int64)
        shift = 0 if TOP_LEFT else length_k - length_q
        q_head = q + start * stride_qt + h * stride_qh
        do_head = do + start * stride_dot + h * stride_doh
        k_head = k + start_k * stride_kt + h // GROUP * stride_kh
        v_head = v + start_k * stride_vt + h // GROUP * stride_vh
        per_row = tl.cast(h, tl.int64) * total_q + start
        head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
        # The tiles of a diagonal have keys from a multiple of S on and queries from key - shift - S * diagonal on.
        first, last = diagonal, diagonal + 1
        if diagonal == -(diagonals // 2):
            first = tl.minimum(first, -tl.cdiv(length_q + shift, S))
        if diagonal == diagonals // 2:
            last = tl.maximum(last, tl.cdiv(length_k - shift, S) + 1)
        if HAS_LEFT:
            first = tl.maximum(first, -tl.cdiv(left, S) - 1)
        if HAS_RIGHT:
            last = tl.minimum(last, tl.cdiv(right, S) + 2)
        for m in range(first, last):
            begin = tl.maximum(m * S + shift - S + 1, 0) // S
            begin += (split // sequence_splits - begin % tile_splits + tile_splits) % tile_splits
            end = tl.minimum(length_k, length_q + shift + m * S)
            for key in tl.range(begin * S, end, tile_splits * S):
                row = key - shift - m * S
                inside = (row + offs >= 0) & (row + offs < length_q)
                kb = load_rows(k_head, key, stride_kt, length_k, offs, offs_d, D, BD, True)
                vb = load_rows(v_head, key, stride_vt, length_k, offs, offs_dv, DV, BDV, True)
                qb = _rows_inside(q_head, row, stride_qt, length_q, D, BD, S)
                dob = _rows_inside(do_head, row, stride_dot, length_q, DV, BDV, S)
                if PRECISION == "tf32x3":
                    qb = scaled(qb, scale)
                lse_rows = tl.load(lse + per_row + row + offs, mask=inside, other=float("inf"))
                lse_rows = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows)
                row_delta = tl.load(delta + per_row + row + offs, mask=inside, other=0.0)
                p, _, dp, _ = tile_gradients(
                    qb, dob, lse_rows, kb, vb, row, key, key, length_k, shift, left, right, scale, scores, head,
                    positions, h, reach, table_rows, D, S, BD, True, HAS_LEFT, HAS_RIGHT, PRECISION,
                )  # fmt: skip
                ds = p * (dp - row_delta[:, None])
                if positions.keys is not None:
                    near, far = upright_queries(ds, key, S)
                    near_keys = tl.dot(tl.trans(near.to(qb.dtype)), qb, near_keys, input_precision=PRECISION)
                    far_keys = tl.dot(tl.trans(far.to(qb.dtype)), qb, far_keys, input_precision=PRECISION)
                if positions.queries is not None:
                    near, far = upright_keys(ds, key, S)
                    near_queries = tl.dot(near.to(kb.dtype), kb, near_queries, input_precision=PRECISION)
                    far_queries = tl.dot(far.to(kb.dtype), kb, far_queries, input_precision=PRECISION)
    part = (tl.cast(slot, tl.int64) * HEADS + h) * 2 * S * D
    places, columns = part + offs[:, None] * D + offs_d[None, :], (offs_d < D)[None, :]
    if positions.keys is not None:
        if PRECISION != "tf32x3":  # there the queries were scaled
            near_keys *= scale
            far_keys *= scale
        tl.store(key_parts + places, near_keys, mask=columns)
        tl.store(key_parts + S * D + places, far_keys, mask=columns)
    if positions.queries is not None:
        tl.store(query_parts + places, near_queries * scale, mask=columns)
        tl.store(query_parts + S * D + places, far_queries * scale, mask=columns)


@triton.jit
def _add_rows(sums, parts, mine, x, slot, h, HEADS: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    first = (tl.cast(slot, tl.int64) * HEADS + h) * X * D
    rows = tl.load(parts + first + x[:, None] * D + cols[None, :], mask=mine[:, None] & (cols < D)[None, :], other=0.0)
    return sums + tl.sum(rows, 0)


@triton.jit(do_not_specialize=("reach", "table_rows", "diagonals", "splits"))
def disentangled_tables_rows_kernel(
    lut,  # (2 * reach + 1,)
    key_parts, query_parts,  # (splits, diagonals, H, 2 S, D)
    dkeys, dqueries,  # (table_rows, H, D)
    reach, table_rows, diagonals, splits, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """One program owns one row of the tables and one head; X is 2 S."""
    r, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    x, cols = tl.arange(0, X), tl.arange(0, BD)
    sum_keys = tl.zeros([BD], tl.float32)
    sum_queries = tl.zeros([BD], tl.float32)
    for diagonal in range(diagonals):
        distance = (diagonal - diagonals // 2) * (X // 2) - (X // 2 - 1) + x
        row = tl.load(lut + reach + tl.minimum(tl.maximum(distance, -reach), reach)).to(tl.int32)
        mine = tl.minimum(tl.maximum(row, 0), table_rows - 1) == r
        if tl.max(mine.to(tl.int32), 0) > 0:
            for split in range(splits):
                slot = split * diagonals + diagonal
                if key_parts is not None:
                    sum_keys = _add_rows(sum_keys, key_parts, mine, x, slot, h, HEADS, D, X, BD)
                if query_parts is not None:
                    sum_queries = _add_rows(sum_queries, query_parts, mine, x, slot, h, HEADS, D, X, BD)
    place = tl.cast(tl.program_id(0), tl.int64) * D + cols
    if dkeys is not None:
        tl.store(dkeys + place, sum_keys, mask=cols < D)
    if dqueries is not None:
        tl.store(dqueries + place, sum_queries, mask=cols < D)


_gradient = Launcher(disentangled_tables_gradient_kernel)
_rows = Launcher(disentangled_tables_rows_kernel)


def tables_gradient(tables, tensors, offsets, sizes, strides, values, key, fixed):
    """The gradients (table_rows, H, D) of both tables, float32, None for a missing one. The rest are arguments of the
    kernels as varlen_attention_disentangled_bwd has them: tensors q .. delta, offsets cu_q, cu_k."""
    q, lse, (positions, *_, reach, _, table_rows) = tensors[0], tensors[4], values[-6:]
    batch, total_q, total_k, _ = sizes
    (_, heads, width), lut = q.shape, positions.lut
    config = tables_config(q.dtype, max(width, fixed[3]))
    size = config[0]
    diagonals = 2 * triton.cdiv(reach + size - 1, size) + 1
    # No more programs for a diagonal than leave each some tiles.
    splits = max(1, min(PROGRAMS // (heads * diagonals), (total_k // size + batch) // 4))
    sequence_splits = max(1, min(splits, batch))
    tile_splits = splits // sequence_splits
    splits = sequence_splits * tile_splits
    shape = (splits, diagonals, heads, 2 * size, width)
    parts = [None if x is None else lse.new_empty(shape) for x in tables]
    sums = [None if x is None else lse.new_empty(x.shape) for x in tables]
    _gradient(
        splits * diagonals * heads,
        (q.dtype, strides, alignments(*tensors, *offsets), key),
        (*tensors, *parts, *offsets, *sizes, *strides, *values, diagonals, sequence_splits, tile_splits),
        fixed,
        config,
    )
    _rows(
        table_rows * heads,
        (*(x is None for x in parts), lut.dtype, alignments(lut)),
        (lut, *parts, *sums, reach, table_rows, diagonals, splits),
        (heads, width, fixed[4], 2 * size),
        (4, 1),
    )
    return sums
