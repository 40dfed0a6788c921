"""ViR: equal forms, parameter names and counts, causality, the compatible softmax."""

import doctest

import pytest
import torch

import flowattn as fa
from flowattn.models import vir
from flowattn.models.vir import ViR


def make(**options):
    torch.manual_seed(0)
    model = ViR.of_size("tiny", img_size=32, patch_size=8, num_classes=7, layer_scale=0.5, **options)
    return model.double().eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def test_forms_are_equal():
    model, x = make(), images()
    outputs = [model(x, form=form) for form in vir.FORMS]
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-10, atol=1e-12)


def test_gradients_of_the_forms_are_equal():
    model, x = make(), images()
    grads = [torch.autograd.grad(model(x, form=form).square().sum(), list(model.parameters())) for form in vir.FORMS]
    for other in grads[1:]:
        for got, want in zip(other, grads[0]):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_both_directions():
    model, x = make(bidirectional=True), images()
    torch.testing.assert_close(model(x), model(x, form="parallel"), rtol=1e-10, atol=1e-12)
    assert (model(x) - make()(x)).abs().max() > 1e-6
    with pytest.raises(NotImplementedError, match="one direction"):
        model(x, form="recurrent")


def test_tokens_see_none_that_come_later():
    block, x = make().blocks[0], torch.randn(1, 9, 64, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] = 0
    for form in ("chunkwise", "parallel"):
        assert torch.equal(block(x, form)[:, :5], block(changed, form)[:, :5])


def test_the_compatible_softmax_looks_ahead():
    block, x = make(softmax_compat=True).blocks[0], torch.randn(1, 9, 64, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] = 0
    assert (block(x, "parallel")[:, 0] - block(changed, "parallel")[:, 0]).abs().max() > 1e-6
    q, k, v = block.retention.heads(block.norm1(x))
    out = block.retention.parallel(q, k, v)
    first = torch.einsum("bhd,bhd->bh", q[:, 0], k[:, 0]) * 32**-0.5  # against itself; the rest of the row is 0
    weights = torch.cat([first[..., None], torch.zeros(1, 2, 8)], -1).softmax(-1)
    torch.testing.assert_close(out[:, 0], torch.einsum("bhj,bjhd->bhd", weights, v))


@pytest.mark.parametrize("size, millions", (("small", 22.1), ("base", 86.6), ("large", 304.4)))
def test_published_sizes(size, millions):
    """Those of the vision Transformers of the same names, and two layer scales a block."""
    with torch.device("meta"):
        model = ViR.of_size(size)
    count = sum(x.numel() for x in model.parameters()) / 1e6
    assert abs(count - millions) < 0.1
    names = set(model.state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.bias"} <= names
    block = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    parts = ("norm1", "norm2", "retention.qkv", "retention.out_proj", "mlp.fc1", "mlp.fc2")
    assert block == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")} | {"ls1.gamma", "ls2.gamma"}
    assert model.pos_embed.shape == (1, 196, model.norm.weight.shape[0])


def test_trains_on_a_backend(device):
    torch.manual_seed(0)
    model = ViR.of_size("tiny", img_size=16, patch_size=8, num_classes=2, layer_scale=0.5).to(device)
    x, y = torch.randn(8, 3, 16, 16, device=device), torch.arange(8, device=device) % 2
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_errors():
    with pytest.raises(ValueError, match="form must be one of"):
        make()(images(), form="linear")
    with pytest.raises(ValueError, match="patch_size must divide"):
        ViR(img_size=30)
    with pytest.raises(ValueError, match="size must be one of"):
        ViR.of_size("huge")


def test_docstrings():
    assert doctest.testmod(vir, extraglobs={"torch": torch, "fa": fa}).failed == 0
