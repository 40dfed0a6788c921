"""Rows of features, masks and running sums that the Flow-Attention kernels share.

Products of bfloat16 inputs have bfloat16 operands, rounded after the float32 computation of what they hold; sums, flows
and weights use the unrounded values. A state that every token reads enters as two of them (`dot_state`) where a
gradient is a small difference of large terms: rounded once, it costs half of the error allowed. float16 inputs take
tf32, since 1/I falls below the range of float16 for long sequences; float32 inputs three tf32 products.
"""

import torch
import triton
import triton.language as tl

from .launch import alignments


def precision(dtype):
    return "tf32x3" if dtype == torch.float32 else "tf32"


def widths(q, v):
    """(D, M, BD, BM): the head widths and the blocks that hold them."""
    width, width_v = q.shape[3], v.shape[3]
    return width, width_v, max(16, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(width_v))


def time_strides(*tensors):
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def mask_strides(mask):
    return (0, 0) if mask is None else mask.stride()


def launch_key(strides, *tensors):
    return (strides, alignments(*tensors))


@triton.jit
def sequence(s, cu, length, total):
    """(row, first token, tokens) of sequence s of a batch, or of packed sequences with offsets no bad value escapes."""
    if cu is None:
        return s, 0, length
    else:
        start = tl.minimum(tl.maximum(tl.load(cu + s), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu + s + 1), 0), total)
        return 0, start, tl.maximum(end - start, 0)


@triton.jit
def program_of(segments, BACKWARDS: tl.constexpr, HEADS: tl.constexpr):
    """(sequence, segment, head) of a program. Heads, whose rows are neighbours in memory, are next to each other, and
    every other pass goes backwards: it begins with what the pass before left in the cache."""
    program = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    at = program // HEADS
    return at // segments, at % segments, program % HEADS


@triton.jit
def load_tile(base, stride, rows, columns, keep, WIDTH: tl.constexpr):
    """Block (rows, columns) in float32, zeros in rows not kept and past WIDTH."""
    inside = keep[:, None] & (columns < WIDTH)[None, :]
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, stride, rows, columns, inside, value, WIDTH: tl.constexpr):
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def kept(mask, stride, rows, inside):
    """Which rows take part."""
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask + rows.to(tl.int64) * stride, mask=inside, other=0) != 0)


@triton.jit
def load_features(base, stride, rows, columns, keep, WIDTH: tl.constexpr, RELU: tl.constexpr):
    """phi of block (rows, columns), zeros in rows not kept and past WIDTH."""
    inside = keep[:, None] & (columns < WIDTH)[None, :]
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    raw = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, tl.maximum(raw, 0.0) + 1e-6 if RELU else sigmoid(raw), 0.0)


@triton.jit
def slope(f, RELU: tl.constexpr):
    """phi' where phi is f."""
    return tl.where(f > 1e-6, 1.0, 0.0) if RELU else f * (1.0 - f)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), most of what the passes over q and k compute, in 5 instructions: exp2 needs no care for
    denormal numbers, and the square of a reciprocal root, exact to 3e-7, replaces a division."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def narrow(x, base):
    """x as an operand of products: in bfloat16 where `base` points to bfloat16, rounded to tf32, which tensor cores
    would cut it to, where it points to float16, as it is otherwise."""
    if base.dtype.element_ty == tl.bfloat16:
        return x.to(tl.bfloat16)
    elif base.dtype.element_ty == tl.float16:
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def halves(x):
    """float32 x as the sum of two bfloat16 numbers, 16 bits of mantissa. The first is cut, not rounded: to clear bits
    is one instruction, to convert to bfloat16 and back three."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def dot_state(x, state, base, PRECISION: tl.constexpr):
    """x @ state for an operand x, with the float32 state kept to 16 bits of mantissa."""
    if base.dtype.element_ty == tl.bfloat16:
        high, low = halves(state)
        return tl.dot(x, high, tl.dot(x, low))
    else:
        return tl.dot(x, narrow(state, base), input_precision=PRECISION)


@triton.jit
def dot_rows(rows, x, base, PRECISION: tl.constexpr):
    """rows @ x for an operand x, with the float32 rows kept to 16 bits of mantissa."""
    if base.dtype.element_ty == tl.bfloat16:
        high, low = halves(rows)
        return tl.dot(high, x, tl.dot(low, x))
    else:
        return tl.dot(narrow(rows, base), x, input_precision=PRECISION)


@triton.jit
def dot_features(x, y, base):
    """x @ y^T of float32 features to 16 bits of mantissa or more."""
    if base.dtype.element_ty == tl.bfloat16:
        x_high, x_low = halves(x)
        y_high, y_low = halves(y)
        low = tl.dot(x_high, tl.trans(y_low), tl.dot(x_low, tl.trans(y_high)))
        return tl.dot(x_high, tl.trans(y_high), low)
    else:
        return tl.dot(x, tl.trans(y), input_precision="tf32x3")


@triton.jit
def sums_up_to(x, base):
    """Row i: the sum of rows 0..i of float32 x, whose elements count to 16 bits of mantissa or more.

    Flows decide at which tokens the clamp is reached. With features rounded to bfloat16 enough tokens of a random
    sequence change sides to put the gradient of k off by 1 to 5 % (rms).
    """
    offs = tl.arange(0, x.shape[0])
    ones = tl.where(offs[:, None] >= offs[None, :], 1.0, 0.0)
    if base.dtype.element_ty == tl.bfloat16:
        high, low = halves(x)
        ones = ones.to(tl.bfloat16)
        return tl.dot(ones, high, tl.dot(ones, low))
    else:
        return tl.dot(ones, x, input_precision="tf32x3")


@triton.jit
def sums_from(x, base, PRECISION: tl.constexpr):
    """Row i: the sum of rows i.. of x, an operand of products."""
    offs = tl.arange(0, x.shape[0])
    ones = tl.where(offs[:, None] <= offs[None, :], 1.0, 0.0)
    return tl.dot(narrow(ones, base), narrow(x, base), input_precision=PRECISION)


@triton.jit
def total_of(parts, count, stride, columns, WIDTH: tl.constexpr):
    """The sum of the first `count` rows, WIDTH wide and `stride` apart, in an order that does not change."""
    total, offs = tl.zeros(columns.shape, tl.float32), tl.arange(0, 32)
    for first in range(0, count, 32):
        rows = first + offs
        inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
        total += tl.sum(tl.load(parts + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def clamped(x, clamp):
    return tl.minimum(tl.maximum(x, -clamp), clamp)


@triton.jit
def add(total, lost, x):
    """total + x, with what the rounding lost carried along (Kahan)."""
    y = x - lost
    after = total + y
    return after, (after - total) - y


@triton.jit
def load_row(base, columns, WIDTH: tl.constexpr):
    return tl.load(base + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def load_state(base, rows, columns, D: tl.constexpr, M: tl.constexpr):
    inside = (rows < D)[:, None] & (columns < M)[None, :]
    return tl.load(base + rows[:, None] * M + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_state(base, rows, columns, value, D: tl.constexpr, M: tl.constexpr):
    inside = (rows < D)[:, None] & (columns < M)[None, :]
    tl.store(base + rows[:, None] * M + columns[None, :], value, mask=inside)
