"""selective_scan against a float64 loop over tokens: results, gradients, sizes, inputs at the edge."""

import pytest
import torch
from selective_oracle import (
    CASES,
    DTYPES,
    NAMES,
    assert_near,
    both_directions,
    both_layouts,
    check,
    make,
    on_backends,
    on_native,
    oracle,
    results_and_gradients,
    run,
)

import flowattn as fa


@pytest.mark.parametrize("case", CASES)
@both_directions
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_results_and_gradients(scan_backend, dtype, layout, reverse, case):
    inputs, options = CASES[case]
    check(make(dtype=dtype, layout=layout, **inputs), layout=layout, reverse=reverse, **options)


@pytest.mark.parametrize("length", (1, 2, 15, 63, 64, 65, 131))
@both_layouts
@on_native
def test_lengths(scan_backend, layout, length):
    check(make(1, length, 17, 2, dtype=torch.float32, layout=layout), layout=layout, reverse=length % 2 == 0)


@pytest.mark.parametrize("channels, states, groups", ((1, 1, None), (2, 256, 1), (7, 17, 7), (16, 16, 2), (65, 2, 1),
                                                      (132, 3, 2), (130, 64, None)))  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_native
def test_widths(scan_backend, dtype, channels, states, groups):
    for layout in ("BDL", "BLD"):
        x = make(2, 19, channels, states, groups=groups, dtype=dtype, layout=layout)
        check(x, layout=layout, delta_softplus=True)


@pytest.mark.parametrize("batch, length, channels", ((0, 5, 4), (2, 0, 4), (2, 5, 0)), ids=("batch", "length", "width"))
@both_layouts
@on_backends
def test_tensors_without_elements(scan_backend, layout, batch, length, channels):
    x = make(batch, length, channels, 3, dtype=torch.float32, layout=layout)
    out, final, states, *gradients = results_and_gradients(run, x, layout=layout)
    assert out.shape == x["u"].shape and states.shape == (batch, 0, channels, 3)
    assert [g.shape for g in gradients] == [value.shape for value in x.values()]
    assert all(g.eq(0).all() for g in gradients[:-1])
    if length == 0:
        assert torch.equal(final, x["initial"]) and gradients[-1].abs().min() > 0


@both_directions
@both_layouts
@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
def test_gradcheck(backend, layout, reverse):
    x = make(2, 4, 2, 2, groups=2, layout=layout)

    def call(*leaves):
        options = {"delta_softplus": True, "layout": layout, "reverse": reverse, "return_states_at": (2, 0)}
        return run(dict(zip(NAMES, leaves)), **options)

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in x.values()])


# --- inputs at the edge


@pytest.mark.parametrize("value", (-1e4, -100.0, -20.0, 19.9, 20.1, 1e4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@on_backends
def test_extreme_steps(scan_backend, dtype, value):
    """Steps of 0 keep the state and take nothing in; long steps forget it."""
    x = make(dtype=dtype)
    x["delta"].fill_(value)
    x["delta_bias"].zero_()
    x["A"] -= 0.1
    check(x, delta_softplus=True)
    out, final, _ = run(x, delta_softplus=True)
    if value == -1e4:
        assert torch.equal(final, x["initial"])
    if value == 1e4:
        newest = value * x["u"][:, -1, :, None] * x["B"][:, -1, None, :]
        torch.testing.assert_close(final, newest)


@pytest.mark.parametrize("name", ("u", "delta", "z", "B", "C"))
@both_layouts
@on_backends
def test_nan_stays_in_its_sequence_and_channel(scan_backend, layout, name):
    x = make(2, 80, 20, 3, dtype=torch.float32, layout=layout)
    clean, _, _ = run(x, layout=layout)
    position = (1, 3, 50) if layout == "BDL" else (1, 50, 3)
    if name in ("B", "C"):
        position = (1, 2, 50) if layout == "BDL" else (1, 50, 2)
    x[name][position] = float("nan")
    out, final, _ = run(x, layout=layout)
    if layout == "BDL":
        clean, out = clean.transpose(1, 2), out.transpose(1, 2)
    channels = slice(None) if name in ("B", "C") else slice(3, 4)
    times = slice(50, 51) if name in ("z", "C") else slice(50, None)
    assert out[1, times, channels].isnan().all()
    out[1, times, channels] = clean[1, times, channels]
    assert torch.equal(out, clean)
    assert final[0].isfinite().all() and final[1].isnan().any() == (name in ("u", "delta", "B"))


@on_backends
def test_any_strides(scan_backend):
    x = make(2, 70, 20, 3, dtype=torch.float32)
    expected = results_and_gradients(run, x)
    rows = torch.cat([x["B"], x["delta"], x["C"], x["u"], x["z"]], 2)
    views = dict(zip(("B", "delta", "C", "u", "z"), rows.split((3, 20, 3, 20, 20), 2)))
    others = {name: value.transpose(0, 1).contiguous().transpose(0, 1) for name, value in views.items()}
    every_second = {name: value.repeat_interleave(2, 2)[..., ::2] for name, value in views.items()}
    for changed in (views, others, every_second):
        for got, want in zip(
            results_and_gradients(lambda leaves, c=changed: run(same_strides(leaves, c)), x), expected
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    u = x["u"].clone().requires_grad_()
    out = fa.selective_scan(u, *(x[name] for name in NAMES[1:5]), layout="BLD")
    (from_sum,) = torch.autograd.grad(out.sum(), u, retain_graph=True)  # the gradient of sum has strides 0
    (from_ones,) = torch.autograd.grad(out, u, torch.ones_like(out))
    assert torch.equal(from_sum, from_ones)


def same_strides(leaves, views):
    """The leaves, with the strides of the views of the same names."""
    moved = dict(leaves)
    for name, view in views.items():
        base = torch.empty(view.untyped_storage().size() // 4)
        moved[name] = base.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(leaves[name])
    return moved


@pytest.mark.parametrize("wanted", (("z",), ("initial",), ("A", "C")), ids="-".join)
@on_backends
def test_gradients_of_some_inputs_only(scan_backend, wanted):
    x = make(dtype=torch.float32)
    everything = dict(zip(NAMES, results_and_gradients(run, x)[3:]))
    leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in x.items()}
    outputs = run(leaves)[:2]
    generator = torch.Generator("cpu").manual_seed(1)
    go = [torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in outputs]
    outputs, go = zip(*((y, g) for y, g in zip(outputs, go) if y.requires_grad))  # z reaches only out
    for name, got in zip(wanted, torch.autograd.grad(outputs, [leaves[name] for name in wanted], go)):
        assert torch.equal(got, everything[name])


def test_gradient_of_the_state_alone(native):
    """out takes no part in the loss."""
    x = {name: value.requires_grad_() for name, value in make().items()}
    for outputs in (lambda f: f(x)[1], lambda f: f(x, return_states_at=[5, 30])[2]):
        leaves = [x[name] for name in ("u", "delta", "A", "B", "initial")]
        got, true = (torch.autograd.grad(outputs(f).square().sum(), leaves) for f in (run, oracle))
        for mine, yours in zip(got, true):
            assert_near("gradient", mine, yours, 1e-12)
