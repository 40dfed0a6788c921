"""Tile shapes of the disentangled_attention kernels by dtype and head width: (S queries and S keys, num_warps,
num_stages), the largest that ptxas fits into the registers of compute capability 9.0. Not measured."""

import torch


def forward_config(dtype, width):
    if dtype == torch.float32:
        return (32, 4, 1) if width <= 128 else (16, 4, 1)
    if width <= 64:
        return (64, 4, 2)
    return (64, 8, 1) if width <= 128 else (32, 8, 1)


def backward_config(dtype, width):
    return forward_config(dtype, width)


def tables_config(dtype, width):
    if dtype == torch.float32:
        return (32, 4, 1) if width <= 64 else (16, 4, 1)
    return (32, 4, 1) if width <= 128 else (16, 4, 1)
