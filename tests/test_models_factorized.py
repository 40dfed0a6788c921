"""The factorized block and its models against the formulas written out on the whole grid."""

import pytest
import torch
import torch.nn.functional as F

from flowattn.models.factformer import FactFormer
from flowattn.models.ifactformer import IFactFormerM
from flowattn.nn import AxisKernel, FactorizedBlock


def turn(x, positions):
    """Half-split rotary encoding, pair by pair."""
    width, out = x.shape[-1], x.clone()
    for pair in range(width // 2):
        angle = positions * 64 * 10000 ** (-2 * pair / width)
        a, b = x[..., pair], x[..., pair + width // 2]
        out[..., pair] = a * angle.cos() - b * angle.sin()
        out[..., pair + width // 2] = b * angle.cos() + a * angle.sin()
    return out


def written_out(block, u, positions):
    """The block as published: linear maps on the whole grid before the mean, normalisation before the product."""
    heads, letters = block.heads, "xyz"[: len(positions)]
    w = block.norm(u)
    values, z = block.to_v(w).unflatten(-1, (heads, -1)), block.to_in(w)
    results, chained = [], values
    for axis, (kernel, p) in enumerate(zip(block.kernels, positions), 1):
        others = [d for d in range(1, u.dim() - 1) if d != axis]
        s = (z @ kernel.project.weight.T).mean(others) if others else z @ kernel.project.weight.T
        s = F.layer_norm(s, s.shape[-1:], kernel.norm.weight, kernel.norm.bias)
        gate, value = kernel.expand(s).chunk(2, -1)
        s = kernel.reduce(F.gelu(gate) * value)
        q, k = (turn(f(s).unflatten(-1, (heads, -1)).transpose(1, 2), p) for f in (kernel.to_q, kernel.to_k))
        matrix = torch.einsum("bhid,bhjd->bhij", q, k) * kernel.scaling
        letter = letters[axis - 1]
        formula = f"bhi{letter},b{letters}hc->b{letters.replace(letter, 'i')}hc"
        results.append(torch.einsum(formula, matrix, values))
        chained = torch.einsum(formula, matrix, chained)
    y = torch.cat(results, -1) if block.mode == "parallel" else chained
    if block.normalisation == "instance":
        y = y.flatten(-2).movedim(-1, 1)
        y = F.instance_norm(y.flatten(2)).view(y.shape).movedim(1, -1)
    else:
        dims = (*range(1, y.dim() - 2), y.dim() - 1)
        variance, mean = torch.var_mean(y, dims, keepdim=True)
        y = ((y - mean) / (variance + 1e-8).sqrt()).flatten(-2)
    return block.to_out(F.gelu(y @ block.to_hidden.weight.T))


def positions_of(grid):
    return [torch.linspace(0, 3.0 + a, n, dtype=torch.double) ** 1.1 for a, n in enumerate(grid)]


def larger_kernels(module):
    """At initialisation the kernels are about 1e-5 and the normalisation's eps is all there is."""
    for part in module.modules():
        if isinstance(part, AxisKernel):
            for layer in (part.to_q, part.to_k):
                layer.weight.data.mul_(40)
    return module


@pytest.mark.parametrize("grid", ((9,), (5, 7), (4, 1, 3)), ids=str)
@pytest.mark.parametrize(
    "mode", (("parallel", "instance"), ("chained", "instance"), ("chained", "group")), ids="-".join
)
@pytest.mark.parametrize("initial", (True, False), ids=("initial", "trained"))
def test_block_equals_the_formulas(mode, grid, initial):
    block = FactorizedBlock(8, len(grid), 2, 4, mode=mode[0], normalisation=mode[1]).double()
    block = block if initial else larger_kernels(block)
    u, positions = torch.randn(2, *grid, 8, dtype=torch.double, requires_grad=True), positions_of(grid)
    got, want = block(u, positions), written_out(block, u, positions)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    leaves, weight = [u, *block.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_kernel_scaling_follows_the_multiplier():
    assert FactorizedBlock(8, 2, 2, 4, kernel_multiplier=3).kernels[0].scaling == 1.0
    assert FactorizedBlock(8, 2, 2, 4, kernel_multiplier=5).kernels[0].scaling == 20**-0.5


def test_kernel_between_two_grids():
    kernel = AxisKernel(8, 2, 6).double()
    s, keys = torch.randn(1, 5, 8, dtype=torch.double), torch.randn(1, 3, 8, dtype=torch.double)
    (p,), (q,) = positions_of((5,)), positions_of((3,))
    both = kernel(torch.cat([s, keys], 1), torch.cat([p, q]))
    torch.testing.assert_close(kernel(s, p, keys, q), both[..., :5, 5:])


def test_kernels_stay_float32_under_autocast(native):
    block = larger_kernels(FactorizedBlock(8, 2, 2, 4))
    u, positions = torch.randn(2, 5, 7, 8), [p.float() for p in positions_of((5, 7))]
    exact = block(u, positions)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = block.kernels[0](torch.randn(2, 5, 8).bfloat16(), positions[0])
        rounded = block(u, positions)
    assert kernel.dtype == torch.float32
    assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("axes", (2, 3))
def test_ifactformer_repeats_one_block(axes):
    model = larger_kernels(IFactFormerM(axes, 2, 3, 12, 2, 4, steps=3)).double()
    grid = (5, 4, 3)[:axes]
    x, positions = torch.randn(2, 2, *grid, 3, dtype=torch.double), positions_of(grid)
    u = F.gelu(torch.einsum("bt...f,fk->bt...fk", x, model.encoder.per_field.weight.view(3, 2))
               + model.encoder.per_field.bias.view(3, 2)).flatten(-2)  # fmt: skip
    u = torch.cat(u.unbind(1), -1) @ model.encoder.over_time.weight.T + model.positions(positions)
    for _ in range(3):
        u = u + written_out(model.block, u, positions) / 3
    expected = model.decoder(u)
    before = x.clone()
    torch.testing.assert_close(model(x, positions), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(x, before)
    model.increment = True
    torch.testing.assert_close(model(x, positions), x[:, -1] + expected, rtol=1e-8, atol=1e-10)


def test_ifactformer_rollout_feeds_results_back():
    model = IFactFormerM.from_config("tiny")
    x, positions = torch.randn(1, 2, 5, 4, 2), [p.float() for p in positions_of((5, 4))]
    first = model(x, positions)
    second = model(torch.stack([x[:, 1], first], 1), positions)
    torch.testing.assert_close(model.rollout(x, positions, 2), torch.stack([first, second], 1))


def test_factformer_chains_fresh_blocks():
    model = larger_kernels(FactFormer.from_config("tiny")).double()
    x, positions = torch.randn(2, 2, 5, 4, 2, dtype=torch.double), positions_of((5, 4))
    u = model.encoder(torch.cat(x.unbind(1), -1))
    for encode, block in zip(model.positions, model.blocks):
        u = u + written_out(block, u + encode(positions), positions)
    frames = []
    for step in range(3):
        u = model.propagator(u, step)
        frames.append(model.decoder(u))
    torch.testing.assert_close(model(x, positions, 3), torch.stack(frames, 1), rtol=1e-8, atol=1e-10)


def test_published_size():
    model = IFactFormerM.from_config("channel")
    assert sum(p.numel() for p in model.block.parameters()) == pytest.approx(1.144e6, rel=1e-3)


@pytest.mark.parametrize("model", (IFactFormerM, FactFormer))
def test_learns_a_shift(model):
    """A periodic field that moves by one point a frame."""
    torch.manual_seed(0)
    network = model.from_config("tiny")
    positions = [torch.linspace(0, 5, 6), torch.linspace(0, 5, 6)]
    first = torch.randn(8, 6, 6, 2).cumsum(1)
    frames = torch.stack([first.roll(t, 2) for t in range(3)], 1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        out = network(frames[:, :2], positions)
        loss = F.mse_loss(out if out.dim() == 4 else out[:, 0], frames[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_errors():
    with pytest.raises(ValueError, match="2 \\* fields must divide dim"):
        IFactFormerM(2, 2, 3, 10, 2, 4)
    model, positions = IFactFormerM.from_config("tiny"), positions_of((5, 4))
    with pytest.raises(ValueError, match="x must hold 2 frames"):
        model(torch.randn(1, 3, 5, 4, 2), positions)
    with pytest.raises(ValueError, match="u must have 2 grid axes"):
        model.block(torch.randn(1, 4, 5, 24), positions)
    with pytest.raises(ValueError, match="normalisation must be"):
        FactorizedBlock(8, 2, 2, 4, normalisation="layer")
