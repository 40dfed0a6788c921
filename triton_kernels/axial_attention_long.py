"""Attention along axes longer than 256: online softmax over key blocks, and a backward of two kernels (dQ by query
tile, dK and dV by key tile), with the loops of varlen_attention.py and its backward over lines of any stride.
"""

import torch
import triton
import triton.language as tl

from .attention_scores import LOG2E, NO_SCORES, at_head
from .axial_attention_configs import long_backward, long_forward
from .axial_lines import offset
from .intervals import tile_interval
from .launch import Launcher, alignments
from .varlen_attention import _fwd_keys
from .varlen_attention_blocks import load_rows, row_lse, scaled, store_rows, store_statistics
from .varlen_attention_bwd import _dkv_queries, _dq_keys, statistics_span

SIZE_ARGUMENTS = ("tiles", "n", "m", "shift")


@triton.jit
def _line(base, sequence, head, SIZES: tl.constexpr, STRIDES: tl.constexpr, RANK: tl.constexpr):
    """(pointer to the first row of a line, int64 stride of its rows)."""
    return base + offset(sequence, SIZES, STRIDES, RANK) + head * STRIDES[1], tl.full([], STRIDES[0], tl.int64)


@triton.jit
def _owned(tiles, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(line, sequence, head in its group, first row) of a program; the tiles of a line are neighbours."""
    program = tl.program_id(0)
    line = program // tiles
    return line, line // GROUP, line % GROUP, program % tiles * BLOCK


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_long_fwd_kernel(
    q, k, v, out, lse, tiles, n, m, shift, scale, factor, scores,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, LSE: tl.constexpr,
    RANK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    _, sequence, head, row = _owned(tiles, GROUP, BM)
    q, q_row = _line(q, sequence, head, SIZES, Q, RANK)
    k, k_row = _line(k, sequence, 0, SIZES, K, RANK)
    v, v_row = _line(v, sequence, 0, SIZES, V, RANK)
    out, out_row = _line(out, sequence, head, SIZES, OUT, RANK)
    lse, lse_row = _line(lse, sequence, head, SIZES, LSE, RANK)
    offs, channels = tl.arange(0, BM), tl.arange(0, BD)
    CAUSAL: tl.constexpr = MASK > 0
    qb = load_rows(q, row, q_row, n, offs, channels, D, BD, True)
    if PRECISION == "tf32x3":
        qb = scaled(qb, scale)
    unit = tl.maximum(tl.abs(factor) * LOG2E, 1e-37)  # never 0: see varlen_attention.py
    none = at_head(scores, 0, 0, 1, n, 0, 0, 0, 0, 1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, m, shift, 0, 0, BN, False, CAUSAL)
    acc, top, total = _fwd_keys(
        acc, top, total, qb, k, v, k_row, v_row, full_begin, full_end, row, m, shift, 0, 0, unit, scores, none, D,
        DV, BM, BN, BD, BD, False, False, CAUSAL, PRECISION, NEGATIVE,
    )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, qb, k, v, k_row, v_row, full_end, end, row, m, shift, 0, 0, unit, scores, none, D, DV,
        BM, BN, BD, BD, True, False, CAUSAL, PRECISION, NEGATIVE,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_rows(out, row, out_row, n, offs, channels, acc / total[:, None], DV)
    value = top * tl.abs(factor) + tl.log(total)
    tl.store(lse + (row + offs) * lse_row, tl.where(empty, float("-inf"), value), mask=row + offs < n)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_long_bwd_dq_kernel(
    q, k, v, out, do, dq, lse, dlse, statistics, tiles, n, m, shift, scale, factor, scores,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, DO: tl.constexpr,
    DQ: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """lse and dlse are (lines, n). Writes the statistics, (lines, n in whole blocks, 2): see store_statistics."""
    line, sequence, head, row = _owned(tiles, GROUP, BM)
    q, q_row = _line(q, sequence, head, SIZES, Q, RANK)
    k, k_row = _line(k, sequence, 0, SIZES, K, RANK)
    v, v_row = _line(v, sequence, 0, SIZES, V, RANK)
    out, out_row = _line(out, sequence, head, SIZES, OUT, RANK)
    do, do_row = _line(do, sequence, head, SIZES, DO, RANK)
    dq, dq_row = _line(dq, sequence, head, SIZES, DQ, RANK)
    values = tl.cast(line, tl.int64) * n
    offs, channels = tl.arange(0, BM), tl.arange(0, BD)
    inside = row + offs < n
    CAUSAL: tl.constexpr = MASK > 0
    qb = load_rows(q, row, q_row, n, offs, channels, D, BD, True)
    if PRECISION == "tf32x3":
        qb = scaled(qb, scale)
    dob = load_rows(do, row, do_row, n, offs, channels, DV, BD, True)
    ob = load_rows(out, row, out_row, n, offs, channels, DV, BD, True)
    lse_rows = row_lse(lse + values, row, offs, n)
    row_delta = tl.sum(dob.to(tl.float32) * ob.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + values + row + offs, mask=inside, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, m, shift, 0, 0, BN, False, CAUSAL)
    none, sums = at_head(scores, 0, 0, 1, n, 0, 0, 0, 0, 1), tl.zeros([1], tl.float32)
    if CAUSAL:
        acc, sums = _dq_keys(
            acc, sums, qb, dob, lse_rows, row_delta, k, v, k_row, v_row, begin, full_end, row, m, shift, 0, 0, factor,
            scores, none, D, DV, BM, BN, BD, BD, False, False, CAUSAL, PRECISION, 0,
        )  # fmt: skip
        begin = full_end
    acc, sums = _dq_keys(
        acc, sums, qb, dob, lse_rows, row_delta, k, v, k_row, v_row, begin, end, row, m, shift, 0, 0, factor, scores,
        none, D, DV, BM, BN, BD, BD, True, False, CAUSAL, PRECISION, 0,
    )  # fmt: skip
    store_statistics(statistics + tl.cast(line, tl.int64) * tl.cdiv(n, BM) * (2 * BM), row, lse_rows, row_delta, BM)
    store_rows(dq, row, dq_row, n, offs, channels, acc * scale, D)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def axial_attention_long_bwd_dkv_kernel(
    q, k, v, do, dk, dv, statistics, tiles, n, m, shift, scale, factor, scores,
    SIZES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DO: tl.constexpr, DK: tl.constexpr,
    DV_: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    _, sequence, _, key = _owned(tiles, 1, BN)
    k, k_row = _line(k, sequence, 0, SIZES, K, RANK)
    v, v_row = _line(v, sequence, 0, SIZES, V, RANK)
    dk, dk_row = _line(dk, sequence, 0, SIZES, DK, RANK)
    dv, dv_row = _line(dv, sequence, 0, SIZES, DV_, RANK)
    offs, channels = tl.arange(0, BN), tl.arange(0, BD)
    CAUSAL: tl.constexpr = MASK > 0
    kb = load_rows(k, key, k_row, m, offs, channels, D, BD, True)
    vb = load_rows(v, key, v_row, m, offs, channels, DV, BD, True)
    dk_sum = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BD], tl.float32)
    # Key j is seen by the queries from j - shift on: the causal interval turned round.
    begin, full_begin, full_end, end = tile_interval(key, BN, n, -shift, 0, 0, BM, CAUSAL, False)
    none = at_head(scores, 0, 0, 1, n, 0, 0, 0, 0, 1)
    for head in range(GROUP):
        q_line, q_row = _line(q, sequence, head, SIZES, Q, RANK)
        do_line, do_row = _line(do, sequence, head, SIZES, DO, RANK)
        line = statistics + (tl.cast(sequence, tl.int64) * GROUP + head) * tl.cdiv(n, BM) * (2 * BM)
        rest = begin
        if CAUSAL:
            dk_sum, dv_sum = _dkv_queries(
                dk_sum, dv_sum, kb, vb, q_line, do_line, line, q_row, do_row, begin, full_begin, key, n, m, shift, 0, 0,
                scale, factor, scores, none, D, DV, BM, BN, BD, BD, True, False, CAUSAL, PRECISION, SPAN,
            )  # fmt: skip
            dk_sum, dv_sum = _dkv_queries(
                dk_sum, dv_sum, kb, vb, q_line, do_line, line, q_row, do_row, full_begin, full_end, key, n, m, shift, 0,
                0, scale, factor, scores, none, D, DV, BM, BN, BD, BD, False, False, CAUSAL, PRECISION, SPAN,
            )  # fmt: skip
            rest = full_end
        dk_sum, dv_sum = _dkv_queries(
            dk_sum, dv_sum, kb, vb, q_line, do_line, line, q_row, do_row, rest, end, key, n, m, shift, 0, 0, scale,
            factor, scores, none, D, DV, BM, BN, BD, BD, True, False, CAUSAL, PRECISION, SPAN,
        )  # fmt: skip
    if PRECISION != "tf32x3":  # there the queries were scaled
        dk_sum *= scale
    store_rows(dk, key, dk_row, m, offs, channels, dk_sum, D)
    store_rows(dv, key, dv_row, m, offs, channels, dv_sum, DV)


_fwd = Launcher(axial_attention_long_fwd_kernel)
_dq = Launcher(axial_attention_long_bwd_dq_kernel)
_dkv = Launcher(axial_attention_long_bwd_dkv_kernel)


def _factors(call, scale):
    """(scale, factor of the products, no score options): see varlen_attention.py."""
    return scale, 1.0 if call.precision == "tf32x3" else scale, NO_SCORES


def forward(call, q, k, v, out, lse, scale):
    factors = _factors(call, scale)
    config = long_forward(q.dtype, call.block)
    tiles = triton.cdiv(call.n, config[0])
    _fwd(
        call.sequences * call.group * tiles,
        (q.dtype, alignments(q, k, v)),
        (q, k, v, out, lse, tiles, call.n, call.m, call.shift, *factors),
        (call.inner, *call.strides[:5], *call.common, factors[1] < 0),
        config,
    )


def backward(call, dout, dlse, q, k, v, out, lse, dq, dk, dv, scale):
    sq, sk, sv, sdo, sdq, sdk, sdv, sout, *_ = call.strides
    factors = _factors(call, scale)
    lse, dlse = (None if x is None else x.movedim(call.axis, -1).contiguous() for x in (lse, dlse))
    config = long_backward(q.dtype, call.block)
    lengths = (call.n, call.m, call.shift)
    tiles = triton.cdiv(call.n, config[0])
    lines = call.sequences * call.group
    # One block more, which load_statistics may read beyond the last.
    statistics = torch.empty((lines * tiles + 1) * config[0] * 2, dtype=torch.float32, device=q.device)
    _dq(
        lines * tiles,
        (q.dtype, alignments(q, k, v, dout, out, dq)),
        (q, k, v, out, dout, dq, lse, dlse, statistics, tiles, *lengths, *factors),
        (call.inner, sq, sk, sv, sout, sdo, sdq, *call.common),
        config,
    )
    tiles = triton.cdiv(call.m, config[1])
    _dkv(
        call.sequences * tiles,
        (q.dtype, alignments(q, k, v, dout, dk, dv)),
        (q, k, v, dout, dk, dv, statistics, tiles, *lengths, *factors),
        (call.inner, sq, sk, sv, sdo, sdk, sdv, *call.common, statistics_span(config)),
        config,
    )
