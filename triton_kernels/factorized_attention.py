"""The factorized kernel integral: small matrices applied along the axes of a grid, in place of strided rows.

A program takes a tile of output rows of one head for LINES lines of a sample. The gradient of the values is the same
kernel with the matrix turned; that of a matrix is summed over fixed runs of lines, then over the runs.
"""

import math

import torch
import triton
import triton.language as tl

from .axial_lines import head_lines_at, merged, offset
from .launch import Launcher, alignments

PARTS = 32  # runs of lines with a partial sum of the gradient of a matrix each
SIZE_ARGUMENTS = ("lines", "groups", "tiles", "n_out", "n_in", "parts")


def config(dtype, width, rows):
    """(BI output rows, BJ input rows, LINES, num_warps, num_stages); not yet measured on a GPU."""
    block = max(16, min(64 if width <= 128 else 32, triton.next_power_of_2(rows)))
    return (block, min(block, 32) if dtype == torch.float32 else block, 4, 4, 2)


@triton.jit
def _tile(base, row, length, head, sequence, SIZES: tl.constexpr, STRIDES: tl.constexpr, RANK: tl.constexpr,
          C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Pointers (ROWS, BC) to rows of a line, and which of them exist."""
    rows, channels = row + tl.arange(0, ROWS), tl.arange(0, BC)
    line = base + offset(sequence, SIZES, STRIDES, RANK) + head * STRIDES[1]
    pointers = line + tl.cast(rows, tl.int64)[:, None] * STRIDES[0] + channels[None, :]
    return pointers, (rows < length)[:, None] & (channels < C)[None, :]


@triton.jit
def _matrix(base, i, j, n_i, n_j, ROW: tl.constexpr, COLUMN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """(BI, BJ) of a matrix with row and column strides that one of n_i x n_j elements has; 0 stands for the length."""
    rows, columns = i + tl.arange(0, BI), j + tl.arange(0, BJ)
    row_stride = n_j if ROW == 0 else ROW
    column_stride = n_i if COLUMN == 0 else COLUMN
    inside = (rows < n_i)[:, None] & (columns < n_j)[None, :]
    return base + rows[:, None] * row_stride + columns[None, :] * column_stride, inside


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def factorized_attention_apply_kernel(
    matrix, x, y, lines, groups, tiles, n_out, n_in,
    SIZES: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, RANK: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """y (+)= M x along every line; M (B, HEADS, n_out, n_in) by strides ROW and COLUMN, see _matrix."""
    program = tl.program_id(0)
    head, rest = program % HEADS, program // HEADS
    i, rest = rest % tiles * BI, rest // tiles
    group, batch = rest % groups, rest // groups
    matrix += (tl.cast(batch, tl.int64) * HEADS + head) * n_out * n_in
    for line in tl.range(group * LINES, tl.minimum(group * LINES + LINES, lines)):
        sequence = batch * lines + line
        targets, inside = _tile(y, i, n_out, head, sequence, SIZES, Y, RANK, C, BC, BI)
        acc = tl.zeros([BI, BC], tl.float32)
        if ADD:
            acc += tl.load(targets, mask=inside, other=0.0)
        for j in tl.range(0, n_in, BJ):
            elements, exist = _matrix(matrix, i, j, n_out, n_in, ROW, COLUMN, BI, BJ)
            sources, there = _tile(x, j, n_in, head, sequence, SIZES, X, RANK, C, BC, BJ)
            m, values = tl.load(elements, mask=exist, other=0.0), tl.load(sources, mask=there, other=0.0)
            if HALF:
                acc = tl.dot(m.to(values.dtype), values, acc)
            else:
                acc = tl.dot(m, values.to(tl.float32), acc, input_precision=PRECISION)
        tl.store(targets, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def factorized_attention_matrix_gradient_kernel(
    x, dy, sums, lines, parts, tiles, n_out, n_in,
    SIZES: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, RANK: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """sums (B, parts, HEADS, n_out, n_in): dy x^T over the lines of a run; `tiles` of a row of tiles."""
    program = tl.program_id(0)
    head, rest = program % HEADS, program // HEADS
    across = tl.cdiv(n_in, BJ)
    j, rest = rest % across * BJ, rest // across
    i, rest = rest % tiles * BI, rest // tiles
    part, batch = rest % parts, rest // parts
    acc = tl.zeros([BI, BJ], tl.float32)
    for line in tl.range(lines * part // parts, lines * (part + 1) // parts):
        sequence = batch * lines + line
        upper, inside = _tile(dy, i, n_out, head, sequence, SIZES, DY, RANK, C, BC, BI)
        sources, there = _tile(x, j, n_in, head, sequence, SIZES, X, RANK, C, BC, BJ)
        g, values = tl.load(upper, mask=inside, other=0.0), tl.load(sources, mask=there, other=0.0)
        if HALF:
            acc = tl.dot(g, tl.trans(values), acc)
        else:
            acc = tl.dot(g.to(tl.float32), tl.trans(values.to(tl.float32)), acc, input_precision=PRECISION)
    base = sums + ((tl.cast(batch, tl.int64) * parts + part) * HEADS + head) * n_out * n_in
    elements, exist = _matrix(base, i, j, n_out, n_in, 0, 1, BI, BJ)
    tl.store(elements, acc, mask=exist)


_apply = Launcher(factorized_attention_apply_kernel)
_matrix_gradient = Launcher(factorized_attention_matrix_gradient_kernel)


class Call:
    """The lines of x and y along one axis, y being channels of a wider tensor, and the kernels' constants."""

    def __init__(self, x, y, axis):
        batch_axes = (*x.shape[:axis], *x.shape[axis + 1 : -2])
        (x_own, x_lead), (y_own, y_lead) = head_lines_at(x, axis), head_lines_at(y, axis)
        self.inner, (x_lead, y_lead) = merged(batch_axes, (x_lead, y_lead))
        self.batch, self.lines = x.shape[0], math.prod(batch_axes[1:])
        self.heads, width = x.shape[-2:]
        self.strides = (x_own + x_lead, y_own + y_lead)
        self.shape = (len(self.inner) + 1, self.heads, width, max(16, triton.next_power_of_2(width)))
        # float16 cannot hold the matrices, which start out subnormal there; tensor cores take both sides as TF32 then.
        precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
        self.precision = (x.dtype == torch.bfloat16, precision)


def _run(matrix, x, y, axis, transpose, add):
    """y (+)= M x, or M^T x, along `axis`."""
    if y.numel() == 0:
        return
    call = Call(x, y, axis)
    n_out, n_in = y.shape[axis], x.shape[axis]
    tile = config(x.dtype, x.shape[-1], n_out)
    tiles, groups = triton.cdiv(n_out, tile[0]), triton.cdiv(call.lines, tile[2])
    _apply(
        call.batch * groups * tiles * call.heads,
        (x.dtype, y.dtype, alignments(matrix, x, y)),
        (matrix, x, y, call.lines, groups, tiles, n_out, n_in),
        (call.inner, *call.strides, *call.shape, *((1, 0) if transpose else (0, 1)), add, *call.precision),
        tile,
    )


def factorized_attention_fwd(v, kernels, axes):
    shape = [*v.shape[:-1], v.shape[-1] * len(axes)]
    if len(axes) == 1:
        shape[axes[0]] = kernels[0].shape[2]
    out = v.new_empty(shape)
    for slot, (kernel, axis) in enumerate(zip(kernels, axes)):
        _run(kernel, v, _channels(out, slot, v.shape[-1]), axis, False, False)
    return out


def factorized_attention_bwd(dout, v, kernels, axes):
    dv = v.new_empty(v.shape, dtype=torch.float32 if len(axes) > 1 else v.dtype)  # summed over the axes before rounding
    dkernels = []
    for slot, (kernel, axis) in enumerate(zip(kernels, axes)):
        dy = _channels(dout, slot, v.shape[-1])
        _run(kernel, dy, dv, axis, True, slot > 0)
        dkernels.append(_kernel_gradient(kernel, v, dy, axis))
    return dv.to(v.dtype), dkernels


def _channels(x, slot, width):
    return x[..., slot * width : (slot + 1) * width]


def _kernel_gradient(kernel, v, dy, axis):
    if v.numel() == 0 or kernel.numel() == 0:
        return torch.zeros_like(kernel)
    call = Call(v, dy, axis)
    n_out, n_in = kernel.shape[2:]
    tile = config(v.dtype, v.shape[-1], max(n_out, n_in))
    parts, tiles = max(1, min(PARTS, call.lines)), triton.cdiv(n_out, tile[0])
    sums = kernel.new_empty((call.batch, parts, *kernel.shape[1:]))
    _matrix_gradient(
        call.batch * parts * tiles * triton.cdiv(n_in, tile[1]) * call.heads,
        (v.dtype, dy.dtype, alignments(v, dy)),
        (v, dy, sums, call.lines, parts, tiles, n_out, n_in),
        (call.inner, *call.strides, *call.shape, *call.precision),
        tile,
    )
    return sums.sum(1)
