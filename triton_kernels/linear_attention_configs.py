"""Tile shapes and schedules of the linear_attention kernels, in one place for tuning.

Each table gives, for bfloat16 or not and a padded key width, the tiles of a kernel; a later sweep replaces entries.
Float32 operands (float32 and float16 inputs) take twice the shared memory of bfloat16. In bfloat16 FORWARD, WHOLE,
PROGRAMS and GRADIENTS are the best of sweeps on an NVIDIA H100 80GB HBM3, 2026-11-23 and 24; the rest is chosen by what
ptxas reports for sm_90.
"""

import torch

from .launch import processors

WHOLE = 0.9  # programs of 4 warps a multiprocessor from which on each walks a whole sequence
PROGRAMS = 1  # programs of 4 warps a multiprocessor that a launch should reach where sequences are cut
SHORTEST_SEGMENT = 4  # chunks: a shorter segment would read and write more state than tokens
SCAN_TILE, SCAN_ROWS = 4096, 512  # numbers that a program of the scan takes at once, and of how many segments at most

# (half, width): (CHUNK, BV value columns of a program, num_warps, num_stages, registers a thread may take or None).
FORWARD = {
    (True, 64): (64, 64, 4, 2, None),
    (True, 128): (64, 64, 4, 2, None),
    (True, 256): (64, 64, 4, 2, None),
    (False, 128): (32, 32, 4, 1, None),
    (False, 256): (32, 16, 4, 1, None),
}
# (half, width): (BLOCKS of a chunk, ROWS of a block, columns of all operands, num_warps, num_stages, registers a thread
# may take or None) of the gradients. With 128, which costs few or no spills, two programs of 8 warps run at a time.
GRADIENTS = {
    (True, 64): (1, 64, 64, 4, 1, None),
    (True, 256): (1, 64, 64, 8, 2, 128),
    (False, 256): (2, 32, 32, 4, 1, None),
}
# (half, width): whether passes (FORWARD) make the gradients instead, where no decay is learned.
PASSES = {
    (True, 64): False,
    (True, 256): True,
    (False, 256): False,
}
# (half, width): (columns and rows of a program's part of a state, num_warps, num_stages).
STATES = {
    (True, 256): (64, 4, 3),
    (False, 256): (32, 4, 2),
}


def entry(table, dtype, width):
    """The entry of the narrowest width that is wide enough."""
    half = dtype == torch.bfloat16
    return table[min(key for key in table if key[0] == half and key[1] >= width)]


def by_passes(dtype, width, whole_rows):
    """Whether passes make the gradients of one direction where no decay is learned.

    whole_rows: a map needs all key columns, which would be too large a state of a program.
    """
    return not whole_rows and entry(PASSES, dtype, width)


def maps_once(dtype, width):
    """Whether rows are written after their feature map or factor before the passes read them.

    bfloat16 operands of products are those rows to the last bit. Every program would take the map of all key columns
    again, and at 128 columns that takes longer than reading and writing them.
    """
    return dtype == torch.bfloat16 and width >= 128


def config(dtype, width, value_width, whole_rows, two_states):
    """(CHUNK, BV, num_warps, num_stages) of a pass and registers, for padded widths.

    whole_rows: all columns in a program; two_states: a program meets those of both sides, which leaves no shared memory
    for loads ahead of wide rows.
    """
    chunk, columns, warps, stages, registers = entry(FORWARD, dtype, width)
    if whole_rows:
        columns, warps, registers = value_width, 8 if value_width > 64 else warps, None
    return (chunk, min(columns, value_width), warps, 1 if two_states and width > 128 else stages), registers


def gradients_config(dtype, width, value_width, whole_rows, single):
    """(BLOCKS, ROWS, BK, BV, num_warps, num_stages) and registers; whole_rows: a map needs all key columns."""
    blocks, rows, columns, warps, stages, registers = entry(GRADIENTS, dtype, width)
    tile = 1 if single else blocks, rows, min(columns, width), min(columns, value_width), warps, stages
    return ((*tile[:2], width, *tile[3:]), None) if whole_rows else (tile, registers)


def states_config(dtype, width, value_width, whole_rows, walks, device):
    """(BK, BV, num_warps, num_stages); `walks` states are carried, cut until they fill the processors."""
    block, warps, stages = entry(STATES, dtype, width)
    rows, columns = width if whole_rows else min(block, width), min(block, value_width)
    if not whole_rows and walks * (width // rows) * (value_width // columns) < PROGRAMS * processors(device):
        rows, columns = min(rows, 32), min(columns, 32)
    return rows, columns, warps, stages


def scan_config(count, elements, walks, device):
    """(SEGMENTS, BLOCK, num_warps, num_stages) of the scan over `count` segments for `walks` states."""
    rows = 2
    while rows < min(count + 1, SCAN_ROWS):
        rows *= 2
    block = SCAN_TILE // rows
    while block > 32 and walks * elements < block * PROGRAMS * processors(device):
        block //= 2
    return rows, block, 4, 1


def segment_tokens(device, programs, tokens, chunk):
    """Tokens of a segment where sequences of together `tokens` / `programs` tokens are cut; 0: each stays whole.

    `programs` of 4 warps walk a whole sequence each. Powers of two, because each is compiled for itself.
    """
    if programs >= WHOLE * processors(device):
        return 0
    missing = PROGRAMS * processors(device) / max(programs, 1)
    segment = SHORTEST_SEGMENT * chunk
    while 2 * segment * missing <= tokens:
        segment *= 2
    return segment if 2 * segment <= tokens else 0
