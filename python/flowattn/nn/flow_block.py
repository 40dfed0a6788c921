"""A block of a Transformer autoregressive flow as a module, with the parameter names of the published models."""

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.flow_block import FlowBlock, FlowLayer, FlowSpec, Linear, Norm


class OffsetRMSNorm(nn.Module):
    """The weight of an RMSNorm stored as its distance from 1."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


def _norm(kind, width):
    return nn.LayerNorm(width) if kind == "layer" else OffsetRMSNorm(width)


class Attention(nn.Module):
    def __init__(self, channels, heads, kv_heads, head_dim, norm, bias, qk_norm, post_norm):
        super().__init__()
        self.norm = _norm(norm, channels)
        self.qkv = nn.Linear(channels, (heads + 2 * kv_heads) * head_dim, bias)
        self.proj = nn.Linear(heads * head_dim, channels, bias)
        self.q_norm, self.k_norm = (_norm(norm, head_dim) if qk_norm else None for _ in range(2))
        self.post_norm = _norm(norm, channels) if post_norm else None


class MLP(nn.Module):
    def __init__(self, channels, hidden, mlp, norm, bias, post_norm):
        super().__init__()
        self.norm = _norm(norm, channels)
        # The activations hold no parameters; their places in the list give the products their published names.
        middle = nn.GELU() if mlp == "gelu" else nn.Linear(channels, hidden, bias)
        self.main = nn.ModuleList([nn.Linear(channels, hidden, bias), middle, nn.Linear(hidden, channels, bias)])
        self.post_norm = _norm(norm, channels) if post_norm else None


class AttentionBlock(nn.Module):
    def __init__(self, attention, mlp):
        super().__init__()
        self.attention, self.mlp = attention, mlp


class CausalFlowBlock(nn.Module):
    """Parameters of one block; flow_forward and flow_inverse take it as `block`.

    features: D, values of a token. channels: C, a multiple of head_dim. tokens: T, for the learned position table;
        None for no table. num_classes: > 0 adds class_embed. volume_preserving: means alone, no scales.
    norm "layer" or "rms"; mlp "gelu" or "gated"; kv_heads, None for as many as heads; qk_norm, post_norm, final_norm
    and start as in FlowBlock; rope: (cos, sin) or None; text_dim: > 0 adds proj_txt, width of the text features.
    The output layer starts at zero, so that a new block is the identity.
    """

    def __init__(
        self,
        features,
        channels,
        num_layers,
        *,
        tokens=None,
        head_dim=64,
        kv_heads=None,
        expansion=4,
        num_classes=0,
        volume_preserving=False,
        norm="layer",
        mlp="gelu",
        bias=True,
        qk_norm=False,
        post_norm=False,
        final_norm=False,
        start=False,
        scale="exp",
        soft_clip=0.0,
        rope=None,
        text_dim=0,
    ):
        super().__init__()
        name = "CausalFlowBlock"
        rule = f"channels must be a multiple of head_dim, {head_dim}"
        checks.require(channels % head_dim == 0, name, rule, channels)
        checks.require(norm in ("layer", "rms"), name, 'norm must be "layer" or "rms"', repr(norm))
        checks.require(mlp in ("gelu", "gated"), name, 'mlp must be "gelu" or "gated"', repr(mlp))
        heads = channels // head_dim
        kv_heads = heads if kv_heads is None else kv_heads
        checks.require(heads % kv_heads == 0, name, f"kv_heads must divide the {heads} heads", kv_heads)
        eps = 1e-5 if norm == "layer" else 1e-6
        self.spec = FlowSpec(heads, kv_heads, head_dim, norm, eps, mlp, scale, float(soft_clip))
        self.proj_in = nn.Linear(features, channels)
        self.pos_embed = nn.Parameter(torch.randn(tokens, channels) * 1e-2) if tokens is not None else None
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, channels) * 1e-2) if num_classes else None
        self.sos_embed = nn.Parameter(torch.randn(1, 1, features)) if start else None
        self.proj_txt = nn.Linear(text_dim, channels) if text_dim else None
        self.attn_blocks = nn.ModuleList(
            AttentionBlock(
                Attention(channels, heads, kv_heads, head_dim, norm, bias, qk_norm, post_norm),
                MLP(channels, expansion * channels, mlp, norm, bias, post_norm),
            )
            for _ in range(num_layers)
        )
        self.final_norm = _norm(norm, channels) if final_norm else None
        self.proj_out = nn.Linear(channels, features if volume_preserving else 2 * features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        for part, table in zip(("cos", "sin"), rope or (None, None)):
            self.register_buffer(f"rope_{part}", table, persistent=False)

    def condition(self, labels, batch):
        """(B, C), or None without classes: class_embed, or its mean where a label is negative or all are None."""
        if self.class_embed is None:
            return None
        table = self.class_embed.squeeze(1)
        table = table.to(checks.state_dtype(table))  # half types would round the mean
        mean = table.mean(0)
        if labels is None:
            return mean.expand(batch, -1)
        return torch.where((labels < 0).unsqueeze(-1), mean, table[labels.clamp(min=0)])

    def flow_block(self):
        """The weights as the ops take them."""
        layers = []
        for layer in self.attn_blocks:
            attention, mlp = layer.attention, layer.mlp
            gated = self.spec.mlp == "gated"
            layers.append(
                FlowLayer(
                    _weights(attention.norm),
                    Linear(attention.qkv.weight, attention.qkv.bias),
                    Linear(attention.proj.weight, attention.proj.bias),
                    _weights(mlp.norm),
                    Linear(mlp.main[gated].weight, mlp.main[gated].bias),
                    Linear(mlp.main[2].weight, mlp.main[2].bias),
                    Linear(mlp.main[0].weight, mlp.main[0].bias) if gated else None,
                    _weights(attention.q_norm),
                    _weights(attention.k_norm),
                    _weights(attention.post_norm),
                    _weights(mlp.post_norm),
                )
            )
        return FlowBlock(
            self.spec,
            Linear(self.proj_in.weight, self.proj_in.bias),
            tuple(layers),
            Linear(self.proj_out.weight, self.proj_out.bias),
            self.pos_embed,
            None if self.rope_cos is None else (self.rope_cos, self.rope_sin),
            None if self.sos_embed is None else self.sos_embed.flatten(),
            _weights(self.final_norm),
        )


def _weights(norm):
    if norm is None:
        return None
    return Norm(norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else Norm(1 + norm.weight, None)
