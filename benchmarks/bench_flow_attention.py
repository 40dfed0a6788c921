"""Flow-Attention, whole and causal, and chunk_hybrid_attention against the published eager forms and SDPA."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "flow_attention"
CLAMP, EPS = 5.0, 1e-6


class Shape(NamedTuple):
    kind: str  # whole, causal, hybrid
    batch: int
    tokens: int
    heads: int
    width: int
    chunk: int = 0


GPU_SHAPES = (
    Shape("whole", 4, 4096, 16, 64),
    Shape("whole", 4, 16384, 16, 64),
    Shape("whole", 1, 65536, 16, 64),
    Shape("whole", 128, 3136, 12, 8),
    Shape("causal", 16, 512, 8, 64),
    Shape("causal", 8, 4096, 8, 64),
    Shape("causal", 1, 65536, 8, 64),
    Shape("hybrid", 8, 1280, 18, 64, 256),
)
CPU_SHAPES = (
    Shape("whole", 4, 2048, 8, 64),
    Shape("whole", 8, 784, 12, 16),
    Shape("causal", 1, 1024, 8, 64),
    Shape("hybrid", 1, 1280, 6, 64, 256),
)
QUICK_SHAPES = (Shape("whole", 2, 40, 2, 16), Shape("causal", 1, 40, 2, 16), Shape("hybrid", 1, 24, 2, 16, 8))
EAGER_BYTES = 2 << 34  # of the two (B, H, T, D, D) float32 tensors of the causal form: more are not tried


def cases(device, quick):
    for shape in QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        yield make_case(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def make_case(shape, device, dtype):
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.width)
    q, k, v, grad_output = torch.randn(4, *size, generator=generator, device=device).to(dtype)
    inputs = (q, k, v)
    if shape.kind == "hybrid":
        inputs += (torch.randn(size[:3], generator=generator, device=device).to(dtype),)
    tensor, matrix = q.numel() * q.element_size(), 2 * q.numel() * shape.width
    flops = 2 * matrix + 2 * shape.chunk * 2 * q.numel()
    images = f"{shape.tokens // shape.chunk}x{shape.chunk}" if shape.chunk else f"T{shape.tokens}"
    return Case(
        name=f"{shape.kind} B{shape.batch} {images} H{shape.heads} D{shape.width}",
        inputs=inputs,
        grad_output=grad_output,
        truth=both_directions(shape, inputs, grad_output, torch.float64),
        plain=both_directions(shape, inputs, grad_output, dtype),
        bytes={"fwd": 4 * tensor, "bwd": 7 * tensor},  # q, k, v, y; q, k, v, dy and three gradients
        flops={"fwd": flops, "bwd": 5 * flops // 2},
        context=shape,
        atol=1e-6,
    )


def both_directions(shape, inputs, grad_output, dtype):
    """Results and gradients of the reference, causal ones in pieces, whose products fit the memory."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    with fa.use_backend("reference"):
        if shape.kind == "whole":
            y = fa.flow_attention(*leaves, clamp=CLAMP)
        elif shape.kind == "hybrid":
            y = fa.chunk_hybrid_attention(*leaves, chunk=shape.chunk)
        else:
            y, state = [], None
            for part in zip(*(x.split(1024, 1) for x in leaves)):
                out, state = fa.flow_attention(
                    *part, causal=True, clamp=CLAMP, initial_state=state, output_final_state=True
                )  # fmt: skip
                y.append(out)
            y = torch.cat(y, 1)
    return {"fwd": (y.detach(),), "bwd": torch.autograd.grad(y, leaves, grad_output.to(dtype))}


def flows(q, k, over_time):
    """phi(q), phi(k), the competition weights before the softmax, sink flows and allocation: heads first."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    total = (lambda x: x.cumsum(2)) if over_time else (lambda x: x.sum(2, keepdim=True))
    seen = torch.arange(1, q.shape[2] + 1, device=q.device)[:, None].to(q.dtype) if over_time else 1.0

    def flow(x, other):
        return ((x + EPS) * (total(other) + EPS)).sum(-1, keepdim=True) / seen

    incoming, outgoing = flow(q, k), flow(k, q)
    return q, k, flow(k, q / incoming).clamp(-CLAMP, CLAMP), incoming * seen, torch.sigmoid(flow(q, k / outgoing))


def eager_whole(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, conserved, incoming, allocation = flows(q, k, False)
    weights = torch.softmax(conserved, 2) * k.shape[2]
    return ((q @ (k.mT @ (v * weights))) / incoming * allocation).transpose(1, 2)


def eager_causal(q, k, v):
    """As published: the outer products of all tokens, and their running sums."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, conserved, incoming, allocation = flows(q, k, True)
    weights = conserved.exp()
    weights = weights / weights.cumsum(2) * torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]
    kv = torch.einsum("bhtd,bhtm->bhtdm", k, v * weights).cumsum(2)
    return (torch.einsum("bhtd,bhtdm->bhtm", q, kv) / incoming * allocation).transpose(1, 2)


def eager_hybrid(q, k, v, gate, chunk):
    q, k, v = (x.transpose(1, 2) for x in (q, k * q.shape[3] ** -0.5, v))
    decay = F.logsigmoid(gate.float()).transpose(1, 2) / 16
    state, outs = torch.zeros_like(k[:, :, :1].mT @ v[:, :, :1], dtype=torch.float32), []
    for qn, kn, vn, g in zip(*(x.split(chunk, 2) for x in (q, k, v, decay))):
        inner = torch.softmax(qn @ kn.mT, -1) @ vn
        outs.append(inner + (qn * g.cumsum(2).exp()[..., None].to(q.dtype)) @ state.to(q.dtype))
        state = g.mean(2).exp()[..., None, None] * state + kn.mT @ vn
    return torch.cat(outs, 2).transpose(1, 2)


def eager_form(shape):
    if shape.kind == "hybrid":
        return lambda q, k, v, gate: eager_hybrid(q, k, v, gate, shape.chunk)
    outer = 2 * 4 * shape.batch * shape.heads * shape.tokens * shape.width**2
    if shape.kind == "causal" and outer > EAGER_BYTES:
        raise Unsupported(f"its (B, H, T, D, D) tensors would take {outer / 2**30:.0f} GiB")
    return eager_causal if shape.kind == "causal" else eager_whole


def in_float32(call):
    """The published sums lose all precision in 16 bits: they run in float32, as its training code does."""

    def wide(*inputs):
        return call(*(x.float() for x in inputs)).to(inputs[0].dtype)

    return wide


def flowattn_call(case):
    shape = case.context
    if shape.kind == "hybrid":
        return Bound(lambda *inputs: fa.chunk_hybrid_attention(*inputs, chunk=shape.chunk))
    return Bound(lambda *inputs: fa.flow_attention(*inputs, causal=shape.kind == "causal", clamp=CLAMP))


def eager(case):
    return Bound(in_float32(eager_form(case.context)))


def compiled_eager(case):
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("compiled for a GPU alone")
    torch._dynamo.reset()  # each case gets its own kernels, outside the recompile limit
    return Bound(torch.compile(in_float32(eager_form(case.context)), dynamic=False))


def sdpa(case):
    if case.context.kind == "hybrid":
        raise Unsupported("softmax attention over all images is another operation")

    def call(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=case.context.kind == "causal").transpose(1, 2)

    return Bound(call, unlike="softmax attention, which is quadratic")


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("eager", eager),
    ("eager, torch.compile", compiled_eager),
    ("SDPA (quadratic)", sdpa),
)
MINE = ("flowattn",)
NOTE = (
    "SDPA is softmax attention, another function of the same inputs: how linear and quadratic time compare. hybrid is"
    " chunk_hybrid_attention. Flow-Attention runs with clamp=5: with 1, half of the sources lie at the bound, and"
    " rounding decides which of them get a gradient."
)
