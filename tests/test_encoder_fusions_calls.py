"""bias_gelu and bias_residual_layer_norm: packing plans, the dispatcher, autograd, compilation, error messages."""

import pytest
import torch
import torch.nn.functional as F
from test_encoder_fusions import (
    NAMES,
    backends,
    gelu_inputs,
    kernels,
    leaves,
    norm_inputs,
    our_norm,
    random_grads,
    results,
)

import flowattn as fa
from flowattn.ops import encoder_fusions as ops

MASKS = {
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]],
    "all": [[1, 1], [1, 1]],
    "none": [[0, 0, 0], [0, 0, 0]],
}


def make_plan(mask, spare, place):
    mask = torch.tensor(MASKS[mask], device=place)
    with fa.use_backend("reference"):
        return fa.pack_plan(mask, capacity=None if spare is None else int(mask.sum()) + spare)


@backends
@pytest.mark.parametrize("width", [7, 96, 1500], ids="d{}".format)
@pytest.mark.parametrize("spare", [None, 0, 3], ids="spare{}".format)
@pytest.mark.parametrize("mask", MASKS)
def test_plans(mask, spare, width, backend, place):
    # On a GPU torch sums a row in an order that depends on where the row begins in memory.
    check_plan(make_plan(mask, spare, place), width, place, bitwise=backend != "reference" or place == "cpu")


@kernels
def test_plans_of_wide_rows(place):
    check_plan(make_plan("holes", 3, place), 9000, place)


def check_plan(plan, width, place, bitwise=True):
    """Unused rows are 0 and add nothing to a gradient, and hold whatever they like; the rest is pack, norm, unpack."""
    rows, real = plan.indices.shape[0], int(plan.total)
    padded = (plan.batch, plan.padded_len, width)
    keep = (plan.inverse >= 0).view(plan.batch, plan.padded_len)
    vectors = norm_inputs(0, width, torch.float32, place)

    def case(shape, unused):
        x, residual = torch.randn(shape, device=place), torch.randn(shape, device=place)
        x[unused], residual[unused] = float("nan"), float("inf")
        return [x, vectors[1], residual, *vectors[3:]]

    def same(function, outputs, found, tensors, grads, used):
        compare_rows(function, outputs, found, tensors, grads, used, 0 if bitwise else 1e-6)

    def unpacked(*tensors):
        y, z = our_norm()(*tensors)
        out = [y.new_zeros(padded), y.new_zeros(padded)]
        return tuple(o.masked_scatter(keep[..., None], part) for o, part in zip(out, (y, z)))

    tensors = case((rows, width), slice(real, None))
    grads = [torch.randn(padded, device=place) for _ in range(2)]
    outputs, found = results(our_norm(unpack_to=plan), leaves(tensors), grads)
    cut = [t[:real] if t.dim() == 2 else t for t in tensors]
    same(unpacked, outputs, found, cut, grads, slice(real))

    tensors = case(padded, ~keep)
    grads = [torch.randn(rows, width, device=place) for _ in range(2)]
    outputs, found = results(our_norm(pack_from=plan), leaves(tensors), grads)
    assert all((part[real:] == 0).all() for part in outputs)
    cut = [t[keep] if t.dim() == 3 else t for t in tensors]
    same(our_norm(), [part[:real] for part in outputs], found, cut, [g[:real] for g in grads], keep)


def compare_rows(function, outputs, found, tensors, grads, used, tolerance):
    """The outputs and row gradients are those of `function`; vector gradients add rows in another order."""
    want_outputs, want = results(function, leaves(tensors), grads)
    for got, expected in zip(outputs, want_outputs):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for name, got, expected in zip(NAMES, found, want):
        if name in ("x", "residual"):
            unused = torch.ones_like(got, dtype=torch.bool)
            unused[used] = False
            assert (got[unused] == 0).all(), name
            got = got[used]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@kernels
def test_damaged_plans_read_nothing_outside(place):
    plan = make_plan("right", None, place)
    wild = torch.tensor([-1, 15, 2**31 - 1, -(2**31), 14, 0, 3, 99], dtype=torch.int32, device=place)
    plan = plan._replace(indices=wild, inverse=wild.repeat(2)[:15])
    x = torch.randn(3, 5, 20, device=place, requires_grad=True)
    y = fa.bias_residual_layer_norm(x, None, None, None, None, pack_from=plan)
    rows = F.layer_norm(x, (20,), eps=1e-12).flatten(0, 1)
    torch.testing.assert_close(y[4:7], rows[[14, 0, 3]])
    assert (y[[0, 1, 2, 3, 7]] == 0).all()
    y.sum().backward()
    assert (x.grad.flatten(0, 1)[[0, 1, 2, 3, 7]] == 0).all()


@backends
def test_empty_batches(place):
    for shape in ((0, 5), (4, 0)):
        with fa.use_backend("reference"):
            plan = fa.pack_plan(torch.ones(shape, dtype=torch.bool, device=place), capacity=2)
        x = torch.randn(*shape, 8, device=place, requires_grad=True)
        weight = torch.randn(8, device=place, requires_grad=True)
        y = fa.bias_residual_layer_norm(x, None, None, weight, None, pack_from=plan)
        assert y.tolist() == [[0.0] * 8] * 2
        y.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.tolist() == [0.0] * 8
    x = torch.randn(3, 0, device=place, requires_grad=True)
    vector = torch.randn(0, device=place, requires_grad=True)
    fa.bias_residual_layer_norm(x, vector, x, vector, vector).sum().backward()
    fa.bias_gelu(x, vector).sum().backward()
    assert x.grad.shape == (3, 0) and vector.grad.shape == (0,)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend):
    x, residual, bias, weight, ln_bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 5), (3, 5, 5), 5, 5, 5)
    )
    plan = make_plan("holes", 2, "cpu")
    for approximate in ("none", "tanh"):
        assert torch.autograd.gradcheck(lambda *t, a=approximate: fa.bias_gelu(*t, approximate=a), (x, bias))
    vectors = (weight, ln_bias)
    assert torch.autograd.gradcheck(our_norm(1e-3), (x, bias, residual, *vectors))
    assert torch.autograd.gradcheck(our_norm(1e-3, pack_from=plan), (x, bias, residual, *vectors))
    packed = torch.randn(2, plan.indices.shape[0], 5, dtype=torch.float64, requires_grad=True)
    unpacking = our_norm(1e-3, unpack_to=plan)
    assert torch.autograd.gradcheck(lambda p, *v: unpacking(p[0], bias, p[1], *v), (packed, *vectors))


@kernels
def test_opcheck(place):
    dtype = torch.float64 if place == "cpu" else torch.float32
    x, bias, residual, weight, ln_bias = norm_inputs(6, 10, dtype, place)
    wide = torch.randn(6, 20, dtype=dtype, device=place)
    dy = torch.randn(8, 10, dtype=dtype, device=place)
    index = torch.tensor([0, 3, -1, 5, 1, 2, 4, -1], dtype=torch.int32, device=place)
    inverse = torch.tensor([0, 4, 5, 1, 6, 3], dtype=torch.int32, device=place)
    for rows in (x, wide[:, ::1][:, :10], x[:0]):
        for tanh in (False, True):
            torch.library.opcheck(ops._gelu_fwd, (rows, bias, tanh))
            torch.library.opcheck(ops._gelu_bwd, (rows, rows, bias, tanh, True))
    torch.library.opcheck(ops._gelu_bwd, (x, x, None, False, True))
    for vectors, index_, sums in (((weight, ln_bias), None, False), ((None, weight.float()), index, True)):
        args = (x, bias, residual, *vectors, index_, 1e-7, sums)
        torch.library.opcheck(ops._norm_fwd, args)
        stats = ops._norm_fwd(*args)[2]
        grad, back = (dy[:6], None) if index_ is None else (dy, inverse)
        for want in (False, True):
            args = (grad, grad if sums else None, x, bias, residual, *vectors, stats, back, want)
            torch.library.opcheck(ops._norm_bwd, args)


@backends
def test_fullgraph_compile(place):
    plan = make_plan("holes", 2, place)

    def layer(x, bias, residual, weight, ln_bias):
        y, z = fa.bias_residual_layer_norm(x, bias, residual, weight, ln_bias, return_sum=True)
        y = fa.bias_residual_layer_norm(y, None, z, weight, ln_bias)
        y = fa.bias_gelu(y, bias, approximate="tanh") + fa.bias_gelu(x, None)
        return fa.bias_residual_layer_norm(y, bias, residual, weight, None, unpack_to=plan)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    tensors = norm_inputs(plan.indices.shape[0], 24, torch.float32, place)
    grads = [torch.randn(plan.batch, plan.padded_len, 24, device=place)]
    for got, want in zip(results(compiled, leaves(tensors), grads), results(layer, leaves(tensors), grads)):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


@backends
def test_compile_with_dynamic_rows(place):
    def layer(x, bias):
        return fa.bias_residual_layer_norm(fa.bias_gelu(x, bias), bias, x, bias, bias)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (4, 9, 31):
        x, bias = gelu_inputs(rows, 24, torch.float32, place)
        assert torch.equal(compiled(x, bias), layer(x, bias))


@backends
def test_autocast(place):
    x, bias, residual, weight, ln_bias = norm_inputs(7, 40, torch.float32, place)
    half = x.bfloat16()
    with torch.autocast(place, dtype=torch.bfloat16):
        y = fa.bias_residual_layer_norm(half, bias, residual, weight, ln_bias)
        u = fa.bias_gelu(x, bias.to(torch.float16))
    assert torch.equal(y, fa.bias_residual_layer_norm(half, bias, residual.bfloat16(), weight, ln_bias))
    assert torch.equal(u, fa.bias_gelu(half, bias.to(torch.float16).bfloat16()))


@backends
def test_one_tensor_as_x_and_residual(place):
    x, _, _, weight, ln_bias = leaves(norm_inputs(7, 40, torch.float32, place))
    ours = fa.bias_residual_layer_norm(x, None, x, weight, ln_bias)
    plain = F.layer_norm(x + x, (40,), weight, ln_bias, 1e-12)
    grad = torch.randn_like(x)
    for got, want in zip(*(torch.autograd.grad(y, (x, weight, ln_bias), grad) for y in (ours, plain))):
        torch.testing.assert_close(got, want)


@backends
def test_gradients_are_computed_for_what_wants_them(place):
    tensors = norm_inputs(7, 40, torch.float32, place)
    grads = random_grads(tensors[0], 2)
    everything = dict(zip(NAMES, results(our_norm(), leaves(tensors), grads)[1]))
    for wanted in (("x",), ("residual",), ("bias",), ("weight", "ln_bias"), ("x", "weight")):
        given = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors)]
        outputs = [(y, grad) for y, grad in zip(our_norm()(*given), grads) if y.requires_grad]
        torch.autograd.backward(*zip(*outputs))
        for name, t in zip(NAMES, given):
            assert (t.grad is not None) == (name in wanted), name
            assert t.grad is None or torch.equal(t.grad, everything[name]), name
    x, bias = (t.detach() for t in tensors[:2])
    fa.bias_gelu(x, bias.requires_grad_()).sum().backward()
    fa.bias_gelu(x.requires_grad_(), bias.detach()).sum().backward()
    assert torch.allclose(bias.grad, x.grad.sum(0), atol=1e-5)


@kernels
def test_gradients_are_repeatable(place):
    tensors = norm_inputs(900, 200, torch.float32, place)
    grads = random_grads(tensors[0], 2)
    threads = torch.get_num_threads()
    runs = []
    for count in (threads, 1, threads):
        torch.set_num_threads(count)
        runs.append(results(our_norm(), leaves(tensors), grads)[1])
        runs[-1] += results(fa.bias_gelu, leaves(tensors[:2]), grads[:1])[1]
    torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_cuda_graph(place):
    tensors = norm_inputs(300, 768, torch.bfloat16, place)
    grads = random_grads(tensors[0], 2)

    def step(given):
        y, z = our_norm()(*given)
        u = fa.bias_gelu(y, given[1])
        return torch.autograd.grad((u, z), given, grads)

    given = leaves(tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(given)
    with torch.no_grad():
        given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(given)):
        assert torch.equal(got, want)


def refusals():
    x, vector = torch.randn(4, 6), torch.randn(6)
    plan = make_plan("right", None, "cpu")
    norm, gelu = fa.bias_residual_layer_norm, fa.bias_gelu
    return {
        "kind": (lambda: gelu([1.0], None), TypeError, "x must be a tensor; got list"),
        "dtype": (lambda: gelu(x.int(), None), TypeError, "x must be float16, bfloat16, float32 or float64"),
        "dims": (lambda: gelu(x[0, 0], None), ValueError, r"x must have shape \(..., d\)"),
        "form": (
            lambda: gelu(x, None, approximate="erf"),
            ValueError,
            "approximate must be 'none' or 'tanh'; got 'erf'",
        ),
        "bias shape": (lambda: gelu(x, vector[1:]), ValueError, r"bias must have shape \(6,\); got \(5,\)"),
        "bias dtype": (lambda: gelu(x, vector.half()), TypeError, "bias must have the dtype of x, torch.float32, or"),
        "bias device": (
            lambda: gelu(x, vector.to("meta")),
            ValueError,
            "bias must be on the device of x, cpu; got meta",
        ),
        "last dim": (lambda: gelu(x.t(), None), ValueError, "the last dim of x must be contiguous; got stride 6"),
        "rows": (
            lambda: gelu(torch.randn(4, 3, 6).transpose(0, 1), None),
            ValueError,
            r"leading dims of x must collapse to evenly spaced rows; got shape .* \(call .contiguous\(\) on it\)",
        ),
        "residual": (lambda: norm(x, None, x[1:], vector, vector), ValueError, "residual must have the shape of x"),
        "residual dtype": (
            lambda: norm(x, None, x.half(), vector, vector),
            TypeError,
            "residual must have the dtype of x",
        ),
        "weight": (lambda: norm(x, None, None, vector[None], vector), ValueError, r"weight must have shape \(6,\)"),
        "eps": (lambda: norm(x, None, None, vector, vector, eps=-1.0), ValueError, "eps must be >= 0; got -1.0"),
        "both plans": (
            lambda: norm(x, None, None, vector, vector, pack_from=plan, unpack_to=plan),
            ValueError,
            "takes at most one of pack_from and unpack_to; got both",
        ),
        "packed": (
            lambda: norm(x, None, None, vector, vector, unpack_to=plan),
            ValueError,
            r"x must have the plan's packed shape \(8, 6\); got \(4, 6\)",
        ),
        "padded": (
            lambda: norm(x, None, None, vector, vector, pack_from=plan),
            ValueError,
            r"x must have the plan's padded shape \(3, 5, 6\); got \(4, 6\)",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_errors(name):
    call, error, message = refusals()[name]
    with pytest.raises(error, match=message):
        call()


def test_explain(native, capsys):
    x, vector = torch.randn(4, 6), torch.randn(6)
    assert fa.explain("bias_gelu", x, vector, approximate="tanh") == "cpu"
    assert fa.explain("bias_residual_layer_norm", x, None, x, vector, vector, eps=1e-7) == "cpu"
    assert "needs CUDA tensors" in capsys.readouterr().out


@pytest.mark.gpu
def test_cuda_refuses_float64():
    x = torch.randn(4, 6, dtype=torch.float64, device="cuda")
    with fa.use_backend("cuda"), pytest.raises(NotImplementedError, match="no float64"):
        fa.bias_gelu(x, None)
