"""What stands around the passes of linear_attention_device.py: the scan between segments, the factors of the rows of
dout, and the sum that makes the gradient of decays.
"""

import triton
import triton.language as tl

from .intervals import _bounded_start
from .linear_attention_device import LOWEST_LOG_DECAY


@triton.jit(do_not_specialize=("sequences", "tokens", "segments"))
def linear_attention_scan_kernel(
    local, log_decay, initial, final, last_decay,  # (slots, HEADS, N), (slots, HEADS), (sequences, HEADS, N) twice
    cu, sequences, tokens, segments, stride_db, stride_dt, stride_dh,
    HEADS: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr, STEP: tl.constexpr, LATE: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the sums over each segment into the state before it (KEEP), and writes the state after the last.

    A program owns BLOCK elements of the state of one head of one sequence. last_decay: the log decays (B, T, heads),
    whose last one acts at the end where decays are LATE.
    """
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    offs = program % blocks * BLOCK + tl.arange(0, BLOCK)
    h = program // blocks % HEADS
    sequence = program // (blocks * HEADS)
    if cu is None:
        start, length = tl.cast(0, tl.int64), tokens
        slot = sequence * segments
        batch = sequence.to(tl.int64)
    else:
        start = _bounded_start(cu, sequence, tokens).to(tl.int64)
        length = tl.maximum(_bounded_start(cu, sequence + 1, tokens) - start, 0)
        slot = start // SEGMENT + sequence
        batch = tl.cast(0, tl.int64)
    inside = offs < N
    index = (sequence * HEADS + h).to(tl.int64) * N
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + index + offs, mask=inside, other=0.0)
    count = tl.cdiv(length, SEGMENT)
    for i in tl.range(0, count):
        place = (slot + i).to(tl.int64) * HEADS + h
        own = tl.load(local + place * N + offs, mask=inside, other=0.0)
        if KEEP:
            tl.store(local + place * N + offs, state, mask=inside)
        if log_decay is not None:
            state *= tl.exp(tl.load(log_decay + place))
        state += own
    if final is not None:
        if LATE and last_decay is not None:
            token = start + (0 if STEP < 0 else length - 1)
            g = tl.load(
                last_decay + batch * stride_db + token * stride_dt + h.to(tl.int64) * stride_dh,
                mask=length > 0,
                other=0.0,
            )
            state *= tl.exp(tl.maximum(g.to(tl.float32), LOWEST_LOG_DECAY))
        tl.store(final + index + offs, state, mask=inside)


@triton.jit(do_not_specialize=("rows", "tokens"))
def linear_attention_rows_kernel(
    dout, out, den, row_scale, factor, x,  # (B, T, HEADS, V); the rest (B, T, HEADS), row_scale (B, T)
    rows, tokens, stride_b, stride_t, stride_h, scale,
    HEADS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor = row_scale * scale / den, by which dout counts, and x = -scale (dout . out) / den."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < rows
    token, h = offs // HEADS, offs % HEADS
    value = tl.full([BLOCK], 1.0, tl.float32) * scale
    if den is not None:
        cols = tl.arange(0, BV)
        within = inside[:, None] & (cols < V)[None, :]
        at = token // tokens * stride_b + token % tokens * stride_t + h * stride_h
        grad = tl.load(dout + at[:, None] + cols[None, :], mask=within, other=0.0).to(tl.float32)
        result = tl.load(out + (offs * V)[:, None] + cols[None, :], mask=within, other=0.0).to(tl.float32)
        divisor = tl.load(den + offs, mask=inside, other=1.0)
        tl.store(x + offs, -scale * tl.sum(grad * result, 1) / divisor, mask=inside)
        value /= divisor
    if row_scale is not None:
        value *= tl.load(row_scale + token, mask=inside, other=0.0)
    tl.store(factor + offs, value, mask=inside)


@triton.jit(do_not_specialize=("sequences", "tokens"))
def linear_attention_decay_kernel(
    terms, last, out,  # (slices, B, T, HEADS), (sequences, HEADS), (B, T, HEADS)
    cu, sequences, tokens,
    HEADS: tl.constexpr, SLICES: tl.constexpr, STEP: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_t = last + sum of terms_i over the steps i >= t of the walk; a program owns one head of one sequence.

    FRESH: there was no state, so the first decay acts on nothing.
    """
    h = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    if cu is None:
        place, length = sequence.to(tl.int64) * tokens, tokens
        every = sequences.to(tl.int64) * tokens * HEADS
    else:
        start = _bounded_start(cu, sequence, tokens)
        place, length = start.to(tl.int64), tl.maximum(_bounded_start(cu, sequence + 1, tokens) - start, 0)
        every = tl.cast(tokens, tl.int64) * HEADS
    if STEP < 0:
        place += length - 1
    offs = tl.arange(0, BLOCK)
    carry = 0.0
    if last is not None:
        carry += tl.load(last + sequence * HEADS + h)
    for done in tl.range(0, length, BLOCK):
        step = length - 1 - done - offs
        inside = step >= 0
        at = (place + step.to(tl.int64) * STEP) * HEADS + h
        sums = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(SLICES):
            sums += tl.load(terms + i * every + at, mask=inside, other=0.0)
        total = carry + tl.cumsum(sums, 0)
        tl.store(out + at, tl.where(step == 0, 0.0, total) if FRESH else total, mask=inside)
        carry += tl.sum(sums, 0)
