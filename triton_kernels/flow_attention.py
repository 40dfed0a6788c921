"""Whole Flow-Attention: each direction is four phases, between which sums over all tokens of a head must be complete.

Few tokens a head: one program runs all phases in a single launch, and the head's q and k stay in the caches of its
multiprocessor. Else the tokens of a head are cut into `splits` parts (`parts` where a D x M state is summed), one
program each, and every phase is a launch: a program writes its partial sums, and those of the next phase add up all
parts, in order, so that results are repeatable. The partial states are added by a launch of their own.

Bytes, in tensors of q's size: forward 2 (q, k), 2 (q, k), 2 (k, v), 2 (q, y), together 8 where 4 must move; backward
2 (q, dy), 3 (k, v, dv), 3 (q, dy, dq), 3 (k, v, dk), together 11 where 7 must move.
"""

import torch
import triton
import triton.language as tl

from .flow_attention_configs import SLICES, flow_config, flow_splits
from .flow_features import (
    add,
    clamped,
    kept,
    launch_key,
    load_features,
    load_state,
    load_tile,
    mask_strides,
    narrow,
    precision,
    program_of,
    sequence,
    sigmoid,
    store_state,
    store_tile,
    time_strides,
    total_of,
    widths,
)
from .launch import Launcher

UNSPECIALIZED = ("sinks", "sources", "batch", "splits", "parts", "clamp", "eps", "extra")
ROWS = tl.constexpr(32)  # partial sums loaded at a time


@triton.jit
def part(split, splits, tokens, TILE: tl.constexpr):
    """Tokens begin..end of one part, in whole tiles."""
    size = tl.cdiv(tl.cdiv(tokens, splits), TILE) * TILE
    return tl.minimum(split * size, tokens), tl.minimum(split * size + size, tokens)


@triton.jit
def _count(parts, splits):
    total, offs = splits * 0, tl.arange(0, ROWS)
    for first in range(0, splits, ROWS):
        total += tl.sum(tl.load(parts + 2 * (first + offs), mask=first + offs < splits, other=0), 0)
    return total


@triton.jit
def _top(tops, parts):
    """The largest score of all parts, 0 where no source takes part, and the sum of exp(score - it)."""
    top, total, offs = float("-inf"), 0.0, tl.arange(0, ROWS)
    for first in range(0, parts, ROWS):
        rows = first + offs
        top = tl.maximum(top, tl.max(tl.load(tops + 2 * rows, mask=rows < parts, other=float("-inf")), 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    for first in range(0, parts, ROWS):
        rows = first + offs
        own = tl.load(tops + 2 * rows, mask=rows < parts, other=float("-inf"))
        total += tl.sum(tl.exp(own - top) * tl.load(tops + 2 * rows + 1, mask=rows < parts, other=0.0), 0)
    return top, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _sum_features(
    x, stride, mask, stride_m, begin, end, cols, offs, D: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr
):
    """(sum of phi, tokens that take part) of a part."""
    totals, count = tl.zeros([TILE, cols.shape[0]], tl.float32), 0
    for first in range(begin, end, TILE):
        rows = first + offs
        keep = kept(mask, stride_m, rows, rows < end)
        totals += load_features(x, stride, rows, cols, keep, D, RELU)
        if mask is not None:
            count += tl.sum(keep.to(tl.int32), 0)
    return tl.sum(totals, 0), count if mask is not None else tl.maximum(end - begin, 0)


@triton.jit
def _first_flow(
    x, stride, mask, stride_m, begin, end, cols, offs, other, alone, eps_row, extra, flows,
    D: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores x (+) other as the flow of each token; the sum of x / flow. Where nothing flows the flow is 1."""
    totals = tl.zeros([TILE, cols.shape[0]], tl.float32)
    for first in range(begin, end, TILE):
        rows = first + offs
        inside = rows < end
        keep = kept(mask, stride_m, rows, inside)
        f = load_features(x, stride, rows, cols, keep, D, RELU)
        flow = tl.sum((f + eps_row[None, :]) * (other + eps_row)[None, :], 1) + extra
        flow = tl.where(keep & (alone == 0), flow, 1.0)
        tl.store(flows + rows, flow, mask=inside)
        totals += f * (1.0 / flow)[:, None]
    return tl.sum(totals, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flow_attention_fwd_kernel(
    q, k, v, y, flows_q, flows_k, sums, lse, kv, counts, firsts, seconds, tops, states, key_mask, query_mask, cu,
    sinks, sources, batch, splits, parts, clamp, eps, extra, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt,
    stride_kh, stride_vb, stride_vt, stride_vh, stride_kmb, stride_kmt, stride_qmb, stride_qmt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, STAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """STAGE 1..4 runs one phase, 0 all of them. Partial sums: counts, firsts, seconds, (tops, states) by phase."""
    pieces = parts if STAGE == 3 else splits
    s, split, h = program_of(pieces, STAGE % 2 == 0, HEADS)
    index = tl.cast(s * HEADS + h, tl.int64)
    row, start, length_q = sequence(s, cu, sinks, sinks)
    length_k = sources if cu is None else length_q
    row, start = tl.cast(row, tl.int64), tl.cast(start, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    y += ((row * sinks + start) * HEADS + h) * M
    plane_q, plane_k = batch * HEADS * tl.cast(sinks, tl.int64), batch * HEADS * tl.cast(sources, tl.int64)
    flows_q += (row * HEADS + h) * sinks + start
    flows_k += (row * HEADS + h) * sources + start
    if key_mask is not None:
        key_mask += row * stride_kmb + start * stride_kmt
    if query_mask is not None:
        query_mask += row * stride_qmb + start * stride_qmt
    own = index * pieces + split
    counts_own, firsts_own, seconds_own = counts + own * 2, firsts + own * 2 * D, seconds + own * 2 * D
    counts, firsts = counts + index * splits * 2, firsts + index * splits * 2 * D
    seconds += index * splits * 2 * D
    tops_own, states_own, tops = tops + own * 2, states + own * D * M, tops + index * parts * 2
    begin_q, end_q = part(split, pieces, length_q, TILE)
    begin_k, end_k = part(split, pieces, length_k, TILE)
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    eps_row = tl.where(cols < D, eps, 0.0)

    if STAGE == 0 or STAGE == 1:
        q1, count_q = _sum_features(q, stride_qt, query_mask, stride_qmt, begin_q, end_q, cols, offs, D, RELU, TILE)
        k1, count_k = _sum_features(k, stride_kt, key_mask, stride_kmt, begin_k, end_k, cols, offs, D, RELU, TILE)
        tl.store(counts_own, count_q)
        tl.store(counts_own + 1, count_k)
        tl.store(firsts_own + cols, q1, mask=cols < D)
        tl.store(firsts_own + D + cols, k1, mask=cols < D)
        tl.debug_barrier()
    if STAGE != 1 and STAGE != 3:
        count_q, count_k = _count(counts, splits), _count(counts + 1, splits)
        alone = (count_q == 0) | (count_k == 0)
    if STAGE == 0 or STAGE == 2:
        q1, k1 = total_of(firsts, splits, 2 * D, cols, D), total_of(firsts + D, splits, 2 * D, cols, D)
        q2 = _first_flow(
            q, stride_qt, query_mask, stride_qmt, begin_q, end_q, cols, offs, k1, alone, eps_row, extra, flows_q,
            D, RELU, TILE,
        )  # fmt: skip
        k2 = _first_flow(
            k, stride_kt, key_mask, stride_kmt, begin_k, end_k, cols, offs, q1, alone, eps_row, extra, flows_k,
            D, RELU, TILE,
        )  # fmt: skip
        tl.store(seconds_own + cols, q2, mask=cols < D)
        tl.store(seconds_own + D + cols, k2, mask=cols < D)
        if split == 0:
            at = sums + index * 4 * D + cols
            tl.store(at, k1, mask=cols < D)
            tl.store(at + D, q1, mask=cols < D)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 3:
        q2 = total_of(seconds, splits, 2 * D, cols, D)
        top, total, total_lost = float("-inf"), 0.0, 0.0
        state = tl.zeros([BD, BM], tl.float32)
        for first in range(begin_k, end_k, TILE):
            rows = first + offs
            inside = rows < end_k
            keep = kept(key_mask, stride_kmt, rows, inside)
            f = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            conserved = tl.sum((f + eps_row[None, :]) * (q2 + eps_row)[None, :], 1) + extra
            tl.store(flows_k + plane_k + rows, conserved, mask=inside)
            score = tl.where(keep, clamped(conserved, clamp), float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 0))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp(top - finite)
            x = tl.exp(score - finite)
            total, total_lost = add(total * shrink, total_lost * shrink, tl.sum(x, 0))
            values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M) * x[:, None], v)
            state = tl.dot(tl.trans(narrow(f, k)), values, state * shrink, input_precision=PRECISION)
            top = new_top
        tl.store(tops_own, top)
        tl.store(tops_own + 1, total)
        if STAGE == 0:  # this one part is the whole
            tl.debug_barrier()
            top, total = _top(tops, 1)
            state *= count_k / total
            tl.store(lse + index, top + tl.log(total))
            store_state(kv + index * D * M, cols, cols_v, state, D, M)
        else:
            store_state(states_own, cols, cols_v, state, D, M)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 4:
        k2 = total_of(seconds + D, splits, 2 * D, cols, D)
        if split == 0:
            at = sums + index * 4 * D + 2 * D + cols
            tl.store(at, k2, mask=cols < D)
            tl.store(at + D, total_of(seconds, splits, 2 * D, cols, D), mask=cols < D)
        state = load_state(kv + index * D * M, cols, cols_v, D, M)
        ratio = count_q / tl.maximum(count_k, 1).to(tl.float32)
        for first in range(begin_q, end_q, TILE):
            rows = first + offs
            inside = rows < end_q
            keep = kept(query_mask, stride_qmt, rows, inside)
            f = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            conserved = tl.sum((f + eps_row[None, :]) * (k2 + eps_row)[None, :], 1) + extra
            tl.store(flows_q + plane_q + rows, conserved, mask=inside)
            factor = sigmoid(conserved * ratio) / tl.load(flows_q + rows, mask=inside, other=1.0)
            out = tl.dot(narrow(f, q), narrow(state, q), input_precision=PRECISION) * factor[:, None]
            store_tile(y, HEADS * M, rows, cols_v, inside, out, M)


@triton.jit(do_not_specialize=("splits", "parts"))
def flow_attention_gather_kernel(
    states, tops, counts, total_state, lse, splits, parts,
    D: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, ROWS_EACH: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The state of a head from those of its parts, SLICE rows a program; with tops, as softmax times the sources."""
    index, piece = tl.program_id(0) // SLICE, tl.program_id(0) % SLICE
    index = tl.cast(index, tl.int64)
    rows, cols_v = piece * ROWS_EACH + tl.arange(0, ROWS_EACH), tl.arange(0, BM)
    states += index * parts * D * M
    state = tl.zeros([ROWS_EACH, BM], tl.float32)
    top, total = 0.0, 1.0
    if tops is not None:
        tops += index * parts * 2
        top, total = _top(tops, parts)
    for i in range(0, parts):
        own = load_state(states + tl.cast(i, tl.int64) * D * M, rows, cols_v, D, M)
        if tops is not None:
            own *= tl.exp(tl.load(tops + 2 * i) - top)
        state += own
    if tops is not None:
        state *= _count(counts + index * splits * 2 + 1, splits) / total
        tl.store(lse + index, top + tl.log(total))
    store_state(total_state + index * D * M, rows, cols_v, state, D, M)


_fwd = Launcher(flow_attention_fwd_kernel)
_gather = Launcher(flow_attention_gather_kernel)


def plan(q, k, v, cu):
    """(states, splits, parts, what is new: rows behind the last sequence belong to no program)."""
    states = q.shape[0] if cu is None else cu.shape[0] - 1
    splits, parts = flow_splits(states * q.shape[2], max(q.shape[1], k.shape[1]))
    return states, splits, parts, q.new_empty if cu is None else q.new_zeros


def add_states(partial, tops, counts, whole, lse, splits):
    """Adds the parts' states (programs, parts, D, M) up."""
    programs, parts, width, width_v = partial.shape
    block, block_v = (max(16, triton.next_power_of_2(n)) for n in (width, width_v))
    _gather(
        programs * SLICES, launch_key((), partial, tops, counts, whole, lse),
        (partial, tops, counts, whole, lse, splits, parts),
        (width, width_v, block_v, block // SLICES, SLICES), (4, 1),
    )  # fmt: skip


def flow_attention_fwd(q, k, v, key_mask, query_mask, cu, relu, clamp, eps, extra):
    (batch, sinks, heads, width), sources, width_v = q.shape, k.shape[1], v.shape[3]
    states, splits, parts, new = plan(q, k, v, cu)
    y = new((batch, sinks, heads, width_v))
    flows_q, flows_k = (new((2, batch, heads, n), dtype=torch.float32) for n in (sinks, sources))
    sums, lse = flows_q.new_empty((states, heads, 4, width)), flows_q.new_empty((states, heads))
    kv = flows_q.new_empty((states, heads, width, width_v))
    programs = states * heads
    if programs == 0:
        return y, flows_q, flows_k, sums, lse, kv
    counts = q.new_empty((programs, splits, 2), dtype=torch.int32)
    firsts, seconds = (flows_q.new_empty((programs, splits, 2 * width)) for _ in range(2))
    tops, partial = (flows_q.new_empty((programs, parts, *shape)) for shape in ((2,), (width, width_v)))
    strides = (*time_strides(q, k, v), *mask_strides(key_mask), *mask_strides(query_mask))
    key = launch_key(strides, q, k, v, key_mask, query_mask, cu)
    arguments = (
        q, k, v, y, flows_q, flows_k, sums, lse, kv, counts, firsts, seconds, tops, partial, key_mask, query_mask, cu,
        sinks, sources, batch, splits, parts, clamp, eps, extra, *strides,
    )  # fmt: skip
    constants = (heads, heads // k.shape[2], *widths(q, v), relu, precision(q.dtype))
    for stage in (0,) if splits == 1 else (1, 2, 3, 4):
        if stage == 4:
            add_states(partial, tops, counts, kv, lse, splits)
        config, registers = flow_config(q.dtype, constants[4:6], "fwd", stage)
        pieces = parts if stage == 3 else splits
        _fwd(programs * pieces, key, arguments, (*constants, stage), config, maxnreg=registers)
    return y, flows_q, flows_k, sums, lse, kv
