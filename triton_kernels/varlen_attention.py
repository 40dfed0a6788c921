"""Padding-free attention, forward. The backward pass is in varlen_attention_bwd.py.

One program owns one (tile of rows, head). Rows of other sequences and rows past the end load as zeros, so that
nothing outside the sequence, NaN included, reaches a product.
"""

import torch
import triton
import triton.language as tl

from . import attention_scores
from .attention_scores import LOG2E, at_head, keep_mask, modify
from .intervals import TILE, owned_tile, tile_interval, visible
from .launch import Launcher, alignments
from .varlen_attention_blocks import load_rows, scaled, store_rows
from .varlen_attention_configs import forward_config

# Sizes and window widths: compiled once for all values (see launch.py).
UNSPECIALIZED = ("batch", "total_q", "total_k", "steps", "left", "right", *attention_scores.UNSPECIALIZED)
UNREACHED = 1 << 30  # a window wider than any sequence; larger ones would not fit the kernels' int32

# float32 scales the queries before the product, so that the score of a forward pass, its LSE and the score of a
# backward pass agree to the last bit: a row that sees one key has P = 1 exactly. The half-precision types scale the
# product: score = factor * product. Softcap and biases need scores, so with them that product is made at once
# (attention_scores.modify) and factor is 1.


@triton.jit
def _fwd_keys(
    acc, top, total, q, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, unit, scores, head,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [begin, end). `top` is a product: P is exp2(unit * (product - top)), since
    the difference of large products is exact, and that of products rounded to other units would not be."""
    offs_m, offs_n, offs_d, offs_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    # Where a loop may have no round, ptxas waits for each product by itself (C7515: something else than a product
    # defines the sums between the first product and the wait behind the loop).
    if begin < end:
        for key in tl.range(begin, end, BN):
            kt = tl.trans(load_rows(k, key, stride_k, length, offs_n, offs_d, D, BD, MASKED))
            s = tl.dot(q, kt, input_precision=PRECISION)  # (BM, BN)
            if NEGATIVE:
                s = -s
            rows, keys = (row + offs_m)[:, None], (key + offs_n)[None, :]
            if scores.scale is not None:
                s, _ = modify(s, rows, keys, shift, scores, head)
            if MASKED:
                s = tl.where(visible(rows, keys, length, shift, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2((s - finite[:, None]) * unit)
            correction = tl.exp2((top - finite) * unit)
            total = total * correction + tl.sum(p, 1)
            acc = acc * correction[:, None]
            if scores.kept is not None:
                p = tl.where(keep_mask(row, key, head, BM, BN), p, 0.0)
            vb = load_rows(v, key, stride_v, length, offs_n, offs_dv, DV, BDV, MASKED)
            acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
            top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_fwd_kernel(
    q,  # (Tq, H, D)
    k,  # (Tk, Hkv, D)
    v,  # (Tk, Hkv, DV)
    out,  # (Tq, H, DV)
    lse,  # (H, Tq)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    scale, factor, left, right, scores, bias_q, bias_k, reach, threshold,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, NEGATIVE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b, h, row, start, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, tiles, batch, total_q, total_k, steps, HEADS, SELF, TILE, BM
    )
    if row >= length_q:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    q += tl.cast(start, tl.int64) * stride_qt + h * stride_qh
    k += tl.cast(start_k, tl.int64) * stride_kt + h // GROUP * stride_kh
    v += tl.cast(start_k, tl.int64) * stride_vt + h // GROUP * stride_vh
    head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
    offs_m, offs_d = tl.arange(0, BM), tl.arange(0, BD)
    q_tile = load_rows(q, row, stride_qt, length_q, offs_m, offs_d, D, BD, True)
    if PRECISION == "tf32x3":
        q_tile = scaled(q_tile, scale)
    # Never 0, which times the -inf of a masked score would be NaN.
    unit = tl.maximum(tl.abs(factor) * LOG2E, 1e-37)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, BM, length_k, shift, left, right, BN, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, top, total = _fwd_keys(
            acc, top, total, q_tile, k, v, stride_kt, stride_vt, begin, full_begin, row, length_k, shift, left, right,
            unit, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION, NEGATIVE,
        )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_begin, full_end, row, length_k, shift, left, right,
        unit, scores, head, D, DV, BM, BN, BD, BDV, False, HAS_LEFT, HAS_RIGHT, PRECISION, NEGATIVE,
    )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_end, end, row, length_k, shift, left, right,
        unit, scores, head, D, DV, BM, BN, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION, NEGATIVE,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    if scores.kept is not None:
        acc *= scores.kept
    row_lse = tl.where(empty, float("-inf"), top * tl.abs(factor) + tl.log(total))
    out += (tl.cast(start, tl.int64) * HEADS + h) * DV
    store_rows(out, row, HEADS * DV, length_q, offs_m, tl.arange(0, BDV), acc, DV)
    tl.store(lse + tl.cast(h, tl.int64) * total_q + start + row + offs_m, row_lse, mask=row + offs_m < length_q)


_fwd = Launcher(varlen_attention_fwd_kernel)


def slots(cu, tiles, total):
    """Tiles to launch: the plan's list, or a bound every set of lengths keeps (each sequence may end in a part)."""
    return tiles.shape[0] if tiles is not None else total // TILE + cu.shape[0]


def score_options(q, scale, options):
    """(scale, factor), and what attention_scores.score_arguments makes of the private op's options."""
    factor = 1.0 if q.dtype == torch.float32 else scale
    arguments = attention_scores.score_arguments(factor, *options)
    return (scale, factor if arguments[0] is attention_scores.NO_SCORES else 1.0), arguments


def constants(q, k, v, cu_q, cu_k, left, right, top_left):
    """The constexpr arguments GROUP .. TILE in the kernels' order, and whether both sides share cu_seqlens."""
    width, width_v = q.shape[2], v.shape[2]
    itself = cu_k.data_ptr() == cu_q.data_ptr() and q.shape[0] == k.shape[0]
    # One padded width for both: ptxas 12.8 mixes up the addresses of products whose operands are swizzled in different
    # ways (tests/triton_code.py); a value block narrower than the key block was wrong on an H100 (widths 40 and 8).
    block = max(16, triton.next_power_of_2(max(width, width_v)))
    # tf32x3: three tensor-core products, float32 accuracy
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    masks = (left >= 0, right >= 0, top_left)
    return (q.shape[1] // k.shape[1], width, width_v, block, block, itself, *masks, precision, TILE), itself


def varlen_attention_fwd(q, k, v, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, *options):
    (total_q, heads, _), total_k, batch = q.shape, k.shape[0], cu_q.shape[0] - 1
    out = q.new_empty((total_q, heads, v.shape[2]))
    lse = q.new_empty((heads, total_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    fixed, _ = constants(q, k, v, cu_q, cu_k, left, right, top_left)
    factors, (scores, score_values, score_key) = score_options(q, scale, options)
    config = forward_config(q.dtype, max(q.shape[2], v.shape[2]), max_k, left >= 0 or right >= 0, score_key is not None)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    _fwd(
        slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads,
        (q.dtype, strides, alignments(q, k, v, cu_q, cu_k, tiles), score_key),
        (
            q, k, v, out, lse, cu_q, cu_k, tiles, batch, total_q, total_k, (batch + 1).bit_length(), *strides,
            *factors, left, right, scores, *score_values,
        ),
        (heads, *fixed, factors[1] < 0),
        config,
    )  # fmt: skip
    return out, lse
