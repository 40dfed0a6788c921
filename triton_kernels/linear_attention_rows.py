"""What the kernels of linear attention share: feature maps, operands of products, decays, and where a chunk lies."""

import triton
import triton.language as tl

from .intervals import _bounded_start, locate

# As FEATURE_MAPS in flowattn/reference/linear_attention.py.
IDENTITY, ELU1, RELU, RELU_EPS, SIGMOID, EXP, EXP_SHIFTED, SOFTMAX = (tl.constexpr(i) for i in range(8))
LARGEST_EXPONENT = tl.constexpr(80.0)
EPS_OF_RELU = tl.constexpr(1e-6)
LOWEST_LOG_DECAY = tl.constexpr(-100.0)  # e^ it is 0 in float32; lower ones would cost the others' last digits

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

UNSPECIALIZED = ("sequences", "tokens", "segments", "steps")


@triton.jit
def _exp_of_negative(x):
    """e^x, with 0 for denormal results: providing for these would take three more instructions a number."""
    x *= LOG2E
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def phi(x, inside, MAP: tl.constexpr):
    """The feature map in float32 of rows x, which are 0 outside; the result is finite there."""
    x = x.to(tl.float32)
    if MAP == ELU1:
        x = tl.maximum(x, 0.0) + _exp_of_negative(tl.minimum(x, 0.0))
    elif MAP == RELU:
        x = tl.maximum(x, 0.0)
    elif MAP == RELU_EPS:
        x = tl.maximum(x, 0.0) + EPS_OF_RELU
    elif MAP == SIGMOID:
        e = _exp_of_negative(-tl.abs(x))
        x = tl.where(x > 0, 1.0, e) / (1.0 + e)
    elif MAP == EXP:
        x = tl.exp(tl.minimum(x, LARGEST_EXPONENT))
    elif MAP == EXP_SHIFTED or MAP == SOFTMAX:
        top = tl.max(tl.where(inside, x, float("-inf")), 1)
        x = tl.where(inside, tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None]), 0.0)
        if MAP == SOFTMAX:
            total = tl.sum(x, 1)
            x = x / tl.where(total == 0.0, 1.0, total)[:, None]
    return x


@triton.jit
def derivative_product(p, y, MAP: tl.constexpr):
    """phi'(x) y, given p = phi(x)."""
    if MAP == ELU1:
        y *= tl.minimum(p, 1.0)
    elif MAP == RELU:
        y = tl.where(p > 0.0, y, 0.0)
    elif MAP == RELU_EPS:
        y = tl.where(p > EPS_OF_RELU, y, 0.0)
    elif MAP == SIGMOID:
        y = p * (1.0 - p) * y
    elif MAP == EXP:
        y = tl.where(p < tl.exp(tl.full([1, 1], LARGEST_EXPONENT, tl.float32)), p * y, 0.0)
    elif MAP == EXP_SHIFTED:
        y = p * y
    elif MAP == SOFTMAX:
        y = p * (y - tl.sum(p * y, 1)[:, None])
    return y


@triton.jit
def scalars(base, places, inside, h, HEADS: tl.constexpr):
    """One number a token of contiguous (B, T, HEADS), or with HEADS = 1 of (B, T), in float32."""
    return tl.load(base + places * HEADS + (h if HEADS > 1 else 0), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("rows", "tokens"))
def linear_attention_map_kernel(
    x, factor, out,  # (B, T, HEADS, WIDTH), out contiguous; factor (B, T, FACTOR_HEADS)
    rows, tokens, stride_b, stride_t, stride_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr, FACTOR_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = phi(x) * factor, as `operand` makes it."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, COLUMNS)
    token = offs // HEADS
    within = (offs < rows)[:, None] & (cols < WIDTH)[None, :]
    at = token // tokens * stride_b + token % tokens * stride_t + offs % HEADS * stride_h
    y = phi(tl.load(x + at[:, None] + cols[None, :], mask=within, other=0.0), within, MAP)
    if factor is not None:
        y *= scalars(factor, offs if FACTOR_HEADS > 1 else token, offs < rows, 0, 1)[:, None]
    tl.store(out + (offs * WIDTH)[:, None] + cols[None, :], y.to(out.dtype.element_ty), mask=within)


@triton.jit
def operand(base, factor, offsets, places, inside, cols, h, WIDTH: tl.constexpr, MAP: tl.constexpr,
            FACTOR_HEADS: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr = False):  # fmt: skip
    """Rows at `offsets` after phi and factor, as an operand of a product.

    0 where not inside without phi or if MASKED; else finite, for where the other operand is 0 there.
    """
    within = inside[:, None] & (cols < WIDTH)[None, :]
    x = tl.load(base + offsets[:, None] + cols[None, :], mask=within, other=0.0)
    if MAP == IDENTITY and factor is None:
        return x.to(tl.float32) if WIDE else x
    y = phi(x, within, MAP)
    if MAP != IDENTITY and (cols.shape[0] - 1) & WIDTH != 0:  # not all columns exist
        y = tl.where((cols < WIDTH)[None, :], y, 0.0)
    if factor is not None:
        y *= scalars(factor, places, inside, h, FACTOR_HEADS)[:, None]
    elif MASKED:
        y *= tl.where(inside, 1.0, 0.0)[:, None]
    return y if WIDE else y.to(x.dtype)


@triton.jit
def log_decays(
    decay, steady, row, offs, stride, length, STEP: tl.constexpr, STEADY: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """(g, sum up to each token, sum after each token, sum of all) of the log decays of the chunk at `row`.

    STEADY: all are `steady`, and the second is then the same in every chunk, also on the tokens outside of a short one.
    Tokens outside count 0 in the others.
    """
    inside = (row + offs < length) & (row + offs >= 0)
    if STEADY:
        last = tl.maximum(tl.minimum(CHUNK, length - row), 0)
        g = tl.where(inside, steady, 0.0)
        running = steady * (offs + 1)
        remaining = steady * tl.maximum(last - 1 - offs, 0)
        total = steady * (last + tl.minimum(row, 0))
    else:
        index = (row + offs).to(tl.int64) * (STEP * stride)
        g = _bounded_log(tl.load(decay + index, mask=inside, other=0.0), EXACT)
        running = tl.cumsum(g, 0)
        total = tl.sum(g, 0)
        remaining = total - running
    return g, running, remaining, total


@triton.jit
def _bounded_log(g, EXACT: tl.constexpr):
    g = tl.maximum(g.to(tl.float32), LOWEST_LOG_DECAY)
    return g.to(tl.float64) if EXACT else g


@triton.jit
def steady_log_decay(decay, STEADY: tl.constexpr, EXACT: tl.constexpr):
    """The log decay of all tokens, where it is one number; float64 keeps the last digits of sums (float32 inputs)."""
    return _bounded_log(tl.load(decay), EXACT) if STEADY else 0.0


@triton.jit
def state_pointers(base, index, rows, cols, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    base += index.to(tl.int64) * (K * V)
    if TRANSPOSED:
        return base + cols[None, :] * K + rows[:, None]
    return base + rows[:, None] * V + cols[None, :]


@triton.jit
def place_of(slot, cu, sequences, tokens, segments, steps, SEGMENT: tl.constexpr):
    """(sequence, batch, first row, start, length) of a slot of SEGMENT tokens, with SEGMENT 0 of a whole sequence.

    `segments` slots a dense sequence, or, packed, as many as `locate` needs; an unused one has a row past the length.
    """
    row = 0
    start = 0
    batch = tl.cast(0, tl.int64)
    if cu is None:
        sequence = slot // segments
        length = tokens
        row = slot % segments * SEGMENT
        batch = sequence.to(tl.int64)
    elif SEGMENT > 0:
        sequence, row, start, length = locate(slot, None, cu, sequences, tokens, steps, SEGMENT)
        length = tl.where(sequence == sequences, -1, length)
    else:
        sequence = slot
        start = _bounded_start(cu, slot, tokens)
        length = tl.maximum(_bounded_start(cu, slot + 1, tokens) - start, 0)
    return sequence, batch, row, start, length
