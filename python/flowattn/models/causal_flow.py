"""What TarFlow and STARFlow share: patches, the walk over the blocks, likelihood, sampling and denoising."""

import math

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.flow_inverse import BlockPlan, InverseInfo, flow_forward, flow_inverse

PATCH_LAYOUTS = ("c_ph_pw", "ph_pw_c")


def patchify(images, patch, layout):
    """(B, c, h, w) -> (B, T, D): patches row by row; inside one the channel slowest, or fastest."""
    order = (0, 2, 4, 1, 3, 5) if layout == "c_ph_pw" else (0, 2, 4, 3, 5, 1)
    split = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return split.permute(order).flatten(3).flatten(1, 2)


def unpatchify(tokens, patch, channels, grid, layout):
    """The inverse of patchify; grid: rows and columns of patches."""
    inner = (channels, patch, patch) if layout == "c_ph_pw" else (patch, patch, channels)
    order = (0, 3, 1, 4, 2, 5) if layout == "c_ph_pw" else (0, 5, 1, 3, 2, 4)
    split = tokens.unflatten(2, inner).unflatten(1, grid)
    return split.permute(order).flatten(4).flatten(2, 3)


class CausalFlow(nn.Module):
    """A stack of causal flow blocks over the patches of an image. Subclasses make the blocks and say what conditions
    them: `streams(number, block, condition, batch)` gives the keyword arguments of flow_forward for one block,
    `uncond_streams` those of flow_inverse for its unconditional stream.

    reverse_first: whether block 0 runs over the tokens in reverse; blocks take turns.
    """

    def __init__(self, in_channels, img_size, patch_size, blocks, *, patch_layout="c_ph_pw", reverse_first=False):
        super().__init__()
        name = type(self).__name__
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        rule = f"patch_layout must be one of {PATCH_LAYOUTS}"
        checks.require(patch_layout in PATCH_LAYOUTS, name, rule, repr(patch_layout))
        checks.require(all(s % patch_size == 0 for s in size), name, f"patch_size must divide {size}", patch_size)
        self.in_channels, self.patch_size, self.patch_layout = in_channels, patch_size, patch_layout
        self.grid = tuple(s // patch_size for s in size)
        self.tokens, self.features = self.grid[0] * self.grid[1], in_channels * patch_size**2
        self.reverse_first = reverse_first
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("var", torch.ones(self.tokens, self.features))
        self.plans = [BlockPlan() for _ in self.blocks]  # what method="auto" does; see calibrate

    def permutation(self, number):
        return "reverse" if (number % 2 == 1) != self.reverse_first else None

    def to_tokens(self, x):
        shape = (self.in_channels, *(g * self.patch_size for g in self.grid))
        rule = f"x must have shape (B, {', '.join(map(str, shape))})"
        checks.require(tuple(x.shape[1:]) == shape, type(self).__name__, rule, tuple(x.shape))
        return patchify(x, self.patch_size, self.patch_layout)

    def to_images(self, tokens):
        return unpatchify(tokens, self.patch_size, self.in_channels, self.grid, self.patch_layout)

    def forward(self, x, y=None, *, logdet_reduction="sum"):
        """(z (B, T, D), log|det dz/dx| (B,)) of images x (B, c, h, w); "mean" is the published loss's reduction.

        y: what the model is conditioned on, see the class; None for nothing.
        """
        z, total = self.to_tokens(x), 0
        for number, block in enumerate(self.blocks):
            z, logdet = flow_forward(z, block, logdet_reduction=logdet_reduction, **self._options(number, y, len(x)))
            total = total + logdet
        return z, total

    def _options(self, number, y, batch):
        return {"permutation": self.permutation(number), **self.streams(number, self.blocks[number], y, batch)}

    def loss(self, x, y=None):
        """0.5 mean(z^2) - mean log-determinant, a scalar: nats a dimension but for 0.5 log(2 pi)."""
        z, logdet = self(x, y, logdet_reduction="mean")
        return 0.5 * z.square().mean() - logdet.mean()

    def log_prob(self, x, y=None):
        """Natural logarithm of the density of each image (B,)."""
        z, logdet = self(x, y)
        prior = z.square() / self.var + torch.log(2 * math.pi * self.var)
        return logdet - 0.5 * prior.sum((1, 2))

    def inverse(self, z, y=None, *, method="auto", guidance=0.0, guided_blocks=None, return_info=False, **options):
        """Images (B, c, h, w) of noise z (B, T, D); with return_info also an InverseInfo of tensors (blocks, B).

        method, guidance and the other options: see flow_inverse. method="auto" follows `plans`, which `calibrate` sets;
        a new model runs sequentially. guided_blocks: numbers of the blocks that are guided; all by default.
        """
        rule = f"z must have shape (B, {self.tokens}, {self.features})"
        checks.require(z.shape[1:] == (self.tokens, self.features), type(self).__name__, rule, tuple(z.shape))
        infos = []
        for number in reversed(range(len(self.blocks))):
            block = self.blocks[number]
            more = dict(options)
            if guided_blocks is None or number in guided_blocks:
                more |= {"guidance": guidance, **self.uncond_streams(number, block, y, len(z))}
            more |= self._options(number, y, len(z))
            z, info = flow_inverse(z, block, method=method, plan=self.plans[number], return_info=True, **more)
            infos.append(info)
        x = self.to_images(z)
        return (x, _stacked(infos[::-1])) if return_info else x

    def noise(self, count, generator=None):
        """A draw of z (count, T, D) from the prior."""
        parameter = next(self.parameters())
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shape = (count, self.tokens, self.features)
        z = torch.randn(shape, generator=generator, device=parameter.device, dtype=wide)
        return z * self.var.to(wide).sqrt()

    @torch.no_grad()
    def sample(self, count, y=None, *, generator=None, return_info=False, **options):
        """Draw `count` images; options as for inverse."""
        return self.inverse(self.noise(count, generator), y, return_info=return_info, **options)

    def denoise(self, x, y=None, *, noise_std, eta=1.0):
        """One step of Tweedie's formula, x + eta noise_std^2 grad_x log p(x): undo the noise that training added.

        noise_std: standard deviation of that noise. eta: 1 by theory; 0.9 to 1.4 in published settings.
        Cost: one forward and one backward with respect to x alone.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            factor = 1.0 if next(self.parameters()).dtype in (torch.float32, torch.float64) else 65536.0
            (gradient,) = torch.autograd.grad(self.log_prob(leaf, y).sum() * factor, leaf)
        return x + eta * noise_std**2 / factor * gradient

    def calibrate(self, x, y=None, *, batch=None):
        """Measure each block on images x and set `plans` for sampling `batch` images (len(x) by default).

        Returns a list of flow_planning.Calibration, one for each block.
        """
        from flowattn.ops import flow_planning

        found, tokens = [], self.to_tokens(x)
        with torch.no_grad():
            for number, block in enumerate(self.blocks):
                options = self._options(number, y, len(x))
                measured, tokens = flow_planning.calibrate(block, tokens, **options)
                found.append(measured)
        rates = flow_planning.measure_rates(self.blocks[-1], tokens[:1])
        self.plans = [flow_planning.plan(block, c, rates, batch or len(x)) for block, c in zip(self.blocks, found)]
        return found

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Published checkpoints carry tables that follow from the shapes.
        for key in list(state_dict):
            if key.startswith(prefix) and key.endswith((".attn_mask", "feat_rope.freqs_cos", "feat_rope.freqs_sin")):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _stacked(infos):
    fields = [torch.stack(parts) for parts in zip(*(info[:-2] for info in infos))]
    return InverseInfo(*fields, tuple(info.method for info in infos), max(info.cache_bytes for info in infos))


def resample_bad(model, z, info, y=None, *, generator=None, **options):
    """Draw the samples again whose status is NONFINITE in some block: (z, images) of those alone, and their indices.

    z (B, T, D) and info as they went into and came from model.inverse; y is indexed along with them.
    """
    bad = (info.status == 3).any(0).nonzero().flatten()
    fresh = model.noise(len(bad), generator)
    labels = y[bad] if isinstance(y, torch.Tensor) else y
    return fresh, model.inverse(fresh, labels, **options), bad
