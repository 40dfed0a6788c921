"""STARFlow: causal flow blocks over image latents, most layers in the one nearest to the noise (Gu et al. 2025)."""

import torch

from flowattn import checks
from flowattn.models.causal_flow import CausalFlow
from flowattn.nn.flow_block import CausalFlowBlock

TEXT_ANGLES = 8
BASE = 10000.0

CONFIGS = {
    "starflow-3b": {
        "in_channels": 4, "img_size": 32, "patch_size": 1, "channels": 3072, "layers": (2, 2, 2, 2, 2, 24),
        "text_dim": 2048, "text_len": 128, "final_norm": True, "norm": "rms",
    },
}  # fmt: skip


def axial_rope(grid, head_dim, *, text_len=0, pt_seq_len=None):
    """(cos, sin), each (text_len + T, head_dim / 2): angles of the pairs of a head, text first, then patches by row.

    Row and column share the angles; with text 8 of them belong to the place in the text instead, where row and column
    are 0, as that place is for patches. Coordinates are stretched so that sqrt(T) patches span pt_seq_len, and so does
    the text.
    """
    half, (height, width) = head_dim // 2, grid
    side = (height * width) ** 0.5
    span = side if pt_seq_len is None else pt_seq_len
    each = (half - TEXT_ANGLES if text_len else half) // 2
    slow = BASE ** (-torch.arange(each, dtype=torch.float64) / each)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = torch.cat([(axis.reshape(-1, 1) * (span / side)) * slow for axis in (rows, columns)], 1)
    if text_len:
        time = BASE ** (-torch.arange(TEXT_ANGLES, dtype=torch.float64) / TEXT_ANGLES)
        places = torch.arange(text_len, dtype=torch.float64).unsqueeze(1) * (span / text_len)
        text = torch.cat([places * time, torch.zeros(text_len, angles.shape[1], dtype=torch.float64)], 1)
        angles = torch.cat([torch.zeros(angles.shape[0], TEXT_ANGLES, dtype=torch.float64), angles], 1)
        angles = torch.cat([text, angles])
    return angles.cos().float(), angles.sin().float()


class STARFlow(CausalFlow):
    """Causal flow blocks with a start vector, so that every token is transformed, and axial rotary positions.

    layers: of each block, data side first; the last, deep block is the first of the inverse.
    y: text features (B, text_len, text_dim), put in front of the sequence; y=None means zeros. With cond_top_only the
        deep block alone sees them, and it alone is guided.
    soft_clip: of the raw outputs; scale "softplus" or "exp"; final_norm, qk_norm, post_norm, norm, mlp, kv_heads, bias:
        see nn.flow_block. pt_seq_len: see axial_rope. reverse_first: True for the published order, in which the deep
        block of an even number runs from left to right.
    forward(x, y=None) -> (z (B, T, D), logdet (B,)), summed over T and D. A new model is the identity.
    Source: Gu et al., STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (2025).

    >>> model = STARFlow(4, 4, 1, channels=64, layers=(1, 2), text_dim=6, text_len=3)
    >>> z, logdet = model(torch.randn(2, 4, 4, 4), torch.randn(2, 3, 6))
    >>> z.shape
    torch.Size([2, 16, 4])
    """

    def __init__(
        self,
        in_channels,
        img_size,
        patch_size,
        channels,
        layers=(2, 2, 2, 2, 2, 24),
        *,
        text_dim=0,
        text_len=0,
        cond_top_only=True,
        head_dim=64,
        kv_heads=None,
        expansion=4,
        norm="layer",
        mlp="gelu",
        bias=True,
        qk_norm=False,
        post_norm=False,
        final_norm=True,
        scale="softplus",
        soft_clip=4.0,
        pt_seq_len=None,
        reverse_first=True,
        patch_layout="ph_pw_c",
    ):
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = tuple(s // patch_size for s in size)
        rule = "text_dim and text_len must be given together"
        checks.require((text_dim > 0) == (text_len > 0), "STARFlow", rule, (text_dim, text_len))
        options = {
            "head_dim": head_dim, "kv_heads": kv_heads, "expansion": expansion, "norm": norm, "mlp": mlp, "bias": bias,
            "qk_norm": qk_norm, "post_norm": post_norm, "final_norm": final_norm, "scale": scale,
            "soft_clip": soft_clip, "start": True,
        }  # fmt: skip
        blocks, deep = [], len(layers) - 1
        for number, count in enumerate(layers):
            sees = text_dim > 0 and (number == deep or not cond_top_only)
            rope = axial_rope(grid, head_dim, text_len=text_len if sees else 0, pt_seq_len=pt_seq_len)
            more = {"rope": rope, "text_dim": text_dim if sees else 0}
            blocks.append(CausalFlowBlock(in_channels * patch_size**2, channels, count, **options, **more))
        self.text = (text_len, text_dim)
        super().__init__(
            in_channels, img_size, patch_size, blocks, patch_layout=patch_layout, reverse_first=reverse_first
        )

    @classmethod
    def from_config(cls, name):
        """A published configuration, untrained; load_state_dict(checkpoint) fills it."""
        return cls(**CONFIGS[name])

    def streams(self, number, block, y, batch):
        if block.proj_txt is None:
            return {}
        weight = block.proj_txt.weight
        y = torch.zeros(batch, *self.text, dtype=weight.dtype, device=weight.device) if y is None else y
        rule = f"y must have shape {(batch, *self.text)}"
        checks.require(tuple(y.shape) == (batch, *self.text), "STARFlow", rule, tuple(y.shape))
        return {"prefix": block.proj_txt(y.to(weight.dtype))}

    def uncond_streams(self, number, block, y, batch):
        if block.proj_txt is None or y is None:
            return {"guidance": 0.0} if self.text[1] else {}
        return {"prefix_uncond": self.streams(number, block, None, batch)["prefix"]}
