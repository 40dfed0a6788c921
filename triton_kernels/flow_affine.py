"""The affine map of a causal flow, both ways, with what an iterative inverse measures on the way.

Program: BT tokens of D features, as a tile. Inputs keep their strides; every one is read once. The stride of tokens is
a constant and, where batch and tokens are one dimension (FLAT), the only one: loads of 16 bytes need to know that it is
a multiple of them. The last kernel of a decode step uses the pieces too.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, alignments

LOG_LINEAR, SIGMA_LINEAR, GAUSSIAN_RATIO = (tl.constexpr(i) for i in range(3))  # reference.flow_affine.RULES
SHIFT = tl.constexpr(0.5413248546129181)  # reference.flow_affine.SOFTPLUS_SHIFT
STATISTICS = tl.constexpr(9)  # reference.flow_affine.STATISTICS
ELEMENTS = 2048  # of a program's tile
WIDEST = 8192


@triton.jit
def clipped(raw, soft_clip, CLIPS: tl.constexpr):
    """c tanh(raw / c). NaN stays NaN."""
    if CLIPS:
        e = tl.exp(-2.0 * tl.abs(raw) / soft_clip)
        size = soft_clip * (1.0 - e) / (1.0 + e)
        raw = tl.where(raw < 0.0, -size, size)
    return raw


@triton.jit
def _softplus(x):
    y = tl.exp(-tl.abs(x))
    w = 1.0 + y  # the quotient makes up for the digits it loses
    log1p = tl.where(w == 1.0, y, tl.log(w) * (y / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)


@triton.jit
def log_scale_of(alpha, SOFTPLUS: tl.constexpr):
    """log sigma of a clipped alpha."""
    if SOFTPLUS:
        alpha = tl.log(_softplus(alpha + SHIFT))
    return alpha


@triton.jit
def guide(
    log_c, mu_c, log_u, mu_u, w, RULE: tl.constexpr, GUIDE_SCALE: tl.constexpr, GUIDE_MEAN: tl.constexpr
):  # fmt: skip
    """(sigma, log sigma, mu) of two streams; see reference.flow_affine.guide."""
    for_scale, for_mean = w if GUIDE_SCALE else w * 0.0, w if GUIDE_MEAN else w * 0.0
    if RULE == GAUSSIAN_RATIO:
        ratio = tl.exp(2.0 * tl.where(log_c > log_u, 0.0, log_c - log_u))
        mu = ((1.0 + for_mean) * mu_c - for_mean * ratio * mu_u) / (1.0 + for_mean * (1.0 - ratio))
        log_scale = log_c - 0.5 * tl.log(1.0 + for_scale * (1.0 - ratio))
        sigma = tl.exp(log_scale)
    else:
        mu = mu_c + for_mean * (mu_c - mu_u)
        if RULE == LOG_LINEAR:
            log_scale = log_c + for_scale * (log_c - log_u)
            sigma = tl.exp(log_scale)
        else:
            sigma = tl.exp(log_c)
            sigma += for_scale * (sigma - tl.exp(log_u))
            log_scale = tl.log(sigma)
    return sigma, log_scale, mu


@triton.jit
def _read(x, row, tokens, stride, cols, live, STRIDE: tl.constexpr, FLAT: tl.constexpr):
    """Rows of x (B, n, ...) in float32; live (BT, D)."""
    row = row.to(tl.int64)
    rows = row * STRIDE if FLAT else row // tokens * stride + row % tokens * STRIDE
    return tl.load(x + rows[:, None] + cols[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def _place(total, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """The tokens of a program, its features, which elements exist."""
    row, cols = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    return row, cols, (row < total)[:, None] & (cols < D)[None, :]


@triton.jit
def _split(
    raw, row, tokens, stride, cols, live, soft_clip, STRIDE: tl.constexpr, FLAT: tl.constexpr,
    D: tl.constexpr, SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr,
):  # fmt: skip
    """(log sigma, mu); without scales sigma is 1."""
    if SCALES:
        alpha = clipped(_read(raw, row, tokens, stride, cols, live, STRIDE, FLAT), soft_clip, CLIPS)
        log_scale = log_scale_of(alpha, SOFTPLUS)
        mu = clipped(_read(raw + D, row, tokens, stride, cols, live, STRIDE, FLAT), soft_clip, CLIPS)
    else:
        mu = clipped(_read(raw, row, tokens, stride, cols, live, STRIDE, FLAT), soft_clip, CLIPS)
        log_scale = tl.zeros_like(mu)
    return tl.where(live, log_scale, 0.0), mu


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_fwd_kernel(
    x, raw, z, logdet, total, tokens, soft_clip, x_stride, p_stride,
    X_ROW: tl.constexpr, P_ROW: tl.constexpr, FLAT: tl.constexpr, D: tl.constexpr,
    SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, cols, live = _place(total, D, BT, BD)
    log_scale, mu = _split(
        raw, row, tokens, p_stride, cols, live, soft_clip, P_ROW, FLAT, D, SCALES, SOFTPLUS, CLIPS
    )  # fmt: skip
    y = (_read(x, row, tokens, x_stride, cols, live, X_ROW, FLAT) - mu) * tl.exp(-log_scale)
    to = row.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(z + to, y.to(z.dtype.element_ty), mask=live)
    tl.store(logdet + row, -tl.sum(log_scale, 1), mask=row < total)


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_bwd_kernel(
    dz, z, raw, dlogdet, dx, dparams, total, tokens, soft_clip, g_stride, z_stride, p_stride,
    G_ROW: tl.constexpr, Z_ROW: tl.constexpr, P_ROW: tl.constexpr, FLAT: tl.constexpr, D: tl.constexpr,
    SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With s = log sigma: dx = dz / sigma, dmu = -dx, ds = -z dz - dlogdet; then back through softplus and clip.
    dlogdet (B n) or None."""
    MEANS: tl.constexpr = D if SCALES else 0
    row, cols, live = _place(total, D, BT, BD)
    to, down = row.to(tl.int64)[:, None], _read(dz, row, tokens, g_stride, cols, live, G_ROW, FLAT)
    if SCALES:
        alpha = clipped(_read(raw, row, tokens, p_stride, cols, live, P_ROW, FLAT), soft_clip, CLIPS)
        log_scale = log_scale_of(alpha, SOFTPLUS)
        ds = -down * _read(z, row, tokens, z_stride, cols, live, Z_ROW, FLAT)
        if dlogdet is not None:
            ds -= tl.load(dlogdet + row, mask=row < total, other=0.0)[:, None]
        if SOFTPLUS:
            ds *= 1.0 / ((1.0 + tl.exp(-(alpha + SHIFT))) * tl.exp(log_scale))
        if CLIPS:
            ds *= 1.0 - (alpha / soft_clip) * (alpha / soft_clip)
        tl.store(dparams + to * (2 * D) + cols[None, :], ds.to(dparams.dtype.element_ty), mask=live)
        down *= tl.exp(-log_scale)
    tl.store(dx + to * D + cols[None, :], down.to(dx.dtype.element_ty), mask=live)
    dmu = -down
    if CLIPS:
        mu = clipped(_read(raw + MEANS, row, tokens, p_stride, cols, live, P_ROW, FLAT), soft_clip, CLIPS)
        dmu *= 1.0 - (mu / soft_clip) * (mu / soft_clip)
    tl.store(dparams + to * (MEANS + D) + MEANS + cols[None, :], dmu.to(dparams.dtype.element_ty), mask=live)


@triton.jit
def _largest(x, live):
    """Of each row, NaN where there is one."""
    wrong = tl.max(tl.where(live & (x != x), 1, 0), 1) > 0
    return tl.where(wrong, float("nan"), tl.max(tl.where(live, x, float("-inf")), 1))


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_inv_kernel(
    z, raw, other, previous, guidance, x, statistics, total, tokens, soft_clip,
    z_stride, p_stride, o_stride, u_stride, w_stride, w_token_stride,
    Z_ROW: tl.constexpr, P_ROW: tl.constexpr, O_ROW: tl.constexpr, U_ROW: tl.constexpr, FLAT: tl.constexpr,
    D: tl.constexpr, SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr,
    RULE: tl.constexpr, GUIDE_SCALE: tl.constexpr, GUIDE_MEAN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, cols, live = _place(total, D, BT, BD)
    exists = row < total
    log_scale, mu = _split(
        raw, row, tokens, p_stride, cols, live, soft_clip, P_ROW, FLAT, D, SCALES, SOFTPLUS, CLIPS
    )  # fmt: skip
    if other is not None:
        log_u, mu_u = _split(
            other, row, tokens, o_stride, cols, live, soft_clip, O_ROW, FLAT, D, SCALES, SOFTPLUS, CLIPS
        )  # fmt: skip
        places = row // tokens * w_stride + row % tokens * w_token_stride
        w = tl.load(guidance + places, mask=exists, other=0.0).to(tl.float32)[:, None]
        sigma, log_scale, mu = guide(log_scale, mu, log_u, mu_u, w, RULE, GUIDE_SCALE, GUIDE_MEAN)
    else:
        sigma = tl.exp(log_scale)
    u = _read(z, row, tokens, z_stride, cols, live, Z_ROW, FLAT) * sigma + mu
    to = row.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(x + to, u.to(x.dtype.element_ty), mask=live)
    finite = tl.abs(u) < float("inf")
    size = tl.where(live & finite, tl.abs(u), 0.0)
    update = tl.zeros([BT, BD], tl.float32)
    if previous is not None:
        before = _read(previous, row, tokens, u_stride, cols, live, U_ROW, FLAT)
        update = tl.where(live & finite, tl.abs(u - before), 0.0)
    residual = tl.where(update > 0.0, update / tl.abs(sigma), 0.0)
    to = statistics + row.to(tl.int64) * STATISTICS
    tl.store(to, _largest(update, live), mask=exists)
    tl.store(to + 1, tl.max(size, 1), mask=exists)
    tl.store(to + 2, _largest(residual, live), mask=exists)
    tl.store(to + 3, tl.sum(update * update, 1), mask=exists)
    tl.store(to + 4, tl.sum(size * size, 1), mask=exists)
    tl.store(to + 5, tl.sum(tl.where(live, log_scale, 0.0), 1), mask=exists)
    tl.store(to + 6, _largest(log_scale, live), mask=exists)
    tl.store(to + 7, tl.sum(tl.where(live & ~finite, 1.0, 0.0), 1), mask=exists)
    tl.store(to + 8, tl.sum(tl.where(live & ~(sigma > 0.0), 1.0, 0.0), 1), mask=exists)


_fwd, _bwd, _inv = (
    Launcher(kernel) for kernel in (flow_affine_fwd_kernel, flow_affine_bwd_kernel, flow_affine_inv_kernel)
)


def _launch(launcher, inputs, others, params, soft_clip, softplus, weights=(), guided=()):
    """inputs: tensors (B, n, ...) or None, the first of D features; others: what else the kernel reads, and writes;
    weights: strides of the guidance; guided: constants of it."""
    x = inputs[0]
    batch, tokens, features = x.shape
    strides = [(0, 0) if t is None else t.stride()[:2] for t in inputs]
    flat = all(t is None or batch == 1 or s[0] == tokens * s[1] for t, s in zip(inputs, strides))
    runtime = (*(s[0] for s in strides), *weights)
    constants = (*(s[1] for s in strides), flat, features, params.shape[2] == 2 * features, softplus, soft_clip > 0)
    tensors = (*inputs, *others)
    key = (runtime, alignments(*tensors))
    columns = triton.next_power_of_2(features)
    block = max(ELEMENTS // columns, 1)
    programs = triton.cdiv(batch * tokens, block)
    if programs:
        arguments = (*tensors, batch * tokens, tokens, soft_clip, *runtime)
        launcher(programs, key, arguments, (*constants, *guided), (block, columns, 4, 1))


def flow_affine_fwd(x, params, softplus, soft_clip):
    z, logdet = x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    _launch(_fwd, (x, params), (z, logdet), params, soft_clip, softplus)
    return z, logdet


def flow_affine_bwd(dz, dlogdet, z, params, softplus, soft_clip):
    """dlogdet contiguous."""
    dx, dparams = z.new_empty(z.shape), params.new_empty(params.shape)
    _launch(_bwd, (dz, z, params), (dlogdet, dx, dparams), params, soft_clip, softplus)
    return dx, dparams


def flow_affine_inv(z, params, params_uncond, guidance, previous, rule, guide_scale, guide_mean, softplus, soft_clip):
    x, statistics = z.new_empty(z.shape), z.new_empty((*z.shape[:2], STATISTICS.value), dtype=torch.float32)
    inputs, weights = (z, params, params_uncond, previous), (0, 0) if guidance is None else guidance.stride()
    guided = (rule, guide_scale, guide_mean)
    _launch(_inv, inputs, (guidance, x, statistics), params, soft_clip, softplus, weights, guided)
    return x, statistics
