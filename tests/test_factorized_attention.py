"""factorized_attention against einsum in float64, one axis at a time."""

import pytest
import torch

import flowattn as fa

BACKENDS = ("cpu", "triton", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
GRIDS = ((2, 7), (1, 33, 5), (2, 1, 4, 5), (1, 3, 5, 2, 4))  # batch, then 1 to 4 grid axes; odd, one and unequal sizes
LETTERS = "jklm"
RELATIVE = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # L2 error by L2 norm


def inputs(grid, axes, heads=2, width=6, outs=None, dtype=torch.float32, device="cpu"):
    """v and kernels, with gradients."""
    v = torch.randn(*grid, heads, width).to(device, dtype)
    sizes = [grid[a] for a in axes]
    kernels = [torch.randn(grid[0], heads, o, n, device=device) * 0.3 for o, n in zip(outs or sizes, sizes)]
    return [x.requires_grad_() for x in (v, *kernels)]


def one_axis(v, kernel, axis):
    grid = LETTERS[: v.dim() - 3]
    letter = grid[axis - 1]
    return torch.einsum(f"bhi{letter},b{grid}hc->b{grid.replace(letter, 'i')}hc", kernel, v)


def oracle(v, *kernels, axes, mode="parallel"):
    if mode == "parallel":
        return torch.cat([one_axis(v, kernel, axis) for kernel, axis in zip(kernels, axes)], -1)
    for kernel, axis in zip(kernels, axes):
        v = one_axis(v, kernel, axis)
    return v


def ours(v, *kernels, axes, mode="parallel"):
    return fa.factorized_attention(v, kernels, axes, mode=mode)


def run(function, tensors, **options):
    out = function(*tensors, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, tensors, weight)


def check(tensors, relative=None, **options):
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    relative = RELATIVE[tensors[0].dtype] if relative is None else relative
    for got, true in zip(run(ours, tensors, **options), run(oracle, wide, **options)):
        assert got.shape == true.shape
        assert (got.double().cpu() - true).norm() <= relative * true.norm()


@pytest.mark.parametrize("mode", ("parallel", "chained"))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@on_backends
def test_all_axes_of_any_grid(backend, place, grid, mode):
    axes = tuple(range(1, len(grid)))
    check(inputs(grid, axes, device=place), axes=axes, mode=mode)


@pytest.mark.parametrize("mode", ("parallel", "chained"))
@on_backends
def test_some_axes_in_another_order(backend, place, mode):
    check(inputs((2, 3, 4, 5), (3, 1), device=place), axes=(3, 1), mode=mode)


@on_backends
def test_another_resolution(backend, place):
    check(inputs((2, 3, 5), (1, 2), outs=(4, 7), device=place), axes=(1, 2), mode="chained")


@pytest.mark.parametrize("n", (16, 65, 130))
@pytest.mark.parametrize("backend", ("cpu", "triton"), indirect=True)
def test_tile_edges(backend, place, n):
    check(inputs((1, n, 3), (1,), 1, 40, device=place), axes=(1,))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@on_backends
def test_half_precision(backend, place, dtype):
    if backend == "triton" and place == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 dot is wrong")
    check(inputs((2, 5, 7), (1, 2), dtype=dtype, device=place), axes=(1, 2))


@on_backends
def test_tiny_kernels_survive_float16_values(backend, place):
    """At the usual initialisation the kernels are about 1e-5, where float16 has 7 bits left or none."""
    v, kernel = (x.detach() for x in inputs((1, 8, 4), (1,), dtype=torch.float16, device=place))
    out = fa.factorized_attention(v * 256, (kernel * 1e-7,), (1,))
    exact = one_axis(v.double() * 256, kernel.double() * 1e-7, 1)
    assert (out.double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
@pytest.mark.parametrize("mode", ("parallel", "chained"))
def test_gradcheck(backend, mode):
    tensors = [x.detach().double().requires_grad_() for x in inputs((2, 3, 4), (1, 2), width=2)]
    assert torch.autograd.gradcheck(lambda *x: ours(*x, axes=(1, 2), mode=mode), tensors)


@on_backends
def test_strided_values_in_poisoned_memory(backend, place):
    tensors = [x.detach().requires_grad_() for x in inputs((2, 3, 4), (1, 2), device=place)]
    memory = torch.full((3, 4, 6, 3, 8), float("nan"), device=place)
    view = memory[:2, 1:, 1:5, 1:, 1:7]
    view.copy_(tensors[0].detach())
    got = run(ours, [view.requires_grad_(), *tensors[1:]], axes=(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(got, run(ours, tensors, axes=(1, 2))))


@on_backends
def test_two_runs_agree_bitwise(backend, place):
    tensors = inputs((2, 9, 5), (1, 2), device=place)
    first, second = (run(ours, tensors, axes=(1, 2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_bits_do_not_depend_on_threads(native):
    tensors = inputs((2, 33, 40), (1, 2), 2, 24)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(ours, tensors, axes=(1, 2)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("grid", ((0, 2, 3), (2, 0, 3)), ids=str)
@on_backends
def test_nothing(backend, place, grid):
    results = run(ours, inputs(grid, (1, 2), device=place), axes=(1, 2))
    assert results[0].shape == (*grid, 2, 12) and not any(x.any() for x in results[1:])


def test_axis_means():
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.double, requires_grad=True)
    means = fa.axis_means(x)
    for axis, mean in enumerate(means, 1):
        others = [d for d in (1, 2, 3) if d != axis]
        torch.testing.assert_close(mean, x.mean(others))
    assert fa.axis_means(x, (2,))[0].equal(means[1])
    assert torch.autograd.gradcheck(lambda x: tuple(fa.axis_means(x)), x)


def test_mean_commutes_with_linear_maps():
    x, first, second = (torch.randn(s, dtype=torch.double) for s in ((2, 3, 5, 6), (6, 6), (6, 4)))
    for axis, mean in enumerate(fa.axis_means(x), 1):
        torch.testing.assert_close(mean @ first @ second, (x @ first @ second).mean(3 - axis), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    (
        (lambda v, k: (v, (k,), (0,)), ValueError, "axes must be grid axes"),
        (lambda v, k: (v, (k,), (3,)), ValueError, "axes must be grid axes"),
        (lambda v, k: (v, (k, k), (1,)), ValueError, "one kernel an axis"),
        (lambda v, k: (v, (k[:, :, :4],), (1,)), ValueError, r"kernel 0 must have shape \(2, 3, 5, 5\)"),
        (lambda v, k: (v, (k,), (2,)), ValueError, "kernel 0 must have shape"),
        (lambda v, k: (v, (k.half(),), (1,)), TypeError, "kernels must be torch.float32 or bfloat16"),
        (lambda v, k: (v.transpose(-1, -2), (k,), (1,)), ValueError, "last dim of v must be contiguous"),
        (lambda v, k: (v[0, 0], (k,), (1,)), ValueError, "v must have shape"),
    ),
)
def test_errors(arguments, error, text):
    v, kernel = torch.randn(2, 5, 4, 3, 6), torch.randn(2, 3, 5, 5)
    with pytest.raises(error, match=text):
        fa.factorized_attention(*arguments(v, kernel))


@pytest.mark.parametrize("backend", ("cpu", "triton"), indirect=True)
def test_opcheck(backend, place):
    v, *kernels = (x.detach() for x in inputs((1, 3, 4), (1, 2), device=place))
    suffix = "_triton" if backend == "triton" else ""
    forward = getattr(torch.ops.flowattn, f"factorized_attention_fwd{suffix}").default
    backward = getattr(torch.ops.flowattn, f"factorized_attention_bwd{suffix}").default
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (v, kernels, [1, 2]), test_utils=utils)
    torch.library.opcheck(backward, (torch.randn(1, 3, 4, 2, 12, device=place), v, kernels, [1, 2]), test_utils=utils)


def test_compiles_whole(native):
    tensors = inputs((2, 3, 4), (1, 2))
    expected = run(ours, tensors, axes=(1, 2))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, tensors, axes=(1, 2)), expected):
        torch.testing.assert_close(got, want)
