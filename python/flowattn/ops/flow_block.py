"""The weights of one block of a Transformer autoregressive flow, and what a call of it is about."""

import math
from typing import NamedTuple

import torch

from flowattn import checks


class FlowSpec(NamedTuple):
    """What the shapes of the weights do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    norm: str = "layer"  # "layer": LayerNorm, or "rms": RMSNorm; norms of a block are all of one kind
    eps: float = 1e-5
    mlp: str = "gelu"  # "gelu": down(gelu(up x)), exact GELU; "gated": down(gelu_tanh(gate x) * (up x))
    scale: str = "exp"  # see flow_affine_forward
    soft_clip: float = 0.0


class Linear(NamedTuple):
    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


class FlowLayer(NamedTuple):
    norm1: Norm
    qkv: Linear  # rows: all query heads, all key heads, all value heads
    proj: Linear
    norm2: Norm
    up: Linear
    down: Linear
    gate: Linear | None = None
    q_norm: Norm | None = None  # over each head
    k_norm: Norm | None = None
    post1: Norm | None = None  # of what attention and MLP add to the residual stream
    post2: Norm | None = None


class FlowBlock(NamedTuple):
    """One block: W_in u + positions + cond -> layers -> W_out, whose outputs are the (alpha, mu) of the next token.

    Without `start`, token 0 passes through unchanged and the network takes T - 1 steps, step j reading token j for
    token j + 1. With it, step 0 reads `start` for token 0, step j token j - 1 for token j, T steps.
    A block without layers is the identity.
    """

    spec: FlowSpec
    proj_in: Linear  # (C, D)
    layers: tuple
    proj_out: Linear  # (2D, C), or (D, C) for a block that preserves volume
    positions: torch.Tensor | None = None  # (T, C) by raster place, added to h
    rope: tuple | None = None  # cos, sin (prefix + T, head_dim / 2) in the order of the sequence
    start: torch.Tensor | None = None  # (D,)
    final_norm: Norm | None = None

    @property
    def features(self):
        return self.proj_in.weight.shape[1]

    @property
    def width(self):
        return self.proj_in.weight.shape[0]

    @property
    def first(self):
        """The token that step 0 is about."""
        return 0 if self.start is not None else 1

    def steps(self, tokens):
        return max(tokens - self.first, 0) if self.layers else 0

    def tensors(self):
        """All weights, in a fixed order."""
        return list(_tensors(self[1:]))

    def weight_numbers(self):
        """W of the cost model: the numbers that a decode step reads."""
        return sum(x.numel() for x in _tensors((self.proj_in, self.layers, self.proj_out)))


def _tensors(tree):
    for part in tree:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from _tensors(part)


def block_of(name, block):
    """A FlowBlock, from one or from a module with `flow_block()`."""
    if hasattr(block, "flow_block"):
        block = block.flow_block()
    if not isinstance(block, FlowBlock):
        rule = "block must be a FlowBlock or a module with flow_block()"
        checks.fail(name, rule, type(block).__name__, error=TypeError)
    return block


class Conditions(NamedTuple):
    """What the rows of a batch are conditioned on: S = B of them, or 2B, the conditional stream and the other one."""

    positions: torch.Tensor | None  # (1 or B, N, C) by step
    cond: torch.Tensor | None  # (S, C)
    prefix: torch.Tensor | None  # (S, P, C), in front of the sequence
    scale: torch.Tensor  # (S,) of the attention scores
    streams: int

    @property
    def prefix_length(self):
        return 0 if self.prefix is None else self.prefix.shape[1]


def conditions(name, block, z, permutation, cond, cond_uncond, prefix, prefix_uncond, temperature, guided):
    """Check what a call is conditioned on; two streams only where they differ and are wanted."""
    work, batch = checks.state_dtype(z), z.shape[0]
    rule = "attn_temp_uncond must be > 0"
    checks.require(temperature > 0 and math.isfinite(temperature), name, rule, temperature)
    streams = 1
    if guided and (cond_uncond is not None or prefix_uncond is not None or temperature != 1.0):
        streams = 2

    def stacked(argument, given, other, width):
        if given is None and other is None:
            return None
        parts = [given] if streams == 1 else [given, other]
        known = next(x for x in (given, other) if x is not None)
        shape = (batch, *known.shape[1:-1], width)
        rows = []
        for part in parts:
            part = known.new_zeros(shape) if part is None else part
            if tuple(part.shape) != shape:
                checks.fail(name, f"{argument} must have shape {shape}", tuple(part.shape))
            rows.append(part.to(work))
        return torch.cat(rows)

    if prefix is not None or prefix_uncond is not None:
        both = guided and streams == 2
        rule = "prefix_uncond must be given together with prefix"
        checks.require(prefix is not None and (not both or prefix_uncond is not None), name, rule, "one of them")
    scale = block.spec.head_dim**-0.5
    scales = [torch.full((batch,), scale, dtype=work, device=z.device)]
    if streams == 2:
        scales.append(scales[0] / temperature)
    return Conditions(
        _positions(block, permutation, z, work),
        stacked("cond", cond, cond_uncond if streams == 2 else None, block.width),
        stacked("prefix", prefix, prefix_uncond if streams == 2 else None, block.width),
        torch.cat(scales),
        streams,
    )


def _positions(block, permutation, z, work):
    if block.positions is None:
        return None
    table = block.positions.to(work)
    if permutation is None:
        table = table.unsqueeze(0)
    else:
        table = table[permutation].reshape(-1, z.shape[1], table.shape[1])
    return table[:, : block.steps(z.shape[1])]


def permutation_of(name, permutation, z):
    """None for the identity, else int64 indices (T,) or (B, T): token i of the block is token permutation[i] of z."""
    batch, tokens = z.shape[:2]
    if permutation is None:
        return None
    if isinstance(permutation, str):
        rule = 'permutation must be None, "reverse" or a tensor'
        checks.require(permutation == "reverse", name, rule, repr(permutation))
        return torch.arange(tokens - 1, -1, -1, device=z.device)
    rule = f"permutation must have shape {(tokens,)} or {(batch, tokens)}"
    checks.require(permutation.shape in ((tokens,), (batch, tokens)), name, rule, tuple(permutation.shape))
    checks.require(permutation.dtype == torch.int64, name, "permutation must be int64", permutation.dtype)
    return permutation.to(z.device)


def permute(x, permutation):
    """x (B, T, ...) in the order of the block."""
    if permutation is None:
        return x
    if permutation.dim() == 1:
        return x[:, permutation]
    return torch.gather(x, 1, permutation.unsqueeze(-1).expand(x.shape))


def unpermute(x, permutation):
    """The inverse of `permute`."""
    return x if permutation is None else permute(x, permutation.argsort(-1))


def check_block(name, block, z):
    """z (B, T, D) for this block: shapes, dtypes, devices."""
    checks.float_dtype(name, "z", z)
    rule = f"z must have shape (B, T, {block.features})"
    checks.require(z.dim() == 3 and z.shape[2] == block.features, name, rule, tuple(z.shape))
    weight = block.proj_in.weight
    checks.require(weight.device == z.device, name, f"the block must be on the device of z, {z.device}", weight.device)
    if block.positions is not None:
        length = block.positions.shape[0]
        checks.require(z.shape[1] <= length, name, f"T must be at most {length}, the positions", z.shape[1])
