"""The pass over tokens that linear attention consists of.

With queries a, keys b, values c, in the order of the walk, and G the running sum of the log decays, a pass computes

    y_i = sum over j <= i of e^(G_i - G_j) (a_i . b_j + x_i w_j) c_j  +  e^(G_i) (S^T a_i + x_i z),

where S = sum of decayed b c^T and z = sum of decayed w c (with a normaliser: of b) come from the left. The result is
a, b, c = q, k, v. Three more passes make the gradients: dq is dout, v, k, and, from the other end, dk is v, dout, q and
dv is k, q, dout. Those of learned decays and of narrow heads are made by linear_attention_gradients.py.

A program owns BV value columns of one head of one segment, holds S in registers and walks the segment chunk by chunk.
Products take bfloat16 operands, or float32 ones: as tf32 for float16 inputs, whose range the scores and states exceed,
as three tf32 products for float32 inputs. No product takes the transpose of another's result.

Retention in both directions takes two walks over the keys: one from the right that leaves the state right of every
chunk, and one from the left that adds, to all pairs within a chunk, both states.

SCALED: values count value_scale times. The program walks with S / value_scale, so that products add to S as they come.

In a walk from the other end the decay of a token acts a step late: on what it passes on, not on what it meets.
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

NOTHING, SUM_OF_KEYS, SUM_OF_PAIRS = (tl.constexpr(i) for i in range(3))  # what z is
ONE_SIDED, OTHER_END, FROM_RIGHT, BOTH_SIDES = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_attention_kernel(
    a, b, c, input, out,  # rows (B, T, heads, K or V); out contiguous (B, T, HEADS, V)
    factor_a, factor_b, factor_c, out_factor,
    decay, x, w, den,  # contiguous (B, T, HEADS) but for decay
    state, vector, final_state, final_vector,  # (sequences or slots, HEADS, ...)
    right_state, right_vector,  # (chunks, HEADS, ...): written FROM_RIGHT, read on BOTH_SIDES
    cu, sequences, tokens, segments, steps,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh, stride_cb, stride_ct, stride_ch,
    stride_ib, stride_it, stride_ih, stride_db, stride_dt, stride_dh,
    scale, eps, value_scale,
    HEADS: tl.constexpr, GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, GROUP_C: tl.constexpr, GROUP_I: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    MAP_A: tl.constexpr, MAP_B: tl.constexpr, MAP_C: tl.constexpr, MAP_I: tl.constexpr,
    HEADS_FA: tl.constexpr, HEADS_FB: tl.constexpr, HEADS_FC: tl.constexpr,
    VECTOR: tl.constexpr, WALKS: tl.constexpr, STEP: tl.constexpr, STEADY: tl.constexpr, TRANSPOSED: tl.constexpr,
    SEGMENT: tl.constexpr, BY_SLOT: tl.constexpr, SCALED: tl.constexpr, SIDES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Slots as in `place_of`. Reads the state of the sequence, BY_SLOT of the segment; writes the final one of whole
    sequences."""
    slices: tl.constexpr = (V + BV - 1) // BV
    exact: tl.constexpr = PRECISION == "tf32x3"
    program = tl.program_id(0)
    piece = program % slices
    h = program // slices % HEADS
    head = h.to(tl.int64)  # for offsets: heads can lie far apart
    slot = program // (slices * HEADS)
    sequence, batch, row, start, length = place_of(slot, cu, sequences, tokens, segments, steps, SEGMENT)
    place = batch * tokens + start
    # Where the walk begins: step i of it is at token first + STEP * i.
    first = tl.cast(start, tl.int64)
    if STEP < 0:
        first += length - 1
        place += length - 1
    end = length
    if SEGMENT > 0:
        end = tl.minimum(row + SEGMENT, length)
        if row >= length:
            return
        if SIDES == OTHER_END:  # segments are those of the walk from the first end
            row, end = length - end, length - row

    chunks = tl.cdiv(length, CHUNK)
    first_chunk = sequence * chunks if cu is None else start // CHUNK + sequence
    if SIDES == FROM_RIGHT:  # the short chunk is the last one of the sequence, so here it comes first
        row = length - chunks * CHUNK

    offs = tl.arange(0, CHUNK)
    keys = tl.arange(0, BK)
    cols = piece * BV + tl.arange(0, BV)
    state_index = (slot if BY_SLOT else sequence) * HEADS + h
    s = tl.zeros([BK, BV], tl.float32)
    exists = (keys < K)[:, None] & (cols < V)[None, :]
    if state is not None:
        s = tl.load(state_pointers(state, state_index, keys, cols, K, V, TRANSPOSED), mask=exists, other=0.0)
        if SCALED:
            s /= value_scale
    z = tl.zeros([BK if VECTOR == SUM_OF_KEYS else BV], tl.float32)
    width_z: tl.constexpr = K if VECTOR == SUM_OF_KEYS else V
    place_z = keys if VECTOR == SUM_OF_KEYS else cols
    if VECTOR != NOTHING and vector is not None:
        z = tl.load(vector + state_index.to(tl.int64) * width_z + place_z, mask=place_z < width_z, other=0.0)
    if decay is not None:
        decay += batch * stride_db + first * stride_dt + head * stride_dh
        steady = steady_log_decay(decay, STEADY, exact)
    if out is not None:
        a += batch * stride_ab + first * stride_at + head // GROUP_A * stride_ah
        out += (place * HEADS + h) * V
    if WALKS:
        b += batch * stride_bb + first * stride_bt + head // GROUP_B * stride_bh
        c += batch * stride_cb + first * stride_ct + head // GROUP_C * stride_ch
    if input is not None:
        input += batch * stride_ib + first * stride_it + head // GROUP_I * stride_ih

    for chunk in tl.range(row, end, CHUNK):
        inside = (chunk + offs < end) & (chunk + offs >= 0)
        if SIDES == FROM_RIGHT or SIDES == BOTH_SIDES:
            number = first_chunk + ((end - CHUNK - chunk) // CHUNK if SIDES == FROM_RIGHT else chunk // CHUNK)
            right_index = number * HEADS + h
        if SIDES == FROM_RIGHT:
            tl.store(
                state_pointers(right_state, right_index, keys, cols, K, V, False), s.to(right_state.dtype.element_ty),
                mask=exists,
            )  # fmt: skip
            if VECTOR == SUM_OF_PAIRS or (VECTOR == SUM_OF_KEYS and piece == 0):
                tl.store(right_vector + right_index.to(tl.int64) * width_z + place_z, z, mask=place_z < width_z)
        walked = (chunk + offs).to(tl.int64) * STEP
        places = place + walked
        if WALKS:
            kb = operand(b, factor_b, walked * stride_bt, places, inside, keys, h, K, MAP_B, HEADS_FB, WIDE)
            vb = operand(c, factor_c, walked * stride_ct, places, inside, cols, h, V, MAP_C, HEADS_FC, WIDE)
        if VECTOR == SUM_OF_PAIRS and WALKS:
            if w is not None:
                ws = scalars(w, places, inside, h, HEADS)
            else:
                ws = tl.where(inside, 1.0, 0.0)
        if decay is not None:
            g, running, remaining, total = log_decays(
                decay, steady, chunk, offs, stride_dt, end, STEP, STEADY, exact, CHUNK
            )
            if SIDES == OTHER_END:
                late = steady if STEADY else g
                running -= late
                remaining += late
            before = tl.exp(running.to(tl.float32))
            after = tl.exp(remaining.to(tl.float32))
        if out is not None:
            qb = operand(a, factor_a, walked * stride_at, places, inside, keys, h, K, MAP_A, HEADS_FA, WIDE)
            y = tl.dot(qb, s.to(qb.dtype), input_precision=PRECISION)
            if VECTOR == SUM_OF_PAIRS:
                if x is not None:
                    xs = scalars(x, places, inside, h, HEADS)
                else:
                    xs = tl.where(inside, 1.0, 0.0)
                y += xs[:, None] * z[None, :]
            if VECTOR == SUM_OF_KEYS:
                weights = tl.sum(qb.to(tl.float32) * z[None, :], 1)
            if WALKS:
                scores = tl.dot(qb, tl.trans(kb), input_precision=PRECISION)
                if VECTOR == SUM_OF_PAIRS:
                    scores += xs[:, None] * ws[None, :]
                lower = offs[:, None] >= offs[None, :]
                if SIDES == BOTH_SIDES:
                    # From the right a key comes by the decays from the query's own to the one before the key's.
                    late = running - g
                    apart = tl.where(lower, running[:, None] - running[None, :], late[None, :] - late[:, None])
                    scores *= tl.where(inside[None, :], tl.exp(apart.to(tl.float32)), 0.0)
                    y *= before[:, None]
                    right = tl.load(
                        state_pointers(right_state, right_index, keys, cols, K, V, False), mask=exists, other=0.0
                    )
                    from_right = tl.exp((remaining + g).to(tl.float32))
                    far = tl.dot(qb, right.to(qb.dtype), input_precision=PRECISION)
                    if VECTOR != NOTHING:
                        right_z = tl.load(
                            right_vector + right_index.to(tl.int64) * width_z + place_z, mask=place_z < width_z,
                            other=0.0,
                        )  # fmt: skip
                        if VECTOR == SUM_OF_PAIRS:
                            far += xs[:, None] * right_z[None, :]
                        else:
                            far_weights = tl.sum(qb.to(tl.float32) * right_z[None, :], 1) * from_right
                    y += far * from_right[:, None]
                elif decay is not None:
                    apart = (running[:, None] - running[None, :]).to(tl.float32)
                    scores *= tl.exp(tl.where(lower, apart, float("-inf")))
                    y *= before[:, None]
                else:
                    scores = tl.where(lower, scores, 0.0)
                if VECTOR == SUM_OF_KEYS:
                    if decay is not None:
                        weights *= before
                    if SIDES == BOTH_SIDES:
                        weights += far_weights
                    weights += tl.sum(scores, 1)
                y = tl.dot(scores.to(vb.dtype), vb, y, input_precision=PRECISION)
            factor = tl.full([CHUNK], 1.0, tl.float32) * (scale * value_scale if SCALED else scale)
            if VECTOR == SUM_OF_KEYS:
                weights = scale * weights + eps
                if piece == 0:
                    tl.store(den + places * HEADS + h, weights, mask=inside)
                factor /= weights
            if out_factor is not None:
                factor *= scalars(out_factor, places, inside, h, 1)
            y *= factor[:, None]
            within = inside[:, None] & (cols < V)[None, :]
            if input is not None:
                raw = tl.load(input + (walked * stride_it)[:, None] + cols[None, :], mask=within, other=0.0)
                y = derivative_product(phi(raw, within, MAP_I), y, MAP_I)
            tl.store(out + (walked * (HEADS * V))[:, None] + cols[None, :], y.to(out.dtype.element_ty), mask=within)
        if WALKS:
            if decay is not None:
                kept = tl.exp(total.to(tl.float32))
                s *= kept
                z *= kept
                vb = (vb * after[:, None]).to(vb.dtype)
            if VECTOR == SUM_OF_KEYS:
                shares = tl.where(inside, 1.0, 0.0)  # phi of a token outside is not 0
                if decay is not None:
                    shares *= after
                z += tl.sum(kb.to(tl.float32) * shares[:, None], 0)
            if VECTOR == SUM_OF_PAIRS:
                z += tl.sum(ws[:, None] * vb.to(tl.float32), 0)
            s = tl.dot(tl.trans(kb), vb, s, input_precision=PRECISION)

    if final_state is not None:
        if SCALED:
            s *= value_scale
        tl.store(state_pointers(final_state, state_index, keys, cols, K, V, TRANSPOSED), s, mask=exists)
    if final_vector is not None and (VECTOR == SUM_OF_PAIRS or piece == 0):
        tl.store(final_vector + state_index.to(tl.int64) * width_z + place_z, z, mask=place_z < width_z)
