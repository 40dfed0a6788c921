"""Padding-free attention with a disentangled bias, backward: dQ by query tile, dK and dV by key tile, and the gradients
of the tables (disentangled_tables_gradient.py). No atomics: every gradient element has one owner.

dS = P * (dP - delta) is the gradient of the scores. The gradient of a product of tile and table rows is dS with its
rows (columns, for the products with keys) turned back upright, and so multiplies the same rows.
"""

import torch
import triton
import triton.language as tl

from .attention_scores import at_head
from .disentangled_attention import UNSPECIALIZED, position_arguments
from .disentangled_attention_blocks import distance_rows, tile_gradients, upright_keys, upright_queries
from .disentangled_attention_configs import backward_config
from .disentangled_tables_gradient import tables_gradient
from .intervals import TILE, owned_tile, tile_interval
from .launch import Launcher, alignments
from .varlen_attention import UNREACHED, constants, slots
from .varlen_attention_blocks import load_rows, row_lse, scaled, store_rows, through_softcap


@triton.jit
def _add_dq(
    dq, ds, t, kb, key, base, scores, positions, h, reach, table_rows, D: tl.constexpr, S: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (S, BD) plus what dS brings it, without the factor `scale`."""
    dq = tl.dot(through_softcap(ds, t, scores).to(kb.dtype), kb, dq, input_precision=PRECISION)
    if positions.keys is not None:
        near, far = upright_queries(ds, key, S)
        keys = positions.keys + h * positions.keys_head
        rows = distance_rows(keys, positions.keys_row, base - (S - 1), positions.lut, reach, table_rows, D, S, BD)
        dq = tl.dot(near.to(kb.dtype), rows, dq, input_precision=PRECISION)
        rows = distance_rows(keys, positions.keys_row, base + 1, positions.lut, reach, table_rows, D, S, BD)
        dq = tl.dot(far.to(kb.dtype), rows, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_keys(
    dq, q, do, lse_rows, delta, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, scale, scores,
    head, positions, h, reach, table_rows,
    D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    for key in tl.range(begin, end, S):
        kb = load_rows(k, key, stride_k, length, offs, offs_d, D, BD, MASKED)
        vb = load_rows(v, key, stride_v, length, offs, offs_dv, DV, BDV, MASKED)
        p, _, dp, t = tile_gradients(
            q, do, lse_rows, kb, vb, row, key, key, length, shift, left, right, scale, scores, head, positions, h,
            reach, table_rows, D, S, BD, MASKED, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        base = key - row - shift
        dq = _add_dq(dq, ds, t, kb, key, base, scores, positions, h, reach, table_rows, D, S, BD, PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_disentangled_bwd_dq_kernel(
    q, k, v, out, do, lse, dlse, delta, dq,  # dq (Tq, H, D); delta (H, Tq) = rowsum(P * dP) - dLSE, written here
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, stride_dlse, scale, left, right, scores, positions, bias_q, bias_k, reach, threshold,
    table_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    b, h, row, start, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, tiles, batch, total_q, total_k, steps, HEADS, SELF, TILE, S
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
    head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    inside = row + offs < length_q
    q_tile = load_rows(q, row, stride_qt, length_q, offs, offs_d, D, BD, True)
    if PRECISION == "tf32x3":
        q_tile = scaled(q_tile, scale)
    do_tile = load_rows(do, row, stride_dot, length_q, offs, offs_dv, DV, BDV, True)
    lse_rows = row_lse(lse + per_row, row, offs, length_q)
    row_dlse = tl.zeros([S], tl.float32)
    if dlse is not None:
        row_dlse = tl.load(dlse + tl.cast(h, tl.int64) * stride_dlse + start + row + offs, mask=inside, other=0.0)
    acc = tl.zeros([S, BD], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, S, length_k, shift, left, right, S, HAS_LEFT, HAS_RIGHT)
    if (begin < end) & (end - begin <= S):
        # One key block: P is normalised anew, as in varlen_attention_bwd.py, and for its reasons.
        kb = load_rows(k, begin, stride_kt, length_k, offs, offs_d, D, BD, True)
        vb = load_rows(v, begin, stride_vt, length_k, offs, offs_dv, DV, BDV, True)
        p, _, dp, t = tile_gradients(
            q_tile, do_tile, lse_rows, kb, vb, row, begin, begin, length_k, shift, left, right, scale, scores, head,
            positions, h, reach, table_rows, D, S, BD, True, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        seen = tl.sum(p, 1)
        p = p / tl.where(seen == 0.0, 1.0, seen)[:, None]
        row_delta = tl.sum(p * dp, 1) - row_dlse
        ds = p * (dp - row_delta[:, None])
        base = begin - row - shift
        acc = _add_dq(acc, ds, t, kb, begin, base, scores, positions, h, reach, table_rows, D, S, BD, PRECISION)
    else:
        o_tile = load_rows(out + (start * HEADS + h) * DV, row, HEADS * DV, length_q, offs, offs_dv, DV, BDV, True)
        row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1) - row_dlse
        if HAS_LEFT:
            acc = _dq_keys(
                acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, begin, full_begin, row, length_k,
                shift, left, right, scale, scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, True,
                HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip
        acc = _dq_keys(
            acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, full_begin, full_end, row, length_k,
            shift, left, right, scale, scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, False,
            HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        acc = _dq_keys(
            acc, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, full_end, end, row, length_k, shift,
            left, right, scale, scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, True, HAS_LEFT,
            HAS_RIGHT, PRECISION,
        )  # fmt: skip
    tl.store(delta + per_row + row + offs, row_delta, mask=inside)
    store_rows(dq + (start * HEADS + h) * D, row, HEADS * D, length_q, offs, offs_d, acc * scale, D)


@triton.jit
def _dkv_queries(
    dk, dv, kb, vb, q, do, lse, delta, stride_q, stride_do, begin, end, key, length_q, length_k, shift, left, right,
    scale, scores, head, positions, h, reach, table_rows,
    D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    for row in tl.range(begin, end, S):
        qb = load_rows(q, row, stride_q, length_q, offs, offs_d, D, BD, MASKED)
        dob = load_rows(do, row, stride_do, length_q, offs, offs_dv, DV, BDV, MASKED)
        if PRECISION == "tf32x3":
            qb = scaled(qb, scale)
        p, dropped, dp, t = tile_gradients(
            qb, dob, row_lse(lse, row, offs, length_q), kb, vb, row, key, row, length_k, shift, left, right, scale,
            scores, head, positions, h, reach, table_rows, D, S, BD, MASKED, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped.to(dob.dtype)), dob, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + row + offs, mask=row + offs < length_q, other=0.0)
        ds = p * (dp - row_delta[:, None])
        dz = through_softcap(ds, t, scores).to(qb.dtype)
        dk = tl.dot(tl.trans(dz), qb, dk, input_precision=PRECISION)
        if positions.queries is not None:
            if PRECISION == "tf32x3":  # here the queries have the factor
                ds = scaled(ds, scale)
            near, far = upright_keys(ds, row, S)
            queries, base = positions.queries + h * positions.queries_head, key - row - shift
            rows = distance_rows(
                queries, positions.queries_row, base - (S - 1), positions.lut, reach, table_rows, D, S, BD
            )
            dk = tl.dot(tl.trans(near.to(qb.dtype)), rows, dk, input_precision=PRECISION)
            rows = distance_rows(queries, positions.queries_row, base + 1, positions.lut, reach, table_rows, D, S, BD)
            dk = tl.dot(tl.trans(far.to(qb.dtype)), rows, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_disentangled_bwd_dkv_kernel(
    q, k, v, do, lse, delta, dk, dv,  # dk (Tk, Hkv, D), dv (Tk, Hkv, DV); delta (H, Tq)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, scale, left, right, scores, positions, bias_q, bias_k, reach, threshold, table_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    b, h, key, start_k, length_k, start, length_q = owned_tile(
        cu_k, cu_q, tiles, batch, total_k, total_q, steps, HEADS, SELF, TILE, S
    )
    if key >= length_k:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    start, start_k = tl.cast(start, tl.int64), tl.cast(start_k, tl.int64)
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    kb = load_rows(k + start_k * stride_kt + h * stride_kh, key, stride_kt, length_k, offs, offs_d, D, BD, True)
    vb = load_rows(v + start_k * stride_vt + h * stride_vh, key, stride_vt, length_k, offs, offs_dv, DV, BDV, True)
    dk_acc = tl.zeros([S, BD], tl.float32)
    dv_acc = tl.zeros([S, BDV], tl.float32)
    # Key j is seen by the queries [j - shift - right, j - shift + left]: the same interval, turned round.
    begin, full_begin, full_end, end = tile_interval(key, S, length_q, -shift, right, left, S, HAS_RIGHT, HAS_LEFT)
    for g in range(GROUP):
        hq = h * GROUP + g
        q_head = q + start * stride_qt + hq * stride_qh
        do_head = do + start * stride_dot + hq * stride_doh
        per_row = tl.cast(hq, tl.int64) * total_q + start
        head = at_head(scores, b, hq, batch, length_q, bias_q, bias_k, reach, threshold, HEADS * GROUP)
        if HAS_RIGHT:
            dk_acc, dv_acc = _dkv_queries(
                dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, begin,
                full_begin, key, length_q, length_k, shift, left, right, scale, scores, head, positions, hq, reach,
                table_rows, D, DV, S, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip
        dk_acc, dv_acc = _dkv_queries(
            dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, full_begin,
            full_end, key, length_q, length_k, shift, left, right, scale, scores, head, positions, hq, reach,
            table_rows, D, DV, S, BD, BDV, False, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        dk_acc, dv_acc = _dkv_queries(
            dk_acc, dv_acc, kb, vb, q_head, do_head, lse + per_row, delta + per_row, stride_qt, stride_dot, full_end,
            end, key, length_q, length_k, shift, left, right, scale, scores, head, positions, hq, reach, table_rows, D,
            DV, S, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    if PRECISION != "tf32x3":
        dk_acc *= scale
    if scores.kept is not None:
        dv_acc *= scores.kept
    hkv = start_k * HEADS + h
    store_rows(dk + hkv * D, key, HEADS * D, length_k, offs, offs_d, dk_acc, D)
    store_rows(dv + hkv * DV, key, HEADS * DV, length_k, offs, offs_dv, dv_acc, DV)


_dq = Launcher(varlen_attention_disentangled_bwd_dq_kernel)
_dkv = Launcher(varlen_attention_disentangled_bwd_dkv_kernel)


def varlen_attention_disentangled_bwd(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, deterministic,
    softcap=0.0, slopes=None, bias=None, table=None, lut=None, dropout_p=0.0, rng=None, position_keys=None,
    position_queries=None, want_dbias=False,
):  # fmt: skip
    """Bitwise repeatable with or without `deterministic`: every element has one owner, and its sums one order."""
    (total_q, heads, _), (total_k, heads_kv, _), batch = q.shape, k.shape, cu_q.shape[0] - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    if dlse is not None and dlse.stride(1) != 1:
        dlse = dlse.contiguous()
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    fixed, itself = constants(q, k, v, cu_q, cu_k, left, right, top_left)
    arguments, key = position_arguments(q, scale, softcap, slopes, lut, dropout_p, rng, position_keys, position_queries)
    config = backward_config(q.dtype, max(q.shape[2], v.shape[2]))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    sizes = (batch, total_q, total_k, (batch + 1).bit_length())
    values, pointers = (scale, left, right, *arguments), (q, k, v, out, dout, lse, dlse)
    if dq.numel():
        stride_dlse = dlse.stride(0) if dlse is not None else 0
        _dq(
            slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads,
            (q.dtype, strides, stride_dlse, alignments(*pointers, cu_q, cu_k, tiles), key),
            (q, k, v, out, dout, lse, dlse, delta, dq, cu_q, cu_k, tiles, *sizes, *strides, stride_dlse, *values),
            (heads, *fixed),
            config,
        )
    dtables = (None, None)
    if want_dbias:
        dtables = tables_gradient(
            (position_keys, position_queries), (q, k, v, dout, lse, delta), (cu_q, cu_k), sizes, strides, values, key,
            (heads, *fixed),
        )  # fmt: skip
    if dk.numel() or dv.numel():
        tiles = tiles if itself else None  # the plan's tiles are those of the queries
        _dkv(
            slots(cu_k, tiles, total_k) * (TILE // config[0]) * heads_kv,
            (q.dtype, strides, alignments(*pointers, cu_q, cu_k, tiles), key),
            (q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, tiles, *sizes, *strides, *values),
            (heads_kv, *fixed),
            config,
        )
    return dq, dk, dv, *(lse.new_zeros(0) if dx is None else dx for dx in dtables)
