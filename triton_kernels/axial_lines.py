"""Where the lines of a grid lie in memory: sequence number -> offset, for tensors with strides of their own.

A sequence is one line along the attended axis for one key/value head. Its batch axes and the head are merged where
every tensor allows it; what is left, sizes and strides, are compile-time constants, so that a division by a size is a
multiplication. The outermost size, the batch say, is not among them: it may change without a new kernel.
"""

import functools

import triton
import triton.language as tl


@triton.jit
def offset(sequence, SIZES: tl.constexpr, STRIDES: tl.constexpr, RANK: tl.constexpr):
    """int64 offset of a sequence, or of each of a block. STRIDES: of a row, of a head in its group, then as SIZES,
    innermost first."""
    rest = sequence
    result = tl.cast(sequence, tl.int64) * 0
    for i in tl.static_range(RANK - 1):
        result += tl.cast(rest % SIZES[i], tl.int64) * STRIDES[2 + i]
        rest = rest // SIZES[i]
    return result + tl.cast(rest, tl.int64) * STRIDES[1 + RANK]


@functools.lru_cache(maxsize=1024)
def merged(sizes, strides, order=None):
    """(sizes without the outermost, strides) of batch axes, innermost first, merged as far as all tensors allow.

    sizes: of each axis, outermost first; strides: one tuple of that length a tensor. order: the axes in the order in
    which sequences are to be numbered; their own by default.
    """
    axes = [a for a in (range(len(sizes)) if order is None else order) if sizes[a] != 1]
    kept = []  # [size, strides of each tensor], innermost first
    for a in reversed(axes):
        step = [s[a] for s in strides]
        if kept and all(x == inner * kept[-1][0] for x, inner in zip(step, kept[-1][1])):
            kept[-1][0] *= sizes[a]
        else:
            kept.append([sizes[a], step])
    kept = kept or [[1, [0] * len(strides)]]
    per_tensor = tuple(tuple(step[i] for _, step in kept) for i in range(len(strides)))
    return tuple(size for size, _ in kept[:-1]), per_tensor


# A tensor's strides as ((row, head within its group, ...), (batch axes.., key/value head)); `group` is the number of
# its heads that belong to one sequence. None stays None: an absent tensor.


def batch_axes(k, axis):
    """Sizes of all axes but `axis` and the channels, of a tensor of keys (grid.., heads, width)."""
    return (*k.shape[:axis], *k.shape[axis + 1 : -1])


def channels_at(x, axis, group):
    """A tensor (grid.., heads, width) with contiguous channels."""
    return values_at(x[..., 0], axis, group)


def values_at(x, axis, group):
    """A tensor (grid.., heads), or None."""
    if x is None:
        return None
    *grid, head = x.stride()
    row = grid.pop(axis)
    return (row, head), (*grid, head * group)


def bias_at(bias, group):
    """A bias (batch axes.., heads, n, m), size 1 where broadcast, or None; its third own stride is that of a key."""
    if bias is None:
        return None
    *batch, head, row, key = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride()))
    return (row, head, key), (*batch, head * group)


def head_lines_at(x, axis):
    """A tensor (grid.., heads, width) whose heads are numbered apart from the batch axes: own stride 1 is a head's."""
    *grid, head = x.stride()[:-1]
    row = grid.pop(axis)
    return (row, head), tuple(grid)


@triton.jit
def line_pointers(base, sequence, head, position, SIZES: tl.constexpr, STRIDES: tl.constexpr, RANK: tl.constexpr):
    """Pointers to the first channel of each place."""
    return base + offset(sequence, SIZES, STRIDES, RANK) + head * STRIDES[1] + tl.cast(position, tl.int64) * STRIDES[0]


@triton.jit
def load_line(pointers, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK), zeros where nothing is: a tail must not bring a NaN into a product."""
    channels = tl.arange(0, BLOCK)
    keep = inside[:, None]
    if WIDTH != BLOCK:
        keep = keep & (channels < WIDTH)[None, :]
    return tl.load(pointers[:, None] + channels[None, :], mask=keep, other=0.0)


@triton.jit
def store_line(pointers, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    keep = inside[:, None] & (channels < WIDTH)[None, :]
    tl.store(pointers[:, None] + channels[None, :], value.to(pointers.dtype.element_ty), mask=keep)
