"""Blocks of the attention kernels: rows of a packed tensor, and P and dP of the backward pass."""

import triton
import triton.language as tl

from .attention_scores import LOG2E, keep_mask, modify
from .intervals import visible

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(
    base, row, stride, length, offs_r, offs_c, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, CHECK: tl.constexpr
):
    """Block (len(offs_r), BLOCK_COLS) of rows row + offs_r, zeros outside [0, length) and past COLS."""
    pointers = base + tl.cast(row, tl.int64) * stride + offs_r[:, None] * stride + offs_c[None, :]
    if CHECK:
        inside = (row + offs_r < length)[:, None]
        if COLS != BLOCK_COLS:
            inside = inside & (offs_c < COLS)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if COLS != BLOCK_COLS:
        return tl.load(pointers, mask=(offs_c < COLS)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, row, stride, length, offs_r, offs_c, value, COLS: tl.constexpr):
    pointers = base + tl.cast(row, tl.int64) * stride + offs_r[:, None] * stride + offs_c[None, :]
    inside = (row + offs_r < length)[:, None] & (offs_c < COLS)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def scaled(x, scale):
    """Float32 queries times the scale, rounded. A product that may fuse with the split into two operands of tf32 is
    rounded in one kernel and not in another, and then P of a lone key is not 1."""
    if INTERPRETED:
        return x * scale
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, scale], tl.float32, True, 1)


@triton.jit
def row_lse(lse, row, offs, length):
    """LSE of rows, +inf for rows that see nothing or do not exist: exp(s - LSE) is 0."""
    value = tl.load(lse + row + offs, mask=row + offs < length, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def statistics_of(statistics, h, b, start, batch, total, TILE: tl.constexpr):
    """Where the statistics of sequence b and head h begin. No tile belongs to two sequences (see intervals.locate), so
    that loads are aligned and need no mask."""
    tile = tl.cast(h, tl.int64) * (total // TILE + batch + 1) + start // TILE + b
    return statistics + tile * (2 * TILE)


@triton.jit
def store_statistics(statistics, row, lse, delta, BM: tl.constexpr):
    """lse is that of row_lse. Rows beyond the sequence are stored with the others: their P will be 0."""
    offs = row * 2 + tl.arange(0, BM)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(statistics + offs, tl.join(lse, delta))


@triton.jit
def load_statistics(statistics, row, BM: tl.constexpr, SPAN: tl.constexpr):
    """(LSE, delta) of rows [row, row + BM). Only blocks of at least one number a thread does Triton copy to shared
    memory once instead of once a thread: SPAN makes the block so many times longer than it is used."""
    offs = tl.arange(0, 2 * SPAN * BM)
    pairs = tl.reshape(tl.load(statistics + row * 2 + offs), (SPAN, BM, 2))
    if SPAN == 2:
        pairs, _ = tl.split(tl.permute(pairs, (1, 2, 0)))
    else:
        pairs = tl.reshape(pairs, (BM, 2))
    return tl.split(pairs)


@triton.jit
def load_statistics_within(statistics, row, length, offs):
    """(LSE, delta) of rows row + offs, also where store_statistics wrote none of them."""
    inside = row + offs < length
    pointers = statistics + (row + offs) * 2
    return tl.load(pointers, mask=inside, other=float("inf")), tl.load(pointers + 1, mask=inside, other=0.0)


@triton.jit
def probabilities(s, lse, factor):
    """exp(factor * s - LSE). The difference is taken before it is scaled for exp2: of large scores, little remains."""
    return tl.exp2((s * factor - lse) * LOG2E)


@triton.jit
def bounded_probabilities(s, lse, factor):
    """probabilities, but at most 1 for any s."""
    return tl.exp2(tl.minimum((s * factor - lse) * LOG2E, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def p_and_dp(
    q, do, lse_rows, k, v, stride_k, stride_v, row, key, length, shift, left, right, factor, scores, head,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    LOOSE: tl.constexpr,
):  # fmt: skip
    """Key block, P, dP = dO V^T behind the dropout and the softcap's tanh, (BM, BN), of one block of keys.

    LOOSE: P of keys beyond the sequence may be any finite number, since what it multiplies is 0.
    """
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    kb = load_rows(k, key, stride_k, length, offs_n, offs_d, D, BD, MASKED)
    vb = load_rows(v, key, stride_v, length, offs_n, offs_dv, DV, BDV, MASKED)
    s = tl.dot(q, tl.trans(kb), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(vb), input_precision=PRECISION)
    rows, keys, t = (row + offs_m)[:, None], (key + offs_n)[None, :], s
    if scores.scale is not None:
        s, t = modify(s, rows, keys, shift, scores, head)
    if LOOSE:  # an upper bound costs half of what a mask does
        return kb, bounded_probabilities(s, lse_rows[:, None], factor), dp, t
    p = probabilities(s, lse_rows[:, None], factor)
    if MASKED:
        p = tl.where(visible(rows, keys, length, shift, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    if scores.kept is not None:
        dp = tl.where(keep_mask(row, key, head, BM, BN), dp * scores.kept, 0.0)
    return kb, p, dp, t


@triton.jit
def through_softcap(ds, t, scores):
    if scores.softcap is not None:
        ds *= 1.0 - t * t
    return ds
