"""Flowformer (Wu et al. 2022): Transformers with Flow-Attention for language, time series and images."""

import math

import torch
from torch import nn

from flowattn import checks
from flowattn.ops.flow_attention import FLOW_PRESETS, flow_attention, flow_attention_step


class FlowAttentionLayer(nn.Module):
    """Projections around flow_attention, as the language and time-series models name them."""

    def __init__(self, d_model, num_heads, **options):
        super().__init__()
        checks.require(d_model % num_heads == 0, "Flowformer", "num_heads must divide d_model", (num_heads, d_model))
        self.num_heads, self.options = num_heads, options
        self.query_projection, self.key_projection = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.value_projection, self.out_projection = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def _heads(self, x):
        projections = (self.query_projection, self.key_projection, self.value_projection)
        return (projection(x).unflatten(-1, (self.num_heads, -1)) for projection in projections)

    def forward(self, x, **options):
        """(B, T, d_model) -> the same; with output_final_state=True also the state."""
        y = flow_attention(*self._heads(x), **self.options, **options)
        y, *state = y if options.get("output_final_state") else (y,)
        y = self.out_projection(y.flatten(2))
        return (y, *state) if state else y

    def step(self, x, state):
        """One token (B, d_model) of the causal form: (output, state)."""
        options = {name: value for name, value in self.options.items() if name != "causal"}
        y, state = flow_attention_step(*self._heads(x), state, **options)
        return self.out_projection(y.flatten(1)), state


class _MLP(nn.Module):
    def __init__(self, d_model, dropout):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh")))


class _Block(nn.Module):
    def __init__(self, d_model, num_heads, dropout, options):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = FlowAttentionLayer(d_model, num_heads, **options)
        self.mlp, self.dropout = _MLP(d_model, dropout), nn.Dropout(dropout)

    def forward(self, x, state, keep):
        y = self.attn(self.ln_1(x), initial_state=state, output_final_state=keep)
        y, state = y if keep else (y, None)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x)), state

    def step(self, x, state):
        y, state = self.attn.step(self.ln_1(x), state)
        x = x + y
        return x + self.mlp(self.ln_2(x)), state


class FlowformerLM(nn.Module):
    """A GPT with causal Flow-Attention; parameters are named as in minGPT with Flowformer's attention.

    forward(ids (B, T)) -> logits (B, T, vocabulary). `state=` continues earlier tokens, `output_state=True` also
    returns the state, a list of one FlowState a layer; step(ids (B,), state) is one token. Positions are counted by the
    state; `block_size` bounds them.
    preset: one of FlowformerLM.PRESETS, which sets layers, heads and width; each can be given alone.

    >>> model = FlowformerLM(65, 32, preset="nano").eval()
    >>> logits = model(torch.zeros(1, 5, dtype=torch.int64))
    >>> tuple(logits.shape)
    (1, 5, 65)
    """

    PRESETS = {
        "nano": (3, 3, 48),
        "micro": (4, 4, 128),
        "mini": (6, 6, 192),
        "gopher-44m": (8, 16, 512),
        "gpt2": (12, 12, 768),
        "medium": (24, 16, 1024),
        "large": (36, 20, 1280),
        "xl": (48, 25, 1600),
    }

    def __init__(
        self, vocab_size, block_size, *, preset="nano", num_layers=None, num_heads=None, d_model=None, dropout=0.1,
        clamp=1.0,
    ):  # fmt: skip
        super().__init__()
        checks.require(preset in self.PRESETS, "FlowformerLM", f"preset must be one of {list(self.PRESETS)}", preset)
        layers, heads, width = (a or b for a, b in zip((num_layers, num_heads, d_model), self.PRESETS[preset]))
        self.block_size = block_size
        options = {"causal": True, "clamp": clamp}
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "wpe": nn.Embedding(block_size, width),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(_Block(width, heads, dropout, options) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, state=None, *, output_state=False):
        start = 0 if state is None else state[0].n[:, None]
        checks.require(
            ids.shape[1] <= self.block_size, "FlowformerLM", f"at most block_size={self.block_size} tokens",
            ids.shape[1],
        )  # fmt: skip
        positions = start + torch.arange(ids.shape[1], device=ids.device)
        x = self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(positions))
        after = []
        for i, block in enumerate(self.transformer.h):
            x, last = block(x, None if state is None else state[i], output_state)
            after.append(last)
        logits = self.lm_head(self.transformer.ln_f(x))
        return (logits, after) if output_state else logits

    def step(self, ids, state=None):
        """(logits (B, vocabulary), state) of one token (B,) after those of `state`; None before the first."""
        positions = torch.zeros_like(ids) if state is None else state[0].n
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        after = []
        for i, block in enumerate(self.transformer.h):
            x, last = block.step(x, None if state is None else state[i])
            after.append(last)
        return self.lm_head(self.transformer.ln_f(x)), after

    @torch.no_grad()
    def generate(self, ids, length):
        """`ids` (B, T) continued by `length` tokens, each the likeliest; the cost of one does not grow."""
        logits, state = self(ids, output_state=True)
        logits, out = logits[:, -1], [ids]
        for _ in range(length):
            out.append(logits.argmax(-1, keepdim=True))
            logits, state = self.step(out[-1][:, 0], state)
        return torch.cat(out, 1)


class _SeriesLayer(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, dropout):
        super().__init__()
        self.attention = FlowAttentionLayer(d_model, num_heads, **FLOW_PRESETS["timeseries"])
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.Dropout(dropout)

    def forward(self, x, masks):
        x = self.norm1(x + self.dropout(self.attention(x, **masks)))
        y = self.dropout(nn.functional.gelu(self.conv1(x.mT)))
        return self.norm2(x + self.dropout(self.conv2(y).mT))


class _SeriesEncoder(nn.Module):
    def __init__(self, d_model, num_heads, num_layers, d_ff, dropout):
        super().__init__()
        self.attn_layers = nn.ModuleList(_SeriesLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x, masks):
        for layer in self.attn_layers:
            x = layer(x, masks)
        return self.norm(x)


class _Positions(nn.Module):
    """Positions added to (T, B, d_model): learned, or the sines of the original Transformer."""

    def __init__(self, d_model, max_len, dropout, learnable):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        if learnable:
            self.pe = nn.Parameter(torch.empty(max_len, 1, d_model).uniform_(-0.02, 0.02))
            return
        angles = torch.arange(max_len)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, d_model, 2) / d_model)
        pe = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :d_model]
        self.register_buffer("pe", pe.unsqueeze(1))

    def forward(self, x):
        return self.dropout(x + self.pe[: x.shape[0]])


class FlowformerEncoder(nn.Module):
    """Flowformer for time-series classification: forward(x (B, T, features), padding_mask (B, T)) -> logits.

    padding_mask: bool, True = real. As published, padded steps take part in attention and are zeroed before the
    classifier; `mask_attention=True` keeps them out of attention too. T must be max_len.
    """

    def __init__(
        self, features, max_len, num_classes, *, d_model=512, num_heads=8, num_layers=2, d_ff=2048, dropout=0.1,
        learnable_positions=True, mask_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.max_len, self.mask_attention = d_model, max_len, mask_attention
        self.project_inp = nn.Linear(features, d_model)
        self.pos_enc = _Positions(d_model, max_len, dropout, learnable_positions)
        self.encoder = _SeriesEncoder(d_model, num_heads, num_layers, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(d_model * max_len, num_classes)

    def forward(self, x, padding_mask=None):
        rule = f"x must have shape (B, {self.max_len}, features)"
        checks.require(x.dim() == 3 and x.shape[1] == self.max_len, "FlowformerEncoder", rule, tuple(x.shape))
        x = self.project_inp(x) * math.sqrt(self.d_model)
        x = self.pos_enc(x.transpose(0, 1)).transpose(0, 1)
        masked = padding_mask is not None and self.mask_attention
        x = self.encoder(x, {"key_mask": padding_mask, "query_mask": padding_mask} if masked else {})
        x = self.dropout(nn.functional.gelu(x))
        if padding_mask is not None:
            x = x * padding_mask.unsqueeze(-1)
        return self.output_layer(x.flatten(1))


class _VisionAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(flow_attention(q, k, v, **FLOW_PRESETS["vision"]).flatten(2))


class _VisionMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _VisionBlock(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = _VisionAttention(dim, num_heads), _VisionMLP(dim)
        self.gamma, self.drop_path = nn.Parameter(torch.full((dim,), 1e-5)), drop_path

    def _drop(self, x):
        """Drops the whole branch of a sample, in training."""
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(kept) / kept

    def forward(self, x):
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.gamma * self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, channels, dim, size):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, size)

    def forward(self, x):
        return self.proj(x)


class FlowformerVision(nn.Module):
    """A pyramid of four stages on images: forward(x (B, 3, img_size, img_size)) -> logits (B, num_classes).

    The layer scale `gamma` acts on the MLP alone; features are averaged over the last tokens. The defaults are the
    trained configuration (224 pixels, head widths 8, 16, 32, 64).
    """

    def __init__(
        self, num_classes=1000, *, img_size=224, in_channels=3, embed_dims=(96, 192, 384, 768), depths=(3, 3, 10, 3),
        num_heads=12, drop_path=0.2,
    ):  # fmt: skip
        super().__init__()
        name = "FlowformerVision"
        checks.require(img_size % 32 == 0, name, "img_size must be a multiple of 32", img_size)
        fits = all(dim % num_heads == 0 for dim in embed_dims)
        checks.require(fits, name, "num_heads must divide embed_dims", (num_heads, embed_dims))
        channels = (in_channels, *embed_dims)
        self.patch_embed = nn.ModuleList(
            _PatchEmbed(a, b, 4 if i == 0 else 2) for i, (a, b) in enumerate(zip(channels, embed_dims))
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // 4) ** 2, embed_dims[0]))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = (drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths)))  # deeper blocks drop more
        self.blocks = nn.ModuleList(
            nn.ModuleList(_VisionBlock(dim, num_heads, next(rates)) for _ in range(depth))
            for dim, depth in zip(embed_dims, depths)
        )
        self.norm, self.head = nn.LayerNorm(embed_dims[-1], eps=1e-6), nn.Linear(embed_dims[-1], num_classes)

    def forward(self, x):
        for stage, (embed, blocks) in enumerate(zip(self.patch_embed, self.blocks)):
            x = embed(x)
            height = x.shape[2]
            x = x.flatten(2).mT
            if stage == 0:
                x = x + self.pos_embed
            for block in blocks:
                x = block(x)
            if stage + 1 < len(self.blocks):
                x = x.mT.unflatten(2, (height, -1))
        return self.head(self.norm(x).mean(1))
