"""Attention along one axis of a grid: in place, on permuted copies, and as einsum; forward and backward.

q, k and v are views of one packed projection (B, H, W, 3, heads, d) unless the case says contiguous, where the grid
merges into SDPA's batch and heads without a copy.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "axial_attention"
GPU_SHAPES = (  # batch, height, width, heads, head width, axis, packed
    (8, 128, 128, 8, 64, 2, True),
    (8, 128, 128, 8, 64, 1, True),
    (16, 64, 64, 8, 64, 1, True),
    (4, 256, 256, 8, 64, 1, True),
    (64, 32, 32, 8, 64, 1, True),
    (64, 32, 32, 8, 64, 2, True),
    (16, 64, 64, 8, 64, 1, False),
    (5000, 16, 16, 1, 64, 1, False),  # 80,000 sequences of length 16
    (1, 16, 4096, 16, 64, 1, False),  # 65,536 suffixes and heads: one more than a grid axis of a GPU takes
)
CPU_SHAPES = ((4, 64, 64, 8, 32, 1, False), (4, 64, 64, 8, 32, 2, False), (4, 64, 64, 8, 32, 1, True))
QUICK_SHAPES = ((1, 4, 6, 2, 16, 1, True), (1, 4, 6, 2, 16, 2, False))
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # another order of sums than plain torch's, which can be lucky
BACKWARD_FLOPS = 2.5  # five matrix products instead of two


class Layout(NamedTuple):
    """What a provider needs to know besides the inputs."""

    axis: int
    packed: bool


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield make_case(*shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def make_case(batch, height, width, heads, head_width, axis, packed, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, height, width, 3, heads, head_width, generator=generator, device=device).to(dtype)
    grad_output = torch.randn(batch, height, width, heads, head_width, generator=generator, device=device).to(dtype)
    inputs = (qkv,) if packed else tuple(x.contiguous() for x in qkv.unbind(3))
    truth, plain = (einsum_results(inputs, grad_output, axis, work) for work in (torch.float64, dtype))
    tensor_bytes, flops = grad_output.numel() * grad_output.element_size(), 4 * grad_output.numel() * qkv.shape[axis]
    name = f"B{batch} {height}x{width} H{heads} D{head_width} {'outer' if axis == 1 else 'inner'} axis"
    return Case(
        name=name + ("" if packed else ", contiguous"),
        inputs=inputs,
        grad_output=grad_output,
        truth=truth,
        plain=plain,
        bytes={"fwd": 4 * tensor_bytes, "bwd": 7 * tensor_bytes},  # q k v o; and q k v do dq dk dv
        flops={"fwd": flops, "bwd": int(BACKWARD_FLOPS * flops)},
        context=Layout(axis, packed),
        atol=ATOL[dtype],
    )


def parts_of(inputs):
    """q, k, v of packed or separate inputs."""
    return inputs[0].unbind(3) if len(inputs) == 1 else inputs


def einsum_attention(inputs, axis):
    q, k, v = parts_of(inputs)
    query, key = ("bixhd", "bjxhd") if axis == 1 else ("bxihd", "bxjhd")
    scores = torch.einsum(f"{query},{key}->bxhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum(f"bxhij,{key}->{query}", scores.softmax(-1), v)


def einsum_results(inputs, grad_output, axis, dtype, pieces=64):
    """Result and gradients with everything in `dtype`, in pieces of the batch that fit a GPU's memory."""
    outputs, gradients = [], []
    for *some, grad in zip(*(x.tensor_split(min(pieces, len(x))) for x in (*inputs, grad_output))):
        some = [x.to(dtype).detach().requires_grad_() for x in some]
        output = einsum_attention(some, axis)
        gradients.append(torch.autograd.grad(output, some, grad.to(dtype)))
        outputs.append(output.detach())
    return {"fwd": (torch.cat(outputs),), "bwd": tuple(torch.cat(x) for x in zip(*gradients))}


def flowattn_call(case):
    axis = case.context.axis
    if case.context.packed:
        return Bound(lambda qkv: fa.axial_attention_qkvpacked(qkv, axis))
    return Bound(lambda q, k, v: fa.axial_attention(q, k, v, axis))


def einsum_call(case):
    if case.inputs[0].device.type == "cuda" and case.grad_output.shape[case.context.axis] > 128:
        raise Unsupported("its scores fill the memory")
    return Bound(lambda *inputs: einsum_attention(inputs, case.context.axis))


def zero_copy(backend, case):
    """The axis as SDPA's sequence, everything behind it as heads: views alone, where they merge."""
    axis, packed = case.context
    device = case.inputs[0].device.type
    if packed and axis == 1:
        raise Unsupported("the suffix and the heads of a packed projection do not merge")
    if device == "cpu" and backend is not None:
        raise Unsupported("on a CPU SDPA chooses by itself")
    if device == "cuda" and backend is None:
        raise Unsupported("on a GPU each backend is measured by itself")

    def views(x):
        if axis == 1:
            return x.view(x.shape[0], x.shape[1], -1, x.shape[-1]).transpose(1, 2)
        return x.flatten(0, 1).transpose(1, 2)

    def attend(*inputs):
        parts = parts_of(inputs)
        out = F.scaled_dot_product_attention(*map(views, parts))
        return out.transpose(1, 2).reshape(parts[0].shape)

    def attend_forced(*inputs):
        with sdpa_kernel(backend):
            return attend(*inputs)

    return Bound(attend if backend is None else attend_forced)


def permuted_attention(inputs, axis):
    def lines(x):
        x = x.transpose(1, 2) if axis == 1 else x  # (B, other axis, length, H, D)
        return x.flatten(0, 1).transpose(1, 2).contiguous()

    q, k, v = parts_of(inputs)
    out = F.scaled_dot_product_attention(*map(lines, (q, k, v))).transpose(1, 2)
    out = out.unflatten(0, (q.shape[0], -1))
    return (out.transpose(1, 2) if axis == 1 else out).contiguous()


def permuted(case):
    return Bound(lambda *inputs: permuted_attention(inputs, case.context.axis))


def compiled(case):
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("its fast form is a GPU kernel")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    call = torch.compile(permuted_attention, dynamic=False)
    return Bound(lambda *inputs: call(inputs, case.context.axis))


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("zero-copy SDPA", functools.partial(zero_copy, None)),
    ("zero-copy SDPA cuDNN", functools.partial(zero_copy, SDPBackend.CUDNN_ATTENTION)),
    ("zero-copy SDPA flash", functools.partial(zero_copy, SDPBackend.FLASH_ATTENTION)),
    ("zero-copy SDPA efficient", functools.partial(zero_copy, SDPBackend.EFFICIENT_ATTENTION)),
    ("permute + SDPA", permuted),
    ("permute + SDPA, torch.compile", compiled),
    ("einsum", einsum_call),
)
MINE = ("flowattn",)
NOTE = "The zero-copy view exists where the grid axes behind the attended one merge with the heads."
