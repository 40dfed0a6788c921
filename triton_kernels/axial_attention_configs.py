"""Tile shapes of the axial_attention kernels by dtype, head width and lengths of the axis.

On an NVIDIA H100 80GB HBM3, 2026-11-23 (bfloat16, width 64, packed projections; as multiples of the time of a copy of
the same bytes): forward 0.8 for lines of 16 to 64, 1.0 for 96, 0.85 for 128, 1.14 for 256; backward 0.85, 1.25, 1.28
and 1.86. Other widths and float32 are not measured.

With two stages Triton (3.6) issues the copies of a loop at its end and waits for them at its beginning; the first
number of stages that hides their latency is three.

Without triton, so that the choice of a backend can ask whether a program can hold a line.
"""

import torch

SHORT = 256  # longest axis whose keys one program holds
PACKED_ROWS = 64  # rows of a tile that several short sequences share
# Keys times padded width that one program holds, forward and backward. K and V lie in the 227 KiB of shared memory of
# an H100, with parts and copies for the three products of a float32 one; the sums of dK and dV lie in registers.
ELEMENTS = {"half": (256 * 128, 256 * 64), "float32": (128 * 64, 64 * 64)}


def power_of_two(n):
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def padded_width(width, width_v):
    """One for both: see _constants in varlen_attention.py."""
    return max(16, power_of_two(max(width, width_v)))


def short(dtype, width, n, m, backward=False, alone=False, biased=True):
    """(PAD_Q, PAD_K, SEQS, BM, num_warps, num_stages), or None where a program cannot hold a line of padded `width`.

    A program owns SEQS whole sequences, SEQS * PAD_K keys on chip, past which query tiles of BM rows go. Several
    sequences share a tile only where one tile holds all their queries. alone: never several, for the gradient of a bias
    has one owner.
    """
    single, pad = dtype == torch.float32, power_of_two(max(n, m))
    plain = not (backward or biased or single)  # where streaming the keys of more than 128 is the other choice
    tiled = plain and width <= 64 and min(n, m) > 96
    if max(n, m) > SHORT or (plain and max(n, m) > SHORT // 2):
        return None
    if pad <= PACKED_ROWS:
        pad = max(pad, 16 if alone else 1)
        rows = max(pad, 16 if alone else 32 if single or width > 128 else PACKED_ROWS)
        config = (pad, pad, rows // pad, rows, 4, 1)
    else:
        pad_q, pad_k = (max(power_of_two(x), 16) for x in (n, m))
        if tiled:  # one tile, so that all loads are under way before the first is used
            config = (pad_q, pad_k, 1, 128, 8, 1)
        else:
            rows = min(pad_q, 32 if backward or single else 64)
            config = (pad_q, pad_k, 1, rows, 8 if backward or pad_k * width > 128 * 64 else 4, 1)
    fits = config[1] * config[2] * width <= ELEMENTS["float32" if single else "half"][backward]
    return config if fits else None


def wide_backward(dtype, width, n, m):
    """(PARTS, BK, BM, num_warps, num_stages) of the kernel with transposed scores, or None where it is not for such
    lines. Of those up to 128 two programs fit on a processor, in registers and in shared memory."""
    if dtype == torch.float32 or not PACKED_ROWS < max(n, m) <= SHORT or width > 64:
        return None
    if m > 128:
        return (2, 128, 64, 8, 3)
    return (1, max(power_of_two(m), 64), 32, 4, 5 if n > 96 else 4)


def long_forward(dtype, width):
    """(BM, BN, num_warps, num_stages) of the kernel that streams keys."""
    if dtype == torch.float32:
        return (32, 32, 4, 1)
    if width <= 128:
        return (64, 64, 4, 3)
    return (64, 32, 4, 2)


def long_backward(dtype, width):
    """The same for both kernels of the backward."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    return (64, 64, 4, 2) if width <= 128 else (64, 32, 8, 1)
