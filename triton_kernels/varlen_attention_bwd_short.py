"""Backward of padding-free attention where sequences are short: one program does all of one sequence and key head.

Q, K, V and dO are read once, every product is made once, P is normalised anew and rowsum(P * dP) is at hand, so that
neither the output nor a second kernel is needed. Scores are transposed, keys by queries: P and dS enter the products
for dV and dK from the registers in which they were computed. A sequence of more than BK keys, which the hints deny, is
done in several blocks of keys, whose dQ are added up in memory.
"""

import triton
import triton.language as tl

from .intervals import _bounded_start, visible
from .launch import Launcher, alignments
from .varlen_attention_blocks import load_rows, probabilities, row_lse, store_rows

UNSPECIALIZED = ("batch", "total_q", "total_k", "scale", "left", "right")
TAIL = 256  # rows beyond the last sequence that one program sets to 0


@triton.jit
def _zero_tail(base, begin, tail, total, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Zeros in those of the rows [begin, begin + TAIL) that lie in [tail, total)."""
    first = tl.maximum(begin, tail)
    count = tl.maximum(tl.minimum(begin + TAIL, total) - first, 0) * WIDTH
    base += tl.cast(first, tl.int64) * WIDTH
    offs = tl.arange(0, 1024)
    for i in range(0, count, 1024):
        tl.store(base + i + offs, tl.zeros([1024], base.dtype.element_ty), mask=i + offs < count)


@triton.jit
def _key_block(
    q, k, v, out, do, lse, dlse, dq, dk, dv, key, length_q, length_k, shift, stride_qt, stride_qh, stride_kt, stride_vt,
    stride_dot, stride_doh, total_q, stride_dlse, scale, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """All of the block of keys at `key`. ALONE: it holds the sequence's keys; else its dQ is added to what is there."""
    offs_m, offs_n, offs_d = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BD)
    kb = load_rows(k, key, stride_kt, length_k, offs_n, offs_d, D, BD, True)
    vb = load_rows(v, key, stride_vt, length_k, offs_n, offs_d, DV, BD, True)
    dk_sum = tl.zeros([BK, BD], tl.float32)
    dv_sum = tl.zeros([BK, BD], tl.float32)
    for g in range(GROUP):
        for row in range(0, length_q, BM):
            qb = load_rows(q + g * stride_qh, row, stride_qt, length_q, offs_m, offs_d, D, BD, True)
            dob = load_rows(do + g * stride_doh, row, stride_dot, length_q, offs_m, offs_d, DV, BD, True)
            lse_rows = row_lse(lse + tl.cast(g, tl.int64) * total_q, row, offs_m, length_q)
            p = probabilities(tl.dot(kb, tl.trans(qb)), lse_rows[None, :], scale)
            rows, keys = (row + offs_m)[None, :], (key + offs_n)[:, None]
            p = tl.where(visible(rows, keys, length_k, shift, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
            dp = tl.dot(vb, tl.trans(dob))
            if ALONE:  # see varlen_attention_bwd_dq_kernel
                seen = tl.sum(p, 0)
                p = p / tl.where(seen == 0.0, 1.0, seen)[None, :]
                delta = tl.sum(p * dp, 0)
            else:
                ob = load_rows(out + g * DV, row, HEADS * GROUP * DV, length_q, offs_m, offs_d, DV, BD, True)
                delta = tl.sum(dob.to(tl.float32) * ob.to(tl.float32), 1)
            if dlse is not None:
                pointers = dlse + tl.cast(g, tl.int64) * stride_dlse + row + offs_m
                delta -= tl.load(pointers, mask=row + offs_m < length_q, other=0.0)
            ds = (p * (dp - delta[None, :])).to(qb.dtype)
            dv_sum = tl.dot(p.to(dob.dtype), dob, dv_sum)
            dk_sum = tl.dot(ds, qb, dk_sum)
            dq_tile = tl.trans(tl.dot(tl.trans(kb), ds)) * scale
            if not ALONE:
                before = load_rows(dq + g * D, row, HEADS * GROUP * D, length_q, offs_m, offs_d, D, BD, True)
                dq_tile += tl.where(key > 0, before.to(tl.float32), 0.0)
            store_rows(dq + g * D, row, HEADS * GROUP * D, length_q, offs_m, offs_d, dq_tile, D)
    store_rows(dk, key, HEADS * D, length_k, offs_n, offs_d, dk_sum * scale, D)
    store_rows(dv, key, HEADS * DV, length_k, offs_n, offs_d, dv_sum, DV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_bwd_short_kernel(
    q, k, v, out, do, lse, dlse, dq, dk, dv,  # as in varlen_attention_bwd.py
    cu_q, cu_k, batch, total_q, total_k, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot,
    stride_doh, stride_dlse, scale, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, TAIL: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    if b >= batch:
        begin = (tl.program_id(0) - batch * HEADS) * TAIL
        tail_q, tail_k = _bounded_start(cu_q, batch, total_q), _bounded_start(cu_k, batch, total_k)
        _zero_tail(dq, begin, tail_q, total_q, HEADS * GROUP * D, TAIL)
        _zero_tail(dk, begin, tail_k, total_k, HEADS * D, TAIL)
        _zero_tail(dv, begin, tail_k, total_k, HEADS * DV, TAIL)
        return
    start, start_k = _bounded_start(cu_q, b, total_q), _bounded_start(cu_k, b, total_k)
    length_q = tl.maximum(_bounded_start(cu_q, b + 1, total_q) - start, 0)
    length_k = tl.maximum(_bounded_start(cu_k, b + 1, total_k) - start_k, 0)
    shift = 0 if TOP_LEFT else length_k - length_q
    start, start_k = tl.cast(start, tl.int64), tl.cast(start_k, tl.int64)
    first = h * GROUP
    q += start * stride_qt + first * stride_qh
    do += start * stride_dot + first * stride_doh
    k += start_k * stride_kt + h * stride_kh
    v += start_k * stride_vt + h * stride_vh
    out += (start * HEADS * GROUP + first) * DV
    dq += (start * HEADS * GROUP + first) * D
    dk += (start_k * HEADS + h) * D
    dv += (start_k * HEADS + h) * DV
    lse += tl.cast(first, tl.int64) * total_q + start
    if dlse is not None:
        dlse += tl.cast(first, tl.int64) * stride_dlse + start
    if length_k <= BK:
        _key_block(
            q, k, v, out, do, lse, dlse, dq, dk, dv, 0, length_q, length_k, shift, stride_qt, stride_qh, stride_kt,
            stride_vt, stride_dot, stride_doh, total_q, stride_dlse, scale, left, right, HEADS, GROUP, D, DV, BD,
            HAS_LEFT, HAS_RIGHT, BK, BM, True,
        )  # fmt: skip
    else:
        for key in range(0, length_k, BK):
            _key_block(
                q, k, v, out, do, lse, dlse, dq, dk, dv, key, length_q, length_k, shift, stride_qt, stride_qh,
                stride_kt, stride_vt, stride_dot, stride_doh, total_q, stride_dlse, scale, left, right, HEADS, GROUP,
                D, DV, BD, HAS_LEFT, HAS_RIGHT, BK, BM, False,
            )  # fmt: skip


_short = Launcher(varlen_attention_bwd_short_kernel)


def backward(config, dout, dlse, q, k, v, out, lse, cu_q, cu_k, dq, dk, dv, scale, left, right, top_left, block):
    """block: the padded width of both heads. Writes all of dq, dk and dv."""
    (total_q, heads, width), (total_k, heads_kv, width_v), batch = q.shape, v.shape, cu_q.shape[0] - 1
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    stride_dlse = dlse.stride(0) if dlse is not None else 0
    _short(
        batch * heads_kv + triton.cdiv(max(total_q, total_k), TAIL),
        (q.dtype, strides, stride_dlse, alignments(q, k, v, dout, dlse, cu_q, cu_k)),
        (
            q, k, v, out, dout, lse, dlse, dq, dk, dv, cu_q, cu_k, batch, total_q, total_k, *strides, stride_dlse,
            scale, left, right,
        ),
        (heads_kv, heads // heads_kv, width, width_v, block, left >= 0, right >= 0, top_left, TAIL),
        config,
    )  # fmt: skip
