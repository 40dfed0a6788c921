"""chunk_hybrid_attention: what every image adds to the state, a scan over the images, then all tiles at once.

The scan reads and writes D x M numbers an image and leaves the state before each; inner softmax and cross term are one
program. Backward: the same, its mirror image for the gradient of the state, dq by tile of queries, dk and dv by tile of
keys, and the gradient of the gates.
"""

import torch
import triton
import triton.language as tl

from .flow_attention_configs import SLICES, hybrid_config, hybrid_forward
from .flow_features import (
    dot_state,
    launch_key,
    load_state,
    load_tile,
    narrow,
    precision,
    sigmoid,
    store_state,
    store_tile,
    widths,
)
from .flow_features import time_strides as strides_of
from .launch import Launcher

UNSPECIALIZED = ("length", "chunk", "scale")


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _head(x, stride_b, stride_t, stride_h, b, h, first):
    return x + tl.cast(b, tl.int64) * stride_b + tl.cast(first, tl.int64) * stride_t + h * stride_h


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_update_kernel(
    k, v, gate, updates, decays, kept_of, length, chunk, scale,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What each image adds to the state, exp of the running sum of g, exp of its mean."""
    images = length // chunk
    index = tl.cast(tl.program_id(0), tl.int64)
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    k_base = _head(k, stride_kb, stride_kt, stride_kh, b, h // GROUP, first)
    v_base = _head(v, stride_vb, stride_vt, stride_vh, b, h // GROUP, first)
    gate_base = _head(gate, stride_gb, stride_gt, stride_gh, b, h, first)
    total = 0.0
    update = tl.zeros([BD, BM], tl.float32)
    if chunk > 0:  # see varlen_attention: a loop that may have no round waits for each product
        for begin in range(0, chunk, TILE):
            rows = begin + offs
            inside = rows < chunk
            raw = tl.load(gate_base + rows.to(tl.int64) * stride_gt, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(inside, _log_sigmoid(raw) / 16.0, 0.0)
            tl.store(decays + head * length + first + rows, tl.exp(total + tl.cumsum(g, 0)), mask=inside)
            total += tl.sum(g, 0)
            keys = narrow(load_tile(k_base, stride_kt, rows, cols, inside, D), k)
            values = narrow(load_tile(v_base, stride_vt, rows, cols_v, inside, M), k)
            update = tl.dot(tl.trans(keys), values, update, input_precision=PRECISION)
    tl.store(kept_of + index, tl.exp(total / chunk))
    store_state(updates + index * D * M, cols, cols_v, update * scale, D, M)


@triton.jit(do_not_specialize=("images",))
def chunk_hybrid_attention_scan_kernel(
    states, kept_of, initial, final, images,
    D: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What images add to the state before each of them, in place (REVERSE: behind), SLICE programs a head."""
    index, piece = tl.cast(tl.program_id(0) // SLICE, tl.int64), tl.program_id(0) % SLICE
    rows, cols_v = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, BM)
    state = tl.zeros([ROWS, BM], tl.float32)
    if initial is not None:
        state = load_state(initial + index * D * M, rows, cols_v, D, M)
    begin, step = index * images + (images - 1 if REVERSE else 0), -1 if REVERSE else 1
    own = load_state(states + begin * D * M, tl.where(images > 0, rows, D), cols_v, D, M)
    for done in range(0, images):
        at = begin + step * done
        following = load_state(states + (at + step * (done < images - 1)) * D * M, rows, cols_v, D, M)
        store_state(states + at * D * M, rows, cols_v, state, D, M)
        state = state * tl.load(kept_of + at) + own
        own = following
    if final is not None:
        store_state(final + index * D * M, rows, cols_v, state, D, M)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_fwd_kernel(
    q, k, v, o, lse, states, decays, length, chunk, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """WHOLE: the chunk is a multiple of KEYS. Backwards: it begins with keys that the last kernel left in the cache."""
    tiles, program = tl.cdiv(chunk, TILE), tl.num_programs(0) - 1 - tl.program_id(0)
    index, tile = program // tiles, program % tiles
    images = length // chunk
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    head, index = tl.cast(head, tl.int64), tl.cast(index, tl.int64)
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, KEYS)
    rows = tile * TILE + tl.arange(0, TILE)
    inside = rows < chunk
    dtype = q.dtype.element_ty
    queries = load_tile(_head(q, stride_qb, stride_qt, stride_qh, b, h, first), stride_qt, rows, cols, inside, D)
    k_base = _head(k, stride_kb, stride_kt, stride_kh, b, h // GROUP, first)
    v_base = _head(v, stride_vb, stride_vt, stride_vh, b, h // GROUP, first)
    unit = scale * 1.4426950408889634  # exponents of 2; `top` is the largest product before the scale
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BM], tl.float32)
    if chunk > 0:  # see varlen_attention: a loop that may have no round waits for each product
        for begin in range(0, chunk, KEYS):
            keys_at = begin + offs
            here = keys_at < chunk
            keys = load_tile(k_base, stride_kt, keys_at, cols, here, D)
            score = tl.dot(queries.to(dtype), tl.trans(keys.to(dtype)), input_precision=PRECISION)
            if not WHOLE:
                score = tl.where(here[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score * unit - (new_top * unit)[:, None])
            shrink = tl.exp2((top - new_top) * unit)
            total = total * shrink + tl.sum(p, 1)
            values = load_tile(v_base, stride_vt, keys_at, cols_v, here, M)
            acc = tl.dot(p.to(dtype), values.to(dtype), acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
    acc /= total[:, None]
    decay = tl.load(decays + head * length + first + rows, mask=inside, other=0.0)
    state = load_state(states + index * D * M, cols, cols_v, D, M)
    acc += dot_state(narrow(queries, q), state, q, PRECISION) * decay[:, None]
    o += ((tl.cast(b, tl.int64) * length + first) * HEADS + h) * M
    store_tile(o, HEADS * M, rows, cols_v, inside, acc, M)
    tl.store(lse + head * length + first + rows, top * scale + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_dupdate_kernel(
    q, do, updates, decays, length, chunk, stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What each image adds to the gradient of the state before it."""
    images = length // chunk
    index = tl.cast(tl.program_id(0), tl.int64)
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    q_base = _head(q, stride_qb, stride_qt, stride_qh, b, h, first)
    do_base = _head(do, stride_ob, stride_ot, stride_oh, b, h, first)
    update = tl.zeros([BD, BM], tl.float32)
    if chunk > 0:  # see varlen_attention: a loop that may have no round waits for each product
        for begin in range(0, chunk, TILE):
            rows = begin + offs
            inside = rows < chunk
            decay = tl.load(decays + head * length + first + rows, mask=inside, other=0.0)
            queries = narrow(load_tile(q_base, stride_qt, rows, cols, inside, D) * decay[:, None], q)
            grads = narrow(load_tile(do_base, stride_ot, rows, cols_v, inside, M), q)
            update = tl.dot(tl.trans(queries), grads, update, input_precision=PRECISION)
    store_state(updates + index * D * M, cols, cols_v, update, D, M)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_bwd_dq_kernel(
    q, k, v, do, dq, lse, delta_of, along, states, decays, length, chunk, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta, the sum of p dp, takes a loop of its own: o also holds the cross term, which is often much larger than
    the inner one, so that do . o would lose the digits of what it is here. Backwards, as the forward."""
    tiles, program = tl.cdiv(chunk, TILE), tl.num_programs(0) - 1 - tl.program_id(0)
    index, tile = program // tiles, program % tiles
    images = length // chunk
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    head, index = tl.cast(head, tl.int64), tl.cast(index, tl.int64)
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    rows = tile * TILE + offs
    inside = rows < chunk
    dtype = q.dtype.element_ty
    queries = load_tile(_head(q, stride_qb, stride_qt, stride_qh, b, h, first), stride_qt, rows, cols, inside, D)
    grads = load_tile(_head(do, stride_ob, stride_ot, stride_oh, b, h, first), stride_ot, rows, cols_v, inside, M)
    k_base = _head(k, stride_kb, stride_kt, stride_kh, b, h // GROUP, first)
    v_base = _head(v, stride_vb, stride_vt, stride_vh, b, h // GROUP, first)
    per_token = head * length + first
    row_lse = tl.load(lse + per_token + rows, mask=inside, other=float("inf"))
    delta = tl.zeros([TILE], tl.float32)
    if chunk > 0:  # see varlen_attention: a loop that may have no round waits for each product
        for begin in range(0, chunk, TILE):
            keys_at = begin + offs
            here = keys_at < chunk
            keys = load_tile(k_base, stride_kt, keys_at, cols, here, D).to(dtype)
            values = load_tile(v_base, stride_vt, keys_at, cols_v, here, M).to(dtype)
            score = tl.dot(queries.to(dtype), tl.trans(keys), input_precision=PRECISION) * scale
            p = tl.where(here[None, :], tl.exp(score - row_lse[:, None]), 0.0)
            delta += tl.sum(p * tl.dot(grads.to(dtype), tl.trans(values), input_precision=PRECISION), 1)
    acc = tl.zeros([TILE, BD], tl.float32)
    if chunk > 0:  # see varlen_attention: a loop that may have no round waits for each product
        for begin in range(0, chunk, TILE):
            keys_at = begin + offs
            here = keys_at < chunk
            keys = load_tile(k_base, stride_kt, keys_at, cols, here, D).to(dtype)
            values = load_tile(v_base, stride_vt, keys_at, cols_v, here, M).to(dtype)
            score = tl.dot(queries.to(dtype), tl.trans(keys), input_precision=PRECISION) * scale
            p = tl.where(here[None, :], tl.exp(score - row_lse[:, None]), 0.0)
            ds = p * (tl.dot(grads.to(dtype), tl.trans(values), input_precision=PRECISION) - delta[:, None])
            acc = tl.dot(ds.to(dtype), keys, acc, input_precision=PRECISION)
    decay = tl.load(decays + per_token + rows, mask=inside, other=0.0)
    state = load_state(states + index * D * M, cols, cols_v, D, M)
    cross = dot_state(narrow(grads, q), tl.trans(state), q, PRECISION) * decay[:, None]
    dq += ((tl.cast(b, tl.int64) * length + first) * HEADS + h) * D
    store_tile(dq, HEADS * D, rows, cols, inside, acc * scale + cross, D)
    tl.store(delta_of + per_token + rows, delta, mask=inside)
    tl.store(along + per_token + rows, tl.sum(queries * cross, 1), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_bwd_dkv_kernel(
    q, k, v, do, dk, dv, lse, delta_of, dstates, length, chunk, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(chunk, TILE)
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    images = length // chunk
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    head, index = tl.cast(head, tl.int64), tl.cast(index, tl.int64)
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    rows = tile * TILE + offs
    inside = rows < chunk
    dtype = q.dtype.element_ty
    q_base = _head(q, stride_qb, stride_qt, stride_qh, b, h, first)
    do_base = _head(do, stride_ob, stride_ot, stride_oh, b, h, first)
    keys = load_tile(
        _head(k, stride_kb, stride_kt, stride_kh, b, h // GROUP, first), stride_kt, rows, cols, inside, D
    )  # fmt: skip
    values = load_tile(
        _head(v, stride_vb, stride_vt, stride_vh, b, h // GROUP, first), stride_vt, rows, cols_v, inside, M
    )  # fmt: skip
    per_token = head * length + first
    d_state = load_state(dstates + index * D * M, cols, cols_v, D, M)
    dk_acc = dot_state(narrow(values, q), tl.trans(d_state), q, PRECISION)
    dv_acc = dot_state(narrow(keys, q), d_state, q, PRECISION) * scale
    for begin in range(0, chunk, TILE):
        queries_at = begin + offs
        here = queries_at < chunk
        queries = load_tile(q_base, stride_qt, queries_at, cols, here, D).to(dtype)
        grads = load_tile(do_base, stride_ot, queries_at, cols_v, here, M).to(dtype)
        row_lse = tl.load(lse + per_token + queries_at, mask=here, other=float("inf"))
        delta = tl.load(delta_of + per_token + queries_at, mask=here, other=0.0)
        score = tl.dot(keys.to(dtype), tl.trans(queries), input_precision=PRECISION) * scale  # (keys, queries)
        p = tl.exp(score - row_lse[None, :])
        dv_acc = tl.dot(p.to(dtype), grads, dv_acc, input_precision=PRECISION)
        ds = p * (tl.dot(values.to(dtype), tl.trans(grads), input_precision=PRECISION) - delta[None, :])
        dk_acc = tl.dot(ds.to(dtype), queries, dk_acc, input_precision=PRECISION)
    offset = (tl.cast(b, tl.int64) * length + first) * HEADS + h
    store_tile(dk + offset * D, HEADS * D, rows, cols, inside, dk_acc * scale, D)
    store_tile(dv + offset * M, HEADS * M, rows, cols_v, inside, dv_acc, M)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_hybrid_attention_dgate_kernel(
    gate, dgate, along, states, dstates, kept_of, length, chunk, stride_gb, stride_gt, stride_gh,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of one image: the sum over what comes after of q . dq through the state, and the state's own decay."""
    images = length // chunk
    index = tl.cast(tl.program_id(0), tl.int64)
    head, first = index // images, index % images * chunk
    b, h = head // HEADS, head % HEADS
    cols, cols_v, offs = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, TILE)
    state = load_state(states + index * D * M, cols, cols_v, D, M)
    d_state = load_state(dstates + index * D * M, cols, cols_v, D, M)
    d_mean = tl.load(kept_of + index) * tl.sum(state * d_state) / chunk
    gate = _head(gate, stride_gb, stride_gt, stride_gh, b, h, first)
    dgate += (b * length + first) * HEADS + h
    after = 0.0
    for step in range(0, tl.cdiv(chunk, TILE)):
        rows = (tl.cdiv(chunk, TILE) - 1 - step) * TILE + offs
        inside = rows < chunk
        share = tl.load(along + head * length + first + rows, mask=inside, other=0.0)
        behind = after + tl.cumsum(share, 0, reverse=True)
        raw = tl.load(gate + rows.to(tl.int64) * stride_gt, mask=inside, other=0.0).to(tl.float32)
        tl.store(dgate + rows.to(tl.int64) * HEADS, (behind + d_mean) * sigmoid(-raw) / 16.0, mask=inside)
        after += tl.sum(share, 0)


_update = Launcher(chunk_hybrid_attention_update_kernel)
_scan = Launcher(chunk_hybrid_attention_scan_kernel)
_fwd = Launcher(chunk_hybrid_attention_fwd_kernel)
_dupdate = Launcher(chunk_hybrid_attention_dupdate_kernel)
_dq = Launcher(chunk_hybrid_attention_bwd_dq_kernel)
_dkv = Launcher(chunk_hybrid_attention_bwd_dkv_kernel)
_dgate = Launcher(chunk_hybrid_attention_dgate_kernel)


class _Call:
    """What every launch of one call shares."""

    def __init__(self, q, k, v, chunk):
        self.batch, self.length, self.heads, self.width = q.shape
        self.width_v, self.chunk, self.scale = v.shape[3], chunk, q.shape[3] ** -0.5
        self.images, self.programs = self.length // chunk, self.batch * self.heads
        self.config = hybrid_config(q.dtype, widths(q, v)[2:])
        self.tiles = self.programs * self.images * triton.cdiv(chunk, self.config[0])
        self.constants = (self.heads, self.heads // k.shape[2], *widths(q, v), precision(q.dtype))
        self.sizes = (self.length, chunk)

    def states(self, q):
        """Room for a state before or after each image."""
        shape = (self.programs, self.images, self.width, self.width_v)
        return q.new_empty(shape, dtype=torch.float32)

    def scan(self, states, kept, initial, final, reverse):
        block, block_v = self.constants[4:6]
        _scan(
            self.programs * SLICES, launch_key((), states, kept, initial, final),
            (states, kept, initial, final, self.images),
            (self.width, self.width_v, block_v, block // SLICES, SLICES, reverse), (4, 1),
        )  # fmt: skip

    def walk(self, k, v, gate, state, final):
        """(states before each image, exp of the running sums of g, exp of their means)."""
        states = self.states(k)
        decays, kept = (states.new_empty((self.programs, n)) for n in (self.length, self.images))
        strides = strides_of(k, v, gate)
        if self.images:
            _update(
                self.programs * self.images, launch_key(strides, k, v, gate),
                (k, v, gate, states, decays, kept, *self.sizes, self.scale, *strides), self.constants, self.config,
            )  # fmt: skip
        self.scan(states, kept, state, final, False)
        return states, decays, kept


def chunk_hybrid_attention_fwd(q, k, v, gate, state, chunk):
    call = _Call(q, k, v, chunk)
    o = q.new_empty((*q.shape[:3], call.width_v))
    lse = q.new_empty((call.batch, call.heads, call.length), dtype=torch.float32)
    final = lse.new_empty((call.batch, call.heads, call.width, call.width_v))
    if call.programs:
        states, decays, _ = call.walk(k, v, gate, state, final)
    if call.tiles:
        strides, (rows, keys, *rest) = strides_of(q, k, v), hybrid_forward(q.dtype, call.constants[4:6], chunk)
        _fwd(
            call.programs * call.images * triton.cdiv(chunk, rows), launch_key(strides, q, k, v),
            (q, k, v, o, lse, states, decays, *call.sizes, call.scale, *strides),
            (*call.constants, chunk % keys == 0), (rows, keys, *rest),
        )  # fmt: skip
    return o, lse, final


def chunk_hybrid_attention_bwd(do, dfinal, q, k, v, gate, state, lse, chunk):
    call = _Call(q, k, v, chunk)
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty((*q.shape[:3], call.width_v))
    dgate = gate.new_empty(gate.shape)
    dstate = lse.new_empty((0 if state is None else call.batch, call.heads, call.width, call.width_v))
    if call.programs == 0:
        return dq, dk, dv, dgate, dstate
    states, decays, kept = call.walk(k, v, gate, state, None)
    dstates = call.states(q)
    strides, dinitial = strides_of(q, do), None if state is None else dstate
    if call.images:
        _dupdate(
            call.programs * call.images, launch_key(strides, q, do),
            (q, do, dstates, decays, *call.sizes, *strides), call.constants, call.config,
        )  # fmt: skip
    call.scan(dstates, kept, dfinal, dinitial, True)
    if call.tiles == 0:
        return dq, dk, dv, dgate, dstate
    delta, along = torch.empty_like(lse), torch.empty_like(lse)
    strides = strides_of(q, k, v, do)
    key = launch_key(strides, q, k, v, do)
    _dq(
        call.tiles, key, (q, k, v, do, dq, lse, delta, along, states, decays, *call.sizes, call.scale, *strides),
        call.constants, call.config,
    )  # fmt: skip
    _dkv(
        call.tiles, key, (q, k, v, do, dk, dv, lse, delta, dstates, *call.sizes, call.scale, *strides),
        call.constants, call.config,
    )  # fmt: skip
    strides = strides_of(gate)
    _dgate(
        call.programs * call.images, launch_key(strides, gate),
        (gate, dgate, along, states, dstates, kept, *call.sizes, *strides),
        (call.heads, *widths(q, v)), call.config,
    )  # fmt: skip
    return dq, dk, dv, dgate, dstate
