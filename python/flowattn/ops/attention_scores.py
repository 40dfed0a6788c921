"""What attention ops may do to their scores besides scaling and masking: softcap, position biases, dropout."""

import math
from typing import NamedTuple

import torch

from flowattn import checks


class RelativeBias(NamedTuple):
    """A learned bias by distance: head h adds table[lut[r + reach], h], with r = j - i - s the signed distance of key j
    from query i.

    table: (buckets, H), in the dtype of q or float32; has a gradient.
    lut: (2 * reach + 1,) int16 or int32, the bucket of each distance -reach..reach; farther ones count as +-reach.
    s is the shift of the mask: Lk - Lq, or 0 with causal_align="top_left".
    """

    table: torch.Tensor
    lut: torch.Tensor

    @staticmethod
    def t5(table, max_seqlen, *, bidirectional=True, max_distance=128):
        """The bucket rule of T5, on the host, bit for bit that of Hugging Face T5; one copy of the LUT to the device.

        max_seqlen: longest sequence; from max_distance on all distances share a bucket, so more than that is never
        needed. bidirectional: True in the encoder, False in the decoder. Use scale=1 as T5 does.

        >>> RelativeBias.t5(torch.zeros(8, 2), 4, max_distance=16).lut.tolist()
        [2, 2, 1, 0, 5, 6, 6]
        """
        op = "RelativeBias.t5"
        checks.require(max_seqlen >= 1, op, "max_seqlen must be positive", max_seqlen)
        buckets = table.shape[0] // (2 if bidirectional else 1)
        exact = buckets // 2  # distances below have a bucket each, the others logarithmically growing ones
        rule = "max_distance must exceed the buckets of exact distances, of which there must be one"
        checks.require(0 < exact < max_distance, op, rule, (exact, max_distance))
        distance = torch.arange(1 - max_seqlen, max_seqlen)
        after = (distance > 0) * buckets if bidirectional else 0
        distance = distance.abs() if bidirectional else -distance.clamp(max=0)
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
        far = (exact + growth.long()).clamp(max=buckets - 1)
        lut = after + torch.where(distance < exact, distance, far)
        return RelativeBias(table, lut.to(torch.int16).to(table.device))


class DisentangledBias(NamedTuple):
    """Content-dependent biases by distance, as in DeBERTa (He et al. 2021): head h adds
    scale * (q_i . position_keys[x, h] + k_j . position_queries[x, h]) with x = lut[r + reach], r = j - i - s.

    position_keys, position_queries: (rows, H, D), in the dtype of q or float32; one of them may be None. Both have a
        gradient. Under GQA query head h takes the keys of its own group with its own position queries.
    lut, r, s: as in RelativeBias, with rows of the tables for buckets. DeBERTa sets the scale to (c D) ** -0.5, where c
        is 1 plus the number of its terms.
    """

    position_keys: torch.Tensor | None
    position_queries: torch.Tensor | None
    lut: torch.Tensor

    @staticmethod
    def deberta(position_keys, position_queries, *, max_distance=None):
        """The rule of the released checkpoints for tables of 2 * span rows; both terms take the same row.

        max_distance: None as in DeBERTa v1, a row for each distance below the span; an int as in v2 and v3, rows for
            distances to span / 2 and logarithmically growing ranges beyond (max_relative_positions there).
        """
        table = position_queries if position_keys is None else position_keys
        checks.require(table is not None, "DisentangledBias.deberta", "needs one of the tables", "neither")
        lut = deberta_lut(table.shape[0] // 2, max_distance)
        return DisentangledBias(position_keys, position_queries, lut.to(table.device))


def deberta_lut(span, max_distance=None):
    """The lut of DisentangledBias.deberta, made on the host in float32, bit for bit as Hugging Face rounds it.

    >>> deberta_lut(2).tolist()
    [3, 3, 2, 1, 0]
    >>> deberta_lut(4, max_distance=6).tolist()
    [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    """
    if max_distance is None:
        bucket = torch.arange(span, -span - 1, -1)  # i - j, while the lut counts j - i
    else:
        middle, name = span // 2, "deberta_lut"
        rule = "span must be even and positive, and max_distance must exceed span / 2 + 1"
        checks.require(span % 2 == 0 < middle < max_distance - 1, name, rule, (span, max_distance))
        # Twice the distance that the rule is named for: there every rounding is past the end of the table.
        distance = torch.arange(2 * max_distance, -2 * max_distance - 1, -1)
        far = torch.log(distance.abs().clamp(min=1) / middle) / torch.log(torch.tensor((max_distance - 1) / middle))
        far = torch.ceil(far * (middle - 1)) + middle
        bucket = torch.where(distance.abs() <= middle, distance, (far * distance.sign()).long())
    return (bucket + span).clamp(0, 2 * span - 1).int()


NO_SCORES = (0.0, None, None, None, None, 0.0)


def prepare(op, q, batch, softcap, alibi_slopes, bias, dropout_p):
    """Check the options; return (softcap, alibi_slopes, dense bias (1 or B, 1 or H, S, S), table, lut, dropout_p).

    A DisentangledBias adds its two tables at the end; its lut stands where that of a RelativeBias does.
    """
    table = lut = None
    positions = ()
    if softcap < 0:
        checks.fail(op, "softcap must be >= 0", softcap)
    if not 0 <= dropout_p < 1:
        checks.fail(op, "dropout_p must lie in [0, 1)", dropout_p)
    if alibi_slopes is not None:
        alibi_slopes = _slopes(op, q, batch, alibi_slopes)
    if isinstance(bias, RelativeBias):
        (table, lut), bias = _relative(op, q, bias), None
    elif isinstance(bias, DisentangledBias):
        (*positions, lut), bias = _disentangled(op, q, bias), None
    elif bias is not None:
        bias = _dense(op, q, batch, bias)
    return float(softcap), alibi_slopes, bias, table, lut, float(dropout_p), *positions


def _slopes(op, q, batch, slopes):
    heads = q.shape[1]
    # Not `shape in (...)`: torch.compile does not see through that where the batch is symbolic.
    per_head = slopes.dim() == 1 and slopes.shape[0] == heads
    per_sequence = slopes.dim() == 2 and slopes.shape[0] == batch and slopes.shape[1] == heads
    if not (per_head or per_sequence):
        checks.fail(
            op, f"alibi_slopes must have shape (H,) or (B, H), {(heads,)} or {(batch, heads)}", tuple(slopes.shape)
        )
    if slopes.dtype != torch.float32:
        checks.fail(op, "alibi_slopes must be float32", slopes.dtype, "call .float() on it", error=TypeError)
    _on_device(op, "alibi_slopes", slopes, q)
    return slopes.detach()


def _relative(op, q, bias):
    table, lut = bias
    if table.dim() != 2 or table.shape[1] != q.shape[1] or table.shape[0] == 0:
        checks.fail(op, f"bias.table must have shape (buckets, {q.shape[1]})", tuple(table.shape))
    _dtype(op, "bias.table", table, q)
    _on_device(op, "bias.table", table, q)
    _lut(op, q, lut, table.shape[0])
    return table, lut


def _disentangled(op, q, bias):
    names, tables = ("bias.position_keys", "bias.position_queries"), bias[:2]
    given = [(name, table) for name, table in zip(names, tables) if table is not None]
    if not given:
        checks.fail(op, "bias must have position_keys or position_queries", "neither")
    rows = given[0][1].shape[0]
    if rows == 0:
        checks.fail(op, f"{given[0][0]} must have rows", tuple(given[0][1].shape))
    for name, table in given:
        if table.shape != (rows, *q.shape[1:]):
            checks.fail(op, f"{name} must have shape {(rows, *q.shape[1:])}, (rows, H, D)", tuple(table.shape))
        _dtype(op, name, table, q)
        _on_device(op, name, table, q)
    _lut(op, q, bias.lut, rows)
    return bias


def _lut(op, q, lut, buckets):
    if lut.dtype not in (torch.int16, torch.int32):
        checks.fail(op, "bias.lut must be int16 or int32", lut.dtype, error=TypeError)
    if lut.dim() != 1 or lut.shape[0] % 2 != 1:
        checks.fail(
            op, "bias.lut must have an odd length, one bucket for each distance -reach..reach", tuple(lut.shape)
        )
    _on_device(op, "bias.lut", lut, q)
    if lut.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would cost a sync
        least, most = (int(x) for x in lut.aminmax())
        if least < 0 or most >= buckets:
            checks.fail(op, f"bias.lut must hold buckets 0..{buckets - 1}", f"{least}..{most}")


def _dense(op, q, batch, bias):
    if not isinstance(bias, torch.Tensor):
        checks.fail(
            op, "bias must be a tensor, a RelativeBias or a DisentangledBias", type(bias).__name__, error=TypeError
        )
    shape, heads = tuple(bias.shape), q.shape[1]
    bias = bias[None] if bias.dim() == 3 else bias
    if bias.dim() != 4 or bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads):
        rule = f"bias must have shape (H, S, S) or (B, H, S, S), with B 1 or {batch} and H 1 or {heads}"
        checks.fail(op, rule, shape)
    _dtype(op, "bias", bias, q)
    _on_device(op, "bias", bias, q)
    return bias


def _dtype(op, name, x, q):
    if x.dtype not in (q.dtype, torch.float32):
        checks.fail(op, f"{name} must be float32 or have the dtype of q, {q.dtype}", x.dtype, error=TypeError)


def _on_device(op, name, x, q):
    if x.device != q.device:
        checks.fail(op, f"{name} must be on the device of q, {q.device}", x.device, "move it with .to(device)")
