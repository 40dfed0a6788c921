"""linear_attention, causal: plain, with a normaliser, with a decay a head (retention), with a gate a token.

The shapes on a GPU are the six that flash-linear-attention benchmarks, with and without a normaliser, and three of our
own, the last with one head.
With a normaliser q and k are positive already, so that no provider needs a feature map.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "linear_attention"
KINDS = ("plain", "normalize", "retention", "gated")
FLA_SHAPES = (  # B, T, H, D
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)
GPU_SHAPES = (*FLA_SHAPES, (4, 4096, 16, 64), (4, 4096, 16, 128), (1, 65536, 1, 64))
CPU_SHAPES = ((2, 4096, 8, 64),)
QUICK_SHAPES = ((1, 70, 2, 8),)
CHUNK = 64  # of the eager form, and in the count of operations
EPS = 1e-6
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # of the largest element: another order of sums than plain torch's
MASKED_BYTES = 4 << 30  # the masked product is run where its scores are at most this


class Attention(NamedTuple):
    """What a provider needs to know besides q, k, v and, if gated, the gates."""

    kind: str
    decay: torch.Tensor | None  # (H,), RetNet's


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in shapes:
        for kind in KINDS[:2] if shape in FLA_SHAPES else KINDS:
            yield make_case(shape, kind, dtype, device)


def make_case(shape, kind, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad_output = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    inputs = [q.abs(), k.abs(), v] if kind == "normalize" else [q, k, v]
    inputs = [x.to(dtype) for x in inputs]
    if kind == "gated":
        inputs.append(F.logsigmoid(torch.randn(shape[:3], generator=generator, device=device)) / 16)
    decay = fa.decay_preset("retnet", shape[2], device=device) if kind == "retention" else None
    context, (batch, length, heads, width) = Attention(kind, decay), shape
    tensor, gates = q.numel() * inputs[0].element_size(), 4 * batch * length * heads * (kind == "gated")
    token = batch * length * heads
    truth, plain = (both_directions(inputs, grad_output.to(dtype), context, work) for work in (torch.float64, dtype))
    # The gradient of a gate sums over all tokens behind it and is far larger than the others.
    largest = max(x.abs().max().item() for x in truth["bwd"]) if kind == "gated" else 1.0
    return Case(
        name="B{} T{} H{} D{} {}".format(*shape, kind),
        inputs=tuple(inputs),
        grad_output=grad_output.to(dtype),
        truth=truth,
        plain=plain,
        bytes={"fwd": 4 * tensor + gates, "bwd": 7 * tensor + 2 * gates},
        flops={
            "fwd": token * (4 * CHUNK * width + 4 * width**2),
            "bwd": token * (10 * CHUNK * width + 10 * width**2),
        },
        context=context,
        atol=ATOL[dtype] * largest,
    )


def weights(decay, log):
    """(within a chunk (.., C, C), before (.., C), after (.., C)) of log decays (..., C), in float32 or float64."""
    total = decay.to(log).cumsum(-1)
    apart = (total[..., :, None] - total[..., None, :]).masked_fill(
        torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1), -math.inf
    )
    return apart.exp(), total.exp(), (total[..., -1:] - total).exp()


def chunked(q, k, v, gates=None, *, context):
    """The chunkwise form in plain torch: products in the dtype of q, the state and decays in float32 (float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    gates = context.decay.expand(q.shape[:3]) if context.decay is not None else gates
    scale = 1.0 if context.kind == "normalize" else q.shape[-1] ** -0.5
    v = F.pad(v, (0, 1), value=1.0) if context.kind == "normalize" else v
    state, outs = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=wide, device=q.device), []
    parts = [x.transpose(1, 2).split(CHUNK, 2) for x in (q, k, v)]
    cuts = [None] * len(parts[0]) if gates is None else gates.transpose(1, 2).split(CHUNK, 2)
    for qc, kc, vc, cut in zip(*parts, cuts):
        scores = (qc @ kc.mT).tril()
        if cut is not None:
            inside, before, after = weights(cut, wide)
            scores = scores * inside.to(q.dtype)
            qc, kc = qc * before[..., None].to(q.dtype), kc * after[..., None].to(q.dtype)
            kept = before[..., -1:, None]
        outs.append(scores @ vc + qc @ state.to(q.dtype))
        state = (state if cut is None else state * kept) + (kc.mT @ vc).to(wide)
    out = torch.cat(outs, 2).transpose(1, 2)
    if context.kind == "normalize":
        return out[..., :-1] / (out[..., -1:] + EPS)
    return out * scale


def masked(q, k, v, gates=None, *, context):
    """The parallel form: (B, H, T, T) scores times the decays of all pairs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT).tril()
    gates = context.decay.expand(*q.shape[::2][:1], q.shape[2], -1) if context.decay is not None else gates
    if gates is not None:
        scores = scores * weights(gates.transpose(1, 2), torch.float32)[0].to(q.dtype)
    if context.kind == "normalize":
        return (scores @ v / (scores.sum(-1, keepdim=True) + EPS)).transpose(1, 2)
    return (scores @ v * q.shape[-1] ** -0.5).transpose(1, 2)


def both_directions(inputs, grad_output, context, dtype):
    """The chunkwise form and its gradients; gates stay in their own dtype, or are as exact as the rest."""
    leaves = [x.to(dtype if i < 3 or dtype == torch.float64 else x.dtype) for i, x in enumerate(inputs)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = chunked(*leaves, context=context)
    gradients = torch.autograd.grad(out, leaves, grad_output.to(out.dtype))
    return {"fwd": (out.detach(),), "bwd": gradients}


def flowattn_call(case):
    context = case.context

    def call(q, k, v, gates=None):
        decay = gates if context.kind == "gated" else context.decay
        return fa.linear_attention(q, k, v, decay=decay, normalize=context.kind == "normalize", eps=EPS)

    return Bound(call)


def fla(case):
    """flash-linear-attention: its chunked kernel for each kind."""
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("it needs a GPU")
    kind = case.context.kind
    if kind == "retention":
        from fla.ops.retention import chunk_retention as function
    elif kind == "gated":
        from fla.ops.simple_gla import chunk_simple_gla as function
    else:
        from fla.ops.linear_attn import chunk_linear_attn as function

    def call(q, k, v, gates=None):
        if kind == "gated":
            return function(q, k, v, g=gates)[0]
        return function(q, k, v)[0] if kind == "retention" else function(q, k, v, normalize=kind == "normalize")[0]

    return Bound(call)


def chunked_call(case):
    if case.inputs[0].device.type == "cuda" and case.inputs[0].shape[1] > 64 * CHUNK:
        raise Unsupported("a dozen launches a chunk: not measured above 64 chunks")
    return Bound(lambda *inputs: chunked(*inputs, context=case.context))


def compiled_call(case):
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("compiling its unrolled loop for a CPU takes minutes")
    if case.inputs[0].shape[1] > 16 * CHUNK:
        raise Unsupported("its unrolled loop of more than 16 chunks compiles for minutes")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    compiled = torch.compile(chunked, dynamic=False)
    return Bound(lambda *inputs: compiled(*inputs, context=case.context))


def masked_call(case):
    batch, length, heads, _ = case.inputs[0].shape
    if batch * heads * length**2 * case.inputs[0].element_size() > MASKED_BYTES:
        raise Unsupported("its scores take more than 4 GiB")
    return Bound(lambda *inputs: masked(*inputs, context=case.context))


def sdpa(case):
    """Softmax attention of the same shape, for orientation: quadratic, and another function."""
    if case.context.kind != "plain":
        raise Unsupported("it is measured once for each shape")

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return Bound(call, unlike="softmax attention, another function: not compared")


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("flash-linear-attention", fla),
    ("chunks in torch", chunked_call),
    ("chunks, torch.compile", compiled_call),
    ("masked product", masked_call),
    ("softmax SDPA", sdpa),
)
MINE = ("flowattn",)
NOTE = "Softmax SDPA computes another function and is shown for orientation."
