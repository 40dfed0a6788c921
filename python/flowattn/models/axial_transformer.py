"""Axial Transformer: an autoregressive model of grids of integers, such as images, with attention along single axes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.ops.axial_attention import axial_attention_qkvpacked, axial_attention_step, axial_shift

_NAME = "AxialTransformer"


def _config(side, dim, heads, layers):
    depths = dict.fromkeys(("exterior_layers", "outer_layers", "inner_layers"), layers)
    return {"shape": (side, side), "channels": 3, "dim": dim, "heads": heads, **depths}


CONFIGS = {
    "tiny": _config(8, 64, 4, 2),
    "imagenet32": _config(32, 1536, 16, 8),
    "imagenet64": _config(64, 2048, 16, 8),
}


class AxialBlock(nn.Module):
    """A pre-norm Transformer block that attends along one axis, a dim of (B, N_1..N_r, D), causally or not.

    x += Wo attention(Wqkv LN(x)); x += W2 act(W1 LN(x)), act(z) = z sigmoid(1.702 z).
    """

    def __init__(self, dim, heads, axis, causal, *, hidden_factor=1, dropout=0.0):
        super().__init__()
        self.heads, self.axis, self.causal = heads, axis, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden_factor * dim), nn.Linear(hidden_factor * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None, position=None):
        """With `cache`, from init_cache, x is the one slice at `position` of the axis, after those before it."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        if cache is None:
            attended = axial_attention_qkvpacked(qkv, self.axis, causal=self.causal)
        else:
            attended = axial_attention_step(*qkv.unbind(-3), *cache, self.axis, position)
        x = x + self.dropout(self.proj(attended.flatten(-2)))
        hidden = self.fc1(self.norm2(x))
        return x + self.dropout(self.fc2(hidden * torch.sigmoid(1.702 * hidden)))

    def init_cache(self, x, length):
        """Keys and values of `length` positions of the axis, for slices like x (B, .., 1, .., D)."""
        shape = list(x.shape)
        shape[self.axis] = length
        return tuple(x.new_empty(*shape[:-1], self.heads, shape[-1] // self.heads) for _ in range(2))


class AxialTransformer(nn.Module):
    """p(x) = product over channels and raster positions of p(x_i | what comes before), for integers (B, N_1..N_r, C).

    shape: (N_1..N_r), r = 1 to 3, in raster order: the last axis runs fastest. channels C are modelled one after the
    other: an encoder sees those before, two decoders the channel itself. For each axis l < r a group of blocks mixes
    causally along l and freely along the axes behind it; shifted by one along l, its result tells every position of
    all slices before its own. The inner blocks are causal along the last axis. num_classes: optional labels.

    `from_config("tiny" | "imagenet32" | "imagenet64")` builds the reference configurations.
    Source: Ho et al., Axial Attention in Multidimensional Transformers (2019), sections 3.2 and 3.3.

    >>> model = AxialTransformer((3, 4), 1, levels=5, dim=8, heads=2)
    >>> model.loss(torch.zeros(2, 3, 4, 1, dtype=torch.long)).shape
    torch.Size([])
    """

    def __init__(
        self, shape, channels=3, *, levels=256, dim=64, heads=4, exterior_layers=2, outer_layers=2, inner_layers=2,
        hidden_factor=1, dropout=0.0, num_classes=0,
    ):  # fmt: skip
        super().__init__()
        axes = len(shape)
        checks.require(1 <= axes <= 3, _NAME, "shape must have 1 to 3 axes", tuple(shape))
        checks.require(dim % heads == 0, _NAME, "heads must divide dim", (heads, dim))
        self.shape, self.channels, self.levels, self.axes = tuple(shape), channels, levels, axes

        def block(axis, causal):
            return AxialBlock(dim, heads, axis, causal, hidden_factor=hidden_factor, dropout=dropout)

        def positions():
            return nn.ParameterList(nn.Parameter(torch.empty(n, dim)) for n in shape)

        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.embedding, self.positions = nn.Embedding(levels, dim), positions()
        self.exterior_conv = conv(2 * channels, dim, 3, padding="same")
        self.exterior_positions = positions()
        self.exterior = nn.ModuleList(block(axes - i % axes, False) for i in range(exterior_layers))
        self.outer = nn.ModuleList(
            nn.ModuleList(
                block(axis, axis == group)
                for _ in range(max(outer_layers // 2, 1))
                for axis in range(axes, group - 1, -1)
            )
            for group in range(1, axes)
        )
        self.inner = nn.ModuleList(block(axes, True) for _ in range(inner_layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, levels)
        self.labels = nn.Embedding(num_classes, dim) if num_classes else None
        self._initialise(dim)

    @classmethod
    def from_config(cls, name, **changes):
        checks.require(name in CONFIGS, _NAME, f"the configurations are {', '.join(CONFIGS)}", repr(name))
        return cls(**{**CONFIGS[name], **changes})

    @torch.no_grad()
    def _initialise(self, dim):
        """Fan-in scaled weights; the network starts as the identity, and its prediction as uniform."""
        for parameter in [self.embedding.weight, *self.positions, *self.exterior_positions]:
            nn.init.normal_(parameter, std=5 / math.sqrt(dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for last in [self.head, *(x for m in self.modules() if isinstance(m, AxialBlock) for x in (m.proj, m.fc2))]:
            last.weight.mul_(1e-5)

    def logits(self, x, channel, labels=None):
        """Scores (B, N_1..N_r, levels) of one channel a sample; `channel` is an int or (B,) integers.

        Those at a position depend on the channels before and on this channel's values at raster positions before.
        """
        channel = self._check(x, channel)
        base = self._base(x, channel, labels)
        index = channel.view(-1, *(1,) * (self.axes + 1)).expand(*x.shape[:-1], 1)
        embedded = self.embedding(x.gather(-1, index).squeeze(-1))
        total = base
        for axis, group in enumerate(self.outer, 1):
            u = embedded + total
            for block in group:
                u = block(u)
            total = axial_shift(u, axis, add=total)
        x = axial_shift(embedded, self.axes, add=total)
        for block in self.inner:
            x = block(x)
        return self.head(self.norm(x))

    forward = logits

    def loss(self, x, labels=None, *, channel=None):
        """Mean cross-entropy in bits of one channel a sample, drawn uniformly unless `channel` gives it."""
        if channel is None:
            channel = torch.randint(self.channels, x.shape[:1], device=x.device)
        channel = self._check(x, channel)
        index = channel.view(-1, *(1,) * (self.axes + 1)).expand(*x.shape[:-1], 1)
        target = x.gather(-1, index).flatten()
        logits = self.logits(x, channel, labels).flatten(0, -2)
        return F.cross_entropy(logits.float(), target) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, x, labels=None):
        """The mean over all channels and positions of -log2 p(x), a number a batch."""
        return torch.stack([self.loss(x, labels, channel=c) for c in range(self.channels)]).mean()

    @torch.no_grad()
    def sample(self, noise, labels=None, *, method="cached"):
        """Draw x (B, N_1..N_r, C) as argmax(logits + noise); noise (B, N_1..N_r, C, levels) is Gumbel noise.

        "cached": each block does each position once, with keys and values kept: as much arithmetic as one forward pass
        a channel. "naive": the whole model for each position, what defines the result.
        """
        shape = (noise.shape[0], *self.shape, self.channels, self.levels)
        checks.require(noise.shape == shape, _NAME, f"noise must have shape {shape}", tuple(noise.shape))
        checks.require(method in ("cached", "naive"), _NAME, 'method must be "cached" or "naive"', repr(method))
        x = torch.zeros(noise.shape[:-1], dtype=torch.long, device=noise.device)
        for channel in range(self.channels):
            draw = _CachedDraw if method == "cached" else _NaiveDraw
            draw(self, x, channel, labels, noise[..., channel, :]).run()
        return x

    def _check(self, x, channel):
        shape = (*self.shape, self.channels)
        checks.require(x.shape[1:] == shape, _NAME, f"x must have shape (B, {shape})", tuple(x.shape))
        return torch.as_tensor(channel, device=x.device).expand(x.shape[0])

    def _positions(self, tables):
        total = 0
        for axis, table in enumerate(tables):
            total = total + table.view(*table.shape[:1], *(1,) * (self.axes - 1 - axis), -1)
        return total

    def _base(self, x, channel, labels):
        """What every position knows beforehand: where it is, the channels before, the label. (B, N_1..N_r, D)"""
        one_hot = F.one_hot(channel, self.channels)
        before = one_hot.cumsum(-1) == 0  # channels smaller than the sample's own
        wide, ones = self.head.weight.dtype, (1,) * self.axes
        known = x * before.view(-1, *ones, self.channels) / (self.levels - 1)
        planes = one_hot.view(-1, *ones, self.channels).expand_as(known)
        z = torch.cat([known.to(wide), planes.to(wide)], -1).movedim(-1, 1)
        z = self.exterior_conv(z).movedim(1, -1) + self._positions(self.exterior_positions)
        for block in self.exterior:
            z = block(z)
        z = z + self._positions(self.positions)
        if self.labels is not None:
            z = z + self.labels(labels).view(z.shape[0], *ones, -1)
        return z


class _NaiveDraw:
    """One channel of x, position by position, with the whole model each time."""

    def __init__(self, model, x, channel, labels, noise):
        self.model, self.x, self.channel, self.labels, self.noise = model, x, channel, labels, noise

    def run(self):
        for position in range(math.prod(self.model.shape)):
            logits = self.model.logits(self.x, self.channel, self.labels)
            index = torch.unravel_index(torch.tensor(position), self.model.shape)
            at = (slice(None), *(int(i) for i in index))
            self.x[(*at, self.channel)] = (logits[at] + self.noise[at]).argmax(-1)


class _CachedDraw(_NaiveDraw):
    """One channel of x, in which every block sees every slice once.

    Slices keep all dims, with size 1 along the axes that are fixed; `total` is what is known of the slice at hand: the
    base and what the groups of the axes before have said about it.
    """

    def run(self):
        model = self.model
        channel = torch.full(self.x.shape[:1], self.channel, device=self.x.device)
        base = model._base(self.x, channel, self.labels)
        self.embedded = torch.zeros_like(base)  # of the values drawn so far
        self._slices(1, base, self.embedded, self.x[..., self.channel], self.noise)

    def _slices(self, axis, total, embedded, x, noise):
        """Fill the slices along `axis` one after the other; the arguments are views of the part being filled."""
        model, told = self.model, None
        last = axis == model.axes
        blocks = model.inner if last else model.outer[axis - 1]
        caches = [block.init_cache(total.narrow(axis, 0, 1), total.shape[axis]) for block in blocks]
        for i in range(total.shape[axis]):
            part = total.narrow(axis, i, 1)
            if last:
                hidden = part if i == 0 else part + embedded.narrow(axis, i - 1, 1)
                hidden = self._run(blocks, caches, hidden, axis, i)
                drawn = (model.head(model.norm(hidden)) + noise.narrow(axis, i, 1)).argmax(-1)
                x.narrow(axis, i, 1).copy_(drawn)
                embedded.narrow(axis, i, 1).copy_(model.embedding(drawn))
                continue
            known = part if i == 0 else part + told
            self._slices(axis + 1, known, *(y.narrow(axis, i, 1) for y in (embedded, x, noise)))
            if i + 1 < total.shape[axis]:
                told = self._run(blocks, caches, part + embedded.narrow(axis, i, 1), axis, i)

    @staticmethod
    def _run(blocks, caches, x, axis, position):
        for block, cache in zip(blocks, caches):
            x = block(x, cache, position) if block.axis == axis else block(x)
        return x
