"""Products of a decode step for few rows: a program holds a tile of weights, asked for before it waits for its input.

The weights are read once, and are on their way while the kernel before ends. The rows are small, so every program
computes the norm in front of its product anew. Products are float32 multiplications.
"""

import triton
import triton.language as tl

from .flow_decode_device import (
    add_bias,
    depth,
    gelu,
    gelu_tanh,
    let_next_start,
    norm_weights,
    normalise,
    store_heads,
    stream_rows,
    wait_for_last,
)


@triton.jit
def _weights(weight, n, at, N: tl.constexpr, K: tl.constexpr):
    """The rows n of weight (N, K) at the columns `at`, (1, BN, K)."""
    live = (n < N)[None, :, None] & (at < K)[None, None, :]
    return tl.load(weight + n.to(tl.int64)[None, :, None] * K + at[None, None, :], mask=live, other=0.0)


@triton.jit
def _product(x, w):
    """x (R, 1, K) times w (1, BN, K): (R, BN)."""
    return tl.sum(w.to(tl.float32) * x, 2)


@triton.jit(do_not_specialize=("rows", "slots", "prefix"))
def flow_decode_qkv_kernel(
    stream, stream_out, parts, post, norm, weight, bias, rope, position, raw, q, keys, values, rows, slots, prefix,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, EARLY: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BN columns. raw (S, (H + 2 Hkv) d) or None: where products go whose heads are still to be normalised."""
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    program = tl.program_id(0)
    n, at, row = program * BN + tl.arange(0, BN), depth(0, BK), tl.arange(0, R)
    let_next_start(EARLY)
    w = _weights(weight, n, at, N, WIDTH)
    if post[0] is not None:
        post = norm_weights(post, at, WIDTH)
    norm = norm_weights(norm, at, WIDTH)
    wait_for_last(EARLY)
    x, offsets, live = stream_rows(stream, parts, post, row, rows, at, WIDTH, PARTS, EPS, RMS)
    tl.store(stream_out + offsets, x, mask=live & (program == 0))
    y = add_bias(_product(normalise(x, live, norm, WIDTH, EPS, RMS), w), bias, n, N)
    if raw is None:
        store_heads(y, row, rows, n, rope, tl.load(position + 1) + prefix, q, keys, values, slots, HEADS, KV_HEADS, D)
    else:
        tl.store(raw + row[:, None] * N + n[None, :], y, mask=(row < rows)[:, None] & (n < N)[None, :])


@triton.jit
def merged_rows(x, pieces, lse, offsets, live, apart, SPLITS: tl.constexpr):
    """x, the first of the SPLITS shares that attention left at `offsets` and each `apart` on, with the others."""
    most = tl.load(lse + offsets, mask=live, other=0.0)  # the first share has a key
    total = tl.full(x.shape, 1.0, tl.float32)
    for split in tl.static_range(1, SPLITS):
        size = tl.load(lse + split * apart + offsets, mask=live, other=0.0)
        piece = tl.load(pieces + split * apart + offsets, mask=live, other=0.0)
        higher = tl.maximum(most, size)
        old, new = tl.exp2(most - higher), tl.exp2(size - higher)
        x, total, most = x * old + piece * new, total * old + new, higher
    return x / total


@triton.jit(do_not_specialize=("rows",))
def flow_decode_proj_kernel(
    pieces, lse, weight, bias, parts, rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BN columns, BK of the depth H d; merges what attention left of its share of the keys.

    pieces (SPLITS, S, H d), each normalised by itself; lse of the same shape, to the base 2, so that the merge is
    element by element.
    """
    K: tl.constexpr = HEADS * D
    DEPTHS: tl.constexpr = (K + BK - 1) // BK
    part, block = tl.program_id(0) % DEPTHS, tl.program_id(0) // DEPTHS
    n, at, row = block * BN + tl.arange(0, BN), depth(part * BK, BK), tl.arange(0, R)
    let_next_start(EARLY)
    w = _weights(weight, n, at, WIDTH, K)
    wait_for_last(EARLY)
    offsets = row[:, None, None] * K + at[None, None, :]
    live = (row < rows)[:, None, None] & (at < K)[None, None, :]
    x = tl.load(pieces + offsets, mask=live, other=0.0)
    y = _product(merged_rows(x, pieces, lse, offsets, live, rows * K, SPLITS), w)
    if part == 0:
        y = add_bias(y, bias, n, WIDTH)
    to = part * rows * WIDTH + row[:, None] * WIDTH + n[None, :]
    tl.store(parts + to, y, mask=(row < rows)[:, None] & (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=("rows",))
def flow_decode_up_kernel(
    stream, stream_out, parts, post, norm, weight, bias, gate, gate_bias, hidden, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    EARLY: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BN columns of hidden (S, HIDDEN)."""
    program = tl.program_id(0)
    n, at, row = program * BN + tl.arange(0, BN), depth(0, BK), tl.arange(0, R)
    let_next_start(EARLY)
    w = _weights(weight, n, at, HIDDEN, WIDTH)
    if gate is not None:
        w_gate = _weights(gate, n, at, HIDDEN, WIDTH)
    if post[0] is not None:
        post = norm_weights(post, at, WIDTH)
    norm = norm_weights(norm, at, WIDTH)
    wait_for_last(EARLY)
    x, offsets, live = stream_rows(stream, parts, post, row, rows, at, WIDTH, PARTS, EPS, RMS)
    tl.store(stream_out + offsets, x, mask=live & (program == 0))
    x = normalise(x, live, norm, WIDTH, EPS, RMS)
    y = add_bias(_product(x, w), bias, n, HIDDEN)
    if gate is None:
        y = gelu(y)
    else:
        y *= gelu_tanh(add_bias(_product(x, w_gate), gate_bias, n, HIDDEN))
    tl.store(hidden + row[:, None] * HIDDEN + n[None, :], y, mask=(row < rows)[:, None] & (n < HIDDEN)[None, :])


@triton.jit(do_not_specialize=("rows",))
def flow_decode_down_kernel(
    hidden, weight, bias, parts, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, EARLY: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program: BN columns, BK of the depth."""
    DEPTHS: tl.constexpr = (HIDDEN + BK - 1) // BK
    part, block = tl.program_id(0) % DEPTHS, tl.program_id(0) // DEPTHS
    n, at, row = block * BN + tl.arange(0, BN), depth(part * BK, BK), tl.arange(0, R)
    let_next_start(EARLY)
    w = _weights(weight, n, at, WIDTH, HIDDEN)
    wait_for_last(EARLY)
    live = (row < rows)[:, None, None] & (at < HIDDEN)[None, None, :]
    y = _product(tl.load(hidden + row[:, None, None] * HIDDEN + at[None, None, :], mask=live, other=0.0), w)
    if part == 0:
        y = add_bias(y, bias, n, WIDTH)
    to = part * rows * WIDTH + row[:, None] * WIDTH + n[None, :]
    tl.store(parts + to, y, mask=(row < rows)[:, None] & (n < WIDTH)[None, :])
