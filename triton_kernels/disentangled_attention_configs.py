"""Tile shapes of the disentangled_attention kernels by dtype and head width: (S queries and S keys, num_warps,
num_stages).

Width 64 in half precision is the best of a sweep on an NVIDIA H100 80GB HBM3, 2026-11-23 (float16, lengths up to 128,
256 and 512). The others are the largest that ptxas fits into the registers of compute capability 9.0 with next to
nothing spilled; float32 beyond width 64 spills whatever the shape.
"""

import torch


def forward_config(dtype, width):
    if dtype == torch.float32:
        return backward_config(dtype, width)  # so that both passes have the same scores to the last bit
    return (64, 4, 1) if width <= 64 else (32, 4, 2) if width <= 128 else (16, 4, 1)


def backward_config(dtype, width):
    if dtype == torch.float32:
        return (32, 4, 1) if width <= 32 else (16, 4, 1) if width <= 64 else (16, 8, 1)
    return (32, 4, 2) if width <= 64 else (32, 8, 1) if width <= 128 else (16, 4, 1)


def tables_config(dtype, width):
    if dtype == torch.float32:
        return backward_config(dtype, width)
    return (32, 4, 2) if width <= 64 else (32, 8, 1) if width <= 128 else (16, 8, 1)
