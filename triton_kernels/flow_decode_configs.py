"""Tile shapes of the decode kernels, in one place for tuning. Chosen by count.

On an NVIDIA H100 80GB HBM3, 2026-11-23, a token of a TarFlow block (C=768, 8 layers, 1024 tokens, bfloat16) takes
147 us in 1 row and 205 in 2 by whole steps, 177 and 231 with a launch for each phase; 337 us in 8 (436 by whole steps)
and 548 us in 64 (598 with 64 lanes of keys, 577 with tiles of 128 of the depth).

A few-row product holds a whole tile of weights in registers; the counts aim at two programs for each multiprocessor of
an H100, so that the reads of all of them are under way at once.
"""

from typing import NamedTuple

import torch
import triton

MOST_PARTS = 4  # of a product split along its depth: the next kernel adds them up in every program


class Config(NamedTuple):
    programs: int = 264  # wanted at least
    few: int = 4  # most rows whose products need no tensor cores
    few_columns: int = 8  # of a program with few rows, at depths from 1024 on
    few_weights: int = 64  # of one of its threads
    splits: int = 8  # most shares of the keys of a row and head
    keys: int = 64  # lanes of keys of a program, with heads of 64
    attention_warps: int = 4
    crowd: int = 32  # rows from which both are twice as many
    columns: int = 32  # of a program with many rows
    depth: int = 64  # of its tiles
    stages: int = 4
    early: bool = True  # kernels start while the one before ends, where the device can
    fetch: bool = True  # with many rows or whole steps: weights that are not read ahead are brought into L2
    graph_steps: int = 4  # captured in one graph
    whole: int = 2  # most rows that go through whole steps in one launch
    whole_programs: int = 4  # of such a launch where there are no multiprocessors
    whole_warps: int = 8
    whole_rows: int = 2  # that meet the weights together
    whole_keys: int = 128  # lanes of keys, with heads of 64
    whole_steps: int = 16  # in one launch


DEFAULT = Config()


def power(n):
    return triton.next_power_of_2(max(n, 1))


def few_columns(config, columns, depth, depths=1):
    """BN of a product for few rows, whose padded depth this is. Besides its weights a program reads the rows, up to
    four float32 numbers for each of the depth: with fewer than 8 columns that would be the larger part."""
    block = config.few_columns * max(1024 // depth, 1)
    while block > 4 and triton.cdiv(columns, block) * depths < config.programs // 2:
        block //= 2
    return block


def few_warps(config, columns, depth):
    """No more than have four weights of a column a thread, so that their layout is that of the rows they meet."""
    return max(min(columns * depth // (32 * config.few_weights), depth // 128, 16), 1)


def few_depth(depth):
    """BK of a product whose depth is cut into parts."""
    return max(power(triton.cdiv(depth, MOST_PARTS)), 32)


def many_depth(config, rows_tiles, columns, depth):
    """The share of the depth of one part, with many rows."""
    programs = rows_tiles * triton.cdiv(columns, config.columns)
    parts = max(1, min(MOST_PARTS, config.programs // 2 // programs))
    return triton.cdiv(triton.cdiv(depth, parts), config.depth) * config.depth


def attention_tile(keys, group, head_dim):
    """(query heads, lanes of keys) of a program, with so many lanes for one head of 64."""
    heads = min(power(group), max(256 // head_dim, 1))
    return heads, max(keys * 64 // (head_dim * heads), 8)


def feature_block(features, width):
    """BF of the last kernel of a step."""
    return min(power(features), max(4096 // power(width), 1))


def whole_tile(config, programs, columns, depth, shared=False):
    """(columns of a program, BN, warps that share the depth of a column, BK) of a product.

    Pairs of columns, which a rotation turns, stay together. Rows that are long or laborious to read are `shared` out
    among all warps; others are read by every warp, if there are columns for all, which then knows their norm alone.
    """
    own = triton.cdiv(triton.cdiv(columns, programs), 2) * 2
    block, depth = power(own), power(depth)
    fewest = config.whole_warps if shared else config.whole_warps // block
    return own, block, max(fewest, 1), depth


def whole_bytes(tile, weight):
    """Of a program's weights, which it holds in registers."""
    return tile[1] * tile[3] * weight.element_size()


def splits(config, programs, few):
    """Shares into which the keys are cut, for so many rows times key heads."""
    wanted = power(triton.cdiv(config.programs, programs))
    if not few and 2 * programs >= config.programs:
        return 1
    return min(wanted, config.splits)


def precision(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"
