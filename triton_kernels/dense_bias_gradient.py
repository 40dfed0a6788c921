"""Gradient of a dense bias: the sum of dS over the sequences and heads that share an element.

One program owns one tile of the bias and goes through those who share it in order, computing their P and dP anew: two
products a block instead of the atomics that writing from the dQ kernel would take, and the same bits in every run.
Where tiles are few and sharers many, several programs own a tile, each a share of the sharers, and their parts are
added up.
"""

import triton
import triton.language as tl

from .attention_scores import at_head
from .intervals import other_side, tile_interval
from .launch import Launcher, alignments
from .varlen_attention import UNSPECIALIZED
from .varlen_attention_blocks import load_rows, load_statistics_within, p_and_dp, scaled, statistics_of
from .varlen_attention_configs import dbias_config

# Programs wanted on a large GPU. A constant, so that the order of the sums depends on shapes alone.
PROGRAMS = 512


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "splits", "bias_batch", "bias_heads"))
def dense_bias_gradient_kernel(
    q, k, v, do, statistics, dbias,  # dbias (splits, 1 or B, 1 or H, bias_q, bias_k)
    cu_q, cu_k, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, scale, factor, left, right, scores, bias_q, bias_k, reach, threshold, splits, bias_batch,
    bias_heads,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles_q, tiles_k = tl.cdiv(bias_q, BM), tl.cdiv(bias_k, BN)
    slice_, tile = tl.program_id(0) // (tiles_q * tiles_k), tl.program_id(0) % (tiles_q * tiles_k)
    row, key = tile // tiles_k * BM, tile % tiles_k * BN
    split = slice_ // (bias_batch * bias_heads)
    first_head, first_sequence = slice_ % bias_heads, slice_ // bias_heads % bias_batch
    # Sharers are pairs of a sequence and a head: all of either, or the one that this slice of the bias belongs to.
    heads, sequences = tl.where(bias_heads == 1, HEADS, 1), tl.where(bias_batch == 1, batch, 1)
    share = tl.cdiv(heads * sequences, splits)
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for sharer in tl.range(split * share, tl.minimum(split * share + share, heads * sequences)):
        h, b = first_head + sharer % heads, first_sequence + sharer // heads
        start, length_q = other_side(b, cu_q, batch, total_q)
        start_k, length_k = other_side(b, cu_k, batch, total_k)
        shift = 0 if TOP_LEFT else length_k - length_q
        begin, full_begin, full_end, end = tile_interval(row, BM, length_k, shift, left, right, BN, HAS_LEFT, HAS_RIGHT)
        if (row < length_q) & (key < end) & (key >= begin):
            q_head = q + tl.cast(start, tl.int64) * stride_qt + h * stride_qh
            do_head = do + tl.cast(start, tl.int64) * stride_dot + h * stride_doh
            k_head = k + tl.cast(start_k, tl.int64) * stride_kt + h // GROUP * stride_kh
            v_head = v + tl.cast(start_k, tl.int64) * stride_vt + h // GROUP * stride_vh
            q_tile = load_rows(q_head, row, stride_qt, length_q, offs_m, tl.arange(0, BD), D, BD, True)
            if PRECISION == "tf32x3":
                q_tile = scaled(q_tile, scale)
            do_tile = load_rows(do_head, row, stride_dot, length_q, offs_m, tl.arange(0, BDV), DV, BDV, True)
            mine = statistics_of(statistics, h, b, start, batch, total_q, TILE)
            lse_rows, row_delta = load_statistics_within(mine, row, length_q, offs_m)
            head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
            kb, p, dp, t = p_and_dp(
                q_tile, do_tile, lse_rows, k_head, v_head, stride_kt, stride_vt, row, key, length_k, shift, left, right,
                factor, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION, False,
            )  # fmt: skip
            acc += p * (dp - row_delta[:, None])
    dbias += tl.cast(slice_, tl.int64) * bias_q * bias_k
    rows, keys = (row + offs_m)[:, None], (key + offs_n)[None, :]
    tl.store(dbias + rows.to(tl.int64) * bias_k + keys, acc, mask=(rows < bias_q) & (keys < bias_k))


_dbias = Launcher(dense_bias_gradient_kernel)


def dense_bias_gradient(shape, tensors, offsets, sizes, strides, values, key, fixed):
    """float32, of `shape` (1 or B, 1 or H, S, S). The rest are arguments of the kernel as varlen_attention_bwd has
    them: tensors q .. statistics, offsets cu_q, cu_k, and the key of their options."""
    q, statistics, batch = tensors[0], tensors[4], sizes[0]
    heads, width = q.shape[1], max(fixed[1], fixed[2])
    config = dbias_config(q.dtype, width)
    tiles = shape[0] * shape[1] * triton.cdiv(shape[2], config[0]) * triton.cdiv(shape[3], config[1])
    sharers = (heads if shape[1] == 1 else 1) * (batch if shape[0] == 1 else 1)
    splits = max(1, min(sharers, PROGRAMS // max(tiles, 1)))
    parts = statistics.new_empty((splits, *shape))
    if parts.numel():
        _dbias(
            splits * tiles,
            (q.dtype, strides, alignments(*tensors[:4], *offsets), key),
            (*tensors, parts, *offsets, *sizes, *strides, *values, splits, *shape[:2]),
            (heads, *fixed),
            config,
        )
    return parts[0] if splits == 1 else parts.sum(0)
