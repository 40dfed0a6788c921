"""axial_attention: memory, edge cases, bits, errors, compilation."""

import numpy
import pytest
import torch
from axial_oracle import inputs, on_backends, ours, run

import flowattn as fa

NAN = float("nan")


@on_backends
def test_permuting_axes_commutes_bitwise(backend, place):
    q, k, v = inputs((2, 7, 5), 1, device=place)
    swapped = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v)]
    out, moved = fa.axial_attention(q, k, v, 1), fa.axial_attention(*swapped, 2)
    assert torch.equal(out, moved.transpose(1, 2))
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    swapped = [x.requires_grad_() for x in swapped]
    moved = fa.axial_attention(*swapped, 2)
    want = torch.autograd.grad((moved * weight.transpose(1, 2)).sum(), swapped)
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(got, want))


@on_backends
def test_permuting_the_batch_commutes_bitwise(backend, place):
    q, k, v = (x.detach() for x in inputs((5, 6, 3), 1, device=place))
    order = torch.tensor([3, 1, 4, 0, 2], device=place)
    out = fa.axial_attention(q, k, v, 1, causal=True)
    assert torch.equal(out[order], fa.axial_attention(q[order], k[order], v[order], 1, causal=True))


@on_backends
def test_two_runs_agree_bitwise(backend, place):
    tensors = [*inputs((3, 9, 4), 1, device=place), torch.randn(2, 9, 9, device=place)]
    first, second = (run(ours, tensors, axis=1, bias=True, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_bits_do_not_depend_on_threads(native):
    tensors = [*inputs((5, 70, 4), 1), torch.randn(2, 70, 70)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(ours, tensors, axis=1, bias=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("mask", ({"causal": True}, {"exclusive": True}), ids=("causal", "exclusive"))
@on_backends
def test_masked_keys_do_not_matter(backend, place, mask):
    q, k, v = (x.detach() for x in inputs((1, 6, 2), 1, device=place))
    out = fa.axial_attention(q, k, v, 1, **mask)
    k[:, 4:], v[:, 4:] = 1e4, -1e4
    changed = fa.axial_attention(q, k, v, 1, **mask)
    assert torch.equal(out[:, :4], changed[:, :4]) and not torch.equal(out[:, 5], changed[:, 5])


@pytest.mark.parametrize("axis", (1, 2))
@on_backends
def test_poison_around_the_tensors_stays_outside(backend, place, axis):
    """Views into NaN-filled memory, with padding on every side of each axis, of heads and of channels."""

    def poisoned(x):
        memory = x.new_full([size + 3 for size in x.shape], NAN)
        view = memory[tuple(slice(1, 1 + size) for size in x.shape)]
        view.copy_(x)
        return view

    tensors = [x.detach() for x in inputs((2, 5, 3), axis, 4, 2, 6, device=place)]
    expected = run(ours, tensors, axis=axis, causal=True)
    views = [poisoned(x).requires_grad_() for x in tensors]
    out, lse = fa.axial_attention(*views, axis, causal=True, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    weight = torch.randn_like(out)
    dout = poisoned(weight)
    got = torch.autograd.grad(out, views, dout)
    plain = [x.requires_grad_() for x in tensors]
    want = torch.autograd.grad(fa.axial_attention(*plain, axis, causal=True), plain, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@on_backends
def test_expanded_keys(backend, place):
    q, k, v = inputs((2, 5, 3), 1, device=place)
    one_k, one_v = (x.detach()[:1, :, :1].requires_grad_() for x in (k, v))
    keys, values = one_k.expand_as(k), one_v.expand_as(v)
    out = fa.axial_attention(q, keys, values, 1)
    assert torch.equal(out, fa.axial_attention(q, keys.contiguous(), values.contiguous(), 1))
    got = torch.autograd.grad(out.square().sum(), (one_k, one_v), retain_graph=True)
    copies = [x.detach().contiguous().requires_grad_() for x in (keys, values)]
    want = torch.autograd.grad(fa.axial_attention(q, *copies, 1).square().sum(), copies)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y.sum((0, 2), keepdim=True))


@on_backends
def test_six_axes_that_do_not_merge(backend, place):
    """Three axes before and three after the attended one, every stride its own."""
    sizes = (2, 1, 2, 3, 2, 1, 2)
    memory = torch.randn(*(s + 1 for s in sizes), 3, 2, 8, device=place)
    qkv = memory[tuple(slice(0, s) for s in sizes)]
    q, k, v = qkv.unbind(-3)
    assert torch.equal(fa.axial_attention(q, k, v, 3), fa.axial_attention(*(x.contiguous() for x in (q, k, v)), 3))


@on_backends
def test_rows_far_apart(backend, place):
    """Steps past 2**31 elements between rows of one line."""
    n, step = 130, 1 << 24
    memory = torch.from_numpy(numpy.zeros(n * step, numpy.float16)).to(place)  # zeros that no host page holds
    far = [memory.as_strided((1, n, 1, 8), (0, step, 8, 1), 8 * i) for i in range(3)]
    near = [torch.randn(1, n, 1, 8, dtype=torch.float16, device=place) for _ in far]
    for x, y in zip(far, near):
        x.copy_(y)
    results = [run(ours, [x.requires_grad_() for x in tensors], axis=1) for tensors in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@on_backends
def test_rows_without_keys(backend, place):
    out, lse, *gradients = run(ours, inputs((1, 3, 2), 1, device=place), axis=1, exclusive=True)
    assert not out[:, 0].any() and (lse[:, 0] == float("-inf")).all() and lse[:, 1:].isfinite().all()
    assert not gradients[0][:, 0].any() and all(g.isfinite().all() for g in gradients)


@on_backends
def test_rows_hidden_by_the_bias(backend, place):
    bias = torch.zeros(3, 3, device=place)
    bias[1] = float("-inf")
    out, lse, *gradients = run(ours, [*inputs((1, 3, 2), 1, device=place), bias], axis=1, bias=True)
    assert not out[:, 1].any() and (lse[:, 1] == float("-inf")).all()
    assert not gradients[0][:, 1].any() and all(g.isfinite().all() for g in gradients)


@on_backends
def test_an_axis_of_one(backend, place):
    q, k, v = inputs((2, 1, 3), 1, device=place)
    out, _, dq, dk, _ = run(ours, (q, k, v), axis=1, lse=False)
    # On a GPU three tf32 products stand for one of float32, and may lose its last bit.
    torch.testing.assert_close(out, v, atol=0, rtol=1e-6 if place == "cuda" else 0)
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("keys", (0, 2))
@pytest.mark.parametrize("grid", ((0, 2, 3), (2, 0, 3), (2, 2, 0)), ids=str)
@on_backends
def test_nothing(backend, place, grid, keys):
    got = run(ours, inputs(grid, 1, keys=keys, device=place), axis=1)
    assert got[0].shape == (*grid, 2, 8) and not any(x.any() for x in got[2:])


@on_backends
def test_no_keys(backend, place):
    out, lse, dq, dk, dv = run(ours, inputs((2, 3, 2), 1, keys=0, device=place), axis=1)
    assert not out.any() and (lse == float("-inf")).all() and not dq.any() and dk.shape[1] == dv.shape[1] == 0


@pytest.mark.parametrize("backend", ("cpu", pytest.param("triton", marks=pytest.mark.gpu)), indirect=True)
@pytest.mark.parametrize("grid", ((80_000, 4), (1, 4, 65_536)), ids=str)
def test_many_sequences(backend, place, grid):
    tensors = inputs(grid, 1, heads=1, width=4, device=place)
    got = run(ours, tensors, axis=1)
    with fa.use_backend("reference"):
        expected = run(ours, tensors, axis=1)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", (1, 8, 24, 40, 72, 80, 128, 200, 256))
@pytest.mark.parametrize("backend", ("cpu", "triton"), indirect=True)
def test_widths(backend, place, width):
    q, k, v = inputs((1, 5, 2), 1, 2, 1, width, device=place)
    got = run(ours, (q, k, v), axis=1)
    with fa.use_backend("reference"):
        expected = run(ours, (q, k, v), axis=1)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=3e-5)


@pytest.mark.parametrize("wanted", (0, 1, 2, 3))
def test_gradients_of_some(native, wanted):
    tensors = [x.detach() for x in inputs((2, 3, 2), 1)] + [torch.randn(2, 3, 3)]
    expected = run(ours, tensors, axis=1, bias=True, lse=False)[2 + wanted]
    tensors[wanted].requires_grad_()
    out = fa.axial_attention(*tensors[:3], 1, bias=tensors[3])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.autograd.grad((out * weight).sum(), tensors[wanted])[0], expected)


def test_twice_differentiable_is_refused(native):
    q, k, v = inputs((1, 3, 2), 1)
    (dq,) = torch.autograd.grad(fa.axial_attention(q, k, v, 1).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    (
        (lambda q, k, v: (q, k, v, 0), ValueError, "axis must be a grid axis"),
        (lambda q, k, v: (q, k, v, 3), ValueError, "not the batch, heads or channels"),
        (lambda q, k, v: (q, k, v, -1), ValueError, "not the batch, heads or channels"),
        (lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0], 1), ValueError, "must have shape"),
        (lambda q, k, v: (q, k[:, :, :1], v, 1), ValueError, "agree on every grid axis but 1"),
        (lambda q, k, v: (q, k, v[:, :1], 1), ValueError, "agree on every grid axis but 1"),
        (lambda q, k, v: (q[..., :3, :], k, v, 1), ValueError, "heads of k must divide"),
        (lambda q, k, v: (q[..., :4], k, v, 1), ValueError, "k must have the width of q, 4"),
        (lambda q, k, v: (q, k.half(), v, 1), TypeError, "k must have the dtype of q"),
        (lambda q, k, v: (q.long(), k, v, 1), TypeError, "q must be float16"),
        (lambda q, k, v: (q.transpose(-1, -2), k, v, 1), ValueError, "last dim of q must be contiguous"),
    ),
)
def test_errors(change, error, text):
    q, k, v = (torch.randn(2, 5, 3, 4, 8) for _ in range(3))
    k, v = k[..., :2, :], v[..., :2, :]
    if "contiguous" in text:
        q = torch.randn(2, 5, 3, 4, 4)
    with pytest.raises(error, match=text):
        fa.axial_attention(*change(q, k, v))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    (
        ({"bias": torch.zeros(3, 5, 5)}, ValueError, "bias must broadcast to"),
        ({"bias": torch.zeros(4, 5, 5, dtype=torch.half)}, TypeError, "bias must have the dtype of q"),
        ({"rope": (torch.zeros(4, 2), torch.zeros(4, 2))}, ValueError, r"rope must be \(cos, sin\), each \(5, R\)"),
        ({"rope": (torch.zeros(5, 5), torch.zeros(5, 5))}, ValueError, "with 2R <= 8"),
        ({"layout": "heads_first"}, ValueError, "layout must be one of"),
    ),
)
def test_errors_of_options(options, error, text):
    x = torch.randn(2, 5, 3, 4, 8)
    with pytest.raises(error, match=text):
        fa.axial_attention(x, x, x, 1, **options)


def test_errors_of_the_others():
    x = torch.randn(2, 5, 3, 4, 8)
    with pytest.raises(ValueError, match="qkv must have shape"):
        fa.axial_attention_qkvpacked(x[..., :2, :, :], 1)
    with pytest.raises(ValueError, match="axis must be a grid axis of qkv"):
        fa.axial_attention_qkvpacked(x, -3)
    with pytest.raises(ValueError, match="position must lie in the cache"):
        fa.axial_attention_step(x[:, :1], x[:, :1], x[:, :1], x, x, 1, 5)
    with pytest.raises(ValueError, match="add must have the shape"):
        fa.axial_shift(x, 1, add=x[:1])


@pytest.mark.parametrize("backend", ("cpu", "triton"), indirect=True)
def test_opcheck(backend, place):
    q, k, v = (x.detach() for x in inputs((1, 3, 2), 1, 2, 1, device=place))
    bias = torch.randn(1, 1, 2, 3, 3, device=place)
    cos, sin = (torch.rand(3, 2, device=place) for _ in range(2))
    suffix = "_triton" if backend == "triton" else ""
    ops = torch.ops.flowattn
    options = (bias, cos, sin, 1, 0.3, 1, False)
    forward = getattr(ops, f"axial_attention_fwd{suffix}").default
    out, lse = forward(q, k, v, *options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    backward = getattr(ops, f"axial_attention_bwd{suffix}").default
    packed_backward = getattr(ops, f"axial_attention_qkvpacked_bwd{suffix}").default
    qkv = torch.randn(1, 3, 2, 3, 2, 8, device=place)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (q, k, v, *options), test_utils=checks)
    permuted = (*(x.transpose(1, 2) for x in (q, k, v)), None, None, None, 2, 0.3, 0, False)
    torch.library.opcheck(forward, permuted, test_utils=checks)
    torch.library.opcheck(backward, (dout, dlse, q, k, v, out, lse, *options, True), test_utils=checks)
    torch.library.opcheck(packed_backward, (dout, None, qkv, out, lse, *options, False), test_utils=checks)


def test_compiles_whole(native):
    qkv = torch.randn(2, 4, 3, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 4, 4, requires_grad=True)

    def layer(qkv, bias):
        rows = fa.axial_attention(*qkv.unbind(-3), 2, causal=True)
        return rows + fa.axial_attention_qkvpacked(qkv, 1, bias=bias)

    expected = torch.autograd.grad(layer(qkv, bias).square().sum(), (qkv, bias))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(qkv, bias).square().sum(), (qkv, bias))
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)


def test_autocast(native):
    x = torch.randn(2, 4, 3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = fa.axial_attention(x, x, x, 1)
    half = x.bfloat16()
    assert torch.equal(out, fa.axial_attention(half, half, half, 1))
