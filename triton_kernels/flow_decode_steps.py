"""Decode steps in one launch: a program for each multiprocessor goes through all phases of all layers, with few rows.

A program owns a range of the columns of every product. Between two phases lies a barrier of all programs; the weights
of the next phase, which wait for nobody, are read ahead of it, and those of the phase after that brought into L2.
"""

import triton
import triton.language as tl

from .flow_decode_attention import attend
from .flow_decode_columns import (
    at_layer,
    fetch_keys,
    fetch_weights,
    norm_of_rows,
    normalised_rows,
    own_bias,
    own_columns,
    own_product,
    own_stream,
    own_weights,
    rows_of,
)
from .flow_decode_device import gelu, gelu_tanh, store_heads
from .flow_decode_ends import flow_decode_begin_kernel, flow_decode_end_kernel
from .flow_decode_few import merged_rows
from .flow_decode_grid import arrive, wait_for_all

# The phases of a launch: all of them, or one, which a launch without barriers can do.
ALL: tl.constexpr = tl.constexpr(-1)
BEGIN: tl.constexpr = tl.constexpr(0)
QKV: tl.constexpr = tl.constexpr(1)
ATTEND: tl.constexpr = tl.constexpr(2)
PROJ: tl.constexpr = tl.constexpr(3)
UP: tl.constexpr = tl.constexpr(4)
DOWN: tl.constexpr = tl.constexpr(5)
END: tl.constexpr = tl.constexpr(6)


@triton.jit(
    do_not_specialize=(
        "arrivals", "steps", "first_layer", "last_layer", "rows", "batch", "length", "slots", "prefix", "stride_pb",
        "stride_pt", "stride_gb", "stride_gt", "clamp", "soft_clip",
    )
)  # fmt: skip
def flow_decode_steps_kernel(
    tokens, z, info, position, counter, start, proj_in, positions, cond, scale, rope, layer, offsets, final_norm,
    proj_out, guidance, stream, hidden, q, pieces, lse, keys, values,
    arrivals, steps, first_layer, last_layer, rows, batch, length, slots, prefix, stride_pb, stride_pt, stride_gb,
    stride_gt, clamp, soft_clip,
    PHASE: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
    RMS: tl.constexpr, ENDING: tl.constexpr, FETCH: tl.constexpr, PROGRAMS: tl.constexpr,
    BEGIN_TILE: tl.constexpr, END_TILE: tl.constexpr, R: tl.constexpr,
    QKV_TILE: tl.constexpr, PROJ_TILE: tl.constexpr, UP_TILE: tl.constexpr, DOWN_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr, BG: tl.constexpr, KEYS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Steps from that in position[0] on, or a phase of one step for layers first_layer .. last_layer.

    layer: (norm1, qkv, proj, norm2, up, gate, down) of the first layer, each (weight, bias); offsets (layers + 1, 14):
    from these to those of each layer. *_TILE: (columns of a program, BN, warps that share the depth of a column, BK).
    counter (1): programs that came to a barrier; `arrivals` of them before this launch.
    """
    IS_ALL: tl.constexpr = PHASE == ALL
    INNER: tl.constexpr = HEADS * D
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    OUTPUTS: tl.constexpr = 2 * FEATURES if ENDING[0] else FEATURES
    PIECES: tl.constexpr = (HEADS // KV_HEADS + BG - 1) // BG
    program = tl.program_id(0)
    norm1, qkv, proj, norm2, up, gate, down = layer
    n_qkv, n_proj = own_columns(COLUMNS, QKV_TILE[0], QKV_TILE[1]), own_columns(WIDTH, PROJ_TILE[0], PROJ_TILE[1])
    n_up, n_down = own_columns(HIDDEN, UP_TILE[0], UP_TILE[1]), own_columns(WIDTH, DOWN_TILE[0], DOWN_TILE[1])
    step = tl.load(position + (0 if IS_ALL or PHASE == BEGIN else 1))
    for _done in range(steps):
        slot = step + prefix
        seen = (slot + 1).to(tl.int32)
        if IS_ALL or PHASE == BEGIN:
            if program < rows * tl.cdiv(WIDTH, BEGIN_TILE[0]):
                flow_decode_begin_kernel(
                    tokens, start, proj_in[0], proj_in[1], positions, cond, stream, position, length, batch, stride_pb,
                    stride_pt, WIDTH, FEATURES, FIRST, False, BEGIN_TILE[0], BEGIN_TILE[1],
                )  # fmt: skip
        if IS_ALL:
            arrive(counter)
        for number in range(first_layer, last_layer):
            own = offsets + number * 14
            cache = rows.to(tl.int64) * KV_HEADS * slots * D * number
            # Addresses and what follows a product are asked for ahead as well: a read after a barrier takes as long as
            # the product.
            norm1_here, norm2_here = at_layer(norm1, own), at_layer(norm2, own + 6)
            qkv_here, proj_here = at_layer(qkv, own + 2), at_layer(proj, own + 4)
            up_here, down_here = at_layer(up, own + 8), at_layer(down, own + 12)
            next_qkv = at_layer(qkv, own + 14 + 2)  # behind the last layer stands the first
            gate_here = gate
            if gate[0] is not None:
                gate_here = at_layer(gate, own + 10)
            if IS_ALL or PHASE == QKV:
                w = own_weights(qkv_here[0], COLUMNS, WIDTH, QKV_TILE, WARPS)
                bias = own_bias(qkv_here, qkv, n_qkv, COLUMNS)
                norm = norm_of_rows(norm1_here, norm1, QKV_TILE, WARPS, WIDTH)
                if IS_ALL:
                    if FETCH:
                        fetch_weights(proj_here[0], WIDTH, INNER, PROJ_TILE)
                        fetch_keys(
                            keys + cache, values + cache, rows, slots, seen, KV_HEADS, D, PIECES, SPLITS, KEYS, PROGRAMS
                        )
                    arrivals += PROGRAMS
                    wait_for_all(counter, arrivals)
                for first in range(0, rows, R):
                    row = first + tl.arange(0, R)
                    x = normalised_rows(stream, row, rows, norm, QKV_TILE, WARPS, WIDTH, EPS, RMS)
                    y = own_product(x, w, QKV_TILE) + bias
                    store_heads(
                        y, row, rows, n_qkv, rope, slot, q, keys + cache, values + cache, slots, HEADS, KV_HEADS, D
                    )  # fmt: skip
                if IS_ALL:
                    arrive(counter)
            if IS_ALL or PHASE == ATTEND:
                if IS_ALL:
                    if FETCH:
                        fetch_weights(up_here[0], HIDDEN, WIDTH, UP_TILE)
                        if gate[0] is not None:
                            fetch_weights(gate_here[0], HIDDEN, WIDTH, UP_TILE)
                    arrivals += PROGRAMS
                    wait_for_all(counter, arrivals)
                for share in range(0, rows * KV_HEADS * PIECES * SPLITS - program, PROGRAMS):
                    attend(
                        program + share, seen, q, keys + cache, values + cache, scale, pieces, lse, rows, slots, HEADS,
                        KV_HEADS, D, SPLITS, BG, KEYS,
                    )  # fmt: skip
                if IS_ALL:
                    arrive(counter)
            if IS_ALL or PHASE == PROJ:
                bias = own_bias(proj_here, proj, n_proj, WIDTH)
                w = own_weights(proj_here[0], WIDTH, INNER, PROJ_TILE, WARPS)
                if IS_ALL:
                    if FETCH:
                        fetch_weights(down_here[0], WIDTH, HIDDEN, DOWN_TILE)
                    arrivals += PROGRAMS
                    wait_for_all(counter, arrivals)
                for first in range(0, rows, R):
                    row = first + tl.arange(0, R)
                    to, mine, before = own_stream(stream, row, rows, n_proj, WIDTH)
                    x, offsets_x, live = rows_of(pieces, row, rows, PROJ_TILE, WARPS, INNER)
                    x = merged_rows(x, pieces, lse, offsets_x, live, rows * INNER, SPLITS)
                    tl.store(to, before + (own_product(x, w, PROJ_TILE) + bias), mask=mine)
                if IS_ALL:
                    arrive(counter)
            if IS_ALL or PHASE == UP:
                bias = own_bias(up_here, up, n_up, HIDDEN)
                w = own_weights(up_here[0], HIDDEN, WIDTH, UP_TILE, WARPS)
                if gate[0] is not None:
                    gate_bias = own_bias(gate_here, gate, n_up, HIDDEN)
                    w_gate = own_weights(gate_here[0], HIDDEN, WIDTH, UP_TILE, WARPS)
                norm = norm_of_rows(norm2_here, norm2, UP_TILE, WARPS, WIDTH)
                if IS_ALL:
                    if FETCH:
                        fetch_weights(next_qkv[0], COLUMNS, WIDTH, QKV_TILE)
                    arrivals += PROGRAMS
                    wait_for_all(counter, arrivals)
                for first in range(0, rows, R):
                    row = first + tl.arange(0, R)
                    x = normalised_rows(stream, row, rows, norm, UP_TILE, WARPS, WIDTH, EPS, RMS)
                    y = own_product(x, w, UP_TILE) + bias
                    if gate[0] is None:
                        y = gelu(y)
                    else:
                        y *= gelu_tanh(own_product(x, w_gate, UP_TILE) + gate_bias)
                    here = (row < rows)[:, None] & (n_up < HIDDEN)[None, :]
                    tl.store(hidden + row[:, None] * HIDDEN + n_up[None, :], y, mask=here)
                if IS_ALL:
                    arrive(counter)
            if IS_ALL or PHASE == DOWN:
                bias = own_bias(down_here, down, n_down, WIDTH)
                w = own_weights(down_here[0], WIDTH, HIDDEN, DOWN_TILE, WARPS)
                if IS_ALL:
                    arrivals += PROGRAMS
                    wait_for_all(counter, arrivals)
                for first in range(0, rows, R):
                    row = first + tl.arange(0, R)
                    to, mine, before = own_stream(stream, row, rows, n_down, WIDTH)
                    x, offsets_x, live = rows_of(hidden, row, rows, DOWN_TILE, WARPS, HIDDEN)
                    tl.store(to, before + (own_product(x, w, DOWN_TILE) + bias), mask=mine)
                if IS_ALL:
                    arrive(counter)
        if IS_ALL:
            if FETCH:
                fetch_weights(proj_out[0], OUTPUTS, WIDTH, OUT_TILE)
            arrivals += PROGRAMS
            wait_for_all(counter, arrivals)
        if IS_ALL or PHASE == END:
            if program < batch * tl.cdiv(FEATURES, END_TILE[1]):
                flow_decode_end_kernel(
                    stream, None, (None, None), final_norm, proj_out[0], proj_out[1], z, guidance, tokens, info,
                    position, rows, batch, length, stride_gb, stride_gt, clamp, soft_clip,
                    WIDTH, FEATURES, ENDING[0], FIRST, 0, ENDING[1], ENDING[2], ENDING[3], ENDING[4], ENDING[5],
                    ENDING[6], EPS, RMS, False, END_TILE[0], END_TILE[1],
                )  # fmt: skip
        if IS_ALL:
            arrive(counter)
            arrivals += PROGRAMS
            wait_for_all(counter, arrivals)
        step += 1
