"""Causal Flow-Attention forward, the tokens of a head cut into segments.

Each running sum feeds the next: those of phi(k), phi(q) give the flows I and O; those of b k, a q the conserved flows J
and P; that of x = exp(P) the weights w; that of k (w v)^T the output. So there are five passes over the tokens, each
one launch with a program a segment, which starts from the sum over the segments before it (the states' is a launch of
its own). A pass stores the sums of its tiles, and the next one turns them into what stands before each tile, so that no
tile waits for the one before it. Inside a tile a product with a triangle of ones holds the rest of every running sum.
Short sequences take one program a head, which runs the passes one after the other in a single launch, its q and k in
the caches.

Bytes, in tensors of q's size: 2 (q, k), 2 (q, k), 2 (q, k), 2 (k, v), 4 (q, k, v, y), together 12 where 4 must move.
One pass would need the states of all segments before to be complete while its tile waits on chip, four times over.

Flows have nearly float32's accuracy in all dtypes, since they decide at which tokens the clamp is reached. In the
output nothing cancels (features and weights are positive), so that products round their operands to bfloat16 once. Sums
are taken over tiles, over up to 16 of them, over segments and over up to 32 of those: no chain of additions is long.
"""

import torch
import triton
import triton.language as tl

from .flow_attention_configs import SCAN, SCAN_EACH, causal_config, causal_segments
from .flow_features import (
    add,
    clamped,
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
    precision,
    program_of,
    sequence,
    sigmoid,
    store_state,
    store_tile,
    sums_up_to,
    time_strides,
    total_of,
    widths,
)
from .launch import Launcher

UNSPECIALIZED = ("length", "total_rows", "batch", "segments", "tiles", "clamp", "eps", "extra")
CAUSAL_LIMIT = 60.0  # of the exponent where it is not clamped, as in the reference


@triton.jit
def segment_of(segment, segments, tokens, longest, C: tl.constexpr):
    """(first, end) of a segment: whole tiles, cut alike in all sequences of a call."""
    size = tl.cdiv(tl.cdiv(longest, segments), C) * C
    return tl.minimum(segment * size, tokens), tl.minimum(segment * size + size, tokens)


@triton.jit
def running_rows(rows, count, stride, start, shift, columns, WIDTH: tl.constexpr):
    """Replaces each of `count` rows, `stride` apart, by start + shift + all rows before it; start + all rows."""
    offs = tl.arange(0, 16)
    for first in range(0, count, 16):
        inside = (first + offs < count)[:, None] & (columns < WIDTH)[None, :]
        at = rows + (first + offs)[:, None] * stride + columns[None, :]
        total = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        ahead = tl.load(at - stride, mask=inside & (offs > 0)[:, None], other=0.0)
        tl.debug_barrier()
        tl.store(at, (start + shift)[None, :] + tl.cumsum(ahead, 0), mask=inside)
        start += total
    return start


@triton.jit
def dot_with_eps(x, y, eps):
    """(x + eps) . y by rows."""
    return tl.sum(x * y, 1) + eps * tl.sum(y, 1)


@triton.jit
def numbers(mask, keep, offs, first, seen):
    """n of a tile's tokens: those up to each that take part, in the whole sequence."""
    if mask is None:
        return (seen + first + offs + 1).to(tl.float32)
    else:
        return tl.maximum(seen + tl.cumsum(keep.to(tl.int32), 0), 1).to(tl.float32)


@triton.jit
def seen_before(counts, count, s, segment, offs_row, ROWS: tl.constexpr):
    """Tokens that take part before a segment: of the initial state, and under a mask of the segments before."""
    seen = tl.cast(0, tl.int64)
    if count is not None:
        seen = tl.load(count + s)
    if counts is not None:
        for first in range(0, segment, ROWS):
            rows = first + offs_row
            seen += tl.sum(tl.load(counts + rows, mask=rows < segment, other=0), 0)
    return seen


@triton.jit(do_not_specialize=UNSPECIALIZED)
def causal_flow_attention_fwd_kernel(
    q, k, v, y, flows, factors, before, firsts, seconds, thirds, counts, states, starts, mask, cu, sums, total, count,
    state, sums_final, total_final, state_final, length, total_rows, batch, segments, tiles, clamp, eps, extra,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_mb,
    stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, STAGE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """STAGE 1..5 runs one pass, 0 all of them for the one segment of each head.

    factors: planes of A / I and w, 0 where a token takes no part. before: (heads, tiles, 4, D) sums of k, q, b k, a q
    of each tile, which the next pass turns into eps and those of all tiles before it; firsts, seconds, thirds, counts,
    states: of segments; starts: the states before them.
    """
    s, segment, h = program_of(segments, STAGE % 2 == 0, HEADS)
    row, start, tokens = sequence(s, cu, length, total_rows)
    row, start, index = tl.cast(row, tl.int64), tl.cast(start, tl.int64), tl.cast(s * HEADS + h, tl.int64)
    q += row * stride_qb + start * stride_qt + h * stride_qh
    k += row * stride_kb + start * stride_kt + h // GROUP * stride_kh
    v += row * stride_vb + start * stride_vt + h // GROUP * stride_vh
    y += ((row * total_rows + start) * HEADS + h) * M
    plane = batch * HEADS * tl.cast(total_rows, tl.int64)
    offset = (row * HEADS + h) * total_rows + start
    flows, factors = flows + offset, factors + offset
    if mask is not None:
        mask += row * stride_mb + start * stride_mt
        counts += index * segments
    firsts, seconds = firsts + index * segments * 2 * D, seconds + index * segments * 2 * D
    thirds += index * segments
    states, starts = states + (index * segments + segment) * D * M, starts + (index * segments + segment) * D * M
    begin, end = segment_of(segment, segments, tokens, length, C)
    before += (index * tiles + begin // C) * 4 * D
    steps, last = tl.cdiv(end - begin, C), segment == segments - 1
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, C)
    pair = tl.arange(0, 2 * BD)  # columns of two rows
    sums_final += index * 4 * D

    if STAGE == 0 or STAGE == 1:
        taken = 0
        for first in range(begin, end, C):
            rows = first + offs
            keep = kept(mask, stride_mt, rows, rows < end)
            fq = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            at = before + (first - begin) // C * 4 * D + cols
            tl.store(at, tl.sum(fk, 0), mask=cols < D)
            tl.store(at + D, tl.sum(fq, 0), mask=cols < D)
            if mask is not None:
                taken += tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()
        tl.store(firsts + segment * 2 * D + pair, total_of(before, steps, 4 * D, pair, 2 * D), mask=pair < 2 * D)
        if mask is not None:
            tl.store(counts + segment, taken)
        tl.debug_barrier()
    if STAGE != 1:
        seen = seen_before(counts, count, s, segment, tl.arange(0, 32), 32)
        if mask is not None:
            seen_first = seen
    if STAGE == 0 or STAGE == 2:
        carried = total_of(firsts, segment, 2 * D, pair, 2 * D)
        if sums is not None:
            carried += load_row(sums + index * 4 * D, pair, 2 * D)
        carried = running_rows(before, steps, 4 * D, carried, eps, pair, 2 * D)
        if last:
            tl.store(sums_final + pair, carried, mask=pair < 2 * D)
        tl.debug_barrier()
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            n = numbers(mask, keep, offs, first, seen)
            at = before + (first - begin) // C * 4 * D
            k1, q1 = load_row(at, cols, D), load_row(at + D, cols, D)
            incoming = dot_with_eps(fq, sums_up_to(fk, k) + k1[None, :], eps) + extra
            outgoing = dot_with_eps(fk, sums_up_to(fq, q) + q1[None, :], eps) + extra
            incoming, outgoing = tl.where(keep, incoming, 1.0), tl.where(keep, outgoing, 1.0)
            tl.store(flows + rows, incoming, mask=inside)
            tl.store(flows + plane + rows, outgoing, mask=inside)
            tl.store(at + 2 * D + cols, tl.sum(fk * (n / outgoing)[:, None], 0), mask=cols < D)
            tl.store(at + 3 * D + cols, tl.sum(fq * (n / incoming)[:, None], 0), mask=cols < D)
            if mask is not None:
                seen += tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()
        total_here = total_of(before + 2 * D, steps, 4 * D, pair, 2 * D)
        tl.store(seconds + segment * 2 * D + pair, total_here, mask=pair < 2 * D)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 3:
        if mask is not None:
            seen = seen_first
        carried = total_of(seconds, segment, 2 * D, pair, 2 * D)
        if sums is not None:
            carried += load_row(sums + (index * 4 + 2) * D, pair, 2 * D)
        carried = running_rows(before + 2 * D, steps, 4 * D, carried, eps, pair, 2 * D)
        if last:
            tl.store(sums_final + 2 * D + pair, carried, mask=pair < 2 * D)
        tl.debug_barrier()
        summed, summed_lost = 0.0, 0.0
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = load_features(q, stride_qt, rows, cols, keep, D, RELU)
            fk = load_features(k, stride_kt, rows, cols, keep, D, RELU)
            n = numbers(mask, keep, offs, first, seen)
            incoming = tl.load(flows + rows, mask=keep, other=1.0)
            a, b = n / incoming, n / tl.load(flows + plane + rows, mask=keep, other=1.0)
            at = before + (first - begin) // C * 4 * D + 2 * D
            k2, q2 = load_row(at, cols, D), load_row(at + D, cols, D)
            conserved_q = (dot_with_eps(fq, sums_up_to(fk * b[:, None], k) + k2[None, :], eps) + extra) / n
            conserved_k = (dot_with_eps(fk, sums_up_to(fq * a[:, None], q) + q2[None, :], eps) + extra) / n
            tl.store(flows + 2 * plane + rows, conserved_q, mask=inside)
            tl.store(flows + 3 * plane + rows, conserved_k, mask=inside)
            tl.store(factors + rows, tl.where(keep, sigmoid(conserved_q) / incoming, 0.0), mask=inside)
            x = tl.where(keep, tl.exp(clamped(conserved_k, clamp)), 0.0)
            summed, summed_lost = add(summed, summed_lost, tl.sum(x, 0))
            if mask is not None:
                seen += tl.sum(keep.to(tl.int32), 0)
        tl.store(thirds + segment, summed)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 4:
        if mask is not None:
            seen = seen_first
        summed = tl.sum(total_of(thirds, segment, 1, cols, 1), 0)
        if total is not None:
            summed += tl.load(total + index)
        summed_lost = 0.0
        kv = tl.zeros([BD, BM], tl.float32)
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            conserved_k = tl.load(flows + 3 * plane + rows, mask=keep, other=0.0)
            x = tl.where(keep, tl.exp(clamped(conserved_k, clamp)), 0.0)
            running = summed + tl.cumsum(x, 0)
            tl.store(flows + 4 * plane + rows, running, mask=inside)
            summed, summed_lost = add(summed, summed_lost, tl.sum(x, 0))
            w = numbers(mask, keep, offs, first, seen) * x / tl.where(keep, running, 1.0)
            tl.store(factors + plane + rows, w, mask=inside)
            if mask is not None:
                seen += tl.sum(keep.to(tl.int32), 0)
            if STAGE == 4:
                fk = narrow(load_features(k, stride_kt, rows, cols, keep, D, RELU), k)
                values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M) * w[:, None], v)
                kv = tl.dot(tl.trans(fk), values, kv, input_precision=PRECISION)
        if STAGE == 4:
            store_state(states, cols, cols_v, kv, D, M)
        if last:
            tl.store(total_final + index, summed)
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 5:
        kv = tl.zeros([BD, BM], tl.float32)
        if STAGE == 5:
            kv = load_state(starts, cols, cols_v, D, M)
        elif state is not None:
            kv = load_state(state + index * D * M, cols, cols_v, D, M)
        lower = offs[:, None] >= offs[None, :]
        for first in range(begin, end, C):
            rows = first + offs
            inside = rows < end
            keep = kept(mask, stride_mt, rows, inside)
            fq = narrow(load_features(q, stride_qt, rows, cols, keep, D, RELU), q)
            fk = narrow(load_features(k, stride_kt, rows, cols, keep, D, RELU), k)
            z = tl.load(factors + rows, mask=inside, other=0.0)
            w = tl.load(factors + plane + rows, mask=inside, other=0.0)
            values = narrow(load_tile(v, stride_vt, rows, cols_v, keep, M) * w[:, None], v)
            p = tl.dot(fq, tl.trans(fk), input_precision=PRECISION)
            # Kept to 16 bits of mantissa: where a sequence is cut must not show.
            out = dot_rows(tl.where(lower, p, 0.0), values, q, PRECISION) + dot_state(fq, kv, q, PRECISION)
            store_tile(y, HEADS * M, rows, cols_v, inside, out * z[:, None], M)
            kv = tl.dot(tl.trans(fk), values, kv, input_precision=PRECISION)
        if last:
            store_state(state_final + index * D * M, cols, cols_v, kv, D, M)


@triton.jit(do_not_specialize=("segments",))
def causal_flow_attention_scan_kernel(
    states, initial, starts, segments, SIZE: tl.constexpr, EACH: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr
):
    """The states at the start of segments (REVERSE: at their end) from what each adds, EACH numbers a program."""
    slices = tl.cdiv(SIZE, EACH)
    index, piece = tl.cast(tl.program_id(0) // slices, tl.int64), tl.program_id(0) % slices
    cols, offs = piece * EACH + tl.arange(0, EACH), tl.arange(0, ROWS)
    states, starts = states + index * segments * SIZE, starts + index * segments * SIZE
    total = tl.zeros([EACH], tl.float32)
    if initial is not None:
        total = tl.load(initial + index * SIZE + cols, mask=cols < SIZE, other=0.0)
    for first in range(0, segments, ROWS):  # many segments at once: their loads wait for nothing
        rows = first + offs
        to = segments - 1 - rows if REVERSE else rows
        before = to + 1 if REVERSE else to - 1
        inside = (cols < SIZE)[None, :] & (rows < segments)[:, None]
        at = before[:, None].to(tl.int64) * SIZE + cols[None, :]
        added = tl.load(states + at, mask=inside & (rows > 0)[:, None], other=0.0)
        at = to[:, None].to(tl.int64) * SIZE + cols[None, :]
        tl.store(starts + at, total[None, :] + tl.cumsum(added, 0), mask=inside)
        total += tl.sum(added, 0)


_fwd = Launcher(causal_flow_attention_fwd_kernel)
_scan = Launcher(causal_flow_attention_scan_kernel)


def scan_states(states, initial, starts, reverse):
    """states (heads, segments, D, M), what segments add: `starts` at their start, or end, from the initial one."""
    programs, segments, width, width_v = states.shape
    size = width * width_v
    _scan(
        programs * triton.cdiv(size, SCAN_EACH), launch_key((), states, initial), (states, initial, starts, segments),
        (size, SCAN_EACH, reverse), SCAN,
    )  # fmt: skip


def constants_of(q, k, v, relu):
    return (q.shape[2], q.shape[2] // k.shape[2], *widths(q, v), relu, precision(q.dtype))


def causal_flow_attention_fwd(q, k, v, mask, cu, sums, total, count, state, relu, clamp, eps, extra):
    (batch, length, heads, width), width_v = q.shape, v.shape[3]
    sequences = batch if cu is None else cu.shape[0] - 1
    # Rows behind the last sequence belong to no program.
    new = q.new_empty if cu is None else q.new_zeros
    y = new((batch, length, heads, width_v))
    flows = new((5, batch, heads, length), dtype=torch.float32)
    sums_final = flows.new_empty((sequences, heads, 4, width))
    total_final, state_final = flows.new_empty((sequences, heads)), flows.new_empty((sequences, heads, width, width_v))
    programs = sequences * heads
    if programs == 0:
        return y, flows, sums_final, total_final, state_final
    constants = constants_of(q, k, v, relu)
    segments, tile = causal_segments(programs, length), causal_config(q.dtype, constants[4:6], "fwd", 0)[0][0]
    tiles = max(1, triton.cdiv(length, tile))
    factors = flows.new_empty((2, batch, heads, length))
    before = flows.new_empty((programs, tiles, 4, width))
    firsts, seconds, thirds = (flows.new_empty((programs, segments, n)) for n in (2 * width, 2 * width, 1))
    counts = None if mask is None else q.new_empty((programs, segments), dtype=torch.int32)
    states, starts = (flows.new_empty((programs if segments > 1 else 0, segments, width, width_v)) for _ in range(2))
    strides = (*time_strides(q, k, v), *mask_strides(mask))
    key = launch_key(strides, q, k, v, mask, cu, sums, total, count, state)
    arguments = (
        q, k, v, y, flows, factors, before, firsts, seconds, thirds, counts, states, starts, mask, cu, sums, total,
        count, state, sums_final, total_final, state_final, length, length, batch, segments, tiles,
        min(clamp, CAUSAL_LIMIT), eps, extra, *strides,
    )  # fmt: skip
    for stage in (0,) if segments == 1 else (1, 2, 3, 4, 5):
        if stage == 5:
            scan_states(states, state, starts, False)
        config, registers = causal_config(q.dtype, constants[4:6], "fwd", stage)
        _fwd(programs * segments, key, arguments, (*constants, stage), config, maxnreg=registers)
    return y, flows, sums_final, total_final, state_final
