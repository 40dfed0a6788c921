"""linear_scan against a loop over time and a library scan. float32; gates for each element, or one a head."""

import torch

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "linear_scan"
GPU_SHAPES = (
    ((1, 1024, 8, 64), False),
    ((8, 8192, 1, 1536), True),
    ((8, 4096, 8, 64), True),
    ((8, 4096, 8, 64), False),
    ((1, 65536, 8, 64), False),
)
CPU_SHAPES = (((8, 4096, 8, 64), True), ((8, 4096, 8, 64), False), ((1, 4096, 8, 64), True), ((1, 4096, 1, 64), True))
QUICK_SHAPES = (((2, 33, 2, 8), True), ((2, 33, 2, 8), False))  # (B, T, H, D), gates for each element


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape, full in shapes:
        yield make_case(shape, full, device)


def make_case(shape, full, device):
    generator = torch.Generator(device).manual_seed(0)
    gates = torch.rand(shape if full else shape[:3], generator=generator, device=device)
    tokens, grad_output = torch.randn(2, *shape, generator=generator, device=device)
    wide, narrow = 4 * tokens.numel(), 4 * gates.numel()
    return Case(
        name="B{} T{} H{} D{}".format(*shape) + ("" if full else " gate a head"),
        inputs=(gates, tokens),
        grad_output=grad_output,
        truth=both_directions(gates, tokens, grad_output, torch.float64),
        plain=both_directions(gates, tokens, grad_output, torch.float32),
        bytes={"fwd": 2 * wide + narrow, "bwd": 3 * wide + 2 * narrow},  # b, h; h, dh, db; a, da
        flops={"fwd": 2 * tokens.numel(), "bwd": 4 * tokens.numel()},
        context=None,
        atol=1e-6,
    )


def loop(gates, tokens):
    gates = gates if gates.dim() == tokens.dim() else gates.unsqueeze(-1)
    h, outputs = torch.zeros_like(tokens[:, 0]), []
    for a, b in zip(gates.unbind(1), tokens.unbind(1)):
        h = a * h + b
        outputs.append(h)
    return torch.stack(outputs, 1)


def both_directions(gates, tokens, grad_output, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in (gates, tokens)]
    output = loop(*inputs)
    gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    return {"fwd": (output.detach(),), "bwd": gradients}


def flowattn_call(case):
    return Bound(fa.linear_scan)


def python_loop(case):
    if case.inputs[1].device.type == "cuda":
        raise Unsupported("two launches a token: it is measured on a CPU")
    return Bound(loop)


def associative_scan(case):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    if case.inputs[0].device.type != "cuda":
        raise Unsupported("its fast form is a GPU kernel")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    @torch.compile(dynamic=False)
    def call(gates, tokens):
        gates = gates if gates.dim() == tokens.dim() else gates.unsqueeze(-1).expand(tokens.shape).contiguous()
        return scan(combine, (gates, tokens), 1, combine_mode="pointwise")[1]

    return Bound(call)


def channels_first(case, scan):
    """A scan of (B, channels, T) tensors. Their layout is made outside the clock."""
    gates, tokens = case.inputs
    if gates.shape != tokens.shape or tokens.device.type != "cuda":
        raise Unsupported("it takes a gate for each element, on a GPU")
    shape = (tokens.shape[0], *tokens.shape[2:], tokens.shape[1])
    return Bound(
        scan,
        lambda x: x.flatten(2).transpose(1, 2).contiguous(),
        lambda x: x.unflatten(1, shape[1:3]).permute(0, 3, 1, 2),
    )


def accelerated_scan(case):
    from accelerated_scan.warp import scan

    return channels_first(case, scan)


def fla_hgrn(case):
    from fla.ops.hgrn import chunk_hgrn

    gates, tokens = case.inputs
    if gates.shape != tokens.shape or tokens.device.type != "cuda":
        raise Unsupported("it takes a gate for each element, on a GPU")

    def call(gates, tokens):
        return chunk_hgrn(tokens.flatten(2), gates.log().flatten(2))[0].view_as(tokens)

    return Bound(call)


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("Python loop", python_loop),
    ("torch associative_scan", associative_scan),
    ("accelerated-scan", accelerated_scan),
    ("fla chunk_hgrn", fla_hgrn),
)
MINE = ("flowattn",)
NOTE = (
    "The loop launches two kernels a time step; with many rows its steps are limited by memory like the scan."
    " chunk_hgrn takes logarithms of gates, which its time includes."
)
