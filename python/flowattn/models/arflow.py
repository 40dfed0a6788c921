"""ARFlow (Hui et al. 2025): a diffusion Transformer over a sequence of ever less noisy images of one class.

Attention is full inside an image and linear, with a decayed state, to the images before; sampling carries the state.
"""

import math

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.chunk_hybrid_attention import chunk_hybrid_attention


def rms_norm(x):
    """RMSNorm without a weight over the last dim, in float32."""
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def position_table(width, side):
    """Sines and cosines of rows and columns, (side * side, width)."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1)


class TimeEmbedder(nn.Module):
    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        angles = t[..., None].float() * torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row more than classes: the last stands for no class."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class HybridAttention(nn.Module):
    """q, k and v normalised over the whole width, a gate a head from the tokens and their condition, gated output."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.g_proj, self.out_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gt_proj = nn.Linear(width, num_heads, bias=False)

    def forward(self, x, condition, chunk, state):
        """x (B, T, width) of whole images, condition added for the gate alone: (output, state)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rms_norm(p(x)).to(x.dtype).unflatten(-1, (self.num_heads, -1)) for p in projections)
        gate = self.gt_proj(x + condition)
        o, state = chunk_hybrid_attention(q, k, v, gate, chunk=chunk, initial_state=state, output_final_state=True)
        o = rms_norm(o).to(x.dtype).flatten(2)
        return self.out_proj(nn.functional.silu(self.g_proj(x)) * o), state


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero: the condition of each image shifts, scales and gates both branches."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = HybridAttention(width, num_heads), MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, state):
        """x (B, S, tokens, width), c (B, S, width): (output, state)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        y = modulate(self.norm1(x), shift1, scale1)
        condition = c.unsqueeze(2).expand_as(x).flatten(1, 2)
        y, state = self.attn(y.flatten(1, 2), condition, x.shape[2], state)
        x = x + gate1.unsqueeze(2) * y.view_as(x)
        return x + gate2.unsqueeze(2) * self.mlp(modulate(self.norm2(x), shift2, scale2)), state


class FinalLayer(nn.Module):
    def __init__(self, width, patch_size, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, -1)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class ARFlow(nn.Module):
    """forward(x (B, S, channels, img_size, img_size), t (B, S), y (B,)) -> velocities of the shape of x.

    S images of one class with ascending times t. `state=`, a list of one (B, heads, D, D) tensor a layer, continues
    earlier images; `output_state=True` also returns that after the last. One call with S images equals S with one.
    preset: one of ARFlow.PRESETS ("S/2", "B/2", "L/2", "XL/2": layers, width, heads, patch), or "tiny". y = num_classes
    means no class.

    >>> model = ARFlow(img_size=8, preset="tiny", num_classes=10)
    >>> x, t = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3).sort(1).values
    >>> tuple(model(x, t, torch.tensor([1, 2])).shape)
    (2, 3, 4, 8, 8)
    """

    PRESETS = {
        "tiny": (2, 32, 2, 2),
        "S/2": (12, 384, 6, 2),
        "B/2": (12, 768, 12, 2),
        "L/2": (24, 1024, 16, 2),
        "XL/2": (28, 1152, 18, 2),
        "XL/4": (28, 1152, 16, 4),
        "XL/8": (28, 1152, 16, 8),
    }

    def __init__(self, *, img_size=32, in_channels=4, num_classes=1000, preset="XL/2"):
        super().__init__()
        checks.require(preset in self.PRESETS, "ARFlow", f"preset must be one of {list(self.PRESETS)}", preset)
        layers, width, heads, self.patch_size = self.PRESETS[preset]
        fits = img_size % self.patch_size == 0
        checks.require(fits, "ARFlow", f"img_size must be a multiple of the patch, {self.patch_size}", img_size)
        self.channels, self.side = in_channels, img_size // self.patch_size
        self.x_embedder = PatchEmbed(self.patch_size, in_channels, width)
        self.t_embedder, self.y_embedder = TimeEmbedder(width), LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(position_table(width, self.side).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_layer = FinalLayer(width, self.patch_size, in_channels)
        self._initialise()

    def _initialise(self):
        """adaLN-Zero: every block starts as the identity, the model as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, *, state=None, output_state=False):
        batch, images = x.shape[:2]
        checks.require(x.dim() == 5 and t.shape == (batch, images), "ARFlow", f"t must have shape {(batch, images)}",
                       tuple(t.shape))  # fmt: skip
        tokens = self.x_embedder(x.flatten(0, 1)) + self.pos_embed
        tokens = tokens.unflatten(0, (batch, images))
        c = self.y_embedder(y).unsqueeze(1) + self.t_embedder(t)
        after = []
        for i, block in enumerate(self.blocks):
            tokens, last = block(tokens, c, None if state is None else state[i])
            after.append(last)
        out = self._unpatchify(self.final_layer(tokens, c))
        return (out, after) if output_state else out

    def _unpatchify(self, x):
        patch = self.patch_size
        x = x.unflatten(-1, (patch, patch, self.channels)).unflatten(2, (self.side, self.side))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
