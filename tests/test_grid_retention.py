"""grid_retention against the sum over all pairs in float64, its recurrence, and retention along one line."""

import pytest
import torch
from conftest import GPU
from linear_attention_oracle import BF16, F16, F32, F64, TOLERANCE, assert_near

import flowattn as fa
from flowattn.reference.grid_retention import quadrant_recurrence

on_backends = pytest.mark.parametrize("backend", ("reference", "triton"), indirect=True)
GRIDS = ((1, 1), (1, 9), (9, 1), (5, 7), (6, 6))


def rows(grid, dtype=F32, heads=2, heads_kv=1, width=12, value_width=20, batch=2):
    tokens = grid[0] * grid[1]
    q, k = torch.randn(batch, tokens, heads, width), torch.randn(batch, tokens, heads_kv, width)
    return q.to(dtype), k.to(dtype), torch.randn(batch, tokens, heads_kv, value_width).to(dtype)


def pairs(q, k, v, decay, grid, causal, scale):
    """In float64, one pair of tokens after the other."""
    tokens, group = grid[0] * grid[1], q.shape[2] // k.shape[2]
    q, k, v, decay = q.double(), k.double(), v.double(), decay.double()
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    outs = []
    for i in range(tokens):
        (y, x), out = divmod(i, grid[1]), torch.zeros_like(v[:, 0])
        for j in range(tokens):
            ky, kx = divmod(j, grid[1])
            if not causal or (ky <= y and kx <= x):
                weight = (decay * (abs(y - ky) + abs(x - kx))).exp() * (q[:, i] * k[:, j]).sum(-1)
                out = out + scale * weight[..., None] * v[:, j]
        outs.append(out)
    return torch.stack(outs, 1)


@pytest.mark.parametrize("causal", (False, True), ids=("all", "quadrant"))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@on_backends
def test_all_pairs(backend, place, grid, causal):
    tensors, decay = rows(grid), -torch.rand(2)
    leaves = [x.to(place).requires_grad_() for x in tensors]
    out = fa.grid_retention(*leaves, decay.to(place), grid, causal=causal, scale=0.3)
    exact = [x.double().requires_grad_() for x in tensors]
    true = pairs(*exact, decay, grid, causal, 0.3)
    do = torch.randn(true.shape)
    assert_near("o", out, true, TOLERANCE[F32][0])
    got = torch.autograd.grad(out, leaves, do.to(place))
    for name, x, y in zip("qkv", got, torch.autograd.grad(true, exact, do.double())):
        assert_near(f"d{name}", x, y, TOLERANCE[F32][1])


@pytest.mark.parametrize("dtype", (F16, BF16) if GPU else (F16,), ids=str)
@on_backends
def test_half_precision(backend, place, dtype):
    tensors, decay = rows((5, 7), dtype), -torch.rand(2)
    out = fa.grid_retention(*(x.to(place) for x in tensors), decay.to(place), (5, 7))
    assert out.dtype == dtype
    assert_near("o", out, pairs(*tensors, decay, (5, 7), False, 12**-0.5), TOLERANCE[dtype][0])


def test_several_tiles(device):
    """70 tokens are three tiles of float32."""
    tensors, decay = rows((10, 7), batch=1), -torch.rand(2)
    for causal in (False, True):
        got = {}
        for name in ("reference", "triton"):
            with fa.use_backend(name):
                leaves = [x.to(device).requires_grad_() for x in tensors]
                out = fa.grid_retention(*leaves, decay.to(device), (10, 7), causal=causal)
                got[name] = out, *torch.autograd.grad(out.square().sum(), leaves)
        for x, y in zip(*got.values()):
            assert_near("value", x, y.double().cpu(), 1e-5)


def test_one_row_is_retention_along_a_line():
    q, k, v = rows((1, 20))
    decay = -torch.rand(2)
    for causal in (False, True):
        line = fa.linear_attention(q, k, v, decay=decay, causal=causal)
        torch.testing.assert_close(fa.grid_retention(q, k, v, decay, (1, 20), causal=causal), line)


def test_recurrence_of_the_quadrant():
    q, k, v = rows((6, 5), F64, heads_kv=2)
    decay = -torch.rand(2, dtype=F64)
    whole = fa.grid_retention(q, k, v, decay, (6, 5), causal=True, scale=0.5)
    torch.testing.assert_close(quadrant_recurrence(q, k, v, decay, 0.5, 6, 5), whole, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in (*rows((2, 3), F64, width=3, value_width=2), -torch.rand(2, dtype=F64))]
    for causal in (False, True):
        assert torch.autograd.gradcheck(lambda *x, c=causal: fa.grid_retention(*x, (2, 3), causal=c), leaves)


@on_backends
def test_no_tokens(backend, place):
    q, k, v = (x.to(place) for x in rows((0, 5)))
    assert fa.grid_retention(q, k, v, torch.zeros(2, device=place), (0, 5)).shape == (2, 0, 2, 20)


def test_opcheck_and_compile(device):
    torch.use_deterministic_algorithms(False)  # opcheck compares with runs on other memory
    q, k, v = (x.to(device) for x in rows((2, 3), heads_kv=2))
    decay = -torch.rand(2, device=device)
    fwd = torch.ops.flowattn.grid_retention_fwd_triton.default
    torch.library.opcheck(fwd, (q, k, v, decay, 0.5, 2, 3, 0))
    with fa.use_backend("triton"):
        q.requires_grad_()

        def call(q, k, v):
            return fa.grid_retention(q, k, v, decay, (2, 3)).square().sum()

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        (got,), (want,) = (torch.autograd.grad(f(q, k, v), q) for f in (compiled, call))
        torch.testing.assert_close(got, want)


Q, K, G = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8), torch.zeros(4)


@pytest.mark.parametrize(
    "error, text, arguments",
    (
        (ValueError, "q must have shape", (Q[0], K, K, G, (2, 3))),
        (TypeError, "k must have the dtype of q", (Q, K.half(), K, G, (2, 3))),
        (ValueError, "grid must hold the 6 tokens", (Q, K, K, G, (2, 4))),
        (ValueError, "k and v must have the tokens", (Q, K, K[:, 1:], G, (2, 3))),
        (ValueError, "must divide", (Q[:, :, :3], K, K, G[:3], (2, 3))),
        (ValueError, "decay must have shape", (Q, K, K, G[:2], (2, 3))),
        (TypeError, "decay must be float16", (Q, K, K, G.long(), (2, 3))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, text, arguments):
    with pytest.raises(error, match=f"grid_retention: .*{text}"):
        fa.grid_retention(*arguments)
