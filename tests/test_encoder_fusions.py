"""bias_gelu and bias_residual_layer_norm against plain torch in float64, over all backends."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import flowattn as fa

backends = pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"], indirect=True)
kernels = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
forms = pytest.mark.parametrize("approximate", ["none", "tanh"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
widths = pytest.mark.parametrize("width", [1, 2, 7, 64, 100, 384, 768, 1024, 4096, 5000], ids="d{}".format)
NAMES = ("x", "bias", "residual", "weight", "ln_bias")

# Largest error, as a multiple of plain torch's in the same dtype. On top come one rounding of the largest result (or of
# an input: those are near 1 in size) and, for sums over rows, the float32 roundings that such a sum has, where plain
# torch's may cancel by luck.
FORWARD, GRADIENT = 2, 3


def no_worse(name, got, exact, plain, factor, terms=0):
    if exact.numel():
        error, rival = ((t.double() - exact).abs().max().item() for t in (got, plain))
        rival = rival if math.isfinite(rival) else 0.0  # plain float16 gives NaN where the variance is 0
        rounding = torch.finfo(got.dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
        limit = factor * rival + rounding * max(exact.abs().max().item(), 1.0)
        assert error <= limit, f"{name}: off by {error:.3g}; allowed {limit:.3g} (plain torch {rival:.3g})"


def leaves(tensors, dtype=None):
    """Copies that want a gradient, with the strides of the originals; None stays None."""
    return [
        None if t is None else (t.to(dtype) if dtype and t.dtype != dtype else t.detach()).detach().requires_grad_()
        for t in tensors
    ]


def results(function, tensors, grads):
    """The outputs, and the gradients of all tensors under these output gradients."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [t for t in tensors if t is not None]
    found = torch.autograd.grad(outputs, given, [g.to(y.dtype) for g, y in zip(grads, outputs)])
    return [y.detach() for y in outputs], list(found)


def compare(ours, plain, tensors, grads, names=NAMES):
    """Outputs and gradients of `ours` against `plain` in float64, next to `plain` in the tensors' own dtypes."""
    got = results(ours, leaves(tensors), grads)
    exact = results(plain, leaves(tensors, torch.float64), grads)
    rival = results(plain, leaves(tensors), grads)
    names = [name for name, t in zip(names, tensors) if t is not None]
    for what, *triple in zip(("y", "z"), got[0], exact[0], rival[0]):
        no_worse(what, *triple, FORWARD)
    for what, *triple in zip(names, got[1], exact[1], rival[1]):
        terms = 0 if what in ("x", "residual") else tensors[0].numel() // max(tensors[0].shape[-1], 1)
        no_worse(f"gradient of {what}", *triple, GRADIENT, terms)
    for name, gradient, t in zip(names, got[1], [t for t in tensors if t is not None]):
        assert (gradient.dtype, gradient.shape) == (t.dtype, t.shape), name
    return got


def plain_gelu(approximate):
    return lambda x, bias: F.gelu(x if bias is None else x + bias, approximate=approximate)


def plain_norm(eps=1e-12):
    def function(x, bias, residual, weight, ln_bias):
        z = x if bias is None else x + bias
        z = z if residual is None else z + residual
        return F.layer_norm(z, z.shape[-1:], weight, ln_bias, eps), z

    return function


def our_norm(eps=1e-12, **options):
    return lambda *tensors: fa.bias_residual_layer_norm(*tensors, eps=eps, return_sum=True, **options)


def gelu_inputs(rows, width, dtype, place, vectors=None):
    return [torch.randn(rows, width, device=place).to(dtype), torch.randn(width, device=place).to(vectors or dtype)]


def norm_inputs(rows, width, dtype, place, vectors=None):
    x, residual = (torch.randn(rows, width, device=place).to(dtype) for _ in range(2))
    bias, weight, ln_bias = (torch.randn(width, device=place).to(vectors or dtype) for _ in range(3))
    return [x, bias, residual, weight, ln_bias]


def random_grads(x, count):
    return [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(count)]


@backends
@forms
@dtypes
@widths
def test_gelu(width, dtype, approximate, place):
    tensors = gelu_inputs(37, width, dtype, place)
    ours = lambda x, bias: fa.bias_gelu(x, bias, approximate=approximate)  # noqa: E731
    compare(ours, plain_gelu(approximate), tensors, random_grads(tensors[0], 1))


@backends
@dtypes
@widths
def test_norm(width, dtype, place):
    tensors = norm_inputs(37, width, dtype, place)
    compare(our_norm(), plain_norm(), tensors, random_grads(tensors[0], 2))


@backends
@pytest.mark.parametrize("rows", [0, 1, 1500], ids="T{}".format)
def test_row_counts(rows, place):
    for width in (24, 6000, 17000):
        rows = min(rows, 40) if width > 24 else rows
        tensors = norm_inputs(rows, width, torch.float32, place)
        compare(our_norm(), plain_norm(), tensors, random_grads(tensors[0], 2))
        compare(fa.bias_gelu, plain_gelu("none"), tensors[:2], random_grads(tensors[0], 1))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_vectors_beside_half_rows(dtype, place):
    tensors = norm_inputs(19, 72, dtype, place, torch.float32)
    compare(our_norm(), plain_norm(), tensors, random_grads(tensors[0], 2))
    compare(fa.bias_gelu, plain_gelu("none"), tensors[:2], random_grads(tensors[0], 1))


@backends
@pytest.mark.parametrize("absent", [(1,), (2,), (1, 2), (3,), (4,), (1, 2, 3, 4)], ids=str)
def test_optional_inputs(absent, place):
    tensors = norm_inputs(9, 40, torch.float32, place)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    compare(our_norm(), plain_norm(), tensors, random_grads(tensors[0], 2))


@backends
@forms
def test_gelu_without_bias(approximate, place):
    x = torch.randn(5, 33, device=place)
    ours = lambda x, bias: fa.bias_gelu(x, bias, approximate=approximate)  # noqa: E731
    compare(ours, plain_gelu(approximate), [x, None], random_grads(x, 1))


VIEWS = {
    "row-stride": lambda x: x[::2, :96],
    "cut-columns": lambda x: x[:, 8:104],
    "odd-offset": lambda x: x.flatten()[1 : 1 + 40 * 96].view(40, 96),
    "odd-stride": lambda x: x.flatten()[: 40 * 97].view(40, 97)[:, :96],
    "one-row": lambda x: x[3:4, :96],
    "expanded": lambda x: x[:1, :96].expand(11, -1),
    "three-dims": lambda x: x.view(10, 4, 112)[:, ::2, :96][:, :1],
    "time-first": lambda x: x.view(4, 10, 112)[..., :96],
    "vector": lambda x: x[2, :96],
}


@backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(view, dtype, place):
    x, residual = (view(torch.randn(40, 112, device=place).to(dtype)) for _ in range(2))
    vectors = [torch.randn(97, device=place).to(dtype)[1:] for _ in range(3)]  # unaligned
    compare(our_norm(), plain_norm(), [x, vectors[0], residual, *vectors[1:]], random_grads(x, 2))
    compare(fa.bias_gelu, plain_gelu("none"), [x, vectors[0]], random_grads(x, 1))
    with fa.use_backend(None):
        assert fa.bias_gelu(x, None).is_contiguous()


@backends
def test_gradients_of_any_layout(place):
    """The incoming gradient is expanded, transposed, or absent for one of the outputs."""
    tensors = leaves(norm_inputs(6, 24, torch.float64 if place == "cpu" else torch.float32, place))
    plain = plain_norm()
    for pick in (
        lambda y, z: y.sum(),
        lambda y, z: (y.t().contiguous() * torch.arange(6.0, device=place)).sum(),
        lambda y, z: z.square().sum(),
        lambda y, z: y.square().sum() + z.sum(),
    ):
        got = torch.autograd.grad(pick(*our_norm()(*tensors)), tensors, allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad(pick(*plain(*tensors)), tensors, allow_unused=True, materialize_grads=True)
        for name, *pair in zip(NAMES, got, want):
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    x = leaves([torch.randn(4, 6, device=place)])[0]
    fa.bias_gelu(x, None).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.functional.jvp(F.gelu, x.detach(), torch.ones_like(x))[1])


@backends
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-2], ids=str)
def test_constant_rows_and_eps(eps, place):
    """A constant row has variance 0 exactly, whatever its value: 1 / sqrt(eps) would blow up the slightest error."""
    values = torch.tensor([0.1, 1e5 / 3, -7e-8, 3.3e30, 1e31 / 7, -1e33 / 3], device=place)
    for width in (3, 37, 100, 5000):
        x, residual = values[:, None].repeat(1, width), torch.zeros(6, width, device=place)
        ln_bias = torch.randn(width, device=place)
        y = fa.bias_residual_layer_norm(x, None, residual, torch.ones_like(ln_bias), ln_bias, eps=eps)
        assert torch.equal(y, ln_bias.expand(6, width))
        tensors = norm_inputs(5, width, torch.float32, place)
        compare(our_norm(eps), plain_norm(eps), tensors, random_grads(tensors[0], 2))


@backends
@pytest.mark.parametrize("dtype, scale", [(torch.float16, 6e4), (torch.bfloat16, 1e16), (torch.float32, 1e16)], ids=str)
def test_huge_values(dtype, scale, place):
    """x + residual overflows float16, and u^3 float32, where the sum in float32, and the GELU, do not."""
    x = torch.randn(8, 200, device=place).clamp(-1, 1).mul(scale).to(dtype)
    weight = torch.randn(200, device=place)
    y = fa.bias_residual_layer_norm(x, None, x, weight, None)
    z = 2 * x.double()
    exact = (z - z.mean(1, True)) / z.var(1, unbiased=False, keepdim=True).sqrt() * weight
    torch.testing.assert_close(y.double(), exact, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item(), rtol=0)
    for approximate in ("none", "tanh"):
        u = leaves([x])[0]
        y = fa.bias_gelu(u, None, approximate=approximate)
        (slope,) = torch.autograd.grad(y.sum(), u)
        big = x.abs() > 20
        assert torch.equal(y[big], x[big].clamp_min(0))
        assert torch.equal(slope[big], (x[big] > 0).to(dtype))


@kernels
@forms
def test_gelu_on_the_whole_axis(approximate, place):
    u = torch.cat([torch.linspace(-14, 14, 200_001), torch.linspace(-1e-3, 1e-3, 1001)]).to(place)[None]
    u = leaves([u])[0]
    y = fa.bias_gelu(u, None, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), u)
    v = leaves([u], torch.float64)[0]
    exact = F.gelu(v, approximate=approximate)
    (exact_slope,) = torch.autograd.grad(exact.sum(), v)
    assert ((y - exact).abs() / exact.abs().clamp_min(1)).max() < 2.5e-7
    assert (slope - exact_slope).abs().max() < 4e-7


@kernels
@forms
def test_gelu_does_not_cancel_in_the_tail(approximate, place):
    """1 + erf(u / sqrt 2) and 1 + tanh(w) in float32 are off by half of the result at -5."""
    u = torch.linspace(-5, -1, 4001, device=place)[None]
    exact = F.gelu(u.double(), approximate=approximate)
    assert ((fa.bias_gelu(u, None, approximate=approximate) - exact).abs() / exact.abs()).max() < 2e-3


@backends
def test_nan_stays_in_its_row(place):
    tensors = norm_inputs(6, 50, torch.float32, place)
    grads = random_grads(tensors[0], 2)
    clean = results(our_norm(), leaves(tensors), grads)
    clean_gelu = results(fa.bias_gelu, leaves(tensors[:2]), grads[:1])
    tensors[0] = tensors[0].clone()
    tensors[0][2, 7], tensors[0][4, 49] = float("nan"), float("inf")
    sound = [0, 1, 3, 5]
    (y, z), (dx, *_) = results(our_norm(), leaves(tensors), grads)
    for name, got, want in (("y", y, clean[0][0]), ("z", z, clean[0][1]), ("dx", dx, clean[1][0])):
        assert torch.equal(got[sound], want[sound]), name
    assert y[[2, 4]].isnan().all() and dx[[2, 4]].isnan().all()
    (y,), (dx, _) = results(fa.bias_gelu, leaves(tensors[:2]), grads[:1])
    assert torch.equal(y[sound], clean_gelu[0][0][sound]) and torch.equal(dx[sound], clean_gelu[1][0][sound])
    assert y[2].isnan().sum() == 1 and y[2, 7].isnan() and dx[2, 7].isnan()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa, native):
    """The copies of the kernels that this machine does not choose by itself."""
    script = (
        "import torch, flowattn as fa\n"
        "from test_encoder_fusions import *\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    for width in (1, 37, 200):\n"
        "        tensors = norm_inputs(21, width, dtype, 'cpu')\n"
        "        compare(our_norm(), plain_norm(), tensors, random_grads(tensors[0], 2))\n"
        "        for form in ('none', 'tanh'):\n"
        "            ours = lambda x, bias: fa.bias_gelu(x, bias, approximate=form)\n"
        "            compare(ours, plain_gelu(form), tensors[:2], random_grads(tensors[0], 1))\n"
    )
    environment = os.environ | {"FLOWATTN_CPU_ISA": isa, "FLOWATTN_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(__file__), env=environment)
    assert done.returncode == 0
