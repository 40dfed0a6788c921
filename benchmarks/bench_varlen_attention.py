"""varlen_attention against the public kernels for variable lengths and against padded attention, forward and backward.

Lengths are uniform integers in [max/10, max], seeded. Padded peers get inputs that are padded already and outputs that
stay padded: their packing and unpacking is not counted. Plans, block masks and padding masks are made outside the
clock.
"""

import functools
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "varlen_attention"
GPU_SHAPES = (  # batch, longest, heads, head width, causal
    (64, 256, 12, 64, False),
    (64, 512, 12, 64, False),
    (32, 1024, 16, 64, False),
    (16, 4096, 16, 128, False),
    (16, 4096, 16, 128, True),
)
CPU_SHAPES = ((32, 256, 12, 32, False), (8, 512, 12, 64, False))  # MiniLM's heads, BERT's heads
QUICK_SHAPES = ((4, 32, 2, 16, False), (3, 24, 2, 16, True))
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # another order of sums than plain torch's, which can be lucky
BACKWARD_FLOPS = 2.5  # five matrix products instead of two


class Batch(NamedTuple):
    """What a provider needs to know of the sequences."""

    lengths: list
    cu_seqlens: torch.Tensor
    max_seqlen: int
    causal: bool
    plan: fa.PackPlan


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield make_case(*shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def make_inputs(batch, longest, heads, width, causal, dtype, device):
    """((q, k, v, grad_output), Batch), seeded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 10, longest + 1, (batch,), generator=generator)
    packed = torch.randn(4, int(lengths.sum()), heads, width, generator=generator).to(device, dtype)
    cu = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    lengths = lengths.tolist()
    return packed.unbind(0), Batch(lengths, cu, max(lengths), causal, fa.pack_plan(cu_seqlens=cu))


def make_case(batch, longest, heads, width, causal, dtype, device):
    (q, k, v, grad_output), context = make_inputs(batch, longest, heads, width, causal, dtype, device)
    lengths = context.lengths
    tensor_bytes = q.numel() * q.element_size()
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    flops = 4 * heads * width * pairs
    truth, plain = (by_sequence(q, k, v, grad_output, lengths, causal, work) for work in (torch.float64, dtype))
    return Case(
        name=f"B{batch} max{longest} H{heads} D{width}{' causal' if causal else ''}",
        inputs=(q, k, v),
        grad_output=grad_output,
        truth=truth,
        plain=plain,
        bytes={"fwd": 4 * tensor_bytes, "bwd": 8 * tensor_bytes},  # q k v o; and o, do, dq, dk, dv with them
        flops={"fwd": flops, "bwd": int(BACKWARD_FLOPS * flops)},
        context=context,
        atol=ATOL[dtype],
    )


def by_sequence(q, k, v, grad_output, lengths, causal, dtype):
    """Softmax attention and its gradients in plain torch, sequence by sequence, with everything in `dtype`."""
    outputs, gradients = [], []
    for parts in zip(*(x.split(lengths) for x in (q, k, v, grad_output))):
        *inputs, grad = (x.to(dtype) for x in parts)
        inputs = [x.detach().requires_grad_() for x in inputs]
        query, key, value = inputs
        scores = torch.einsum("ihd,jhd->hij", query, key) * query.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        output = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
        gradients.append(torch.autograd.grad(output, inputs, grad))
        outputs.append(output.detach())
    return {"fwd": (torch.cat(outputs),), "bwd": tuple(torch.cat(parts) for parts in zip(*gradients))}


def flowattn_planned(case):
    """One plan serves every layer of a model, so making it is not part of a layer's time."""
    return flowattn_call(case, plan=case.context.plan)


def flowattn_call(case, plan=None):
    batch = case.context

    def call(q, k, v):
        longest = batch.max_seqlen
        return fa.varlen_attention(q, k, v, batch.cu_seqlens, None, longest, longest, causal=batch.causal, plan=plan)

    return Bound(call)


def torch_varlen(case):
    from torch.nn.attention.varlen import varlen_attn

    batch = case.context
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("it needs a GPU")
    if "window_size" in inspect.signature(varlen_attn).parameters:
        options = {"window_size": (-1, 0) if batch.causal else (-1, -1)}
    else:
        options = {"is_causal": batch.causal}
    ends = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    return Bound(lambda q, k, v: varlen_attn(q, k, v, *ends, **options))


def flash_attention_4(case):
    from flash_attn.cute import flash_attn_varlen_func

    batch = case.context
    if case.inputs[0].device.type != "cuda":
        raise Unsupported("it needs a GPU")
    options = {
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_k": batch.cu_seqlens,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_k": batch.max_seqlen,
        "causal": batch.causal,
    }

    def call(q, k, v):
        result = flash_attn_varlen_func(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # some releases return the LSE too

    return Bound(call)


def flex_attention(case):
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    batch, total = case.context, case.inputs[0].shape[0]
    device = case.inputs[0].device
    if device.type != "cuda":
        raise Unsupported("it is a GPU kernel; its CPU path has no backward")
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    document = torch.repeat_interleave(torch.arange(len(batch.lengths), device=device), batch.cu_seqlens.diff())

    def visible(b, h, q, kv):
        same = document[q] == document[kv]
        return same & (q >= kv) if batch.causal else same

    block_mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex, dynamic=False)
    return Bound(
        functools.partial(compiled, block_mask=block_mask),
        prepare=lambda x: x.transpose(0, 1).unsqueeze(0),
        collect=lambda x: x.squeeze(0).transpose(0, 1),
    )


def padded(backend, case):
    """SDPA on (B, H, S, D). Right padding needs no mask under causal: no real query sees a padded key."""
    batch, device = case.context, case.inputs[0].device
    if device.type != "cuda" and backend is not None:
        raise Unsupported("it needs a GPU")
    if backend == SDPBackend.FLASH_ATTENTION and not batch.causal:
        raise Unsupported("it takes no padding mask")
    shape = (len(batch.lengths), batch.max_seqlen)
    keep = torch.arange(batch.max_seqlen, device=device) < batch.cu_seqlens.diff()[:, None]  # (B, S)
    mask = None if batch.causal else keep[:, None, None, :].expand(-1, 1, batch.max_seqlen, -1)

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=batch.causal)

    def call_forced(q, k, v):
        with sdpa_kernel(backend):
            return call(q, k, v)

    def prepare(x):
        out = x.new_zeros(*shape, *x.shape[1:])
        out[keep] = x
        return out.transpose(1, 2)

    return Bound(call if backend is None else call_forced, prepare, lambda x: x.transpose(1, 2)[keep])


def padded_auto(case):
    if case.inputs[0].device.type == "cuda":
        raise Unsupported("on a GPU each backend is measured by itself")
    return padded(None, case)


def sdpa_loop(case):
    """One SDPA call a sequence: what packed inputs get without a varlen kernel."""
    batch = case.context
    if case.inputs[0].device.type != "cpu":
        raise Unsupported("on a GPU it is launch-bound and never competes")

    def call(*inputs):
        outputs = []
        for parts in zip(*(x.split(batch.lengths) for x in inputs)):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            output = F.scaled_dot_product_attention(q, k, v, is_causal=batch.causal)
            outputs.append(output.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    return Bound(call)


PROVIDERS = (
    ("flowattn", flowattn_planned),
    ("flowattn without plan", flowattn_call),
    ("torch varlen_attn", torch_varlen),
    ("FlashAttention-4", flash_attention_4),
    ("padded SDPA cuDNN", functools.partial(padded, SDPBackend.CUDNN_ATTENTION)),
    ("padded SDPA efficient", functools.partial(padded, SDPBackend.EFFICIENT_ATTENTION)),
    ("padded SDPA flash", functools.partial(padded, SDPBackend.FLASH_ATTENTION)),
    ("padded SDPA", padded_auto),
    ("SDPA loop over sequences", sdpa_loop),
    ("FlexAttention", flex_attention),  # last: compiling it takes longer than all the others
)
MINE = ("flowattn", "flowattn without plan")
NOTE = "Padded SDPA gets inputs that are padded already; packing and unpacking are not counted for it."
