"""Tile shapes of the varlen_attention kernels by dtype, head width and longest sequence.

Measured with benchmarks/tune_varlen_attention.py on an NVIDIA H100 80GB HBM3, 2026-11-23 (bf16, widths 64 and 128;
the other widths take the shape that fits their shared memory). A configuration is (BM query rows, BN keys, num_warps,
num_stages). What is summed over, BN and in the backward of keys BM, never depends on the longest sequence: no hint may
change the order of the sums. There 32 query rows are 4 % faster up to 256 tokens and 6 % slower up to 1024.

`scored`: with softcap, biases or dropout. Those shapes are not measured: they are the largest that ptxas fits into the
registers of compute capability 9.0 with next to nothing spilled, whatever the options.
"""

import torch

from .launch import processors


def forward_config(dtype, width, longest_k, masked, scored):
    if dtype == torch.float32:
        return (32, 32, 4, 1)  # the shape of the backward, whose scores must repeat the forward's to the last bit
    if width <= 64:
        return (64, 64, 4, 3)
    if scored:
        return (64, 32, 4, 3) if width <= 128 else (64, 32, 8, 2)
    if width <= 128:
        return (64, 64, 4, 3) if masked or longest_k <= 512 else (128, 64, 8, 3)
    return (64, 32, 4, 2)


def dq_config(dtype, width, longest_k, masked, scored):
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if width <= 64:
        return (64, 32, 4, 3) if scored else (64, 64, 4, 3)
    if scored:
        return (64, 32, 8, 2) if width <= 128 else (32, 32, 8, 1)
    if width <= 128:
        return (64, 64, 4, 2) if masked else (128, 64, 8, 3)
    return (64, 32, 8, 1)


def dkv_config(dtype, width, longest_q, masked, scored):
    """BM divides that of dq_config, whose blocks of rows write the statistics that blocks of this one read."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if scored:
        return (32, 64, 4, 2) if width <= 64 else (32, 32, 8, 1)
    if width <= 64:
        return (64, 64, 4, 3)
    if width <= 128:
        return (32, 64, 4, 2) if masked else (32, 64, 4, 3)
    return (32, 64, 8, 1)


def short_config(dtype, width, longest, programs, device, masked, scored):
    """(BK, BM, num_warps, num_stages) with one program a sequence and key head; None: not for these."""
    if dtype == torch.float32 or scored or width > 64 or longest > 128 or programs < processors(device):
        return None
    return (64, 32, 4, 2) if longest <= 64 else (128, 16, 4, 2)


def dbias_config(dtype, width):
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    return (64, 64, 4, 1) if width <= 64 else (64, 64, 8, 1) if width <= 128 else (64, 32, 8, 1)
