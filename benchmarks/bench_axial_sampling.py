"""Sampling an Axial Transformer: caches against the whole model for each pixel. One case a size of the image."""

import torch

from benchmarks.harness import Bound, Case, Unsupported
from flowattn.models.axial_transformer import AxialTransformer

OP = "axial_sampling"
GPU_SIDES, CPU_SIDES, QUICK_SIDES = (16, 32, 64), (8, 16, 32), (4,)
NAIVE_SIDE = 16  # the largest that is sampled pixel by pixel with the whole model
LEVELS, BATCH = 32, 4


def cases(device, quick):
    for side in QUICK_SIDES if quick else GPU_SIDES if device.type == "cuda" else CPU_SIDES:
        yield make_case(side, device)


def make_case(side, device):
    torch.manual_seed(0)
    model = AxialTransformer((side, side), 1, levels=LEVELS, dim=64, heads=4, exterior_layers=0).to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # at first all logits are equal: the noise alone would decide
    uniform = torch.rand(BATCH, side, side, 1, LEVELS).clamp(1e-9, 1 - 1e-7).to(device)
    noise = -torch.log(-torch.log(uniform))
    with torch.no_grad():
        truth = (model.sample(noise, method="naive" if side <= NAIVE_SIDE else "cached"),)
    parameters = sum(p.numel() for p in model.parameters())
    return Case(
        name=f"B{BATCH} {side}x{side} D64 N2/2",
        inputs=(noise,),
        grad_output=None,
        truth={"fwd": truth},
        plain={"fwd": truth},  # samples are integers: equal or wrong
        bytes={"fwd": noise.numel() * 4},
        flops={"fwd": 2 * parameters * BATCH * side * side},
        context=model,
    )


def sampled(method, case):
    if method == "naive" and case.inputs[0].shape[1] > NAIVE_SIDE:
        raise Unsupported(f"it is too slow above {NAIVE_SIDE} x {NAIVE_SIDE}")
    return Bound(lambda noise: case.context.sample(noise, method=method))


PROVIDERS = (
    ("flowattn", lambda case: sampled("cached", case)),
    ("naive", lambda case: sampled("naive", case)),
)
MINE = ("flowattn",)
NOTE = (
    "The floor is one pass over the model's weights a pixel in parallel; sampling is sequential and bound by launches."
)
