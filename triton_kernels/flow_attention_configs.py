"""Tile shapes and splits of the Flow-Attention kernels and of chunk_hybrid_attention, in one place for tuning.

A configuration is (tokens of a tile, num_warps, num_stages). Tiles of 64 tokens run on the asynchronous tensor cores of
an H100; with widths below 64 they would be cut into products of 16 columns, which Triton 3.6 miscompiles (wrong results
and shared memory out of range in chunk_hybrid_attention, D=20, M=12, 2026-11-23), so that these take 32 tokens.

A cap on the registers of a thread, where there is one, lets twice the warps onto a multiprocessor for a few values that
go through memory (compiled for sm_90). With two stages the compiler applies phi twice, once for each layout that a tile
is read in, so that phases which also sum rows take one.
"""

import torch
import triton

PROGRAMS = 1056  # eight for each multiprocessor of an H100: phases of the forward that only stream
STATE_PROGRAMS = 528  # four, all at once: phases that sum a D x M state, and the backward
CAUSAL_PROGRAMS = 1056  # eight, two or three at once: a program first adds up the sums of all segments before its own
SHORTEST_PART = 256  # tokens
LONGEST_PART = 16384  # tokens: bounds the additions in one float32 accumulator
SLICES = 8  # programs that add the partial states of one head
HYBRID = (64, 64, 4, 3)
SCAN_EACH, SCAN = 256, (16, 4, 1)  # numbers of a state a program of the scan takes, segments at a time

# (num_warps, num_stages, registers of bfloat16 kernels) of tiles of 64 tokens, by direction and phase; else DEFAULT.
DEFAULT = (4, 1, None)
WHOLE = {
    ("fwd", 1): (8, 1, None),
    ("fwd", 3): (4, 1, 128),
    ("bwd", 0): (8, 1, None),
    ("bwd", 1): (4, 2, None),
    ("bwd", 3): (8, 1, 128),
}
CAUSAL = {
    ("fwd", 2): (4, 1, 168),
    ("fwd", 3): (4, 2, 168),
    ("fwd", 4): (4, 2, 128),
    ("fwd", 5): (4, 2, 168),
    ("bwd", 0): (8, 1, None),
    ("bwd", 1): (4, 1, 168),
    ("bwd", 4): (4, 1, 168),
}


def _tile(dtype, blocks):
    if max(blocks) > 64 and dtype == torch.float32:  # states of 64 KiB, several at a time
        return 16
    return 64 if min(blocks) >= 64 and max(blocks) <= 64 else 32


def _config(table, dtype, blocks, direction, stage):
    tile = _tile(dtype, blocks)
    warps, stages, registers = table.get((direction, stage), DEFAULT) if tile == 64 else DEFAULT
    return (tile, warps, stages), registers if dtype == torch.bfloat16 else None


def flow_config(dtype, blocks, direction, stage):
    """(configuration, cap on registers or None). blocks: (BD, BM); stage: 0 for all phases at once, or the phase."""
    return _config(WHOLE, dtype, blocks, direction, stage)


def causal_config(dtype, blocks, direction, stage):
    """As flow_config; all phases of a direction have the same tile, whose sums are saved."""
    return _config(CAUSAL, dtype, blocks, direction, stage)


def hybrid_config(dtype, blocks):
    return (_tile(dtype, blocks), 4, 2)


def hybrid_forward(dtype, blocks, chunk):
    """(queries, keys, num_warps, num_stages) of the forward of chunk_hybrid_attention."""
    tile = _tile(dtype, blocks)
    if tile == 64 and dtype != torch.float32 and chunk >= 128:
        return HYBRID
    return (tile, tile, 4, 2)


def _pieces(programs, heads, tokens):
    most, least = max(1, triton.cdiv(tokens, SHORTEST_PART)), triton.cdiv(tokens, LONGEST_PART)
    return max(least, min(triton.cdiv(programs, max(heads, 1)), most))


def flow_splits(heads, tokens):
    """(parts of the phases that stream, parts of those with a state) of one head; (1, 1): a single launch."""
    return tuple(_pieces(n, heads, tokens) for n in (PROGRAMS, STATE_PROGRAMS))


def causal_segments(heads, tokens):
    """Parts of one head in the causal form; 1: a single launch."""
    return _pieces(CAUSAL_PROGRAMS, heads, tokens)
