"""The states that linear attention carries from chunk to chunk, without its result.

With G the running sum of log decays in a chunk and G_c their sum, in the order of the walk:

    left:  S <- e^(G_c) S + sum over j of e^(G_c - G_j) k_j v_j^T        z <- likewise, of k_j
    right: R <- e^(G_c) R + sum over i of e^(G_i) q_i dy_i^T             r <- likewise, of x_i q_i

S and z come from the first chunk, R and r, the gradients of the state behind a chunk, from the last one.
"""

import triton
import triton.language as tl

from .intervals import _bounded_start
from .linear_attention_rows import (
    UNSPECIALIZED,
    log_decays,
    operand,
    place_of,
    scalars,
    state_pointers,
    steady_log_decay,
)


@triton.jit
def _walk(
    b, c, factor_b, factor_c, w, decay, states, vectors, start_state, start_vector, end_state, end_vector, end_decay,
    cu, sequences, tokens, segments, steps, slot, h, rows_piece, cols_piece,
    stride_bb, stride_bt, stride_bh, stride_cb, stride_ct, stride_ch, stride_db, stride_dt, stride_dh, scale,
    HEADS: tl.constexpr, GROUP_B: tl.constexpr, GROUP_C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    MAP: tl.constexpr, HEADS_FB: tl.constexpr, HEADS_FC: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    RIGHT: tl.constexpr, STEP: tl.constexpr, STEADY: tl.constexpr, SEGMENT: tl.constexpr, BY_SLOT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BK x BV elements of the state of one head of one slot; `states`: the state before (right: behind) each chunk."""
    exact: tl.constexpr = PRECISION == "tf32x3"
    sequence, batch, row, start, length = place_of(slot, cu, sequences, tokens, segments, steps, SEGMENT)
    place = batch * tokens + start
    first = tl.cast(start, tl.int64)
    if STEP < 0:
        first += length - 1
        place += length - 1
    end = length
    if SEGMENT > 0:
        end = tl.minimum(row + SEGMENT, length)
    used = row <= length  # a slot without tokens is past the end of all sequences, unless it is a whole sequence
    offs = tl.arange(0, CHUNK)
    keys = rows_piece * BK + tl.arange(0, BK)
    cols = cols_piece * BV + tl.arange(0, BV)
    exists = (keys < K)[:, None] & (cols < V)[None, :] & used
    has_z = (keys < K) & (cols_piece == 0) & used
    index = ((slot if BY_SLOT else sequence) * HEADS + h).to(tl.int64)
    chunk_index = sequence * tl.cdiv(length, CHUNK) if cu is None else start // CHUNK + sequence
    s = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    if start_state is not None:
        s = tl.load(state_pointers(start_state, index, keys, cols, K, V, False), mask=exists, other=0.0)
    if NORMALIZE and start_vector is not None:
        z = tl.load(start_vector + index * K + keys, mask=has_z, other=0.0)
    head = h.to(tl.int64)
    b += batch * stride_bb + first * stride_bt + head // GROUP_B * stride_bh
    c += batch * stride_cb + first * stride_ct + head // GROUP_C * stride_ch
    if decay is not None:
        decay += batch * stride_db + first * stride_dt + head * stride_dh
        steady = steady_log_decay(decay, STEADY, exact)
    sum_of_logs = 0.0
    for walked_rows in tl.range(row, end, CHUNK):
        chunk = walked_rows
        if RIGHT:
            chunk = row + (end - 1 - row) // CHUNK * CHUNK - (walked_rows - row)
        inside = chunk + offs < end
        if states is not None:
            kept_index = (chunk_index + chunk // CHUNK) * HEADS + h
            tl.store(
                state_pointers(states, kept_index, keys, cols, K, V, False), s.to(states.dtype.element_ty), mask=exists
            )
            if NORMALIZE:
                tl.store(vectors + kept_index.to(tl.int64) * K + keys, z, mask=has_z)
        walked = (chunk + offs).to(tl.int64) * STEP
        places = place + walked
        kb = operand(b, factor_b, walked * stride_bt, places, inside, keys, h, K, MAP, HEADS_FB, WIDE)
        vb = operand(c, factor_c, walked * stride_ct, places, inside, cols, h, V, 0, HEADS_FC, WIDE)
        weights = tl.where(inside, 1.0, 0.0)
        if w is not None:
            weights = scalars(w, places, inside, h, HEADS)
        if decay is not None:
            _, running, remaining, total = log_decays(
                decay, steady, chunk, offs, stride_dt, length, STEP, STEADY, exact, CHUNK
            )
            reach = tl.exp((running if RIGHT else remaining).to(tl.float32))
            weights *= reach
            vb = (vb * reach[:, None]).to(vb.dtype)
            kept = tl.exp(total.to(tl.float32))
            s *= kept
            z *= kept
            sum_of_logs += total.to(tl.float32)
        if NORMALIZE:
            z += tl.sum(kb.to(tl.float32) * weights[:, None], 0)
        if SCALED:
            s += scale * tl.dot(tl.trans(kb), vb, input_precision=PRECISION)
        else:
            s = tl.dot(tl.trans(kb), vb, s, input_precision=PRECISION)
    if end_state is not None:
        tl.store(state_pointers(end_state, index, keys, cols, K, V, False), s, mask=exists)
    if NORMALIZE and end_vector is not None:
        tl.store(end_vector + index * K + keys, z, mask=has_z)
    if end_decay is not None and decay is not None:
        tl.store(end_decay + index, sum_of_logs, mask=(rows_piece == 0) & (cols_piece == 0) & used)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_attention_states_kernel(
    k, v, weight, left_states, left_vectors, left_start, left_start_vector, left_end, left_end_vector,
    q, grad, factor, x, right_states, right_vectors, right_start, right_start_vector, right_end, right_end_vector,
    decay, end_decay,  # states (chunks, HEADS, K, V), starts and ends (sequences or slots, HEADS, K, V)
    cu, sequences, tokens, segments, steps,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_qb, stride_qt, stride_qh,
    stride_gb, stride_gt, stride_gh, stride_db, stride_dt, stride_dh, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MAP_Q: tl.constexpr,
    MAP_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    STEP: tl.constexpr, STEADY: tl.constexpr, SEGMENT: tl.constexpr, BY_SLOT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Walks from the LEFT, from the RIGHT, or both, every other program one of them. Slots as in `place_of`."""
    sides: tl.constexpr = 2 if LEFT and RIGHT else 1
    rows: tl.constexpr = (K + BK - 1) // BK
    slices: tl.constexpr = (V + BV - 1) // BV * rows
    program = tl.program_id(0)
    piece = program // sides % slices
    h = program // (sides * slices) % HEADS
    slot = program // (sides * slices * HEADS)
    if LEFT and program % sides == 0:
        _walk(
            k, v, weight, None, None, decay, left_states, left_vectors, left_start, left_start_vector, left_end,
            left_end_vector, end_decay, cu, sequences, tokens, segments, steps, slot, h, piece % rows, piece // rows,
            stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh, 1.0,
            HEADS, GROUP, GROUP, K, V, MAP_K, 1, 1, NORMALIZE, False, False, STEP, STEADY, SEGMENT, BY_SLOT, WIDE,
            PRECISION, CHUNK, BK, BV,
        )  # fmt: skip
    if RIGHT and program % sides == sides - 1:
        _walk(
            q, grad, None, factor, x, decay, right_states, right_vectors, right_start, right_start_vector, right_end,
            right_end_vector, None, cu, sequences, tokens, segments, steps, slot, h, piece % rows, piece // rows,
            stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, stride_db, stride_dt, stride_dh, scale,
            HEADS, 1, 1, K, V, MAP_Q, 1, HEADS, NORMALIZE, SCALED, True, STEP, STEADY, SEGMENT, BY_SLOT, WIDE,
            PRECISION, CHUNK, BK, BV,
        )  # fmt: skip


@triton.jit
def _then(decay, sum, later_decay, later_sum):
    return decay * later_decay, sum * later_decay + later_sum


@triton.jit
def _scan(
    local, log_decay, out, start, end, slot, count, index, h, offs, HEADS: tl.constexpr, N: tl.constexpr,
    RIGHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    inside = offs < N
    state = tl.zeros_like(offs).to(tl.float32)
    if start is not None:
        state = tl.load(start + index * N + offs, mask=inside, other=0.0)
    rows = tl.arange(0, SEGMENTS)
    # Row i is the state before segment i of the walk: the sum of those up to i - 1. The last row is the final state.
    for done in tl.range(0, count + 1, SEGMENTS):
        i = done + rows
        segment = count - 1 - i if RIGHT else i
        former = (slot + segment + (1 if RIGHT else -1)).to(tl.int64) * HEADS + h
        known = (i > 0) & (i <= count)
        sums = tl.load(local + former[:, None] * N + offs[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        if log_decay is not None:
            logs = tl.load(log_decay + former, mask=known, other=0.0)
            decays = tl.broadcast_to(tl.exp(logs)[:, None], sums.shape)
            decays, sums = tl.associative_scan((decays, sums), 0, _then)
            sums += decays * state[None, :]
        else:
            sums = tl.cumsum(sums, 0) + state[None, :]
        if out is not None:
            place = ((slot + segment).to(tl.int64) * HEADS + h) * N
            tl.store(out + place[:, None] + offs[None, :], sums, mask=(i < count)[:, None] & inside[None, :])
        if end is not None:
            last = tl.broadcast_to((index * N + offs)[None, :], sums.shape)
            tl.store(end + last, sums, mask=(i == count)[:, None] & inside[None, :])
        state = tl.sum(tl.where((rows == SEGMENTS - 1)[:, None], sums, 0.0), 0)


@triton.jit(do_not_specialize=("sequences", "tokens", "segments"))
def linear_attention_scan_kernel(
    left, left_out, left_start, left_end, right, right_out, right_start, right_end,
    left_vector, left_vector_out, left_vector_start, left_vector_end,
    right_vector, right_vector_out, right_vector_start, right_vector_end,
    log_decay, cu, sequences, tokens, segments,
    HEADS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the sums over each segment, (slots, HEADS, N) and (slots, HEADS, K), into the state before it (`out`), and
    into the state after the last one (`end`).

    A program owns BLOCK elements of a state of one head of one sequence and takes SEGMENTS segments at a time.
    """
    sides: tl.constexpr = 2 if LEFT and RIGHT else 1
    of_state: tl.constexpr = (N + BLOCK - 1) // BLOCK
    has_vectors: tl.constexpr = left_vector is not None or right_vector is not None
    blocks: tl.constexpr = of_state + ((K + BLOCK - 1) // BLOCK if has_vectors else 0)
    program = tl.program_id(0)
    side = program % sides if sides == 2 else (0 if LEFT else 1)
    block = program // sides % blocks
    h = program // (sides * blocks) % HEADS
    sequence = program // (sides * blocks * HEADS)
    if cu is None:
        length = tokens
        slot = sequence * segments
    else:
        start = _bounded_start(cu, sequence, tokens)
        length = tl.maximum(_bounded_start(cu, sequence + 1, tokens) - start, 0)
        slot = start // SEGMENT + sequence
    count = tl.cdiv(length, SEGMENT)
    index = (sequence * HEADS + h).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    if LEFT and side == 0:
        if block < of_state:
            _scan(left, log_decay, left_out, left_start, left_end, slot, count, index, h, block * BLOCK + offs, HEADS,
                  N, False, SEGMENTS)  # fmt: skip
        elif has_vectors:
            _scan(left_vector, log_decay, left_vector_out, left_vector_start, left_vector_end, slot, count, index, h,
                  (block - of_state) * BLOCK + offs, HEADS, K, False, SEGMENTS)  # fmt: skip
    if RIGHT and side == 1:
        if block < of_state:
            _scan(right, log_decay, right_out, right_start, right_end, slot, count, index, h, block * BLOCK + offs,
                  HEADS, N, True, SEGMENTS)  # fmt: skip
        elif has_vectors:
            _scan(right_vector, log_decay, right_vector_out, right_vector_start, right_vector_end, slot, count, index,
                  h, (block - of_state) * BLOCK + offs, HEADS, K, True, SEGMENTS)  # fmt: skip
