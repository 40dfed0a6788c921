"""IFactFormer-m: one factorized attention block applied again and again, a time stepper for fields on a grid."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.nn.factorized_attention import FactorizedBlock

_NAME = "IFactFormerM"
CONFIGS = {
    "tiny": {"axes": 2, "frames": 2, "fields": 2, "dim": 24, "heads": 2, "head_width": 12, "steps": 4},
    "channel": {"axes": 3, "frames": 10, "fields": 3, "dim": 96, "heads": 5, "head_width": 96, "steps": 10},
}


class FourierPositions(nn.Module):
    """Coordinates of a grid as a linear map of random Fourier features, half of them sines: (N_1..N_r, dim)."""

    def __init__(self, axes, dim, scale=8.0):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(axes, dim // 2) * scale)
        self.linear = nn.Linear(dim, dim)

    def forward(self, positions):
        grid = torch.stack(torch.meshgrid(*positions, indexing="ij"), -1)
        angles = 2 * math.pi * grid @ self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], -1))


class FieldEncoder(nn.Module):
    """The last frames of some fields (B, frames, N_1..N_r, fields) as features (B, N_1..N_r, dim).

    Each field alone becomes dim / 2 / fields features a frame; then all frames of a point mix.
    """

    def __init__(self, frames, fields, dim):
        super().__init__()
        self.fields = fields
        self.per_field = nn.Conv1d(fields, dim // 2, 1, groups=fields)
        self.over_time = nn.Linear(frames * (dim // 2), dim, bias=False)

    def forward(self, x):
        batch, frames, *grid, fields = x.shape
        features = self.per_field(x.reshape(-1, fields, 1)).view(batch, frames, *grid, -1)
        return self.over_time(F.gelu(features).movedim(1, -2).flatten(-2))


class FieldDecoder(nn.Module):
    """Features (B, N_1..N_r, dim) as fields (B, N_1..N_r, fields)."""

    def __init__(self, dim, fields):
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, dim // 2, bias=False), nn.Linear(dim // 2, fields)

    def forward(self, u):
        return self.out(F.gelu(self.hidden(u)))


class IFactFormerM(nn.Module):
    """The next frame of some fields from the last ones: u += Block(u) / steps, `steps` times with one shared block.

    forward(x, positions): x (B, frames, N_1..N_r, fields), positions r vectors of physical coordinates (N_a,); returns
    (B, N_1..N_r, fields). Any grid, also one the model was not trained on. `rollout` feeds results back.
    increment=True: what the decoder returns is added to the last frame.
    `from_config("tiny" | "channel")`: "channel" is the published size (turbulent channel flow, 32 x 33 x 16 points).
    parallel=False is IFactFormer-o, whose kernels are chained.
    Source: Yang et al., IFactFormer-m (2024), section 3. The published code changes its input in place; this does not.

    >>> model = IFactFormerM.from_config("tiny")
    >>> positions = torch.linspace(0, 6, 8), torch.linspace(0, 6, 7)
    >>> model(torch.randn(1, 2, 8, 7, 2), positions).shape
    torch.Size([1, 8, 7, 2])
    """

    def __init__(
        self, axes, frames, fields, dim, heads, head_width, *, steps=10, parallel=True, increment=False,
        kernel_multiplier=3,
    ):  # fmt: skip
        super().__init__()
        checks.require(dim % (2 * fields) == 0, _NAME, "2 * fields must divide dim", (fields, dim))
        self.frames, self.steps, self.increment = frames, steps, increment
        self.encoder, self.positions = FieldEncoder(frames, fields, dim), FourierPositions(axes, dim)
        mode = "parallel" if parallel else "chained"
        self.block = FactorizedBlock(dim, axes, heads, head_width, mode=mode, kernel_multiplier=kernel_multiplier)
        self.decoder = FieldDecoder(dim, fields)

    @classmethod
    def from_config(cls, name, **changes):
        checks.require(name in CONFIGS, _NAME, f"the configurations are {', '.join(CONFIGS)}", repr(name))
        return cls(**{**CONFIGS[name], **changes})

    def forward(self, x, positions):
        rule = f"x must hold {self.frames} frames"
        checks.require(x.shape[1] == self.frames, _NAME, rule, tuple(x.shape))
        u = self.encoder(x) + self.positions(positions)
        for _ in range(self.steps):
            u = u + self.block(u, positions) / self.steps
        out = self.decoder(u)
        return x[:, -1] + out if self.increment else out

    def rollout(self, x, positions, length):
        """The next `length` frames (B, length, N_1..N_r, fields), each from the ones before."""
        frames = list(x.unbind(1))
        for _ in range(length):
            frames.append(self(torch.stack(frames[-self.frames :], 1), positions))
        return torch.stack(frames[self.frames :], 1)
