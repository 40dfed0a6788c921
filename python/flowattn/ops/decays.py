"""Log decays of published retention models, one a head, for linear_attention and grid_retention."""

import math

import torch

from flowattn import checks

_OP = "decay_preset"


def _slopes(heads):
    """ALiBi's: 2^(-8 (h + 1) / H) for powers of two, else those of the power below and every other of the one above."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + _slopes(2 * power)[0::2][: heads - power]


def decay_preset(name, heads, *, layer=0, layers=1, device=None):
    """Give log gamma of each head (H,), float32, natural log, of a published model.

    "retnet": gamma = 1 - 2^(-5 - h). "vir": gamma = 1 - exp(linspace(ln 1/32, ln 1/512, H)). "lightning": log gamma =
    -s_h, ALiBi's slopes. "lightning_layers": log gamma = -(8 / H) (1 - layer / layers) h, weaker from layer to layer.
    Source: Sun et al., Retentive Network (2023); Hatamizadeh et al., ViR (2023); Qin et al., Lightning Attention
        (2024); Press et al., ALiBi (2022).

    >>> decay_preset("retnet", 2).exp().tolist()
    [0.96875, 0.984375]
    """
    checks.require(heads > 0, _OP, "heads must be positive", heads)
    if name == "retnet":
        decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    elif name == "vir":
        low, high = math.log(1 / 32), math.log(1 / 512)
        decays = [math.log1p(-math.exp(low + (high - low) * h / max(heads - 1, 1))) for h in range(heads)]
    elif name == "lightning":
        decays = [-slope for slope in _slopes(heads)]
    elif name == "lightning_layers":
        checks.require(0 <= layer < layers, _OP, "layer must be one of the layers", (layer, layers))
        decays = [-(8 / heads) * (1 - layer / layers) * h for h in range(heads)]
    else:
        checks.fail(_OP, "name must be retnet, vir, lightning or lightning_layers", repr(name))
    return torch.tensor(decays, device=device)
