"""chunk_hybrid_attention against a float64 loop over images, its states, and what it becomes at the edges."""

import doctest

import pytest
import torch
from flow_attention_oracle import assert_near, takes

import flowattn as fa
from flowattn.ops import chunk_hybrid_attention as module

on_backends = pytest.mark.parametrize("backend", ("cpu", "triton", "reference"), indirect=True)

# Largest rms error, as a share of the rms of the truth: of o and the state, of the gradients.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (1e-3, 2e-3),
}


def oracle(q, k, v, gate, state, chunk):
    """One row and head in float64: q, k (T, D), v (T, M), gate (T,), state (D, M)."""
    q, k, v, state = q.double(), k.double() / q.shape[1] ** 0.5, v.double(), state.double()
    g = torch.log(torch.sigmoid(gate.double())) / 16
    outs = []
    for first in range(0, q.shape[0], chunk):
        rows = slice(first, first + chunk)
        for i in range(first, first + chunk):
            inner = torch.softmax(k[rows] @ q[i], 0) @ v[rows]
            outs.append(inner + torch.exp(g[first : i + 1].sum()) * (q[i] @ state))
        state = torch.exp(g[rows].mean()) * state + sum(torch.outer(k[i], v[i]) for i in range(first, first + chunk))
    return torch.stack(outs), state


def inputs(shape=(2, 12, 2, 8), width_v=6, heads_kv=None, dtype=torch.float32, device="cpu", state=True):
    batch, length, heads, width = shape
    heads_kv = heads if heads_kv is None else heads_kv
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (shape, (batch, length, heads_kv, width), (batch, length, heads_kv, width_v), shape[:3])
    q, k, v, gate = (torch.randn(s).to(device, dtype) for s in shapes)
    return q, k, v, gate, torch.randn(batch, heads, width, width_v).to(device, wide) if state else None


def outcome(tensors, chunk):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outs = fa.chunk_hybrid_attention(*leaves[:4], chunk=chunk, initial_state=leaves[4], output_final_state=True)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, tensors[0].dtype).to(x.dtype) for x in outs]
    return (*outs, *torch.autograd.grad(outs, [x for x in leaves if x is not None], grads))


def check(tensors, chunk):
    dtype = tensors[0].dtype
    got = outcome(tensors, chunk)
    with fa.use_backend("reference"):
        true = outcome([None if x is None else x.double() for x in tensors], chunk)
    for i, (x, y) in enumerate(zip(got, true)):
        assert_near(f"result {i}", x, y, TOLERANCE[dtype][i > 1])


def test_reference_against_loops():
    q, k, v, gate, state = inputs((2, 12, 4, 5), heads_kv=2, dtype=torch.float64)
    with fa.use_backend("reference"):
        o, last = fa.chunk_hybrid_attention(q, k, v, gate, chunk=4, initial_state=state, output_final_state=True)
    for b in range(2):
        for h in range(4):
            one = (q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], gate[b, :, h], state[b, h])
            expected, final = oracle(*one, 4)
            torch.testing.assert_close(o[b, :, h], expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(last[b, h], final, rtol=1e-12, atol=1e-12)


# One image and several; images of one token, of odd sizes and beyond a tile; widths that fill no vector; shared heads.
CASES = {
    "one image": (((1, 48, 2, 16), 16), 48),
    "several": (((2, 111, 4, 20), 12, 2), 37),
    "wide": (((1, 140, 1, 72), 40), 70),
    "single tokens": (((2, 5, 2, 8), 8), 1),
}


@pytest.mark.parametrize("state", (True, False), ids=("resumed", "fresh"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_backends
def test_results_and_gradients(backend, place, dtype, case, state):
    if not takes(backend, dtype):
        pytest.skip("not computed by this backend")
    sizes, chunk = CASES[case]
    check(inputs(*sizes, dtype=dtype, device=place, state=state), chunk)


@on_backends
def test_images_one_by_one_equal_all_at_once(backend, place):
    q, k, v, gate, _ = inputs((2, 40, 2, 16), device=place)
    whole, last = fa.chunk_hybrid_attention(q, k, v, gate, chunk=8, output_final_state=True)
    state, parts = None, []
    for first in range(0, 40, 8):
        piece = (x[:, first : first + 8] for x in (q, k, v, gate))
        o, state = fa.chunk_hybrid_attention(*piece, chunk=8, initial_state=state, output_final_state=True)
        parts.append(o)
    assert_near("o", torch.cat(parts, 1), whole, 1e-6)
    assert_near("state", state, last, 1e-6)


@on_backends
def test_one_image_is_softmax_attention(backend, place):
    q, k, v, gate, _ = inputs((2, 33, 2, 16), device=place)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert_near("o", fa.chunk_hybrid_attention(q, k, v, gate, chunk=33), expected, 2e-6)


@on_backends
def test_later_images_change_nothing(backend, place):
    q, k, v, gate, state = inputs((1, 24, 2, 16), device=place)
    before = fa.chunk_hybrid_attention(q, k, v, gate, chunk=8, initial_state=state)
    for x in (q, k, v, gate):
        x[:, 16:] += 1
    after = fa.chunk_hybrid_attention(q, k, v, gate, chunk=8, initial_state=state)
    assert torch.equal(after[:, :16], before[:, :16]) and not torch.equal(after[:, 16:], before[:, 16:])


@on_backends
def test_no_tokens_pass_the_state_on(backend, place):
    q, k, v, gate, state = inputs((2, 0, 2, 8), device=place)
    state.requires_grad_()
    o, last = fa.chunk_hybrid_attention(q, k, v, gate, chunk=4, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 2, 6) and torch.equal(last, state)
    assert torch.autograd.grad(last.sum(), state)[0].eq(1).all()


@on_backends
def test_extreme_gates_and_scores_stay_finite(backend, place):
    q, k, v, gate, state = inputs((1, 16, 2, 8), device=place)
    leaves = [x.requires_grad_() for x in (1e3 * q, 1e3 * k, v, 1e4 * gate, state)]
    o = fa.chunk_hybrid_attention(*leaves[:4], chunk=8, initial_state=leaves[4])
    assert o.isfinite().all() and all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), leaves))


@on_backends
def test_views_and_float32_gates(backend, place):
    q, k, v, gate, _ = inputs((2, 12, 2, 16), width_v=16, dtype=torch.float16, device=place)
    packed = torch.cat([q, k, v], -1).split(16, -1)
    o = fa.chunk_hybrid_attention(q, k, v, gate, chunk=6)
    same = torch.allclose if backend == "reference" else torch.equal  # plain torch adds in an order of its own
    assert same(fa.chunk_hybrid_attention(*packed, gate.float().mT.contiguous().mT, chunk=6), o)


@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
def test_gradcheck(backend):
    leaves = [x.requires_grad_() for x in inputs((1, 6, 2, 3), 2, 1, torch.float64)]

    def call(*x):
        return fa.chunk_hybrid_attention(*x[:4], chunk=3, initial_state=x[4], output_final_state=True)

    assert torch.autograd.gradcheck(call, leaves)


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
