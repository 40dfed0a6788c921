"""prefix_attention against the cumsum form, a library scan and causal attention with the query repeated.

Scores are float32 and given; values bfloat16 on a GPU, float32 on a CPU.
"""

import torch
import torch.nn.functional as F

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "prefix_attention"
GPU_SHAPES = (  # B, T, H, D
    (1, 1024, 8, 64),
    (8, 1024, 8, 64),
    (32, 1024, 8, 64),
    (8, 4096, 8, 64),
    (8, 8192, 8, 64),
    (1, 65536, 8, 64),
    (1, 262144, 8, 64),
)
CPU_SHAPES = ((8, 4096, 8, 64), (1, 4096, 8, 64))
QUICK_SHAPES = ((2, 33, 2, 8),)
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-3}  # another order of sums than plain torch's, which can be lucky
QUADRATIC_LIMIT = 1 << 26  # B * T^2 from which attention with the query repeated keeps a CPU busy for minutes


def cases(device, quick):
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        yield make_case(*shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def make_case(batch, length, heads, width, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(batch, length, heads, generator=generator, device=device)
    values, grad_output = torch.randn(2, batch, length, heads, width, generator=generator, device=device).to(dtype)
    wide, narrow = values.numel() * values.element_size(), scores.numel() * scores.element_size()
    return Case(
        name=f"B{batch} T{length} H{heads} D{width}",
        inputs=(scores, values),
        grad_output=grad_output,
        truth=both_directions(scores, values, grad_output, torch.float64, torch.float64),
        plain=both_directions(scores, values, grad_output, torch.float32, dtype) | saved(scores, values, grad_output),
        bytes={"fwd": 2 * wide + narrow, "bwd": 4 * wide + 3 * narrow},  # v, o, do, dv; s, ds, log-sum-exp
        flops={"fwd": 3 * values.numel(), "bwd": 10 * values.numel()},
        context=None,
        atol=ATOL[dtype],
    )


def cumsum_form(scores, values):
    """The form without a scan; it loses the tokens before a rise of the scores by more than exp can span."""
    weights = torch.exp(scores - scores.detach().amax(1, keepdim=True))
    total = weights.cumsum(1).unsqueeze(-1)
    return ((weights.unsqueeze(-1) * values).cumsum(1) / total).to(values.dtype)


def both_directions(scores, values, grad_output, work, dtype):
    inputs = [scores.to(work).requires_grad_(), values.to(dtype).requires_grad_()]
    output = cumsum_form(*inputs)
    gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    return {"fwd": (output.detach(),), "bwd": gradients}


def saved(scores, values, grad_output):
    """The gradients as a backward forms them that has the output in the dtype of the values, and nothing wider."""
    weights = torch.exp(scores - scores.amax(1, keepdim=True)).unsqueeze(-1)
    total = weights.cumsum(1)
    output = ((weights * values).cumsum(1) / total).to(values.dtype)
    grad = grad_output.float() / total
    behind, shares = (x.flip(1).cumsum(1).flip(1) for x in (grad, (grad * output).sum(-1, keepdim=True)))
    grad_scores = weights * ((behind * values).sum(-1, keepdim=True) - shares)
    return {"bwd": (grad_scores.squeeze(-1), (weights * behind).to(values.dtype))}


def flowattn_call(case):
    return Bound(fa.prefix_attention)


def eager_cumsum(case):
    return Bound(cumsum_form)


def compiled_cumsum(case):
    torch._dynamo.reset()  # each case gets its own kernel for its own shape, outside the recompile limit
    return Bound(torch.compile(cumsum_form, dynamic=False))


def associative_scan(case):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    if case.inputs[0].device.type != "cuda":
        raise Unsupported("its fast form is a GPU kernel")
    torch._dynamo.reset()

    def merge(a, b):
        m = torch.maximum(a[0], b[0])
        left, right = torch.exp(a[0] - m), torch.exp(b[0] - m)
        return m, left * a[1] + right * b[1], left * a[2] + right * b[2]

    @torch.compile(dynamic=False)
    def call(scores, values):
        s = scores.unsqueeze(-1).expand(values.shape).contiguous()
        _, u, w = scan(merge, (s, torch.ones_like(s), values.float()), 1, combine_mode="pointwise")
        return (w / u).to(values.dtype)

    return Bound(call)


def repeated_query(case):
    """Causal attention; a float32 score is the sum of three key columns that half precision holds.

    Keys have a fifth dim, which tells them and their gradients from values.
    """
    scores, values = case.inputs
    if values.device.type == "cpu" and values.shape[0] * values.shape[1] ** 2 > QUADRATIC_LIMIT:
        raise Unsupported("it is quadratic")
    batch, length, heads, width = values.shape
    query = torch.zeros(batch, heads, 1, width, device=values.device, dtype=values.dtype)
    query[..., :3] = 1
    query = query.expand(batch, heads, length, width)

    def call(keys, values):
        return F.scaled_dot_product_attention(query, keys.squeeze(3), values, is_causal=True, scale=1.0)

    def prepare(x):
        if x.dim() == 4:
            return x.transpose(1, 2).contiguous()
        parts, rest = [], x
        for _ in range(3):
            parts.append(rest.to(values.dtype))
            rest = rest - parts[-1].float()
        return F.pad(torch.stack(parts, -1), (0, width - 3)).transpose(1, 2).unsqueeze(3).contiguous()

    def collect(x):
        return x.squeeze(3)[..., 0].transpose(1, 2) if x.dim() == 5 else x.transpose(1, 2)

    return Bound(call, prepare, collect)


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("cumsum form", eager_cumsum),
    ("cumsum form, torch.compile", compiled_cumsum),
    ("torch associative_scan", associative_scan),
    ("SDPA, query repeated", repeated_query),
)
MINE = ("flowattn",)
NOTE = "The cumsum form is exact only while all scores lie within about 80 of their maximum."
