"""The block of FactFormer and IFactFormer: kernels made from features pooled onto each axis, applied axis by axis."""

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.ops.factorized_attention import axis_means, factorized_attention
from flowattn.reference.axial_attention import rotate

_NAME = "FactorizedBlock"
_MIN_FREQUENCY = 1 / 64


def position_tables(positions, width):
    """(cos, sin), each (N, width / 2), for physical coordinates: angle l is 64 x 10000^(-2l / width)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device, dtype=positions.dtype) / width)
    angles = positions[:, None] / _MIN_FREQUENCY * rates
    return angles.cos(), angles.sin()


class AxisKernel(nn.Module):
    """The kernel matrix of one axis from pooled features: K[i, j] = sigma <q_i, k_j>, without a softmax.

    forward(s, positions, key_s=None, key_positions=None): s (B, N, dim) are features pooled onto the axis, positions
    (N,) its coordinates; returns (B, heads, N, N_keys). With key_s and key_positions keys come from another grid.
    Runs in float32 under autocast too: at initialisation the elements are about 1e-5, subnormal in float16.
    """

    def __init__(self, dim, heads, width, *, latent=None, scaling=1.0):
        super().__init__()
        latent = latent or dim
        self.heads, self.scaling = heads, scaling
        self.project = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.expand, self.reduce = nn.Linear(dim, 2 * dim), nn.Linear(dim, latent)
        self.to_q, self.to_k = (nn.Linear(latent, heads * width, bias=False) for _ in range(2))
        for layer in (self.to_q, self.to_k):
            nn.init.xavier_uniform_(layer.weight, gain=0.02)

    def features(self, s):
        gate, value = self.expand(self.norm(self.project(s))).chunk(2, -1)
        return self.reduce(F.gelu(gate) * value)

    def heads_of(self, layer, s, positions):
        x = layer(s).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, width)
        return rotate(x, *position_tables(positions.to(x.dtype), x.shape[-1]), False)

    def forward(self, s, positions, key_s=None, key_positions=None):
        with torch.autocast(s.device.type, enabled=False):
            s = self.features(s.to(self.norm.weight.dtype))
            keys = s if key_s is None else self.features(key_s.to(self.norm.weight.dtype))
            q = self.heads_of(self.to_q, s, positions)
            k = self.heads_of(self.to_k, keys, positions if key_positions is None else key_positions)
            return q @ k.transpose(-1, -2) * self.scaling


class FactorizedBlock(nn.Module):
    """LayerNorm, values, one kernel an axis, factorized attention, normalisation over the grid, two linear maps.

    forward(u, positions): u (B, N_1..N_r, dim), positions r vectors (N_a,); returns (B, N_1..N_r, dim), without the
    residual. mode and normalisation: "parallel" with "instance" is IFactFormer-m, "chained" with "instance"
    IFactFormer-o, "chained" with "group" FactFormer.

    The features are pooled before the linear maps that follow, with which means commute, so these act on N_1 + .. + N_r
    rows instead of the grid. The normalisation is folded into the weight after it, so no normalised grid is stored.
    kernel_scaling: sigma; None is 1, or width ** -0.5 where kernel_multiplier > 4.
    Source: Li et al. 2023 (FactFormer), section 3; Yang et al. 2024 (IFactFormer-m), section 3.
    """

    def __init__(
        self, dim, axes, heads, head_width, *, kernel_multiplier=3, kernel_scaling=None, latent=None, mode="parallel",
        normalisation="instance",
    ):  # fmt: skip
        super().__init__()
        rule = 'normalisation must be "instance" or "group"'
        checks.require(normalisation in ("instance", "group"), _NAME, rule, repr(normalisation))
        self.mode, self.normalisation, self.heads, self.axes = mode, normalisation, heads, tuple(range(1, axes + 1))
        width = kernel_multiplier * head_width
        if kernel_scaling is None:
            kernel_scaling = width**-0.5 if kernel_multiplier > 4 else 1.0
        hidden = heads * head_width * (axes if mode == "parallel" else 1)
        self.norm = nn.LayerNorm(dim)
        self.to_v = nn.Linear(dim, heads * head_width, bias=False)
        self.to_in = nn.Linear(dim, dim, bias=False)
        self.kernels = nn.ModuleList(
            AxisKernel(dim, heads, width, latent=latent, scaling=kernel_scaling) for _ in range(axes)
        )
        self.to_hidden, self.to_out = nn.Linear(hidden, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, u, positions):
        rule = f"u must have {len(self.axes)} grid axes, and positions their coordinates"
        fits = u.dim() == len(self.axes) + 2 and [len(p) for p in positions] == list(u.shape[1:-1])
        checks.require(fits, _NAME, rule, (tuple(u.shape), [len(p) for p in positions]))
        w = self.norm(u)
        values = self.to_v(w).unflatten(-1, (self.heads, -1))
        kernels = [
            kernel(self.to_in(mean), p) for kernel, mean, p in zip(self.kernels, axis_means(w, self.axes), positions)
        ]
        mixed = factorized_attention(values, kernels, self.axes, mode=self.mode)
        return self.to_out(F.gelu(self._normalised_product(mixed)))

    def _normalised_product(self, mixed):
        """to_hidden(normalise(mixed)): W (y - mean) / std = (W / std) y - W (mean / std), a weight a sample."""
        y = mixed.flatten(1, -3).flatten(2)  # (B, grid points, channels)
        wide = y.to(checks.state_dtype(y))
        if self.normalisation == "instance":
            variance, mean = torch.var_mean(wide, 1, correction=0)
            factor = torch.rsqrt(variance + 1e-5)
        else:
            groups = wide.unflatten(-1, (self.heads, -1))
            variance, mean = (x.flatten(1).repeat_interleave(groups.shape[-1], 1)
                              for x in torch.var_mean(groups, (1, 3), correction=1))  # fmt: skip
            factor = torch.rsqrt(variance + 1e-8)
        weight = self.to_hidden.weight.to(wide.dtype) * factor[:, None]  # (B, dim, channels)
        shift = -(weight @ mean[..., None]).transpose(1, 2)
        product = torch.baddbmm(shift.to(y.dtype), y, weight.to(y.dtype).transpose(1, 2))
        return product.view(*mixed.shape[:-2], -1)
