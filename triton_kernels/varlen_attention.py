"""Padding-free attention: forward, and a two-kernel backward without atomics (dQ by query tile, dK and dV by key tile).

One program owns one (tile of rows, head). Rows of other sequences and rows past the end load as zeros, so that
nothing outside the sequence, NaN included, reaches a product.
"""

import torch
import triton
import triton.language as tl

from .intervals import TILE, owned_tile, tile_interval, visible
from .launch import Launcher, alignments
from .varlen_attention_configs import dkv_config, dq_config, forward_config

# Sizes and window widths: compiled once for all values (see launch.py).
UNSPECIALIZED = ("batch", "total_q", "total_k", "steps", "left", "right")
UNREACHED = 1 << 30  # a window wider than any sequence; larger ones would not fit the kernels' int32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(base, row, stride, length, offs_r, offs_c, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, CHECK: tl.constexpr):
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
def _store_rows(base, row, stride, length, offs_r, offs_c, value, COLS: tl.constexpr):
    pointers = base + tl.cast(row, tl.int64) * stride + offs_r[:, None] * stride + offs_c[None, :]
    inside = (row + offs_r < length)[:, None] & (offs_c < COLS)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


# float32 works in natural units on queries scaled before the product, so that the score of a forward pass, its LSE and
# the score of a backward pass agree to the last bit: a row that sees one key has P = 1 exactly. The half-precision
# types work in units of log2(e), which spares a product per score, and scale the raw product by `unit`.


@triton.jit
def _exp(x, PRECISION: tl.constexpr):
    return tl.exp(x) if PRECISION == "tf32x3" else tl.exp2(x)


@triton.jit
def _fwd_keys(
    acc, top, total, q, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, unit,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [begin, end); `top` and the scaled scores are in the unit of _exp."""
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    for key in tl.range(begin, end, BN):
        kt = tl.trans(_rows(k, key, stride_k, length, offs_n, offs_d, D, BD, MASKED))
        s = tl.dot(q, kt, input_precision=PRECISION)  # (BM, BN)
        if NEGATIVE:
            s = -s
        if MASKED:
            keep = visible(
                (row + offs_m)[:, None], (key + offs_n)[None, :], length, shift, left, right, HAS_LEFT, HAS_RIGHT
            )
            s = tl.where(keep, s * unit, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = _exp(s - finite[:, None], PRECISION)
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * unit)
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = _exp(s * unit - finite[:, None], PRECISION)
        correction = _exp(top - finite, PRECISION)
        total = total * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        vb = _rows(v, key, stride_v, length, offs_n, offs_dv, DV, BDV, MASKED)
        acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_fwd_kernel(
    q,  # (Tq, H, D)
    k,  # (Tk, Hkv, D)
    v,  # (Tk, Hkv, DV)
    out,  # (Tq, H, DV)
    lse,  # (H, Tq)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    scale, unit, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    h, row, start, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, tiles, batch, total_q, total_k, steps, HEADS, SELF, TILE, BM
    )
    if row >= length_q:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    q += tl.cast(start, tl.int64) * stride_qt + h * stride_qh
    k += tl.cast(start_k, tl.int64) * stride_kt + h // GROUP * stride_kh
    v += tl.cast(start_k, tl.int64) * stride_vt + h // GROUP * stride_vh
    offs_m, offs_d = tl.arange(0, BM), tl.arange(0, BD)
    q_tile = _rows(q, row, stride_qt, length_q, offs_m, offs_d, D, BD, True)
    if PRECISION == "tf32x3":
        q_tile *= scale
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, length_k, shift, left, right, BN, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, top, total = _fwd_keys(
            acc, top, total, q_tile, k, v, stride_kt, stride_vt, begin, full_begin, row, length_k, shift, left, right,
            unit, D, DV, BM, BN, BD, BDV, True, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_begin, full_end, row, length_k, shift, left, right,
        unit, D, DV, BM, BN, BD, BDV, False, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_end, end, row, length_k, shift, left, right,
        unit, D, DV, BM, BN, BD, BDV, True, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    row_lse = tl.where(empty, float("-inf"), (top if PRECISION == "tf32x3" else top * LN2) + tl.log(total))
    _store_rows(
        out + (tl.cast(start, tl.int64) * HEADS + h) * DV, row, HEADS * DV, length_q, offs_m, tl.arange(0, BDV), acc, DV
    )
    tl.store(lse + tl.cast(h, tl.int64) * total_q + start + row + offs_m, row_lse, mask=row + offs_m < length_q)


@triton.jit
def _probabilities(s, lse, unit, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr):
    """exp(score - LSE) from products; LSE broadcasts and is +inf where the row is masked."""
    if NEGATIVE:
        s = -s
    return _exp(s * unit - lse, PRECISION)


@triton.jit
def _row_lse(lse, row, offs, length, PRECISION: tl.constexpr):
    """LSE of rows in the unit of _exp, +inf for rows that see nothing or do not exist: exp(s - LSE) is 0."""
    value = tl.load(lse + row + offs, mask=row + offs < length, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value if PRECISION == "tf32x3" else value * LOG2E)


@triton.jit
def _p_and_dp(
    q, do, lse_rows, k, v, stride_k, stride_v, row, key, length, shift, left, right, unit,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Key block, P and dP = dO V^T (both (BM, BN)) of one block of keys."""
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    kb = _rows(k, key, stride_k, length, offs_n, offs_d, D, BD, MASKED)
    vb = _rows(v, key, stride_v, length, offs_n, offs_dv, DV, BDV, MASKED)
    s = tl.dot(q, tl.trans(kb), input_precision=PRECISION)
    p = _probabilities(s, lse_rows[:, None], unit, NEGATIVE, PRECISION)
    if MASKED:
        keep = visible(
            (row + offs_m)[:, None], (key + offs_n)[None, :], length, shift, left, right, HAS_LEFT, HAS_RIGHT
        )
        p = tl.where(keep, p, 0.0)
    return kb, p, tl.dot(do, tl.trans(vb), input_precision=PRECISION)


@triton.jit
def _dq_keys(
    dq, q, do, lse_rows, delta, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, unit,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for key in tl.range(begin, end, BN):
        kb, p, dp = _p_and_dp(
            q, do, lse_rows, k, v, stride_k, stride_v, row, key, length, shift, left, right, unit, D, DV, BM, BN, BD,
            BDV, MASKED, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(kb.dtype), kb, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_bwd_dq_kernel(
    q, k, v, out, do, lse, dlse, delta, dq,  # dq (Tq, H, D); delta (H, Tq) = rowsum(P * dP) - dLSE, written here
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, stride_dlse, scale, unit, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    h, row, start, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, tiles, batch, total_q, total_k, steps, HEADS, SELF, TILE, BM
    )
    if row >= length_q:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    start = tl.cast(start, tl.int64)
    q += start * stride_qt + h * stride_qh
    do += start * stride_dot + h * stride_doh
    k += tl.cast(start_k, tl.int64) * stride_kt + h // GROUP * stride_kh
    v += tl.cast(start_k, tl.int64) * stride_vt + h // GROUP * stride_vh
    per_row = tl.cast(h, tl.int64) * total_q + start
    offs_m, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    inside = row + offs_m < length_q
    q_tile = _rows(q, row, stride_qt, length_q, offs_m, offs_d, D, BD, True)
    if PRECISION == "tf32x3":
        q_tile *= scale
    do_tile = _rows(do, row, stride_dot, length_q, offs_m, offs_dv, DV, BDV, True)
    lse_rows = _row_lse(lse + per_row, row, offs_m, length_q, PRECISION)
    row_dlse = tl.zeros([BM], tl.float32)
    if dlse is not None:
        row_dlse = tl.load(dlse + tl.cast(h, tl.int64) * stride_dlse + start + row + offs_m, mask=inside, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, length_k, shift, left, right, BN, HAS_LEFT, HAS_RIGHT)
    if (begin < end) & (end - begin <= BN):
        # With one key block, P can be normalised anew and rowsum(P * dP) is at hand. Where a row sees few keys they
        # cancel against dP to the last bit, which exp(score - LSE) and rowsum(dO * O), equal on paper, do not.
        kb, p, dp = _p_and_dp(
            q_tile, do_tile, lse_rows, k, v, stride_kt, stride_vt, row, begin, length_k, shift, left, right, unit, D,
            DV, BM, BN, BD, BDV, True, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        seen = tl.sum(p, 1)
        p = p / tl.where(seen == 0.0, 1.0, seen)[:, None]
        row_delta = tl.sum(p * dp, 1) - row_dlse
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(kb.dtype), kb, acc, input_precision=PRECISION)
    else:
        o_tile = _rows(out + (start * HEADS + h) * DV, row, HEADS * DV, length_q, offs_m, offs_dv, DV, BDV, True)
        row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1) - row_dlse
        if HAS_LEFT:
            acc = _dq_keys(
                acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, begin, full_begin, row, length_k,
                shift, left, right, unit, D, DV, BM, BN, BD, BDV, True, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip
        acc = _dq_keys(
            acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, full_begin, full_end, row, length_k,
            shift, left, right, unit, D, DV, BM, BN, BD, BDV, False, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        acc = _dq_keys(
            acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, full_end, end, row, length_k, shift,
            left, right, unit, D, DV, BM, BN, BD, BDV, True, NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    tl.store(delta + per_row + row + offs_m, row_delta, mask=inside)
    _store_rows(dq + (start * HEADS + h) * D, row, HEADS * D, length_q, offs_m, offs_d, acc * scale, D)


@triton.jit
def _dkv_queries(
    dk, dv, kb, vb, q, do, lse, delta, stride_q, stride_do, begin, end, key, length_q, length_k, shift, left, right,
    scale, unit,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    for row in tl.range(begin, end, BM):
        qb = _rows(q, row, stride_q, length_q, offs_m, offs_d, D, BD, MASKED)
        dob = _rows(do, row, stride_do, length_q, offs_m, offs_dv, DV, BDV, MASKED)
        lse_rows = _row_lse(lse, row, offs_m, length_q, PRECISION)
        if PRECISION == "tf32x3":
            qb *= scale
            s = tl.trans(tl.dot(qb, tl.trans(kb), input_precision=PRECISION))  # summed as in the forward pass
        else:
            s = tl.dot(kb, tl.trans(qb), input_precision=PRECISION)
        p = _probabilities(s, lse_rows[None, :], unit, NEGATIVE, PRECISION)
        if MASKED:
            keep = visible(
                (row + offs_m)[None, :], (key + offs_n)[:, None], length_k, shift, left, right, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(keep, p, 0.0)
        dv = tl.dot(p.to(dob.dtype), dob, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + row + offs_m, mask=row + offs_m < length_q, other=0.0)
        ds = p * (tl.dot(vb, tl.trans(dob), input_precision=PRECISION) - row_delta[None, :])
        dk = tl.dot(ds.to(qb.dtype), qb, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_bwd_dkv_kernel(
    q, k, v, do, lse, delta, dk, dv,  # dk (Tk, Hkv, D), dv (Tk, Hkv, DV); delta (H, Tq)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, scale, unit, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, NEGATIVE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    h, key, start_k, length_k, start, length_q = owned_tile(
        cu_k, cu_q, tiles, batch, total_k, total_q, steps, HEADS, SELF, TILE, BN
    )
    if key >= length_k:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    start, start_k = tl.cast(start, tl.int64), tl.cast(start_k, tl.int64)
    offs_n, offs_d, offs_dv = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    kb = _rows(k + start_k * stride_kt + h * stride_kh, key, stride_kt, length_k, offs_n, offs_d, D, BD, True)
    vb = _rows(v + start_k * stride_vt + h * stride_vh, key, stride_vt, length_k, offs_n, offs_dv, DV, BDV, True)
    dk_acc = tl.zeros([BN, BD], tl.float32)
    dv_acc = tl.zeros([BN, BDV], tl.float32)
    # Key j is seen by the queries [j - shift - right, j - shift + left]: the same interval, turned round.
    begin, full_begin, full_end, end = tile_interval(key, BN, length_q, -shift, right, left, BM, HAS_RIGHT, HAS_LEFT)
    for g in range(GROUP):
        hq = h * GROUP + g
        q_head = q + start * stride_qt + hq * stride_qh
        do_head = do + start * stride_dot + hq * stride_doh
        per_row = tl.cast(hq, tl.int64) * total_q + start
        if HAS_RIGHT:
            dk_acc, dv_acc = _dkv_queries(
                dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, begin,
                full_begin, key, length_q, length_k, shift, left, right, scale, unit, D, DV, BM, BN, BD, BDV, True,
                NEGATIVE, HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip
        dk_acc, dv_acc = _dkv_queries(
            dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, full_begin,
            full_end, key, length_q, length_k, shift, left, right, scale, unit, D, DV, BM, BN, BD, BDV, False, NEGATIVE,
            HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        dk_acc, dv_acc = _dkv_queries(
            dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, full_end,
            end, key, length_q, length_k, shift, left, right, scale, unit, D, DV, BM, BN, BD, BDV, True, NEGATIVE,
            HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    if PRECISION != "tf32x3":  # there the queries were scaled
        dk_acc *= scale
    hkv = start_k * HEADS + h
    _store_rows(dk + hkv * D, key, HEADS * D, length_k, offs_n, offs_d, dk_acc, D)
    _store_rows(dv + hkv * DV, key, HEADS * DV, length_k, offs_n, offs_dv, dv_acc, DV)


_fwd = Launcher(varlen_attention_fwd_kernel)
_dq = Launcher(varlen_attention_bwd_dq_kernel)
_dkv = Launcher(varlen_attention_bwd_dkv_kernel)


def _slots(cu, tiles, total):
    """Tiles to launch: the plan's list, or a bound every set of lengths keeps (each sequence may end in a part)."""
    return tiles.shape[0] if tiles is not None else total // TILE + cu.shape[0]


def _unit(q, scale):
    """What turns the kernels' products into scores, in the unit of _exp."""
    return 1.0 if q.dtype == torch.float32 else abs(scale) * LOG2E.value


def _constants(q, k, v, cu_q, cu_k, left, right, top_left, scale):
    """The constexpr arguments after HEADS, in the kernels' order, and whether both sides share cu_seqlens."""
    width, width_v = q.shape[2], v.shape[2]
    itself = cu_k.data_ptr() == cu_q.data_ptr() and q.shape[0] == k.shape[0]
    # One padded width for both: a value block narrower than the key block was computed wrongly in half precision
    # (triton 3.6.0, H100, widths 40 and 8).
    block = max(16, triton.next_power_of_2(max(width, width_v)))
    # tf32x3: three tensor-core products, float32 accuracy
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    masks = (scale < 0 and precision != "tf32x3", left >= 0, right >= 0, top_left)
    return (q.shape[1] // k.shape[1], width, width_v, block, block, itself, *masks, precision, TILE), itself


def varlen_attention_fwd(q, k, v, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, *scores):
    """`scores` ask for nothing: dispatch keeps softcap, biases and dropout away from these kernels."""
    (total_q, heads, _), total_k, batch = q.shape, k.shape[0], cu_q.shape[0] - 1
    out = q.new_empty((total_q, heads, v.shape[2]))
    lse = q.new_empty((heads, total_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    constants, _ = _constants(q, k, v, cu_q, cu_k, left, right, top_left, scale)
    config = forward_config(q.dtype, max(q.shape[2], v.shape[2]), max_k, left >= 0 or right >= 0)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    _fwd(
        _slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads,
        (q.dtype, strides, alignments(q, k, v, cu_q, cu_k, tiles)),
        (
            q, k, v, out, lse, cu_q, cu_k, tiles, batch, total_q, total_k, (batch + 1).bit_length(), *strides,
            scale, _unit(q, scale), left, right,
        ),
        (heads, *constants),
        config,
    )  # fmt: skip
    return out, lse


def varlen_attention_bwd(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, deterministic,
    *scores,
):  # fmt: skip
    """Every gradient element has one owner, so the result is bitwise repeatable with or without `deterministic`."""
    (total_q, heads, _), (total_k, heads_kv, _), batch = q.shape, k.shape, cu_q.shape[0] - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    if dlse is not None and dlse.stride(1) != 1:
        dlse = dlse.contiguous()
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    constants, itself = _constants(q, k, v, cu_q, cu_k, left, right, top_left, scale)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    sizes = (batch, total_q, total_k, (batch + 1).bit_length())
    factors = (scale, _unit(q, scale), left, right)
    width, masked = max(q.shape[2], v.shape[2]), left >= 0 or right >= 0
    pointers = (q, k, v, dout, cu_q, cu_k, tiles)
    if dq.numel():
        config = dq_config(q.dtype, width, max_k, masked)
        stride_dlse = dlse.stride(0) if dlse is not None else 0
        _dq(
            _slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads,
            (q.dtype, strides, stride_dlse, alignments(*pointers, dlse)),
            (q, k, v, out, dout, lse, dlse, delta, dq, cu_q, cu_k, tiles, *sizes, *strides, stride_dlse, *factors),
            (heads, *constants),
            config,
        )
    if dk.numel() or dv.numel():
        tiles = tiles if itself else None  # the plan's tiles are those of the queries
        config = dkv_config(q.dtype, width, max_q, masked)
        _dkv(
            _slots(cu_k, tiles, total_k) * (TILE // config[1]) * heads_kv,
            (q.dtype, strides, alignments(*pointers)),
            (q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, tiles, *sizes, *strides, *factors),
            (heads_kv, *constants),
            config,
        )
    nothing = (0,)  # the gradients of the biases, which these kernels do not take
    return dq, dk, dv, lse.new_empty(nothing), lse.new_empty(nothing)
