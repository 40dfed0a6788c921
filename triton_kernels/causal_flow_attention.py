"""Causal Flow-Attention: one program walks one head of one sequence in tiles.

Forward, left to right: one product P = Q K^T a tile serves the four running sums and the output. Backward, left to
right for what reaches q through y, then right to left for the rest; there one matrix W holds the coefficients of k in
dq, and its transpose those of q in dk. Sums over the tiles are compensated.
"""

import torch
import triton
import triton.language as tl

from .flow_attention_configs import causal_config
from .flow_features import (
    add,
    clamped,
    features,
    kept,
    launch_key,
    load_row,
    load_state,
    load_tile,
    mask_strides,
    precision,
    sequence,
    sigmoid,
    slope,
    store_state,
    store_tile,
    time_strides,
    widths,
)
from .launch import Launcher

UNSPECIALIZED = ("length", "total_rows", "batch", "tiles", "clamp", "eps", "extra")
CAUSAL_LIMIT = 60.0  # of the exponent where it is not clamped, as in the reference


@triton.jit
def _flows(
    q, k, p, keep, lower, k1, q1, k2, q2, n, extra, eps_row, eps,
):  # fmt: skip
    """(I, O, J, P) of a tile's tokens from the sums before it; p = q k^T, lower = column <= row.

    I and O are 1 where a token takes no part, so that nothing divides by 0.
    """
    q_sum, k_sum = tl.sum(q, 1), tl.sum(k, 1)
    q_eps, k_eps = q + eps_row[None, :], k + eps_row[None, :]
    below = tl.where(lower, p + eps * k_sum[None, :], 0.0)  # row i: what k_j, j <= i, adds
    above = tl.where(tl.trans(lower), p + eps * q_sum[:, None], 0.0)  # column i: what q_j, j <= i, adds
    incoming = tl.sum(q_eps * (k1 + eps_row)[None, :], 1) + tl.sum(below, 1) + extra
    outgoing = tl.sum(k_eps * (q1 + eps_row)[None, :], 1) + tl.sum(above, 0) + extra
    incoming, outgoing = tl.where(keep, incoming, 1.0), tl.where(keep, outgoing, 1.0)
    a, b = n / incoming, n / outgoing
    conserved_q = tl.sum(q_eps * (k2 + eps_row)[None, :], 1) + tl.sum(below * b[None, :], 1) + extra
    conserved_k = tl.sum(k_eps * (q2 + eps_row)[None, :], 1) + tl.sum(above * a[:, None], 0) + extra
    return incoming, outgoing, conserved_q / n, conserved_k / n


@triton.jit(do_not_specialize=UNSPECIALIZED)
def causal_flow_attention_fwd_kernel(
    q, k, v, y, flows, mask, cu, sums, total, count, state, sums_final, total_final, state_final,
    length, total_rows, batch, clamp, eps, extra, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_mb, stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    s, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, start, tokens = sequence(s, cu, length, total_rows)
    row, start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    y += ((row * total_rows + start) * HEADS + h) * M
    plane = batch * HEADS * tl.cast(total_rows, tl.int64)
    flows += (row * HEADS + h) * total_rows + start
    if mask is not None:
        mask += row * stride_mb + start * stride_mt
    index = tl.cast(s, tl.int64) * HEADS + h
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, C)
    eps_row = tl.where(cols < D, eps, 0.0)
    lower = offs[:, None] >= offs[None, :]
    k1 = tl.zeros([BD], tl.float32)
    q1, k2, q2, k1_lost, q1_lost, k2_lost, q2_lost = k1, k1, k1, k1, k1, k1, k1
    kv = tl.zeros([BD, BM], tl.float32)
    summed, summed_lost, seen = 0.0, 0.0, tl.cast(0, tl.int64)
    if sums is not None:
        k1, q1 = load_row(sums + index * 4 * D, cols, D), load_row(sums + (index * 4 + 1) * D, cols, D)
        k2, q2 = load_row(sums + (index * 4 + 2) * D, cols, D), load_row(sums + (index * 4 + 3) * D, cols, D)
        summed, seen = tl.load(total + index), tl.load(count + s)
        kv = load_state(state + index * D * M, cols, cols_v, D, M)
    for first in range(0, tokens, C):
        rows = first + offs
        inside = rows < tokens
        keep = kept(mask, stride_mt, rows, inside)
        fq = features(load_tile(q, stride_qt, rows, cols, keep, D), keep, cols, D, RELU)
        fk = features(load_tile(k, stride_kt, rows, cols, keep, D), keep, cols, D, RELU)
        values = load_tile(v, stride_vt, rows, cols_v, keep, M)
        n = tl.maximum(seen + tl.cumsum(keep.to(tl.int64), 0), 1).to(tl.float32)
        p = tl.dot(fq, tl.trans(fk), input_precision=PRECISION)
        incoming, outgoing, conserved_q, conserved_k = _flows(
            fq, fk, p, keep, lower, k1, q1, k2, q2, n, extra, eps_row, eps,
        )  # fmt: skip
        x = tl.where(keep, tl.exp(clamped(conserved_k, clamp)), 0.0)
        running = summed + tl.cumsum(x, 0)
        w = n * x / tl.where(keep, running, 1.0)
        values *= w[:, None]
        out = tl.dot(fq, kv, input_precision=PRECISION)
        out = tl.dot(tl.where(lower, p, 0.0), values, out, input_precision=PRECISION)
        out *= (tl.where(keep, sigmoid(conserved_q) / incoming, 0.0))[:, None]
        store_tile(y, HEADS * M, rows, cols_v, inside, out, M)
        tl.store(flows + rows, incoming, mask=inside)
        tl.store(flows + plane + rows, outgoing, mask=inside)
        tl.store(flows + 2 * plane + rows, conserved_q, mask=inside)
        tl.store(flows + 3 * plane + rows, conserved_k, mask=inside)
        tl.store(flows + 4 * plane + rows, running, mask=inside)
        kv = tl.dot(tl.trans(fk), values, kv, input_precision=PRECISION)
        k1, k1_lost = add(k1, k1_lost, tl.sum(fk, 0))
        q1, q1_lost = add(q1, q1_lost, tl.sum(fq, 0))
        k2, k2_lost = add(k2, k2_lost, tl.sum(fk * (n / outgoing)[:, None], 0))
        q2, q2_lost = add(q2, q2_lost, tl.sum(fq * (n / incoming)[:, None], 0))
        summed, summed_lost = add(summed, summed_lost, tl.sum(x, 0))
        seen += tl.sum(keep.to(tl.int64), 0)
    sums_final += index * 4 * D
    tl.store(sums_final + cols, k1, mask=cols < D)
    tl.store(sums_final + D + cols, q1, mask=cols < D)
    tl.store(sums_final + 2 * D + cols, k2, mask=cols < D)
    tl.store(sums_final + 3 * D + cols, q2, mask=cols < D)
    tl.store(total_final + index, summed)
    store_state(state_final + index * D * M, cols, cols_v, kv, D, M)


@triton.jit
def _recall(flows, plane, rows, keep, seen, clamp):
    """(n, I, O, J, P, running sum, w, z, x) of a tile from the saved flows; w, z, x 0 where a token takes no part."""
    incoming = tl.load(flows + rows, mask=keep, other=1.0)
    outgoing = tl.load(flows + plane + rows, mask=keep, other=1.0)
    conserved_q = tl.load(flows + 2 * plane + rows, mask=keep, other=0.0)
    conserved_k = tl.load(flows + 3 * plane + rows, mask=keep, other=0.0)
    running = tl.load(flows + 4 * plane + rows, mask=keep, other=1.0)
    n = tl.maximum(seen + tl.cumsum(keep.to(tl.int64), 0), 1).to(tl.float32)
    x = tl.where(keep, tl.exp(clamped(conserved_k, clamp)), 0.0)
    w, z = n * x / running, tl.where(keep, sigmoid(conserved_q) / incoming, 0.0)
    return n, incoming, outgoing, conserved_q, conserved_k, running, w, z, x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def causal_flow_attention_bwd_query_kernel(
    q, k, v, dy, dq, flows, through, before, seen_at, mask, cu, sums, count, state,
    length, total_rows, batch, tiles, clamp, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, stride_yh, stride_mb, stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Left to right: dq as far as y carries it (the rest is added later), q . dq, and the sums before each tile."""
    s, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, start, tokens = sequence(s, cu, length, total_rows)
    row, start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    dy += row * stride_yb + start * stride_yt + h * stride_yh
    dq += ((row * total_rows + start) * HEADS + h) * D
    plane = batch * HEADS * tl.cast(total_rows, tl.int64)
    flows += (row * HEADS + h) * total_rows + start
    through += (row * HEADS + h) * total_rows + start
    if mask is not None:
        mask += row * stride_mb + start * stride_mt
    index = tl.cast(s, tl.int64) * HEADS + h
    before += index * tiles * 4 * D
    seen_at += index * tiles
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, C)
    lower = offs[:, None] >= offs[None, :]
    k1 = tl.zeros([BD], tl.float32)
    q1, k2, q2, k1_lost, q1_lost, k2_lost, q2_lost = k1, k1, k1, k1, k1, k1, k1
    kv, seen = tl.zeros([BD, BM], tl.float32), tl.cast(0, tl.int64)
    if sums is not None:
        k1, q1 = load_row(sums + index * 4 * D, cols, D), load_row(sums + (index * 4 + 1) * D, cols, D)
        k2, q2 = load_row(sums + (index * 4 + 2) * D, cols, D), load_row(sums + (index * 4 + 3) * D, cols, D)
        seen = tl.load(count + s)
        kv = load_state(state + index * D * M, cols, cols_v, D, M)
    for first in range(0, tokens, C):
        rows = first + offs
        inside = rows < tokens
        keep = kept(mask, stride_mt, rows, inside)
        fq = features(load_tile(q, stride_qt, rows, cols, keep, D), keep, cols, D, RELU)
        fk = features(load_tile(k, stride_kt, rows, cols, keep, D), keep, cols, D, RELU)
        n, incoming, outgoing, conserved_q, conserved_k, running, w, z, x = _recall(
            flows, plane, rows, keep, seen, clamp
        )
        at = before + first // C * 4 * D + cols
        tl.store(at, k1, mask=cols < D)
        tl.store(at + D, q1, mask=cols < D)
        tl.store(at + 2 * D, k2, mask=cols < D)
        tl.store(at + 3 * D, q2, mask=cols < D)
        tl.store(seen_at + first // C, seen)
        values = load_tile(v, stride_vt, rows, cols_v, keep, M) * w[:, None]
        grads = load_tile(dy, stride_yt, rows, cols_v, keep, M) * z[:, None]
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        direct = tl.dot(grads, tl.trans(kv), input_precision=PRECISION)
        direct = tl.dot(tl.where(lower, dp, 0.0), fk, direct, input_precision=PRECISION)
        store_tile(dq, HEADS * D, rows, cols, inside, direct, D)
        tl.store(through + rows, tl.sum(fq * direct, 1), mask=inside)
        kv = tl.dot(tl.trans(fk), values, kv, input_precision=PRECISION)
        k1, k1_lost = add(k1, k1_lost, tl.sum(fk, 0))
        q1, q1_lost = add(q1, q1_lost, tl.sum(fq, 0))
        k2, k2_lost = add(k2, k2_lost, tl.sum(fk * (n / outgoing)[:, None], 0))
        q2, q2_lost = add(q2, q2_lost, tl.sum(fq * (n / incoming)[:, None], 0))
        seen += tl.sum(keep.to(tl.int64), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def causal_flow_attention_bwd_kernel(
    q, k, v, dy, dq, dk, dv, flows, through, before, seen_at, mask, cu, dsums, dtotal, dstate, dsums0, dtotal0, dstate0,
    length, total_rows, batch, tiles, clamp, eps, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, stride_yh, stride_mb, stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Right to left. gk1 is the sum of dI (q + eps) over what comes after, gq1 of dO (k + eps), gk2 and gq2 alike."""
    s, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, start, tokens = sequence(s, cu, length, total_rows)
    row, start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    dy += row * stride_yb + start * stride_yt + h * stride_yh
    offset = (row * total_rows + start) * HEADS + h
    dq, dk, dv = dq + offset * D, dk + offset * D, dv + offset * M
    plane = batch * HEADS * tl.cast(total_rows, tl.int64)
    flows += (row * HEADS + h) * total_rows + start
    through += (row * HEADS + h) * total_rows + start
    if mask is not None:
        mask += row * stride_mb + start * stride_mt
    index = tl.cast(s, tl.int64) * HEADS + h
    before += index * tiles * 4 * D
    seen_at += index * tiles
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, C)
    eps_row = tl.where(cols < D, eps, 0.0)
    lower = offs[:, None] >= offs[None, :]
    upper = offs[:, None] <= offs[None, :]
    gk1 = tl.zeros([BD], tl.float32)
    gq1, gk2, gq2, gk1_lost, gq1_lost, gk2_lost, gq2_lost = gk1, gk1, gk1, gk1, gk1, gk1, gk1
    after, after_lost, r_state = 0.0, 0.0, tl.zeros([BD, BM], tl.float32)
    if dsums is not None:
        gk1, gq1 = load_row(dsums + index * 4 * D, cols, D), load_row(dsums + (index * 4 + 1) * D, cols, D)
        gk2, gq2 = load_row(dsums + (index * 4 + 2) * D, cols, D), load_row(dsums + (index * 4 + 3) * D, cols, D)
    if dtotal is not None:
        after = -tl.load(dtotal + index)
    if dstate is not None:
        r_state = load_state(dstate + index * D * M, cols, cols_v, D, M)
    for step in range(0, tl.cdiv(tokens, C)):
        tile = tl.cdiv(tokens, C) - 1 - step
        rows = tile * C + offs
        inside = rows < tokens
        keep = kept(mask, stride_mt, rows, inside)
        raw_q, raw_k = load_tile(q, stride_qt, rows, cols, keep, D), load_tile(k, stride_kt, rows, cols, keep, D)
        fq, fk = features(raw_q, keep, cols, D, RELU), features(raw_k, keep, cols, D, RELU)
        n, incoming, outgoing, conserved_q, conserved_k, running, w, z, x = _recall(
            flows, plane, rows, keep, tl.load(seen_at + tile), clamp
        )
        values = load_tile(v, stride_vt, rows, cols_v, keep, M)
        grads = load_tile(dy, stride_yt, rows, cols_v, keep, M) * z[:, None]
        pt = tl.dot(fk, tl.trans(fq), input_precision=PRECISION)  # k_j . q_i
        dpt = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        d_values = tl.dot(fk, r_state, input_precision=PRECISION)
        d_values = tl.dot(tl.where(upper, pt, 0.0), grads, d_values, input_precision=PRECISION) * w[:, None]
        store_tile(dv, HEADS * M, rows, cols_v, inside, d_values, M)
        d_k = tl.dot(values, tl.trans(r_state), input_precision=PRECISION)
        d_k = tl.dot(tl.where(upper, dpt, 0.0), fq, d_k, input_precision=PRECISION) * w[:, None]
        r_state = tl.dot(tl.trans(fq), grads, r_state, input_precision=PRECISION)

        t = tl.sum(fk * d_k, 1)
        share = t / running
        behind = after + tl.cumsum(share, 0, reverse=True)
        in_bounds = keep & (conserved_k <= clamp) & (conserved_k >= -clamp)
        u = tl.where(in_bounds, (t - x * behind) / n, 0.0)  # d P / n
        r = tl.load(through + rows, mask=keep, other=0.0)
        c = tl.where(keep, sigmoid(-conserved_q) * r / n, 0.0)  # d J / n
        a, b = n / incoming, n / outgoing
        u_after, c_after = tl.cumsum(u, 0, reverse=True), tl.cumsum(c, 0, reverse=True)
        q_gq2 = tl.sum(fq * gq2[None, :], 1) + tl.sum(tl.where(lower, pt * u[:, None], 0.0), 0)
        k_gk2 = tl.sum(fk * gk2[None, :], 1) + tl.sum(tl.where(upper, pt * c[None, :], 0.0), 1)
        q_gq2 += eps * tl.sum(fq, 1) * u_after
        k_gk2 += eps * tl.sum(fk, 1) * c_after
        d_in = tl.where(keep, -(r + a * q_gq2) / incoming, 0.0)
        d_out = tl.where(keep, -b * k_gk2 / outgoing, 0.0)
        in_after, out_after = tl.cumsum(d_in, 0, reverse=True), tl.cumsum(d_out, 0, reverse=True)

        at = before + tile * 4 * D
        k1, q1 = load_row(at, cols, D) + eps_row, load_row(at + D, cols, D) + eps_row
        k2, q2 = load_row(at + 2 * D, cols, D) + eps_row, load_row(at + 3 * D, cols, D) + eps_row
        # Coefficients of k_i in dq_j; below of q_i in dk_j.
        coef = tl.where(lower, c[:, None] * b[None, :] + d_in[:, None], 0.0)
        coef += tl.where(upper, a[:, None] * u[None, :] + d_out[None, :], 0.0)
        d_q = load_tile(dq, HEADS * D, rows, cols, inside, D)
        d_q = tl.dot(coef, fk, d_q, input_precision=PRECISION)
        d_q += c[:, None] * k2[None, :] + d_in[:, None] * k1[None, :] + a[:, None] * gq2[None, :] + gq1[None, :]
        d_q += (a * u_after + out_after)[:, None] * eps_row[None, :]
        store_tile(dq, HEADS * D, rows, cols, inside, tl.where(keep[:, None], d_q * slope(raw_q, fq, RELU), 0.0), D)
        coef = tl.where(lower, u[:, None] * a[None, :] + d_out[:, None], 0.0)
        coef += tl.where(upper, b[:, None] * c[None, :] + d_in[None, :], 0.0)
        d_k = tl.dot(coef, fq, d_k, input_precision=PRECISION)
        d_k += u[:, None] * q2[None, :] + d_out[:, None] * q1[None, :] + b[:, None] * gk2[None, :] + gk1[None, :]
        d_k += (b * c_after + in_after)[:, None] * eps_row[None, :]
        store_tile(dk, HEADS * D, rows, cols, inside, tl.where(keep[:, None], d_k * slope(raw_k, fk, RELU), 0.0), D)

        q_eps, k_eps = fq + eps_row[None, :], fk + eps_row[None, :]
        gq2, gq2_lost = add(gq2, gq2_lost, tl.sum(u[:, None] * k_eps, 0))
        gk2, gk2_lost = add(gk2, gk2_lost, tl.sum(c[:, None] * q_eps, 0))
        gk1, gk1_lost = add(gk1, gk1_lost, tl.sum(d_in[:, None] * q_eps, 0))
        gq1, gq1_lost = add(gq1, gq1_lost, tl.sum(d_out[:, None] * k_eps, 0))
        after, after_lost = add(after, after_lost, tl.sum(share, 0))
    if dsums0 is not None:
        dsums0 += index * 4 * D
        tl.store(dsums0 + cols, gk1, mask=cols < D)
        tl.store(dsums0 + D + cols, gq1, mask=cols < D)
        tl.store(dsums0 + 2 * D + cols, gk2, mask=cols < D)
        tl.store(dsums0 + 3 * D + cols, gq2, mask=cols < D)
        tl.store(dtotal0 + index, -after)
        store_state(dstate0 + index * D * M, cols, cols_v, r_state, D, M)


_fwd = Launcher(causal_flow_attention_fwd_kernel)
_bwd_query = Launcher(causal_flow_attention_bwd_query_kernel)
_bwd = Launcher(causal_flow_attention_bwd_kernel)


def _constants(q, k, v, relu):
    return (q.shape[2], q.shape[2] // k.shape[2], *widths(q, v), relu, precision(q.dtype))


def causal_flow_attention_fwd(q, k, v, mask, cu, sums, total, count, state, relu, clamp, eps, extra):
    (batch, length, heads, width), width_v = q.shape, v.shape[3]
    states = batch if cu is None else cu.shape[0] - 1
    # Rows behind the last sequence belong to no program.
    new = q.new_empty if cu is None else q.new_zeros
    y = new((batch, length, heads, width_v))
    flows = new((5, batch, heads, length), dtype=torch.float32)
    sums_final = flows.new_empty((states, heads, 4, width))
    total_final, state_final = flows.new_empty((states, heads)), flows.new_empty((states, heads, width, width_v))
    strides = (*time_strides(q, k, v), *mask_strides(mask))
    config = causal_config(q.dtype, widths(q, v)[2:])
    if states * heads:
        _fwd(
            states * heads,
            launch_key(strides, q, k, v, mask, cu, sums, total, count, state),
            (
                q, k, v, y, flows, mask, cu, sums, total, count, state, sums_final, total_final, state_final,
                length, length, batch, min(clamp, CAUSAL_LIMIT), eps, extra, *strides,
            ),
            _constants(q, k, v, relu),
            config,
        )  # fmt: skip
    return y, flows, sums_final, total_final, state_final


def causal_flow_attention_bwd(
    dy, dsums, dtotal, dstate, q, k, v, mask, cu, sums, total, count, state, flows, relu, clamp, eps, extra
):
    (batch, length, heads, width), width_v = q.shape, v.shape[3]
    states = batch if cu is None else cu.shape[0] - 1
    new = q.new_empty if cu is None else q.new_zeros
    dq, dk = new(q.shape), new(q.shape)
    dv = new((batch, length, heads, width_v))
    kept_states = 0 if sums is None else states
    dsums0, dtotal0 = flows.new_empty((kept_states, heads, 4, width)), flows.new_empty((kept_states, heads))
    dstate0 = flows.new_empty((kept_states, heads, width, width_v))
    if states * heads == 0:
        return dq, dk, dv, dsums0, dtotal0, dstate0
    config = causal_config(q.dtype, widths(q, v)[2:])
    tiles = max(1, triton.cdiv(length, config[0]))  # of the longest sequence possible
    through = flows.new_empty((batch, heads, length))
    before = flows.new_empty((states, heads, tiles, 4, width))
    seen_at = q.new_empty((states, heads, tiles), dtype=torch.int64)
    strides = (*time_strides(q, k, v, dy), *mask_strides(mask))
    clamp = min(clamp, CAUSAL_LIMIT)
    constants = _constants(q, k, v, relu)
    _bwd_query(
        states * heads,
        launch_key(strides, q, k, v, dy, mask, cu, sums, count, state),
        (
            q, k, v, dy, dq, flows, through, before, seen_at, mask, cu, sums, count, state,
            length, length, batch, tiles, clamp, *strides,
        ),
        constants,
        config,
    )  # fmt: skip
    initial = (None,) * 3 if sums is None else (dsums0, dtotal0, dstate0)
    _bwd(
        states * heads,
        launch_key(strides, q, k, v, dy, mask, cu, dsums, dtotal, dstate, *initial),
        (
            q, k, v, dy, dq, dk, dv, flows, through, before, seen_at, mask, cu, dsums, dtotal, dstate, *initial,
            length, length, batch, tiles, clamp, eps, *strides,
        ),
        constants,
        config,
    )  # fmt: skip
    return dq, dk, dv, dsums0, dtotal0, dstate0
