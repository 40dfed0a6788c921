"""Launches linear attention and its gradients: which kernels a call consists of, whole sequences or segments."""

from typing import NamedTuple

import torch

from . import linear_attention_configs as configs
from .launch import Launcher, alignments
from .linear_attention_carry import (
    BIDIRECTIONAL,
    CAUSAL,
    NO_STATE,
    NON_CAUSAL,
    REVERSE,
    Call,
    Rows,
    Side,
    State,
    carry,
    ceil_div,
    padded,
)
from .linear_attention_device import (
    BOTH_SIDES,
    FROM_RIGHT,
    NOTHING,
    ONE_SIDED,
    OTHER_END,
    SUM_OF_KEYS,
    SUM_OF_PAIRS,
    linear_attention_kernel,
)
from .linear_attention_gradients import linear_attention_gradients_kernel, linear_attention_rows_kernel
from .linear_attention_rows import EXP_SHIFTED, IDENTITY, linear_attention_map_kernel

ROWS_BLOCK = 32

_map_kernel = Launcher(linear_attention_map_kernel)
_pass_kernel = Launcher(linear_attention_kernel)
_gradients_kernel = Launcher(linear_attention_gradients_kernel)
_rows_kernel = Launcher(linear_attention_rows_kernel)


class Sides(NamedTuple):
    """Which side the keys of a pass come from, and, where from both, the states right of each chunk."""

    kind: int = ONE_SIDED.value
    right: State = NO_STATE


LEFT = Sides()
OTHER = Sides(OTHER_END.value)


class Pass(NamedTuple):
    """One pass (linear_attention_device.py). Widths: K of keys, V of values. No `out`: only states are wanted."""

    a: Rows | None
    b: Rows
    c: Rows
    vector: int = NOTHING.value
    x: torch.Tensor | None = None
    w: torch.Tensor | None = None
    transposed: bool = False  # S is kept with its dims exchanged
    value_scale: float = 1.0
    scale: float = 1.0
    eps: float = 0.0
    den: torch.Tensor | None = None
    out: torch.Tensor | None = None
    out_factor: torch.Tensor | None = None
    input: Rows | None = None


def tile(call, step):
    """(CHUNK, BV, num_warps, num_stages) and registers of a pass; columns past the widths are masked."""
    widths = call.padded(step.b.x.shape[3], step.c.x.shape[3])
    whole = max(step.c.map, step.input.map if step.input else 0) >= EXP_SHIFTED.value
    return configs.config(call.q.dtype, *widths, whole, call.mode == BIDIRECTIONAL)


def mapped(rows):
    """`rows` after their map and factor, where it pays to write them once before the passes that read them."""
    x, (batch, length, heads, width) = rows.x, rows.x.shape
    if (rows.map == IDENTITY.value and rows.factor is None) or not configs.maps_once(x.dtype, padded(width)):
        return rows
    out = x.new_empty(x.shape)
    if out.numel():
        _map_kernel(
            ceil_div(batch * length * heads, ROWS_BLOCK),
            (x.stride()[:3], alignments(x, rows.factor)),
            (x, rows.factor, out, batch * length * heads, length, *x.stride()[:3]),
            (heads, width, padded(width), rows.map, factor_heads(rows.factor)),
            (ROWS_BLOCK, 4, 1),
        )
    return Rows(out, rows.group)


def factor_heads(factor):
    return factor.shape[2] if factor is not None and factor.dim() == 3 else 1


def run(call, step, state, final=NO_STATE, *, walks=True, segment=0, by_slot=False, sides=LEFT):
    """Launch the pass kernel over whole sequences, or segments of `segment` tokens."""
    config, registers = tile(call, step)
    a, b, c, given = step.a, step.b, step.c, step.input
    rows = a if step.out is not None else b
    length = rows.x.shape[1]
    backwards = (call.mode == REVERSE) != (sides.kind in (OTHER_END.value, FROM_RIGHT.value))
    strides = [x.x.stride()[:3] if x is not None else (0, 0, 0) for x in (a, b, c, given)]
    strides = sum(strides, ()) + call.decay_strides
    factors = [x.factor if x is not None else None for x in (a, b, c)]
    pointers = (
        *(x.x if x is not None else None for x in (a, b, c, given)), step.out, *factors, step.out_factor, call.decay,
        step.x, step.w, step.den, *state, *final, *sides.right, call.cu,
    )  # fmt: skip
    constants = (
        call.heads, *(x.group if x is not None else 1 for x in (a, b, c, given)), b.x.shape[3], c.x.shape[3],
        call.padded(b.x.shape[3], c.x.shape[3])[0],
        *(x.map if x is not None else IDENTITY.value for x in (a, b, c, given)),
        *map(factor_heads, factors),
        step.vector, walks, -1 if backwards else 1, call.steady, step.transposed, segment, by_slot,
        step.value_scale != 1.0, sides.kind, call.wide, call.precision,
    )  # fmt: skip
    programs = call.slots(length, segment) * call.heads * ceil_div(c.x.shape[3], config[1])
    if programs:
        _pass_kernel(
            programs,
            (strides, alignments(*pointers)),
            (*pointers, *call.where(length, segment), *strides, step.scale, step.eps, step.value_scale),
            constants,
            config,
            maxnreg=registers,
        )


def walk(call, step, left):
    """A causal pass, of whole sequences where these fill the processors, else of segments after a scan over them."""
    config, _ = tile(call, step)
    length = step.b.x.shape[1]
    programs = call.sequences * call.heads * ceil_div(step.c.x.shape[3], config[1]) * config[2] // 4
    segment = configs.segment_tokens(call.q.device, programs, length, config[0])
    if not segment:
        return run(call, step, left.start, left.end)
    before, _ = carry(call, left, None, config[0], segment=segment, keep_segments=True)
    run(call, step, before, segment=segment, by_slot=True)


def both_sides(call, step):
    """Retention in both directions with one decay a head, which the gradients' passes then share."""
    chunk = tile(call, step)[0][0]
    length, width, value_width = step.b.x.shape[1], step.b.x.shape[3], step.c.x.shape[3]
    chunks = call.slots(length, chunk)
    z = None if step.vector == NOTHING.value else call.empty(
        chunks, call.heads, width if step.vector == SUM_OF_KEYS.value else value_width
    )  # fmt: skip
    right = State(call.empty(chunks, call.heads, width, value_width, dtype=call.operands), z)
    run(call, step._replace(out=None, den=None), NO_STATE, sides=Sides(FROM_RIGHT.value, right))
    run(call, step, NO_STATE, sides=Sides(BOTH_SIDES.value, right))


def apply(call, step, state):
    """A non-causal pass: every row meets the sums over all tokens."""
    chunk = tile(call, step)[0][0]
    run(call, step, state, walks=False, segment=configs.SHORTEST_SEGMENT * chunk)


def contiguous(x):
    return None if x is None else x.contiguous()


def linear_attention_fwd(
    q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize
):
    (batch, length, heads, width), value_width, group = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    call = Call(q, heads, cu_seqlens, decay, mode, normalize)
    out = (q.new_empty if cu_seqlens is None else q.new_zeros)((batch, length, heads, value_width))
    den = call.empty(batch, length, heads) if normalize else call.empty(0)
    final = call.states(call.sequences, width, value_width) if mode != BIDIRECTIONAL else State(call.empty(0))
    query = mapped(Rows(q, 1, map_q))
    key = mapped(Rows(k, group, map_k, contiguous(key_weight)))
    left = Side(key, Rows(v, group), State(s0, z0), final)
    step = Pass(
        query, key, left.c, vector=SUM_OF_KEYS.value if normalize else NOTHING.value, scale=scale, eps=eps,
        den=den if normalize else None, out=out, out_factor=contiguous(row_scale),
    )  # fmt: skip
    if mode == BIDIRECTIONAL:
        both_sides(call, step)
    elif mode == NON_CAUSAL:
        carry(call, left, None, tile(call, step)[0][0])
        apply(call, step, final)
    else:
        walk(call, step, left)
    return out, den, final.s, call.empty(0) if final.z is None else final.z


def linear_attention_bwd(
    dout, ds, dz, q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, out, den, s, z, scale, eps, map_q, map_k,
    mode, normalize, want_ddecay,
):  # fmt: skip
    (batch, length, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    plain = 1.0 if normalize or row_scale is not None or scale == 0 else scale  # what is not in the factor
    call = Call(q, heads, cu_seqlens, decay, mode, normalize, plain)
    make = torch.empty if cu_seqlens is None else torch.zeros
    dq, *parts = (
        make((*x.shape[:2], heads, x.shape[3]), dtype=dtype, device=q.device)
        for x, dtype in ((q, q.dtype), *((x, q.dtype if group == 1 else torch.float32) for x in (k, v)))
    )
    ds0 = torch.empty_like(s) if s0 is not None or mode == NON_CAUSAL else None
    dz0 = torch.empty_like(z) if z0 is not None or (mode == NON_CAUSAL and normalize) else None
    factor, x = _row_factors(call, dout, out, den, row_scale, scale)
    query, key, value = Rows(q, 1, map_q), Rows(k, group, map_k, contiguous(key_weight)), Rows(v, group)
    grad = Rows(dout, factor=factor)
    right = Side(query, grad, State(ds, dz), State(ds0, dz0), x)
    ddecay = call.empty(0)
    left = Side(key, value, State(s0, z0))
    whole = max(map_q, map_k) >= EXP_SHIFTED.value
    by_passes = not want_ddecay and configs.by_passes(q.dtype, padded(q.shape[3]), whole)
    if mode in (CAUSAL, REVERSE) and not by_passes:
        if want_ddecay:
            ddecay = make((batch, length, heads), dtype=torch.float32, device=q.device)
        _gradients(call, left, right, (dq, *parts, ddecay if want_ddecay else None), s0 is None)
    else:
        pairs, of_key = SUM_OF_PAIRS.value if normalize else NOTHING.value, key.factor
        query, key, grad = mapped(query), mapped(key), mapped(grad)
        left, right = left._replace(b=key), right._replace(b=query, c=grad)
        dq_step = Pass(
            grad, value, key, vector=pairs, x=x, transposed=True, scale=plain, out=dq, input=Rows(q, 1, map_q)
        )
        dk_step = Pass(
            value, grad, query, vector=pairs, w=x, transposed=True, value_scale=plain, out=parts[0],
            out_factor=of_key, input=Rows(k, group, map_k),
        )  # fmt: skip
        dv_step = Pass(key, query, grad, value_scale=plain, out=parts[1])
        if mode == BIDIRECTIONAL:
            for step in (dq_step, dk_step, dv_step):
                both_sides(call, step)
        elif mode == NON_CAUSAL:
            carry(call, None, right, tile(call, dk_step)[0][0])
            apply(call, dq_step, State(s, z if normalize else None))
            apply(call, dk_step, right.end)
            apply(call, dv_step, State(ds0))
        else:
            _passes(call, left, right, dq_step, dk_step, dv_step)
    dk, dv = (part if group == 1 else part.unflatten(2, (-1, group)).sum(3).to(q.dtype) for part in parts)
    return dq, dk, dv, ddecay, call.empty(0) if s0 is None else ds0, call.empty(0) if z0 is None else dz0


def _passes(call, left, right, dq_step, dk_step, dv_step):
    """The gradients by passes over whole sequences, or over segments after a scan from both ends."""
    config, _ = tile(call, dq_step)
    length = left.b.x.shape[1]
    programs = call.sequences * call.heads * ceil_div(left.b.x.shape[3], config[1]) * config[2] // 4
    segment = configs.segment_tokens(call.q.device, programs, length, config[0])
    states, end = (left.start, right.start), right.end
    if segment:
        states, end = carry(call, left, right, config[0], segment=segment, keep_segments=True), NO_STATE
    options = {"segment": segment, "by_slot": segment > 0}
    run(call, dq_step, states[0], **options)
    run(call, dk_step, states[1], end, sides=OTHER, **options)
    run(call, dv_step, State(states[1].s), sides=OTHER, **options)


def _gradients(call, left, right, results, fresh):
    """Launch the states from both sides, then the gradients of all chunks."""
    key, value, query, grad = left.b, left.c, right.b, right.c
    length, width, value_width = query.x.shape[1], query.x.shape[3], value.x.shape[3]
    whole = max(query.map, key.map) >= EXP_SHIFTED.value
    single = results[3] is not None
    config, registers = configs.gradients_config(call.q.dtype, *call.padded(width, value_width), whole, single)
    chunk = config[0] * config[1]
    states = carry(call, left, right, chunk, keep_chunks=True)
    tensors = (query.x, key.x, value.x, grad.x)
    strides = sum((x.stride()[:3] for x in tensors), ()) + call.decay_strides
    pointers = (
        *tensors, grad.factor, key.factor, right.x, call.decay, *states[0], *states[1], *results, call.cu
    )  # fmt: skip
    programs = call.slots(length, chunk) * call.heads * config[0]
    if programs:
        _gradients_kernel(
            programs,
            (strides, alignments(*pointers)),
            (*pointers, *call.where(length, chunk), *strides, call.scale),
            (
                call.heads, key.group, width, value_width, query.map, key.map, fresh, call.step, call.steady,
                call.wide, call.precision,
            ),
            config,
            maxnreg=registers,
        )  # fmt: skip


def _row_factors(call, dout, out, den, row_scale, scale):
    """(factor, x) of linear_attention_rows_kernel, each None where it is not needed."""
    if not call.normalize and row_scale is None and scale != 0:
        return None, None
    factor = call.empty(*dout.shape[:3])
    x = torch.empty_like(factor) if call.normalize else None
    rows, width = factor.numel(), dout.shape[3]
    pointers = (dout, out, den if call.normalize else None, contiguous(row_scale), factor, x)
    strides = dout.stride()[:3]
    if rows:
        _rows_kernel(
            ceil_div(rows, ROWS_BLOCK),
            (dout.dtype, tuple(p is None for p in pointers), strides, alignments(*pointers)),
            (*pointers, rows, dout.shape[1], *strides, scale),
            (call.heads, width, padded(width)),
            (ROWS_BLOCK, 4, 1),
        )
    return factor, x
