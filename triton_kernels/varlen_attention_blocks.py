"""Blocks of the attention kernels: rows of a packed tensor, and P and dP of the backward pass."""

import triton
import triton.language as tl

from .attention_scores import LOG2E, keep_mask, modify
from .intervals import visible


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
def row_lse(lse, row, offs, length):
    """LSE of rows, +inf for rows that see nothing or do not exist: exp(s - LSE) is 0."""
    value = tl.load(lse + row + offs, mask=row + offs < length, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def probabilities(s, lse, factor):
    """exp(factor * s - LSE). The difference is taken before it is scaled for exp2: of large scores, little remains."""
    return tl.exp2((s * factor - lse) * LOG2E)


@triton.jit
def p_and_dp(
    q, do, lse_rows, k, v, stride_k, stride_v, row, key, length, shift, left, right, factor, scores, head,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key block, P, dP = dO V^T behind the dropout and the softcap's tanh, (BM, BN), of one block of keys."""
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    kb = load_rows(k, key, stride_k, length, offs_n, offs_d, D, BD, MASKED)
    vb = load_rows(v, key, stride_v, length, offs_n, offs_dv, DV, BDV, MASKED)
    s = tl.dot(q, tl.trans(kb), input_precision=PRECISION)
    rows, keys, t = (row + offs_m)[:, None], (key + offs_n)[None, :], s
    if scores.scale is not None:
        s, t = modify(s, rows, keys, shift, scores, head)
    p = probabilities(s, lse_rows[:, None], factor)
    if MASKED:
        p = tl.where(visible(rows, keys, length, shift, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    dp = tl.dot(do, tl.trans(vb), input_precision=PRECISION)
    if scores.kept is not None:
        dp = tl.where(keep_mask(row, key, head, BM, BN), dp * scores.kept, 0.0)
    return kb, p, dp, t


@triton.jit
def through_softcap(ds, t, scores):
    if scores.softcap is not None:
        ds *= 1.0 - t * t
    return ds
