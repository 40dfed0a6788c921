"""Tile shapes of the selective_scan kernels, and when they cut time into spans.

The largest tiles that compile for sm_90 without spilled registers; not swept, since the CUDA kernels are many times
faster. A configuration is (BD channels, num_warps, num_stages); a tile holds BD channels and the tokens between two
kept states.
"""

TOKENS = 64  # of a tile in a forward that keeps no states
FEW_PROGRAMS = 264  # two for each SM of an H100
LEAST_SPAN = 512  # tokens


def forward_config(channels, states):
    return (_block(channels, 16), 4, 1)


def backward_config(channels, states):
    """A wide block writes less: each block of channels leaves partial sums of dB and dC, 2 N numbers a token."""
    return (_block(channels, 16), 8, 1)


def _block(channels, most):
    block = 1
    while block < min(channels, most):
        block *= 2
    return block


def spans(programs, tokens):
    """Into how many spans time is cut, given the programs without a cut and the tokens of the longest sequence.

    A cut costs a second walk through every span, so it pays only where most of the GPU would idle.
    """
    if programs >= FEW_PROGRAMS:
        return 1
    return max(1, min(FEW_PROGRAMS // max(programs, 1), tokens // LEAST_SPAN))
