"""FactFormer: a stack of chained factorized attention blocks, and steps in the latent space."""

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.models.ifactformer import FieldDecoder, FourierPositions
from flowattn.nn.factorized_attention import FactorizedBlock

_NAME = "FactFormer"
CONFIGS = {
    "tiny": {"axes": 2, "frames": 2, "fields": 2, "dim": 24, "heads": 2, "head_width": 12, "depth": 2},
    "3d": {"axes": 3, "frames": 10, "fields": 3, "dim": 128, "heads": 6, "head_width": 64, "depth": 4},
}


class Propagator(nn.Module):
    """One step in time of latent features: z += W2 gelu(W1 LN(z + embedding of the step))."""

    def __init__(self, dim, max_steps):
        super().__init__()
        self.times = nn.Parameter(torch.randn(max_steps, dim) * 0.02)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, z, step):
        return z + self.fc2(F.gelu(self.fc1(self.norm(z + self.times[step]))))


class FactFormer(nn.Module):
    """The next frames of some fields: u += Block(u + positions), `depth` fresh blocks, then steps of the latent state.

    forward(x, positions, steps=1): x (B, frames, N_1..N_r, fields), positions r vectors of physical coordinates (N_a,);
    returns (B, steps, N_1..N_r, fields). Each block applies its kernels one after the other and has its own encoding
    of the positions. `from_config("tiny" | "3d")`.
    Source: Li, Shu & Barati Farimani, Scalable Transformer for PDE Surrogate Modeling (2023), sections 3 and 4.

    >>> model = FactFormer.from_config("tiny")
    >>> positions = torch.linspace(0, 6, 8), torch.linspace(0, 6, 7)
    >>> model(torch.randn(1, 2, 8, 7, 2), positions, steps=3).shape
    torch.Size([1, 3, 8, 7, 2])
    """

    def __init__(self, axes, frames, fields, dim, heads, head_width, *, depth=4, max_steps=16, kernel_multiplier=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(frames * fields, dim), nn.GELU(), nn.Linear(dim, dim, bias=False))
        self.positions = nn.ModuleList(FourierPositions(axes, dim) for _ in range(depth))
        options = {"mode": "chained", "normalisation": "group", "kernel_multiplier": kernel_multiplier}
        self.blocks = nn.ModuleList(FactorizedBlock(dim, axes, heads, head_width, **options) for _ in range(depth))
        self.propagator, self.decoder = Propagator(dim, max_steps), FieldDecoder(dim, fields)

    @classmethod
    def from_config(cls, name, **changes):
        checks.require(name in CONFIGS, _NAME, f"the configurations are {', '.join(CONFIGS)}", repr(name))
        return cls(**{**CONFIGS[name], **changes})

    def forward(self, x, positions, steps=1):
        u = self.encoder(x.movedim(1, -2).flatten(-2))
        for encode, block in zip(self.positions, self.blocks):
            u = u + block(u + encode(positions), positions)
        frames = []
        for step in range(steps):
            u = self.propagator(u, step)
            frames.append(self.decoder(u))
        return torch.stack(frames, 1)
