"""What the tests of axial_attention share: inputs, a float64 loop over the lines of a grid, comparisons."""

import itertools

import pytest
import torch

import flowattn as fa

BACKENDS = ("cpu", "triton", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
FLOAT32_ATOL = (2e-5, 1e-4)  # results, gradients, for N(0, 1) inputs


def oracle(q, k, v, axis, causal=False, exclusive=False, scale=None, bias=None, rope=None, rope_interleaved=False):
    """(out, lse) in float64, one query of one line at a time."""
    q, k, v = (x.double().movedim(axis, -3) for x in (q, k, v))  # (others.., length, heads, width)
    (n, heads, width), m = q.shape[-3:], k.shape[-3]
    batch = q.shape[:-3]
    if bias is not None:
        bias = bias.double().expand(*batch, heads, n, m)
    outs, lses = [], []
    for at in itertools.product(*map(range, batch)):
        for h in range(heads):
            keys, values = k[at][:, h // (heads // k.shape[-2])], v[at][:, h // (heads // k.shape[-2])]
            queries = q[at][:, h]
            if rope is not None:
                queries, keys = (rotate_pairs(x, *rope, rope_interleaved) for x in (queries, keys))
            for i in range(n):
                end = max(min(m, i + m - n + (not exclusive)), 0) if causal or exclusive else m
                scores = keys[:end] @ queries[i] * (width**-0.5 if scale is None else scale)
                if bias is not None:
                    scores = scores + bias[at][h, i, :end]
                outs.append(scores.softmax(0) @ values[:end])
                lses.append(scores.logsumexp(0) if end else scores.new_tensor(float("-inf")))
    shape = (*batch, heads, n)
    out = torch.stack(outs).reshape(*shape, -1).transpose(-3, -2).movedim(-3, axis)
    return out, torch.stack(lses).reshape(shape).transpose(-2, -1).movedim(-2, axis)


def rotate_pairs(x, cos, sin, interleaved):
    """Each channel pair of each row as a complex number times exp(i angle)."""
    x, rows, width = x.clone(), x.shape[0], cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[cos.shape[0] - rows :]
    first = range(0, 2 * width, 2) if interleaved else range(width)
    columns = {}
    for c, a in enumerate(first):
        b = a + (1 if interleaved else width)
        turned = torch.complex(x[:, a], x[:, b]) * turn[:, c]
        columns[a], columns[b] = turned.real, turned.imag
    return torch.stack([columns.get(c, x[:, c]) for c in range(x.shape[1])], 1)


def inputs(grid, axis, heads=2, heads_kv=None, width=8, width_v=None, keys=None, dtype=torch.float32, device="cpu"):
    """q, k, v with gradients."""
    key_grid = [*grid[:axis], grid[axis] if keys is None else keys, *grid[axis + 1 :]]
    heads_kv, width_v = heads_kv or heads, width_v or width
    shapes = ((*grid, heads, width), (*key_grid, heads_kv, width), (*key_grid, heads_kv, width_v))
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def run(function, tensors, *args, seed=1, lse=True, **options):
    """(out, lse, *gradients) of `function` with random output gradients, all in the dtype of the tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, scores = function(*tensors, *args, **options)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (out, scores)]
    seen = scores > float("-inf")  # the gradient of -inf is undefined
    loss = (out * weights[0]).sum() + ((scores.masked_fill(~seen, 0.0) * weights[1]).sum() if lse else 0.0)
    return out.detach(), scores.detach(), *torch.autograd.grad(loss, tensors)


def ours(*tensors, axis, bias=False, **options):
    q, k, v, *rest = tensors
    if bias:
        options["bias"] = rest[0]
    return fa.axial_attention(q, k, v, axis, return_lse=True, **options)


def truth(*tensors, axis, bias=False, **options):
    q, k, v, *rest = tensors
    return oracle(q, k, v, axis, bias=rest[0] if bias else None, **options)


NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


def assert_near(got, true, forward=FLOAT32_ATOL[0], backward=FLOAT32_ATOL[1]):
    for name, x, y in zip(NAMES, got, true):
        assert x.shape == y.shape, name
        atol = forward if name in ("out", "lse") else backward
        torch.testing.assert_close(
            x.double().cpu(), y.double().cpu(), rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def check(tensors, **options):
    assert_near(
        run(ours, tensors, **options),
        run(truth, [x.detach().double().cpu() for x in tensors], **{k: on_cpu(v) for k, v in options.items()}),
    )


def on_cpu(x):
    return tuple(y.cpu() for y in x) if isinstance(x, tuple) else x
