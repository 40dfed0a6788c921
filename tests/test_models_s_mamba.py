"""SMamba against its definition: a loop over tokens, flips, and torch's own convolution."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from flowattn.models import s_mamba
from flowattn.models.s_mamba import PRESETS, Mamba, SMamba


def mamba_by_definition(block, x):
    """A causal Mamba block, one token at a time."""
    length, width = x.shape[1], block.D.shape[0]
    u, z = block.in_proj(x).chunk(2, -1)
    conv = block.conv1d
    padding = conv.weight.shape[2] - 1
    u = F.conv1d(u.transpose(1, 2), conv.weight, conv.bias, padding=padding, groups=width)[..., :length]
    u = F.silu(u.transpose(1, 2))
    N = block.A_log.shape[1]
    steps, B, C = block.x_proj(u).split((block.dt_rank, N, N), -1)
    d, A = F.softplus(block.dt_proj(steps)), -torch.exp(block.A_log)
    state, ys = x.new_zeros(x.shape[0], width, N), []
    for t in range(length):
        state = torch.exp(d[:, t, :, None] * A) * state + (d[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1) + block.D * u[:, t])
    return block.out_proj(torch.stack(ys, 1) * F.silu(z))


def layer_by_definition(layer, x):
    y = mamba_by_definition(layer.attention, x) + mamba_by_definition(layer.attention_r, x.flip(1)).flip(1)
    x = layer.norm1(x + y)
    y = layer.conv2(F.gelu(layer.conv1(x.transpose(1, 2)))).transpose(1, 2)
    return layer.norm2(x + y)


def model_by_definition(model, x, marks=None):
    mean, scale = x.mean(1, keepdim=True), torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
    tokens = ((x - mean) / scale).transpose(1, 2)
    tokens = tokens if marks is None else torch.cat([tokens, marks.transpose(1, 2)], 1)
    hidden = model.enc_embedding.value_embedding(tokens)
    for layer in model.encoder.attn_layers:
        hidden = layer_by_definition(layer, hidden)
    out = model.projector(model.encoder.norm(hidden)).transpose(1, 2)[..., : x.shape[2]]
    return out * scale + mean


def tiny(**options):
    return SMamba.from_preset("tiny", 12, 3, **options).eval()


@pytest.mark.parametrize("d_conv, expand", ((2, 1), (4, 2), (1, 1)))
@pytest.mark.parametrize("length", (1, 2, 9))
def test_block_in_both_directions(length, d_conv, expand):
    block, x = Mamba(20, 3, d_conv=d_conv, expand=expand).double(), torch.randn(2, length, 20, dtype=torch.float64)
    torch.testing.assert_close(block(x), mamba_by_definition(block, x), rtol=0, atol=1e-12)
    reverse = mamba_by_definition(block, x.flip(1)).flip(1)
    torch.testing.assert_close(block(x, reverse=True), reverse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("marks", (False, True), ids=("series", "with_marks"))
def test_model_and_its_gradients(marks):
    model, x = tiny().double(), torch.randn(2, 12, 7, dtype=torch.float64)
    marks = torch.randn(2, 12, 2, dtype=torch.float64) if marks else None
    results = []
    for call in (model, lambda *inputs: model_by_definition(model, *inputs)):
        out = call(x, marks)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for got, true in zip(*results):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1:])


def test_float32_and_autocast():
    model, x = tiny(), torch.randn(4, 12, 30)
    expected = model_by_definition(model, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_every_series_sees_every_other():
    model, x = tiny(), torch.randn(1, 12, 5)
    x.requires_grad_()
    for series in (0, 4):
        (gradient,) = torch.autograd.grad(model(x)[0, :, series].sum(), x)
        assert gradient[0].abs().amax(0).min() > 0


def test_names_of_the_published_state_dict():
    names = set(tiny(num_layers=1).state_dict())
    block = ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
             "dt_proj.bias", "out_proj.weight")  # fmt: skip
    layer = [f"{part}.{name}" for part in ("attention", "attention_r") for name in block]
    layer += [f"{part}.{name}" for part in ("conv1", "conv2", "norm1", "norm2") for name in ("weight", "bias")]
    expected = {f"encoder.attn_layers.0.{name}" for name in layer}
    expected |= {f"{part}.{name}" for part in ("enc_embedding.value_embedding", "encoder.norm", "projector")
                 for name in ("weight", "bias")}  # fmt: skip
    assert names == expected


def test_published_sizes():
    """The parameters of a block by its formula: d_model 512, N 32, dt_rank 32, convolution of width 2."""
    d, N, rank = 512, 32, 32
    block = 2 * d * d + (2 * d + d) + d * (rank + 2 * N) + (rank * d + d) + d * N + d + d * d
    assert sum(p.numel() for p in Mamba(d, N).parameters()) == block
    model = SMamba.from_preset("traffic", 96, 96)
    layer = 2 * block + 2 * d * 512 + d + 512 + 4 * d
    assert sum(p.numel() for p in model.parameters()) == 4 * layer + (96 * d + d) + 2 * d + (d * 96 + 96)
    assert all(len(SMamba.from_preset(name, 24, 12).encoder.attn_layers) == PRESETS[name]["num_layers"]
               for name in ("tiny", "ettm1"))  # fmt: skip


def test_initial_steps_and_decays():
    block = Mamba(64, 16)
    steps = F.softplus(block.dt_proj.bias)
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1 and steps.std() > 0.01
    torch.testing.assert_close(-torch.exp(block.A_log), -torch.arange(1.0, 17.0).expand(64, 16))


def test_compiles_without_graph_breaks(native):
    model, x = tiny(), torch.randn(2, 12, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "text, call",
    (
        ("preset must be one of", lambda: SMamba.from_preset("huge", 12, 3)),
        ("activation must be", lambda: tiny(activation="tanh")),
        (r"x must have shape \(B, 12, V\)", lambda: tiny()(torch.zeros(2, 11, 5))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(text, call):
    with pytest.raises(ValueError, match=f"SMamba: {text}"):
        call()


def test_docstring():
    assert doctest.testmod(s_mamba, extraglobs={"torch": torch}).failed == 0
