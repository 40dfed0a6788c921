"""TarFlow: a normalizing flow of causal Transformers over image patches (Zhai et al. 2024)."""

from flowattn.models.causal_flow import CausalFlow, resample_bad
from flowattn.nn.flow_block import CausalFlowBlock

__all__ = ["CONFIGS", "TarFlow", "resample_bad"]

# Published models: 8 blocks of 8 layers. Noise: standard deviation added in training, for denoise.
CONFIGS = {
    "imagenet64": {"img_size": 64, "patch_size": 2, "channels": 768, "num_classes": 0},  # noise 0.05
    "imagenet64-cond": {"img_size": 64, "patch_size": 2, "channels": 768, "num_classes": 1000},  # noise 0.05
    "imagenet128-cond": {"img_size": 128, "patch_size": 4, "channels": 1024, "num_classes": 1000},  # noise 0.15
    "afhq256": {"img_size": 256, "patch_size": 8, "channels": 768, "num_classes": 3},  # noise 0.07
    "mnist": {
        "in_channels": 1, "img_size": 28, "patch_size": 4, "channels": 128, "num_blocks": 4, "layers_per_block": 4,
        "num_classes": 10,
    },
}  # fmt: skip


class TarFlow(CausalFlow):
    """Blocks of causal Transformers with turns of token order; the parameter names of the published checkpoints.

    in_channels, img_size (int, or height and width), patch_size: T = (img_size / patch_size)^2 tokens of
        D = in_channels patch_size^2 values. channels: a multiple of head_dim. layers_per_block: an int or one a block.
    num_classes: > 0 for labels y (B,) int64; y=None, and labels below 0, mean the average over all classes.
    nvp: False for the volume-preserving variant, whose blocks shift but do not scale.
    forward(x, y=None) -> (z (B, T, D), logdet (B,)), summed over T and D. A new model is the identity.
    Guidance: the unconditional stream has the average class, and attention temperature attn_temp_uncond.
    Source: Zhai et al., Normalizing Flows are Capable Generative Models (2024).

    >>> import torch
    >>> model = TarFlow(1, 8, 2, channels=64, num_blocks=2, layers_per_block=1, num_classes=10)
    >>> z, logdet = model(torch.randn(3, 1, 8, 8), torch.tensor([4, -1, 0]))
    >>> z.shape, logdet.shape
    (torch.Size([3, 16, 4]), torch.Size([3]))
    >>> model.sample(2, torch.tensor([7, 7]), guidance=1.0).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels,
        img_size,
        patch_size,
        channels,
        num_blocks=8,
        layers_per_block=8,
        *,
        num_classes=0,
        nvp=True,
        head_dim=64,
        expansion=4,
        patch_layout="c_ph_pw",
    ):
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        layers = [layers_per_block] * num_blocks if isinstance(layers_per_block, int) else layers_per_block
        options = {"head_dim": head_dim, "expansion": expansion, "num_classes": num_classes}
        options |= {"tokens": height * width // patch_size**2, "volume_preserving": not nvp}
        features = in_channels * patch_size**2
        blocks = [CausalFlowBlock(features, channels, count, **options) for count in layers]
        super().__init__(in_channels, img_size, patch_size, blocks, patch_layout=patch_layout)

    @classmethod
    def from_config(cls, name):
        """A published configuration, untrained; load_state_dict(checkpoint) fills it."""
        return cls(**{"in_channels": 3, **CONFIGS[name]})

    def streams(self, number, block, y, batch):
        return {"cond": block.condition(y, batch)}

    def uncond_streams(self, number, block, y, batch):
        return {"cond_uncond": None if y is None else block.condition(None, batch)}
