"""flow_inverse: every method against the sequential inverse, honest endings, edge cases, defects of other samplers."""

import pytest
import torch
from flow_oracle import tarflow_params, toy, toy_star

import flowattn as fa
from flowattn.ops import flow_block, flow_network
from flowattn.ops.flow_solvers import Problem, Rule, Windows, segments_of, sweep

backends = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
SWEEPING = ("jacobi", "gs_jacobi", "frontier")
F64 = torch.float64
Status = fa.InverseStatus


def block_of(std=0.03, dtype=torch.float32, place="cpu", number=0, **options):
    return toy(std, dtype, **options).to(place).blocks[number]


def noise(place, batch=3, dtype=torch.float32, tokens=16, features=8):
    return torch.randn(batch, tokens, features, dtype=dtype, device=place)


@backends
@torch.no_grad()
def test_sequential_is_the_definition(place):
    """Token by token, with everything computed anew for each."""
    model = toy(0.05, F64)
    z, state = noise("cpu", 2, F64), model.state_dict()
    labels = torch.tensor([1, -1])
    expected = z.clone()
    for b in range(2):
        for t in range(1, 16):
            alpha, mu = tarflow_params(expected[b], state, 0, 2, 2, labels[b].item())
            expected[b, t] = z[b, t] * torch.exp(alpha[t]) + mu[t]
    block = model.to(place).blocks[0]
    cond = block.condition(labels.to(place), 2)
    got, info = fa.flow_inverse(z.to(place), block, cond=cond, method="sequential", return_info=True)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-12)
    assert info.sweeps.tolist() == [15, 15] and info.status.tolist() == [0, 0] and info.first_bad.tolist() == [-1, -1]


@backends
@pytest.mark.parametrize("method", SWEEPING)
@pytest.mark.parametrize("commit", ["exact", "stale"])
@torch.no_grad()
def test_sweeping_methods_reach_the_solution(method, commit, place):
    block, z = block_of(0.05, place=place), noise(place)
    expected = fa.flow_inverse(z, block, method="sequential")
    options = {"method": method, "commit": commit, "segments": 3, "window": 5, "return_info": True}
    x, info = fa.flow_inverse(z, block, **options)
    assert (info.status == Status.CONVERGED).all()
    assert (x - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (info.residual <= 1e-4).all() and (info.sweeps <= 15).all() and info.cache_bytes > 0
    z_again, _ = fa.flow_forward(x, block)
    assert (z_again - z).abs().max() <= 1e-4 * z.abs().max()
    again = fa.flow_inverse(z, block, **options)[0]
    assert torch.equal(again, x)


@backends
@pytest.mark.parametrize("method", SWEEPING)
@torch.no_grad()
def test_at_the_cap_every_method_is_exact(method, place):
    """No tolerance is ever met, so that tokens are accepted because all they read is final."""
    block, z = block_of(0.05, place=place), noise(place)
    expected = fa.flow_inverse(z, block, method="sequential")
    options = {"method": method, "window": 5, "segments": 3, "atol": 0.0, "rtol": 0.0, "return_info": True}
    for guess in ("z", "zero", 3 * torch.randn_like(z)):
        x, info = fa.flow_inverse(z, block, guess=guess, **options)
        assert (x - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert (info.status == Status.CONVERGED).all() and (info.residual <= 1e-5).all()


@backends
@torch.no_grad()
def test_sweeps_accept_a_token_each_at_least(place):
    """After k sweeps the first k tokens behind the given one are exact, whatever the guess."""
    block, z = block_of(0.03, F64, place), noise(place, dtype=F64)
    expected = fa.flow_inverse(z, block, method="sequential")
    for k in (0, 1, 4, 9):
        options = {"method": "jacobi", "max_sweeps": k, "atol": 0.0, "rtol": 0.0, "return_info": True}
        x, info = fa.flow_inverse(z, block, guess=torch.full_like(z, 7.0), **options)
        torch.testing.assert_close(x[:, : k + 1], expected[:, : k + 1], rtol=0, atol=1e-11)
        assert (info.status == Status.CAP_REACHED).all() and info.sweeps.tolist() == [k] * 3
        assert (x[:, k + 1 :] - expected[:, k + 1 :]).abs().max() > 1e-7


@backends
@torch.no_grad()
def test_sweeps_of_one_token_are_the_sequential_inverse(place):
    block, z = block_of(0.03, F64, place), noise(place, dtype=F64)
    expected = fa.flow_inverse(z, block, method="sequential")
    for options in ({"method": "frontier", "window": 1}, {"method": "gs_jacobi", "segments": 15}):
        x, info = fa.flow_inverse(z, block, return_info=True, **options)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
        assert info.sweeps.tolist() == info.rows.tolist() == [15] * 3


@backends
@torch.no_grad()
def test_frontier_takes_no_more_sweeps_than_jacobi_or_steps(place):
    z = noise(place)
    for std in (0.01, 0.05, 0.1):
        block = block_of(std, place=place)
        counts = {}
        for method, options in (("jacobi", {}), ("frontier", {"window": 15})):
            _, info = fa.flow_inverse(z, block, method=method, return_info=True, **options)
            counts[method] = info.sweeps
        assert (counts["frontier"] <= counts["jacobi"]).all() and (counts["frontier"] <= 15).all()


@pytest.mark.parametrize("segments", [1, 2, 4, 7, 15, 40, [3, 4, 11], [100], []], ids=str)
@torch.no_grad()
def test_segments_of_any_kind(segments, device):
    """Counts that do not divide the steps, more segments than steps, uneven bounds: no token is left out."""
    block, z = block_of(0.05, F64, device), noise(device, dtype=F64)
    expected = fa.flow_inverse(z, block, method="sequential")
    x, info = fa.flow_inverse(z, block, method="gs_jacobi", segments=segments, return_info=True)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
    assert (info.status == Status.CONVERGED).all() and (info.sweeps <= 15).all()


@torch.no_grad()
def test_exact_commit_measures_what_stale_commit_leaves(device):
    block, z = block_of(0.03, F64, device), noise(device, dtype=F64)
    expected = fa.flow_inverse(z, block, method="sequential")
    options = {"method": "gs_jacobi", "segments": 3, "atol": 1e-3, "rtol": 1e-3, "return_info": True}
    errors = {}
    for commit in ("exact", "stale"):
        x, info = fa.flow_inverse(z, block, commit=commit, **options)
        errors[commit] = (x - expected).abs().max().item()
        true_residual = (fa.flow_forward(x, block)[0] - z).abs().amax((1, 2))
        if commit == "exact":  # all but the tokens of the last sweep are measured as they are
            before_last = (fa.flow_forward(x, block)[0] - z)[:, :11].abs().amax((1, 2))
            assert (before_last <= info.residual + 1e-12).all()
        assert (true_residual < 0.1).all()
    assert max(errors.values()) < 0.1


class NoisyNetwork:
    """sigma = 1 and mu = noise of a given size, drawn anew at every sweep: x = z is the solution up to that."""

    native, steps, first = False, 40, 1

    def __init__(self, size, batch):
        self.size, self.batch = size, batch
        self.conditions = flow_block.Conditions(None, None, None, torch.ones(batch), 1)

    def window(self, tokens, lo, hi, width):
        return torch.cat([torch.zeros(self.batch, width, 2), self.size * torch.randn(self.batch, width, 2)], -1)


@pytest.mark.parametrize("size, status", [(1e-8, Status.CONVERGED), (4e-6, Status.STALLED), (1e-3, Status.CONVERGED)])
def test_rounding_above_the_tolerance_is_a_stall(size, status):
    """Close above the tolerance there is nothing to gain by more sweeps; far above it they go on until exact."""
    z, network = torch.randn(2, 41, 2), NoisyNetwork(size, 2)
    problem = Problem(network, z, None, "log_linear", "ab", "exp", 0.0, None, torch.full((2,), 1e4))
    stop = Rule(2e-6, 0.0, "max", "exact", None)
    front = torch.zeros(2, dtype=torch.int64)
    found = sweep(problem, z.clone(), front, segments_of(40, 1, z.device), stop)
    assert (found.status == status).all() and (found.tokens - z).abs().max() < 6 * size
    assert (found.sweeps < 15).all() if size < 1e-3 else (found.sweeps == 40).all()
    by_front = sweep(problem, z.clone(), front, Windows(8), stop)
    assert (by_front.status == Status.CONVERGED).all() and (by_front.sweeps <= 40).all()


@torch.no_grad()
def test_scales_that_are_not_positive_are_counted(device):
    """Guidance of sigma can cross 0: the samples stay finite, and the info says how often it did."""
    block, z = block_of(0.03, place=device), noise(device)
    cond = {"cond": torch.full((3, 64), -2.0, device=device), "cond_uncond": torch.full((3, 64), 2.0, device=device)}
    weight = torch.tensor([0.0, 0.1, 2.0], device=device)
    options = {"guidance": weight, "guidance_rule": "sigma_linear", "guidance_what": "a", "return_info": True}
    counts = [fa.flow_inverse(z, block, method=m, **cond, **options)[1].not_positive for m in ("sequential", "jacobi")]
    for count in counts:
        assert count[0] == 0 and count[2] > 0
    assert torch.equal(*counts)


@pytest.mark.parametrize("criterion, tolerance", [("fro", {"atol": 1e-7}), ("rel_mse", {"rtol": 1e-12})])
@torch.no_grad()
def test_published_stopping_rules(criterion, tolerance, device):
    block, z = block_of(0.03, place=device), noise(device)
    expected = fa.flow_inverse(z, block, method="sequential")
    for method in ("jacobi", "gs_jacobi"):
        options = {"method": method, "criterion": criterion, "return_info": True, **tolerance}
        x, info = fa.flow_inverse(z, block, **options)
        assert (x - expected).abs().max() < 1e-3 and len(set(info.sweeps.tolist())) == 1


@backends
@pytest.mark.parametrize("rule", ["log_linear", "sigma_linear", "gaussian_ratio"])
@torch.no_grad()
def test_guidance_by_every_method(rule, place):
    """Two streams over the same tokens, against the definition token by token."""
    model, weight = toy(0.03, F64), torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    z, state = noise("cpu", 3, F64), model.state_dict()
    expected = z.clone()
    for b in range(3):
        for t in range(1, 16):
            own, other = (tarflow_params(expected[b], state, 0, 2, 2, label) for label in (1, None))
            params, uncond = (torch.cat([a[t], m[t]]).view(1, 1, -1) for a, m in (own, other))
            options = {"params_uncond": uncond, "guidance": weight[b].item() * t / 15, "guidance_rule": rule}
            with fa.use_backend("reference"):
                expected[b, t] = fa.flow_affine_inverse(z[b : b + 1, t : t + 1], params, **options)[0, 0]
    block = model.to(place).blocks[0]
    cond = {"cond": block.condition(torch.ones(3, dtype=torch.int64, device=place), 3)}
    cond["cond_uncond"] = block.condition(None, 3)
    for method in ("sequential", *SWEEPING):
        options = {"guidance": weight.to(place), "guidance_rule": rule, "anneal": True, "method": method}
        x = fa.flow_inverse(z.to(place), block, atol=1e-13, rtol=1e-13, **cond, **options)
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-10)


@backends
@torch.no_grad()
def test_attention_temperature_of_the_unconditional_stream(place):
    model = toy(0.05, F64, num_classes=0)
    z, state = noise("cpu", 1, F64), model.state_dict()
    expected = z.clone()
    for t in range(1, 16):
        own, other = (tarflow_params(expected[0], state, 0, 2, 2, None, tau) for tau in (1.0, 1.3))
        alpha, mu = (c[t] + 0.8 * (c[t] - u[t]) for c, u in zip(own, other))
        expected[0, t] = z[0, t] * torch.exp(alpha) + mu
    block = model.to(place).blocks[0]
    x = fa.flow_inverse(z.to(place), block, guidance=0.8, attn_temp_uncond=1.3)
    torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_equal_streams_run_once(device, monkeypatch):
    block, z = block_of(place=device), noise(device)
    cond = block.condition(torch.zeros(3, dtype=torch.int64, device=device), 3)
    rows = []
    original = flow_network.Network.__init__

    def counting(self, block, z, conditions, cache=None):
        rows.append(conditions.streams)
        original(self, block, z, conditions, cache)

    monkeypatch.setattr(flow_network.Network, "__init__", counting)
    plain = fa.flow_inverse(z, block, cond=cond)
    for options in ({"guidance": 0.0, "cond_uncond": torch.zeros_like(cond)}, {"guidance": 1.5}):
        assert torch.equal(fa.flow_inverse(z, block, cond=cond, **options), plain)
    fa.flow_inverse(z, block, cond=cond, guidance=1.5, cond_uncond=torch.zeros_like(cond))
    assert rows == [1, 1, 1, 2]


@backends
@torch.no_grad()
def test_given_tokens(place):
    block, z = block_of(0.03, F64, place), noise(place, dtype=F64)
    whole = fa.flow_inverse(z, block)
    for count in (1, 6, 16):
        for method in ("sequential", "frontier"):
            x = fa.flow_inverse(
                torch.cat([0 * z[:, :count], z[:, count:]], 1), block, known=whole[:, :count], method=method
            )
            torch.testing.assert_close(x, whole, rtol=0, atol=1e-10)
    star = toy_star(0.05, F64).to(place).blocks[1]
    z, prefix = noise(place, 2, F64, features=3), torch.randn(2, 3, 64, dtype=F64, device=place)
    whole = fa.flow_inverse(z, star, prefix=prefix)
    for method in ("sequential", "gs_jacobi"):
        x = fa.flow_inverse(z, star, prefix=prefix, known=whole[:, :5], method=method)
        torch.testing.assert_close(x, whole, rtol=0, atol=1e-10)


@backends
@pytest.mark.parametrize("kind", ["reverse", "shared", "per sample"])
@torch.no_grad()
def test_permutations(kind, place):
    block, x = block_of(0.03, F64, place), noise(place, dtype=F64)
    random = torch.stack([torch.randperm(16) for _ in range(3)]).to(place)
    permutation = {"reverse": "reverse", "shared": random[0], "per sample": random}[kind]
    z, logdet = fa.flow_forward(x, block, permutation=permutation)
    for b in range(3):  # each sample by a block whose table of positions is permuted instead
        order = torch.arange(15, -1, -1) if kind == "reverse" else random[0 if kind == "shared" else b].cpu()
        plain = block.flow_block()._replace(positions=block.pos_embed[order])
        alone, alone_logdet = fa.flow_forward(x[b : b + 1, order], plain)
        torch.testing.assert_close(z[b : b + 1, order], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(logdet[b : b + 1], alone_logdet)
    for method in ("sequential", "frontier"):
        back = fa.flow_inverse(z, block, permutation=permutation, method=method)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-10)


@backends
@torch.no_grad()
def test_log_determinants_cancel(place):
    block, x = block_of(0.03, F64, place), noise(place, dtype=F64)
    z, forward = fa.flow_forward(x, block)
    _, backward = fa.flow_inverse(z, block, return_logdet=True)
    torch.testing.assert_close(forward, -backward, rtol=0, atol=1e-10)
    each = fa.flow_forward(x, block, permutation="reverse", logdet_reduction="none")[1]
    assert torch.equal(each[:, -1], torch.zeros_like(each[:, -1]))
    mean = fa.flow_forward(x, block, permutation="reverse", logdet_reduction="mean")[1]
    torch.testing.assert_close(each.sum(1), 128 * mean)


@backends
@pytest.mark.parametrize("method", ("sequential", *SWEEPING))
@torch.no_grad()
def test_samples_do_not_mix(method, place):
    """Each sample of a batch is that sample alone, and one that is NaN or infinite touches no other."""
    block, z = block_of(0.05, place=place), noise(place, 4)
    whole = fa.flow_inverse(z, block, method=method)
    for b in range(4):
        alone = fa.flow_inverse(z[b : b + 1], block, method=method)
        torch.testing.assert_close(alone[0], whole[b], rtol=0, atol=1e-5)
    bad = z.clone()
    bad[1, 5, 2], bad[2, 0, 0] = float("nan"), float("inf")
    x, info = fa.flow_inverse(bad, block, method=method, return_info=True)
    assert info.status.tolist() == [0, Status.NONFINITE, Status.NONFINITE, 0]
    assert info.first_bad.tolist() == [-1, 5, 0, -1]
    torch.testing.assert_close(x[::3], whole[::3], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[1, :5], whole[1, :5], rtol=0, atol=1e-5)
    assert x[1, 5:].isnan().all() and x[2].isnan().all()


@backends
@pytest.mark.parametrize("method", SWEEPING)
@torch.no_grad()
def test_overflow_on_the_way_is_survived(method, place):
    """Iterates far from the solution overflow; keys and values of later tokens must not reach the exact ones."""
    block, x_true = block_of(0.1, place=place), 0.3 * noise(place)
    z, _ = fa.flow_forward(x_true, block)
    expected, found = fa.flow_inverse(z, block, method="sequential", return_info=True)
    assert (found.status == Status.CONVERGED).all() and (expected - x_true).abs().max() < 1e-2
    for guess in ("z", torch.full_like(z, 3e38)):
        x, info = fa.flow_inverse(z, block, method=method, guess=guess, return_info=True)
        assert (info.status == Status.CONVERGED).all()
        assert (x - expected).abs().max() <= 1e-3 * expected.abs().max()


class ExplodingNetwork(NoisyNetwork):
    """mu of a token is half the token before it, and sigma is 1; but the last token's iterates are 1e30."""

    def window(self, tokens, lo, hi, width):
        at = lo.unsqueeze(1) + torch.arange(width)
        before = tokens.gather(1, at.clamp(max=self.steps - 1).unsqueeze(-1).expand(-1, -1, 2))
        last = (at == self.steps - 1) & (lo < self.steps - 1).unsqueeze(1)
        mu = torch.where(last.unsqueeze(-1), 1e30, 0.5 * before)
        return torch.cat([torch.zeros_like(mu), mu], -1)


def test_an_exploding_iterate_does_not_loosen_the_tolerance():
    """atol + rtol max|x| over the window, as usually stated, would accept everything in the first sweep."""
    z = torch.randn(2, 41, 2, dtype=F64)
    expected = z.clone()
    for t in range(1, 41):
        expected[:, t] += 0.5 * expected[:, t - 1]
    network, limit = ExplodingNetwork(0.0, 2), torch.full((2,), 1e40, dtype=F64)
    problem = Problem(network, z, None, "log_linear", "ab", "exp", 0.0, None, limit)
    front = torch.zeros(2, dtype=torch.int64)
    found = sweep(problem, z.clone(), front, Windows(40), Rule(1e-9, 1e-9, "max", "exact", None))
    assert (found.status == Status.CONVERGED).all()
    torch.testing.assert_close(found.tokens[:, :-1], expected[:, :-1], rtol=0, atol=1e-7)


@backends
@pytest.mark.parametrize("method", ("sequential", *SWEEPING))
@torch.no_grad()
def test_overflow_of_the_result_is_reported(method, place):
    model = toy(0.02).to(place)
    block = model.blocks[0]
    block.proj_out.bias[:8] = 95.0  # sigma = exp(95) is infinite
    z = noise(place, 2)
    x, info = fa.flow_inverse(z, block, method=method, return_info=True)
    assert (info.status == Status.NONFINITE).all() and info.first_bad.tolist() == [1, 1]
    assert x[:, 1:].isnan().all() and torch.equal(x[:, 0], z[:, 0])
    filled = fa.flow_inverse(z, block, method=method, on_nonfinite="nan_fill")
    assert filled.isnan().all()
    with pytest.raises(RuntimeError, match=r"samples \[0, 1\] are not finite"):
        fa.flow_inverse(z, block, method=method, on_nonfinite="raise")
    block.proj_out.bias[:8] = float("nan")
    assert (fa.flow_inverse(z, block, method=method, return_info=True)[1].status == Status.NONFINITE).all()


@backends
@pytest.mark.parametrize("method", ("sequential", *SWEEPING))
@torch.no_grad()
def test_clamp_is_asked_for_and_counted(method, place):
    """Noise beyond 3 comes back unclamped; with clamp=c the cuts are counted."""
    block, z = block_of(0.03, place=place), noise(place)
    z[0, 4] = 9.0
    x, info = fa.flow_inverse(z, block, method=method, return_info=True)
    assert x[0, 4].abs().max() > 5 and info.clamped.tolist() == [0, 0, 0]
    torch.testing.assert_close(fa.flow_forward(x, block)[0], z, rtol=0, atol=1e-4)
    cut, info = fa.flow_inverse(z, block, method=method, clamp=3.0, return_info=True)
    assert cut[:, 1:].abs().max() <= 3.0 and info.clamped[0] >= 8
