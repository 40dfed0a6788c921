"""Launches linear attention and its gradients: which passes a call consists of, whole sequences or segments."""

from typing import NamedTuple

import torch
import triton

from . import linear_attention_configs as configs
from .launch import Launcher, alignments
from .linear_attention_device import (
    BOTH_SIDES,
    EXP_SHIFTED,
    FROM_RIGHT,
    IDENTITY,
    NOTHING,
    ONE_SIDED,
    SUM_OF_KEYS,
    SUM_OF_PAIRS,
    linear_attention_kernel,
)
from .linear_attention_sums import (
    linear_attention_decay_kernel,
    linear_attention_rows_kernel,
    linear_attention_scan_kernel,
)

NON_CAUSAL, CAUSAL, REVERSE, BIDIRECTIONAL = range(4)  # as in flowattn/reference/linear_attention.py
SCAN_BLOCK, ROWS_BLOCK, DECAY_BLOCK = 1024, 32, 256
NARROWEST = 16  # of a product's operands

_pass_kernel = Launcher(linear_attention_kernel)
_scan_kernel = Launcher(linear_attention_scan_kernel)
_rows_kernel = Launcher(linear_attention_rows_kernel)
_decay_kernel = Launcher(linear_attention_decay_kernel)


class Rows(NamedTuple):
    """Rows (B, T, heads, width) in the role of queries, keys or values, phi(rows) * factor in use."""

    x: torch.Tensor
    group: int = 1  # query heads that share a head of x
    map: int = IDENTITY.value
    factor: torch.Tensor | None = None  # (B, T) or (B, T, H), contiguous


class State(NamedTuple):
    """S and z of linear_attention_device.py, in the layout of `LinearState`."""

    s: torch.Tensor | None = None
    z: torch.Tensor | None = None


NO_STATE = State()


class Sides(NamedTuple):
    """Which side the keys come from, and, where from both, the states right of each chunk."""

    kind: int = ONE_SIDED.value
    right: State = NO_STATE


LEFT = Sides()


class Call(NamedTuple):
    """What all passes of a call share."""

    q: torch.Tensor
    heads: int
    cu: torch.Tensor | None
    decay: torch.Tensor | None
    mode: int

    @property
    def sequences(self):
        return self.q.shape[0] if self.cu is None else self.cu.shape[0] - 1

    @property
    def wide(self):
        """Whether products take float32 operands."""
        return self.q.dtype != torch.bfloat16

    @property
    def operands(self):
        """The dtype of products' operands, and so of states that are only that."""
        return torch.float32 if self.wide else self.q.dtype

    @property
    def precision(self):
        return "tf32x3" if self.q.dtype == torch.float32 else "tf32"

    def decay_strides(self):
        if self.decay is None:
            return 0, 0, 0
        return tuple(0 if size == 1 else stride for size, stride in zip(self.decay.shape, self.decay.stride()))

    def empty(self, *shape):
        return self.q.new_empty(shape, dtype=torch.float32)


class Pass(NamedTuple):
    """One pass (linear_attention_device.py). Widths: K of keys, V of values. No `out`: only the state is wanted."""

    a: Rows | None
    b: Rows
    c: Rows
    vector: int = NOTHING.value
    x: torch.Tensor | None = None
    w: torch.Tensor | None = None
    backwards: bool = False  # walks from the other end, where decays act a step late
    transposed: bool = False  # S is kept with its dims exchanged
    value_scale: float = 1.0
    scale: float = 1.0
    eps: float = 0.0
    den: torch.Tensor | None = None
    out: torch.Tensor | None = None
    out_factor: torch.Tensor | None = None
    input: Rows | None = None
    terms: torch.Tensor | None = None
    negative: bool = False


def tile(call, step):
    """(CHUNK, BV, num_warps, num_stages) and BK of a pass; columns past the widths are masked."""
    width, value_width = (max(NARROWEST, triton.next_power_of_2(rows.x.shape[3])) for rows in (step.b, step.c))
    whole = max(step.c.map, step.input.map if step.input else 0) >= EXP_SHIFTED.value
    return configs.config(call.q.dtype, width, value_width, whole), width


def slices(call, step):
    return triton.cdiv(step.c.x.shape[3], tile(call, step)[0][1])


def run(call, step, state, final=NO_STATE, *, walks=True, segment=0, by_slot=False, log_decay=None, sides=LEFT):
    """Launch the pass kernel over whole sequences, or segments of `segment` tokens."""
    config, block_keys = tile(call, step)
    a, b, c, given = step.a, step.b, step.c, step.input
    rows = a if step.out is not None else b
    length = rows.x.shape[1]
    count = triton.cdiv(length, segment) if segment else 1
    slots = call.sequences * count if call.cu is None else slot_bound(call, length, segment)
    backwards = step.backwards != (call.mode == REVERSE) or sides.kind == FROM_RIGHT.value
    strides = [x.x.stride()[:3] if x is not None else (0, 0, 0) for x in (a, b, c, given)]
    strides = sum(strides, ()) + call.decay_strides()
    factors = [x.factor if x is not None else None for x in (a, b, c)]
    pointers = (
        *(x.x if x is not None else None for x in (a, b, c, given)), step.out, *factors, step.out_factor, call.decay,
        step.x, step.w, step.den, step.terms, *state, *final, log_decay, *sides.right, call.cu,
    )  # fmt: skip
    constants = (
        call.heads, *(x.group if x is not None else 1 for x in (a, b, c, given)), b.x.shape[3], c.x.shape[3],
        block_keys, *(x.map if x is not None else IDENTITY.value for x in (a, b, c, given)),
        *(call.heads if f is not None and f.dim() == 3 else 1 for f in factors),
        step.vector, walks, -1 if backwards else 1, step.backwards, step.transposed, segment, by_slot,
        step.value_scale != 1.0, step.negative, sides.kind, call.wide, call.precision,
    )  # fmt: skip
    programs = slots * call.heads * triton.cdiv(c.x.shape[3], config[1])
    if programs:
        dtypes = tuple(x.dtype if x is not None else None for x in pointers)
        _pass_kernel(
            programs,
            (dtypes, strides, alignments(*pointers)),
            (
                *pointers, call.sequences, length, count, (call.sequences + 1).bit_length(), *strides, step.scale,
                step.eps, step.value_scale,
            ),
            constants,
            config,
        )  # fmt: skip


def slot_bound(call, length, segment):
    """Slots that hold the segments of packed sequences, however long each is (see intervals.py)."""
    return length // segment + call.sequences + 1 if segment else call.sequences


def scan(call, step, local, log_decay, initial, final, segment, length, keep):
    """Launch the scan over the segments' sums, for S and for z."""
    walks_back = step.backwards != (call.mode == REVERSE)
    count = triton.cdiv(length, segment)
    strides = call.decay_strides()
    for own, start, end in zip(local, initial, final):
        if own is None:
            continue
        size = own[0, 0].numel()
        pointers = (own, log_decay, start, end, call.decay, call.cu)
        constants = (call.heads, size, segment, -1 if walks_back else 1, step.backwards, keep)
        _scan_kernel(
            call.sequences * call.heads * triton.cdiv(size, SCAN_BLOCK),
            (tuple(x.dtype if x is not None else None for x in pointers), strides, alignments(*pointers)),
            (*pointers, call.sequences, length, count, *strides),
            constants,
            (SCAN_BLOCK, 4, 1),
        )


def walk(call, step, initial, final=NO_STATE, also=None):
    """A causal pass, of whole sequences where these fill the processors, else of segments after a scan over them.

    `also`: a second pass, over the same S the other way round, without z.
    """
    length = step.b.x.shape[1]
    segment = segment_of(call, step, length)
    if not segment:
        run(call, step, initial, final if also is None else State(None, final.z))
        if also is not None:
            run(call, also, State(initial.s), State(final.s))
        return
    local, log_decay = sums(call, step, segment)
    scan(call, step, local, log_decay, initial, final, segment, length, keep=True)
    run(call, step, local, segment=segment, by_slot=True)
    if also is not None:
        run(call, also, State(local.s), segment=segment, by_slot=True)


def both_sides(call, step):
    """Retention in both directions with one decay a head, which the gradients' passes then share."""
    chunk = tile(call, step)[0][0]
    length, width, value_width = step.b.x.shape[1], step.b.x.shape[3], step.c.x.shape[3]
    chunks = call.sequences * triton.cdiv(length, chunk) if call.cu is None else slot_bound(call, length, chunk)
    z = None if step.vector == NOTHING.value else call.empty(
        chunks, call.heads, width if step.vector == SUM_OF_KEYS.value else value_width
    )  # fmt: skip
    right = State(call.q.new_empty((chunks, call.heads, width, value_width), dtype=call.operands), z)
    run(call, only_sums(step), NO_STATE, sides=Sides(FROM_RIGHT.value, right))
    run(call, step, NO_STATE, sides=Sides(BOTH_SIDES.value, right))


def only_sums(step):
    """The pass without its result, in the same tiles."""
    return step._replace(out=None, terms=None, den=None)


def sums(call, step, segment):
    """(sums over each segment alone, their log decays)."""
    length = step.b.x.shape[1]
    slots = call.sequences * triton.cdiv(length, segment)
    slots = slots if call.cu is None else slot_bound(call, length, segment)
    width, value_width = step.b.x.shape[3], step.c.x.shape[3]
    z = None if step.vector == NOTHING.value else call.empty(
        slots, call.heads, width if step.vector == SUM_OF_KEYS.value else value_width
    )  # fmt: skip
    local = State(call.empty(slots, call.heads, width, value_width), z)
    log_decay = None if call.decay is None else call.empty(slots, call.heads)
    run(call, only_sums(step), NO_STATE, local, segment=segment, by_slot=True, log_decay=log_decay)
    return local, log_decay


def total(call, step, initial, final):
    """The sums over all tokens, `initial` included, into `final`."""
    length = step.b.x.shape[1]
    step = only_sums(step)
    segment = segment_of(call, step, length)
    if not segment:
        return run(call, step, initial, final)
    local, _ = sums(call, step, segment)
    scan(call, step, local, None, initial, final, segment, length, keep=False)


def apply(call, step, state):
    """A non-causal pass: every row meets the sums over all tokens."""
    chunk = tile(call, step)[0][0]
    run(call, step, state, walks=False, segment=configs.SHORTEST_SEGMENT * chunk)


def segment_of(call, step, length):
    config, _ = tile(call, step)
    programs = call.sequences * call.heads * slices(call, step)
    return configs.segment_tokens(call.q.device, programs, length, config[0])


def contiguous(x):
    return None if x is None else x.contiguous()


def linear_attention_fwd(
    q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize
):
    (batch, length, heads, width), value_width, group = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    call = Call(q, heads, cu_seqlens, decay, mode)
    out = (q.new_empty if cu_seqlens is None else q.new_zeros)((batch, length, heads, value_width))
    den = call.empty(batch, length, heads) if normalize else call.empty(0)
    directed = mode != BIDIRECTIONAL
    final = State(call.empty(call.sequences, heads, width, value_width) if directed else call.empty(0))
    if normalize and directed:
        final = final._replace(z=call.empty(call.sequences, heads, width))
    step = Pass(
        Rows(q, 1, map_q), Rows(k, group, map_k, contiguous(key_weight)), Rows(v, group),
        vector=SUM_OF_KEYS.value if normalize else NOTHING.value, scale=scale, eps=eps,
        den=den if normalize else None, out=out, out_factor=contiguous(row_scale),
    )  # fmt: skip
    if mode == NON_CAUSAL:
        total(call, step, State(s0, z0), final)
        apply(call, step, final)
    elif directed:
        walk(call, step, State(s0, z0), final)
    else:
        both_sides(call, step)
    return out, den, final.s, call.empty(0) if final.z is None else final.z


def linear_attention_bwd(
    dout, ds, dz, q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, out, den, s, z, scale, eps, map_q, map_k,
    mode, normalize, want_ddecay,
):  # fmt: skip
    (batch, length, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    call = Call(q, heads, cu_seqlens, decay, mode)
    make = torch.empty if cu_seqlens is None else torch.zeros
    dq, *parts = (
        make((*x.shape[:2], heads, x.shape[3]), dtype=dtype, device=q.device)
        for x, dtype in ((q, q.dtype), *((x, q.dtype if group == 1 else torch.float32) for x in (k, v)))
    )
    ds0 = torch.empty_like(s) if s0 is not None or mode == NON_CAUSAL else None
    dz0 = torch.empty_like(z) if z0 is not None or (mode == NON_CAUSAL and normalize) else None
    factor, x = _row_factors(call, dout, out, den, row_scale, scale, normalize)
    query, key = Rows(q, 1, map_q), Rows(k, group, map_k, contiguous(key_weight))
    value, grad = Rows(v, group), Rows(dout, factor=factor)
    pairs = SUM_OF_PAIRS.value if normalize else NOTHING.value
    plain = scale if factor is None else 1.0  # what is not in the factor
    dq_step = Pass(grad, value, key, vector=pairs, x=x, transposed=True, scale=plain, out=dq, input=query)
    dk_step = Pass(
        value, grad, query, vector=pairs, w=x, transposed=True, backwards=True, value_scale=plain, out=parts[0],
        out_factor=key.factor, input=Rows(k, group, map_k), negative=True,
    )  # fmt: skip
    dv_step = Pass(key, query, grad, backwards=True, value_scale=plain, out=parts[1])
    if want_ddecay:
        counts = [slices(call, step) for step in (dq_step, dk_step)]
        terms = make((sum(counts), batch, length, heads), dtype=torch.float32, device=q.device)
        dq_step, dk_step = (step._replace(terms=part) for step, part in zip((dq_step, dk_step), terms.split(counts)))
    if mode == NON_CAUSAL:
        total(call, dk_step, State(ds, dz), State(ds0, dz0))
        apply(call, dq_step, State(s, z if normalize else None))
        apply(call, dk_step, State(ds0, dz0))
        apply(call, dv_step, State(ds0))
    elif mode == BIDIRECTIONAL:
        for step in (dq_step, dk_step, dv_step):
            both_sides(call, step._replace(backwards=False))
    else:
        walk(call, dq_step, State(s0, z0))
        walk(call, dk_step, State(ds, dz), State(ds0, dz0), also=dv_step)
    dk, dv = (part if group == 1 else part.unflatten(2, (-1, group)).sum(3).to(q.dtype) for part in parts)
    ddecay = call.empty(0)
    if want_ddecay:
        ddecay = _sum_terms(call, terms, s, ds, z, dz, s0 is None)
    return dq, dk, dv, ddecay, call.empty(0) if s0 is None else ds0, call.empty(0) if z0 is None else dz0


def _row_factors(call, dout, out, den, row_scale, scale, normalize):
    """(factor, x) of linear_attention_rows_kernel, each None where it is not needed."""
    if not normalize and row_scale is None:
        return None, None
    factor = call.empty(*dout.shape[:3])
    x = torch.empty_like(factor) if normalize else None
    rows, width = factor.numel(), dout.shape[3]
    pointers = (dout, out, den if normalize else None, contiguous(row_scale), factor, x)
    strides = dout.stride()[:3]
    if rows:
        _rows_kernel(
            triton.cdiv(rows, ROWS_BLOCK),
            (dout.dtype, tuple(p is None for p in pointers), strides, alignments(*pointers)),
            (*pointers, rows, dout.shape[1], *strides, scale),
            (call.heads, width, triton.next_power_of_2(width)),
            (ROWS_BLOCK, 4, 1),
        )
    return factor, x


def _sum_terms(call, terms, s, ds, z, dz, fresh):
    last = None  # <S_T, dS_T> + <z_T, dz_T>
    if ds is not None:
        last = (s * ds).sum((2, 3))
    if dz is not None:
        dots = (z * dz).sum(2)
        last = dots if last is None else last + dots
    shape = terms.shape[1:]
    ddecay = (torch.empty if call.cu is None else torch.zeros)(shape, dtype=torch.float32, device=terms.device)
    if call.sequences:
        _decay_kernel(
            call.sequences * call.heads,
            (last is None, call.cu is None, alignments(terms, last, ddecay, call.cu)),
            (terms, last, ddecay, call.cu, call.sequences, shape[1]),
            (call.heads, terms.shape[0], -1 if call.mode == REVERSE else 1, fresh),
            (DECAY_BLOCK, 4, 1),
        )
    return ddecay
