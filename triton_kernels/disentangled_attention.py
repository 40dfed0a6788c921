"""Padding-free attention with a disentangled bias, forward. The backward pass is in disentangled_attention_bwd.py.

A tile has S queries and S keys, whose 2 S - 1 distances take 2 S rows of each table. Its term q_i . PK[lut[j - i]] is a
product of the query tile with these rows, which stands along the diagonals: row i must be turned by i columns to meet
the keys. Of 2 S columns each row uses S in a run, so two products of S columns merge into one square block before it is
rotated (tl.gather, one shuffle for each 32 columns). k_j . PQ[lut[j - i]] is the same with columns for rows. That is 4
products of a tile more than the 2 of plain attention, on tensor cores that wait for softmax anyway; the tables are
read from the L2 cache, sums stay in float32 and no memory is needed.

The other way, q PK^T and k PQ^T for all rows of the tables in advance and a lookup for each score, writes and reads
2 T H rows numbers: 480 MB in float32 for 4900 tokens of DeBERTa v3 base (12 heads, 512 rows), 150 us of an H100's
memory, more than the whole kernel should take; and 16-bit terms would cost the LSE its precision.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_scores import LOG2E, NO_SCORES, at_head, keep_mask, score_arguments
from .disentangled_attention_blocks import position_scores
from .disentangled_attention_configs import forward_config
from .intervals import TILE, owned_tile, tile_interval, visible
from .launch import Launcher, alignments
from .varlen_attention import UNREACHED, constants, slots
from .varlen_attention import UNSPECIALIZED as _UNSPECIALIZED
from .varlen_attention_blocks import load_rows, scaled, store_rows

UNSPECIALIZED = (*_UNSPECIALIZED, "table_rows")


class Positions(NamedTuple):
    """The tables of a call, a kernel argument; None for the one that is missing. Last dims are contiguous."""

    keys: object  # (table_rows, H, D)
    keys_row: object  # strides
    keys_head: object
    queries: object
    queries_row: object
    queries_head: object
    lut: object  # (2 * reach + 1,)


@triton.jit
def _fwd_keys(
    acc, top, total, q, k, v, stride_k, stride_v, begin, end, row, length, shift, left, right, scale, scores, head,
    positions, h, reach, table_rows,
    D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [begin, end)."""
    offs, offs_d, offs_dv = tl.arange(0, S), tl.arange(0, BD), tl.arange(0, BDV)
    for key in tl.range(begin, end, S):
        kb = load_rows(k, key, stride_k, length, offs, offs_d, D, BD, MASKED)
        s, _ = position_scores(
            q, kb, row, key, key, shift, scale, scores, head, positions, h, reach, table_rows, D, S, BD, PRECISION
        )  # fmt: skip
        if MASKED:
            rows, keys = (row + offs)[:, None], (key + offs)[None, :]
            s = tl.where(visible(rows, keys, length, shift, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - finite[:, None]) * LOG2E)
        correction = tl.exp2((top - finite) * LOG2E)
        total = total * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        if scores.kept is not None:
            p = tl.where(keep_mask(row, key, head, S, S), p, 0.0)
        vb = load_rows(v, key, stride_v, length, offs, offs_dv, DV, BDV, MASKED)
        acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def varlen_attention_disentangled_fwd_kernel(
    q,  # (Tq, H, D)
    k,  # (Tk, Hkv, D)
    v,  # (Tk, Hkv, DV)
    out,  # (Tq, H, DV)
    lse,  # (H, Tq)
    cu_q, cu_k, tiles, batch, total_q, total_k, steps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    scale, left, right, scores, positions, bias_q, bias_k, reach, threshold, table_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, SELF: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    b, h, row, start, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, tiles, batch, total_q, total_k, steps, HEADS, SELF, TILE, S
    )
    if row >= length_q:
        return
    shift = 0 if TOP_LEFT else length_k - length_q
    q += tl.cast(start, tl.int64) * stride_qt + h * stride_qh
    k += tl.cast(start_k, tl.int64) * stride_kt + h // GROUP * stride_kh
    v += tl.cast(start_k, tl.int64) * stride_vt + h // GROUP * stride_vh
    head = at_head(scores, b, h, batch, length_q, bias_q, bias_k, reach, threshold, HEADS)
    offs = tl.arange(0, S)
    q_tile = load_rows(q, row, stride_qt, length_q, offs, tl.arange(0, BD), D, BD, True)
    if PRECISION == "tf32x3":
        q_tile = scaled(q_tile, scale)
    top = tl.full([S], float("-inf"), tl.float32)
    total = tl.zeros([S], tl.float32)
    acc = tl.zeros([S, BDV], tl.float32)
    begin, full_begin, full_end, end = tile_interval(row, S, length_k, shift, left, right, S, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, top, total = _fwd_keys(
            acc, top, total, q_tile, k, v, stride_kt, stride_vt, begin, full_begin, row, length_k, shift, left, right,
            scale, scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, True, HAS_LEFT, HAS_RIGHT,
            PRECISION,
        )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_begin, full_end, row, length_k, shift, left, right,
        scale, scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, False, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    acc, top, total = _fwd_keys(
        acc, top, total, q_tile, k, v, stride_kt, stride_vt, full_end, end, row, length_k, shift, left, right, scale,
        scores, head, positions, h, reach, table_rows, D, DV, S, BD, BDV, True, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    if scores.kept is not None:
        acc *= scores.kept
    row_lse = tl.where(empty, float("-inf"), top + tl.log(total))
    out += (tl.cast(start, tl.int64) * HEADS + h) * DV
    store_rows(out, row, HEADS * DV, length_q, offs, tl.arange(0, BDV), acc, DV)
    tl.store(lse + tl.cast(h, tl.int64) * total_q + start + row + offs, row_lse, mask=row + offs < length_q)


_fwd = Launcher(varlen_attention_disentangled_fwd_kernel)


def position_arguments(q, scale, softcap, slopes, lut, dropout_p, rng, keys, queries):
    """(the kernels' arguments scores .. table_rows, what they change in the compiled code).

    Tables are taken in the dtype of q, whose products have no other.
    """
    factor = 1.0 if q.dtype == torch.float32 else scale  # float32 queries are scaled before any product
    scores, (*extents, _, threshold), score_key = score_arguments(
        factor, softcap, slopes, None, None, None, dropout_p, rng
    )
    if scores is NO_SCORES:
        scores = NO_SCORES._replace(scale=factor)
    keys, queries = (_table(x, q.dtype) for x in (keys, queries))
    lut, rows = lut.contiguous(), (queries if keys is None else keys).shape[0]
    strides = [(None, None) if x is None else x.stride()[:2] for x in (keys, queries)]
    positions = Positions(keys, *strides[0], queries, *strides[1], lut)
    key = (score_key, *strides, lut.dtype, alignments(keys, queries, lut))
    return (scores, positions, *extents, lut.shape[0] // 2, threshold, rows), key


def _table(x, dtype):
    x = x if x is None else x.to(dtype)
    return x if x is None or x.stride(2) == 1 else x.contiguous()


def varlen_attention_disentangled_fwd(
    q, k, v, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, softcap=0.0, slopes=None, bias=None,
    table=None, lut=None, dropout_p=0.0, rng=None, position_keys=None, position_queries=None,
):  # fmt: skip
    """bias and table are None: position tables stand alone."""
    (total_q, heads, _), total_k, batch = q.shape, k.shape[0], cu_q.shape[0] - 1
    out = q.new_empty((total_q, heads, v.shape[2]))
    lse = q.new_empty((heads, total_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    left, right = min(left, UNREACHED), min(right, UNREACHED)
    fixed, _ = constants(q, k, v, cu_q, cu_k, left, right, top_left)
    arguments, key = position_arguments(q, scale, softcap, slopes, lut, dropout_p, rng, position_keys, position_queries)
    config = forward_config(q.dtype, max(q.shape[2], v.shape[2]))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    _fwd(
        slots(cu_q, tiles, total_q) * (TILE // config[0]) * heads,
        (q.dtype, strides, alignments(q, k, v, cu_q, cu_k, tiles), key),
        (
            q, k, v, out, lse, cu_q, cu_k, tiles, batch, total_q, total_k, (batch + 1).bit_length(), *strides, scale,
            left, right, *arguments,
        ),
        (heads, *fixed),
        config,
    )  # fmt: skip
    return out, lse
