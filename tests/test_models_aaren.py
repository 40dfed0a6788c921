"""Aaren: parameter counts, parallel against streamed, packed against padded, fused against plain."""

import doctest

import pytest
import torch
from torch import nn

from flowattn.models import aaren
from flowattn.models.aaren import Aaren

VARIANTS = [(norm, residual) for norm in ("post", "pre") for residual in ("input", "query")]


def make(norm="post", residual="input", layers=3):
    return Aaren(32, 4, layers, 64, norm=norm, residual=residual).eval()


def stream(model, x):
    state, outs = model.init_state(x.shape[0]), []
    for t in range(x.shape[1]):
        out, state = model.step(x[:, t], state)
        outs.append(out)
    return torch.stack(outs, 1), state


def test_published_parameter_counts():
    """One layer of the paper: a Transformer layer and 512 numbers for the query token."""
    count = sum(p.numel() for p in Aaren(512, 8, 1, 2048).parameters())
    transformer = nn.TransformerEncoderLayer(512, 8, 2048)
    assert count == 3_152_896
    assert sum(p.numel() for p in transformer.parameters()) == 3_152_384


@pytest.mark.parametrize("norm, residual", VARIANTS)
def test_streaming_equals_parallel(norm, residual):
    model, x = make(norm, residual), torch.randn(2, 19, 32)
    with torch.no_grad():
        parallel, state = model(x, output_state=True)
        streamed, last = stream(model, x)
    torch.testing.assert_close(streamed, parallel, rtol=0, atol=5e-6)
    for one, other in zip(last, state):
        torch.testing.assert_close(one.read(), other.read(), rtol=0, atol=5e-6)


@torch.no_grad()
def test_blocks_of_tokens_continue_a_stream():
    model, x = make(), torch.randn(2, 19, 32)
    first, state = model(x[:, :7], output_state=True)
    second = model(x[:, 7:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x), rtol=0, atol=5e-6)


@torch.no_grad()
def test_packed_and_padded_batches_agree():
    model, lengths = make(), [5, 1, 9]
    x = torch.randn(3, 9, 32)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    packed = model(x[mask][None], cu_seqlens=torch.tensor([0, 5, 6, 15]))
    torch.testing.assert_close(model(x, mask=mask)[mask], packed[0], rtol=0, atol=5e-6)
    x[~mask] = float("nan")
    assert model(x, mask=mask)[mask].isfinite().all()


@torch.no_grad()
def test_is_causal():
    model, x = make(), torch.randn(1, 9, 32)
    before = model(x)
    x[:, 6:] += 1
    after = model(x)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("norm, residual", VARIANTS)
@torch.no_grad()
def test_fused_inference(norm, residual):
    model, x = make(norm, residual), torch.randn(2, 19, 32)
    plain = model(x)
    fused = model.fuse_inference()
    torch.testing.assert_close(fused(x), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(stream(fused, x)[0], plain, rtol=0, atol=1e-5)
    assert fused.layers[0].fused is not None
    assert torch.equal(fused.train().eval()(x), plain)


def test_layer_equals_attention_with_a_repeated_query():
    layer, x = make(layers=1).layers[0], torch.randn(2, 11, 32)
    query = layer.q_proj(layer.query_token).view(1, 4, 1, 8).expand(2, 4, 11, 8)
    keys, values = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
    attended = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    y = layer.norm1(x + layer.out_proj(attended.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(layer(x)[0], layer.norm2(y + layer.ffn(y)), rtol=0, atol=5e-6)


def test_every_parameter_gets_a_gradient_and_float64_works():
    model = make().double().train()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        # A constant added to all scores changes no weight, so the bias of the keys has gradient 0.
        assert parameter.grad is not None, name
        assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 1e-9, name


def test_compiles_without_graph_breaks(native):
    model, x = make(), torch.randn(2, 6, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_state_has_the_size_it_says():
    model = make()
    numbers = sum(part.numel() for state in model.init_state(1) for part in state)
    assert numbers == 3 * (32 + 2 * 4)


@pytest.mark.parametrize(
    "text, call",
    (
        ("num_heads must divide", lambda: Aaren(30, 4, 1, 8)),
        ("norm must be", lambda: Aaren(32, 4, 1, 8, norm="rms")),
        ("residual must be", lambda: Aaren(32, 4, 1, 8, residual="none")),
        (r"x must have shape \(B, T, 32\)", lambda: make()(torch.zeros(2, 32))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(text, call):
    with pytest.raises(ValueError, match=f"Aaren: {text}"):
        call()


def test_docstring():
    assert doctest.testmod(aaren).failed == 0
