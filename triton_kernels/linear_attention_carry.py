"""Launches what carries the states of linear attention: walks over whole sequences or segments, and the scan between.

Also what all launchers of linear attention share: the roles of tensors, and the facts of a call.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import linear_attention_configs as configs
from .launch import Launcher, alignments
from .linear_attention_rows import EXP_SHIFTED, IDENTITY
from .linear_attention_states import linear_attention_scan_kernel, linear_attention_states_kernel

NON_CAUSAL, CAUSAL, REVERSE, BIDIRECTIONAL = range(4)  # as in flowattn/reference/linear_attention.py
NARROWEST = 16  # of a product's operands
SWIZZLED = 64  # bfloat16 numbers of a row of shared memory that is swizzled as a whole

_states_kernel = Launcher(linear_attention_states_kernel)
_scan_kernel = Launcher(linear_attention_scan_kernel)


def ceil_div(a, b):  # triton.cdiv costs microseconds a call
    return -(-a // b)


class Rows(NamedTuple):
    """Rows (B, T, heads, width) in the role of queries, keys or values, phi(rows) * factor in use."""

    x: torch.Tensor
    group: int = 1  # query heads that share a head of x
    map: int = IDENTITY.value
    factor: torch.Tensor | None = None  # (B, T) or (B, T, H), contiguous


class State(NamedTuple):
    """A matrix and, with a normaliser, a vector for each (sequence, head), slot or chunk, as `LinearState` has them."""

    s: torch.Tensor | None = None
    z: torch.Tensor | None = None


NO_STATE = State()


class Side(NamedTuple):
    """What linear_attention_states.py sums up from one side: b c^T and x b, from `start` on."""

    b: Rows
    c: Rows
    start: State = NO_STATE
    end: State = NO_STATE
    x: torch.Tensor | None = None


class Call:
    """What all kernels of a call share."""

    def __init__(self, q, heads, cu, decay, mode, normalize, scale=1.0):
        self.q, self.heads, self.cu, self.decay, self.mode, self.normalize = q, heads, cu, decay, mode, normalize
        self.scale = scale  # of what comes from the right
        self.sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        self.wide = q.dtype != torch.bfloat16  # whether products take float32 operands
        self.operands = torch.float32 if self.wide else q.dtype  # dtype of these, and so of states that are only that
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.step = -1 if mode == REVERSE else 1
        self.steady = decay is not None and decay.shape[1] == 1  # whether all tokens have one decay
        self.decay_strides = (0, 0, 0)
        if decay is not None:
            self.decay_strides = tuple(0 if n == 1 else stride for n, stride in zip(decay.shape, decay.stride()))

    def empty(self, *shape, dtype=torch.float32):
        return self.q.new_empty(shape, dtype=dtype)

    def padded(self, width, value_width):
        """Columns of the tiles of keys and of values."""
        return padded(width, value_width, self.wide), padded(value_width, width, self.wide)

    def slots(self, length, segment):
        """Slots that hold the segments of all sequences, however long each packed one is (see intervals.py)."""
        if not segment:
            return self.sequences
        if self.cu is None:
            return self.sequences * ceil_div(length, segment)
        return length // segment + self.sequences + 1

    def states(self, count, width, value_width, dtype=torch.float32):
        z = self.empty(count, self.heads, width) if self.normalize else None
        return State(self.empty(count, self.heads, width, value_width, dtype=dtype), z)

    def where(self, length, segment):
        """The arguments of `place_of` behind cu_seqlens."""
        count = ceil_div(length, segment) if segment else 1
        return self.sequences, length, count, (self.sequences + 1).bit_length()


@functools.cache
def padded(width, other=0, wide=True):
    """Columns of the tiles of a head of `width` columns.

    The bfloat16 tiles of keys and of values (`other`) have rows of at least 128 bytes, or of one length: ptxas 12.8,
    which Triton 3.6 brings, mixes up the shared-memory addresses of products whose operands are swizzled in different
    ways (tests/test_triton_code.py).
    """
    columns = max(NARROWEST, triton.next_power_of_2(width))
    return columns if wide else max(columns, min(padded(other), SWIZZLED))


def walk_states(
    call, left, right, config, segment=0, *, starts=(NO_STATE,) * 2, ends=(NO_STATE,) * 2, by_slot=False,
    states=(NO_STATE,) * 2, log_decay=None,
):  # fmt: skip
    """Launch the states kernel for one side or both, over whole sequences or segments."""
    rows, others = (left.b, left.c) if left else (right.b, right.c)
    length, width, value_width = rows.x.shape[1], rows.x.shape[3], others.x.shape[3]
    pointers, strides = [], ()
    for side, start, end, kept in zip((left, right), starts, ends, states):
        if side is None:
            pointers += [None] * 10
            strides += (0,) * 6
            continue
        own = (side.b.factor, *kept) if side is left else (side.c.factor, side.x, *kept)
        pointers += [side.b.x, side.c.x, *own, *start, *end]
        strides += (*side.b.x.stride()[:3], *side.c.x.stride()[:3])
    if left is None:
        pointers.pop(0)  # the left side has no x
    pointers = (*pointers, call.decay, log_decay, call.cu)
    strides += call.decay_strides
    sides = (left is not None) + (right is not None)
    pieces = ceil_div(width, config[1]) * ceil_div(value_width, config[2])
    programs = call.slots(length, segment) * call.heads * pieces * sides
    if programs:
        _states_kernel(
            programs,
            (strides, alignments(*pointers)),
            (*pointers, *call.where(length, segment), *strides, call.scale),
            (
                call.heads, left.b.group if left else 1, width, value_width, right.b.map if right else IDENTITY.value,
                left.b.map if left else IDENTITY.value, left is not None, right is not None, call.normalize,
                call.scale != 1.0, call.step, call.steady, segment, by_slot, call.wide, call.precision,
            ),
            config,
        )  # fmt: skip


def scan(call, sides, segment, length, config, local, before, log_decay):
    """Launch the scan over the segments' sums, into the states before them and the sides' end states."""
    width, value_width = next(x.s.shape[2:] for x in local if x.s is not None)
    pointers = []
    for part in range(2):
        for side, own, out in zip(sides, local, before):
            pointers += [None] * 4 if side is None else [own[part], out[part], side.start[part], side.end[part]]
    pointers = (*pointers, log_decay, call.cu)
    block = config[1]
    blocks = ceil_div(width * value_width, block) + (ceil_div(width, block) if call.normalize else 0)
    used = [side is not None for side in sides]
    programs = call.sequences * call.heads * blocks * sum(used)
    if programs:
        _scan_kernel(
            programs,
            alignments(*pointers),
            (*pointers, *call.where(length, segment)[:3]),
            (call.heads, width * value_width, width, segment, *used),
            config,
        )


def carry(call, left, right, chunk, *, segment=None, keep_segments=False, keep_chunks=False):
    """Sum up both sides (None: not wanted) into their `end` states.

    Returns the states before each segment, or before (right: behind) each chunk of `chunk` tokens, of either side.
    """
    sides = (left, right)
    given = [side for side in sides if side is not None]
    length, width, value_width = given[0].b.x.shape[1], given[0].b.x.shape[3], given[0].c.x.shape[3]
    walks, device = call.sequences * call.heads * len(given), call.q.device
    widths = call.q.dtype, *call.padded(width, value_width), max(side.b.map for side in given) >= EXP_SHIFTED.value
    block = configs.states_config(*widths, walks, device)
    if segment is None:
        pieces = ceil_div(width, block[0]) * ceil_div(value_width, block[1])
        segment = configs.segment_tokens(device, walks * pieces, length, chunk)
    if segment:
        block = configs.states_config(*widths, walks * ceil_div(length, segment), device)
    config = (chunk, *block)
    states = (NO_STATE, NO_STATE)
    if keep_chunks:
        chunks = call.slots(length, chunk)
        states = tuple(call.states(chunks, width, value_width, call.operands) if side else NO_STATE for side in sides)
    starts, ends = (
        [side.start if side else NO_STATE for side in sides],
        [side.end if side else NO_STATE for side in sides],
    )
    if not segment:
        walk_states(call, left, right, config, starts=starts, ends=ends, states=states)
        return states
    slots = call.slots(length, segment)
    local, before = (
        tuple(call.states(slots, width, value_width) if side and wanted else NO_STATE for side in sides)
        for wanted in (True, keep_segments or keep_chunks)
    )
    log_decay = None if call.decay is None else call.empty(slots, call.heads)
    walk_states(call, left, right, config, segment, ends=local, by_slot=True, log_decay=log_decay)
    scan_config = configs.scan_config(ceil_div(length, segment), width * value_width, walks, device)
    scan(call, sides, segment, length, scan_config, local, before, log_decay)
    if keep_chunks:
        walk_states(call, left, right, config, segment, starts=before, by_slot=True, states=states)
        return states
    return before
