"""Retention on a grid: scores of all pairs, weighed in registers by e^(decay * Manhattan distance).

One kernel serves the result and the gradients: with a, b, c in the roles of queries, keys and values, the result is
q, k, v, dq is dout, v, k, dk is v, dout, q and dv is k, q, dout. A program owns BM rows and BV columns of one head.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, alignments

ALL, UPPER_LEFT, LOWER_RIGHT = (tl.constexpr(i) for i in range(3))  # as in flowattn/ops/grid_retention.py
NARROWEST = 16  # of a product's operands


@triton.jit
def _rows(base, first, offs, stride, length, cols, COLS: tl.constexpr, WIDE: tl.constexpr):
    row = first + offs
    inside = (row < length)[:, None] & (cols < COLS)[None, :]
    x = tl.load(base + (row.to(tl.int64) * stride)[:, None] + cols[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit(do_not_specialize=("length", "width"))
def grid_retention_kernel(
    a, b, c, decay, out, length, width,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh, stride_cb, stride_ct, stride_ch, scale,
    HEADS: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, GROUP_C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, VISIBLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    slices: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BM)
    piece, first = program % slices, program // slices % blocks * BM
    h = (program // (slices * blocks) % HEADS).to(tl.int64)
    batch = (program // (slices * blocks * HEADS)).to(tl.int64)
    a += batch * stride_ab + h // GROUP_A * stride_ah
    b += batch * stride_bb + h // GROUP_B * stride_bh
    c += batch * stride_cb + h // GROUP_C * stride_ch
    out += (batch * length * HEADS + h) * V
    offs, others, keys = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    cols = piece * BV + tl.arange(0, BV)
    g = tl.load(decay + h).to(tl.float32)
    rows = _rows(a, first, offs, stride_at, length, keys, K, WIDE)
    y, x = (first + offs) // width, (first + offs) % width
    begin, end = 0, length
    if VISIBLE == UPPER_LEFT:
        end = tl.minimum(length, first + BM)
    if VISIBLE == LOWER_RIGHT:
        begin = first // BN * BN
    acc = tl.zeros([BM, BV], tl.float32)
    for key in tl.range(begin, end, BN):
        other = key + others
        kb = _rows(b, key, others, stride_bt, length, keys, K, WIDE)
        vb = _rows(c, key, others, stride_ct, length, cols, V, WIDE)
        scores = tl.dot(rows, tl.trans(kb), input_precision=PRECISION)
        down, across = y[:, None] - (other // width)[None, :], x[:, None] - (other % width)[None, :]
        weights = tl.exp(g * (tl.abs(down) + tl.abs(across)).to(tl.float32))
        if VISIBLE == UPPER_LEFT:
            weights = tl.where((down >= 0) & (across >= 0), weights, 0.0)
        if VISIBLE == LOWER_RIGHT:
            weights = tl.where((down <= 0) & (across <= 0), weights, 0.0)
        scores *= weights * scale
        acc = tl.dot(scores.to(vb.dtype), vb, acc, input_precision=PRECISION)
    row = first + offs
    inside = (row < length)[:, None] & (cols < V)[None, :]
    pointers = out + (row.to(tl.int64) * (HEADS * V))[:, None] + cols[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


_kernel = Launcher(grid_retention_kernel)


def tile(dtype, width, value_width):
    """(BM, BN, BV, num_warps, num_stages) for padded widths; not measured yet."""
    if dtype == torch.bfloat16:
        return 64, 64, min(value_width, 128), 4, 2
    return 32, 32, min(value_width, 64), 4, 1


def grid_retention_fwd(a, b, c, decay, scale, height, width, visible):
    """float16 products run as tf32: the scores may exceed its range."""
    heads, (batch, length, _, wide), value_width = decay.shape[0], a.shape, c.shape[3]
    out = a.new_empty((batch, length, heads, value_width))
    block, value_block = (max(NARROWEST, triton.next_power_of_2(n)) for n in (wide, value_width))
    config = tile(a.dtype, block, value_block)
    strides = (*a.stride()[:3], *b.stride()[:3], *c.stride()[:3])
    groups = tuple(heads // x.shape[2] for x in (a, b, c))
    programs = batch * heads * triton.cdiv(length, config[0]) * triton.cdiv(value_width, config[2])
    if programs:
        precision = "tf32x3" if a.dtype == torch.float32 else "tf32"
        _kernel(
            programs,
            (a.dtype, strides, alignments(a, b, c, decay)),
            (a, b, c, decay, out, length, width, *strides, scale),
            (heads, *groups, wide, value_width, block, visible, a.dtype != torch.bfloat16, precision),
            config,
        )
    return out
