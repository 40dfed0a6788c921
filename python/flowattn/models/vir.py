"""ViR: a vision Transformer with retention, trained in parallel and run token by token or chunk by chunk."""

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.decays import decay_preset
from flowattn.ops.linear_attention import LinearState, linear_attention, linear_attention_step

_NAME = "ViR"
FORMS = ("chunkwise", "parallel", "recurrent")
# Width, layers, heads of the published models; patches of 16 or 14 pixels.
SIZES = {"tiny": (64, 2, 2), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


class Retention(nn.Module):
    """o_t = sum_{s <= t} gamma^(t - s) (q_t . k_s) v_s in three forms that are equal.

    softmax_compat: the parallel form of the released code instead, softmax of the decayed scores over the whole row. It
    sees later tokens, whose masked score 0 weighs e^0, and equals none of the other forms.
    """

    def __init__(self, dim, num_heads, *, qkv_bias=True, bidirectional=False, softmax_compat=False):
        super().__init__()
        self.num_heads, self.bidirectional, self.softmax_compat = num_heads, bidirectional, softmax_compat
        self.qkv, self.out_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.register_buffer("decay", decay_preset("vir", num_heads), persistent=False)

    def heads(self, x):
        """q, k, v (..., H, D) of x (..., dim)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(self, x, form="chunkwise"):
        q, k, v = self.heads(x)
        if form == "parallel" or self.softmax_compat:
            out = self.parallel(q, k, v)
        else:
            out = linear_attention(q, k, v, decay=self.decay, causal=not self.bidirectional)
        return self.out_proj(out.flatten(-2))

    def parallel(self, q, k, v):
        places = torch.arange(q.shape[1], device=q.device)
        apart = places[:, None] - places
        weights = (self.decay[:, None, None] * apart.abs()).exp()
        if not self.bidirectional:
            weights = weights.tril()
        scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k) * weights.to(q.dtype)
        if self.softmax_compat:
            scores = scores.softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", scores, v)

    def step(self, x, state):
        """(output (B, dim), the new LinearState) for one token."""
        out, state = linear_attention_step(*self.heads(x), state, decay=self.decay)
        return self.out_proj(out.flatten(-2)), state


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, layer_scale, **retention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.retention, self.mlp = Retention(dim, num_heads, **retention), Mlp(dim, int(mlp_ratio * dim))
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)

    def forward(self, x, form):
        x = x + self.ls1(self.retention(self.norm1(x), form))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def step(self, x, state):
        retained, state = self.retention.step(self.norm1(x), state)
        x = x + self.ls1(retained)
        return x + self.ls2(self.mlp(self.norm2(x))), state


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class ViR(nn.Module):
    """Images (B, in_chans, img_size, img_size) to logits (B, num_classes), or features (B, dim) with num_classes=0.

    The class token stands last and is pooled, so it has seen every patch however the tokens are run. Parameters are
    named as in timm's vision Transformers, with `retention` for `attn`; pos_embed covers the patches alone.
    bidirectional: retention decays to both sides; the recurrent form is then not to be had.
    Source: Hatamizadeh et al., ViR: Towards Efficient Vision Retention Backbones (2023), the linear form.

    >>> model = ViR.of_size("tiny", img_size=32, patch_size=8, num_classes=5).eval()
    >>> images = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(model(images), model(images, form="recurrent"), atol=1e-5)
    True
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12, *,
        mlp_ratio=4.0, layer_scale=1e-5, qkv_bias=True, bidirectional=False, softmax_compat=False,
    ):  # fmt: skip
        super().__init__()
        checks.require(img_size % patch_size == 0, _NAME, "patch_size must divide img_size", (patch_size, img_size))
        checks.require(embed_dim % num_heads == 0, _NAME, "num_heads must divide embed_dim", (num_heads, embed_dim))
        self.bidirectional = bidirectional
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2, embed_dim) * 0.02)
        options = {"qkv_bias": qkv_bias, "bidirectional": bidirectional, "softmax_compat": softmax_compat}
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, layer_scale, **options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    @classmethod
    def of_size(cls, size, **options):
        """A published size, "small", "base" or "large", or "tiny" for tests."""
        checks.require(size in SIZES, _NAME, f"size must be one of {', '.join(SIZES)}", repr(size))
        embed_dim, depth, num_heads = SIZES[size]
        return cls(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **options)

    def tokens(self, images):
        """Patches with their positions, then the class token (B, T, dim)."""
        patches = self.patch_embed(images) + self.pos_embed
        return torch.cat([patches, self.cls_token.expand(len(patches), -1, -1)], 1)

    def forward(self, images, form="chunkwise"):
        """form: "chunkwise" (the kernel), "parallel" (all pairs, plain torch) or "recurrent" (token by token)."""
        checks.require(form in FORMS, _NAME, f"form must be one of {', '.join(FORMS)}", repr(form))
        x = self.tokens(images)
        if form == "recurrent":
            state = self.init_state(len(x))
            for token in x.unbind(1):
                last, state = self.step(token, state)
            return self.head(self.norm(last))
        for block in self.blocks:
            x = block(x, form)
        return self.head(self.norm(x[:, -1]))

    def init_state(self, batch):
        """The state before the first token: a LinearState for each block."""
        rule = "the recurrent form needs retention in one direction"
        checks.require(not self.bidirectional, _NAME, rule, "bidirectional=True", error=NotImplementedError)
        weight = self.cls_token
        heads = self.blocks[0].retention.num_heads if len(self.blocks) else 1
        width, wide = weight.shape[-1] // heads, checks.state_dtype(weight)
        s = torch.zeros(batch, heads, width, width, dtype=wide, device=weight.device)
        return [LinearState(s) for _ in self.blocks]

    def step(self, token, state):
        """(features (B, dim) after the last block, the new state) for one token of `tokens`."""
        after = []
        for block, before in zip(self.blocks, state):
            token, own = block.step(token, before)
            after.append(own)
        return token, after
