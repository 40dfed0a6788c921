"""Both ends of a decode step: the input of the network, and the new token from its output.

position (2,) int64 holds the step: the first kernel of a step reads entry 0 and writes entry 1, which all others read;
the last one writes entry 0 for the next step. So no program reads what another one of its kernel writes.
"""

import triton
import triton.language as tl

from .flow_affine import clipped, guide, log_scale_of
from .flow_decode_device import add_bias, depth, let_next_start, norm_weights, normalise, stream_rows, wait_for_last


@triton.jit(do_not_specialize=("length", "batch", "stride_pb", "stride_pt"))
def flow_decode_begin_kernel(
    tokens, start, weight, bias, positions, cond, stream, position, length, batch, stride_pb, stride_pt,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr,
    BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Program: BC columns of a row of stream (S, C)."""
    BLOCKS: tl.constexpr = (WIDTH + BC - 1) // BC
    block, row = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    at, lane = block * BC + tl.arange(0, BC), tl.arange(0, BF)
    inside, sample = at < WIDTH, row % batch
    let_next_start(EARLY)
    wait_for_last(EARLY)
    step = tl.load(position)
    if tl.program_id(0) == 0:
        tl.store(position + 1, step)
    token = tokens + (sample.to(tl.int64) * length + tl.maximum(step + FIRST - 1, 0)) * FEATURES
    acc = tl.zeros([BC, BF], tl.float32)
    for first in tl.static_range(0, FEATURES, BF):
        f = first + lane
        x = tl.load(token + f, mask=f < FEATURES, other=0.0)
        if start is not None:
            x = tl.where(step == 0, tl.load(start + f, mask=f < FEATURES, other=0.0).to(tl.float32), x)
        live = inside[:, None] & (f < FEATURES)[None, :]
        w = tl.load(weight + at[:, None] * FEATURES + f[None, :], mask=live, other=0.0).to(tl.float32)
        acc += w * x[None, :]
    h = tl.sum(acc, 1)
    if bias is not None:
        h += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if positions is not None:
        h += tl.load(positions + sample.to(tl.int64) * stride_pb + step * stride_pt + at, mask=inside, other=0.0)
    if cond is not None:
        h += tl.load(cond + row * WIDTH + at, mask=inside, other=0.0)
    tl.store(stream + row * WIDTH + at, h, mask=inside)


@triton.jit(do_not_specialize=("rows", "batch", "length", "stride_gb", "stride_gt", "clamp", "soft_clip"))
def flow_decode_end_kernel(
    stream, parts, post, norm, weight, bias, z, guidance, tokens, info, position, rows, batch, length, stride_gb,
    stride_gt, clamp, soft_clip,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, SCALES: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr,
    RULE: tl.constexpr, GUIDE_SCALE: tl.constexpr, GUIDE_MEAN: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLIPS: tl.constexpr, CLAMPS: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, EARLY: tl.constexpr,
    BK: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Program: BF features of a sample. info (B, blocks, 4): first token that is not finite, largest log scale, entries
    clamped, scales that are not positive; each program keeps its own."""
    BLOCKS: tl.constexpr = (FEATURES + BF - 1) // BF
    OUTPUTS: tl.constexpr = 2 * FEATURES if SCALES else FEATURES
    block, sample = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    f, at = block * BF + tl.arange(0, BF), depth(0, BK)
    inside = f < FEATURES
    live_w = inside[None, :, None] & (at < WIDTH)[None, None, :]
    shift = f + OUTPUTS - FEATURES
    let_next_start(EARLY)
    w_mu = tl.load(weight + shift[None, :, None] * WIDTH + at[None, None, :], mask=live_w, other=0.0)
    if SCALES:
        w_log = tl.load(weight + f[None, :, None] * WIDTH + at[None, None, :], mask=live_w, other=0.0)
    if post[0] is not None:
        post = norm_weights(post, at, WIDTH)
    if norm[0] is not None:
        norm = norm_weights(norm, at, WIDTH)
    wait_for_last(EARLY)
    target = tl.load(position + 1) + FIRST
    row = sample + tl.arange(0, 1)
    x, _, live = stream_rows(stream, parts, post, row, rows, at, WIDTH, PARTS, EPS, RMS)
    if norm[0] is not None:
        x = normalise(x, live, norm, WIDTH, EPS, RMS)
    mu = clipped(add_bias(tl.sum(w_mu.to(tl.float32) * x, 2), bias, shift, OUTPUTS), soft_clip, CLIPS)
    log_scale = tl.zeros([1, BF], tl.float32)
    if SCALES:
        alpha = add_bias(tl.sum(w_log.to(tl.float32) * x, 2), bias, f, OUTPUTS)
        log_scale = log_scale_of(clipped(alpha, soft_clip, CLIPS), SOFTPLUS)
    if guidance is not None:
        x, _, live = stream_rows(stream, parts, post, row + batch, rows, at, WIDTH, PARTS, EPS, RMS)
        if norm[0] is not None:
            x = normalise(x, live, norm, WIDTH, EPS, RMS)
        mu_u = clipped(add_bias(tl.sum(w_mu.to(tl.float32) * x, 2), bias, shift, OUTPUTS), soft_clip, CLIPS)
        log_u = tl.zeros([1, BF], tl.float32)
        if SCALES:
            alpha = add_bias(tl.sum(w_log.to(tl.float32) * x, 2), bias, f, OUTPUTS)
            log_u = log_scale_of(clipped(alpha, soft_clip, CLIPS), SOFTPLUS)
        w = tl.load(guidance + sample * stride_gb + target * stride_gt)
        sigma, log_scale, mu = guide(log_scale, mu, log_u, mu_u, w, RULE, GUIDE_SCALE, GUIDE_MEAN)
    else:
        sigma = tl.exp(log_scale)
    features = (sample.to(tl.int64) * length + target) * FEATURES + f[None, :]
    here = inside[None, :]
    new = tl.load(z + features, mask=here, other=0.0) * sigma + mu
    own = info + (sample * BLOCKS + block) * 4
    bad = tl.sum(tl.where(here & ~(tl.abs(new) < float("inf")), 1, 0)) > 0
    tl.store(own, tl.minimum(tl.load(own), tl.where(bad, target.to(tl.float32), float("inf"))))
    largest = tl.max(tl.where(here & (log_scale == log_scale), log_scale, float("-inf")))
    tl.store(own + 1, tl.maximum(tl.load(own + 1), largest))
    if CLAMPS:
        cut = here & (tl.abs(new) > clamp)
        tl.store(own + 2, tl.load(own + 2) + tl.sum(tl.where(cut, 1.0, 0.0)))
        new = tl.where(cut, tl.where(new > 0.0, clamp, -clamp), new)
    tl.store(own + 3, tl.load(own + 3) + tl.sum(tl.where(here & ~(sigma > 0.0), 1.0, 0.0)))
    tl.store(tokens + features, new, mask=here)
    if tl.program_id(0) == 0:
        tl.store(position, target - FIRST + 1)
