"""What a program of flow_decode_steps.py holds: its columns of a product, for which it reads whole rows.

A tile is (columns of a program, BN, warps that share the depth of a column, BK): a constant of the kernel. The numbers
of a row are (WARPS, R, 1, P, 128) and those of weights (WARPS, 1, columns of a warp, P, 128): four next to each other
in a lane, so that weights, rows and norms lie in the same threads and nothing passes through shared memory but sums.
"""

import triton
import triton.language as tl

from .flow_decode_attention import share_of_keys
from .flow_decode_grid import fetch


@triton.jit
def at_layer(first, offsets):
    """(weight, bias) of a layer: offsets (2), in units of 8 numbers from those of the first layer. Where that has no
    bias, anything: own_bias and norm_of_rows do not look at it."""
    weight = first[0] + tl.load(offsets) * 8
    if first[1] is None:
        return weight, weight
    else:
        return weight, first[1] + tl.load(offsets + 1) * 8


@triton.jit
def own_columns(N: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """This program's COLUMNS columns of N, as BN; those that are not its own as N."""
    lane = tl.arange(0, BN)
    n = tl.program_id(0) * COLUMNS + lane
    return tl.where((lane < COLUMNS) & (n < N), n, N)


@triton.jit
def _depth(TILE: tl.constexpr, WARPS: tl.constexpr):
    """The place in the depth of each number of a row: (WARPS, 1, 1, P, 128), four of them a lane."""
    OWN: tl.constexpr = TILE[3] // TILE[2]
    LANES: tl.constexpr = OWN if OWN < 128 else 128
    warp = tl.arange(0, WARPS)[:, None, None, None, None] % TILE[2]
    piece = tl.arange(0, OWN // LANES)[None, None, None, :, None]
    return warp * OWN + piece * LANES + tl.max_contiguous(tl.arange(0, LANES), 4)[None, None, None, None, :]


@triton.jit
def own_weights(weight, N: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr):
    """This program's rows of weight (N, K) as (WARPS, 1, columns of a warp, P, 128)."""
    OF_WARP: tl.constexpr = TILE[1] * TILE[2] // WARPS
    warp, lane = tl.arange(0, WARPS) // TILE[2], tl.arange(0, OF_WARP)
    own = (warp * OF_WARP)[:, None, None, None, None] + lane[None, None, :, None, None]
    n, at = tl.program_id(0) * TILE[0] + own, _depth(TILE, WARPS)
    return tl.load(weight + n.to(tl.int64) * K + at, mask=(own < TILE[0]) & (n < N) & (at < K), other=0.0)


@triton.jit
def own_product(x, w, TILE: tl.constexpr):
    """Rows x (WARPS, R, 1, P, 128) times w (WARPS, 1, columns of a warp, P, 128): (R, BN)."""
    WARPS: tl.constexpr = w.shape[0]
    R: tl.constexpr = x.shape[1]
    y = tl.sum(tl.sum(x * w.to(tl.float32), 3), 3)
    y = tl.sum(tl.reshape(y, (WARPS // TILE[2], TILE[2], R, w.shape[2])), 1)
    return tl.reshape(tl.permute(y, (1, 0, 2)), (R, TILE[1]))


@triton.jit
def _sum_of_rows(x, SHARES: tl.constexpr):
    """(WARPS, R, 1, 1, 1): the sums of rows (WARPS, R, 1, P, 128), each in SHARES warps."""
    WARPS: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    y = tl.sum(tl.sum(x, 3, keep_dims=True), 4, keep_dims=True)
    if SHARES > 1:
        y = tl.sum(tl.reshape(y, (WARPS // SHARES, SHARES, R)), 1)
        y = tl.reshape(tl.broadcast_to(y[:, None, :], (WARPS // SHARES, SHARES, R)), (WARPS, R, 1, 1, 1))
    return y


@triton.jit
def norm_of_rows(norm, first, TILE: tl.constexpr, WARPS: tl.constexpr, K: tl.constexpr):
    """(weight, bias), as one row of rows_of. first: the norm of the first layer."""
    at = _depth(TILE, WARPS)
    weight = tl.load(norm[0] + at, mask=at < K, other=0.0)
    if first[1] is None:
        return weight, tl.zeros_like(weight)
    else:
        return weight, tl.load(norm[1] + at, mask=at < K, other=0.0)


@triton.jit
def rows_of(tensor, row, rows, TILE: tl.constexpr, WARPS: tl.constexpr, K: tl.constexpr):
    """(rows of tensor (S, K) as (WARPS, R, 1, P, 128), their offsets, which numbers exist)."""
    at, row = _depth(TILE, WARPS), row[None, :, None, None, None]
    offsets, live = row * K + at, (row < rows) & (at < K)
    return tl.load(tensor + offsets, mask=live, other=0.0), offsets, live


@triton.jit
def normalised_rows(
    stream, row, rows, norm, TILE: tl.constexpr, WARPS: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    x, offsets, live = rows_of(stream, row, rows, TILE, WARPS, K)
    if not RMS:
        x = tl.where(live, x - _sum_of_rows(x, TILE[2]) / K, 0.0)
    x *= tl.rsqrt(_sum_of_rows(x * x, TILE[2]) / K + EPS)
    return x * norm[0].to(tl.float32) + norm[1].to(tl.float32)


@triton.jit
def fetch_weights(
    weight, N: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Bring this program's columns of a product into L2, by addresses 128 bytes apart."""
    APART: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    n = tl.minimum(tl.program_id(0) * TILE[0] + tl.minimum(tl.arange(0, TILE[1]), TILE[0] - 1), N - 1)
    at = tl.minimum(tl.arange(0, TILE[3] // APART) * APART, K - 1)
    fetch(weight + n.to(tl.int64)[:, None] * K + at[None, :])


@triton.jit
def fetch_keys(
    keys, values, rows, slots, seen,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Bring the first BN keys and values of this program's shares into L2."""
    program = tl.program_id(0)
    for turn in range(0, rows * KV_HEADS * PIECES * SPLITS - program, PROGRAMS):
        split, head = (program + turn) % SPLITS, (program + turn) // (SPLITS * PIECES)
        begin, end = share_of_keys(split, seen, SPLITS)
        key = tl.minimum(begin + tl.arange(0, BN), tl.maximum(end - 1, 0))
        offsets = head.to(tl.int64) * slots * D + key * D
        fetch(keys + offsets)
        fetch(values + offsets)


@triton.jit
def own_bias(linear, first, n, N: tl.constexpr):
    """(1, BN) float32, 0 where the first layer has none."""
    own = tl.zeros_like(n).to(tl.float32)
    if first[1] is not None:
        own = tl.load(linear[1] + n, mask=n < N, other=0.0).to(tl.float32)
    return own[None, :]


@triton.jit
def own_stream(stream, row, rows, n, WIDTH: tl.constexpr):
    """(addresses of this program's columns, which exist, what they hold)"""
    to = stream + row[:, None] * WIDTH + n[None, :]
    live = (row < rows)[:, None] & (n < WIDTH)[None, :]
    return to, live, tl.load(to, mask=live, other=0.0)
