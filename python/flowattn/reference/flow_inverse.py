"""The network of a flow block in plain torch, float32 or float64: all tokens at once, or a window over a cache."""

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)


def linear(x, layer, exact=False):
    """x W^T + b, computed in the weights' type where that is a half type (unless `exact`), else in the type of x."""
    return product(x, layer, exact).to(x.dtype)


def product(x, layer, exact=False):
    """The same in the type in which it was computed."""
    half = layer.weight.dtype in HALF and x.dtype != torch.float64 and not exact
    dtype = layer.weight.dtype if half else torch.float32 if x.dtype in HALF else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


def normalise(x, norm, spec):
    if norm is None:
        return x
    weight = norm.weight.to(x.dtype)
    if spec.norm == "layer":
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps) * weight


def rotate(x, rope):
    """Turn the pairs (2i, 2i + 1) of x (S, n, H, d) by angles given as cos and sin (S or 1, n, 1, d / 2)."""
    cos, sin = (part.to(x.dtype) for part in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def embed(block, tokens, conditions, steps=None):
    """h of the inputs (S, n, D) at `steps`: all if None, else indices (B, n)."""
    h = linear(tokens, block.proj_in, exact=True)
    streams = conditions.streams
    if conditions.positions is not None:
        positions = conditions.positions
        if steps is not None:
            positions = positions.expand(steps.shape[0], -1, -1)
            positions = torch.gather(positions, 1, steps.unsqueeze(-1).expand(-1, -1, positions.shape[-1]))
        h = h + (positions.repeat(streams, 1, 1) if positions.shape[0] > 1 else positions)
    return h if conditions.cond is None else h + conditions.cond.unsqueeze(1)


def transformer(block, h, rope, attend):
    """The layers over h (S, n, C); attend(layer number, q, k, v) -> (S, n, H d) with q (S, n, H, d).

    What a product rounded to a half type stays in it up to where the next one rounds again.
    """
    spec = block.spec
    heads, kv_heads, width = spec.heads, spec.kv_heads, spec.head_dim
    for number, layer in enumerate(block.layers):
        qkv = product(normalise(h, layer.norm1, spec), layer.qkv).unflatten(-1, (heads + 2 * kv_heads, width))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        if layer.q_norm is not None or rope is not None:
            q, k = normalise(q.to(h.dtype), layer.q_norm, spec), normalise(k.to(h.dtype), layer.k_norm, spec)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        h = h + normalise(product(attend(number, q, k, v), layer.proj).to(h.dtype), layer.post1, spec)
        a = normalise(h, layer.norm2, spec)
        if spec.mlp == "gelu":
            a = F.gelu(product(a, layer.up))
        else:
            a = F.gelu(linear(a, layer.gate), approximate="tanh") * product(a, layer.up)
        h = h + normalise(product(a, layer.down).to(h.dtype), layer.post2, spec)
    return h


def outputs(block, h):
    """Raw (alpha, mu), never rounded to a half type: an alpha near 4 would then move sigma by 3 %."""
    return linear(normalise(h, block.final_norm, block.spec), block.proj_out, exact=True)


def inputs_of(block, tokens):
    """What the steps read, of tokens (B, T, D)."""
    if block.start is None:
        return tokens[:, :-1]
    start = block.start.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
    return torch.cat([start, tokens[:, :-1]], 1)


def parallel(block, tokens, conditions):
    """Raw outputs (S, N, 2D) of all steps at once; differentiable in everything."""
    h = embed(block, inputs_of(block, tokens).repeat(conditions.streams, 1, 1), conditions)
    prefix = conditions.prefix_length
    if prefix:
        h = torch.cat([conditions.prefix, h], 1)
    rope = None
    if block.rope is not None:
        rope = [part[: h.shape[1], None] for part in block.rope]
    dtype = block.proj_in.weight.dtype if h.dtype != torch.float64 else h.dtype
    factor = conditions.scale * block.spec.head_dim**0.5  # what the scale adds to the default one
    grouped = block.spec.heads != block.spec.kv_heads

    def attend(number, q, k, v):
        q = q * factor[:, None, None, None]
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    return outputs(block, transformer(block, h, rope, attend)[:, prefix:])


def attention(q, keys, values, scale, slots):
    """Attention of q (S, n, H, d) over caches (S, Hkv, slots, d), each query seeing the slots up to its own (S, n).

    A masked slot must not touch the result even if it holds an infinity or NaN, which 0 * NaN would let through: such
    slots are taken out, and a query that does see one becomes NaN.
    """
    group = q.shape[2] // keys.shape[1]
    q, keys, values = (x.to(scale.dtype) for x in (q, keys, values))
    bad = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))
    keys, values = (x.masked_fill(bad.unsqueeze(-1), 0.0) for x in (keys, values))
    if group > 1:
        keys, values, bad = (x.repeat_interleave(group, 1) for x in (keys, values, bad))
    scores = torch.einsum("snhd,shmd->shnm", q * scale[:, None, None, None], keys)
    scores = scores.masked_fill(bad.unsqueeze(2), float("nan"))
    hidden = torch.arange(keys.shape[2], device=q.device) > slots[:, None, :, None]
    p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return torch.einsum("shnm,shmd->snhd", p, values).flatten(2)


def window(block, tokens, conditions, keys, values, steps, valid, used, attention=attention):
    """Raw outputs (S, n, 2D) of the steps (B, n), whose keys and values go into the cache; `valid` (B, n) marks the
    steps that are meant, -P .. -1 are the prefix, and only the first `used` slots of the cache hold anything.

    keys, values: (layers, S, Hkv, slots, d), whose last slot is the waste bin of the steps that are not meant.
    attention: what takes the place of the function above.
    """
    streams, prefix = conditions.streams, conditions.prefix_length
    read = (steps + block.first - 1).clamp(0, tokens.shape[1] - 1)
    inputs = torch.gather(tokens, 1, read.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    if block.start is not None:
        inputs = torch.where((steps == 0).unsqueeze(-1), block.start.to(inputs.dtype), inputs)
    count = max(block.steps(tokens.shape[1]), 1)
    h = embed(block, inputs.repeat(streams, 1, 1), conditions, steps.clamp(0, count - 1))
    if prefix:
        at = (steps + prefix).clamp(0, prefix - 1).repeat(streams, 1)
        given = torch.gather(conditions.prefix, 1, at.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
        h = torch.where((steps < 0).repeat(streams, 1).unsqueeze(-1), given, h)
    slots = (steps + prefix).repeat(streams, 1)
    to = torch.where(valid.repeat(streams, 1), slots, keys.shape[3] - 1)
    rope = None
    if block.rope is not None:
        rope = [part[slots.clamp(max=part.shape[0] - 1)].unsqueeze(2) for part in block.rope]
    index = to[:, None, :, None]

    def attend(number, q, k, v):
        for cache, x in ((keys[number], k), (values[number], v)):
            x = x.to(cache.dtype).transpose(1, 2)
            cache.scatter_(2, index.expand(x.shape), x)
        return attention(q, keys[number][:, :, :used], values[number][:, :, :used], conditions.scale, slots)

    return outputs(block, transformer(block, h, rope, attend))
