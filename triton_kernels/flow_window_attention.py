"""Attention of windows of consecutive steps over a static cache, for sweeps: without a matrix of all scores.

Program: (row, head, tile of the window). Row i of a window that starts at slot f sees the slots 0 .. f + i. Those
before f are final and seen by all. Those of the window belong to iterates that may overflow, and a probability of 0
times an infinity is NaN: there, keys that are not finite are taken out of the products, and rows
that do see one become NaN.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, alignments


@triton.jit
def _is_bad(x):
    """(BN, D) -> (BN): 1 where an entry is not finite."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1)


@triton.jit
def _merge(most, total, acc, scores, v, PRECISION: tl.constexpr):
    """Online softmax to the base 2. A row that sees a NaN keeps its pivot and becomes NaN through the sums."""
    higher = tl.maximum(most, tl.max(scores, 1))
    p, old = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return higher, total * old + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=("width", "used", "slots"))
def flow_window_attention_kernel(
    q, keys, values, scale, first, out, width, used, slots, stride_qs, stride_qn, stride_qh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q (S, n, H, d) by strides; keys, values (S, Hkv, used, d) with `slots` for a head; first (S,); out
    (S, n, H d)."""
    tiles = tl.cdiv(width, BM)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % HEADS
    row = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    at, lane = tl.arange(0, D), tl.arange(0, BN)
    i = tile * BM + tl.arange(0, BM)
    origin = tl.load(first + row).to(tl.int32)
    end = tl.minimum(origin + tl.minimum(tile * BM + BM, width), used)
    q += row * stride_qs + head * stride_qh
    query = tl.load(q + (i * stride_qn)[:, None] + at[None, :], mask=(i < width)[:, None], other=0.0)
    query = query.to(keys.dtype.element_ty)
    unit = tl.load(scale + row) * 1.4426950408889634
    base = (row * KV_HEADS + head // (HEADS // KV_HEADS)) * slots * D
    # Finite, for the rows of a tile that see nothing of a block yet.
    most = tl.full([BM], -1e38, tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    before = tl.minimum(origin, end)
    for start in tl.range(0, before, BN):
        key = start + lane
        offsets = base + (key * D)[:, None] + at[None, :]
        k = tl.load(keys + offsets, mask=(key < before)[:, None], other=0.0)
        v = tl.load(values + offsets, mask=(key < before)[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * unit
        scores = tl.where((key < before)[None, :], scores, float("-inf"))
        most, total, acc = _merge(most, total, acc, scores, v, PRECISION)
    for start in tl.range(before, end, BN):
        key = start + lane
        offsets = base + (key * D)[:, None] + at[None, :]
        k = tl.load(keys + offsets, mask=(key < end)[:, None], other=0.0)
        v = tl.load(values + offsets, mask=(key < end)[:, None], other=0.0)
        bad = (_is_bad(k) | _is_bad(v)) > 0
        k, v = tl.where(bad[:, None], 0.0, k).to(k.dtype), tl.where(bad[:, None], 0.0, v).to(v.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * unit
        scores = tl.where(bad[None, :], float("nan"), scores)
        seen = (key[None, :] <= origin + i[:, None]) & (key < end)[None, :]
        most, total, acc = _merge(most, total, acc, tl.where(seen, scores, float("-inf")), v, PRECISION)
    to = ((row * width + i) * HEADS + head)[:, None] * D + at[None, :]
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=(i < width)[:, None])


_kernel = Launcher(flow_window_attention_kernel)


def tile(dtype, head_dim):
    """(BM, BN, num_warps, num_stages); not measured yet."""
    if dtype == torch.float32:
        return (32, 32, 4, 1)
    return (64, 64, 4, 2) if head_dim <= 128 else (64, 32, 4, 2)


def flow_window_attention(q, keys, values, scale, slots):
    """As reference.flow_inverse.attention, for slots (S, n) that follow one another; in the type of the cache."""
    rows, width, heads, head_dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(rows, width, heads * head_dim, dtype=keys.dtype, device=q.device)
    first = slots[:, 0].contiguous()
    config = tile(keys.dtype, head_dim)
    programs = rows * heads * triton.cdiv(width, config[0])
    if programs:
        tensors, strides = (q, keys, values, scale, first, out), q.stride()[:3]
        key = (q.dtype, keys.dtype, strides, alignments(*tensors))
        precision = "ieee" if keys.dtype == torch.float32 else "tf32"
        arguments = (*tensors, width, keys.shape[2], keys.stride(1) // head_dim, *strides)
        _kernel(programs, key, arguments, (heads, keys.shape[1], head_dim, precision), config)
    return out
