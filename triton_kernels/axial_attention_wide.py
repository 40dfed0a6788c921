"""Backward of axial_attention for lines of 65 to 256 in half precision: one kernel, a program owns one line's keys.

Scores are transposed, keys by queries: probabilities and their gradients then enter the products for dV and dK from the
registers in which they were computed, and query tiles may be narrower than the 64 rows that a tensor-core product
needs of its first operand. That leaves room for dK and dV in registers, and for a second program on a processor.
"""

import triton
import triton.language as tl

from .axial_lines import line_pointers, load_line, store_line
from .launch import Launcher, alignments

LOG2E = tl.constexpr(1.4426950408889634)
SIZE_ARGUMENTS = ("n", "m", "shift")


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_wide_bwd_kernel(
    q, k, v, do, lse, dlse, dq, dk, dv, n, m, shift, scale, unit,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DO: tl.constexpr, LSE: tl.constexpr,
    DLSE: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DV_: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    keys = tl.arange(0, BK)
    keys_inside = keys < m
    kb = load_line(line_pointers(k, sequence, 0, keys, SIZES, K, RANK), keys_inside, D, BD)
    vb = load_line(line_pointers(v, sequence, 0, keys, SIZES, V, RANK), keys_inside, DV, BD)
    dk_sum = tl.zeros([BK, BD], tl.float32)
    dv_sum = tl.zeros([BK, BD], tl.float32)
    for head in range(GROUP):
        for start in range(0, n, BM):
            position = start + tl.arange(0, BM)
            inside = position < n
            qb = load_line(line_pointers(q, sequence, head, position, SIZES, Q, RANK), inside, D, BD)
            dob = load_line(line_pointers(do, sequence, head, position, SIZES, DO, RANK), inside, DV, BD)
            top = tl.load(line_pointers(lse, sequence, head, position, SIZES, LSE, RANK), mask=inside, other=0.0)
            empty = (top == float("-inf")) | (inside == 0)
            top = tl.where(empty, float("inf"), top * LOG2E)
            s = tl.dot(kb, tl.trans(qb)) * unit
            p = tl.exp2(s - top[None, :])
            if MASK > 0:
                p = tl.where(keys[:, None] <= position[None, :] + shift, p, 0.0)
            p = tl.where(keys_inside[:, None], p, 0.0)
            dp = tl.dot(vb, tl.trans(dob))
            delta = tl.sum(p * dp, 0)
            if dlse is not None:
                rows = line_pointers(dlse, sequence, head, position, SIZES, DLSE, RANK)
                delta -= tl.load(rows, mask=empty == 0, other=0.0)
            ds = (p * (dp - delta[None, :])).to(qb.dtype)
            dv_sum = tl.dot(p.to(dob.dtype), dob, dv_sum)
            dk_sum = tl.dot(ds, qb, dk_sum)
            dq_tile = tl.trans(tl.dot(tl.trans(kb), ds)) * scale
            store_line(line_pointers(dq, sequence, head, position, SIZES, DQ, RANK), inside, dq_tile, D, BD)
    store_line(line_pointers(dk, sequence, 0, keys, SIZES, DK, RANK), keys_inside, dk_sum * scale, D, BD)
    store_line(line_pointers(dv, sequence, 0, keys, SIZES, DV_, RANK), keys_inside, dv_sum, DV, BD)


_bwd = Launcher(axial_attention_wide_bwd_kernel)


def backward(call, config, dout, dlse, q, k, v, lse, dq, dk, dv, scale):
    sq, sk, sv, sdo, sdq, sdk, sdv, _, slse, sdlse, _ = call.strides
    _bwd(
        call.sequences,
        (q.dtype, alignments(q, k, v, dout, dlse, dq, dk, dv)),
        (q, k, v, dout, lse, dlse, dq, dk, dv, call.n, call.m, call.shift, scale, call.unit),
        (call.inner, sq, sk, sv, sdo, slse, sdlse, sdq, sdk, sdv, *call.common[:-1]),
        config,
    )
