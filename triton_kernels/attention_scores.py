"""What attention does to its scores besides scaling and masking: softcap, ALiBi, dense and relative bias, dropout.

Every option that a call leaves out is None in `Scores`, and then no instruction of it is compiled. The formulas are in
docs/design.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flowattn.reference.dropout import dropout_threshold

from .launch import Launcher, alignments

LOG2E = tl.constexpr(1.4426950408889634)
# Run-time integers of the options that change from call to call: compiled once for all values (see launch.py).
UNSPECIALIZED = ("bias_q", "bias_k", "reach", "threshold")
SPREAD = 1024  # distances of one program of relative_bias_spread_kernel


class Scores(NamedTuple):
    """The options of a call, a kernel argument. Strides of None belong to options that are off."""

    scale: object  # turns products into scores, 1 where the queries are scaled before the product; None without options
    softcap: object
    inverse_softcap: object
    slopes: object  # (1 or B, H) float32
    slope_batch: object
    slope_head: object
    bias: object  # (1 or B, 1 or H, bias_q, bias_k)
    bias_batch: object
    bias_head: object
    bias_row: object
    bias_key: object
    by_distance: object  # (H, 2 * reach + 1) float32: the relative bias of each distance -reach..reach
    lut: object  # (2 * reach + 1,): the bucket of each
    rng: object  # (2,) int64: seed and offset
    kept: object  # 1 / (1 - dropout_p)


class Head(NamedTuple):
    """The numbers of one head of one sequence, 0 where `Scores` has None: a jit function cannot return None."""

    slope: object
    bias: object  # offset
    rows: object  # of the bias: none beyond are read
    keys: object
    by_distance: object  # offset of distance 0
    reach: object
    seed: object
    offset: object
    stream: object
    threshold: object


@triton.jit
def at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS: tl.constexpr):
    """Head of query head h in sequence b; b = batch is the unused tail of the packed rows."""
    slope, bias, seed, offset = 0.0, tl.cast(0, tl.int64), tl.cast(0, tl.int64), 0
    if scores.slopes is not None:
        slope = tl.load(scores.slopes + b * scores.slope_batch + h * scores.slope_head, mask=b < batch, other=0.0)
    if scores.bias is not None:
        bias = tl.cast(b, tl.int64) * scores.bias_batch + tl.cast(h, tl.int64) * scores.bias_head
    if scores.kept is not None:
        seed = tl.load(scores.rng)
        offset = tl.load(scores.rng + 1).to(tl.int32)
    return Head(
        slope, bias, tl.minimum(bias_q, length_q), bias_k, tl.cast(h, tl.int64) * (2 * reach + 1) + reach, reach,
        seed, offset, b * HEADS + h, tl.cast(threshold, tl.uint32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _tanh(x):
    """Within 2 ulp. 1 - 2 / (exp(2x) + 1) alone would lose the digits of small x."""
    y = x * x
    # Minimax fit of (tanh(x) / x - 1) / x^2 on |x| <= 0.625, relative error of tanh 5e-9.
    p = y * -0.005704984069 + 0.02063908428
    p = p * y - 0.05373971537
    p = p * y + 0.1333144158
    p = p * y - 0.3333328068
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, x + x * (y * p), tl.where(x < 0.0, -far, far))


@triton.jit
def modify(products, rows, keys, shift, scores, head):
    """(scores, t) of a block of products q . k; t is the tanh of the softcap, whose derivative is 1 - t^2.

    rows and keys are index blocks that broadcast to the products. Keys beyond the sequence get any finite score.
    """
    z = products * scores.scale
    t = z
    if scores.softcap is not None:
        t = _tanh(z * scores.inverse_softcap)
        z = t * scores.softcap
    if scores.slopes is not None:
        z -= head.slope * tl.abs(keys - rows - shift).to(tl.float32)
    if scores.by_distance is not None:
        distance = tl.minimum(tl.maximum(keys - rows - shift, -head.reach), head.reach)
        z += tl.load(scores.by_distance + head.by_distance + distance)
    if scores.bias is not None:
        pointers = scores.bias + head.bias + rows.to(tl.int64) * scores.bias_row + keys.to(tl.int64) * scores.bias_key
        inside = (rows < head.rows) & (keys < head.keys)
        z += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return z, t


@triton.jit
def dropout_words(row, key, head, BM: tl.constexpr, BN: tl.constexpr):
    """The word of each score (BM, BN) from query `row` and key `key` on, a multiple of 4 (csrc/common/philox.h)."""
    group = (key // 4 + tl.arange(0, BN // 4))[None, :]
    i = (row + tl.arange(0, BM))[:, None]
    x, y, z, w = tl.philox(head.seed, group, i, head.stream, head.offset)
    return tl.interleave(tl.interleave(x, z), tl.interleave(y, w))  # word j % 4 of group j // 4


@triton.jit
def keep_mask(row, key, head, BM: tl.constexpr, BN: tl.constexpr):
    """Which probabilities of the block dropout keeps."""
    return dropout_words(row, key, head, BM, BN) >= head.threshold


@triton.jit
def add_by_bucket(sums, ds, row, key, shift, lut, reach, BM: tl.constexpr, BN: tl.constexpr, BUCKETS: tl.constexpr):
    """sums (BUCKETS,) plus the elements of ds (BM, BN) in the bucket of their distance.

    A chunk of diagonals at a time is turned upright and summed, since a diagonal has one distance and so one bucket;
    then the sums are sorted into buckets.
    """
    # Both blocks of a chunk, (BM, CHUNK) and (CHUNK, BUCKETS), must stay small enough for registers.
    CHUNK: tl.constexpr = max(2, min(32, 16384 // BUCKETS))
    offs_m = tl.arange(0, BM)[:, None]
    for first in tl.range(0, BM + BN, CHUNK):
        diagonal = first + tl.arange(0, CHUNK) - (BM - 1)  # key minus row within the block
        column = diagonal[None, :] + offs_m
        inside = (column >= 0) & (column < BN)
        upright = tl.gather(ds, tl.where(inside, column, 0), 1)
        by_distance = tl.sum(tl.where(inside, upright, 0.0), 0)
        distance = diagonal + key - row - shift
        bucket = tl.load(lut + reach + tl.minimum(tl.maximum(distance, -reach), reach)).to(tl.int32)
        mine = bucket[:, None] == tl.arange(0, BUCKETS)[None, :]
        sums += tl.sum(tl.where(mine, by_distance[:, None], 0.0), 0)
    return sums


@triton.jit(do_not_specialize=("span", "buckets"))
def relative_bias_spread_kernel(
    table,  # (buckets, H)
    lut, by_distance,  # (span,), (H, span)
    span, buckets, stride_bucket, stride_head, BLOCK: tl.constexpr,
):  # fmt: skip
    """by_distance[h, d] = table[lut[d], h]: one load a score instead of two that wait for each other."""
    blocks = tl.cdiv(span, BLOCK)
    h = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    bucket = tl.load(lut + d, mask=d < span, other=0).to(tl.int32)
    bucket = tl.minimum(tl.maximum(bucket, 0), buckets - 1)  # on a GPU nobody has checked the values
    value = tl.load(table + bucket * stride_bucket + h * stride_head, mask=d < span, other=0.0)
    tl.store(by_distance + tl.cast(h, tl.int64) * span + d, value.to(tl.float32), mask=d < span)


NO_SCORES = Scores(*[None] * len(Scores._fields))
_spread = Launcher(relative_bias_spread_kernel)


def _by_distance(table, lut):
    (buckets, heads), span = table.shape, lut.shape[0]
    by_distance = table.new_empty((heads, span), dtype=torch.float32)
    _spread(
        heads * triton.cdiv(span, SPREAD),
        (table.dtype, lut.dtype, table.stride(), alignments(table, lut)),
        (table, lut, by_distance, span, buckets, *table.stride()),
        (SPREAD,),
        (4, 1),
    )
    return by_distance


def score_arguments(scale, softcap=0.0, slopes=None, bias=None, table=None, lut=None, dropout_p=0.0, rng=None):
    """(Scores, the values of UNSPECIALIZED, what both change in the compiled code) from the options of a private op.

    scale: what turns the kernel's products into scores.
    """
    if softcap == 0 and slopes is None and bias is None and table is None and rng is None:
        return NO_SCORES, (0, 0, 0, 0), None
    slope_strides, bias_strides, extents, reach, threshold = (None,) * 2, (None,) * 4, (0, 0), 0, 0
    if slopes is not None:
        slope_strides = (slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))
    if bias is not None:
        shared = (0 if size == 1 else stride for size, stride in zip(bias.shape[:2], bias.stride()))
        bias_strides, extents = (*shared, *bias.stride()[2:]), bias.shape[2:]
    by_distance = None
    if table is not None:
        lut = lut.contiguous()
        by_distance, reach = _by_distance(table, lut), lut.shape[0] // 2
    if rng is not None:
        threshold = dropout_threshold(dropout_p)
        threshold -= threshold >> 31 << 32  # the same bits as an int32
    capped = (softcap, 1 / softcap) if softcap > 0 else (None, None)
    kept = None if rng is None else 1 / (1 - dropout_p)
    scores = Scores(
        scale, *capped, slopes, *slope_strides, bias, *bias_strides, by_distance, lut if table is not None else None,
        rng, kept,
    )  # fmt: skip
    dtypes = (None if bias is None else bias.dtype, None if table is None else lut.dtype)
    key = (softcap > 0, slope_strides, bias_strides, dtypes, alignments(slopes, bias, lut, rng))
    return scores, (*extents, reach, threshold), key
