"""The gradients of linear attention in one direction, chunk by chunk, given the states before and behind each chunk.

With P_ij = e^(G_i - G_j) q_i . k_j and dP_ij = e^(G_i - G_j) (dy_i . v_j + x_i) for j <= i, in the order of the walk,
and the states of linear_attention_states.py,

    dq_i = sum over j of dP_ij k_j + e^(G_i) (S dy_i + x_i z)
    dk_j = sum over i of dP_ij q_i + e^(G_c - G_j) (R v_j + r)
    dv_j = sum over i of P_ij dy_i + e^(G_c - G_j) R^T k_j.

The decay of token t acts on what reaches a token i >= t from a token j < t. There are four kinds of such pairs (in the
chunk are both, only i, only j, neither), and none takes the difference of large sums:

    dg_t = sum over j < t <= i of P_ij (dy_i . v_j + x_i) + sum over i >= t of q_i . e^(G_i) (S dy_i + x_i z)
           + sum over j < t of k_j . e^(G_c - G_j) (R v_j + r) + e^(G_c) (<S, R> + <z, r>).
"""

import triton
import triton.language as tl

from .linear_attention_rows import (
    UNSPECIALIZED,
    derivative_product,
    log_decays,
    operand,
    phi,
    place_of,
    scalars,
    state_pointers,
    steady_log_decay,
)


@triton.jit
def _differentiated(acc, base, offsets, inside, cols, WIDTH: tl.constexpr, MAP: tl.constexpr):
    """phi'(rows) acc."""
    if MAP == 0:
        return acc
    within = inside[:, None] & (cols < WIDTH)[None, :]
    raw = tl.load(base + offsets[:, None] + cols[None, :], mask=within, other=0.0)
    return derivative_product(phi(raw, within, MAP), acc, MAP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_attention_gradients_kernel(
    q, k, v, grad, factor, weight, x, decay,  # rows (B, T, heads, width); grad counts by factor, keys by weight
    left_states, left_vectors, right_states, right_vectors,  # (chunks, HEADS, K, V) and (chunks, HEADS, K)
    dq, dk, dv, ddecay,  # contiguous, (B, T, HEADS, width) and (B, T, HEADS)
    cu, sequences, tokens, segments, steps,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, stride_db, stride_dt, stride_dh, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAP_Q: tl.constexpr,
    MAP_K: tl.constexpr, FRESH: tl.constexpr, STEP: tl.constexpr, STEADY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head: a chunk, or one of the two BLOCKS of one (not for ddecay).

    FRESH: no state came in, so the first decay acts on nothing.
    """
    exact: tl.constexpr = PRECISION == "tf32x3"
    program = tl.program_id(0)
    part = program % BLOCKS
    h = program // BLOCKS % HEADS
    head = h.to(tl.int64)
    slot = program // (BLOCKS * HEADS)
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
    grad += batch * stride_gb + first * stride_gt + head * stride_gh
    offs = tl.arange(0, ROWS)
    inside = row + offs < length
    walked = (row + offs).to(tl.int64) * STEP
    places = place + walked
    of_q, of_k, of_v, of_grad = walked * stride_qt, walked * stride_kt, walked * stride_vt, walked * stride_gt
    state_index = slot * HEADS + h
    if BLOCKS == 2:  # the block behind this one has its queries for our keys, the one before keys for our queries
        first_part = part == 0
        other_row = row + tl.where(first_part, ROWS, -ROWS)
        inside_o = other_row + offs < length
        walked_o = (other_row + offs).to(tl.int64) * STEP
        places_o = place + walked_o
        products_o = tl.zeros([ROWS, ROWS], tl.float32)
        grads_o = tl.zeros([ROWS, ROWS], tl.float32)

    keys = tl.arange(0, BK)
    if K <= BK:  # one tile, of which phi is taken once
        qb = operand(q, None, of_q, places, inside, keys, h, K, MAP_Q, 1, WIDE)
        kb = operand(k, weight, of_k, places, inside, keys, h, K, MAP_K, 1, WIDE)

    # Scores of (query i, key j) and, as "..._t", of (key j, query i): no product takes another's transpose.
    products_t = tl.zeros([ROWS, ROWS], tl.float32)
    for d in tl.range(0, K, BK):
        if K > BK:
            keys = d + tl.arange(0, BK)
            qb = operand(q, None, of_q, places, inside, keys, h, K, MAP_Q, 1, WIDE)
            kb = operand(k, weight, of_k, places, inside, keys, h, K, MAP_K, 1, WIDE)
        products_t = tl.dot(kb, tl.trans(qb), products_t, input_precision=PRECISION)
        if BLOCKS == 2:
            if first_part:
                qo = operand(q, None, walked_o * stride_qt, places_o, inside_o, keys, h, K, MAP_Q, 1, WIDE)
                products_o = tl.dot(kb, tl.trans(qo), products_o, input_precision=PRECISION)
    grads = tl.zeros([ROWS, ROWS], tl.float32)
    grads_t = tl.zeros([ROWS, ROWS], tl.float32)
    for m in tl.range(0, V, BV):
        cols = m + tl.arange(0, BV)
        vb = operand(v, None, of_v, places, inside, cols, h, V, 0, 1, WIDE)
        gb = operand(grad, factor, of_grad, places, inside, cols, h, V, 0, HEADS, WIDE)
        grads = tl.dot(gb, tl.trans(vb), grads, input_precision=PRECISION)
        grads_t = tl.dot(vb, tl.trans(gb), grads_t, input_precision=PRECISION)
        if BLOCKS == 2:
            if first_part:
                go = operand(grad, factor, walked_o * stride_gt, places_o, inside_o, cols, h, V, 0, HEADS, WIDE)
                grads_o = tl.dot(vb, tl.trans(go), grads_o, input_precision=PRECISION)
            else:
                vo = operand(v, None, walked_o * stride_vt, places_o, inside_o, cols, h, V, 0, 1, WIDE)
                grads_o = tl.dot(gb, tl.trans(vo), grads_o, input_precision=PRECISION)
    if x is not None:
        xs = scalars(x, places, inside, h, HEADS)
        grads += xs[:, None]
        grads_t += xs[None, :]
        if BLOCKS == 2:
            if first_part:
                grads_o += scalars(x, places_o, inside_o, h, HEADS)[None, :]
            else:
                grads_o += xs[:, None]
    lower, upper = offs[:, None] >= offs[None, :], offs[:, None] <= offs[None, :]
    if decay is not None:
        decay += batch * stride_db + first * stride_dt + head * stride_dh
        steady = steady_log_decay(decay, STEADY, exact)
        _, running, remaining, total = log_decays(
            decay, steady, row, offs, stride_dt, length, STEP, STEADY, exact, ROWS
        )
        before, after = tl.exp(running.to(tl.float32)), tl.exp(remaining.to(tl.float32))
        apart = (running[:, None] - running[None, :]).to(tl.float32)
        grads *= tl.exp(tl.where(lower, apart, float("-inf")))
        apart_t = (running[None, :] - running[:, None]).to(tl.float32)
        decays_t = tl.exp(tl.where(upper, apart_t, float("-inf")))
        products_t *= decays_t
        if ddecay is not None:
            pairs = tl.where(offs[:, None] < offs[None, :], products_t * grads_t, 0.0) * scale
            behind = tl.sum(pairs, 0)  # of i >= t less those of j >= t: what crosses t
            behind -= tl.sum(pairs, 1)
            ahead = tl.zeros([ROWS], tl.float32)
            around = tl.zeros([BK], tl.float32)
        grads_t *= decays_t
        if BLOCKS == 2:
            _, running_o, remaining_o, total_o = log_decays(
                decay, steady, other_row, offs, stride_dt, length, STEP, STEADY, exact, ROWS
            )
            before_o, after_o = tl.exp(running_o.to(tl.float32)), tl.exp(remaining_o.to(tl.float32))
            if first_part:
                between = after[:, None] * before_o[None, :]
                after *= tl.exp(total_o.to(tl.float32))
            else:
                between = before[:, None] * after_o[None, :]
                before *= tl.exp(total_o.to(tl.float32))
            products_o *= between
            grads_o *= between
    else:
        before = tl.full([ROWS], 1.0, tl.float32)
        grads = tl.where(lower, grads, 0.0)
        grads_t = tl.where(upper, grads_t, 0.0)
        products_t = tl.where(upper, products_t, 0.0)
    operands: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    grads, grads_t = (grads * scale).to(operands), (grads_t * scale).to(operands)
    products_t = (products_t * scale).to(operands)
    if BLOCKS == 2:
        grads_o, products_o = (grads_o * scale).to(operands), (products_o * scale).to(operands)

    for d in tl.range(0, K, BK):
        keys = d + tl.arange(0, BK)
        acc_q = tl.zeros([ROWS, BK], tl.float32)
        acc_k = tl.zeros([ROWS, BK], tl.float32)
        for m in tl.range(0, V, BV):
            cols = m + tl.arange(0, BV)
            exists = (keys < K)[:, None] & (cols < V)[None, :]
            left = tl.load(state_pointers(left_states, state_index, keys, cols, K, V, False), mask=exists, other=0.0)
            right = tl.load(state_pointers(right_states, state_index, keys, cols, K, V, False), mask=exists, other=0.0)
            vb = operand(v, None, of_v, places, inside, cols, h, V, 0, 1, WIDE)
            gb = operand(grad, factor, of_grad, places, inside, cols, h, V, 0, HEADS, WIDE)
            acc_q = tl.dot(gb, tl.trans(left), acc_q, input_precision=PRECISION)
            acc_k = tl.dot(vb, tl.trans(right), acc_k, input_precision=PRECISION)
            if ddecay is not None:
                around += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
        if x is not None:
            at = state_index.to(tl.int64) * K + keys
            left_z = tl.load(left_vectors + at, mask=keys < K, other=0.0)
            right_z = tl.load(right_vectors + at, mask=keys < K, other=0.0)
            acc_q += xs[:, None] * left_z[None, :]
            acc_k += right_z[None, :]
            if ddecay is not None:
                around += left_z * right_z
        acc_q *= (before * scale)[:, None]
        if decay is not None:
            acc_k *= after[:, None]
        if K > BK:
            qb = operand(q, None, of_q, places, inside, keys, h, K, MAP_Q, 1, WIDE)
            kb = operand(k, weight, of_k, places, inside, keys, h, K, MAP_K, 1, WIDE)
        if ddecay is not None:
            behind += tl.sum(qb.to(tl.float32) * acc_q, 1)
            ahead += tl.sum(kb.to(tl.float32) * acc_k, 1)
        acc_q = tl.dot(grads, kb, acc_q, input_precision=PRECISION)
        acc_k = tl.dot(grads_t, qb, acc_k, input_precision=PRECISION)
        if BLOCKS == 2:
            if first_part:
                qo = operand(q, None, walked_o * stride_qt, places_o, inside_o, keys, h, K, MAP_Q, 1, WIDE)
                acc_k = tl.dot(grads_o, qo, acc_k, input_precision=PRECISION)
            else:
                ko = operand(k, weight, walked_o * stride_kt, places_o, inside_o, keys, h, K, MAP_K, 1, WIDE)
                acc_q = tl.dot(grads_o, ko, acc_q, input_precision=PRECISION)
        if weight is not None:
            acc_k *= scalars(weight, places, inside, h, 1)[:, None]
        acc_q = _differentiated(acc_q, q, of_q, inside, keys, K, MAP_Q)
        acc_k = _differentiated(acc_k, k, of_k, inside, keys, K, MAP_K)
        at = ((places * HEADS + h) * K)[:, None] + keys[None, :]
        within = inside[:, None] & (keys < K)[None, :]
        tl.store(dq + at, acc_q.to(dq.dtype.element_ty), mask=within)
        tl.store(dk + at, acc_k.to(dk.dtype.element_ty), mask=within)
    for m in tl.range(0, V, BV):
        cols = m + tl.arange(0, BV)
        acc_v = tl.zeros([ROWS, BV], tl.float32)
        for d in tl.range(0, K, BK):
            keys = d + tl.arange(0, BK)
            exists = (keys < K)[:, None] & (cols < V)[None, :]
            right = tl.load(state_pointers(right_states, state_index, keys, cols, K, V, False), mask=exists, other=0.0)
            if K > BK:
                kb = operand(k, weight, of_k, places, inside, keys, h, K, MAP_K, 1, WIDE)
            acc_v = tl.dot(kb, right, acc_v, input_precision=PRECISION)
        if decay is not None:
            acc_v *= after[:, None]
        gb = operand(grad, factor, of_grad, places, inside, cols, h, V, 0, HEADS, WIDE)
        acc_v = tl.dot(products_t, gb, acc_v, input_precision=PRECISION)
        if BLOCKS == 2:
            if first_part:
                go = operand(grad, factor, walked_o * stride_gt, places_o, inside_o, cols, h, V, 0, HEADS, WIDE)
                acc_v = tl.dot(products_o, go, acc_v, input_precision=PRECISION)
        at = ((places * HEADS + h) * V)[:, None] + cols[None, :]
        tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=inside[:, None] & (cols < V)[None, :])
    if ddecay is not None:
        around = tl.exp(total.to(tl.float32)) * tl.sum(around, 0)
        crossing = tl.cumsum(behind, 0, reverse=True) + (tl.cumsum(ahead, 0) - ahead) + around
        if FRESH:
            crossing = tl.where(row + offs == 0, 0.0, crossing)
        tl.store(ddecay + places * HEADS + h, crossing, mask=inside)


@triton.jit(do_not_specialize=("rows", "tokens"))
def linear_attention_rows_kernel(
    dout, out, den, row_scale, factor, x,  # (B, T, HEADS, V); the rest (B, T, HEADS), row_scale (B, T)
    rows, tokens, stride_b, stride_t, stride_h, scale,
    HEADS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor = row_scale * scale / den, by which dout counts, and x = -scale (dout . out) / den.

    x z cancels most of what the scores give to dq, so x is formed from the rows that the products will take.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < rows
    token, h = offs // HEADS, offs % HEADS
    value = tl.full([BLOCK], 1.0, tl.float32) * scale
    if den is not None:
        cols = tl.arange(0, BV)
        within = inside[:, None] & (cols < V)[None, :]
        at = token // tokens * stride_b + token % tokens * stride_t + h * stride_h
        grad = tl.load(dout + at[:, None] + cols[None, :], mask=within, other=0.0).to(tl.float32)
        result = tl.load(out + (offs * V)[:, None] + cols[None, :], mask=within, other=0.0).to(tl.float32)
        divisor = tl.load(den + offs, mask=inside, other=1.0)
        value /= divisor
        grad *= value[:, None]
        if row_scale is None and dout.dtype.element_ty == tl.bfloat16:
            grad = grad.to(tl.bfloat16).to(tl.float32)
        tl.store(x + offs, -tl.sum(grad * result, 1), mask=inside)
    if row_scale is not None:
        value *= tl.load(row_scale + token, mask=inside, other=0.0)
    tl.store(factor + offs, value, mask=inside)
