"""Gradients through inverses: gradcheck of the implicit system, against the unrolled inverse, and its refusals."""

import warnings

import pytest
import torch
from flow_oracle import tarflow_params, toy, toy_star

import flowattn as fa
from flowattn.ops import implicit

F64 = torch.float64


def small(**options):
    """T = 5, D = 3, one layer."""
    options = {"channels": 64, "num_blocks": 1, "layers_per_block": 1, "num_classes": 0, "head_dim": 32, **options}
    torch.manual_seed(0)
    from flow_oracle import spread

    from flowattn.models.tarflow import TarFlow

    return spread(TarFlow(3, (1, 5), 1, **options), 0.03).double().blocks[0]


def by_parameters(block, call):
    """`call` as a function of the block's weights alone, through functional_call."""
    names = [name for name, _ in block.named_parameters()]

    class Caller(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, *arguments):
            return call(self.block, *arguments)

    def function(arguments, *weights):
        state = {f"block.{name}": w for name, w in zip(names, weights)}
        return torch.func.functional_call(Caller(), state, arguments)

    return function, [p.detach().clone().requires_grad_() for p in block.parameters()]


@pytest.mark.parametrize("method", ["sequential", "frontier"])
def test_gradcheck_of_noise_condition_and_weights(method, device):
    block = small().to(device)
    z, cond = (torch.randn(2, *s, dtype=F64, device=device).requires_grad_() for s in ((5, 3), (64,)))
    options = {"method": method, "permutation": "reverse", "return_logdet": True}
    function, weights = by_parameters(block, lambda b, z, cond: fa.flow_inverse(z, b, cond=cond, **options))
    assert torch.autograd.gradcheck(lambda z, cond: function((z, cond), *weights), (z, cond))
    fast = {"fast_mode": True, "eps": 1e-6, "atol": 1e-6}
    assert torch.autograd.gradcheck(lambda *w: function((z.detach(), cond.detach()), *w), weights, **fast)


@pytest.mark.parametrize("rule", ["log_linear", "gaussian_ratio"])
def test_gradcheck_under_guidance(rule, device):
    block = small().to(device)
    shapes = ((5, 3), (64,), (64,))
    z, cond, uncond = (torch.randn(2, *s, dtype=F64, device=device).requires_grad_() for s in shapes)
    weight = torch.tensor([0.5, 1.0], dtype=F64, device=device, requires_grad=True)

    def call(z, cond, uncond, weight):
        return fa.flow_inverse(z, block, cond=cond, cond_uncond=uncond, guidance=weight, guidance_rule=rule)

    assert torch.autograd.gradcheck(call, (z, cond, uncond, weight))


def test_gradcheck_with_start_vector_and_prefix(device):
    block = toy_star(0.03, F64, layers=(1,), head_dim=64).to(device).blocks[0]
    z, prefix = (torch.randn(1, n, w, dtype=F64, device=device).requires_grad_() for n, w in ((4, 3), (3, 64)))
    assert torch.autograd.gradcheck(lambda z, p: fa.flow_inverse(z, block, prefix=p), (z, prefix), fast_mode=True)
    known = torch.randn(1, 2, 3, dtype=F64, device=device, requires_grad=True)
    call = lambda z, k: fa.flow_inverse(z, block, prefix=prefix.detach(), known=k)  # noqa: E731
    assert torch.autograd.gradcheck(call, (z, known))


def test_a_whole_model_against_the_unrolled_inverse():
    model = toy(0.03, F64, num_classes=0)
    z = torch.randn(1, 16, 8, dtype=F64, requires_grad=True)
    state = dict(model.named_parameters())
    u = z[0]
    for k in (1, 0):
        u = u.flip(0) if k else u
        tokens = [u[0]]
        for t in range(1, 16):
            rest = torch.zeros(16 - t, 8, dtype=F64)
            alpha, mu = tarflow_params(torch.cat([torch.stack(tokens), rest]), state, k, 2, 2)
            tokens.append(u[t] * torch.exp(alpha[t]) + mu[t])
        u = torch.stack(tokens)
        u = u.flip(0) if k else u
    direction = torch.randn(16, 8, dtype=F64)
    wanted = [z, *model.parameters()]
    expected = torch.autograd.grad((u * direction).sum(), wanted, allow_unused=True)
    got = torch.autograd.grad((model.to_tokens(model.inverse(z))[0] * direction).sum(), wanted, allow_unused=True)
    for a, b in zip(got, expected):
        b = torch.zeros_like(a) if b is None else b  # the loop never reads the last position
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(1.0, b.abs().max().item()))


def test_no_graph_where_none_is_wanted():
    block, z = small(), torch.randn(1, 5, 3, dtype=F64)
    with torch.no_grad():
        assert not fa.flow_inverse(z, block).requires_grad
    assert fa.flow_inverse(z, block).requires_grad
    assert not fa.flow_inverse(z, block.requires_grad_(False)).requires_grad


def test_no_double_backward():
    block, z = small(), torch.randn(1, 5, 3, dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="flow_inverse: the gradient has no gradient"):
        torch.autograd.grad(fa.flow_inverse(z, block).sum(), z, create_graph=True)


def test_no_gradient_through_a_clamp():
    with pytest.raises(NotImplementedError, match="flow_inverse: clamp has no gradient; got 3.0"):
        fa.flow_inverse(torch.zeros(1, 5, 3, dtype=F64), small(), clamp=3.0)


def test_gradient_away_from_a_solution_warns_once(monkeypatch):
    monkeypatch.setattr(implicit, "_warned", set())
    block, z = small(), torch.randn(1, 5, 3, dtype=F64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"not a solution; got statuses \[1\], residual"):
        fa.flow_inverse(z, block, method="jacobi", max_sweeps=1).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.flow_inverse(z, block, method="jacobi", max_sweeps=1).sum().backward()
