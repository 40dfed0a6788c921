"""Tile shapes and splits of the Flow-Attention kernels and of chunk_hybrid_attention, in one place for tuning.

A configuration is (tokens of a tile, num_warps, num_stages). Tiles of 64 tokens run on the asynchronous tensor cores of
an H100; with widths below 64 they would be cut into products of 16 columns, which Triton 3.6 miscompiles (wrong results
and shared memory out of range in chunk_hybrid_attention, D=20, M=12, 2026-11-23), so that these take 32 tokens.
"""

import torch
import triton

PROGRAMS = 1056  # eight for each multiprocessor of an H100: phases that only stream
STATE_PROGRAMS = 528  # four: phases that sum a D x M state, or write as much
CAUSAL_PROGRAMS = 528  # a program first adds up the sums of all segments before its own
SHORTEST_PART = 256  # tokens
SHORTEST_CAUSAL = 128
LONGEST_PART = 16384  # tokens: bounds the additions in one float32 accumulator
SLICES = 8  # programs that add the partial states of one head


def _tile(dtype, blocks):
    if max(blocks) > 64 and dtype == torch.float32:  # states of 64 KiB, several at a time
        return 16
    return 64 if min(blocks) >= 64 and max(blocks) <= 64 else 32


def flow_config(dtype, blocks, direction, stage):
    """blocks: (BD, BM); stage: 0 for all phases at once, or the phase."""
    return (_tile(dtype, blocks), 4, 2)


def flow_splits(heads, tokens):
    """(parts of the phases that stream, parts of those with a state) of one head; (1, 1): a single launch."""
    if tokens <= SHORTEST_PART:
        return 1, 1
    most, least = triton.cdiv(tokens, SHORTEST_PART), triton.cdiv(tokens, LONGEST_PART)
    return tuple(max(least, min(triton.cdiv(n, max(heads, 1)), most)) for n in (PROGRAMS, STATE_PROGRAMS))


def causal_config(dtype, blocks, direction, stage):
    return (_tile(dtype, blocks), 4, 1)


def causal_segments(heads, tokens):
    """Parts of one head in the causal form; 1: a single launch."""
    if tokens <= SHORTEST_CAUSAL:
        return 1
    most, least = triton.cdiv(tokens, SHORTEST_CAUSAL), triton.cdiv(tokens, LONGEST_PART)
    return max(least, min(triton.cdiv(CAUSAL_PROGRAMS, max(heads, 1)), most))


def hybrid_config(dtype, blocks):
    return (_tile(dtype, blocks), 4, 2)
