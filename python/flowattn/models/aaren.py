"""Aaren: a Transformer whose attention has one learned query, so that it trains in parallel and streams in O(1)."""

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.prefix_attention import PrefixState, aaren_attention, prefix_attention

_NAME = "Aaren"


class AarenLayer(nn.Module):
    """A Transformer layer in which a learned vector, passed through W_q, is the query of every token.

    norm="post": x = norm1(x + attention(x)), x = norm2(x + ffn(x)); "pre": x = x + attention(norm1(x)), and so on.
    residual="input": attention is added to the layer's input, as in a Transformer; "query": to the query token.
    """

    def __init__(self, d_model, num_heads, d_ff, *, dropout=0.0, norm="post", residual="input"):
        super().__init__()
        checks.require(d_model % num_heads == 0, _NAME, "num_heads must divide d_model", (num_heads, d_model))
        checks.require(norm in ("post", "pre"), _NAME, 'norm must be "post" or "pre"', repr(norm))
        checks.require(residual in ("input", "query"), _NAME, 'residual must be "input" or "query"', repr(residual))
        self.num_heads, self.pre_norm, self.residual = num_heads, norm == "pre", residual
        self.query_token = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model))
        self.dropout = nn.Dropout(dropout)
        self.fused = None  # weight (d_model + H, d_model) and bias: values and scores in one product

    def forward(self, x, state=None, **options):
        """(output, state after the last token) for x (B, T, d_model) that follows `state`."""
        attended, state = self.attend(self.norm1(x) if self.pre_norm else x, state, options)
        x = (self.query_token if self.residual == "query" else x) + self.dropout(self.out_proj(attended))
        if self.pre_norm:
            return x + self.dropout(self.ffn(self.norm2(x))), state
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self.ffn(x))), state

    def attend(self, x, state, options):
        options = {**options, "initial_state": state, "output_final_state": True}
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        if self.fused is not None:
            both = nn.functional.linear(x, *self.fused)
            values, scores = both[..., : x.shape[-1]].unflatten(-1, heads), both[..., x.shape[-1] :]
            out, state = prefix_attention(scores, values, **options)
        else:
            query = self.q_proj(self.query_token).view(heads)
            keys, values = self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)
            out, state = aaren_attention(query, keys, values, **options)
        return out.flatten(-2), state

    @torch.no_grad()
    def fuse(self):
        """The query is constant, so s_t = scale q . (W_k x_t + b_k) is linear in x_t: no key has to be formed."""
        width = self.query_token.shape[0] // self.num_heads
        query = self.q_proj(self.query_token).view(self.num_heads, 1, width) * width**-0.5
        weight = (query @ self.k_proj.weight.view(self.num_heads, width, -1)).squeeze(1)
        bias = (query @ self.k_proj.bias.view(self.num_heads, width, 1)).flatten()
        self.fused = torch.cat([self.v_proj.weight, weight]), torch.cat([self.v_proj.bias, bias])


class Aaren(nn.Module):
    """A stack of Aaren layers over embedded tokens (B, T, d_model); causal, with a state of fixed size.

    A layer holds 4 (d_model^2 + d_model) + 2 d_model d_ff + d_ff + 5 d_model parameters and its query token, d_model.
    The state of a sequence is num_layers * (d_model + 2 num_heads) float32 numbers, however long it is.
    Source: Feng et al., Attention as an RNN (2024), sections 3.3 and 4. The paper leaves open what the residual branch
    adds; the default is the layer's input, see AarenLayer.

    >>> model = Aaren(16, 2, num_layers=3, d_ff=32).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> state = model.init_state(1)
    >>> for t in range(5):
    ...     y, state = model.step(x[:, t], state)
    >>> torch.allclose(y, model(x)[:, -1], atol=1e-5)
    True
    """

    def __init__(self, d_model, num_heads, num_layers, d_ff, *, dropout=0.0, norm="post", residual="input"):
        super().__init__()
        options = {"dropout": dropout, "norm": norm, "residual": residual}
        self.layers = nn.ModuleList(AarenLayer(d_model, num_heads, d_ff, **options) for _ in range(num_layers))
        self.d_model, self.num_heads = d_model, num_heads

    def forward(self, x, *, mask=None, cu_seqlens=None, state=None, output_state=False):
        """Outputs (B, T, d_model) for x of that shape, packed (1, T, d_model); with output_state also the new state.

        mask (B, T) bool: True = a real token. cu_seqlens: see prefix_attention. state: what x follows.
        """
        rule = f"x must have shape (B, T, {self.d_model})"
        checks.require(x.dim() == 3 and x.shape[2] == self.d_model, _NAME, rule, tuple(x.shape))
        after = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers)):
            x, layer_state = layer(x, before, mask=mask, cu_seqlens=cu_seqlens)
            after.append(layer_state)
        return (x, after) if output_state else x

    def init_state(self, batch):
        """The state before the first token: a PrefixState for each layer."""
        device, width = self.layers[0].query_token.device, self.d_model // self.num_heads
        wide = checks.state_dtype(self.layers[0].query_token)
        m = torch.full((batch, self.num_heads), float("-inf"), dtype=wide, device=device)
        w = m.new_zeros(batch, self.num_heads, width)
        return [PrefixState(m, torch.zeros_like(m), w) for _ in self.layers]

    def step(self, x, state):
        """(output (B, d_model), the new state) for one token x (B, d_model) of each sequence."""
        y, state = self.forward(x.unsqueeze(1), state=state, output_state=True)
        return y.squeeze(1), state

    def fuse_inference(self):
        """Switch to eval mode with query and keys folded into d_model numbers a head; `train()` undoes it.

        Saves the key projection, a quarter of the attention's matmul work. Call it again after changing weights.
        Returns self.
        """
        self.eval()
        for layer in self.layers:
            layer.fuse()
        return self

    def train(self, mode=True):
        for layer in self.layers:
            layer.fused = None
        return super().train(mode)
