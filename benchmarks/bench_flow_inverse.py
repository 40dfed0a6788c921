"""flow_inverse through whole TarFlow models against the published algorithm: caches that grow by concatenation.

On a CPU a small model (16 x 16 pixels, patch 2, 128 channels, 4 blocks of 4 layers, float32); on a GPU one
block of the published 64-pixel model in bfloat16. Output layers are random, so that every token takes work.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Bound, Case, Unsupported
from flowattn.models.tarflow import TarFlow

OP = "flow_inverse"
SMALL = {"img_size": 16, "patch_size": 2, "channels": 128, "num_blocks": 4, "layers_per_block": 4}
LARGE = {"img_size": 64, "patch_size": 2, "channels": 768, "num_blocks": 1, "layers_per_block": 8}
QUICK = {"img_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1}
BATCHES, GPU_BATCHES = (1, 16), (1, 16, 64)
OUTPUT_STD = {"small": 0.02, "large": 0.01}  # larger ones make the inverse amplify rounding over the tokens
ATOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def cases(device, quick):
    """One model; the noise of a smaller batch is the beginning of the largest one's."""
    large = device.type == "cuda" and not quick
    config = QUICK if quick else LARGE if large else SMALL
    dtype = torch.bfloat16 if large else torch.float32
    batches = GPU_BATCHES if large else BATCHES
    generator = torch.Generator().manual_seed(0)
    model = TarFlow(3, **config).eval().requires_grad_(False)
    std = OUTPUT_STD["large" if large else "small"]
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.to(device, dtype)
    z = torch.randn(max(batches), model.tokens, model.features, generator=generator).to(device)
    exact = TarFlow(3, **config).to(device, torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = exact.inverse(z.double(), method="sequential")
        plain = concatenating(model, z)
        model.calibrate(model.to_images(z[:16]) if large else plain)
    for batch in batches:
        yield make_case(model, z[:batch], truth[:batch], plain[:batch], config, dtype)


def make_case(model, z, truth, plain, config, dtype):
    batch, steps, size = len(z), model.tokens - 1, model.var.element_size()
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if not name.endswith("_embed"))
    cached = batch * len(model.blocks) * config["layers_per_block"] * config["channels"] * steps / 2
    return Case(
        name=f"B{batch} T{model.tokens} C{config['channels']} {config['num_blocks']}x{config['layers_per_block']}",
        inputs=(z,),
        grad_output=None,
        truth={"fwd": (truth,)},
        plain={"fwd": (plain,)},
        bytes={"fwd": steps * size * (weights + 2 * cached)},  # of the sequential method
        flops={"fwd": steps * (2 * batch * weights + 4 * cached)},
        context=model,
        atol=ATOL[dtype],
        resident=size * weights,
    )


def concatenating(model, z):
    """Every block token by token, its keys and values concatenated with those before at every layer of every step."""
    for number in reversed(range(len(model.blocks))):
        block, turned = model.blocks[number], number % 2 == 1
        z = z.flip(1) if turned else z
        positions = block.pos_embed.flip(0) if turned else block.pos_embed
        heads, width = block.spec.heads, block.proj_in.weight.dtype
        tokens, caches = [z[:, :1]], [None] * len(block.attn_blocks)
        for t in range(z.shape[1] - 1):
            h = block.proj_in(tokens[-1].to(width)) + positions[t]
            for number_of_layer, layer in enumerate(block.attn_blocks):
                q, k, v = layer.attention.qkv(layer.attention.norm(h)).unflatten(2, (3, heads, -1)).unbind(2)
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                if caches[number_of_layer] is not None:
                    k, v = (torch.cat(pair, 2) for pair in zip(caches[number_of_layer], (k, v)))
                caches[number_of_layer] = (k, v)
                out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                h = h + layer.attention.proj(out)
                first, activation, last = layer.mlp.main
                h = h + last(activation(first(layer.mlp.norm(h))))
            alpha, mu = block.proj_out(h).float().chunk(2, 2)
            tokens.append(z[:, t + 1 : t + 2] * torch.exp(alpha) + mu)
        z = torch.cat(tokens, 1)
        z = z.flip(1) if turned else z
    return model.to_images(z)


def by_method(method):
    def provider(case):
        return Bound(lambda z: case.context.inverse(z, method=method))

    return provider


def planned(case):
    if all(plan.method == "sequential" for plan in case.context.plans):
        raise Unsupported("its plan is the sequential method")
    return by_method("auto")(case)


def concatenated(case):
    if case.inputs[0].is_cuda and len(case.inputs[0]) > 1:
        raise Unsupported("it takes seconds a call: on a GPU it is measured with one stream")
    return Bound(lambda z: concatenating(case.context, z))


PROVIDERS = (
    ("flowattn sequential", by_method("sequential")),
    ("flowattn auto", planned),
    ("flowattn frontier", by_method("frontier")),
    ("concatenated caches", concatenated),
)
MINE = ("flowattn sequential", "flowattn auto", "flowattn frontier")
NOTE = (
    "Floor: weights and caches once a token, or the arithmetic of the sequential method. Random output layers are hard "
    "to sweep; `auto` is measured where its plan is not the sequential method."
)
