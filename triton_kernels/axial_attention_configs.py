"""Tile shapes of the axial_attention kernels by dtype, head width and lengths of the axis; not yet measured on a GPU.

`short`: (PAD_Q, PAD_K, SEQS, BM, num_warps, num_stages), for axes up to SHORT, on which a program owns SEQS whole
sequences: their keys stay on chip, SEQS * PAD_K of them, and query tiles of BM rows pass by. Several sequences share a
tile only where one tile holds all their queries. `long_*`: (BM, BN, num_warps, num_stages), as for varlen_attention.
"""

import torch
import triton

SHORT = 256  # longest axis whose keys one program holds
PACKED_ROWS = 64  # rows of a tile that several short sequences share
BACKWARD_ELEMENTS = 256 * 64  # keys times channels whose two float32 gradients fit the registers of a program


def short(dtype, width, n, m, backward, alone):
    """alone: one sequence a program, however short (its gradient of the bias has one owner)."""
    pad = max(triton.next_power_of_2(max(n, m)), 16 if alone else 1)
    if pad <= PACKED_ROWS:
        rows = PACKED_ROWS if width <= 128 and dtype != torch.float32 else 32
        rows = pad if alone else max(rows, pad)
        return (pad, pad, rows // pad, rows, 4, 1)
    pad_q, pad_k = (max(triton.next_power_of_2(x), 16) for x in (n, m))
    rows = min(pad_q, 32 if backward or dtype == torch.float32 else 64)
    return (pad_q, pad_k, 1, rows, 8 if pad_k * width > 128 * 64 or backward else 4, 1)


def fits_one_backward(width, n, m):
    """Whether one program can hold the gradients of all keys of a sequence."""
    return max(n, m) <= SHORT and triton.next_power_of_2(max(m, 16)) * width <= BACKWARD_ELEMENTS


def long_forward(dtype, width):
    if dtype == torch.float32:
        return (32, 32, 4, 1)
    if width <= 128:
        return (64, 64, 4, 3)
    return (64, 32, 4, 2)


def long_backward(dtype, width):
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if width <= 64:
        return (64, 32, 4, 3)
    return (64, 64, 4, 2) if width <= 128 else (64, 32, 8, 1)
