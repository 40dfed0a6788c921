"""The affine map between data and noise of a causal flow, with guidance and the measurements an inverse stops by."""

from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference import flow_affine as reference

_FORWARD, _INVERSE = "flow_affine_forward", "flow_affine_inverse"
_fwd, _bwd, _inv = op("flow_affine_fwd"), op("flow_affine_bwd"), op("flow_affine_inv")
_fwd_triton, _bwd_triton, _inv_triton = (op(f"flow_affine_{part}_triton") for part in ("fwd", "bwd", "inv"))
_WIDEST = 8192  # features of a token in the tile of a Triton program
REDUCTIONS = ("sum", "mean", "none")


class AffineInfo(NamedTuple):
    """Measurements of one flow_affine_inverse, each (B,), over the tokens and features of a sample.

    Entries of x that are not finite count in `not_finite` and in nothing else.
    """

    update: torch.Tensor  # largest |x - previous|
    size: torch.Tensor  # largest |x|
    residual: torch.Tensor  # largest |x - previous| / sigma = |z - F(previous)|, with params evaluated at previous
    update_squares: torch.Tensor  # sum of (x - previous)^2
    squares: torch.Tensor  # sum of x^2
    max_log_scale: torch.Tensor
    not_finite: torch.Tensor  # entries
    not_positive: torch.Tensor  # scales sigma <= 0 or NaN, which guidance_rule="sigma_linear" can give
    first_bad: torch.Tensor  # int64, first token with an entry that is not finite, -1 if there is none


def flow_affine_forward(x, params, *, scale="exp", soft_clip=0.0, logdet_reduction="sum"):
    """Map data to noise, z = (x - mu) / sigma, and return the log-determinant of the map with it: (z, logdet).

    Shapes: x (B, T, D); params (B, T, 2D), the network's raw outputs, first the D of the scale (alpha), then mu; or
        (B, T, D), mu alone, with sigma = 1. Returns z in the shape of x, and logdet.
    Dtypes: x float16, bfloat16, float32 or float64, z the same; params any of them. Computed in float32 (float64 for
        float64 x), logdet in that type.
    Layout: last dim contiguous, any other strides.
    scale: "exp": sigma = exp(alpha); "softplus": sigma = softplus(alpha + 0.5413), which is 1 at alpha = 0.
    soft_clip: c > 0 replaces every raw output o, mu's too, by c tanh(o / c).
    logdet_reduction: log|det dz/dx| = -sum of log sigma: "sum" over T and D, (B,); "mean" over both, (B,); "none": the
        sum over D of each token, (B, T). A mean over no element is 0.
    Gradients: x and params. Deterministic. Host sync: none.
    Cost: reads x and params once, writes z; backward reads both again.
    Source: Zhai et al., Normalizing Flows are Capable Generative Models (2024), equations 5 and 6.

    >>> z, logdet = flow_affine_forward(torch.ones(1, 1, 2), torch.zeros(1, 1, 4))
    >>> z, logdet
    (tensor([[[1., 1.]]]), tensor([0.]))
    """
    call = _prepare_forward(x, params, scale=scale, soft_clip=soft_clip, logdet_reduction=logdet_reduction)
    backend = _FORWARD_TABLE.choose(*call)
    if backend.bwd is not None and checks.needs_grad(x, params):
        z, tokens = _AffineForward.apply(backend, *call)
    else:
        z, tokens = backend.fwd(*call)
    return z, reduce_logdet(tokens, x.shape[-1], logdet_reduction)


def reduce_logdet(tokens, features, reduction):
    """Log-determinants of tokens (B, T), reduced as asked."""
    if reduction == "none":
        return tokens
    total = tokens.sum(1)
    return total / max(tokens.shape[1] * features, 1) if reduction == "mean" else total


def flow_affine_inverse(
    z,
    params,
    *,
    params_uncond=None,
    guidance=0.0,
    guidance_rule="log_linear",
    guidance_what="ab",
    scale="exp",
    soft_clip=0.0,
    previous=None,
    return_logdet=False,
    return_info=False,
):
    """Map noise to data, x = z sigma + mu, with guidance and with the measurements that an iterative inverse needs.

    Shapes: z (B, T, D); params (B, T, 2D) or (B, T, D) as in flow_affine_forward; params_uncond the same, from the
        unconditional stream, or None; previous (B, T, D), the iterate that x replaces, or None. Returns x like z.
    Dtypes, layout, scale, soft_clip: as flow_affine_forward.
    guidance: w, a number or a tensor (B,) or (B, T): how far to go beyond the conditional stream. It needs
        params_uncond. With sigma_c, mu_c and sigma_u, mu_u the two streams:
        "log_linear": log sigma and mu are extrapolated, c + w (c - u);
        "sigma_linear": sigma and mu are; sigma may then fall to 0 or below, which the info counts;
        "gaussian_ratio": the Gaussian proportional to p_c^(1+w) / p_u^w, with sigma_c / sigma_u capped at 1.
    guidance_what: "ab" guides scale and mean, "a" the scale alone, "b" the mean alone.
    return_logdet: also log|det dx/dz| (B,), the sum of log sigma; under guidance that of the guided map.
    return_info: also an AffineInfo.
    Gradients: z, params, params_uncond and guidance, by the plain torch form. Host sync: none.
    Cost: reads its inputs once, writes x and 9 numbers a token.
    Source: Zhai et al. 2024, equation 7 and section 3.4; Gu et al., STARFlow (2025), for the Gaussian ratio.

    >>> flow_affine_inverse(torch.ones(1, 1, 1), torch.tensor([[[0.0, 2.0]]]))
    tensor([[[3.]]])
    """
    call = _prepare_inverse(
        z, params, params_uncond=params_uncond, guidance=guidance, guidance_rule=guidance_rule,
        guidance_what=guidance_what, scale=scale, soft_clip=soft_clip, previous=previous,
    )  # fmt: skip
    x, tokens = affine_inverse(*call)
    extras = (tokens[..., reference.LOG_SCALE].sum(1),) if return_logdet else ()
    extras += (_info(tokens),) if return_info else ()
    return (x, *extras) if extras else x


def affine_inverse(*call):
    """Checked arguments -> (x, statistics of the tokens (B, T, 9)): what the solvers call."""
    return _INVERSE_TABLE.choose(*call).fwd(*call)


def _info(tokens):
    tokens = tokens.detach()

    def largest(column):
        return tokens[..., column].amax(1) if tokens.shape[1] else tokens.new_zeros(tokens.shape[0])

    def total(column):
        return tokens[..., column].sum(1)

    bad = tokens[..., reference.NOT_FINITE] > 0
    first = torch.where(bad.any(1), bad.int().argmax(1), -1) if tokens.shape[1] else bad.sum(1) - 1
    return AffineInfo(
        largest(reference.UPDATE),
        largest(reference.SIZE),
        largest(reference.RESIDUAL),
        total(reference.UPDATE_SQUARES),
        total(reference.SQUARES),
        largest(reference.MAX_LOG_SCALE),
        total(reference.NOT_FINITE),
        total(reference.NOT_POSITIVE),
        first,
    )


class _AffineForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, params, scale, soft_clip):
        z, tokens = backend.fwd(x, params, scale, soft_clip)
        ctx.save_for_backward(z, params)
        ctx.bwd, ctx.options = backend.bwd, (scale, soft_clip)
        ctx.set_materialize_grads(False)
        return z, tokens

    @staticmethod
    def backward(ctx, dz, dtokens):
        z, params = ctx.saved_tensors
        dz = z.new_zeros(z.shape) if dz is None else dz.contiguous()
        dtokens = None if dtokens is None else dtokens.contiguous()
        dx, dparams = ctx.bwd(dz, dtokens, z, params, *ctx.options)
        return None, dx, dparams, None, None


def check_options(name, scale, soft_clip):
    checks.require(scale in reference.SCALES, name, 'scale must be "exp" or "softplus"', repr(scale))
    checks.require(soft_clip >= 0, name, "soft_clip must be >= 0", soft_clip)


def check_guidance(name, rule, what):
    checks.require(rule in reference.RULES, name, f"guidance_rule must be one of {reference.RULES}", repr(rule))
    checks.require(what in ("a", "b", "ab"), name, 'guidance_what must be "a", "b" or "ab"', repr(what))


def _check_tokens(name, x_name, x, params):
    for argument, tensor in ((x_name, x), ("params", params)):
        kind = type(tensor).__name__
        checks.require(isinstance(tensor, torch.Tensor), name, f"{argument} must be a tensor", kind, error=TypeError)
        checks.float_dtype(name, argument, tensor)
    checks.require(x.dim() == 3, name, f"{x_name} must have shape (B, T, D)", tuple(x.shape))
    _check_like(name, "params", params, x, (x.shape[-1], 2 * x.shape[-1]))
    checks.last_dim_contiguous(name, (x_name, "params"), (x, params))


def _check_like(name, argument, tensor, x, widths):
    fits = tensor.shape[:-1] == x.shape[:-1] and tensor.shape[-1] in widths
    rule = (
        f"{argument} must have the batch and tokens of {tuple(x.shape)} and a width of {' or '.join(map(str, widths))}"
    )
    checks.require(fits, name, rule, tuple(tensor.shape))
    checks.require(tensor.device == x.device, name, f"{argument} must be on the device {x.device}", tensor.device)


def _prepare_forward(x, params, *, scale="exp", soft_clip=0.0, logdet_reduction="sum"):
    _check_tokens(_FORWARD, "x", x, params)
    check_options(_FORWARD, scale, soft_clip)
    rule = f"logdet_reduction must be one of {REDUCTIONS}"
    checks.require(logdet_reduction in REDUCTIONS, _FORWARD, rule, repr(logdet_reduction))
    return x, params, scale, float(soft_clip)


def _prepare_inverse(
    z, params, *, params_uncond=None, guidance=0.0, guidance_rule="log_linear", guidance_what="ab", scale="exp",
    soft_clip=0.0, previous=None, return_logdet=False, return_info=False,
):  # fmt: skip
    _check_tokens(_INVERSE, "z", z, params)
    check_options(_INVERSE, scale, soft_clip)
    check_guidance(_INVERSE, guidance_rule, guidance_what)
    if previous is not None:
        _check_like(_INVERSE, "previous", previous, z, (z.shape[-1],))
        checks.last_dim_contiguous(_INVERSE, ("previous",), (previous,))
    weights = None
    if params_uncond is not None:
        _check_like(_INVERSE, "params_uncond", params_uncond, z, (params.shape[-1],))
        checks.last_dim_contiguous(_INVERSE, ("params_uncond",), (params_uncond,))
        weights = guidance_of(_INVERSE, guidance, z)
    else:
        given = isinstance(guidance, torch.Tensor) or guidance != 0
        checks.require(not given, _INVERSE, "guidance needs params_uncond", guidance)
    return z, params, params_uncond, weights, previous, guidance_rule, guidance_what, scale, float(soft_clip)


def guidance_of(name, guidance, z):
    """A weight for every token, (B, T) in the working type of z, from a number or a tensor (B,) or (B, T)."""
    work = checks.state_dtype(z)
    if not isinstance(guidance, torch.Tensor):
        return torch.full((1, 1), float(guidance), dtype=work, device=z.device).expand(z.shape[:2])
    rule = f"guidance must be a number or have shape {(z.shape[0],)} or {tuple(z.shape[:2])}"
    checks.require(guidance.shape in ((), z.shape[:1], z.shape[:2]), name, rule, tuple(guidance.shape))
    checks.require(guidance.device == z.device, name, f"guidance must be on the device {z.device}", guidance.device)
    guidance = guidance.to(work)
    return (guidance.unsqueeze(-1) if guidance.dim() == 1 else guidance).expand(z.shape[:2])


def _wide(*tensors):
    """The working type for all: the CPU kernels take float32 and float64, so half types are widened first."""
    work = checks.state_dtype(tensors[0])
    return [None if t is None else _as(t, work) for t in tensors]


def _as(tensor, dtype):
    """Without a no-op: torch.compile of torch 2.11 lost the gradient of an output that had passed through one."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _native_forward(x, params, scale, soft_clip):
    z, tokens = _fwd(*_wide(x, params), scale == "softplus", soft_clip)
    return _as(z, x.dtype), tokens


def _native_backward(dz, dtokens, z, params, scale, soft_clip):
    wide_z, wide_dz, wide_dtokens, wide_params = _wide(z, dz, dtokens, params)
    dx, dparams = _bwd(wide_dz, wide_dtokens, wide_z, wide_params, scale == "softplus", soft_clip)
    return _as(dx, z.dtype), _as(dparams, params.dtype)


def _native_inverse(z, params, params_uncond, guidance, previous, rule, what, scale, soft_clip):
    wide = _wide(z, params, params_uncond, guidance, previous)
    x, tokens = _inv(*wide, reference.RULES.index(rule), "a" in what, "b" in what, scale == "softplus", soft_clip)
    return x.to(z.dtype), tokens


def _triton_forward(x, params, scale, soft_clip):
    return _fwd_triton(x, params, scale == "softplus", soft_clip)


def _triton_backward(dz, dtokens, z, params, scale, soft_clip):
    return _bwd_triton(dz, dtokens, z, params, scale == "softplus", soft_clip)


def _triton_inverse(z, params, params_uncond, guidance, previous, rule, what, scale, soft_clip):
    inputs = (z, params, params_uncond, guidance, previous)
    return _inv_triton(*inputs, reference.RULES.index(rule), "a" in what, "b" in what, scale == "softplus", soft_clip)


def _refuse_triton(x, *rest):
    if torch.float64 in (x.dtype, rest[0].dtype):
        return "no float64"
    if not 0 < x.shape[-1] <= _WIDEST:
        return f"needs 1 to {_WIDEST} features; got {x.shape[-1]}"
    return dispatch.refuse_triton(x)


def _refuse_cpu(x, *rest):
    return _native.refuse_cpu(x)


def _refuse_inverse(refuse):
    def reason(z, params, params_uncond, guidance, *rest):
        if checks.needs_grad(z, params, params_uncond, guidance):
            return "no backward; the gradient goes through the plain torch form"
        return refuse(z, params)

    return reason


def _probe(device):
    x = torch.zeros(1, 1, 2, device=device)
    return x, torch.cat([x, x], -1)


_FORWARD_TABLE = dispatch.Table(
    _FORWARD,
    _prepare_forward,
    dispatch.Backend("cpu", _refuse_cpu, _native_forward, _native_backward),
    dispatch.Backend("triton", _refuse_triton, _triton_forward, _triton_backward),
    dispatch.Backend("reference", dispatch.never, reference.flow_affine_forward),
    probe=_probe,
)
_INVERSE_TABLE = dispatch.Table(
    _INVERSE,
    _prepare_inverse,
    dispatch.Backend("cpu", _refuse_inverse(_refuse_cpu), _native_inverse),
    dispatch.Backend("triton", _refuse_inverse(_refuse_triton), _triton_inverse),
    dispatch.Backend("reference", dispatch.never, reference.flow_affine_inverse),
    probe=_probe,
)


@fake("flow_affine_fwd")
def _fwd_fake(x, params, softplus, soft_clip):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=checks.state_dtype(x))


@fake("flow_affine_bwd")
def _bwd_fake(dz, dtokens, z, params, softplus, soft_clip):
    return z.new_empty(z.shape), params.new_empty(params.shape)


@fake("flow_affine_inv")
def _inv_fake(z, params, params_uncond, guidance, previous, rule, guide_scale, guide_mean, softplus, soft_clip):
    return z.new_empty(z.shape), z.new_empty((*z.shape[:2], reference.STATISTICS), dtype=checks.state_dtype(z))
