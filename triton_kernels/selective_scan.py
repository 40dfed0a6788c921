"""Selective scan: x_t = exp(d_t A) x_{t-1} + d_t u_t B_t, y_t = <C_t, x_t>, forward and backward.

One program owns one (sequence, block of channels of one group), or a span of its time. It keeps the state (BD, N) and
goes through tiles (BD channels, BT tokens); for each of the N numbers of a state the tile is scanned along time as a
whole. Tokens outside the sequence have d = 0: they leave the state as it is.

Where there are few programs time is cut into spans: every span is walked from nothing for its end, `carry` chains the
ends (the decay of a whole span is exp(A sum d)), and the spans are walked again from the right states.
"""

import torch
import triton
import triton.language as tl

from . import selective_scan_configs as configs
from .launch import Launcher, alignments

UNSPECIALIZED = ("tokens", "span", "num_slots")


@triton.jit
def _after(a1, x1, a2, x2):
    """x -> a1 x + x1, then x -> a2 x + x2."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def _after_with_carried(a1, x1, q1, a2, x2, q2):
    """The same; q is what the last step keeps of the state before it, a x_{t-1}, without the difference x_t - b_t."""
    return a1 * a2, a2 * x1 + x2, a2 * x1 + q2


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _step_size(x, SOFTPLUS: tl.constexpr):
    """(d, its slope) of delta + bias. The quotient makes up for the digits that 1 + y loses."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SOFTPLUS:
        y = tl.exp(-tl.abs(x))
        w = 1.0 + y
        log1p = tl.where(w == 1.0, y, tl.log(w) * (y / tl.where(w == 1.0, 1.0, w - 1.0)))
        slope = tl.where(x > 20.0, slope, tl.where(x > 0.0, 1.0, y) / w)
        x = tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)
    return x, slope


@triton.jit
def _program(
    cu, tokens, span, E: tl.constexpr, GROUPS: tl.constexpr, SPANS: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a program owns: (number of its span among all, batch row, first token and length of its sequence, tokens
    begin..stop of its span, number of the sequence's first tile among all, block of the group, group, channels, which
    of them exist)."""
    GROUP_SIZE: tl.constexpr = E // GROUPS
    BLOCKS: tl.constexpr = (GROUP_SIZE + BD - 1) // BD
    program = tl.program_id(0)
    place, rest = program // (GROUPS * BLOCKS), program % (GROUPS * BLOCKS)
    sequence, number = place // SPANS, place % SPANS
    row, first, length = tl.cast(sequence, tl.int64), 0, tokens
    if PACKED:
        row, first = tl.cast(0, tl.int64), tl.minimum(tl.maximum(tl.load(cu + sequence), 0), tokens)
        length = tl.maximum(tl.minimum(tl.load(cu + sequence + 1), tokens) - first, 0)
    begin = tl.minimum(number * span, length)
    stop = tl.minimum(begin + span, length)
    in_group = rest % BLOCKS * BD + tl.arange(0, BD)
    group = rest // BLOCKS
    return (
        tl.cast(place, tl.int64), row, first, length, begin, stop, (row * tokens + first) // BT + sequence,
        rest % BLOCKS, group, group * GROUP_SIZE + in_group, in_group < GROUP_SIZE,
    )  # fmt: skip


@triton.jit
def _load_inputs(u, delta, bias, at_u, at_delta, inside, channel_inside, SOFTPLUS: tl.constexpr):
    """u, d and the slope of d, (BD, BT); u and d are 0 outside."""
    value = tl.load(u + at_u, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(delta + at_delta, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias, mask=channel_inside, other=0.0)[:, None]
    d, slope = _step_size(x, SOFTPLUS)
    return value, tl.where(inside, d, 0.0), slope


@triton.jit
def _column(block, offs_n, n):
    return tl.sum(tl.where(offs_n[None, :] == n, block, 0.0), 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def selective_scan_fwd_kernel(
    u, delta, z, out,  # (B, L, E) by their strides: batch, token, channel
    B, C,  # (B, L, G, N) by strides: batch, token, group, number
    A, skip, bias,  # (E, N), (E), (E)
    start, end,  # (S * SPANS, E, N): states before and after the program's tokens
    step_sums,  # (S * SPANS, E): sums of d, where this walk is only for them and for `end`
    slots, states,  # (L), (B, num_slots, E, N)
    carries,  # (chunks, N, E): the states before every tile
    cu, tokens, span, num_slots,
    su_b, su_t, su_c, sd_b, sd_t, sd_c, sz_b, sz_t, sz_c, so_b, so_t, so_c,
    sB_b, sB_t, sB_g, sB_n, sC_b, sC_t, sC_g, sC_n,
    E: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SPANS: tl.constexpr,
    PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    place, row, first, length, begin, stop, chunk, block, group, channel, channels = _program(
        cu, tokens, span, E, GROUPS, SPANS, PACKED, BT, BD
    )
    offs_n, offs_t = tl.arange(0, NP), tl.arange(0, BT)
    at_state = channel[:, None] * N + offs_n[None, :]
    state_mask = channels[:, None] & (offs_n < N)[None, :]
    state = tl.zeros([BD, NP], tl.float32)
    if start is not None:
        state = tl.load(start + place * (E * N) + at_state, mask=state_mask, other=0.0)
    total = tl.zeros([BD], tl.float32)
    u, delta, out = u + row * su_b, delta + row * sd_b, out + row * so_b
    if z is not None:
        z += row * sz_b
    B, C = B + row * sB_b + group * sB_g, C + row * sC_b + group * sC_g
    c_channel = tl.cast(channel, tl.int64)[:, None]
    for tile in tl.range(begin, stop, BT):
        i = tile + offs_t
        time = tl.cast(first + (length - 1 - i if REVERSE else i), tl.int64)
        present = i < stop
        inside = channels[:, None] & present[None, :]
        if carries is not None:
            kept = carries + (chunk + tile // BT) * (E * N) + offs_n[None, :] * E + channel[:, None]
            tl.store(kept, state, mask=state_mask)
        x_u, d, slope = _load_inputs(
            u, delta, bias if bias is None else bias + channel, c_channel * su_c + time[None, :] * su_t,
            c_channel * sd_c + time[None, :] * sd_t, inside, channels, SOFTPLUS,
        )  # fmt: skip
        du = d * x_u
        y = tl.zeros([BD, BT], tl.float32)
        if skip is not None:
            y += tl.load(skip + channel, mask=channels, other=0.0)[:, None] * x_u
        if slots is not None:
            slot = tl.load(slots + time, mask=present, other=-1)
        for n in range(N):
            a = tl.load(A + channel * N + n, mask=channels, other=0.0)
            b = tl.load(B + time * sB_t + n * sB_n, mask=present, other=0.0).to(tl.float32)
            decay = tl.exp(d * a[:, None])
            x = du * b[None, :] + tl.where(offs_t[None, :] == 0, decay * _column(state, offs_n, n)[:, None], 0.0)
            decays, x = tl.associative_scan((decay, x), 1, _after)
            last = tl.sum(tl.where(offs_t[None, :] == BT - 1, x, 0.0), 1)
            state = tl.where(offs_n[None, :] == n, last[:, None], state)
            if step_sums is None:
                c = tl.load(C + time * sC_t + n * sC_n, mask=present, other=0.0).to(tl.float32)
                y += x * c[None, :]
            if slots is not None:
                wanted = states + ((row * num_slots + slot) * E)[None, :] * N + channel[:, None] * N + n
                tl.store(wanted, x, mask=inside & (slot >= 0)[None, :])
        if step_sums is not None:
            total += tl.sum(d, 1)
        else:
            if z is not None:
                gate = tl.load(z + c_channel * sz_c + time[None, :] * sz_t, mask=inside, other=0.0).to(tl.float32)
                y = y * gate * _sigmoid(gate)
            tl.store(out + c_channel * so_c + time[None, :] * so_t, y.to(out.dtype.element_ty), mask=inside)
    if end is not None:
        tl.store(end + place * (E * N) + at_state, state, mask=state_mask)
    if step_sums is not None:
        tl.store(step_sums + place * E + channel, total, mask=channels)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def selective_scan_bwd_kernel(
    u, delta, z, dout, du, ddelta, dz,  # (B, L, E) by their strides; du, ddelta and dz have the same
    B, C, A, skip, bias,  # as in the forward
    start, end,  # (S * SPANS, E, N): gradients of the states after and before the program's tokens
    step_sums,  # as in the forward
    slots, dstates, carries,
    dB, dC,  # sums over a block's channels, by strides: block of the group, then as B
    dA, dskip, dbias,  # (S * SPANS, E, N), (S * SPANS, E): sums over the program's tokens
    cu, tokens, span, num_slots,
    su_b, su_t, su_c, sd_b, sd_t, sd_c, sz_b, sz_t, sz_c, so_b, so_t, so_c, sr_b, sr_t, sr_c,
    sB_b, sB_t, sB_g, sB_n, sC_b, sC_t, sC_g, sC_n, sp_p, sp_b, sp_t, sp_g, sp_n,
    E: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SPANS: tl.constexpr,
    PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    place, row, first, length, begin, stop, chunk, block, group, channel, channels = _program(
        cu, tokens, span, E, GROUPS, SPANS, PACKED, BT, BD
    )
    offs_n, offs_t = tl.arange(0, NP), tl.arange(0, BT)
    at_state = channel[:, None] * N + offs_n[None, :]
    state_mask = channels[:, None] & (offs_n < N)[None, :]
    back = tl.zeros([BD, NP], tl.float32)  # what later tokens send to the state before them
    if start is not None:
        back = tl.load(start + place * (E * N) + at_state, mask=state_mask, other=0.0)
    total, skip_sum, bias_sum = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    A_sum = tl.zeros([BD, NP], tl.float32)
    u, delta, dout = u + row * su_b, delta + row * sd_b, dout + row * so_b
    du, ddelta = du + row * sr_b, ddelta + row * sr_b
    if z is not None:
        z, dz = z + row * sz_b, dz + row * sr_b
    B, C = B + row * sB_b + group * sB_g, C + row * sC_b + group * sC_g
    at_part = tl.cast(block, tl.int64) * sp_p + row * sp_b + group * sp_g
    c_channel = tl.cast(channel, tl.int64)[:, None]
    bias_at = bias if bias is None else bias + channel
    tiles = (stop - begin + BT - 1) // BT
    for tile_number in tl.range(0, tiles):
        tile = begin + (tiles - 1 - tile_number) * BT
        i = tile + offs_t
        time = tl.cast(first + (length - 1 - i if REVERSE else i), tl.int64)
        present = i < stop
        inside = channels[:, None] & present[None, :]
        at_u, at_delta = c_channel * su_c + time[None, :] * su_t, c_channel * sd_c + time[None, :] * sd_t
        x_u, d, slope = _load_inputs(u, delta, bias_at, at_u, at_delta, inside, channels, SOFTPLUS)
        # The gradient comes from the next token through that one's decay. In the last of the tile nothing does: what
        # later tiles send is in `back`.
        following = inside & ((i + 1 < stop) & (offs_t < BT - 1))[None, :]
        to_next = -sd_t if REVERSE else sd_t
        u_next, d_next, slope_next = _load_inputs(
            u, delta, bias_at, at_u, at_delta + to_next, following, channels, SOFTPLUS
        )
        gy = tl.load(dout + c_channel * so_c + time[None, :] * so_t, mask=inside, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + c_channel * sz_c + time[None, :] * sz_t, mask=inside, other=0.0).to(tl.float32)
            sg = _sigmoid(gate)
            dgate = gy * sg * (1.0 + gate * (1.0 - sg))
            gy = gy * gate * sg
        if step_sums is None:
            from_carry = (chunk + tile // BT) * (E * N) + offs_n[None, :] * E + channel[:, None]
            state = tl.load(carries + from_carry, mask=state_mask, other=0.0)
        if dstates is not None:
            slot = tl.load(slots + time, mask=present, other=-1)
        last = (offs_t == tl.minimum(stop - tile, BT) - 1)[None, :]
        step = d * x_u
        y = tl.zeros([BD, BT], tl.float32)
        along_A, along_B = tl.zeros([BD, BT], tl.float32), tl.zeros([BD, BT], tl.float32)
        for n in range(N):
            a = tl.load(A + channel * N + n, mask=channels, other=0.0)
            c = tl.load(C + time * sC_t + n * sC_n, mask=present, other=0.0).to(tl.float32)
            decay = tl.exp(d * a[:, None])
            gradient = gy * c[None, :] + tl.where(last, _column(back, offs_n, n)[:, None], 0.0)
            if dstates is not None:
                at = ((row * num_slots + slot) * E)[None, :] * N + channel[:, None] * N + n
                gradient += tl.load(dstates + at, mask=inside & (slot >= 0)[None, :], other=0.0)
            decays, gradient = tl.associative_scan((tl.exp(d_next * a[:, None]), gradient), 1, _after, reverse=True)
            sent = tl.sum(tl.where(offs_t[None, :] == 0, decay * gradient, 0.0), 1)
            back = tl.where(offs_n[None, :] == n, sent[:, None], back)
            if step_sums is None:
                b = tl.load(B + time * sB_t + n * sB_n, mask=present, other=0.0).to(tl.float32)
                kept = tl.where(offs_t[None, :] == 0, decay * _column(state, offs_n, n)[:, None], 0.0)
                decays, x, kept = tl.associative_scan((decay, step * b[None, :] + kept, kept), 1, _after_with_carried)
                y += x * c[None, :]
                tl.store(dC + at_part + time * sp_t + n * sp_n, tl.sum(gy * x, 0), mask=present)
                tl.store(dB + at_part + time * sp_t + n * sp_n, tl.sum(gradient * step, 0), mask=present)
                along_B += gradient * b[None, :]
                along_A += gradient * kept * a[:, None]
                A_sum += tl.where(offs_n[None, :] == n, tl.sum(gradient * kept * d, 1)[:, None], 0.0)
        if step_sums is not None:
            total += tl.sum(d, 1)
        else:
            to = c_channel * sr_c + time[None, :] * sr_t
            dd = tl.where(inside, (along_A + along_B * x_u) * slope, 0.0)
            dx = along_B * d
            if skip is not None:
                factor = tl.load(skip + channel, mask=channels, other=0.0)[:, None]
                y, dx = y + factor * x_u, dx + factor * gy
            tl.store(du + to, dx.to(du.dtype.element_ty), mask=inside)
            tl.store(ddelta + to, dd.to(ddelta.dtype.element_ty), mask=inside)
            if z is not None:
                tl.store(dz + to, (dgate * y).to(dz.dtype.element_ty), mask=inside)
            skip_sum += tl.sum(gy * x_u, 1)
            bias_sum += tl.sum(dd, 1)
    if end is not None:
        tl.store(end + place * (E * N) + at_state, back, mask=state_mask)
    if step_sums is not None:
        tl.store(step_sums + place * E + channel, total, mask=channels)
    else:
        tl.store(dA + place * (E * N) + at_state, A_sum, mask=state_mask)
        tl.store(dskip + place * E + channel, skip_sum, mask=channels)
        tl.store(dbias + place * E + channel, bias_sum, mask=channels)


@triton.jit
def selective_scan_carry_kernel(
    ends,  # (S * SPANS, E, N): what each span makes of nothing; becomes the state that enters it
    step_sums, A,
    first, last,  # (S, E, N): the state that enters the first span, that leaves the last
    E: tl.constexpr, N: tl.constexpr, SPANS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (E * N + BLOCK - 1) // BLOCK
    sequence = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    offs = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = offs < E * N
    a = tl.load(A + offs, mask=inside, other=0.0)
    state = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        state = tl.load(first + sequence * (E * N) + offs, mask=inside, other=0.0)
    for k in range(SPANS):
        place = sequence * SPANS + (SPANS - 1 - k if REVERSE else k)
        own = tl.load(ends + place * (E * N) + offs, mask=inside, other=0.0)
        steps = tl.load(step_sums + place * E + offs // N, mask=inside, other=0.0)
        tl.store(ends + place * (E * N) + offs, state, mask=inside)
        state = tl.exp(a * steps) * state + own
    if last is not None:
        tl.store(last + sequence * (E * N) + offs, state, mask=inside)


_fwd, _bwd = Launcher(selective_scan_fwd_kernel), Launcher(selective_scan_bwd_kernel)
_carry = Launcher(selective_scan_carry_kernel)
CARRY_BLOCK = 256


def _strides(x, time_last):
    """(batch, token, channel) of (B, E, L) or (B, L, E); zeros for None."""
    if x is None:
        return (0, 0, 0)
    return (x.stride(0), x.stride(2), x.stride(1)) if time_last else x.stride()


def _row_strides(x, time_last):
    """(batch, token, group, number) of (..., B, G, N, L) or (..., B, L, G, N)."""
    *rest, b, first, second, third = x.stride()
    return (*rest, b, third, first, second) if time_last else (*rest, b, first, second, third)


def _specialization(integers):
    """What Triton specialises an integer on."""
    return tuple((value == 1, value % 16 == 0) for value in integers)


class _Call:
    """Sizes, grid and the arguments that all walks of one call share."""

    def __init__(self, u, A, B, cu, softplus, reverse, time_last, tokens_of_tile, config):
        self.channels, self.states = A.shape
        self.time_last, self.tokens = time_last, u.shape[2 if time_last else 1]
        self.groups = B.shape[1 if time_last else 2]
        self.rows = u.shape[0] if cu is None else cu.shape[0] - 1
        self.config = config(self.channels // self.groups, self.states)
        self.blocks = triton.cdiv(self.channels // self.groups, self.config[0])
        self.spans = configs.spans(self.rows * self.groups * self.blocks, self.tokens)
        self.span = triton.cdiv(triton.cdiv(self.tokens, self.spans), tokens_of_tile) * tokens_of_tile
        self.constants = (
            self.channels, self.groups, self.states, triton.next_power_of_2(self.states), self.spans, cu is not None,
            softplus, reverse, tokens_of_tile,
        )  # fmt: skip

    def walk(self, kernel, pointers, cu, num_slots, strides):
        programs = self.rows * self.spans * self.groups * self.blocks
        key = (*(None if x is None else x.dtype for x in pointers), alignments(*pointers, cu), _specialization(strides))
        integers = (self.tokens, self.span, num_slots)
        kernel(programs, key, (*pointers, cu, *integers, *strides), self.constants, self.config)

    def chain(self, ends, step_sums, A, first, last, reverse):
        """Turn the ends of the spans into the states that enter them, in place."""
        size = self.channels * self.states
        pointers = (ends, step_sums, A, first, last)
        key = (*(None if x is None else x.dtype for x in pointers), alignments(*pointers))
        constants = (self.channels, self.states, self.spans, reverse)
        _carry(self.rows * triton.cdiv(size, CARRY_BLOCK), key, pointers, constants, (CARRY_BLOCK, 4, 1))


def selective_scan_fwd(
    u, delta, A, B, C, skip, z, bias, initial, cu, slots, num_slots, softplus, reverse, time_last, chunk
):
    call = _Call(u, A, B, cu, softplus, reverse, time_last, chunk or configs.TOKENS, configs.forward_config)
    new = u.new_empty if cu is None else u.new_zeros  # rows of no sequence are 0
    wide = {"dtype": torch.float32}
    out = new(u.shape)
    final = u.new_empty((call.rows, call.channels, call.states), **wide)
    states = new((u.shape[0], num_slots, call.channels, call.states), **wide)
    chunks = u.shape[0] * call.tokens // chunk + call.rows if chunk else 0
    carries = u.new_empty((chunks, call.states, call.channels), **wide)
    if final.numel() == 0:
        return out, final, states, carries
    tensors = (_strides(x, time_last) for x in (u, delta, z, out))
    strides = (*(s for x in tensors for s in x), *_row_strides(B, time_last), *_row_strides(C, time_last))

    def walk(start, end, step_sums, slots, carries):
        pointers = (u, delta, z, out, B, C, A, skip, bias, start, end, step_sums, slots, states, carries)
        call.walk(_fwd, pointers, cu, num_slots, strides)

    kept = carries if chunk else None
    if call.spans == 1:
        walk(initial, final, None, slots, kept)
    else:
        ends = u.new_empty((call.rows * call.spans, call.channels, call.states), **wide)
        step_sums = u.new_empty((call.rows * call.spans, call.channels), **wide)
        walk(None, ends, step_sums, None, None)
        call.chain(ends, step_sums, A, initial, final, False)
        walk(ends, None, None, slots, kept)
    return out, final, states, carries


def selective_scan_bwd(
    dout, dfinal, dstates, u, delta, A, B, C, skip, z, bias, has_initial, cu, slots, carries, softplus, reverse,
    time_last, chunk,
):  # fmt: skip
    call = _Call(u, A, B, cu, softplus, reverse, time_last, chunk, configs.backward_config)
    new, wide = u.new_empty if cu is None else u.new_zeros, {"dtype": torch.float32}
    du, ddelta, dz = new(u.shape), new(u.shape), new(u.shape if z is not None else (0,))
    dinitial = u.new_empty((call.rows if has_initial else 0, call.channels, call.states), **wide)
    parts = new((2, call.blocks, *B.shape), **wide)
    places = call.rows * call.spans
    dA = u.new_empty((places, call.channels, call.states), **wide)
    dskip, dbias = u.new_empty((2, places, call.channels), **wide)
    num_slots = 0 if dstates is None else dstates.shape[1]
    tensors = (_strides(x, time_last) for x in (u, delta, z, dout, du))
    strides = (
        *(s for x in tensors for s in x), *_row_strides(B, time_last), *_row_strides(C, time_last),
        *_row_strides(parts[0], time_last),
    )  # fmt: skip

    def walk(start, end, step_sums):
        pointers = (
            u, delta, z, dout, du, ddelta, dz, B, C, A, skip, bias, start, end, step_sums, slots, dstates, carries,
            parts[0], parts[1], dA, dskip, dbias,
        )  # fmt: skip
        call.walk(_bwd, pointers, cu, num_slots, strides)

    before = dinitial if has_initial else None
    if dA.numel() == 0:
        pass
    elif call.spans == 1:
        walk(dfinal, before, None)
    else:
        ends = u.new_empty((places, call.channels, call.states), **wide)
        step_sums = u.new_empty((places, call.channels), **wide)
        walk(None, ends, step_sums)
        call.chain(ends, step_sums, A, dfinal, before, True)
        walk(ends, None, None)
    dB, dC = parts.sum(1).to(u.dtype)
    dskip, dbias = (x.sum(0) if p is not None else u.new_empty((0,), **wide) for x, p in ((dskip, skip), (dbias, bias)))
    return du, ddelta, dA.sum(0), dB, dC, dskip, dz, dbias, dinitial
