"""selective_scan against a loop over time, torch's associative_scan and the published kernels. With z and softplus."""

import torch
import torch.nn.functional as F

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "selective_scan"
GPU_SHAPES = ((16, 512, 862, 16), (16, 512, 862, 32), (4, 1536, 4096, 16), (1, 256, 16384, 16))
CPU_SHAPES = ((2, 512, 862, 16), (32, 256, 7, 2), (1, 512, 2048, 16))
QUICK_SHAPES = ((2, 8, 33, 4),)  # (B, D, L, N)


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield make_case(shape, device)


def make_case(shape, device):
    batch, channels, length, states = shape
    generator = torch.Generator(device).manual_seed(0)
    u, delta, z, grad_output = torch.randn(4, batch, channels, length, generator=generator, device=device)
    B, C = torch.randn(2, batch, states, length, generator=generator, device=device)
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    skip, bias = torch.ones(channels, device=device), torch.full((channels,), -3.0, device=device)
    inputs = (u, delta, A, B, C, skip, z, bias)
    wide, narrow = 4 * u.numel(), 4 * B.numel()
    truth = both_directions(inputs, grad_output, torch.float64)
    return Case(
        name=f"B{batch} D{channels} L{length} N{states}",
        inputs=inputs,
        grad_output=grad_output,
        truth=truth,
        plain=both_directions(inputs, grad_output, torch.float32),
        bytes={"fwd": 4 * wide + 2 * narrow, "bwd": 7 * wide + 4 * narrow},  # u, d, z, y; u, d, z and dy, du, dd, dz
        flops={"fwd": 6 * u.numel() * states, "bwd": 18 * u.numel() * states},
        context=None,
        atol=2 * torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in truth["fwd"]),  # two roundings
    )


def gated(y, u, skip, z):
    return (y + skip[:, None] * u) * F.silu(z)


def loop(u, delta, A, B, C, skip, z, bias):
    d = F.softplus(delta + bias[:, None])
    x, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    steps = zip(d.unbind(2), (d * u).unbind(2), B.unbind(2), C.unbind(2))
    for d_t, du_t, B_t, C_t in steps:
        x = torch.exp(d_t[..., None] * A) * x + du_t[..., None] * B_t[:, None]
        ys.append((x * C_t[:, None]).sum(-1))
    return gated(torch.stack(ys, 2), u, skip, z)


def both_directions(inputs, grad_output, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output = loop(*leaves)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(dtype))
    return {"fwd": (output.detach(),), "bwd": gradients}


def flowattn_call(case):
    return Bound(lambda *inputs: fa.selective_scan(*inputs, delta_softplus=True))


def flowattn_token_rows(case):
    """The layout in which projections leave their results; the time to change it is not counted."""

    def turn(x):
        return x.transpose(1, 2).contiguous() if x.dim() == 3 else x

    return Bound(lambda *inputs: fa.selective_scan(*inputs, delta_softplus=True, layout="BLD"), turn, turn)


def python_loop(case):
    if case.inputs[0].device.type == "cuda":
        raise Unsupported("a dozen launches a token: it is measured on a CPU")
    return Bound(loop)


def associative_scan(case):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    if case.inputs[0].device.type != "cuda":
        raise Unsupported("its fast form is a GPU kernel")
    if case.inputs[0].numel() * case.inputs[2].shape[1] * 8 > 16e9:
        raise Unsupported("its two inputs of B D L N numbers take more than 16 GB")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    @torch.compile(dynamic=False)
    def call(u, delta, A, B, C, skip, z, bias):
        d = F.softplus(delta + bias[:, None])
        decay = torch.exp(d[:, :, None] * A[..., None])  # (B, D, N, L)
        x = scan(combine, (decay, (d * u)[:, :, None] * B[:, None]), 3, combine_mode="pointwise")[1]
        return gated((x * C[:, None]).sum(2), u, skip, z)

    return Bound(call)


def mamba_ssm(case):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return Bound(lambda *inputs: selective_scan_fn(*inputs, delta_softplus=True))


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("flowattn, (B, L, D)", flowattn_token_rows),
    ("Python loop", python_loop),
    ("torch associative_scan", associative_scan),
    ("mamba-ssm", mamba_ssm),
)
MINE = ("flowattn", "flowattn, (B, L, D)")
NOTE = "The floor counts bytes and multiply-adds; the B D L N exponentials of this op come on top of it."
