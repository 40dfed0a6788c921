"""Axial attention layers: the sum or the chain over all axes of a grid, and one axis for residual blocks."""

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.ops.axial_attention import axial_attention_qkvpacked

_NAME = "AxialAttention"


class _Projections(nn.Module):
    """The parameters of one axis; AxialAttention reads them."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.to_q = nn.Linear(dim, hidden, bias=False)
        self.to_kv = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim)


class _Axis(nn.Module):
    """Gives the parameters the names they have in the module this one replaces."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fn = _Projections(dim, hidden)


class AxialAttention(nn.Module):
    """Self-attention along every axis of a grid, each with projections of its own, summed or one after the other.

    Takes and returns (B, N_1..N_r, dim), or with the channels at `dim_index`. r = num_dimensions. Arguments and
    state-dict names are those of AxialAttention in the axial-attention package (Wang), whose weights load with
    strict=True. Grids of any size; no permuted copy of queries, keys or values is made.

    sum_axial_out=True: one product makes the queries, keys and values of all axes, and the output projections
    accumulate; False: each axis attends to the result of the one before.

    >>> AxialAttention(16, heads=2)(torch.randn(1, 6, 5, 16)).shape
    torch.Size([1, 6, 5, 16])
    """

    def __init__(self, dim, num_dimensions=2, heads=8, dim_heads=None, dim_index=-1, sum_axial_out=True):
        super().__init__()
        checks.require(dim_heads or dim % heads == 0, _NAME, "heads must divide dim", (heads, dim))
        dims = num_dimensions + 2
        checks.require(
            -dims < dim_index < dims and dim_index % dims, _NAME, "dim_index must be 1.. or negative", dim_index
        )
        self.dim, self.heads, self.dim_heads = dim, heads, dim_heads or dim // heads
        self.dim_index, self.num_dimensions, self.sum_axial_out = dim_index % dims, num_dimensions, sum_axial_out
        self.axial_attentions = nn.ModuleList(_Axis(dim, heads * self.dim_heads) for _ in range(num_dimensions))

    def forward(self, x):
        fits = x.dim() == self.num_dimensions + 2 and x.shape[self.dim_index] == self.dim
        rule = f"x must have {self.num_dimensions + 2} dims, {self.dim} channels at {self.dim_index}"
        checks.require(fits, _NAME, rule, tuple(x.shape))
        x = x.movedim(self.dim_index, -1)
        layers = [axis.fn for axis in self.axial_attentions]
        if self.sum_axial_out:
            x = self._sum(x, layers)
        else:
            for axis, layer in enumerate(layers, 1):
                qkv = F.linear(x, torch.cat([layer.to_q.weight, layer.to_kv.weight]))
                x = layer.to_out(self._attend(qkv, axis))
        return x.movedim(-1, self.dim_index)

    def _attend(self, qkv, axis):
        return axial_attention_qkvpacked(qkv.unflatten(-1, (3, self.heads, self.dim_heads)), axis).flatten(-2)

    def _sum(self, x, layers):
        weights = torch.cat([w for layer in layers for w in (layer.to_q.weight, layer.to_kv.weight)])
        parts = F.linear(x, weights).chunk(len(layers), -1)
        total = sum(layer.to_out.bias for layer in layers)
        for axis, (qkv, layer) in enumerate(zip(parts, layers), 1):
            attended = self._attend(qkv, axis).reshape(-1, layer.to_out.in_features)
            total = torch.addmm(total, attended, layer.to_out.weight.t())
        return total.view(*x.shape[:-1], self.dim)
