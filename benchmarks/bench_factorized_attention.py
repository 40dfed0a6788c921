"""The factorized kernel integral, parallel form, against einsum and matmul; forward and backward."""

import torch

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "factorized_attention"
GPU_SHAPES = ((8, (32, 33, 16), 5, 96), (4, (64, 64, 64), 6, 64), (16, (128, 128), 4, 64))  # batch, grid, heads, width
CPU_SHAPES = ((1, (32, 33, 16), 5, 96), (4, (64, 64), 4, 32))
QUICK_SHAPES = ((1, (3, 5), 2, 8),)
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # another order of sums than plain torch's, which can be lucky
LETTERS = "klm"


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield make_case(*shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def make_case(batch, grid, heads, width, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    v = torch.randn(batch, *grid, heads, width, generator=generator, device=device).to(dtype)
    kernels = [torch.randn(batch, heads, n, n, generator=generator, device=device) / n**0.5 for n in grid]
    grad_output = torch.randn(batch, *grid, heads, width * len(grid), generator=generator, device=device).to(dtype)
    inputs = (v, *kernels)
    truth, plain = (results(inputs, grad_output, work) for work in (torch.float64, dtype))
    size = v.numel() * v.element_size()
    flops = 2 * v.numel() * sum(grid)
    return Case(
        name=f"B{batch} {'x'.join(map(str, grid))} H{heads} C{width}",
        inputs=inputs,
        grad_output=grad_output,
        truth=truth,
        plain=plain,
        bytes={"fwd": size * (1 + len(grid)), "bwd": size * (2 + len(grid))},
        flops={"fwd": flops, "bwd": 2 * flops},
        context=None,
        atol=ATOL[dtype],
    )


def einsum(v, *kernels):
    grid, parts = LETTERS[: len(kernels)], []
    for letter, kernel in zip(grid, kernels):
        formula = f"bhi{letter},b{grid}hc->b{grid.replace(letter, 'i')}hc"
        parts.append(torch.einsum(formula, kernel.to(v.dtype), v))
    return torch.cat(parts, -1)


def results(inputs, grad_output, dtype):
    """Result and gradients with everything in `dtype`."""
    inputs = [x.to(dtype).detach().requires_grad_() for x in inputs]
    output = einsum(*inputs)
    return {"fwd": (output.detach(),), "bwd": torch.autograd.grad(output, inputs, grad_output.to(dtype))}


def flowattn_call(case):
    axes = tuple(range(1, len(case.inputs)))
    return Bound(lambda v, *kernels: fa.factorized_attention(v, kernels, axes))


def matmul(case):
    def apply(v, *kernels):
        parts = []
        for axis, kernel in enumerate(kernels, 1):
            lines = v.movedim(axis, -2)
            kernel = kernel.to(v.dtype).view(len(v), *(1,) * (lines.dim() - 4), *kernel.shape[1:])
            parts.append((kernel @ lines).movedim(-2, axis))
        return torch.cat(parts, -1)

    return Bound(apply)


def compiled(case):
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("its fast form is a GPU kernel")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    return Bound(torch.compile(einsum, dynamic=False))


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("einsum", lambda case: Bound(einsum)),
    ("matmul on moved axes", matmul),
    ("einsum, torch.compile", compiled),
)
MINE = ("flowattn",)
NOTE = "Kernels are float32; the peers' are converted to the dtype of the values inside the clock."
