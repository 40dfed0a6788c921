"""The result of linear attention in one direction, all rows at once, given the state before each chunk.

With G the running sum of log decays in a chunk, in the order of the walk, and S and z the state before it,

    y_i = sum over j <= i in the chunk of e^(G_i - G_j) (q_i . k_j) v_j + e^(G_i) S^T q_i,

and with a normaliser the same of weights instead of values. For wide heads, whose state does not fit into the registers
of a program that walks (linear_attention_device.py).
"""

import triton
import triton.language as tl

from .linear_attention_rows import (
    UNSPECIALIZED,
    log_decays,
    operand,
    place_of,
    scalars,
    state_pointers,
    steady_log_decay,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_attention_outputs_kernel(
    q, k, v, weight, row_scale, decay, states, vectors,  # states (chunks, HEADS, K, V), vectors (chunks, HEADS, K)
    out, den,  # contiguous, (B, T, HEADS, V) and (B, T, HEADS)
    cu, sequences, tokens, segments, steps,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    MAP_Q: tl.constexpr, MAP_K: tl.constexpr, STEP: tl.constexpr, STEADY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program owns BV columns of one of the BLOCKS of ROWS tokens of a chunk of one head."""
    exact: tl.constexpr = PRECISION == "tf32x3"
    slices: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    piece = program % slices
    part = program // slices % BLOCKS
    h = program // (slices * BLOCKS) % HEADS
    head = h.to(tl.int64)
    slot = program // (slices * BLOCKS * HEADS)
    _, batch, row, start, length = place_of(slot, cu, sequences, tokens, segments, steps, BLOCKS * ROWS)
    row += part * ROWS
    if row >= length:
        return
    place = batch * tokens + start
    first = tl.cast(start, tl.int64)
    if STEP < 0:
        first += length - 1
        place += length - 1
    q += batch * stride_qb + first * stride_qt + head * stride_qh
    k += batch * stride_kb + first * stride_kt + head // GROUP * stride_kh
    v += batch * stride_vb + first * stride_vt + head // GROUP * stride_vh
    offs = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    cols = piece * BV + tl.arange(0, BV)
    inside = row + offs < length
    walked = (row + offs).to(tl.int64) * STEP
    places = place + walked
    qb = operand(q, None, walked * stride_qt, places, inside, columns, h, K, MAP_Q, 1, WIDE)
    kb = operand(k, weight, walked * stride_kt, places, inside, columns, h, K, MAP_K, 1, WIDE)
    vb = operand(v, None, walked * stride_vt, places, inside, cols, h, V, 0, 1, WIDE)
    scores = tl.dot(qb, tl.trans(kb), input_precision=PRECISION)
    lower = offs[:, None] >= offs[None, :]
    if decay is not None:
        decay += batch * stride_db + first * stride_dt + head * stride_dh
        steady = steady_log_decay(decay, STEADY, exact)
        _, running, _, _ = log_decays(decay, steady, row, offs, stride_dt, length, STEP, STEADY, exact, ROWS)
        apart = (running[:, None] - running[None, :]).to(tl.float32)
        scores *= tl.exp(tl.where(lower, apart, float("-inf")))
    else:
        scores = tl.where(lower, scores, 0.0)
    weights = tl.sum(scores, 1)
    acc = tl.dot(scores.to(vb.dtype), vb, input_precision=PRECISION)
    for block in tl.range(0, part):  # from our own to the first one of the chunk
        other = row - (block + 1) * ROWS
        walked_o = (other + offs).to(tl.int64) * STEP
        there = other + offs < length
        kb = operand(k, weight, walked_o * stride_kt, place + walked_o, there, columns, h, K, MAP_K, 1, WIDE)
        vb = operand(v, None, walked_o * stride_vt, place + walked_o, there, cols, h, V, 0, 1, WIDE)
        scores = tl.dot(qb, tl.trans(kb), input_precision=PRECISION)
        if decay is not None:
            others = log_decays(decay, steady, other, offs, stride_dt, length, STEP, STEADY, exact, ROWS)
            after = tl.exp(others[2].to(tl.float32))
            scores *= tl.exp(running.to(tl.float32))[:, None] * after[None, :]
            running += others[3]
        weights += tl.sum(scores, 1)
        acc = tl.dot(scores.to(vb.dtype), vb, acc, input_precision=PRECISION)
    state_index = slot * HEADS + h
    from_state = tl.zeros([ROWS, BV], tl.float32)
    weights_of_state = tl.zeros([ROWS], tl.float32)
    for d in tl.range(0, K, BK):
        keys = d + tl.arange(0, BK)
        exists = (keys < K)[:, None] & (cols < V)[None, :]
        state = tl.load(state_pointers(states, state_index, keys, cols, K, V, False), mask=exists, other=0.0)
        qd = operand(q, None, walked * stride_qt, places, inside, keys, h, K, MAP_Q, 1, WIDE)
        from_state = tl.dot(qd, state, from_state, input_precision=PRECISION)
        if den is not None:
            z = tl.load(vectors + state_index.to(tl.int64) * K + keys, mask=keys < K, other=0.0)
            weights_of_state += tl.sum(qd.to(tl.float32) * z[None, :], 1)
    if decay is not None:
        before = tl.exp(running.to(tl.float32))
        from_state *= before[:, None]
        weights_of_state *= before
    factor = tl.full([ROWS], 1.0, tl.float32) * scale
    if den is not None:
        weights = scale * (weights + weights_of_state) + eps
        if piece == 0:
            tl.store(den + places * HEADS + h, weights, mask=inside)
        factor /= weights
    if row_scale is not None:
        factor *= scalars(row_scale, places, inside, h, 1)
    acc = (acc + from_state) * factor[:, None]
    at = ((places * HEADS + h) * V)[:, None] + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (cols < V)[None, :])
