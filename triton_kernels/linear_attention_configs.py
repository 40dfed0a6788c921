"""Tile shapes and schedules of the linear_attention kernels, in one place for tuning.

A configuration is (CHUNK tokens, BV value columns of a program, num_warps, num_stages). Float32 operands (float32 and
float16 inputs) take twice the shared memory of bfloat16. Chosen by what ptxas reports for sm_90 (no spills where
there is no decay), not measured: the state of a program, BK x BV float32, takes 64 registers a thread.
"""

import functools

import torch

PROGRAMS = 2  # programs a multiprocessor that a launch should reach before the sequences are cut
SHORTEST_SEGMENT = 4  # chunks: a shorter segment would read and write more state than tokens


def config(dtype, width, value_width, whole_rows):
    """(CHUNK, BV, num_warps, num_stages) for padded widths; whole_rows: a program needs all value columns.

    CHUNK must not depend on the value width: passes over one another's segments share it.
    """
    if dtype == torch.bfloat16:
        chunk, columns, warps, stages = 64, 64, 8 if width > 128 else 4, 2
    else:
        chunk, columns, warps, stages = 32, 32 if width <= 128 else 16, 4, 1
    columns = value_width if whole_rows else min(columns, value_width)
    return chunk, columns, 8 if columns > 64 else warps, stages


@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_tokens(device, programs, tokens, chunk):
    """Tokens of a segment where sequences of together `tokens` / `programs` tokens are cut; 0: each stays whole.

    `programs` walk a whole sequence each. Powers of two, because each is compiled for itself.
    """
    missing = PROGRAMS * processors(device) / max(programs, 1)
    if missing <= 1:
        return 0
    segment = SHORTEST_SEGMENT * chunk
    while 2 * segment * missing <= tokens:
        segment *= 2
    return segment if 2 * segment <= tokens else 0
