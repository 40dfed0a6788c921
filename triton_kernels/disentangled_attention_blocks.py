"""Tiles of the disentangled_attention kernels: scores with both position terms, and what gradients make of them."""

import triton
import triton.language as tl

from .attention_scores import keep_mask, modify
from .intervals import visible
from .varlen_attention_blocks import probabilities


@triton.jit
def distance_rows(
    table, stride, first, lut, reach, table_rows, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Block (S, BD) of the table rows of the distances first .. first + S - 1."""
    offs_d = tl.arange(0, BD)
    distance = tl.minimum(tl.maximum(first + tl.arange(0, S), -reach), reach)
    row = tl.load(lut + reach + distance).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), table_rows - 1)  # on a GPU nobody has checked the values
    pointers = table + row[:, None] * stride + offs_d[None, :]
    if D != BD:
        return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(pointers)


# Element (i, j) of a tile, at the distance base + j - i, takes row (j - i - 1) mod S of a block of S table rows: that
# from the distance base - (S - 1) on, "near", if j <= i, else that from base + 1 on, "far".


@triton.jit
def turned(moving, S: tl.constexpr):
    """(S, S) with (j - i - 1) mod S at (i, j). `moving`, a multiple of S, changes nothing but the compiler's mind:
    indices that stay the same in a loop would be kept in registers, a third of all there are."""
    return (moving + tl.arange(0, S)[None, :] - tl.arange(0, S)[:, None] - 1) & (S - 1)


@triton.jit
def near_of_queries(S: tl.constexpr):
    """Where (query i, row y) of a block that merges both products has that of the near one."""
    return tl.arange(0, S)[None, :] >= S - 1 - tl.arange(0, S)[:, None]


@triton.jit
def near_of_keys(S: tl.constexpr):
    """The same of (row y, key j)."""
    return tl.arange(0, S)[:, None] >= tl.arange(0, S)[None, :]


@triton.jit
def _keys_term(
    q, moving, base, positions, h, reach, table_rows, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q_i . position_keys (S, S)."""
    keys = positions.keys + h * positions.keys_head
    rows = distance_rows(keys, positions.keys_row, base - (S - 1), positions.lut, reach, table_rows, D, S, BD)
    near = tl.dot(q, tl.trans(rows), input_precision=PRECISION)
    rows = distance_rows(keys, positions.keys_row, base + 1, positions.lut, reach, table_rows, D, S, BD)
    far = tl.dot(q, tl.trans(rows), input_precision=PRECISION)
    return tl.gather(tl.where(near_of_queries(S), near, far), turned(moving, S), 1)


@triton.jit
def _queries_term(
    kb, moving, base, positions, h, reach, table_rows, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """k_j . position_queries (S, S)."""
    queries = positions.queries + h * positions.queries_head
    rows = distance_rows(queries, positions.queries_row, base - (S - 1), positions.lut, reach, table_rows, D, S, BD)
    near = tl.dot(rows, tl.trans(kb), input_precision=PRECISION)
    rows = distance_rows(queries, positions.queries_row, base + 1, positions.lut, reach, table_rows, D, S, BD)
    far = tl.dot(rows, tl.trans(kb), input_precision=PRECISION)
    return tl.gather(tl.where(near_of_keys(S), near, far), turned(moving, S), 0)


@triton.jit
def _terms(
    q, kb, moving, base, scale, positions, h, reach, table_rows, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of the terms that there are, in the units of q . k."""
    if positions.queries is not None:
        term = _queries_term(kb, moving, base, positions, h, reach, table_rows, D, S, BD, PRECISION)
        if PRECISION == "tf32x3":  # the queries of float32 are scaled already
            term *= scale
        if positions.keys is not None:
            term += _keys_term(q, moving, base, positions, h, reach, table_rows, D, S, BD, PRECISION)
    else:
        term = _keys_term(q, moving, base, positions, h, reach, table_rows, D, S, BD, PRECISION)
    return term


@triton.jit
def position_scores(
    q, kb, row, key, moving, shift, scale, scores, head, positions, h, reach, table_rows, D: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """modify()'s (scores, t) of a tile of S queries from `row` on and S keys from `key` on, the bias among them.

    moving: whichever of `row` and `key` changes in the caller's loop, or another multiple of S that does.
    """
    rows, keys = (row + tl.arange(0, S))[:, None], (key + tl.arange(0, S))[None, :]
    terms = _terms(q, kb, moving, key - row - shift, scale, positions, h, reach, table_rows, D, S, BD, PRECISION)
    if scores.softcap is None:
        products = tl.dot(q, tl.trans(kb), terms, input_precision=PRECISION)
        s, t = modify(products, rows, keys, shift, scores, head)
    else:
        s, t = modify(tl.dot(q, tl.trans(kb), input_precision=PRECISION), rows, keys, shift, scores, head)
        s += terms * scores.scale
    return s, t


@triton.jit
def upright_queries(ds, moving, S: tl.constexpr):
    """The gradients (near, far) of both products (query, row y) with the first table from that of the scores."""
    # (i, y) was taken by the key (y + i + 1) mod S.
    column = (moving + tl.arange(0, S)[None, :] + tl.arange(0, S)[:, None] + 1) & (S - 1)
    upright = tl.gather(ds, column, 1)
    return tl.where(near_of_queries(S), upright, 0.0), tl.where(near_of_queries(S), 0.0, upright)


@triton.jit
def upright_keys(ds, moving, S: tl.constexpr):
    """The same of both products (row y, key) with the second table."""
    upright = tl.gather(ds, turned(moving, S), 0)
    return tl.where(near_of_keys(S), upright, 0.0), tl.where(near_of_keys(S), 0.0, upright)


@triton.jit
def tile_gradients(
    q, do, lse_rows, kb, vb, row, key, moving, length, shift, left, right, scale, scores, head, positions, h, reach,
    table_rows,
    D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, P behind the dropout but for its factor, dP and the softcap's tanh, (S, S), of queries from `row` on and keys
    from `key` on."""
    s, t = position_scores(
        q, kb, row, key, moving, shift, scale, scores, head, positions, h, reach, table_rows, D, S, BD, PRECISION
    )  # fmt: skip
    p = probabilities(s, lse_rows[:, None], 1.0)
    if MASKED:
        rows, keys = (row + tl.arange(0, S))[:, None], (key + tl.arange(0, S))[None, :]
        p = tl.where(visible(rows, keys, length, shift, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    dp = tl.dot(do, tl.trans(vb), input_precision=PRECISION)
    dropped = p
    if scores.kept is not None:
        keep = keep_mask(row, key, head, S, S)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * scores.kept, 0.0)
    return p, dropped, dp, t
