"""S-Mamba: forecasts many series at once, with the series as tokens of a Mamba in both directions."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from flowattn import checks
from flowattn.ops.selective_scan import SelectiveInputs, bi_selective_scan, selective_scan

_NAME = "SMamba"

# "tiny" is for tests; the others are those of the published scripts, for 96 steps in and 96 out.
PRESETS = {
    "tiny": {"d_model": 16, "d_state": 2, "d_ff": 32, "num_layers": 2},
    "ettm1": {"d_model": 256, "d_state": 2, "d_ff": 256, "num_layers": 2},
    "weather": {"d_model": 512, "d_state": 2, "d_ff": 512, "num_layers": 3},
    "electricity": {"d_model": 512, "d_state": 16, "d_ff": 512, "num_layers": 3},
    "traffic": {"d_model": 512, "d_state": 32, "d_ff": 512, "num_layers": 4},
}


class Mamba(nn.Module):
    """A Mamba block over (B, L, d_model); its parameters have the names and the initialisation of the published one."""

    def __init__(self, d_model, d_state=16, *, d_conv=2, expand=1):
        super().__init__()
        width, self.dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width)
        self.x_proj = nn.Linear(width, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, width)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        steps = torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of the bias is the step

    def forward(self, x, *, reverse=False):
        """Outputs (B, L, d_model), each of the tokens up to its own; with reverse, of those from its own on."""
        out = selective_scan(*self.scan_inputs(x, reverse), delta_softplus=True, layout="BLD", reverse=reverse)
        return self.out_proj(out)

    def scan_inputs(self, x, reverse):
        """What the scan of this block reads, in the order of the tokens."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.convolve(u, reverse))
        d_state = self.A_log.shape[1]
        steps, B, C = self.x_proj(u).split((self.dt_rank, d_state, d_state), -1)
        wide = checks.state_dtype(u)
        A = -torch.exp(self.A_log.to(wide))
        delta = F.linear(steps, self.dt_proj.weight)
        return SelectiveInputs(u, delta, A, B, C, self.D.to(wide), z, self.dt_proj.bias.to(wide))

    def convolve(self, u, reverse):
        """Depthwise convolution over the token and those before it, or after it: the flipped one without the flips."""
        taps, length = self.conv1d.weight.squeeze(1).unbind(1), u.shape[1]  # the last is that of the token itself
        out = self.conv1d.bias + taps[-1] * u
        for distance, tap in enumerate(taps[-2::-1], 1):
            if reverse:
                out = out + tap * F.pad(u, (0, 0, 0, distance))[:, distance:]
            else:
                out = out + tap * F.pad(u, (0, 0, distance, 0))[:, :length]
        return out


class SMambaLayer(nn.Module):
    """x = norm1(x + forward Mamba + reverse Mamba); x = norm2(x + ffn(x)); the ffn is kept as 1x1 convolutions."""

    def __init__(self, d_model, d_state, d_ff, dropout, activation):
        super().__init__()
        self.attention, self.attention_r = Mamba(d_model, d_state), Mamba(d_model, d_state)
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.activation = nn.Dropout(dropout), activation

    def forward(self, x):
        inputs = self.attention.scan_inputs(x, False), self.attention_r.scan_inputs(x, True)
        forward, reverse = bi_selective_scan(*inputs, delta_softplus=True, layout="BLD")
        x = self.norm1(x + self.attention.out_proj(forward) + self.attention_r.out_proj(reverse))
        y = F.linear(x, self.conv1.weight.squeeze(2), self.conv1.bias)
        y = self.dropout(F.gelu(y) if self.activation == "gelu" else F.relu(y))
        y = self.dropout(F.linear(y, self.conv2.weight.squeeze(2), self.conv2.bias))
        return self.norm2(x + y)


class _Embedding(nn.Module):
    def __init__(self, seq_len, d_model, dropout):
        super().__init__()
        self.value_embedding, self.dropout = nn.Linear(seq_len, d_model), nn.Dropout(dropout)

    def forward(self, series):
        return self.dropout(self.value_embedding(series))


class _Encoder(nn.Module):
    def __init__(self, layers, d_model):
        super().__init__()
        self.attn_layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(d_model)

    def forward(self, x):
        for layer in self.attn_layers:
            x = layer(x)
        return self.norm(x)


class SMamba(nn.Module):
    """Forecast the next pred_len steps of V series from their last seq_len.

    Each series is one token: Linear(seq_len -> d_model), then layers of Mamba in both directions over the series, then
    Linear(d_model -> pred_len). use_norm: each series is brought to mean 0 and variance 1 over its window, and back.
    PRESETS names the published sizes: `SMamba.from_preset("traffic", 96, 96)`. State dicts of the published code load.
    Cost: linear in V, where attention over the series is quadratic.
    Source: Wang et al., Is Mamba Effective for Time Series Forecasting? (2024), section 4.

    >>> model = SMamba.from_preset("tiny", seq_len=12, pred_len=3).eval()
    >>> model(torch.randn(2, 12, 5)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(
        self, seq_len, pred_len, *, d_model=512, d_state=32, d_ff=2048, num_layers=2, dropout=0.1, activation="gelu",
        use_norm=True,
    ):  # fmt: skip
        super().__init__()
        checks.require(activation in ("gelu", "relu"), _NAME, 'activation must be "gelu" or "relu"', repr(activation))
        self.seq_len, self.pred_len, self.use_norm = seq_len, pred_len, use_norm
        self.enc_embedding = _Embedding(seq_len, d_model, dropout)
        layers = (SMambaLayer(d_model, d_state, d_ff, dropout, activation) for _ in range(num_layers))
        self.encoder = _Encoder(layers, d_model)
        self.projector = nn.Linear(d_model, pred_len)

    @classmethod
    def from_preset(cls, name, seq_len, pred_len, **options):
        """A model of a named size; `options` go before the preset's."""
        checks.require(name in PRESETS, _NAME, f"preset must be one of {', '.join(PRESETS)}", repr(name))
        return cls(seq_len, pred_len, **{**PRESETS[name], **options})

    def forward(self, x, marks=None):
        """Forecasts (B, pred_len, V) for x (B, seq_len, V).

        marks (B, seq_len, M): known series, such as the hour of the day, as further tokens that are not forecast.
        """
        rule = f"x must have shape (B, {self.seq_len}, V)"
        checks.require(x.dim() == 3 and x.shape[1] == self.seq_len, _NAME, rule, tuple(x.shape))
        series = x.transpose(1, 2)  # (B, V, seq_len)
        if self.use_norm:
            mean = series.mean(-1, keepdim=True).detach()
            scale = torch.sqrt(series.var(-1, keepdim=True, unbiased=False) + 1e-5)
            series = (series - mean) / scale
        tokens = series if marks is None else torch.cat([series, marks.transpose(1, 2)], 1)
        out = self.projector(self.encoder(self.enc_embedding(tokens)))[:, : x.shape[2]]
        return (out * scale + mean if self.use_norm else out).transpose(1, 2)
