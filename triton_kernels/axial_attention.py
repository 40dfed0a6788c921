"""Attention along one axis of a grid: launchers, and the kernels for axes up to 256.

A program owns all keys of one sequence, or of several short ones side by side in one tile with a block-diagonal mask:
scores of a row never leave the chip, softmax takes one pass, and the backward is one kernel that recomputes it, so
that it needs neither the output nor the LSE. Longer axes: axial_attention_long.py. Everything is on grid axis 0.
"""

import math

import torch
import triton
import triton.language as tl

from flowattn.reference.axial_attention import rotate

from . import axial_attention_long, axial_attention_wide
from .axial_attention_configs import padded_width, short, wide_backward
from .axial_lines import batch_axes, bias_at, channels_at, line_pointers, load_line, merged, store_line, values_at
from .launch import Launcher, alignments

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(first, start, total, length, ROWS: tl.constexpr, PAD: tl.constexpr, SEQS: tl.constexpr):
    """(sequence, position, whether both exist) of ROWS rows from row `start` of a program's first sequence on."""
    rows = start + tl.arange(0, ROWS)
    if SEQS == 1:
        sequence, position, inside = first, rows, rows < length
    else:
        sequence, position = first + rows // PAD, rows % PAD
        inside = (position < length) & (sequence < total)
    return sequence, position, inside


@triton.jit
def _softmax(
    qb, kb, bias, sequence, head, position, inside, keys, keys_inside, start, shift, unit,
    SIZES: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, MASK: tl.constexpr, PAD_Q: tl.constexpr,
    PAD_K: tl.constexpr, SEQS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(probabilities (BM, BK), row maximum, row sum, whether a row sees no key) of one query tile."""
    if PRECISION == "tf32x3":  # scaled first: a product here could fuse with s - top, and s - top of the top not be 0
        s = tl.dot(qb * unit, tl.trans(kb), input_precision=PRECISION)
    else:
        s = tl.dot(qb, tl.trans(kb), input_precision=PRECISION) * unit
    keep = keys_inside[None, :]  # rows outside get probabilities that nothing uses
    if bias is not None:
        rows = line_pointers(bias, sequence, head, position, SIZES, BIAS, RANK)
        there = keep & inside[:, None]
        added = tl.load(rows[:, None] + keys[None, :] * BIAS[2 + RANK], mask=there, other=0.0).to(tl.float32)
        s += added if PRECISION == "tf32x3" else added * LOG2E
    if MASK > 0:
        keep = keep & (keys[None, :] <= position[:, None] + shift)
    if SEQS > 1:
        own, other = (start + tl.arange(0, BM)) // PAD_Q, tl.arange(0, BK) // PAD_K
        keep = keep & (own[:, None] == other[None, :])
    s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(s - top[:, None]) if PRECISION == "tf32x3" else tl.exp2(s - top[:, None])
    total = tl.sum(p, 1)
    empty = total == 0.0
    return p, top, tl.where(empty, 1.0, total), empty


SIZE_ARGUMENTS = ("total", "n", "m", "shift", "lines", "parts")


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_fwd_kernel(
    q, k, v, out, lse, bias, total, n, m, shift, unit,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, LSE: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, PAD_Q: tl.constexpr, PAD_K: tl.constexpr, SEQS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * SEQS
    BK: tl.constexpr = SEQS * PAD_K
    sequence, keys, keys_inside = _places(first, 0, total, m, BK, PAD_K, SEQS)
    kb = load_line(line_pointers(k, sequence, 0, keys, SIZES, K, RANK), keys_inside, D, BD)
    vb = load_line(line_pointers(v, sequence, 0, keys, SIZES, V, RANK), keys_inside, DV, BD)
    for head in range(GROUP):
        for start in range(0, SEQS * PAD_Q, BM):
            sequence, position, inside = _places(first, start, total, n, BM, PAD_Q, SEQS)
            qb = load_line(line_pointers(q, sequence, head, position, SIZES, Q, RANK), inside, D, BD)
            p, top, row_sum, empty = _softmax(
                qb, kb, bias, sequence, head, position, inside, keys, keys_inside, start, shift, unit,
                SIZES, BIAS, RANK, MASK, PAD_Q, PAD_K, SEQS, BM, BK, PRECISION,
            )  # fmt: skip
            acc = tl.dot(p.to(vb.dtype), vb, input_precision=PRECISION) / row_sum[:, None]
            store_line(line_pointers(out, sequence, head, position, SIZES, OUT, RANK), inside, acc, DV, BD)
            value = (top if PRECISION == "tf32x3" else top * LN2) + tl.log(row_sum)
            value = tl.where(empty, float("-inf"), value)
            tl.store(line_pointers(lse, sequence, head, position, SIZES, LSE, RANK), value, mask=inside)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_bwd_kernel(
    q, k, v, do, dlse, bias, dq, dk, dv, dbias, total, n, m, shift, scale, unit, lines, parts,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DO: tl.constexpr, DLSE: tl.constexpr,
    BIAS: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DV_: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, DBIAS_GROUP: tl.constexpr, PAD_Q: tl.constexpr, PAD_K: tl.constexpr, SEQS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Program `parts` * slot + part takes its share of the `lines` sequences that share a slot of the bias, in order,
    and adds their gradients of the bias in memory that is its own: dbias (programs, 1 or GROUP, n, m)."""
    program = tl.program_id(0)
    begin, end = 0, 1
    if dbias is not None:
        begin, end = lines * (program % parts) // parts, lines * (program % parts + 1) // parts
    BK: tl.constexpr = SEQS * PAD_K
    for line in tl.range(begin, end):
        first = program * SEQS if dbias is None else program // parts * lines + line
        key_sequence, keys, keys_inside = _places(first, 0, total, m, BK, PAD_K, SEQS)
        kb = load_line(line_pointers(k, key_sequence, 0, keys, SIZES, K, RANK), keys_inside, D, BD)
        vb = load_line(line_pointers(v, key_sequence, 0, keys, SIZES, V, RANK), keys_inside, DV, BD)
        dk_sum = tl.zeros([BK, BD], tl.float32)
        dv_sum = tl.zeros([BK, BD], tl.float32)
        for head in range(GROUP):
            for start in range(0, SEQS * PAD_Q, BM):
                sequence, position, inside = _places(first, start, total, n, BM, PAD_Q, SEQS)
                qb = load_line(line_pointers(q, sequence, head, position, SIZES, Q, RANK), inside, D, BD)
                dob = load_line(line_pointers(do, sequence, head, position, SIZES, DO, RANK), inside, DV, BD)
                p, top, row_sum, empty = _softmax(
                    qb, kb, bias, sequence, head, position, inside, keys, keys_inside, start, shift, unit,
                    SIZES, BIAS, RANK, MASK, PAD_Q, PAD_K, SEQS, BM, BK, PRECISION,
                )  # fmt: skip
                p = p / row_sum[:, None]
                dp = tl.dot(dob, tl.trans(vb), input_precision=PRECISION)
                delta = tl.sum(p * dp, 1)
                if dlse is not None:
                    rows = line_pointers(dlse, sequence, head, position, SIZES, DLSE, RANK)
                    delta -= tl.load(rows, mask=inside & (empty == 0), other=0.0)
                ds = p * (dp - delta[:, None])
                dv_sum = tl.dot(tl.trans(p.to(dob.dtype)), dob, dv_sum, input_precision=PRECISION)
                dk_sum = tl.dot(tl.trans(ds.to(qb.dtype)), qb, dk_sum, input_precision=PRECISION)
                dq_tile = tl.dot(ds.to(kb.dtype), kb, input_precision=PRECISION) * scale
                store_line(line_pointers(dq, sequence, head, position, SIZES, DQ, RANK), inside, dq_tile, D, BD)
                if dbias is not None:
                    part = tl.cast(program, tl.int64) * DBIAS_GROUP + (head if DBIAS_GROUP > 1 else 0)
                    rows = dbias + (part * n + position) * m
                    keep = inside[:, None] & keys_inside[None, :]
                    sums = rows[:, None] + keys[None, :]
                    tl.store(sums, tl.load(sums, mask=keep, other=0.0) + ds, mask=keep)
        store_line(line_pointers(dk, key_sequence, 0, keys, SIZES, DK, RANK), keys_inside, dk_sum * scale, D, BD)
        store_line(line_pointers(dv, key_sequence, 0, keys, SIZES, DV_, RANK), keys_inside, dv_sum, DV, BD)


_fwd = Launcher(axial_attention_fwd_kernel)
_bwd = Launcher(axial_attention_bwd_kernel)


class Call:
    """Sizes, factors and constants of a call, and its sequences in all `tensors`, each an entry of axial_lines."""

    def __init__(self, q, k, v, axis, scale, mask, tensors, order=None):
        self.group, self.axis = q.shape[-2] // k.shape[-2], axis
        self.n, self.m, self.width, self.width_v = q.shape[axis], k.shape[axis], q.shape[-1], v.shape[-1]
        sizes = batch_axes(k, axis)
        self.sequences = math.prod(sizes)
        tensors = [((0, 0), (0,) * len(sizes)) if x is None else x for x in tensors]
        self.inner, leads = merged(sizes, tuple(lead for _, lead in tensors), order)
        self.rank = len(self.inner) + 1
        self.strides = tuple((*own[:2], *lead, *own[2:]) for (own, _), lead in zip(tensors, leads))
        self.shift = self.m - self.n - (mask == 2)
        # float32 works in natural units, the half-precision types in those of log2(e), which spares a product a score.
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.unit = scale if self.precision == "tf32x3" else scale * LOG2E.value
        self.block = padded_width(self.width, self.width_v)
        self.common = (self.rank, self.group, self.width, self.width_v, self.block, mask, self.precision)


def axial_attention_fwd(q, k, v, bias, cos, sin, axis, scale, mask, interleaved):
    q, k = _turned(q, k, cos, sin, axis, interleaved)
    out, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    group = q.shape[-2] // k.shape[-2]
    tensors = [channels_at(x, axis, g) for x, g in ((q, group), (k, 1), (v, 1), (out, group))]
    call = Call(q, k, v, axis, scale, mask, (*tensors, values_at(lse, axis, group), bias_at(bias, group)))
    config = short(q.dtype, call.block, call.n, call.m, biased=bias is not None)
    if config is None:
        axial_attention_long.forward(call, q, k, v, out, lse, scale)
        return out, lse
    _fwd(
        triton.cdiv(call.sequences, config[2]),
        (q.dtype, None if bias is None else bias.dtype, alignments(q, k, v, bias)),
        (q, k, v, out, lse, bias, call.sequences, call.n, call.m, call.shift, call.unit),
        (call.inner, *call.strides, *call.common),
        config,
    )
    return out, lse


def axial_attention_bwd(
    dout, dlse, q, k, v, out, lse, bias, cos, sin, axis, scale, mask, interleaved, want_dbias
):  # fmt: skip
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    options = (bias, cos, sin, axis, scale, mask, interleaved, want_dbias)
    return dq, dk, dv, _backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, *options)


def axial_attention_qkvpacked_bwd(
    dout, dlse, qkv, out, lse, bias, cos, sin, axis, scale, mask, interleaved, want_dbias
):  # fmt: skip
    dqkv = qkv.new_empty(qkv.shape)
    options = (bias, cos, sin, axis, scale, mask, interleaved, want_dbias)
    return dqkv, _backward(dout, dlse, *qkv.unbind(-3), out, lse, *dqkv.unbind(-3), *options)


def _backward(
    dout, dlse, q, k, v, out, lse, dq, dk, dv, bias, cos, sin, axis, scale, mask, interleaved, want_dbias
):  # fmt: skip
    """Writes dq, dk and dv; returns the gradient of the bias, empty if it is not wanted."""
    want_dbias = want_dbias and bias is not None
    dbias = lse.new_zeros(bias.shape if want_dbias else 0)
    if q.numel() == 0 or k.numel() == 0:
        for x in (dq, dk, dv):
            x.zero_()
        return dbias
    q, k = _turned(q, k, cos, sin, axis, interleaved)
    group = q.shape[-2] // k.shape[-2]
    channels = ((q, group), (k, 1), (v, 1), (dout, group), (dq, group), (dk, 1), (dv, 1), (out, group))
    tensors = [channels_at(x, axis, g) for x, g in channels]
    tensors += [values_at(x, axis, group) for x in (lse, dlse)] + [bias_at(bias, group)]
    sharing = Sharing(q, k, axis, bias) if want_dbias else None
    call = Call(q, k, v, axis, scale, mask, tensors, sharing.order if sharing else None)
    wide = None if bias is not None else wide_backward(q.dtype, call.block, call.n, call.m)
    config = short(q.dtype, call.block, call.n, call.m, backward=True, alone=want_dbias)
    if wide is not None:
        axial_attention_wide.backward(call, wide, dout, dlse, q, k, v, out, lse, dq, dk, dv, scale)
    elif config is not None:
        dbias = _one_kernel(call, config, sharing, dout, dlse, q, k, v, dq, dk, dv, bias, scale, dbias)
    else:
        axial_attention_long.backward(call, dout, dlse, q, k, v, out, lse, dq, dk, dv, scale)
    if cos is not None:
        for x in (dq, dk):
            x.copy_(rotate(x.float(), cos, sin, interleaved, inverse=True, axis=axis))
    return dbias


def _one_kernel(call, config, sharing, dout, dlse, q, k, v, dq, dk, dv, bias, scale, dbias):
    (sq, sk, sv, sdo, sdq, sdk, sdv, _, _, sdlse, sbias) = call.strides
    sums, programs, lines, parts, group = None, triton.cdiv(call.sequences, config[2]), 1, 1, 1
    if sharing:
        lines, parts, group = sharing.lines, sharing.parts, sharing.group
        programs = sharing.slots * parts
        sums = dbias.new_zeros((sharing.slots, parts, group, call.n, call.m))
    _bwd(
        programs,
        (q.dtype, None if bias is None else bias.dtype, alignments(q, k, v, dout, dlse, bias, dq, dk, dv)),
        (
            q, k, v, dout, dlse, bias, dq, dk, dv, sums, call.sequences, call.n, call.m, call.shift, scale, call.unit,
            lines, parts,
        ),
        (call.inner, sq, sk, sv, sdo, sdlse, sbias, sdq, sdk, sdv, *call.common, group),
        config,
    )  # fmt: skip
    return sums.sum(1).reshape(dbias.shape) if sharing else dbias


PARTS = 256  # programs that share the sequences of a broadcast bias, each with a partial sum of its gradient


class Sharing:
    """Which sequences share an element of the bias, and the order that lets them follow one another."""

    def __init__(self, q, k, axis, bias):
        sizes = batch_axes(k, axis)
        heads = bias.shape[-3] > 1  # whether the bias has heads of its own
        broadcast = [size == 1 for size in bias.shape[:-3]] + [not heads]
        own, shared = ([a for a in range(len(sizes)) if broadcast[a] == which] for which in (False, True))
        self.order = (*own, *shared)
        self.slots, self.lines = (math.prod(sizes[a] for a in axes) for axes in (own, shared))
        self.parts = max(1, min(self.lines, PARTS // self.slots))
        self.group = q.shape[-2] // k.shape[-2] if heads else 1


def _turned(q, k, cos, sin, axis, interleaved):
    """q and k under rotary position tables."""
    if cos is None:
        return q, k
    return (rotate(x.float(), cos, sin, interleaved, axis=axis).to(x.dtype) for x in (q, k))
