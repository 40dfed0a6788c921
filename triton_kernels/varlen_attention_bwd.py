"""Padding-free attention, backward: two kernels, dQ by query tile and dK, dV by key tile, and for the gradient of a
dense bias a third one (dense_bias_gradient.py). No atomics: every gradient element has one owner.

dS = P * (dP - delta) is the gradient of the scores and so of the biases; behind a softcap, dZ = dS * (1 - t^2) is that
of scale * q . k.
"""

import triton
import triton.language as tl

from . import varlen_attention_bwd_short
from .attention_scores import add_by_bucket, at_head, keep_mask, modify
from .dense_bias_gradient import dense_bias_gradient
from .intervals import TILE, owned_tile, tile_interval, visible
from .launch import Launcher, alignments
from .varlen_attention import UNREACHED, UNSPECIALIZED, constants, score_options, slots
from .varlen_attention_blocks import (
    load_rows,
    load_statistics,
    p_and_dp,
    probabilities,
    row_lse,
    scaled,
    statistics_of,
    store_rows,
    store_statistics,
    through_softcap,
)
from .varlen_attention_configs import dkv_config, dq_config, short_config


@triton.jit
def _dq_keys(
    dq, sums, q, do, lse_rows, delta, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, factor,
    scores, head,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BUCKETS: tl.constexpr,
):  # fmt: skip
    if begin < end:  # see _fwd_keys
        for key in tl.range(begin, end, BN):
            kb, p, dp, t = p_and_dp(
                q, do, lse_rows, k, v, stride_k, stride_v, row, key, length, shift, left, right, factor, scores, head,
                D, DV, BM, BN, BD, BDV, MASKED, HAS_LEFT, HAS_RIGHT, PRECISION,
                MASKED and not HAS_LEFT and not HAS_RIGHT and scores.scale is None,
            )  # fmt: skip
            ds = p * (dp - delta[:, None])
            if BUCKETS:
                sums = add_by_bucket(sums, ds, row, key, shift, scores.lut, head.reach, BM, BN, BUCKETS)
            dq = tl.dot(through_softcap(ds, t, scores).to(kb.dtype), kb, dq, input_precision=PRECISION)
    return dq, sums


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_bwd_dq_kernel(
    q, k, v, out, do, lse, dlse, statistics, dq,  # dq (Tq, H, D); statistics, written here: see statistics_of
    dtable,  # (programs, BUCKETS): what this program's rows add to the relative table's column of their head
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, stride_dlse, scale, factor, left, right, scores, bias_q, bias_k, reach, threshold,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BUCKETS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b, h, row, start, length_q, start_k, length_k = owned_tile(
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
    head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
    offs_m, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    inside = row + offs_m < length_q
    q_tile = load_rows(q, row, stride_qt, length_q, offs_m, offs_d, D, BD, True)
    if PRECISION == "tf32x3":
        q_tile = scaled(q_tile, scale)
    do_tile = load_rows(do, row, stride_dot, length_q, offs_m, offs_dv, DV, BDV, True)
    lse_rows = row_lse(lse + per_row, row, offs_m, length_q)
    row_dlse = tl.zeros([BM], tl.float32)
    if dlse is not None:
        row_dlse = tl.load(dlse + tl.cast(h, tl.int64) * stride_dlse + start + row + offs_m, mask=inside, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    sums = tl.zeros([max(BUCKETS, 1)], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, length_k, shift, left, right, BN, HAS_LEFT, HAS_RIGHT)
    if (begin < end) & (end - begin <= BN):
        # With one key block, P can be normalised anew and rowsum(P * dP) is at hand. Where a row sees few keys they
        # cancel against dP to the last bit, which exp(score - LSE) and rowsum(dO * O), equal on paper, do not.
        kb, p, dp, t = p_and_dp(
            q_tile, do_tile, lse_rows, k, v, stride_kt, stride_vt, row, begin, length_k, shift, left, right, factor,
            scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION, False,
        )  # fmt: skip
        seen = tl.sum(p, 1)
        p = p / tl.where(seen == 0.0, 1.0, seen)[:, None]
        row_delta = tl.sum(p * dp, 1) - row_dlse
        ds = p * (dp - row_delta[:, None])
        if BUCKETS:
            sums = add_by_bucket(sums, ds, row, begin, shift, scores.lut, reach, BM, BN, BUCKETS)
        acc = tl.dot(through_softcap(ds, t, scores).to(kb.dtype), kb, acc, input_precision=PRECISION)
    else:
        o_tile = load_rows(out + (start * HEADS + h) * DV, row, HEADS * DV, length_q, offs_m, offs_dv, DV, BDV, True)
        row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1) - row_dlse
        if HAS_LEFT or HAS_RIGHT:
            acc, sums = _dq_keys(
                acc, sums, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, begin, full_begin, row,
                length_k, shift, left, right, factor, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT,
                PRECISION, BUCKETS,
            )  # fmt: skip
            acc, sums = _dq_keys(
                acc, sums, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, full_begin, full_end, row,
                length_k, shift, left, right, factor, scores, head, D, DV, BM, BN, BD, BDV, False, HAS_LEFT, HAS_RIGHT,
                PRECISION, BUCKETS,
            )  # fmt: skip
            begin = full_end
        # Without a window, all blocks: a mask costs less than filling the pipeline again for the last block.
        acc, sums = _dq_keys(
            acc, sums, q_tile, do_tile, lse_rows, row_delta, k, v, stride_kt, stride_vt, begin, end, row, length_k,
            shift, left, right, factor, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION,
            BUCKETS,
        )  # fmt: skip
    statistics = statistics_of(statistics, h, b, start, batch, total_q, TILE)
    store_statistics(statistics, row, lse_rows, row_delta, BM)
    store_rows(dq + (start * HEADS + h) * D, row, HEADS * D, length_q, offs_m, offs_d, acc * scale, D)
    if BUCKETS:
        tl.store(dtable + tl.cast(tl.program_id(0), tl.int64) * BUCKETS + tl.arange(0, BUCKETS), sums)


@triton.jit
def _dkv_queries(
    dk, dv, kb, vb, q, do, statistics, stride_q, stride_do, begin, end, key, length_q, length_k, shift, left, right,
    scale, factor, scores, head,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    if begin < end:  # see _fwd_keys
        for row in tl.range(begin, end, BM):
            qb = load_rows(q, row, stride_q, length_q, offs_m, offs_d, D, BD, MASKED)
            dob = load_rows(do, row, stride_do, length_q, offs_m, offs_dv, DV, BDV, MASKED)
            lse_rows, delta = load_statistics(statistics, row, BM, SPAN)
            if PRECISION == "tf32x3":
                qb = scaled(qb, scale)
                s = tl.trans(tl.dot(qb, tl.trans(kb), input_precision=PRECISION))  # summed as in the forward pass
            else:
                s = tl.dot(kb, tl.trans(qb), input_precision=PRECISION)
            dp = tl.dot(vb, tl.trans(dob), input_precision=PRECISION)
            rows, keys, t = (row + offs_m)[None, :], (key + offs_n)[:, None], s
            if scores.scale is not None:
                s, t = modify(s, rows, keys, shift, scores, head)
            p = probabilities(s, lse_rows[None, :], factor)
            if MASKED and (HAS_LEFT or HAS_RIGHT):  # keys beyond the sequence are rows that nobody stores
                p = tl.where(visible(rows, keys, length_k, shift, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
            dropped = p
            if scores.kept is not None:
                keep = tl.trans(keep_mask(row, key, head, BM, BN))
                dropped = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * scores.kept, 0.0)
            dv = tl.dot(dropped.to(dob.dtype), dob, dv, input_precision=PRECISION)
            ds = through_softcap(p * (dp - delta[None, :]), t, scores)
            dk = tl.dot(ds.to(qb.dtype), qb, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_bwd_dkv_kernel(
    q, k, v, do, statistics, dk, dv,  # dk (Tk, Hkv, D), dv (Tk, Hkv, DV)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, scale, factor, left, right, scores, bias_q, bias_k, reach, threshold,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b, h, key, start_k, length_k, start, length_q = owned_tile(
        cu_k, cu_q, tiles, batch, total_k, total_q, steps, HEADS, SELF, TILE, BN
    )
    if key >= length_k:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    start, start_k = tl.cast(start, tl.int64), tl.cast(start_k, tl.int64)
    offs_n, offs_d, offs_dv = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    kb = load_rows(k + start_k * stride_kt + h * stride_kh, key, stride_kt, length_k, offs_n, offs_d, D, BD, True)
    vb = load_rows(v + start_k * stride_vt + h * stride_vh, key, stride_vt, length_k, offs_n, offs_dv, DV, BDV, True)
    dk_acc = tl.zeros([BN, BD], tl.float32)
    dv_acc = tl.zeros([BN, BDV], tl.float32)
    # Key j is seen by the queries [j - shift - right, j - shift + left]: the same interval, turned round.
    begin, full_begin, full_end, end = tile_interval(key, BN, length_q, -shift, right, left, BM, HAS_RIGHT, HAS_LEFT)
    for g in range(GROUP):
        hq = h * GROUP + g
        q_head = q + start * stride_qt + hq * stride_qh
        do_head = do + start * stride_dot + hq * stride_doh
        mine = statistics_of(statistics, hq, b, start, batch, total_q, TILE)
        head = at_head(scores, b, hq, batch, length_q, bias_q, bias_k, reach, threshold, HEADS * GROUP)
        rest = begin
        if HAS_LEFT or HAS_RIGHT:
            dk_acc, dv_acc = _dkv_queries(
                dk_acc, dv_acc, kb, vb, q_head, do_head, mine, stride_qt, stride_dot, begin, full_begin, key, length_q,
                length_k, shift, left, right, scale, factor, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT,
                HAS_RIGHT, PRECISION, SPAN,
            )  # fmt: skip
            dk_acc, dv_acc = _dkv_queries(
                dk_acc, dv_acc, kb, vb, q_head, do_head, mine, stride_qt, stride_dot, full_begin, full_end, key,
                length_q, length_k, shift, left, right, scale, factor, scores, head, D, DV, BM, BN, BD, BDV, False,
                HAS_LEFT, HAS_RIGHT, PRECISION, SPAN,
            )  # fmt: skip
            rest = full_end
        # Without a window, all blocks: checked loads cost less than draining the pipeline before the last block.
        dk_acc, dv_acc = _dkv_queries(
            dk_acc, dv_acc, kb, vb, q_head, do_head, mine, stride_qt, stride_dot, rest, end, key, length_q, length_k,
            shift, left, right, scale, factor, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT,
            PRECISION, SPAN,
        )  # fmt: skip
    if PRECISION != "tf32x3":  # there the queries were scaled
        dk_acc *= scale
    if scores.kept is not None:
        dv_acc *= scores.kept
    hkv = start_k * HEADS + h
    store_rows(dk + hkv * D, key, HEADS * D, length_k, offs_n, offs_d, dk_acc, D)
    store_rows(dv + hkv * DV, key, HEADS * DV, length_k, offs_n, offs_dv, dv_acc, DV)


def statistics_span(config):
    """SPAN of load_statistics."""
    return 2 if 32 * config[2] == 4 * config[0] else 1


_dq = Launcher(varlen_attention_bwd_dq_kernel)
_dkv = Launcher(varlen_attention_bwd_dkv_kernel)


def varlen_attention_bwd(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, deterministic,
    softcap=0.0, slopes=None, bias=None, table=None, lut=None, dropout_p=0.0, rng=None, want_dbias=False,
):  # fmt: skip
    """Bitwise repeatable with or without `deterministic`: every element has one owner, and its sums one order."""
    (total_q, heads, _), (total_k, heads_kv, _), batch = q.shape, k.shape, cu_q.shape[0] - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # For whole tiles (statistics_of), and one more that load_statistics may read beyond the last.
    statistics = lse.new_empty((heads * slots(cu_q, None, total_q) + 1) * TILE * 2)
    if dlse is not None and dlse.stride(1) != 1:
        dlse = dlse.contiguous()
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    fixed, itself = constants(q, k, v, cu_q, cu_k, left, right, top_left)
    options = (softcap, slopes, bias, table, lut, dropout_p, rng)
    factors, (scores, score_values, score_key) = score_options(q, scale, options)
    width, modes = max(q.shape[2], v.shape[2]), (left >= 0 or right >= 0, score_key is not None)
    config = short_config(q.dtype, width, max(max_q, max_k), batch * heads_kv, q.device, *modes)
    if config is not None:
        arguments = (dout, dlse, q, k, v, out, lse, cu_q, cu_k, dq, dk, dv, scale, left, right, top_left, fixed[3])
        varlen_attention_bwd_short.backward(config, *arguments)
        return dq, dk, dv, lse.new_zeros(0), lse.new_zeros(0)
    if not want_dbias:
        bias = table = None
    dbias = dtable = None
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    sizes = (batch, total_q, total_k, (batch + 1).bit_length())
    values = (*factors, left, right, scores, *score_values)
    pointers = (q, k, v, dout, cu_q, cu_k, tiles)
    if dq.numel():
        config = dq_config(q.dtype, width, max_k, *modes)
        programs = slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads
        stride_dlse = dlse.stride(0) if dlse is not None else 0
        buckets = triton.next_power_of_2(table.shape[0]) if table is not None else 0
        parts = lse.new_zeros((programs, buckets)) if buckets else None
        _dq(
            programs,
            (q.dtype, strides, stride_dlse, alignments(*pointers, dlse), score_key),
            (
                q, k, v, out, dout, lse, dlse, statistics, dq, parts, cu_q, cu_k, tiles, *sizes, *strides, stride_dlse,
                *values,
            ),
            (heads, *fixed, buckets),
            config,
        )  # fmt: skip
        if buckets:
            dtable = parts.view(-1, heads, buckets).sum(0)[:, : table.shape[0]].t().contiguous()
        if bias is not None:
            dbias = dense_bias_gradient(
                bias.shape, (q, k, v, dout, statistics), (cu_q, cu_k), sizes, strides, values, score_key, fixed
            )  # fmt: skip
    if dk.numel() or dv.numel():
        tiles = tiles if itself else None  # the plan's tiles are those of the queries
        config = dkv_config(q.dtype, width, max_q, *modes)
        _dkv(
            slots(cu_k, tiles, total_k) * (TILE // config[1]) * heads_kv,
            (q.dtype, strides, alignments(*pointers), score_key),
            (q, k, v, dout, statistics, dk, dv, cu_q, cu_k, tiles, *sizes, *strides, *values),
            (heads_kv, *fixed, statistics_span(config)),
            config,
        )
    learned = ((dbias, bias), (dtable, table))
    return dq, dk, dv, *(lse.new_zeros(0 if x is None else x.shape) if dx is None else dx for dx, x in learned)
