"""flow_affine_forward and flow_affine_inverse against the formulas written out, over all backends."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import flowattn as fa
from flowattn.ops import flow_affine

backends = pytest.mark.parametrize("backend", ["reference", "triton", "cpu"], indirect=True)
wide_backends = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # float64
scales = pytest.mark.parametrize("scale", ["exp", "softplus"])
clips = pytest.mark.parametrize("soft_clip", [0.0, 4.0], ids="clip{:g}".format)
widths = pytest.mark.parametrize("features", [1, 3, 12, 48, 65], ids="D{}".format)
RULES = ("log_linear", "sigma_linear", "gaussian_ratio")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}  # relative to the largest result; sums of D terms


def sigma_mu(params, features, scale, soft_clip):
    o = params.double()
    if soft_clip:
        o = soft_clip * torch.tanh(o / soft_clip)
    if o.shape[-1] == features:
        return torch.ones_like(o), o
    a, mu = o.chunk(2, -1)
    return a.exp() if scale == "exp" else F.softplus(a + math.log(math.e - 1)), mu


def inputs(features, place, dtype=torch.float32, batch=2, tokens=7, spread=1.0):
    x, *params = torch.randn(3, batch, tokens, features, device=place, dtype=dtype)
    return x, spread * torch.cat(params, -1)


def close(got, expected, dtype=torch.float32):
    limit = TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0)
    assert (got.double() - expected).abs().max().item() <= limit


@backends
@scales
@clips
@widths
def test_forward_and_inverse(features, soft_clip, scale, place, backend):
    for dtype in (torch.float32, torch.float64)[: 1 if backend == "triton" else 2]:
        x, params = inputs(features, place, dtype)
        options = {"scale": scale, "soft_clip": soft_clip}
        sigma, mu = sigma_mu(params, features, scale, soft_clip)
        z, logdet = fa.flow_affine_forward(x, params, **options)
        close(z, (x.double() - mu) / sigma, dtype)
        close(logdet, -sigma.log().sum((1, 2)), dtype)
        each = fa.flow_affine_forward(x, params, **options, logdet_reduction="none")[1]
        close(each, -sigma.log().sum(2), dtype)
        mean = fa.flow_affine_forward(x, params, **options, logdet_reduction="mean")[1]
        close(mean, -sigma.log().mean((1, 2)), dtype)
        back, inverse_logdet = fa.flow_affine_inverse(z, params, **options, return_logdet=True)
        close(back, x.double(), dtype)
        close(inverse_logdet, -logdet.double(), dtype)


@backends
def test_volume_preserving(place):
    x, params = inputs(5, place)
    z, logdet = fa.flow_affine_forward(x, params[..., :5])
    torch.testing.assert_close(z, x - params[..., :5])
    assert torch.equal(logdet, torch.zeros_like(logdet))
    torch.testing.assert_close(fa.flow_affine_inverse(z, params[..., :5]), x)


def guided(c, u, w, rule, what):
    (sc, mc), (su, mu) = c, u
    ws, wm = (w if half in what else torch.zeros_like(w) for half in "ab")
    if rule == "log_linear":
        return sc * (sc / su) ** ws, mc + wm * (mc - mu)
    if rule == "sigma_linear":
        return sc + ws * (sc - su), mc + wm * (mc - mu)
    s = (sc / su).clamp(max=1) ** 2
    return sc / (1 + ws - ws * s).sqrt(), ((1 + wm) * mc - wm * s * mu) / (1 + wm - wm * s)


@backends
@scales
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("what", ["a", "b", "ab"])
def test_guidance(rule, what, scale, place):
    z, params = inputs(12, place)
    other = params + 0.3 * torch.randn_like(params)
    for weight in (1.5, torch.tensor([0.0, 2.0], device=place), torch.rand(2, 7, device=place)):
        w = torch.as_tensor(weight, dtype=torch.float64, device=place)
        w = w.reshape(-1, 1).expand(2, 7) if w.dim() < 2 else w
        parts = (sigma_mu(p, 12, scale, 4.0) for p in (params, other))
        sigma, mu = guided(*parts, w.unsqueeze(-1), rule, what)
        x, logdet, info = fa.flow_affine_inverse(
            z, params, params_uncond=other, guidance=weight, guidance_rule=rule, guidance_what=what, scale=scale,
            soft_clip=4.0, return_logdet=True, return_info=True,
        )  # fmt: skip
        close(x, z.double() * sigma + mu)
        assert torch.equal(info.not_positive, (~(sigma > 0)).sum((1, 2)).to(info.not_positive))
        good = (sigma > 0).all(2).all(1)
        if good.any():  # "sigma_linear" may leave none
            close(logdet[good], sigma[good].log().sum((1, 2)))


@backends
def test_samples_with_weight_zero_are_unguided(place):
    z, params = inputs(4, place)
    plain = fa.flow_affine_inverse(z, params)
    for rule in RULES:
        weight = torch.tensor([0.0, 1.0], device=place)
        x = fa.flow_affine_inverse(z, params, params_uncond=params + 0.1, guidance=weight, guidance_rule=rule)
        torch.testing.assert_close(x[0], plain[0], rtol=1e-6, atol=1e-6)
        assert (x[1] - plain[1]).abs().max() > 1e-3


@wide_backends
def test_gaussian_ratio_is_the_ratio_of_densities(place):
    """One feature: log p_c^(1+w) / p_u^w differs from log N(mu, sigma) by a constant."""
    params = torch.tensor([[[-0.7, 0.4]]], dtype=torch.float64, device=place)
    other = torch.tensor([[[0.2, -0.3]]], dtype=torch.float64, device=place)
    options = {"params_uncond": other, "guidance": 1.7, "guidance_rule": "gaussian_ratio"}
    points = torch.tensor([0.0, 1.0], dtype=torch.float64, device=place)
    mu, above = (fa.flow_affine_inverse(p.view(1, 1, 1), params, **options) for p in points)

    def log_normal(x, mean, sigma):
        return -0.5 * ((x - mean) / sigma) ** 2

    grid = torch.linspace(-2, 2, 9, dtype=torch.float64, device=place)
    c, u = ((math.exp(p[0, 0, 0]), p[0, 0, 1].item()) for p in (params, other))
    target = 2.7 * log_normal(grid, c[1], c[0]) - 1.7 * log_normal(grid, u[1], u[0])
    difference = log_normal(grid, mu.item(), (above - mu).item()) - target
    torch.testing.assert_close(difference, difference[:1].expand(9), rtol=0, atol=1e-12)


@backends
def test_samples_do_not_mix(place):
    """Each sample of a batch equals that sample alone, under every rule."""
    z, params = inputs(3, place)
    other = params + torch.randn_like(params)
    for rule in RULES:
        whole = fa.flow_affine_inverse(z, params, params_uncond=other, guidance=1.0, guidance_rule=rule)
        for b in range(2):
            alone = fa.flow_affine_inverse(
                z[b : b + 1], params[b : b + 1], params_uncond=other[b : b + 1], guidance=1.0, guidance_rule=rule
            )
            assert torch.equal(alone[0], whole[b])


@backends
def test_info(place):
    z, params = inputs(5, place)
    previous = torch.randn_like(z)
    x, info = fa.flow_affine_inverse(z, params, previous=previous, return_info=True)
    update, sigma = (x - previous).abs(), params[..., :5].exp()
    torch.testing.assert_close(info.update, update.amax((1, 2)))
    torch.testing.assert_close(info.size, x.abs().amax((1, 2)))
    torch.testing.assert_close(info.residual, (update / sigma).amax((1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(info.update_squares, update.square().sum((1, 2)))
    torch.testing.assert_close(info.squares, x.square().sum((1, 2)))
    torch.testing.assert_close(info.max_log_scale, params[..., :5].amax((1, 2)))
    assert info.not_finite.tolist() == info.not_positive.tolist() == [0, 0] and info.first_bad.tolist() == [-1, -1]


@backends
def test_overflow_is_counted_and_left_out(place):
    z, params = inputs(5, place)
    params[1, 3, 2] = 90.0  # exp(90) is infinite in float32
    params[1, 5, 1] = float("nan")
    z[1, 3, 2] = 1.0
    x, info = fa.flow_affine_inverse(z, params, previous=torch.zeros_like(z), return_info=True)
    assert info.not_finite.tolist() == [0, 2] and info.first_bad.tolist() == [-1, 3]
    assert math.isinf(x[1, 3, 2]) and math.isnan(x[1, 5, 1])
    assert info.update.isfinite().all() and info.residual.isfinite().all() and info.squares.isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(dtype, place, backend):
    if backend == "triton" and dtype == torch.bfloat16 and place == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16")
    x, params = inputs(6, place)
    x, params = x.to(dtype), params.to(dtype)
    z, logdet = fa.flow_affine_forward(x, params)
    exact, exact_logdet = fa.flow_affine_forward(x.float(), params.float())
    assert z.dtype == dtype and torch.equal(z, exact.to(dtype))
    assert logdet.dtype == torch.float32 and torch.equal(logdet, exact_logdet)


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1, 4)], ids=str)
def test_empty_and_small(shape, place):
    x = torch.randn(shape, device=place)
    params = torch.cat([x, x], -1)
    z, logdet = fa.flow_affine_forward(x, params, logdet_reduction="mean")
    assert logdet.shape == shape[:1] and logdet.isfinite().all()
    back, info = fa.flow_affine_inverse(z, params, return_info=True)
    torch.testing.assert_close(back, x)
    assert info.first_bad.tolist() == [-1] * shape[0]


@backends
def test_strided_inputs(place):
    x, params = inputs(6, place)
    wide = torch.randn(7, 2, 40, device=place)
    strided_x, strided = wide[..., :6].transpose(0, 1), wide[..., 9:21].transpose(0, 1)
    strided_x.copy_(x), strided.copy_(params)
    for a, b in zip(fa.flow_affine_forward(strided_x, strided), fa.flow_affine_forward(x, params)):
        assert torch.equal(a, b)
    expanded = x[:1].expand(2, 7, 6)
    a, b = (fa.flow_affine_inverse(t, params) for t in (expanded, expanded.contiguous()))
    assert torch.equal(a, b)


@wide_backends
@scales
@clips
def test_gradients(scale, soft_clip, place):
    x, params = (t.requires_grad_() for t in inputs(3, place, torch.float64))
    options = {"scale": scale, "soft_clip": soft_clip}
    for reduction in ("sum", "mean", "none"):
        forward = lambda *t: fa.flow_affine_forward(*t, **options, logdet_reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(forward, (x, params))
    forward = lambda x, params: fa.flow_affine_forward(x, params[..., :3], **options)  # noqa: E731
    assert torch.autograd.gradcheck(forward, (x, params))


@scales
@clips
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradients_in_float32(scale, soft_clip, place, backend):
    """The kernel's against those of float64, with a gradient of the log-determinants and without one."""
    for width in (6, 3):
        tensors = [t.requires_grad_() for t in inputs(3, place)]
        truth = [t.detach().double().requires_grad_() for t in tensors]
        dz, dlogdet = torch.randn(2, 7, 3, device=place), torch.randn(2, 7, device=place)
        grads = []
        for (x, params), name in ((tensors, "triton"), (truth, "reference")):
            with fa.use_backend(name):
                z, logdet = fa.flow_affine_forward(
                    x, params[..., :width], scale=scale, soft_clip=soft_clip, logdet_reduction="none"
                )
            both = z.to(dz.dtype).mul(dz).sum() + logdet.to(dz.dtype).mul(dlogdet).sum()
            grads.append([*torch.autograd.grad(both, (x, params), retain_graph=True)])
            grads[-1] += torch.autograd.grad(z, (x, params), dz.to(z))
        for got, expected in zip(*grads):
            close(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_inverse(rule, device):
    z, params = inputs(3, device, torch.float64)
    other, weight = params + 0.2 * torch.randn_like(params), torch.rand(2, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in (z, params, other, weight)]

    def inverse(z, params, other, weight):
        options = {"params_uncond": other, "guidance": weight, "guidance_rule": rule}
        return fa.flow_affine_inverse(z, params, **options, return_logdet=True)

    assert torch.autograd.gradcheck(inverse, tensors)


def test_opcheck(native):
    x, params = inputs(3, "cpu")
    opcheck(torch.ops.flowattn.flow_affine_fwd.default, (x, params, True, 4.0))
    opcheck(torch.ops.flowattn.flow_affine_bwd.default, (x, x[..., 0].contiguous(), x, params, False, 0.0))
    opcheck(torch.ops.flowattn.flow_affine_inv.default, (x, params, params, x[..., 0], x, 2, True, False, False, 0.0))
    opcheck(torch.ops.flowattn.flow_affine_inv.default, (x, params, None, None, None, 0, True, True, True, 4.0))


def test_opcheck_of_the_kernels(device):
    x, params = inputs(3, device)
    ops, kinds = torch.ops.flowattn, ("test_schema", "test_faketensor")
    opcheck(ops.flow_affine_fwd_triton.default, (x, params, True, 4.0), test_utils=kinds)
    opcheck(ops.flow_affine_bwd_triton.default, (x, None, x, params, False, 0.0), test_utils=kinds)
    given = (x, params, params, x[..., 0], x, 2, True, False, False, 0.0)
    opcheck(ops.flow_affine_inv_triton.default, given, test_utils=kinds)


def test_compiles_without_graph_breaks(native):
    x, params = (t.requires_grad_() for t in inputs(3, "cpu"))

    def call(x, params):
        z, logdet = fa.flow_affine_forward(x, params)
        return z.square().sum() - logdet.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(*(torch.autograd.grad(f(x, params), (x, params)) for f in (compiled, call))):
        torch.testing.assert_close(got, expected)


X, P = torch.zeros(2, 3, 4), torch.zeros(2, 3, 8)
BAD_CALLS = (
    (ValueError, r"x must have shape \(B, T, D\); got \(3, 4\)", lambda: fa.flow_affine_forward(X[0], P[0])),
    (ValueError, "params must have the batch and tokens", lambda: fa.flow_affine_forward(X, P[..., :5])),
    (TypeError, "x must be float16", lambda: fa.flow_affine_forward(X.long(), P)),
    (ValueError, 'scale must be "exp" or "softplus"', lambda: fa.flow_affine_forward(X, P, scale="elu")),
    (ValueError, "soft_clip must be >= 0", lambda: fa.flow_affine_forward(X, P, soft_clip=-1.0)),
    (ValueError, "logdet_reduction must be", lambda: fa.flow_affine_forward(X, P, logdet_reduction="max")),
    (ValueError, "the last dim of x must be contiguous",
     lambda: fa.flow_affine_forward(torch.zeros(2, 4, 3).mT, P)),
    (ValueError, "guidance needs params_uncond", lambda: fa.flow_affine_inverse(X, P, guidance=1.0)),
    (ValueError, "guidance must be a number",
     lambda: fa.flow_affine_inverse(X, P, params_uncond=P, guidance=torch.zeros(3))),
    (ValueError, "guidance_rule must be",
     lambda: fa.flow_affine_inverse(X, P, params_uncond=P, guidance_rule="linear")),
    (ValueError, "guidance_what must be", lambda: fa.flow_affine_inverse(X, P, params_uncond=P, guidance_what="c")),
    (ValueError, "previous must have", lambda: fa.flow_affine_inverse(X, P, previous=P)),
)  # fmt: skip


@pytest.mark.parametrize("error, text, call", BAD_CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(error, text, call):
    with pytest.raises(error, match=f"flow_affine_(forward|inverse): {text}"):
        call()


def test_explain(native, capsys):
    assert fa.explain("flow_affine_forward", X, P) == "cpu"
    assert fa.explain("flow_affine_inverse", X, P.clone().requires_grad_()) == "reference"
    assert "no backward" in capsys.readouterr().out
    assert flow_affine.reduce_logdet(torch.ones(2, 3), 4, "mean").tolist() == [0.25, 0.25]
