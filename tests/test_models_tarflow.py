"""TarFlow and STARFlow: the definition, round trips, labels, checkpoints, likelihood, denoising."""

import doctest
import math

import pytest
import torch
from flow_oracle import spread, tarflow_forward, toy, toy_star

import flowattn as fa
from flowattn.models import causal_flow, starflow, tarflow
from flowattn.models.starflow import STARFlow, axial_rope
from flowattn.models.tarflow import TarFlow

backends = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
METHODS = ("sequential", "jacobi", "gs_jacobi", "frontier")
F64 = torch.float64


def test_forward_is_the_definition(device):
    model = toy(0.1, F64).to(device)
    x, labels = torch.randn(3, 2, 8, 8, dtype=F64, device=device), torch.tensor([2, -1, 0], device=device)
    z, logdet = model(x, labels)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    for i, label in enumerate(labels.tolist()):
        tokens = torch.nn.functional.unfold(x[i : i + 1].cpu(), 2, stride=2)[0].T
        expected, total = tarflow_forward(tokens, state, 2, 2, 2, label)
        torch.testing.assert_close(z[i].cpu(), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(logdet[i].cpu(), total, rtol=0, atol=1e-11)


@backends
@pytest.mark.parametrize("make", [toy, toy_star])
@torch.no_grad()
def test_round_trip_in_float64(make, place):
    model = make(0.1, F64).to(place)
    x = torch.randn(3, model.in_channels, *(g * model.patch_size for g in model.grid), dtype=F64, device=place)
    y = torch.tensor([1, -1, 2]) if make is toy else torch.randn(3, 3, 6, dtype=F64)
    z, _ = model(x, y.to(place))
    for method in METHODS:
        back, info = model.inverse(z, y.to(place), method=method, return_info=True, atol=1e-13, rtol=1e-13)
        assert (back - x).abs().max() <= 1e-10 * max(1.0, x.abs().max().item()), method
        assert (info.status == fa.InverseStatus.CONVERGED).all()
        assert info.method == (method,) * 2 and info.sweeps.shape == (2, 3)


@backends
@torch.no_grad()
def test_round_trip_in_float32(place):
    model = toy(0.05).to(place)
    x, labels = torch.randn(4, 2, 8, 8, device=place), torch.tensor([0, 1, 2, -1], device=place)
    z, _ = model(x, labels)
    assert (model.inverse(z, labels) - x).abs().max() <= 1e-5 * x.abs().max()


@backends
@torch.no_grad()
def test_labels(place):
    """A negative label is the average class, as no label is, in both directions and beside others."""
    model, x = toy(0.1).to(place), torch.randn(2, 2, 8, 8, device=place)
    mixed = torch.tensor([-1, 2], device=place)
    z, _ = model(x, mixed)
    torch.testing.assert_close(z[:1], model(x[:1])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(z[1:], model(x[1:], mixed[1:])[0], rtol=0, atol=1e-5)
    assert (z[1] - model(x)[0][1]).abs().max() > 1e-3
    torch.testing.assert_close(model.inverse(z, mixed), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.inverse(z[:1]), x[:1], rtol=0, atol=1e-4)


def test_log_determinant_is_that_of_the_jacobian(device):
    model = toy(0.1, F64, channels=32, layers_per_block=1, num_classes=0).to(device)
    x = torch.randn(1, 2, 8, 8, dtype=F64, device=device)[..., :8, :8]
    jacobian = torch.autograd.functional.jacobian(lambda t: model(t)[0].flatten(), x).reshape(128, 128)
    torch.testing.assert_close(model(x)[1][0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)
    z, logdet = model(x)
    expected = logdet - 0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2))
    torch.testing.assert_close(model.log_prob(x), expected)
    nats = model.loss(x) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(model.log_prob(x).mean(), -128 * nats)


def test_published_checkpoints_load():
    model = toy(num_classes=3)
    state = model.state_dict()
    names = {name.split(".", 2)[-1] for name in state if name.startswith("blocks.1.")}
    layer = {"attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0", "mlp.main.2"}
    expected = {f"attn_blocks.{i}.{part}.{end}" for i in range(2) for part in layer for end in ("weight", "bias")}
    expected |= {f"{part}.{end}" for part in ("proj_in", "proj_out") for end in ("weight", "bias")}
    assert names == expected | {"pos_embed", "class_embed"}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["var"] == shapes["blocks.0.pos_embed"][:1] + (8,) == (16, 8)
    assert shapes["blocks.0.class_embed"] == (3, 1, 64) and shapes["blocks.0.proj_out.weight"] == (16, 64)
    published = {**state, **{f"blocks.{k}.attn_mask": torch.ones(16, 16).tril() for k in range(2)}}
    fresh = toy(0.0)
    fresh.load_state_dict(published, strict=True)
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(fresh(x)[0], model(x)[0])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**published, "blocks.0.extra": torch.zeros(1)}, strict=True)


def test_starflow_checkpoints_load():
    model = toy_star(norm="rms", qk_norm=True, post_norm=True)
    state = model.state_dict()
    for name in ("blocks.0.sos_embed", "blocks.1.proj_txt.weight", "blocks.1.final_norm.weight"):
        assert name in state
    assert state["blocks.0.sos_embed"].shape == (1, 1, 3) and "blocks.0.proj_txt.weight" not in state
    extra = {"feat_rope.freqs_cos": torch.zeros(3), "feat_rope.freqs_sin": torch.zeros(3)}
    toy_star(norm="rms", qk_norm=True, post_norm=True).load_state_dict({**state, **extra}, strict=True)


@pytest.mark.parametrize("name, millions", [("imagenet64", 454), ("imagenet128-cond", 807)])
def test_published_configurations(name, millions):
    """The published counts leave out the tables of positions and classes."""
    with torch.device("meta"):
        model = TarFlow.from_config(name)
    counted = (p.numel() for key, p in model.named_parameters() if not key.endswith("_embed"))
    assert round(sum(counted) / 1e6) == millions
    assert model.tokens == 1024 and len(model.blocks) == 8


@torch.no_grad()
def test_a_new_model_is_the_identity(device):
    for model in (TarFlow(2, 8, 2, 64, 2, 1), STARFlow(2, 8, 2, 64, layers=(1, 1))):
        x = torch.randn(2, 2, 8, 8)
        z, logdet = model(x)
        torch.testing.assert_close(model.to_images(z), x, rtol=0, atol=1e-6)
        assert logdet.abs().max() < 1e-4


def test_patch_layouts():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    slow, fast = (causal_flow.patchify(x, 2, layout) for layout in causal_flow.PATCH_LAYOUTS)
    assert slow[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]  # channel, row, column
    assert fast[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]  # row, column, channel
    for tokens, layout in zip((slow, fast), causal_flow.PATCH_LAYOUTS):
        assert torch.equal(causal_flow.unpatchify(tokens, 2, 2, (2, 3), layout), x)


@torch.no_grad()
def test_volume_preserving_variant(device):
    model = spread(TarFlow(2, 8, 2, 64, 2, 1, nvp=False), 0.1).double().to(device)
    x = torch.randn(2, 2, 8, 8, dtype=F64, device=device)
    z, logdet = model(x)
    assert torch.equal(logdet, torch.zeros_like(logdet)) and (z - model.to_tokens(x)).abs().max() > 0.1
    torch.testing.assert_close(model.inverse(z), x, rtol=0, atol=1e-11)
    model.var.fill_(4.0)
    assert 1.5 < model.noise(500).std() < 2.5
    difference = model.log_prob(x) + 0.5 * (z.square() / 4 + math.log(8 * math.pi)).sum((1, 2))
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-9)


STAR = (
    {},
    {"norm": "rms", "qk_norm": True, "post_norm": True, "mlp": "gated"},
    {"kv_heads": 1, "bias": False},
    {"scale": "exp", "soft_clip": 0.0, "final_norm": False},
    {"cond_top_only": False, "reverse_first": False},
)


@backends
@pytest.mark.parametrize("options", STAR, ids=lambda o: "-".join(o) or "default")
@torch.no_grad()
def test_starflow_options(options, place):
    model = toy_star(0.03, F64, **options).to(place)
    x, text = torch.randn(2, 3, 4, 4, dtype=F64, device=place), torch.randn(2, 3, 6, dtype=F64, device=place)
    z, _ = model(x, text)
    assert (model(x)[0] - z).abs().max() > 1e-4, "the text must matter"
    for method in ("sequential", "frontier"):
        torch.testing.assert_close(model.inverse(z, text, method=method), x, rtol=0, atol=1e-10)
    guided = model.inverse(z, text, guidance=2.0, guidance_rule="gaussian_ratio")
    assert (guided - x).abs().max() > 1e-4 and guided.isfinite().all()


def test_axial_rope():
    cos, sin = axial_rope((2, 3), 32, text_len=4)
    assert cos.shape == (10, 16) and torch.equal(cos[4], torch.ones(16))  # the first patch: no turn at all
    angle = torch.atan2(sin, cos)
    assert torch.equal(angle[:4, 8:], torch.zeros(4, 8)) and torch.equal(angle[4:, :8], torch.zeros(6, 8))
    # Patch 5 is row 1, column 2: four angles each, the slowest 10000^(-3/4).
    expected = torch.tensor([10000.0 ** (-j / 4) for j in range(4)])
    torch.testing.assert_close(angle[9, 8:12], expected)
    torch.testing.assert_close(angle[9, 12:], 2 * expected)
    plain = axial_rope((2, 3), 32, pt_seq_len=2 * 6**0.5)
    torch.testing.assert_close(plain[0][1, 8], torch.tensor(2.0).cos())


@torch.no_grad()
def test_start_vector_transforms_every_token(device):
    model = toy_star(0.2, F64, soft_clip=0.0).to(device)
    x = torch.randn(1, 3, 4, 4, dtype=F64, device=device)
    other = model(x)[0] - model.to_tokens(x)
    assert (other.abs().amax((0, 2)) > 1e-6).all()
    model = toy(0.2, F64, num_blocks=1, num_classes=0).to(device)
    x = torch.randn(1, 2, 8, 8, dtype=F64, device=device)
    assert torch.equal(model(x)[0][:, 0], model.to_tokens(x)[:, 0])


def test_denoise_is_a_tweedie_step(device):
    model = toy(0.1, F64).to(device)
    x, labels = torch.randn(2, 2, 8, 8, dtype=F64, device=device), torch.tensor([0, 1], device=device)
    leaf = x.clone().requires_grad_()
    loss = torch.stack([model.loss(leaf[i : i + 1], labels[i : i + 1]) for i in range(2)]).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = x - 0.9 * 0.05**2 * x.numel() * gradient
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(x, labels, noise_std=0.05, eta=0.9), expected)


@torch.no_grad()
def test_guidance_of_a_model(device):
    """Each block guided by hand, in the order of the inverse."""
    model = toy(0.02, F64).to(device)
    z, labels = torch.randn(2, 16, 8, dtype=F64, device=device), torch.tensor([0, 2], device=device)
    expected = z
    for number in (1, 0):
        block = model.blocks[number]
        conditions = {"cond": block.condition(labels, 2), "cond_uncond": block.condition(None, 2)}
        permutation = "reverse" if number else None
        expected = fa.flow_inverse(expected, block, permutation=permutation, guidance=1.5, **conditions)
    torch.testing.assert_close(model.to_tokens(model.inverse(z, labels, guidance=1.5)), expected)
    plain = model.inverse(z, labels)
    assert torch.equal(model.inverse(z, labels, guidance=1.5, guided_blocks=()), plain)
    assert torch.equal(model.inverse(z, None, guidance=1.5), model.inverse(z, None))


@torch.no_grad()
def test_one_bad_sample_is_redrawn_alone():
    model = toy(0.02)
    z = model.noise(3)
    z[1, 4, 0] = float("nan")
    x, info = model.inverse(z, return_info=True)
    clean = model.inverse(z[::2])
    torch.testing.assert_close(x[::2], clean, rtol=0, atol=1e-5)
    assert (info.status == fa.InverseStatus.NONFINITE).any(0).tolist() == [False, True, False]
    fresh, again, which = tarflow.resample_bad(model, z, info)
    assert which.tolist() == [1] and again.shape == (1, 2, 8, 8) and again.isfinite().all()


def test_training_lowers_the_loss():
    model = TarFlow(1, 8, 2, 64, 2, 1)
    x = torch.randn(64, 1, 8, 8) * 0.3 + torch.linspace(-1, 1, 8)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(30):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@torch.no_grad()
def test_half_precision_weights(device):
    """float32 noise with bfloat16 weights: no worse than plain autocast, which also rounds the activations."""
    model = toy(0.05).to(device)
    x = torch.randn(2, 2, 8, 8, device=device)
    z, _ = model(x)
    half = toy(0.05).to(device).bfloat16()
    rounded = toy(0.05).to(device)
    rounded.load_state_dict(half.state_dict())
    exact = rounded.inverse(z)
    got = half.inverse(z)
    assert got.dtype == torch.float32
    with fa.use_backend("reference"):
        reference = half.inverse(z)
    allowed = 3e-2 * exact.abs().max()
    assert (got - exact).abs().max() <= allowed and (reference - exact).abs().max() <= allowed
    if device == "cpu":  # widened: the products run in float32
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "text, call",
    (
        ("patch_size must divide", lambda: TarFlow(1, 8, 3, 64, 1, 1)),
        (r"x must have shape \(B, 2, 8, 8\)", lambda: toy()(torch.zeros(1, 2, 8, 9))),
        (r"z must have shape \(B, 16, 8\)", lambda: toy().inverse(torch.zeros(1, 2, 8, 8))),
        ("patch_layout must be", lambda: causal_flow.CausalFlow(1, 8, 2, [], patch_layout="x")),
        ("channels must be a multiple", lambda: TarFlow(1, 8, 2, 65, 1, 1)),
        ("text_dim and text_len", lambda: STARFlow(1, 4, 1, 64, (1,), text_dim=3)),
        (r"y must have shape \(2, 3, 6\)", lambda: toy_star()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(text, call):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("module", [tarflow, starflow, causal_flow])
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0
