"""Attention of a decode step: one query per row and head over the slots of a static cache that hold anything.

A program owns (row, key/value head, some of its query heads, share of the keys). Each lane of keys has a softmax of its
own, so that nothing is summed over keys before the end. Slots behind the position are not read: they may hold anything.
"""

import triton
import triton.language as tl

from .flow_decode_device import let_next_start, norm_weights, normalise, store_heads, wait_for_last


@triton.jit(do_not_specialize=("rows", "slots", "prefix"))
def flow_decode_heads_kernel(
    raw, q_norm, k_norm, rope, position, q, keys, values, rows, slots, prefix,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program: a head of a row of raw (S, (H + 2 Hkv) d), normalised if it is a query or a key."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    head, row = tl.program_id(0) % ALL, tl.program_id(0) // ALL + tl.arange(0, 1)
    at = tl.arange(0, D)
    let_next_start(EARLY)
    q_norm, k_norm = norm_weights(q_norm, at, D), norm_weights(k_norm, at, D)
    wait_for_last(EARLY)
    x = tl.load(raw + row[:, None, None] * (ALL * D) + head * D + at[None, None, :])
    live = (row < rows)[:, None, None] & (at < D)[None, None, :]
    as_query, as_key = normalise(x, live, q_norm, D, EPS, RMS), normalise(x, live, k_norm, D, EPS, RMS)
    y = tl.reshape(tl.where(head < HEADS, as_query, tl.where(head < HEADS + KV_HEADS, as_key, x)), (1, D))
    slot = tl.load(position + 1) + prefix
    store_heads(y, row, rows, head * D + at, rope, slot, q, keys, values, slots, HEADS, KV_HEADS, D)


@triton.jit
def share_of_keys(split, seen, SPLITS: tl.constexpr):
    """(first key, end) of a share: a multiple of 16 keys; the last ones may be empty."""
    share = tl.cdiv(tl.cdiv(seen, SPLITS), 16) * 16
    return split * share, tl.minimum(split * share + share, seen)


@triton.jit
def attend(
    program, seen, q, keys, values, scale, out, lse, rows, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One share of the `seen` keys of a row for BG query heads. out, lse: as in flow_decode_attention_kernel."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PIECES: tl.constexpr = (GROUP + BG - 1) // BG
    split, piece = program % SPLITS, program // SPLITS % PIECES
    kv, row = program // (SPLITS * PIECES) % KV_HEADS, program // (SPLITS * PIECES * KV_HEADS)
    member = piece * BG + tl.arange(0, BG)
    head, asks = kv * GROUP + member, member < GROUP
    at, lane = tl.arange(0, D), tl.arange(0, BN)
    begin, end = share_of_keys(split, seen, SPLITS)
    unit = tl.load(scale + row) * 1.4426950408889634
    own = row * (HEADS * D) + (head * D)[:, None] + at[None, :]
    query = (tl.load(q + own, mask=asks[:, None], other=0.0) * unit)[:, None, :]
    base = (row.to(tl.int64) * KV_HEADS + kv) * slots * D
    most = tl.full([BG, BN], float("-inf"), tl.float32)
    total = tl.zeros([BG, BN], tl.float32)
    acc = tl.zeros([BG, BN, D], tl.float32)
    for start in tl.range(begin, end, BN):
        key = start + lane
        offsets = base + (key * D)[None, :, None] + at[None, None, :]
        live = (key < end)[None, :, None]
        k = tl.load(keys + offsets, mask=live, other=0.0).to(tl.float32)
        v = tl.load(values + offsets, mask=live, other=0.0).to(tl.float32)
        scores = tl.sum(query * k, 2)
        # A key that is infinite must not vanish with a probability of 0.
        scores = tl.where(scores == float("-inf"), float("nan"), scores)
        scores = tl.where((key < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, scores)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        p, old = tl.exp2(scores - pivot), tl.exp2(most - pivot)
        total = total * old + p
        acc = acc * old[:, :, None] + p[:, :, None] * v
        most = higher
    top = tl.max(most, 1)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(most - pivot[:, None])
    sums = tl.sum(total * weight, 1)
    result = tl.sum(acc * weight[:, :, None], 1) / tl.where(sums == 0.0, 1.0, sums)[:, None]
    own += split * rows * (HEADS * D)
    tl.store(out + own, result.to(out.dtype.element_ty), mask=asks[:, None])
    if lse is not None:
        size = tl.broadcast_to((pivot + tl.log2(sums))[:, None], [BG, D])
        tl.store(lse + own, size, mask=asks[:, None])


@triton.jit(do_not_specialize=("rows", "slots", "prefix"))
def flow_decode_attention_kernel(
    q, keys, values, scale, position, out, lse, rows, slots, prefix,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, S, H d), normalised within its share; lse of the same shape, to the base 2 and equal over
    a head, or None."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    seen = (tl.load(position + 1) + prefix + 1).to(tl.int32)
    attend(
        tl.program_id(0), seen, q, keys, values, scale, out, lse, rows, slots, HEADS, KV_HEADS, D, SPLITS, BG, BN
    )  # fmt: skip


@triton.jit(do_not_specialize=("rows",))
def flow_decode_merge_kernel(
    pieces, lse, out, rows, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Program: a head of a row, from its shares, in the type of the weights."""
    head, at, split = tl.program_id(0), tl.arange(0, D), tl.arange(0, SPLITS)
    let_next_start(EARLY)
    wait_for_last(EARLY)
    own = tl.load(lse + (split * rows * HEADS + head) * D)
    share = tl.exp2(own - tl.max(own, 0))
    x = tl.load(pieces + (split * rows * HEADS + head)[:, None] * D + at[None, :])
    x = tl.sum(x * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + head * D + at, x.to(out.dtype.element_ty))
