"""Products of a decode step for many rows: tensor-core tiles of up to 64 rows, the norms in a kernel of their own."""

import triton
import triton.language as tl

from .flow_decode_device import (
    add_bias,
    gelu,
    gelu_tanh,
    let_next_start,
    norm_weights,
    normalise,
    store_heads,
    stream_rows,
    wait_for_last,
)
from .flow_decode_grid import fetch


@triton.jit(do_not_specialize=("rows",))
def flow_decode_norm_kernel(
    stream, stream_out, parts, post, norm, x_out, rows,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, EARLY: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Program: a row of the stream, and of x_out in the type of the weights."""
    at, row = tl.arange(0, BK), tl.program_id(0) + tl.arange(0, 1)
    let_next_start(EARLY)
    if post[0] is not None:
        post = norm_weights(post, at, WIDTH)
    norm = norm_weights(norm, at, WIDTH)
    wait_for_last(EARLY)
    x, offsets, live = stream_rows(stream, parts, post, row, rows, at, WIDTH, PARTS, EPS, RMS)
    tl.store(stream_out + offsets, x, mask=live)
    x = normalise(x, live, norm, WIDTH, EPS, RMS)
    tl.store(x_out + offsets, x.to(x_out.dtype.element_ty), mask=live)


@triton.jit
def _fetch(weight, n, begin, N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Bring what _product will read of the weights into L2, by addresses 128 bytes apart, before its input is there."""
    APART: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    lane = tl.arange(0, 4) * APART
    for k in tl.range(begin, tl.minimum(begin + CHUNK, K), 4 * APART):
        fetch(weight + row + tl.minimum(k + lane, K - 1)[None, :])


@triton.jit
def _product(
    x, weight, row, rows, n, begin, N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (S, K) times weight (N, K) transposed: (BM, BN) of rows `row` and columns n, over CHUNK of the depth."""
    acc = tl.zeros([BM, BN], tl.float32)
    lane = tl.arange(0, BK)
    for k in tl.range(begin, tl.minimum(begin + CHUNK, K), BK):
        at = k + lane
        a = tl.load(x + row[:, None] * K + at[None, :], mask=(row < rows)[:, None] & (at < K)[None, :], other=0.0)
        w = tl.load(
            weight + n.to(tl.int64)[:, None] * K + at[None, :], mask=(n < N)[:, None] & (at < K)[None, :], other=0.0
        )
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=("rows", "slots", "prefix"))
def flow_decode_qkv_many_kernel(
    x, weight, bias, rope, position, raw, q, keys, values, rows, slots, prefix,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, FETCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program: BN columns of BM rows. raw: as in flow_decode_qkv_kernel."""
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    row = tl.program_id(0) // BLOCKS * BM + tl.arange(0, BM)
    let_next_start(EARLY)
    if FETCH:
        _fetch(weight, n, 0, N, WIDTH, WIDTH)
    wait_for_last(EARLY)
    y = add_bias(_product(x, weight, row, rows, n, 0, N, WIDTH, WIDTH, PRECISION, BM, BN, BK), bias, n, N)
    if raw is None:
        store_heads(y, row, rows, n, rope, tl.load(position + 1) + prefix, q, keys, values, slots, HEADS, KV_HEADS, D)
    else:
        tl.store(raw + row[:, None] * N + n[None, :], y, mask=(row < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=("rows",))
def flow_decode_up_many_kernel(
    x, weight, bias, gate, gate_bias, hidden, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    FETCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (HIDDEN + BN - 1) // BN
    n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    row = tl.program_id(0) // BLOCKS * BM + tl.arange(0, BM)
    let_next_start(EARLY)
    if FETCH:
        _fetch(weight, n, 0, HIDDEN, WIDTH, WIDTH)
        if gate is not None:
            _fetch(gate, n, 0, HIDDEN, WIDTH, WIDTH)
    wait_for_last(EARLY)
    y = _product(x, weight, row, rows, n, 0, HIDDEN, WIDTH, WIDTH, PRECISION, BM, BN, BK)
    y = add_bias(y, bias, n, HIDDEN)
    if gate is None:
        y = gelu(y)
    else:
        g = _product(x, gate, row, rows, n, 0, HIDDEN, WIDTH, WIDTH, PRECISION, BM, BN, BK)
        y *= gelu_tanh(add_bias(g, gate_bias, n, HIDDEN))
    to = row[:, None] * HIDDEN + n[None, :]
    tl.store(hidden + to, y.to(hidden.dtype.element_ty), mask=(row < rows)[:, None] & (n < HIDDEN)[None, :])


@triton.jit(do_not_specialize=("rows",))
def flow_decode_add_many_kernel(
    x, weight, bias, parts, rows,
    N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    FETCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program: BN columns of BM rows over CHUNK of the depth, one part of what is added to the stream."""
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    DEPTHS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    depth, block = tl.program_id(0) % DEPTHS, tl.program_id(0) // DEPTHS
    n, row = block % BLOCKS * BN + tl.arange(0, BN), block // BLOCKS * BM + tl.arange(0, BM)
    let_next_start(EARLY)
    if FETCH:
        _fetch(weight, n, depth * CHUNK, N, K, CHUNK)
    wait_for_last(EARLY)
    y = _product(x, weight, row, rows, n, depth * CHUNK, N, K, CHUNK, PRECISION, BM, BN, BK)
    if depth == 0:
        y = add_bias(y, bias, n, N)
    to = depth * rows * N + row[:, None] * N + n[None, :]
    tl.store(parts + to, y, mask=(row < rows)[:, None] & (n < N)[None, :])
