"""Causal Flow-Attention backward, the tokens of a head cut into segments as in the forward.

What reaches a token comes from all later ones: the gradient of the states R, then that of the running sum of x, then
those of b k and a q, then those of k and q. So there are five passes: the running sums of the forward and the states S,
R of segments; r = q . dq through y alone, dv, and t = v . dv; the gradients of P and J; those of I and O; dq and dk.
Sums of segments meet as in the forward. Bytes, in tensors of q's size: 4 (q, k, v, dy), 9 (two walks, dv), 2 (q, k),
2 (q, k), 10 (two walks, dq, dk), together 27 where 7 must move.

In dq (and dk) what comes through y and what comes through the flows cancel to a small part of either for the first
tokens. Nothing of them is rounded before they meet: inside a tile one matrix holds all coefficients of k in dq.
"""

import torch
import triton
import triton.language as tl

from .causal_flow_attention import (
    CAUSAL_LIMIT,
    UNSPECIALIZED,
    constants_of,
    numbers,
    running_rows,
    scan_states,
    seen_before,
    segment_of,
)
from .flow_attention_configs import causal_config, causal_segments
from .flow_features import (
    add,
    clamped,
    dot_features,
    dot_rows,
    dot_state,
    kept,
    launch_key,
    load_features,
    load_row,
    load_state,
    load_tile,
    mask_strides,
    narrow,
    program_of,
    sequence,
    sigmoid,
    slope,
    store_state,
    store_tile,
    sums_from,
    time_strides,
    total_of,
)
from .launch import Launcher


@triton.jit
def _plane(terms, number, plane, rows, keep):
    """One number a token, 0 where it takes no part."""
    return tl.load(terms + number * plane + rows, mask=keep, other=0.0)


@triton.jit
def _taken(mask, keep):
    """How far the count of a sequence goes in a tile: nothing without a mask, where places count."""
    if mask is None:
        return 0
    else:
        return tl.sum(keep.to(tl.int32), 0)


@triton.jit
def _segment_count(counts, segment):
    """Tokens of a segment that take part; 0 without a mask, where places count."""
    if counts is None:
        return 0
    else:
        return tl.load(counts + segment)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def causal_flow_attention_bwd_kernel(
    q, k, v, dy, dq, dk, dv, flows, terms, before, after, firsts, seconds, thirds, fourths, counts, states, dstates,
    starts, ends, mask, cu, sums, count, state, dsums, dtotal, dstate, dsums0, dtotal0, dstate0,
    length, total_rows, batch, segments, tiles, clamp, eps, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt,
    stride_kh, stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, stride_yh, stride_mb, stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, STAGE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """STAGE 1..4 runs one pass, 5 and 6 the two walks of the last, 0 all of them for the one segment of each head.

    terms: planes of r, t, dP/n, dJ/n, dI, dO, a, b, w, z, the last two 0 where a token takes no part. before: as in the
    forward; after: sums of dI (q + eps), dO (k + eps), dJ/n (q + eps), dP/n (k + eps) of each tile, which the next pass
    turns into those of all tiles behind it. firsts: K1, Q1, K2, Q2 of segments, seconds: t / running sum, thirds: the
    last two rows of after, fourths: the first two.
    """
    s, segment, h = program_of(segments, STAGE % 2 == 0, HEADS)
    row, start, tokens = sequence(s, cu, length, total_rows)
    row, start, index = tl.cast(row, tl.int64), tl.cast(start, tl.int64), tl.cast(s * HEADS + h, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    dy += row * stride_yb + start * stride_yt + h * stride_yh
    offset = (row * total_rows + start) * HEADS + h
    dq, dk, dv = dq + offset * D, dk + offset * D, dv + offset * M
    plane = batch * HEADS * tl.cast(total_rows, tl.int64)
    flows += (row * HEADS + h) * total_rows + start
    terms += (row * HEADS + h) * total_rows + start
    if mask is not None:
        mask += row * stride_mb + start * stride_mt
        counts += index * segments
    firsts, seconds = firsts + index * segments * 4 * D, seconds + index * segments
    thirds, fourths = thirds + index * segments * 2 * D, fourths + index * segments * 2 * D
    states += (index * segments + segment) * D * M
    dstates += (index * segments + segment) * D * M
    starts, ends = starts + (index * segments + segment) * D * M, ends + (index * segments + segment) * D * M
    begin, end = segment_of(segment, segments, tokens, length, C)
    before += (index * tiles + begin // C) * 4 * D
    after += (index * tiles + begin // C) * 4 * D
    steps, behind_us = tl.cdiv(end - begin, C), segments - 1 - segment
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, C)
    eps_row = tl.where(cols < D, eps, 0.0)
    pair, four = tl.arange(0, 2 * BD), tl.arange(0, 4 * BD)  # columns of two rows and of four
    lower, upper = offs[:, None] >= offs[None, :], offs[:, None] <= offs[None, :]
    seen_first = seen_before(counts, count, s, segment, tl.arange(0, 32), 32)

    if STAGE == 0 or STAGE == 1:
        seen = seen_first
        kv, r_state = tl.zeros([BD, BM], tl.float32), tl.zeros([BD, BM], tl.float32)
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq_wide = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk_wide = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            fq, fk = narrow(fq_wide, q), narrow(fk_wide, k)
            n = numbers(mask, keep, offs, first, seen)
            incoming = tl.load(flows + rows, mask=keep, other=1.0)
            running = tl.load(flows + 4 * plane + rows, mask=keep, other=1.0)
            z = tl.where(keep, sigmoid(_plane(flows, 2, plane, rows, keep)) / incoming, 0.0)
            w = tl.where(keep, n * tl.exp(clamped(_plane(flows, 3, plane, rows, keep), clamp)) / running, 0.0)
            a, b = n / incoming, n / tl.load(flows + plane + rows, mask=keep, other=1.0)
            tl.store(terms + 6 * plane + rows, a, mask=inside)
            tl.store(terms + 7 * plane + rows, b, mask=inside)
            tl.store(terms + 8 * plane + rows, w, mask=inside)
            tl.store(terms + 9 * plane + rows, z, mask=inside)
            at = before + (first - begin) // C * 4 * D + cols
            tl.store(at, tl.sum(fk_wide, 0), mask=cols < D)
            tl.store(at + D, tl.sum(fq_wide, 0), mask=cols < D)
            tl.store(at + 2 * D, tl.sum(fk_wide * b[:, None], 0), mask=cols < D)
            tl.store(at + 3 * D, tl.sum(fq_wide * a[:, None], 0), mask=cols < D)
            if STAGE == 1:
                values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M) * w[:, None], v)
                grads = narrow(load_tile(dy, stride_yt, rows, cols_v, keep, M) * z[:, None], dy)
                kv = tl.dot(tl.trans(fk), values, kv, input_precision=PRECISION)
                r_state = tl.dot(tl.trans(fq), grads, r_state, input_precision=PRECISION)
            seen += _taken(mask, keep)
        tl.debug_barrier()
        tl.store(firsts + segment * 4 * D + four, total_of(before, steps, 4 * D, four, 4 * D), mask=four < 4 * D)
        if STAGE == 1:
            store_state(states, cols, cols_v, kv, D, M)
            store_state(dstates, cols, cols_v, r_state, D, M)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 2:
        kv = tl.zeros([BD, BM], tl.float32)
        if STAGE == 2:
            kv = load_state(starts, cols, cols_v, D, M)
        elif state is not None:
            kv = load_state(state + index * D * M, cols, cols_v, D, M)
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq_wide = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk_wide = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            fq, fk = narrow(fq_wide, q), narrow(fk_wide, k)
            w, z = _plane(terms, 8, plane, rows, keep), _plane(terms, 9, plane, rows, keep)
            values = load_tile(v, stride_vt, rows, cols_v, keep, M)
            grads = load_tile(dy, stride_yt, rows, cols_v, keep, M)
            p = dot_features(fq_wide, fk_wide, q)  # as in I, with which r / I cancels what comes through y
            out = dot_state(fq, kv, q, PRECISION)
            out += dot_rows(tl.where(lower, p * w[None, :], 0.0), narrow(values, v), v, PRECISION)
            tl.store(terms + rows, tl.sum(out * grads, 1) * z, mask=inside)
            kv = tl.dot(tl.trans(fk), narrow(values * w[:, None], v), kv, input_precision=PRECISION)
        r_state, share = tl.zeros([BD, BM], tl.float32), tl.zeros([C], tl.float32)
        if STAGE == 2:
            r_state = load_state(ends, cols, cols_v, D, M)
        elif dstate is not None:
            r_state = load_state(dstate + index * D * M, cols, cols_v, D, M)
        for step in range(0, steps):
            first = begin + (steps - 1 - step) * C
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = narrow(load_features(q, stride_qt, rows, cols, keep, D, RELU), q)
            fk = narrow(load_features(k, stride_kt, rows, cols, keep, D, RELU), k)
            w, z = _plane(terms, 8, plane, rows, keep), _plane(terms, 9, plane, rows, keep)
            grads = load_tile(dy, stride_yt, rows, cols_v, keep, M)
            p = tl.dot(fk, tl.trans(fq), input_precision=PRECISION)  # k_j . q_i
            d_values = dot_state(fk, r_state, k, PRECISION)
            d_values += dot_rows(tl.where(upper, p * z[None, :], 0.0), narrow(grads, dy), dy, PRECISION)
            d_values *= w[:, None]
            store_tile(dv, HEADS * M, rows, cols_v, inside, d_values, M)
            t = tl.sum(d_values * load_tile(v, stride_vt, rows, cols_v, keep, M), 1)
            tl.store(terms + plane + rows, t, mask=inside)
            share += t / tl.load(flows + 4 * plane + rows, mask=keep, other=1.0)
            r_state = tl.dot(tl.trans(fq), narrow(grads * z[:, None], dy), r_state, input_precision=PRECISION)
        tl.store(seconds + segment, tl.sum(share, 0))
        if dstate0 is not None:
            if segment == 0:
                store_state(dstate0 + index * D * M, cols, cols_v, r_state, D, M)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 3:
        seen = seen_first + _segment_count(counts, segment)
        behind = tl.sum(total_of(seconds + segment + 1, behind_us, 1, cols, 1), 0)
        if dtotal is not None:
            behind -= tl.load(dtotal + index)
        behind_lost = 0.0
        for step in range(0, steps):
            first = begin + (steps - 1 - step) * C
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            seen -= _taken(mask, keep)
            fq = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            n = numbers(mask, keep, offs, first, seen)
            conserved_q, conserved_k = _plane(flows, 2, plane, rows, keep), _plane(flows, 3, plane, rows, keep)
            x = tl.exp(clamped(conserved_k, clamp))
            r, t = _plane(terms, 0, plane, rows, keep), _plane(terms, 1, plane, rows, keep)
            share = t / tl.load(flows + 4 * plane + rows, mask=keep, other=1.0)
            in_bounds = keep & (conserved_k <= clamp) & (conserved_k >= -clamp)
            u = tl.where(in_bounds, (t - x * (behind + tl.cumsum(share, 0, reverse=True))) / n, 0.0)  # dP / n
            c = tl.where(keep, sigmoid(-conserved_q) * r / n, 0.0)  # dJ / n
            tl.store(terms + 2 * plane + rows, u, mask=inside)
            tl.store(terms + 3 * plane + rows, c, mask=inside)
            at = after + (first - begin) // C * 4 * D + cols
            tl.store(at + 2 * D, tl.sum(c[:, None] * (fq + eps_row[None, :]), 0), mask=cols < D)
            tl.store(at + 3 * D, tl.sum(u[:, None] * (fk + eps_row[None, :]), 0), mask=cols < D)
            behind, behind_lost = add(behind, behind_lost, tl.sum(share, 0))
        tl.debug_barrier()
        total_here = total_of(after + 2 * D, steps, 4 * D, pair, 2 * D)
        tl.store(thirds + segment * 2 * D + pair, total_here, mask=pair < 2 * D)
        if dtotal0 is not None:
            if segment == 0:
                tl.store(dtotal0 + index, -behind)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 4:
        carried = total_of(thirds + (segment + 1) * 2 * D, behind_us, 2 * D, pair, 2 * D)
        if dsums is not None:
            carried += load_row(dsums + (index * 4 + 2) * D, pair, 2 * D)
        carried = running_rows(after + ((steps - 1) * 4 + 2) * D, steps, -4 * D, carried, 0.0, pair, 2 * D)
        if dsums0 is not None:
            if segment == 0:
                tl.store(dsums0 + (index * 4 + 2) * D + pair, carried, mask=pair < 2 * D)
        tl.debug_barrier()
        for step in range(0, steps):
            first = begin + (steps - 1 - step) * C
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            r, a, b = (
                _plane(terms, 0, plane, rows, keep),
                _plane(terms, 6, plane, rows, keep),
                _plane(terms, 7, plane, rows, keep),
            )
            u, c = _plane(terms, 2, plane, rows, keep), _plane(terms, 3, plane, rows, keep)
            at = after + (first - begin) // C * 4 * D
            gk2, gq2 = load_row(at + 2 * D, cols, D), load_row(at + 3 * D, cols, D)
            q_gq2 = tl.sum(fq * (sums_from((fk + eps_row[None, :]) * u[:, None], k, PRECISION) + gq2[None, :]), 1)
            k_gk2 = tl.sum(fk * (sums_from((fq + eps_row[None, :]) * c[:, None], q, PRECISION) + gk2[None, :]), 1)
            d_in = tl.where(keep, -(r + a * q_gq2) / tl.load(flows + rows, mask=keep, other=1.0), 0.0)
            d_out = tl.where(keep, -b * k_gk2 / tl.load(flows + plane + rows, mask=keep, other=1.0), 0.0)
            tl.store(terms + 4 * plane + rows, d_in, mask=inside)
            tl.store(terms + 5 * plane + rows, d_out, mask=inside)
            tl.store(at + cols, tl.sum(d_in[:, None] * (fq + eps_row[None, :]), 0), mask=cols < D)
            tl.store(at + D + cols, tl.sum(d_out[:, None] * (fk + eps_row[None, :]), 0), mask=cols < D)
        tl.debug_barrier()
        total_here = total_of(after, steps, 4 * D, pair, 2 * D)
        tl.store(fourths + segment * 2 * D + pair, total_here, mask=pair < 2 * D)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 5:
        carried = total_of(fourths + (segment + 1) * 2 * D, behind_us, 2 * D, pair, 2 * D)
        if dsums is not None:
            carried += load_row(dsums + index * 4 * D, pair, 2 * D)
        carried = running_rows(after + (steps - 1) * 4 * D, steps, -4 * D, carried, 0.0, pair, 2 * D)
        if dsums0 is not None:
            if segment == 0:
                tl.store(dsums0 + index * 4 * D + pair, carried, mask=pair < 2 * D)
        carried = total_of(firsts, segment, 4 * D, four, 4 * D)
        if sums is not None:
            carried += load_row(sums + index * 4 * D, four, 4 * D)
        running_rows(before, steps, 4 * D, carried, eps, four, 4 * D)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 5:
        kv = tl.zeros([BM, BD], tl.float32)  # transposed, as the product with dy reads it
        if STAGE == 5:
            kv = tl.trans(load_state(starts, cols, cols_v, D, M))
        elif state is not None:
            kv = tl.trans(load_state(state + index * D * M, cols, cols_v, D, M))
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fk = narrow(load_features(k, stride_kt, rows, cols, keep, D, RELU), k)
            u, c = _plane(terms, 2, plane, rows, keep), _plane(terms, 3, plane, rows, keep)
            d_in, d_out = _plane(terms, 4, plane, rows, keep), _plane(terms, 5, plane, rows, keep)
            a, b = _plane(terms, 6, plane, rows, keep), _plane(terms, 7, plane, rows, keep)
            w, z = _plane(terms, 8, plane, rows, keep), _plane(terms, 9, plane, rows, keep)
            values = load_tile(v, stride_vt, rows, cols_v, keep, M)
            grads = narrow(load_tile(dy, stride_yt, rows, cols_v, keep, M), dy)
            at = (first - begin) // C * 4 * D
            coef = tl.dot(grads, tl.trans(narrow(values, v)), input_precision=PRECISION) * (z[:, None] * w[None, :])
            coef = tl.where(lower, coef + c[:, None] * b[None, :] + d_in[:, None], 0.0)
            coef += tl.where(upper, a[:, None] * u[None, :] + d_out[None, :], 0.0)
            d = dot_state(grads, kv, dy, PRECISION) * z[:, None] + dot_rows(coef, fk, k, PRECISION)
            d += c[:, None] * load_row(before + at + 2 * D, cols, D)[None, :]
            d += d_in[:, None] * load_row(before + at, cols, D)[None, :]
            d += a[:, None] * load_row(after + at + 3 * D, cols, D)[None, :]
            d += load_row(after + at + D, cols, D)[None, :]
            d += (a * tl.cumsum(u, 0, reverse=True) + tl.cumsum(d_out, 0, reverse=True))[:, None] * eps_row[None, :]
            d *= slope(load_features(q, stride_qt, rows, cols, keep, D, RELU), RELU)
            store_tile(dq, HEADS * D, rows, cols, inside, tl.where(keep[:, None], d, 0.0), D)
            kv = tl.dot(tl.trans(narrow(values * w[:, None], v)), fk, kv, input_precision=PRECISION)
    if STAGE == 0 or STAGE == 6:
        r_state = tl.zeros([BM, BD], tl.float32)  # transposed
        if STAGE == 6:
            r_state = tl.trans(load_state(ends, cols, cols_v, D, M))
        elif dstate is not None:
            r_state = tl.trans(load_state(dstate + index * D * M, cols, cols_v, D, M))
        for step in range(0, steps):
            first = begin + (steps - 1 - step) * C
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = narrow(load_features(q, stride_qt, rows, cols, keep, D, RELU), q)
            u, c = _plane(terms, 2, plane, rows, keep), _plane(terms, 3, plane, rows, keep)
            d_in, d_out = _plane(terms, 4, plane, rows, keep), _plane(terms, 5, plane, rows, keep)
            a, b = _plane(terms, 6, plane, rows, keep), _plane(terms, 7, plane, rows, keep)
            w, z = _plane(terms, 8, plane, rows, keep), _plane(terms, 9, plane, rows, keep)
            values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M), v)
            grads = load_tile(dy, stride_yt, rows, cols_v, keep, M)
            at = (first - begin) // C * 4 * D
            coef = tl.dot(values, tl.trans(narrow(grads, dy)), input_precision=PRECISION) * (w[:, None] * z[None, :])
            coef = tl.where(upper, coef + b[:, None] * c[None, :] + d_in[None, :], 0.0)
            coef += tl.where(lower, u[:, None] * a[None, :] + d_out[:, None], 0.0)
            d = dot_state(values, r_state, v, PRECISION) * w[:, None] + dot_rows(coef, fq, q, PRECISION)
            d += u[:, None] * load_row(before + at + 3 * D, cols, D)[None, :]
            d += d_out[:, None] * load_row(before + at + D, cols, D)[None, :]
            d += b[:, None] * load_row(after + at + 2 * D, cols, D)[None, :]
            d += load_row(after + at, cols, D)[None, :]
            d += (b * tl.cumsum(c, 0, reverse=True) + tl.cumsum(d_in, 0, reverse=True))[:, None] * eps_row[None, :]
            d *= slope(load_features(k, stride_kt, rows, cols, keep, D, RELU), RELU)
            store_tile(dk, HEADS * D, rows, cols, inside, tl.where(keep[:, None], d, 0.0), D)
            r_state = tl.dot(tl.trans(narrow(grads * z[:, None], dy)), fq, r_state, input_precision=PRECISION)


@triton.jit(do_not_specialize=("length", "total_rows", "segments"))
def causal_flow_attention_count_kernel(
    counts, mask, cu, length, total_rows, segments, stride_mb, stride_mt, HEADS: tl.constexpr, C: tl.constexpr
):
    """Tokens of every segment that take part."""
    index, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    row, start, tokens = sequence(index // HEADS, cu, length, total_rows)
    row, start, offs = tl.cast(row, tl.int64), tl.cast(start, tl.int64), tl.arange(0, C)
    begin, end = segment_of(segment, segments, tokens, length, C)
    taken = begin * 0
    for first in range(begin, end, C):
        rows = first + offs
        taken += tl.sum(kept(mask + row * stride_mb + start * stride_mt, stride_mt, rows, rows < end).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), taken)


_bwd = Launcher(causal_flow_attention_bwd_kernel)
_counts = Launcher(causal_flow_attention_count_kernel)


def causal_flow_attention_bwd(
    dy, dsums, dtotal, dstate, q, k, v, mask, cu, sums, total, count, state, flows, relu, clamp, eps, extra
):
    (batch, length, heads, width), width_v = q.shape, v.shape[3]
    sequences = batch if cu is None else cu.shape[0] - 1
    new = q.new_empty if cu is None else q.new_zeros
    dq, dk = new(q.shape), new(q.shape)
    dv = new((batch, length, heads, width_v))
    kept_states = 0 if sums is None else sequences
    dsums0, dtotal0 = flows.new_empty((kept_states, heads, 4, width)), flows.new_empty((kept_states, heads))
    dstate0 = flows.new_empty((kept_states, heads, width, width_v))
    programs = sequences * heads
    if programs == 0:
        return dq, dk, dv, dsums0, dtotal0, dstate0
    constants = constants_of(q, k, v, relu)
    segments, tile = causal_segments(programs, length), causal_config(q.dtype, constants[4:6], "bwd", 0)[0][0]
    tiles = max(1, triton.cdiv(length, tile))  # of the longest sequence possible
    terms = flows.new_empty((10, batch, heads, length))
    before, after = (flows.new_empty((programs, tiles, 4, width)) for _ in range(2))
    firsts, seconds, thirds, fourths = (
        flows.new_empty((programs, segments, n)) for n in (4 * width, 1, 2 * width, 2 * width)
    )
    states, dstates, starts, ends = (
        flows.new_empty((programs if segments > 1 else 0, segments, width, width_v)) for _ in range(4)
    )  # fmt: skip
    counts = None
    strides = (*time_strides(q, k, v, dy), *mask_strides(mask))
    if mask is not None:
        counts = q.new_empty((programs, segments), dtype=torch.int32)
        _counts(
            programs * segments, launch_key(strides[-2:], counts, mask, cu),
            (counts, mask, cu, length, length, segments, *strides[-2:]), (heads, tile), (4, 1),
        )  # fmt: skip
    initial = (None,) * 3 if sums is None else (dsums0, dtotal0, dstate0)
    finals = (dsums, dtotal, dstate, *initial)
    key = launch_key(strides, q, k, v, dy, mask, cu, sums, count, state, *finals)
    arguments = (
        q, k, v, dy, dq, dk, dv, flows, terms, before, after, firsts, seconds, thirds, fourths, counts, states, dstates,
        starts, ends, mask, cu, sums, count, state, *finals, length, length, batch, segments, tiles,
        min(clamp, CAUSAL_LIMIT), eps, *strides,
    )  # fmt: skip
    for stage in (0,) if segments == 1 else (1, 2, 3, 4, 5, 6):
        if stage == 2:
            scan_states(states, state, starts, False)
            scan_states(dstates, dstate, ends, True)
        config, registers = causal_config(q.dtype, constants[4:6], "bwd", stage)
        _bwd(programs * segments, key, arguments, (*constants, stage), config, maxnreg=registers)
    return dq, dk, dv, dsums0, dtotal0, dstate0
