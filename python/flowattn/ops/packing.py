"""Packing plans, pack and unpack: padded (B, S, ...) to and from the real tokens alone (T, ...)."""

import math
from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference import packing as reference
from flowattn.reference.packing import CU_SEQLENS, LENGTHS, MASK, TILE, tile_capacity

_plan_op, _gather_op = op("pack_plan"), op("gather_rows")
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)  # others cost a comparison first


class PackPlan(NamedTuple):
    """Where each packed row comes from. All tensors int32 on the device of what the plan was made from.

    cu_seqlens (B+1,): sequence b owns packed rows cu_seqlens[b]..cu_seqlens[b+1].
    indices (R,): flat padded position b * S + s of each packed row, -1 for unused rows (capacity mode).
    inverse (B * S,): packed row of each padded position, -1 at padding.
    position_ids (R,): s of each packed row, 0 for unused rows.
    tiles (N, 4): (sequence b, row, cu_seqlens[b], length of b) for each 128 query rows, row = 0, 128, ...; longest
        sequences first, lengths being compared in units of S / 256 rounded up to a power of two, equals by b. In
        capacity mode the unused rows follow as tiles of sequence B, then entries (B, 0, 0, 0). Every attention layer
        reuses it.
    max_seqlen: int, no sequence is longer (in capacity mode the padded length).
    total: int, real tokens; in capacity mode a 0-d int32 tensor.
    batch, padded_len: ints, B and S.
    """

    cu_seqlens: torch.Tensor
    indices: torch.Tensor
    inverse: torch.Tensor
    position_ids: torch.Tensor
    tiles: torch.Tensor
    max_seqlen: int
    total: object
    batch: int
    padded_len: int


def pack_plan(mask=None, *, lengths=None, cu_seqlens=None, max_seqlen=None, capacity=None):
    """Plan the packing of a padded batch from exactly one of mask, lengths and cu_seqlens.

    mask (B, S): bool or integer, non-zero = real token, in any pattern (right or left padding, holes).
    lengths (B,) or cu_seqlens (B+1,): int32 or int64; tokens fill each padded row from the left.
    max_seqlen: padded length S for lengths and cu_seqlens; default the longest sequence.
    capacity: None gives as many rows as there are tokens and reads three ints (or the lengths) back: one host sync on
        a GPU. An int >= the number of real tokens (B * S always is) gives that many rows and never syncs, for CUDA
        graphs and torch.compile(fullgraph=True); with lengths or cu_seqlens it needs max_seqlen. Tokens that do not
        fit, or lie beyond max_seqlen, raise ValueError on the CPU and in the reference; on a GPU they are cut off.
    Limits: B * S and capacity below 2**31. B = 0, S = 0 and empty sequences are legal.
    Cost: one kernel launch; reads the mask twice, writes 4 bytes a padded position and 8 a row.

    >>> plan = pack_plan(torch.tensor([[1, 1, 0], [0, 1, 0]]))
    >>> plan.cu_seqlens.tolist(), plan.indices.tolist(), plan.position_ids.tolist()
    ([0, 2, 3], [0, 1, 4], [0, 1, 1])
    """
    (source, kind, padded_len, rows), known = _source(mask, lengths, cu_seqlens, max_seqlen, capacity)
    batch = source.shape[0] - (1 if kind == CU_SEQLENS else 0)
    backend = _PLAN.choose(source, kind, padded_len, rows)
    cu, indices, inverse, position_ids, tiles, stats = backend.fwd(source, kind, padded_len, rows)
    if capacity is not None:
        return PackPlan(cu, indices, inverse, position_ids, tiles, padded_len, stats[0], batch, padded_len)
    total, entries, longest = stats.tolist() if known is None else known
    return PackPlan(
        cu, indices[:total], inverse, position_ids[:total], tiles[:entries], longest, total, batch, padded_len
    )


def pack(x, plan):
    """Gather the real tokens of a padded tensor: y[t] = x.flatten(0, 1)[plan.indices[t]].

    Shapes: x (B, S, ...) on the plan's device, any dtype; returns (R, ...), R = plan.total, or the plan's capacity with
        zeros in the unused rows. Layout: any strides, read in place, for up to two trailing dims with the last
        contiguous; otherwise x is copied first.
    Gradients: x (the gradient is unpack's gather). Cost: one launch, reads each real token once, writes each row once.
    """
    _check_rows("pack", "x", x, plan, (plan.batch, plan.padded_len), "(B, S, ...)")
    return _move("pack", x, plan.indices, plan.inverse, (plan.batch, plan.padded_len), 0.0)


def unpack(y, plan, fill=0.0):
    """Scatter packed rows back to the padded layout: out[b, s] = y[row of (b, s)], `fill` at padding.

    Shapes: y (R, ...) with the rows of plan.indices; returns (B, S, ...). Layout, cost: as pack, the other way round.
    fill: a number that y's dtype can hold.
    Gradients: y (the gradient is pack's gather).
    """
    _check_rows("unpack", "y", y, plan, (plan.indices.shape[0],), "(R, ...)")
    checks.require(_holds(y.dtype, fill), "unpack", f"fill must be a value of {y.dtype}", fill)
    out = _move("unpack", y.unsqueeze(0), plan.inverse, plan.indices, (1, y.shape[0]), fill)
    return out.unflatten(0, (plan.batch, plan.padded_len))


def _source(mask, lengths, cu_seqlens, max_seqlen, capacity):
    """The call (source, its kind, padded length, rows to allocate), checked, and its stats if the host knows them."""
    name = "pack_plan"
    given = [x for x in (mask, lengths, cu_seqlens) if x is not None]
    checks.require(len(given) == 1, name, "takes exactly one of mask, lengths and cu_seqlens", len(given))
    (source,) = given
    kind = type(source).__name__
    checks.require(isinstance(source, torch.Tensor), name, "its input must be a tensor", kind, error=TypeError)
    whole = not (source.dtype.is_floating_point or source.dtype.is_complex)
    checks.require(whole, name, "its input must be bool or integer", source.dtype, error=TypeError)
    checks.require(capacity is None or 0 <= capacity < 2**31, name, "capacity must be >= 0 and below 2**31", capacity)
    checks.require(max_seqlen is None or max_seqlen >= 0, name, "max_seqlen must be >= 0", max_seqlen)
    known = None
    if mask is not None:
        checks.require(mask.dim() == 2, name, "mask must have shape (B, S)", tuple(mask.shape))
        checks.require(max_seqlen is None, name, "max_seqlen belongs to lengths and cu_seqlens", max_seqlen)
        kind, batch, padded_len = MASK, *mask.shape
        source = mask if mask.dtype in _MASK_DTYPES else mask != 0
        rows = mask.numel() if capacity is None else capacity
    else:
        kind = LENGTHS if cu_seqlens is None else CU_SEQLENS
        shape = "lengths must have shape (B,)" if kind == LENGTHS else "cu_seqlens must have shape (B+1,)"
        checks.require(source.dim() == 1 and source.shape[0] >= (kind == CU_SEQLENS), name, shape, tuple(source.shape))
        batch, padded_len, rows = source.shape[0] - (1 if kind == CU_SEQLENS else 0), max_seqlen, capacity
        if capacity is None:
            known, padded_len = _measure(name, source.tolist(), kind, max_seqlen)  # the host sync of the exact mode
            rows = known[0]
        checks.require(padded_len is not None, name, "capacity with lengths or cu_seqlens needs max_seqlen", None)
        source = source if source.dtype in (torch.int32, torch.int64) else source.to(torch.int32)
    checks.require(batch * padded_len < 2**31, name, "B * S must be below 2**31", (batch, padded_len))
    return (source, kind, padded_len, rows), known


def _measure(name, values, kind, max_seqlen):
    """((tokens, tiles, longest), padded length) of checked lengths or cu_seqlens."""
    if kind == CU_SEQLENS:
        checks.require(values[0] == 0, name, "cu_seqlens must start at 0", values[0])
        values = [b - a for a, b in zip(values, values[1:])]
    shortest, longest = min(values, default=0), max(values, default=0)
    checks.require(shortest >= 0, name, "lengths must be >= 0", shortest)
    padded_len = longest if max_seqlen is None else max_seqlen
    checks.require(longest <= padded_len, name, f"no sequence may be longer than max_seqlen={padded_len}", longest)
    return (sum(values), sum(-(-value // TILE) for value in values), longest), padded_len


def _check_rows(name, argument, x, plan, rows, shape):
    rule = f"{argument} must have shape {shape} with leading sizes {rows}"
    checks.require(tuple(x.shape[: len(rows)]) == rows, name, rule, tuple(x.shape))
    device = plan.indices.device
    checks.require(x.device == device, name, f"{argument} must be on the plan's device, {device}", x.device)


def _holds(dtype, fill):
    if dtype.is_floating_point or dtype.is_complex:
        return not math.isfinite(fill) or abs(fill) <= torch.finfo(dtype).max
    if dtype == torch.bool:
        return fill in (0, 1)
    return torch.iinfo(dtype).min <= fill <= torch.iinfo(dtype).max and fill == math.floor(fill)


def _last_contiguous(x):
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class _Gather(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse index: no atomics, deterministic."""

    @staticmethod
    def forward(ctx, src, index, inverse, fill, gather):
        ctx.save_for_backward(index, inverse)
        ctx.leading, ctx.gather = src.shape[:2], gather
        return gather(src, index, fill)

    @staticmethod
    def backward(ctx, dout):
        index, inverse = ctx.saved_tensors
        dsrc = _Gather.apply(_last_contiguous(dout).unsqueeze(0), inverse, index, 0.0, ctx.gather)
        return dsrc.unflatten(0, ctx.leading), None, None, None, None


def _move(name, src, index, inverse, leading, fill):
    """Gather rows of src (B, S, ...) by index; the kernels see it as (B, S, outer, inner) with inner contiguous."""
    trailing = src.shape[2:]
    if src.dim() == 2:
        rows = src[..., None, None]
    elif src.dim() == 3:
        rows = src[..., None, :]
    else:
        rows = src.flatten(3) if src.dim() > 4 else src
    rows = _last_contiguous(rows)
    gather = _GATHER.choose(rows, index, fill).fwd
    if checks.needs_grad(src):
        out = _Gather.apply(rows, index, inverse, fill, gather)
    else:
        out = gather(rows, index, fill)
    return out.view(index.shape[0], *trailing)


def _prepare_plan(*args, **kwargs):
    names = ("mask", "lengths", "cu_seqlens", "max_seqlen", "capacity")
    options = dict.fromkeys(names) | dict(zip(names, args)) | kwargs
    return _source(*options.values())[0]


def _prepare_pack(x, plan):
    return x, plan.indices, 0.0


def _probe_plan(device):
    return (torch.ones(1, 2, dtype=torch.bool, device=device),)


def _probe_pack(device):
    (mask,) = _probe_plan(device)
    with dispatch.use_backend("reference"):
        return mask[..., None].float(), pack_plan(mask)


def _refuse_cuda(tensor, *rest):
    return _native.refuse_cuda(tensor)


def _refuse_cpu(tensor, *rest):
    return _native.refuse_cpu(tensor)


_PLAN = dispatch.Table(
    "pack_plan",
    _prepare_plan,
    dispatch.Backend("cuda", _refuse_cuda, _plan_op),
    dispatch.Backend("cpu", _refuse_cpu, _plan_op),
    dispatch.Backend("reference", dispatch.never, reference.pack_plan),
    probe=_probe_plan,
)
_GATHER = dispatch.Table(
    "pack",
    _prepare_pack,
    dispatch.Backend("cuda", _refuse_cuda, _gather_op),
    dispatch.Backend("cpu", _refuse_cpu, _gather_op),
    dispatch.Backend("reference", dispatch.never, reference.gather_rows),
    probe=_probe_pack,
)


@fake("pack_plan")
def _plan_fake(source, kind, padded_len, capacity):
    batch = source.shape[0] - (1 if kind == CU_SEQLENS else 0)

    def ints(*shape):
        return source.new_empty(shape, dtype=torch.int32)

    tiles = ints(tile_capacity(capacity, batch), 4)
    return ints(batch + 1), ints(capacity), ints(batch * padded_len), ints(capacity), tiles, ints(3)


@fake("gather_rows")
def _gather_fake(src, index, fill):
    return src.new_empty((index.shape[0], src.shape[2], src.shape[3]))
