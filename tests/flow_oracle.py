"""Causal flows from their definition: a dense mask, one block after the other, an inverse token by token."""

import math

import torch
import torch.nn.functional as F

from flowattn.models.starflow import STARFlow
from flowattn.models.tarflow import TarFlow


def tarflow_params(u, state, k, layers, heads, label=None, temperature=1.0):
    """(alpha, mu) of block k for tokens u (T, D) in the order of the block, shifted so that token 0 has zeros."""
    w = {name.removeprefix(f"blocks.{k}."): value for name, value in state.items() if name.startswith(f"blocks.{k}.")}
    length, width = u.shape[0], w["proj_in.weight"].shape[0]
    positions = w["pos_embed"].flip(0) if k % 2 else w["pos_embed"]
    h = F.linear(u, w["proj_in.weight"], w["proj_in.bias"]) + positions[:length]
    if "class_embed" in w:
        table = w["class_embed"][:, 0]
        h = h + (table.mean(0) if label is None or label < 0 else table[label])
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(layers):
        p = f"attn_blocks.{i}."
        a = F.layer_norm(h, (width,), w[p + "attention.norm.weight"], w[p + "attention.norm.bias"])
        qkv = F.linear(a, w[p + "attention.qkv.weight"], w[p + "attention.qkv.bias"])
        q, key, v = (x.view(length, heads, -1).transpose(0, 1) for x in qkv.split(width, 1))
        scores = q @ key.transpose(1, 2) / (math.sqrt(width // heads) * temperature)
        out = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ v
        out = out.transpose(0, 1).reshape(length, width)
        h = h + F.linear(out, w[p + "attention.proj.weight"], w[p + "attention.proj.bias"])
        a = F.layer_norm(h, (width,), w[p + "mlp.norm.weight"], w[p + "mlp.norm.bias"])
        a = F.gelu(F.linear(a, w[p + "mlp.main.0.weight"], w[p + "mlp.main.0.bias"]))
        h = h + F.linear(a, w[p + "mlp.main.2.weight"], w[p + "mlp.main.2.bias"])
    o = F.linear(h, w["proj_out.weight"], w["proj_out.bias"])
    return [torch.cat([torch.zeros_like(part[:1]), part[:-1]]) for part in o.chunk(2, 1)]


def tarflow_forward(u, state, blocks, layers, heads, label=None):
    """(z, log-determinant) of one sample's tokens u (T, D)."""
    total = 0
    for k in range(blocks):
        u = u.flip(0) if k % 2 else u
        alpha, mu = tarflow_params(u, state, k, layers, heads, label)
        u, total = (u - mu) * torch.exp(-alpha), total - alpha.sum()
        u = u.flip(0) if k % 2 else u
    return u, total


def spread(model, std, seed=0):
    """The model with output layers that do something: N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for parameter in block.proj_out.parameters():
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def toy(std=0.02, dtype=torch.float32, **options):
    """A TarFlow of two blocks on 8 x 8 images: T = 16, D = 8."""
    options = {"channels": 64, "num_blocks": 2, "layers_per_block": 2, "num_classes": 3, "head_dim": 32, **options}
    torch.manual_seed(0)
    return spread(TarFlow(2, 8, 2, **options), std).to(dtype)


def toy_star(std=0.05, dtype=torch.float32, **options):
    """A STARFlow with text on 4 x 4 latents: T = 16, D = 3."""
    torch.manual_seed(0)
    sizes = {"layers": (1, 2), "text_dim": 6, "text_len": 3, "head_dim": 32}
    return spread(STARFlow(3, 4, 1, 64, **{**sizes, **options}), std).to(dtype)
