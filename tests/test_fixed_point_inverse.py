"""fixed_point_inverse with masked autoregressive nets, a library's where it is installed."""

import pytest
import torch
from torch import nn

import flowattn as fa

F64 = torch.float64
Status = fa.InverseStatus


class MaskedNet(nn.Module):
    """MADE (Germain et al. 2015): (a, m) of feature i from features before i."""

    def __init__(self, features, hidden=24, scale=0.5):
        super().__init__()
        order, inner = torch.arange(1, features + 1), torch.arange(hidden) % max(features - 1, 1) + 1
        self.register_buffer("first_mask", (inner[:, None] >= order[None]).double())
        self.register_buffer("last_mask", (order[:, None] > inner[None]).double().repeat(2, 1))
        self.first = nn.Parameter(scale * torch.randn(hidden, features))
        self.last = nn.Parameter(scale * torch.randn(2 * features, hidden))
        self.bias = nn.Parameter(0.1 * torch.randn(2 * features))

    def forward(self, x):
        h = torch.tanh(nn.functional.linear(x, self.first * self.first_mask))
        return nn.functional.linear(h, self.last * self.last_mask, self.bias).chunk(2, -1)


def sequential(net, z):
    x = torch.zeros_like(z)
    for i in range(z.shape[-1]):
        a, m = net(x)
        x = torch.cat([x[..., :i], (z * torch.exp(a) + m)[..., i : i + 1], x[..., i + 1 :]], -1)
    return x


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4), (4, 1), (0, 6)], ids=str)
@torch.no_grad()
def test_equals_the_sequential_inverse(shape, device):
    net = MaskedNet(shape[-1]).to(device, F64)
    z = torch.randn(shape, dtype=F64, device=device)
    expected = sequential(net, z)
    for guess in ("zero", "z", torch.full_like(z, 2.0)):
        x, info = fa.fixed_point_inverse(net, z, guess=guess, return_info=True)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
        assert (info.status == Status.CONVERGED).all() and (info.residual < 1e-10).all()
    single = fa.fixed_point_inverse(net.float(), z.float())
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_exact_after_as_many_passes_as_groups(device):
    net, z = MaskedNet(9).to(device, F64), torch.randn(4, 9, dtype=F64, device=device)
    expected = sequential(net, z)
    x, info = fa.fixed_point_inverse(net, z, atol=0.0, rtol=0.0, return_info=True)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    assert info.sweeps.max() <= 9 and (info.status == Status.CONVERGED).all()
    for cap in (0, 2):
        x, info = fa.fixed_point_inverse(net, z, max_sweeps=cap, return_info=True)
        torch.testing.assert_close(x[:, :cap], expected[:, :cap], rtol=0, atol=1e-12)
        assert (info.status == Status.CAP_REACHED).all()


@torch.no_grad()
def test_stops_early_and_each_sample_by_itself(device):
    net = MaskedNet(40, 64, 0.05).to(device, F64)
    z = torch.randn(6, 40, dtype=F64, device=device) * torch.tensor([0.01, 1, 1, 1, 1, 3.0], device=device)[:, None]
    x, info = fa.fixed_point_inverse(net, z, atol=1e-8, rtol=1e-8, return_info=True)
    assert info.sweeps.max() < 40 and info.sweeps.min() < info.sweeps.max()
    for b in range(6):
        alone, one = fa.fixed_point_inverse(net, z[b : b + 1], atol=1e-8, rtol=1e-8, return_info=True)
        torch.testing.assert_close(alone[0], x[b], rtol=0, atol=1e-12)
        assert one.sweeps[0] == info.sweeps[b]


@torch.no_grad()
def test_a_bad_sample_touches_no_other(device):
    net, z = MaskedNet(6).to(device, F64), torch.randn(3, 6, dtype=F64, device=device)
    clean = fa.fixed_point_inverse(net, z)
    z[1, 2] = float("nan")
    x, info = fa.fixed_point_inverse(net, z, return_info=True)
    assert info.status.tolist() == [0, Status.NONFINITE, 0] and x[1].isnan().all()
    torch.testing.assert_close(x[::2], clean[::2], rtol=0, atol=1e-12)


def test_gradcheck(device):
    net = MaskedNet(5, 8).to(device, F64)
    z = torch.randn(2, 5, dtype=F64, device=device, requires_grad=True)
    weights = [net.first, net.last, net.bias]

    def call(z, *weights):
        def params(x):
            state = dict(zip(("first", "last", "bias"), weights))
            return torch.func.functional_call(net, state, (x,))

        return fa.fixed_point_inverse(params, z)

    assert torch.autograd.gradcheck(call, (z, *weights))
    assert not fa.fixed_point_inverse(net.requires_grad_(False), z.detach()).requires_grad


@torch.no_grad()
def test_a_library_flow():
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(features=6, transforms=1, hidden_features=(32, 32)).double()
    transform, z = flow.transform.transforms[0](), torch.randn(8, 6, dtype=F64)

    def params(x):
        inner = transform.meta(x)
        ones = torch.ones_like(x)
        shift = inner(0 * x)
        scale = inner(ones) - shift
        return -torch.log(scale), -shift / scale

    torch.testing.assert_close(fa.fixed_point_inverse(params, z), transform.inv(z), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "text, call",
    (
        ("z must have shape", lambda: fa.fixed_point_inverse(None, torch.zeros(3))),
        ("guess must be", lambda: fa.fixed_point_inverse(None, torch.zeros(1, 3), guess="one")),
        ("guess must be", lambda: fa.fixed_point_inverse(None, torch.zeros(1, 3), guess=torch.zeros(2, 3))),
        ("params_fn must return two", lambda: fa.fixed_point_inverse(lambda x: (x, x[:, :1]), torch.zeros(1, 3))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(text, call):
    with pytest.raises(ValueError, match=f"fixed_point_inverse: {text}"):
        call()
