"""Flowformer and ARFlow: parameter names and counts, steps against the parallel form, states, masks, gradients."""

import doctest

import pytest
import torch

from flowattn.models import arflow, flowformer
from flowattn.models.arflow import ARFlow
from flowattn.models.flowformer import FlowformerEncoder, FlowformerLM, FlowformerVision


def make_lm(**options):
    torch.manual_seed(0)
    return FlowformerLM(17, 40, **options).eval()


def make_arflow():
    torch.manual_seed(0)
    model = ARFlow(img_size=8, preset="tiny", num_classes=10).eval()
    for parameter in model.parameters():  # adaLN-Zero starts at 0, where nothing could go wrong
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_vision():
    return FlowformerVision(5, img_size=32, embed_dims=(24, 24, 48, 48), depths=(1, 1, 2, 1))


def test_language_model_keys():
    keys = set(make_lm().state_dict())
    block = "transformer.h.2."
    attention = {f"attn.{name}_projection.{kind}" for name in ("query", "key", "value", "out") for kind in KINDS}
    rest = {f"{name}.{kind}" for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for kind in KINDS}
    assert {key.removeprefix(block) for key in keys if key.startswith(block)} == attention | rest
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias", "lm_head.weight"} <= keys
    assert "lm_head.bias" not in keys


KINDS = ("weight", "bias")


def test_gpt2_sized_language_model():
    """Shapes alone: GPT-2 has 124 million parameters with tied embeddings, 163 million untied."""
    with torch.device("meta"):
        model = FlowformerLM(50257, 1024, preset="gpt2")
    assert sum(p.numel() for p in model.parameters()) == 163_037_184


@torch.no_grad()
def test_steps_equal_the_parallel_form():
    model, ids = make_lm(), torch.randint(17, (2, 23))
    parallel = model(ids)
    state, rows = None, []
    for t in range(23):
        logits, state = model.step(ids[:, t], state)
        rows.append(logits)
    torch.testing.assert_close(torch.stack(rows, 1), parallel, rtol=0, atol=2e-6)
    first, middle = model(ids[:, :9], output_state=True)
    torch.testing.assert_close(first, parallel[:, :9], rtol=0, atol=2e-6)
    torch.testing.assert_close(model(ids[:, 9:], middle), parallel[:, 9:], rtol=0, atol=2e-6)


@torch.no_grad()
def test_generated_tokens_are_the_likeliest():
    model, ids = make_lm(), torch.randint(17, (2, 5))
    out = model.generate(ids, 6)
    assert out.shape == (2, 11) and torch.equal(out[:, :5], ids)
    assert torch.equal(model(out[:, :-1])[:, 4:].argmax(-1), out[:, 5:])


@torch.no_grad()
def test_language_model_is_causal():
    model, ids = make_lm(clamp=5.0), torch.randint(17, (1, 20))
    before = model(ids)
    ids[:, 12:] = (ids[:, 12:] + 1) % 17
    after = model(ids)
    assert torch.equal(after[:, :12], before[:, :12]) and not torch.equal(after[:, 12:], before[:, 12:])


def make_encoder(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64}
    return FlowformerEncoder(3, 11, 4, **sizes, **options).eval()


def test_series_keys():
    keys = set(make_encoder().state_dict())
    assert {"pos_enc.pe", "project_inp.weight", "encoder.norm.bias", "output_layer.weight"} <= keys
    layer = {key.removeprefix("encoder.attn_layers.1.") for key in keys if key.startswith("encoder.attn_layers.1.")}
    attention = {f"attention.{name}_projection.{kind}" for name in ("query", "key", "value", "out") for kind in KINDS}
    assert layer == attention | {f"{name}.{kind}" for name in ("conv1", "conv2", "norm1", "norm2") for kind in KINDS}
    assert make_encoder().pos_enc.pe.shape == (11, 1, 32)


@torch.no_grad()
def test_series_padding_reaches_the_logits_only_through_attention():
    x, mask = torch.randn(2, 11, 3), torch.arange(11) < torch.tensor([[11], [6]])
    changed = torch.where(mask[..., None], x, x + 1)
    for learnable in (False, True):
        masked, plain = (make_encoder(mask_attention=m, learnable_positions=learnable) for m in (True, False))
        torch.testing.assert_close(masked(x, mask), masked(changed, mask), rtol=0, atol=1e-6)
        assert (plain(x, mask)[1] - plain(changed, mask)[1]).abs().max() > 1e-4
        torch.testing.assert_close(plain(x), masked(x))


def test_vision_keys_and_size():
    keys = set(make_vision().state_dict())
    assert {"pos_embed", "patch_embed.0.proj.weight", "patch_embed.3.proj.bias", "norm.weight", "head.bias"} <= keys
    block = {key.removeprefix("blocks.2.1.") for key in keys if key.startswith("blocks.2.1.")}
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert block == {f"{name}.{kind}" for name in layers for kind in KINDS} | {"gamma"}
    with torch.device("meta"):
        full = FlowformerVision()
    assert full.pos_embed.shape == (1, 3136, 96)
    assert [blocks[0].attn.qkv.in_features // 12 for blocks in full.blocks] == [8, 16, 32, 64]


def test_every_parameter_of_the_vision_model_gets_a_gradient():
    model = make_vision().double()
    y = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert y.shape == (2, 5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_arflow_keys():
    keys = set(ARFlow(img_size=8, preset="tiny").state_dict())
    attention = {f"attn.{name}_proj.weight" for name in ("q", "k", "v", "g", "gt", "out")}
    rest = {f"{name}.{kind}" for name in ("mlp.fc1", "mlp.fc2", "adaLN_modulation.1") for kind in KINDS}
    assert {key.removeprefix("blocks.1.") for key in keys if key.startswith("blocks.1.")} == attention | rest
    names = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias", "pos_embed")
    names += ("y_embedder.embedding_table.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias")
    assert set(names) <= keys


def test_arflow_published_shapes():
    with torch.device("meta"):
        model = ARFlow(preset="XL/2")
    assert model.pos_embed.shape == (1, 256, 1152) and len(model.blocks) == 28
    assert model.blocks[0].attn.gt_proj.weight.shape == (18, 1152)


def test_arflow_starts_at_zero():
    model = ARFlow(img_size=8, preset="tiny")
    assert model(torch.randn(1, 2, 4, 8, 8), torch.rand(1, 2), torch.tensor([0])).eq(0).all()


@torch.no_grad()
def test_arflow_images_one_by_one_equal_all_at_once():
    model, x, t, y = make_arflow(), torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4).sort(1).values, torch.tensor([3, 10])
    whole, last = model(x, t, y, output_state=True)
    state, outs = None, []
    for i in range(4):
        out, state = model(x[:, i : i + 1], t[:, i : i + 1], y, state=state, output_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
    for one, other in zip(state, last):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.equal(model(changed, t, y)[:, :3], whole[:, :3])


def test_arflow_patches_return_to_their_place():
    model = ARFlow(img_size=8, preset="tiny")
    patches = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 16)
    image = model._unpatchify(patches)
    assert image.shape == (1, 1, 4, 8, 8)
    assert torch.equal(image[0, 0, 1, ::2, ::2], torch.arange(16.0).view(4, 4))
    channels = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 16, 16)  # (row, column, channel) of a patch
    assert torch.equal(model._unpatchify(channels)[0, 0, 2, :2, :2], torch.tensor([[2.0, 6.0], [10.0, 14.0]]))


def test_every_parameter_of_arflow_gets_a_gradient():
    model, t = make_arflow(), torch.rand(2, 3).sort(1).values
    model(torch.randn(2, 3, 4, 8, 8), t, torch.tensor([1, 2])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert name == "pos_embed" or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", (make_lm, make_vision, make_arflow))
def test_compiles_without_graph_breaks(native, make):
    model = make().eval()
    arguments = {
        make_lm: (torch.randint(17, (2, 9)),),
        make_vision: (torch.randn(1, 3, 32, 32),),
        make_arflow: (torch.randn(1, 2, 4, 8, 8), torch.rand(1, 2), torch.tensor([1])),
    }[make]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize(
    "text, call",
    (
        ("FlowformerLM: preset must be", lambda: FlowformerLM(5, 5, preset="huge")),
        ("Flowformer: num_heads must divide", lambda: FlowformerLM(5, 5, d_model=50)),
        ("FlowformerLM: at most block_size=40", lambda: make_lm()(torch.zeros(1, 41, dtype=torch.int64))),
        ("FlowformerEncoder: x must have shape", lambda: make_encoder()(torch.zeros(2, 5, 3))),
        ("FlowformerVision: img_size", lambda: FlowformerVision(img_size=100)),
        ("FlowformerVision: num_heads must divide", lambda: FlowformerVision(num_heads=5)),
        ("ARFlow: preset must be", lambda: ARFlow(preset="XXL")),
        ("ARFlow: t must have shape", lambda: make_arflow()(torch.zeros(1, 2, 4, 8, 8), torch.zeros(1), None)),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(text, call):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("module", (flowformer, arflow))
def test_docstrings(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
