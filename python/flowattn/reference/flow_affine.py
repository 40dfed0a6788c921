"""The affine map of a causal flow in plain torch, float32 or float64: the oracle and the fallback."""

import torch
import torch.nn.functional as F

SCALES = ("exp", "softplus")
RULES = ("log_linear", "sigma_linear", "gaussian_ratio")
SOFTPLUS_SHIFT = 0.5413248546129181  # log(e - 1): softplus gives 1 at 0

# Columns of the statistics of a token, each over its features; entries that are not finite are left out of 0 to 4.
UPDATE, SIZE, RESIDUAL, UPDATE_SQUARES, SQUARES, LOG_SCALE, MAX_LOG_SCALE, NOT_FINITE, NOT_POSITIVE = range(9)
STATISTICS = 9


def split(params, features, scale, soft_clip):
    """(log sigma, mu) of raw network outputs (..., 2D), or (..., D) for a flow that preserves volume."""
    if soft_clip > 0:
        params = soft_clip * torch.tanh(params / soft_clip)
    if params.shape[-1] == features:
        return torch.zeros_like(params), params
    alpha, mu = params[..., :features], params[..., features:]
    return alpha if scale == "exp" else torch.log(F.softplus(alpha + SOFTPLUS_SHIFT)), mu


def guide(log_c, mu_c, log_u, mu_u, weight, rule, what):
    """(sigma, log sigma, mu) of two streams combined. weight (B, n, 1); what holds "a" for scales, "b" for means."""
    w_scale, w_mean = (weight if half in what else torch.zeros_like(weight) for half in "ab")
    if rule == "gaussian_ratio":
        # p_c^(1+w) / p_u^w with precisions 1/sigma^2; the ratio is capped so that it stays a density.
        s = torch.exp(2 * torch.clamp(log_c - log_u, max=0.0))
        den_scale, den_mean = (1 + w * (1 - s) for w in (w_scale, w_mean))
        log_scale = log_c - 0.5 * torch.log(den_scale)
        return torch.exp(log_scale), log_scale, ((1 + w_mean) * mu_c - w_mean * s * mu_u) / den_mean
    mu = mu_c + w_mean * (mu_c - mu_u)
    if rule == "log_linear":
        log_scale = log_c + w_scale * (log_c - log_u)
        return torch.exp(log_scale), log_scale, mu
    sigma = torch.exp(log_c) + w_scale * (torch.exp(log_c) - torch.exp(log_u))
    return sigma, torch.log(sigma), mu


def combined(params, params_uncond, guidance, features, rule, what, scale, soft_clip, work):
    """(sigma, log sigma, mu) of raw outputs, guided where a second stream is given."""
    log_scale, mu = split(params.to(work), features, scale, soft_clip)
    if params_uncond is None:
        return torch.exp(log_scale), log_scale, mu
    log_u, mu_u = split(params_uncond.to(work), features, scale, soft_clip)
    return guide(log_scale, mu, log_u, mu_u, guidance.to(work).unsqueeze(-1), rule, what)


def flow_affine_forward(x, params, scale, soft_clip):
    """(z (B, n, D), log-determinant of each token (B, n)) with z = (x - mu) / sigma."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    log_scale, mu = split(params.to(work), x.shape[-1], scale, soft_clip)
    z = (x.to(work) - mu) * torch.exp(-log_scale)
    return z.to(x.dtype), -log_scale.sum(-1)


def flow_affine_inverse(z, params, params_uncond, guidance, previous, rule, what, scale, soft_clip):
    """(u (B, n, D), statistics (B, n, 9)) with u = z sigma + mu, compared with the iterate `previous`."""
    work = torch.float64 if z.dtype == torch.float64 else torch.float32
    options = (z.shape[-1], rule, what, scale, soft_clip, work)
    sigma, log_scale, mu = combined(params, params_uncond, guidance, *options)
    u = z.to(work) * sigma + mu
    return u.to(z.dtype), statistics(u.detach(), sigma.detach(), log_scale, previous)


def statistics(u, sigma, log_scale, previous):
    """The nine columns above; `previous` None counts as no update."""
    finite = torch.isfinite(u)
    update = torch.zeros_like(u) if previous is None else (u - previous.to(u.dtype)).abs()
    update, size = (torch.where(finite, x, 0.0) for x in (update, u.abs()))
    residual = torch.where(update > 0, update / sigma.abs(), 0.0)

    def largest(x):
        return x.amax(-1) if x.shape[-1] else x.sum(-1)

    columns = [largest(update), largest(size), largest(residual), update.square().sum(-1), size.square().sum(-1)]
    columns += [log_scale.sum(-1), largest(log_scale.detach()), (~finite).sum(-1), (~(sigma > 0)).sum(-1)]
    return torch.stack([column.to(u.dtype) for column in columns], -1)
