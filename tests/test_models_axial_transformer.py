"""AxialTransformer: what each logit may depend on, and cached sampling against naive sampling."""

import math

import pytest
import torch

from flowattn.models.axial_transformer import CONFIGS, AxialTransformer


def model_of(shape, channels=2, levels=5, **options):
    """A model with weights of size one, where the initial ones would hide a wrong dependence."""
    model = AxialTransformer(shape, channels, levels=levels, dim=16, heads=2, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.split(".")[-2] in ("proj", "fc2", "head"):
                parameter.normal_(std=0.3)
    return model


def gumbel(*shape):
    return -torch.log(-torch.log(torch.rand(shape).clamp(1e-9, 1 - 1e-7)))


SHAPES = ((7,), (3, 4), (2, 3, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("labels", (False, True), ids=("plain", "labels"))
def test_cached_sampling_equals_naive_sampling(shape, labels):
    model = model_of(shape, num_classes=3 if labels else 0)
    noise, classes = gumbel(2, *shape, 2, 5), torch.tensor([2, 0]) if labels else None
    cached = model.sample(noise, classes)
    assert torch.equal(cached, model.sample(noise, classes, method="naive"))
    assert len(cached.unique()) > 1


def test_more_layers_sample_alike():
    model = model_of((4, 3), 1, exterior_layers=3, outer_layers=4, inner_layers=3)
    noise = gumbel(3, 4, 3, 1, 5)
    assert torch.equal(model.sample(noise), model.sample(noise, method="naive"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channel", (0, 1))
def test_logits_depend_on_predecessors_alone(shape, channel):
    """The gradient of a position's logits by the embeddings of the channel, and changes of other channels."""
    model, count = model_of(shape).double(), math.prod(shape)
    x = torch.randint(5, (1, *shape, 2))
    before = model.logits(x, channel).flatten(0, -2)
    for position in range(count):
        changed = x.clone().view(count, 2)
        changed[position, channel] = (changed[position, channel] + 1) % 5
        after = model.logits(changed.view_as(x), channel).flatten(0, -2)
        moved = (after != before).any(-1)
        assert not moved[: position + 1].any(), "a logit sees its own value or a later one"
        assert moved[position + 1 :].all(), "a logit does not see a value before it"
    for other in (0, 1):
        changed = x.clone()
        changed[..., other] = (changed[..., other] + 1) % 5
        moved = (model.logits(changed, channel).flatten(0, -2) != before).any(-1)
        if other != channel:
            assert moved.all() if other < channel else not moved.any()


def test_loss_is_the_mean_cross_entropy_in_bits():
    model = model_of((3, 4))
    x, channel = torch.randint(5, (4, 3, 4, 2)), torch.tensor([0, 1, 1, 0])
    probabilities = model.logits(x, channel).softmax(-1)
    picked = [probabilities[b].gather(-1, x[b, ..., c, None]) for b, c in enumerate(channel)]
    torch.testing.assert_close(model.loss(x, channel=channel), -torch.stack(picked).log2().mean())
    both = torch.stack([model.loss(x, channel=c) for c in (0, 1)]).mean()
    torch.testing.assert_close(model.bits_per_dim(x), both)


def test_starts_uniform_and_learns():
    torch.manual_seed(1)
    model = AxialTransformer((4, 4), 1, levels=4, dim=32, heads=4)
    x = (torch.arange(4).view(4, 1) + torch.arange(4) + torch.arange(4).view(4, 1, 1)).remainder(4)[..., None]
    assert abs(model.loss(x).item() - 2.0) < 1e-3
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    assert model.loss(x).item() < 0.7  # the first value of each image alone is random: 2 bits in 16
    assert all(p.grad is not None for p in model.parameters())


def test_reference_configurations():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in AxialTransformer.from_config(name).parameters()) for name in CONFIGS}
    assert 340e6 < counts["imagenet32"] < 345e6 and 604e6 < counts["imagenet64"] < 610e6


def test_errors():
    model = model_of((3, 4))
    with pytest.raises(ValueError, match="noise must have shape"):
        model.sample(torch.zeros(1, 3, 4, 2, 4))
    with pytest.raises(ValueError, match='method must be "cached" or "naive"'):
        model.sample(torch.zeros(1, 3, 4, 2, 5), method="fast")
    with pytest.raises(ValueError, match="x must have shape"):
        model.logits(torch.zeros(1, 4, 3, 2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="the configurations are"):
        AxialTransformer.from_config("huge")
