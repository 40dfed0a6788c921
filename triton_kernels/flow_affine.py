"""The affine map of a causal flow, both ways, with what an iterative inverse measures on the way; and its pieces, which
the last kernel of a decode step uses too.

Program: BT tokens of D features, as a tile. Inputs keep their strides; every one is read once.
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
def _read(x, batch, token, strides, cols, live):
    """Rows of x (B, n, ...) in float32; live (BT, D)."""
    rows = batch * strides[0] + token.to(tl.int64) * strides[1]
    return tl.load(x + rows[:, None] + cols[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def _place(total, tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """(number among all, batch row, token) of the tokens of a program, its features, which elements exist."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    return row, (row // tokens).to(tl.int64), row % tokens, cols, (row < total)[:, None] & (cols < D)[None, :]


@triton.jit
def _split(
    params, batch, token, strides, cols, live, soft_clip,
    D: tl.constexpr, SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr,
):  # fmt: skip
    """(log sigma, mu); without scales sigma is 1."""
    if SCALES:
        alpha = clipped(_read(params, batch, token, strides, cols, live), soft_clip, CLIPS)
        log_scale = log_scale_of(alpha, SOFTPLUS)
        mu = clipped(_read(params, batch, token, strides, cols + D, live), soft_clip, CLIPS)
    else:
        mu = clipped(_read(params, batch, token, strides, cols, live), soft_clip, CLIPS)
        log_scale = mu * 0.0
    return tl.where(live, log_scale, 0.0), mu


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_fwd_kernel(
    x, params, z, logdet, total, tokens, soft_clip, x_strides, p_strides,
    D: tl.constexpr, SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, batch, token, cols, live = _place(total, tokens, D, BT, BD)
    log_scale, mu = _split(params, batch, token, p_strides, cols, live, soft_clip, D, SCALES, SOFTPLUS, CLIPS)
    y = (_read(x, batch, token, x_strides, cols, live) - mu) * tl.exp(-log_scale)
    to = row.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(z + to, y.to(z.dtype.element_ty), mask=live)
    tl.store(logdet + row, -tl.sum(log_scale, 1), mask=row < total)


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_bwd_kernel(
    dz, dlogdet, z, params, dx, dparams, total, tokens, soft_clip, g_strides, l_strides, z_strides, p_strides,
    D: tl.constexpr, SCALES: tl.constexpr, SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With s = log sigma: dx = dz / sigma, dmu = -dx, ds = -z dz - dlogdet; then back through softplus and clip."""
    row, batch, token, cols, live = _place(total, tokens, D, BT, BD)
    log_scale, mu = _split(params, batch, token, p_strides, cols, live, soft_clip, D, SCALES, SOFTPLUS, CLIPS)
    g = _read(dz, batch, token, g_strides, cols, live)
    down = g * tl.exp(-log_scale)
    exists, row = row < total, row.to(tl.int64)[:, None]
    tl.store(dx + row * D + cols[None, :], down.to(dx.dtype.element_ty), mask=live)
    dmu = -down
    if CLIPS:
        dmu *= 1.0 - (mu / soft_clip) * (mu / soft_clip)
    if SCALES:
        ds = -g * _read(z, batch, token, z_strides, cols, live)
        if dlogdet is not None:
            places = batch * l_strides[0] + token * l_strides[1]
            ds -= tl.load(dlogdet + places, mask=exists, other=0.0)[:, None]
        alpha = clipped(_read(params, batch, token, p_strides, cols, live), soft_clip, CLIPS)
        if SOFTPLUS:
            ds *= 1.0 / ((1.0 + tl.exp(-(alpha + SHIFT))) * tl.exp(log_scale))
        if CLIPS:
            ds *= 1.0 - (alpha / soft_clip) * (alpha / soft_clip)
        tl.store(dparams + row * (2 * D) + cols[None, :], ds.to(dparams.dtype.element_ty), mask=live)
        tl.store(dparams + row * (2 * D) + D + cols[None, :], dmu.to(dparams.dtype.element_ty), mask=live)
    else:
        tl.store(dparams + row * D + cols[None, :], dmu.to(dparams.dtype.element_ty), mask=live)


@triton.jit
def _largest(x, live):
    """Of each row, NaN where there is one."""
    wrong = tl.max(tl.where(live & (x != x), 1, 0), 1) > 0
    return tl.where(wrong, float("nan"), tl.max(tl.where(live, x, float("-inf")), 1))


@triton.jit(do_not_specialize=("total", "tokens", "soft_clip"))
def flow_affine_inv_kernel(
    z, params, other, guidance, previous, x, statistics, total, tokens, soft_clip,
    z_strides, p_strides, o_strides, w_strides, u_strides,
    D: tl.constexpr, SCALES: tl.constexpr, RULE: tl.constexpr, GUIDE_SCALE: tl.constexpr, GUIDE_MEAN: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLIPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, batch, token, cols, live = _place(total, tokens, D, BT, BD)
    exists = row < total
    log_scale, mu = _split(params, batch, token, p_strides, cols, live, soft_clip, D, SCALES, SOFTPLUS, CLIPS)
    if other is not None:
        log_u, mu_u = _split(other, batch, token, o_strides, cols, live, soft_clip, D, SCALES, SOFTPLUS, CLIPS)
        w = tl.load(guidance + batch * w_strides[0] + token * w_strides[1], mask=exists, other=0.0).to(tl.float32)
        sigma, log_scale, mu = guide(
            log_scale, mu, log_u, mu_u, w[:, None], RULE, GUIDE_SCALE, GUIDE_MEAN
        )  # fmt: skip
    else:
        sigma = tl.exp(log_scale)
    u = _read(z, batch, token, z_strides, cols, live) * sigma + mu
    to = row.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(x + to, u.to(x.dtype.element_ty), mask=live)
    finite = tl.abs(u) < float("inf")
    size = tl.where(live & finite, tl.abs(u), 0.0)
    update = tl.zeros([BT, BD], tl.float32)
    if previous is not None:
        update = tl.where(live & finite, tl.abs(u - _read(previous, batch, token, u_strides, cols, live)), 0.0)
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


def _launch(launcher, x, tensors, soft_clip, inputs, scales, constants):
    """inputs: those whose strides the kernel takes, in its order."""
    batch, tokens, features = x.shape
    columns = triton.next_power_of_2(features)
    block = max(ELEMENTS // columns, 1)
    strides = tuple((0, 0) if t is None else tuple(t.stride()[:2]) for t in inputs)
    key = (strides, alignments(*tensors), tuple(None if t is None else t.dtype for t in tensors))
    arguments = (*tensors, batch * tokens, tokens, soft_clip, *strides)
    programs = triton.cdiv(batch * tokens, block)
    if programs:
        launcher(programs, key, arguments, (features, scales, *constants), (block, columns, 4, 1))


def _scales(x, params):
    return params.shape[2] == 2 * x.shape[2]


def flow_affine_fwd(x, params, softplus, soft_clip):
    z, logdet = x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    constants = (softplus, soft_clip > 0)
    _launch(_fwd, x, (x, params, z, logdet), soft_clip, (x, params), _scales(x, params), constants)
    return z, logdet


def flow_affine_bwd(dz, dlogdet, z, params, softplus, soft_clip):
    dx, dparams = z.new_empty(z.shape), params.new_empty(params.shape)
    tensors, constants = (dz, dlogdet, z, params, dx, dparams), (softplus, soft_clip > 0)
    _launch(_bwd, z, tensors, soft_clip, (dz, dlogdet, z, params), _scales(z, params), constants)
    return dx, dparams


def flow_affine_inv(z, params, params_uncond, guidance, previous, rule, guide_scale, guide_mean, softplus, soft_clip):
    x, statistics = z.new_empty(z.shape), z.new_empty((*z.shape[:2], STATISTICS.value), dtype=torch.float32)
    inputs = (z, params, params_uncond, guidance, previous)
    constants = (rule, guide_scale, guide_mean, softplus, soft_clip > 0)
    _launch(_inv, z, (*inputs, x, statistics), soft_clip, inputs, _scales(z, params), constants)
    return x, statistics
