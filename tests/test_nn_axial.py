"""nn.AxialAttention against attention on permuted copies."""

import pytest
import torch
import torch.nn.functional as F

from flowattn.nn import AxialAttention


def permuted(module, x, axis, layer):
    """One axis: permute it before the channels, copy, attend, permute back."""
    x = x.movedim(axis, -2).contiguous()
    q, kv = F.linear(x, layer.to_q.weight), F.linear(x, layer.to_kv.weight)
    q, k, v = (y.unflatten(-1, (module.heads, -1)).transpose(-3, -2) for y in (q, *kv.chunk(2, -1)))
    out = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
    return F.linear(out, layer.to_out.weight, layer.to_out.bias).movedim(-2, axis)


def plain(module, x):
    x = x.movedim(module.dim_index, -1)
    layers = [axis.fn for axis in module.axial_attentions]
    if module.sum_axial_out:
        x = sum(permuted(module, x, axis, layer) for axis, layer in enumerate(layers, 1))
    else:
        for axis, layer in enumerate(layers, 1):
            x = permuted(module, x, axis, layer)
    return x.movedim(-1, module.dim_index)


CASES = (
    ({"dim": 16, "heads": 4}, (2, 5, 7, 16)),
    ({"dim": 16, "heads": 4, "sum_axial_out": False}, (2, 5, 7, 16)),
    ({"dim": 12, "num_dimensions": 3, "heads": 2, "dim_heads": 8, "dim_index": 1}, (2, 12, 3, 5, 4)),
    ({"dim": 12, "num_dimensions": 1, "heads": 3, "dim_index": 2}, (2, 9, 12)),
)


@pytest.mark.parametrize(("options", "shape"), CASES, ids=("sum", "chain", "channels_first", "one_axis"))
def test_equals_permuted_attention(options, shape):
    module, x = AxialAttention(**options), torch.randn(shape, requires_grad=True)
    got, want = module(x), plain(module, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    leaves, weight = [x, *module.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_names_of_the_published_module():
    shapes = {name: tuple(p.shape) for name, p in AxialAttention(16, heads=4, dim_heads=3).state_dict().items()}
    one = {"to_q.weight": (12, 16), "to_kv.weight": (24, 16), "to_out.weight": (16, 12), "to_out.bias": (16,)}
    assert shapes == {f"axial_attentions.{i}.fn.{name}": shape for i in (0, 1) for name, shape in one.items()}


def test_errors():
    with pytest.raises(ValueError, match="heads must divide dim"):
        AxialAttention(10, heads=4)
    with pytest.raises(ValueError, match="dim_index must be"):
        AxialAttention(8, dim_index=0)
    with pytest.raises(ValueError, match="x must have 4 dims, 8 channels at 3"):
        AxialAttention(8)(torch.randn(1, 3, 8))
