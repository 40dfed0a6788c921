"""Backward of axial_attention for lines of 65 to 256 in half precision: one kernel, a program owns one line.

Scores are transposed, keys by queries: probabilities and their gradients then enter the products for dV and dK from the
registers in which they were computed, and query tiles may be narrower than the 64 rows that a tensor-core product
needs of its first operand. That leaves room for dK and dV in registers, and for a second program on a processor.

The sums of dK and dV of more than 128 keys would leave few registers for anything else. Such lines go past in parts of
128 keys, one after the other: a part adds its share of dQ to what the parts before it stored, in the dtype of dQ, and
rowsum(P dP), which no part knows alone, is rowsum(dO O), written down by the first.
"""

import torch
import triton
import triton.language as tl

from .axial_lines import load_line, offset, store_line
from .launch import Launcher, alignments

LOG2E = tl.constexpr(1.4426950408889634)
SIZE_ARGUMENTS = ("n", "m", "shift")


@triton.jit
def _rows(
    base, sequence, head, start, BLOCK: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Pointers to BLOCK rows of a line from `start` on: one 64-bit base and, where they fit, 32-bit steps from it."""
    first = base + offset(sequence, SIZES, STRIDES, RANK) + head * STRIDES[1]
    first += tl.full([], start, tl.int64) * STRIDES[0]
    steps = tl.arange(0, BLOCK)
    if STRIDES[0] * BLOCK >= 2**31:
        steps = steps.to(tl.int64)
    return first + steps * STRIDES[0]


@triton.jit
def _load_values(rows, inside):
    """A value of each row. A plain load would take the layout of the scores, where every thread has a quarter of the
    rows and so many 64-bit pointers that registers run out; the sum over a single column keeps it from that."""
    return tl.sum(tl.load(rows[:, None], mask=inside[:, None], other=0.0), 1)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_wide_bwd_kernel(
    q, k, v, out, do, lse, dlse, delta, dq, dk, dv, n, m, shift, scale, unit,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, DO: tl.constexpr,
    LSE: tl.constexpr, DLSE: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DV_: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr,
    PARTS: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    blocks = ()  # loads of all parts are under way before the first is used
    for part in tl.static_range(PARTS):
        keys_inside = part * BK + tl.arange(0, BK) < m
        kb = load_line(_rows(k, sequence, 0, part * BK, BK, SIZES, K, RANK), keys_inside, D, BD)
        vb = load_line(_rows(v, sequence, 0, part * BK, BK, SIZES, V, RANK), keys_inside, DV, BD)
        blocks += ((kb, vb),)
    for part in tl.static_range(PARTS):
        if part > 0:
            tl.debug_barrier()  # what the part before stored is read by other threads
        keys = part * BK + tl.arange(0, BK)
        keys_inside = keys < m
        kb, vb = blocks[part]
        dk_sum = tl.zeros([BK, BD], tl.float32)
        dv_sum = tl.zeros([BK, BD], tl.float32)
        for head in range(GROUP):
            for start in range(0, n, BM):
                position = start + tl.arange(0, BM)
                inside = position < n
                qb = load_line(_rows(q, sequence, head, start, BM, SIZES, Q, RANK), inside, D, BD)
                dob = load_line(_rows(do, sequence, head, start, BM, SIZES, DO, RANK), inside, DV, BD)
                top = _load_values(_rows(lse, sequence, head, start, BM, SIZES, LSE, RANK), inside)
                empty = (top == float("-inf")) | (inside == 0)
                top = tl.where(empty, float("inf"), top * LOG2E)
                dq_rows = _rows(dq, sequence, head, start, BM, SIZES, DQ, RANK)
                if part > 0:
                    row_delta = _load_values(_rows(delta, sequence, head, start, BM, SIZES, LSE, RANK), inside)
                    dq_before = load_line(dq_rows, inside, D, BD)
                elif PARTS > 1:
                    ob = load_line(_rows(out, sequence, head, start, BM, SIZES, OUT, RANK), inside, DV, BD)
                    row_delta = tl.sum(ob.to(tl.float32) * dob.to(tl.float32), 1)
                s = tl.dot(kb, tl.trans(qb)) * unit
                p = tl.exp2(s - top[None, :])
                if MASK > 0:
                    p = tl.where(keys[:, None] <= position[None, :] + shift, p, 0.0)
                p = tl.where(keys_inside[:, None], p, 0.0)
                dp = tl.dot(vb, tl.trans(dob))
                if PARTS == 1:
                    row_delta = tl.sum(p * dp, 0)
                if part == 0:
                    if dlse is not None:
                        rows = _rows(dlse, sequence, head, start, BM, SIZES, DLSE, RANK)
                        row_delta -= tl.where(empty, 0.0, _load_values(rows, inside))
                    if PARTS > 1:
                        tl.store(_rows(delta, sequence, head, start, BM, SIZES, LSE, RANK), row_delta, mask=inside)
                ds = (p * (dp - row_delta[None, :])).to(qb.dtype)
                dv_sum = tl.dot(p.to(dob.dtype), dob, dv_sum)
                dk_sum = tl.dot(ds, qb, dk_sum)
                dq_tile = tl.trans(tl.dot(tl.trans(kb), ds)) * scale
                if part > 0:
                    dq_tile += dq_before
                store_line(dq_rows, inside, dq_tile, D, BD)
        dk_rows = _rows(dk, sequence, 0, part * BK, BK, SIZES, DK, RANK)
        store_line(dk_rows, keys_inside, dk_sum * scale, D, BD)
        dv_rows = _rows(dv, sequence, 0, part * BK, BK, SIZES, DV_, RANK)
        store_line(dv_rows, keys_inside, dv_sum, DV, BD)


_bwd = Launcher(axial_attention_wide_bwd_kernel)


def backward(call, config, dout, dlse, q, k, v, out, lse, dq, dk, dv, scale):
    sq, sk, sv, sdo, sdq, sdk, sdv, sout, slse, sdlse, _ = call.strides
    delta = torch.empty_like(lse) if config[0] > 1 else None
    _bwd(
        call.sequences,
        (q.dtype, alignments(q, k, v, out, dout, dlse, dq, dk, dv)),
        (q, k, v, out, dout, lse, dlse, delta, dq, dk, dv, call.n, call.m, call.shift, scale, call.unit),
        (call.inner, sq, sk, sv, sout, sdo, slse, sdlse, sdq, sdk, sdv, *call.common[:-1]),
        config,
    )
