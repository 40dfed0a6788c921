"""Tile shapes and splits of the Flow-Attention kernels and of chunk_hybrid_attention, in one place for tuning.

A configuration is (tokens of a tile, num_warps, num_stages). Not yet measured on a GPU: the shapes are those that fit
shared memory and registers by count.
"""

import torch
import triton

PROGRAMS = 264  # two for each multiprocessor of an H100
MOST_SPLITS = 64  # parts of one head: each part adds up the partial sums of all


def flow_config(dtype, width):
    if width > 64 and dtype == torch.float32:  # states of 64 KiB, several at a time
        return (16, 4, 1)
    return (64, 4, 2) if width <= 64 else (32, 4, 2)


def flow_splits(heads, tokens, tile):
    """Parts into which the tokens of one head are cut. 1: a single launch, with the head's phases in one program."""
    wanted = triton.cdiv(PROGRAMS, max(heads, 1))
    return max(1, min(wanted, triton.cdiv(tokens, 4 * tile), MOST_SPLITS))


def causal_config(dtype, width):
    if width > 64 and dtype == torch.float32:
        return (16, 4, 1)
    return (64, 4, 1) if width <= 64 else (32, 4, 1)


def hybrid_config(dtype, width):
    return (64, 4, 2) if width <= 64 else (32, 4, 2)
