"""Whole Flow-Attention backward: the four phases that flow_attention describes, over q and dy, k and v in turn."""

import torch
import triton
import triton.language as tl

from .flow_attention import UNSPECIALIZED, add_states, part, plan
from .flow_attention_configs import flow_config
from .flow_features import (
    clamped,
    dot_state,
    kept,
    launch_key,
    load_features,
    load_row,
    load_state,
    load_tile,
    mask_strides,
    narrow,
    precision,
    program_of,
    sequence,
    sigmoid,
    slope,
    store_state,
    store_tile,
    time_strides,
    total_of,
    widths,
)
from .launch import Launcher


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flow_attention_bwd_kernel(
    dy, q, k, v, dq, dk, dv, flows_q, flows_k, sums, lse, kv, r_q, t_k, dout_k, counts, firsts, seconds, thirds, states,
    dkv_of, key_mask, query_mask, cu, sinks, sources, batch, splits, clamp, eps, stride_yb, stride_yt, stride_yh,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_kmb,
    stride_kmt, stride_qmb, stride_qmt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, STAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial sums by phase: (firsts (1), states), seconds (4 rows and a scalar), thirds (1). r, t, dO by token."""
    s, split, h = program_of(splits, STAGE % 2 == 0, HEADS)
    index = tl.cast(s * HEADS + h, tl.int64)
    row, start, length_q = sequence(s, cu, sinks, sinks)
    length_k = sources if cu is None else length_q
    row, start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
    dy += row * stride_yb + start * stride_yt + h * stride_yh
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    offset_q, offset_k = (row * sinks + start) * HEADS + h, (row * sources + start) * HEADS + h
    dq, dk, dv = dq + offset_q * D, dk + offset_k * D, dv + offset_k * M
    plane_q, plane_k = batch * HEADS * tl.cast(sinks, tl.int64), batch * HEADS * tl.cast(sources, tl.int64)
    scalars_q, scalars_k = (row * HEADS + h) * sinks + start, (row * HEADS + h) * sources + start
    flows_q, r_q = flows_q + scalars_q, r_q + scalars_q
    flows_k, t_k, dout_k = flows_k + scalars_k, t_k + scalars_k, dout_k + scalars_k
    if key_mask is not None:
        key_mask += row * stride_kmb + start * stride_kmt
    if query_mask is not None:
        query_mask += row * stride_qmb + start * stride_qmt
    own = index * splits + split
    SECOND: tl.constexpr = 3 * D + 1
    firsts_own, firsts = firsts + own * D, firsts + index * splits * D
    seconds_own, seconds = seconds + own * SECOND, seconds + index * splits * SECOND
    thirds_own, thirds = thirds + own * D, thirds + index * splits * D
    states += own * D * M
    begin_q, end_q = part(split, splits, length_q, TILE)
    begin_k, end_k = part(split, splits, length_k, TILE)
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    eps_row = tl.where(cols < D, eps, 0.0)
    sums += index * 4 * D
    count_q, count_k = length_q, length_k
    if counts is not None:
        count_q, count_k = tl.load(counts + 2 * s), tl.load(counts + 2 * s + 1)
    alone = (count_q == 0) | (count_k == 0)
    ratio = count_q / tl.maximum(count_k, 1).to(tl.float32)

    if STAGE == 0 or STAGE == 1:
        kv_tile = load_state(kv + index * D * M, cols, cols_v, D, M)
        dk2, dkv = tl.zeros([TILE, BD], tl.float32), tl.zeros([BD, BM], tl.float32)
        for first in range(begin_q, end_q, TILE):
            rows = first + offs
            inside = rows < end_q
            keep = kept(query_mask, stride_qmt, rows, inside) & (alone == 0)
            f = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            conserved = tl.load(flows_q + plane_q + rows, mask=keep, other=0.0) * ratio
            factor = sigmoid(conserved) / tl.load(flows_q + rows, mask=keep, other=1.0)
            grads = load_tile(dy, stride_yt, rows, cols_v, keep, M)
            r = tl.sum(f * dot_state(narrow(grads, dy), tl.trans(kv_tile), dy, PRECISION), 1) * factor
            tl.store(r_q + rows, r, mask=inside)
            d_conserved = tl.where(keep, ratio * sigmoid(-conserved) * r, 0.0)
            dk2 += d_conserved[:, None] * (f + eps_row[None, :])
            grads = narrow(grads * factor[:, None], dy)
            dkv = tl.dot(tl.trans(narrow(f, q)), grads, dkv, input_precision=PRECISION)
        tl.store(firsts_own + cols, tl.sum(dk2, 0), mask=cols < D)
        store_state(states, cols, cols_v, dkv, D, M)
        tl.debug_barrier()
    if STAGE != 1 and STAGE != 3:
        dkv = load_state(dkv_of + index * D * M, cols, cols_v, D, M)
    if STAGE != 1:
        dk2 = total_of(firsts, splits, D, cols, D)
        log_total = tl.load(lse + index)
    if STAGE == 0 or STAGE == 2:
        g1 = tl.zeros([TILE, BD], tl.float32)
        g2, dq1, total_t = g1, g1, tl.zeros([TILE], tl.float32)
        for first in range(begin_k, end_k, TILE):
            rows = first + offs
            inside = rows < end_k
            keep = kept(key_mask, stride_kmt, rows, inside) & (alone == 0)
            f = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            flow = tl.load(flows_k + rows, mask=keep, other=1.0)
            conserved = tl.load(flows_k + plane_k + rows, mask=keep, other=0.0)
            w = tl.where(keep, count_k * tl.exp(clamped(conserved, clamp) - log_total), 0.0)
            d_values = tl.dot(narrow(f, k), narrow(dkv, k), input_precision=PRECISION) * w[:, None]
            store_tile(dv, HEADS * M, rows, cols_v, inside, d_values, M)
            t = tl.sum(d_values * load_tile(v, stride_vt, rows, cols_v, keep, M), 1)
            d_out = tl.where(keep, -tl.sum(f * dk2[None, :], 1) / (flow * flow), 0.0)
            tl.store(t_k + rows, t, mask=inside)
            tl.store(dout_k + rows, d_out, mask=inside)
            inner = keep & (conserved <= clamp) & (conserved >= -clamp)
            f += eps_row[None, :]
            g1 += tl.where(inner, t, 0.0)[:, None] * f
            g2 += tl.where(inner, w, 0.0)[:, None] * f
            dq1 += d_out[:, None] * f
            total_t += t
        tl.store(seconds_own + cols, tl.sum(g1, 0), mask=cols < D)
        tl.store(seconds_own + D + cols, tl.sum(g2, 0), mask=cols < D)
        tl.store(seconds_own + 2 * D + cols, tl.sum(dq1, 0), mask=cols < D)
        tl.store(seconds_own + 3 * D, tl.sum(total_t, 0))
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 3 or STAGE == 4:
        mean_t = tl.sum(total_of(seconds + 3 * D, splits, SECOND, cols, 1), 0)
        mean_t /= tl.maximum(count_k, 1).to(tl.float32)
    if STAGE == 0 or STAGE == 3:
        dq2 = total_of(seconds, splits, SECOND, cols, D) - mean_t * total_of(seconds + D, splits, SECOND, cols, D)
        dq1 = total_of(seconds + 2 * D, splits, SECOND, cols, D)
        k1, k2 = load_row(sums, cols, D) + eps_row, load_row(sums + 2 * D, cols, D) + eps_row
        kv_tile = load_state(kv + index * D * M, cols, cols_v, D, M)
        dk1 = tl.zeros([TILE, BD], tl.float32)
        for first in range(begin_q, end_q, TILE):
            rows = first + offs
            inside = rows < end_q
            keep = kept(query_mask, stride_qmt, rows, inside) & (alone == 0)
            f = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            conserved = tl.load(flows_q + plane_q + rows, mask=keep, other=0.0) * ratio
            a = 1.0 / tl.load(flows_q + rows, mask=keep, other=1.0)
            grads = narrow(load_tile(dy, stride_yt, rows, cols_v, keep, M), dy)
            r = tl.load(r_q + rows, mask=keep, other=0.0)
            d_conserved = ratio * sigmoid(-conserved) * r
            d_in = tl.where(keep, -a * r - a * a * tl.sum(f * dq2[None, :], 1), 0.0)
            d = dot_state(grads, tl.trans(kv_tile), dy, PRECISION) * (sigmoid(conserved) * a)[:, None]
            d += d_conserved[:, None] * k2[None, :] + a[:, None] * dq2[None, :]
            d += d_in[:, None] * k1[None, :] + dq1[None, :]
            d = tl.where(keep[:, None], d * slope(f, RELU), 0.0)
            store_tile(dq, HEADS * D, rows, cols, inside, d, D)
            dk1 += d_in[:, None] * (f + eps_row[None, :])
        tl.store(thirds_own + cols, tl.sum(dk1, 0), mask=cols < D)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 4:
        dk1 = total_of(thirds, splits, D, cols, D)
        q1, q2 = load_row(sums + D, cols, D) + eps_row, load_row(sums + 3 * D, cols, D) + eps_row
        for first in range(begin_k, end_k, TILE):
            rows = first + offs
            inside = rows < end_k
            keep = kept(key_mask, stride_kmt, rows, inside) & (alone == 0)
            f = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            conserved = tl.load(flows_k + plane_k + rows, mask=keep, other=0.0)
            w = tl.where(keep, count_k * tl.exp(clamped(conserved, clamp) - log_total), 0.0)
            values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M), v)
            inner = keep & (conserved <= clamp) & (conserved >= -clamp)
            d_conserved = tl.where(inner, tl.load(t_k + rows, mask=keep, other=0.0) - w * mean_t, 0.0)
            b = 1.0 / tl.load(flows_k + rows, mask=keep, other=1.0)
            d_out = tl.load(dout_k + rows, mask=keep, other=0.0)
            d = tl.dot(values, tl.trans(narrow(dkv, v)), input_precision=PRECISION) * w[:, None]
            d += d_conserved[:, None] * q2[None, :] + b[:, None] * dk2[None, :]
            d += d_out[:, None] * q1[None, :] + dk1[None, :]
            d = tl.where(keep[:, None], d * slope(f, RELU), 0.0)
            store_tile(dk, HEADS * D, rows, cols, inside, d, D)


@triton.jit(do_not_specialize=("sinks", "sources"))
def flow_attention_count_kernel(
    counts, key_mask, query_mask, cu, sinks, sources, stride_kmb, stride_kmt, stride_qmb, stride_qmt, TILE: tl.constexpr
):
    """(sinks, sources) of every sequence that take part, under a mask."""
    s = tl.program_id(0)
    row, start, length_q = sequence(s, cu, sinks, sinks)
    length_k = sources if cu is None else length_q
    row, start, offs = tl.cast(row, tl.int64), tl.cast(start, tl.int64), tl.arange(0, TILE)
    count_q, count_k = length_q, length_k
    if query_mask is not None:
        count_q = length_q * 0
        for first in range(0, length_q, TILE):
            rows = first + offs
            at = query_mask + row * stride_qmb + start * stride_qmt
            count_q += tl.sum(kept(at, stride_qmt, rows, rows < length_q).to(tl.int32), 0)
    if key_mask is not None:
        count_k = length_k * 0
        for first in range(0, length_k, TILE):
            rows = first + offs
            at = key_mask + row * stride_kmb + start * stride_kmt
            count_k += tl.sum(kept(at, stride_kmt, rows, rows < length_k).to(tl.int32), 0)
    tl.store(counts + s * 2, count_q)
    tl.store(counts + s * 2 + 1, count_k)


_bwd = Launcher(flow_attention_bwd_kernel)
_counts = Launcher(flow_attention_count_kernel)


def flow_attention_bwd(dy, q, k, v, key_mask, query_mask, cu, flows_q, flows_k, sums, lse, kv, relu, clamp, eps, extra):
    (batch, sinks, heads, width), sources, width_v = q.shape, k.shape[1], v.shape[3]
    states, _, splits, new = plan(q, k, v, cu)
    dq, dk = new(q.shape), new((batch, sources, heads, width))
    dv = new((batch, sources, heads, width_v))
    programs = states * heads
    if programs == 0:
        return dq, dk, dv
    masks = (*mask_strides(key_mask), *mask_strides(query_mask))
    counts = None
    if key_mask is not None or query_mask is not None:
        counts = q.new_empty((states, 2), dtype=torch.int32)
        _counts(
            states, launch_key(masks, key_mask, query_mask, cu),
            (counts, key_mask, query_mask, cu, sinks, sources, *masks), (), (1024, 4, 1),
        )  # fmt: skip
    r, t, d_out = (flows_q.new_empty((batch, heads, n)) for n in (sinks, sources, sources))
    firsts, seconds, thirds = (flows_q.new_empty((programs, splits, n)) for n in (width, 3 * width + 1, width))
    partial = flows_q.new_empty((programs, splits, width, width_v))
    dkv = partial if splits == 1 else torch.empty_like(kv)
    strides = (*time_strides(dy, q, k, v), *masks)
    key = launch_key(strides, dy, q, k, v, key_mask, query_mask, cu, counts)
    arguments = (
        dy, q, k, v, dq, dk, dv, flows_q, flows_k, sums, lse, kv, r, t, d_out, counts, firsts, seconds, thirds,
        partial, dkv, key_mask, query_mask, cu, sinks, sources, batch, splits, clamp, eps, *strides,
    )  # fmt: skip
    constants = (heads, heads // k.shape[2], *widths(q, v), relu, precision(q.dtype))
    for stage in (0,) if splits == 1 else (1, 2, 3, 4):
        if stage == 2:
            add_states(partial, None, None, dkv, None, splits)
        config, registers = flow_config(q.dtype, constants[4:6], "bwd", stage)
        _bwd(programs * splits, key, arguments, (*constants, stage), config, maxnreg=registers)
    return dq, dk, dv
