"""bias_gelu and bias_residual_layer_norm against plain torch and its compiled form: memory-bound, forward and backward.

Bytes: each row of an input read once, each row of a result written once. The backward of the LayerNorm is counted with
one saved tensor, x + bias + residual, which no kernel can do without; ours saves nothing and reads x and residual.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import flowattn as fa
from benchmarks.harness import Bound, Case

OP = "encoder_fusions"
GPU_SIZES = tuple((megabytes, torch.bfloat16) for megabytes in (1, 4, 16, 64)) + ((64, torch.float32),)
CPU_ROWS, CPU_WIDTHS, CPU_DTYPES = 4096, (768, 3072), (torch.float32, torch.bfloat16)
HIDDEN, FEED_FORWARD = 768, 3072  # BERT base: LayerNorm runs at the first, GELU at the second
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # another order of sums than plain torch's, which can be lucky
EPS = 1e-12


class Call(NamedTuple):
    """Which op: "gelu", "gelu tanh", "norm", or "norm unpack", which writes the padded tensor of `plan`."""

    kind: str
    plan: fa.PackPlan | None = None
    rows: torch.Tensor | None = None  # plan.indices as int64, for plain torch


def cases(device, quick):
    for rows, width, dtype, kinds in shapes(device, quick):
        for kind in kinds:
            yield make_case(kind, rows, width, dtype, device)


def shapes(device, quick):
    """(rows, width, dtype, ops)."""
    every = ("gelu", "gelu tanh", "norm", "norm unpack")
    if quick:
        yield 24, 64, torch.float32, every
    elif device.type == "cuda":
        for megabytes, dtype in GPU_SIZES:
            for width, kinds in ((FEED_FORWARD, every[:2]), (HIDDEN, every[2:])):
                yield round(megabytes * 2**20 / (width * dtype.itemsize)), width, dtype, kinds
    else:
        for width in CPU_WIDTHS:
            for dtype in CPU_DTYPES:
                yield CPU_ROWS, width, dtype, every[:3]


def make_case(kind, rows, width, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    call, shape, padding = Call(kind), (rows, width), 0
    if kind == "norm unpack":
        lengths = torch.randint(128, 385, (max(1, rows // 256),), generator=torch.Generator().manual_seed(0))
        plan = fa.pack_plan(lengths=lengths.to(device), max_seqlen=512)
        call = Call(kind, plan, plan.indices.long())
        rows, shape = plan.total, (plan.batch, plan.padded_len, width)
        padding = plan.inverse.numel() - rows
    x, residual = torch.randn(2, rows, width, generator=generator, device=device).to(dtype).unbind(0)
    bias, weight, ln_bias = torch.randn(3, width, generator=generator, device=device).to(dtype).unbind(0)
    inputs = (x, bias, residual, weight, ln_bias) if kind.startswith("norm") else (x, bias)
    grad_output = torch.randn(shape, generator=generator, device=device).to(dtype)
    truth, plain = (evaluate(call, inputs, grad_output, work) for work in (torch.float64, dtype))
    tensors = {"fwd": len(inputs) // 2 + 1, "bwd": len(inputs) // 2 + 2}  # inputs and y; inputs, dy and dx
    row_bytes = width * dtype.itemsize
    return Case(
        name=f"{kind} T{rows} d{width}",
        inputs=inputs,
        grad_output=grad_output,
        truth=truth,
        plain=plain,
        bytes={"fwd": (tensors["fwd"] * rows + padding) * row_bytes, "bwd": tensors["bwd"] * rows * row_bytes},
        flops={},
        context=call,
        atol=ATOL[dtype],
    )


def evaluate(call, inputs, grad_output, dtype):
    """Results and gradients of plain torch with everything in `dtype`."""
    inputs = [t.to(dtype).detach().requires_grad_() for t in inputs]
    output = in_plain_torch(call, *inputs)
    gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    return {"fwd": (output.detach(),), "bwd": gradients}


def in_plain_torch(call, x, bias, residual=None, weight=None, ln_bias=None):
    if call.kind.startswith("gelu"):
        return F.gelu(x + bias, approximate="tanh" if call.kind == "gelu tanh" else "none")
    y = F.layer_norm(x + bias + residual, x.shape[-1:], weight, ln_bias, EPS)
    if call.plan is None:
        return y
    padded = y.new_zeros(call.plan.inverse.shape[0], y.shape[1]).index_copy(0, call.rows, y)
    return padded.view(call.plan.batch, call.plan.padded_len, -1)


def flowattn_call(case):
    call = case.context
    if call.kind.startswith("gelu"):
        approximate = "tanh" if call.kind == "gelu tanh" else "none"
        return Bound(lambda x, bias: fa.bias_gelu(x, bias, approximate=approximate))
    return Bound(lambda *inputs: fa.bias_residual_layer_norm(*inputs, eps=EPS, unpack_to=call.plan))


def plain_torch(case):
    return Bound(lambda *inputs: in_plain_torch(case.context, *inputs))


def compiled_torch(case):
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    return Bound(torch.compile(plain_torch(case).call, dynamic=False))


PROVIDERS = (("flowattn", flowattn_call), ("plain torch", plain_torch), ("torch.compile", compiled_torch))
MINE = ("flowattn",)
NOTE = "The peers add the bias and the residual, as the op does; unpacking is index_copy into zeros."
