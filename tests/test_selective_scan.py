"""selective_scan and bi_selective_scan against a float64 loop over tokens."""

import doctest

import pytest
import torch
import torch.nn.functional as F

import flowattn as fa
from flowattn.ops import selective_scan as module

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("u", "delta", "A", "B", "C", "skip", "z", "delta_bias", "initial")
on_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
on_triton = pytest.mark.parametrize("backend", ("triton",), indirect=True)
both_layouts = pytest.mark.parametrize("layout", ("BDL", "BLD"))
both_directions = pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))

# Largest error, by the largest true magnitude: of out and states, of the gradients.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (8e-3, 1.6e-2),
    torch.float16: (1e-3, 2e-3),
}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def turned(x, layout):
    """From (B, L, ...) to the layout."""
    return x if x is None or layout == "BLD" else x.movedim(1, -1)


def make(batch=2, length=37, channels=6, states=3, *, groups=None, dtype=torch.float64, layout="BLD", full=True,
         device="cpu"):  # fmt: skip
    """Inputs by name; groups=None: B and C without a dim of groups. full: with skip, z, bias and initial state."""
    rows = (batch, length, states) if groups is None else (batch, length, groups, states)
    x = {
        "u": torch.randn(batch, length, channels),
        "delta": torch.rand(batch, length, channels),  # positive, so that states stay small without softplus too
        "A": -2 * torch.rand(channels, states),
        "B": torch.randn(rows),
        "C": torch.randn(rows),
        "skip": torch.randn(channels),
        "z": torch.randn(batch, length, channels),
        "delta_bias": torch.rand(channels) / 2,
        "initial": torch.randn(batch, channels, states),
    }
    for name in x:
        if name in ("A", "skip", "delta_bias", "initial"):
            x[name] = x[name].to(device, wide(dtype))
        else:
            x[name] = turned(x[name].to(device, dtype), layout).contiguous()
        if not full and name in ("skip", "z", "delta_bias", "initial"):
            x[name] = None
    return x


def run(x, **options):
    """(out, final, states at the wanted tokens) of the public function; no tokens wanted: states (B, 0, D, N)."""
    inputs = dict(x)
    initial = inputs.pop("initial")
    options = {"layout": "BLD", "return_states_at": [], **options}
    return fa.selective_scan(**inputs, initial_state=initial, output_final_state=True, **options)


def oracle(x, *, delta_softplus=False, layout="BLD", reverse=False, return_states_at=()):
    """The same in float64, row by row and token by token."""
    x = {name: None if value is None else value.double() for name, value in x.items()}
    moved = ("u", "delta", "z", "B", "C") if layout == "BDL" else ()
    tokens_first = {name: v.movedim(-1, 1) if name in moved and v is not None else v for name, v in x.items()}
    u, delta, z, B, C = (tokens_first[name] for name in ("u", "delta", "z", "B", "C"))
    channels, length = u.shape[2], u.shape[1]
    outs, finals, kept = [], [], []
    for b in range(u.shape[0]):
        state = u.new_zeros(channels, x["A"].shape[1]) if x["initial"] is None else x["initial"][b]
        out, states = [None] * length, {}
        for t in reversed(range(length)) if reverse else range(length):
            d = delta[b, t] if x["delta_bias"] is None else delta[b, t] + x["delta_bias"]
            d = F.softplus(d) if delta_softplus else d
            rows = [row[b, t].expand(channels, -1) if row.dim() == 3 else
                    row[b, t].repeat_interleave(channels // row.shape[2], 0) for row in (B, C)]  # fmt: skip
            state = torch.exp(d[:, None] * x["A"]) * state + (d * u[b, t])[:, None] * rows[0]
            y = (state * rows[1]).sum(1)
            y = y if x["skip"] is None else y + x["skip"] * u[b, t]
            out[t] = y if z is None else y * F.silu(z[b, t])
            states[t] = state
        outs.append(torch.stack(out))
        finals.append(state)
        kept.append(torch.stack([states[t] for t in return_states_at]) if return_states_at else state[None][:0])
    out = torch.stack(outs)
    return out.transpose(1, 2) if layout == "BDL" else out, torch.stack(finals), torch.stack(kept)


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, name
    if true.numel():
        scale, error = true.abs().max().item(), (got.double().cpu() - true.double().cpu()).abs().max().item()
        assert error <= tolerance * max(scale, 1e-30), f"{name}: off by {error:.3g}, scale {scale:.3g}"


def agree(backend, got, expected):
    """Bitwise in C++; torch may add in another order for another shape."""
    if backend == "cpu":
        return torch.equal(got, expected)
    tolerance = 1e-12 if got.dtype == torch.float64 else 1e-5 if got.dtype == torch.float32 else 8e-3
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance)


def results_and_gradients(function, x, dtype=None, **options):
    """(out, final, states, gradients of every input that is there), with fixed output gradients, rounded to dtype."""
    leaves = {name: None if value is None else value.detach().clone().requires_grad_() for name, value in x.items()}
    outputs = function(leaves, **options)
    generator = torch.Generator().manual_seed(1)
    go = [torch.randn(y.shape, generator=generator).to(dtype or x["u"].dtype).to(y) for y in outputs]
    there = [leaf for leaf in leaves.values() if leaf is not None]
    learned = [(y, g) for y, g in zip(outputs, go) if y.requires_grad]  # the reference of no states has no gradient
    return (
        *outputs,
        *torch.autograd.grad(
            [y for y, _ in learned], there, [g for _, g in learned], allow_unused=True, materialize_grads=True
        ),
    )


def check(x, **options):
    """Results and every gradient of the public function against the oracle's."""
    got = results_and_gradients(run, x, **options)
    truth = {name: None if value is None else value.double() for name, value in x.items()}
    dtype = x["u"].dtype
    true = results_and_gradients(oracle, truth, dtype, **options)
    there = [name for name in NAMES if x[name] is not None]
    for name, mine, yours in zip(("out", "final", "states", *there), got, true):
        forward = name in ("out", "final", "states") and mine is not None
        assert_near(f"{name}", mine, yours, TOLERANCE[dtype][0 if forward else 1])
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == wide(dtype)
    assert [g.dtype for g in got[3:]] == [x[name].dtype for name in there]


CASES = {
    "bare": ({"full": False}, {}),
    "full": ({}, {"delta_softplus": True, "return_states_at": (20, 3, 36)}),
    "groups": ({"groups": 2}, {"delta_softplus": True}),
}


@pytest.mark.parametrize("case", CASES)
@both_directions
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_results_and_gradients(backend, dtype, layout, reverse, case):
    inputs, options = CASES[case]
    check(make(dtype=dtype, layout=layout, **inputs), layout=layout, reverse=reverse, **options)


@pytest.mark.parametrize("length", (1, 2, 15, 63, 64, 65, 131))
@both_layouts
def test_lengths(native, layout, length):
    check(make(1, length, 17, 2, dtype=torch.float32, layout=layout), layout=layout, reverse=length % 2 == 0)


@pytest.mark.parametrize("channels, states, groups", ((1, 1, None), (2, 256, 1), (7, 17, 7), (16, 16, 2), (65, 2, 1),
                                                      (132, 3, 2), (130, 64, None)))  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_widths(native, dtype, channels, states, groups):
    for layout in ("BDL", "BLD"):
        x = make(2, 19, channels, states, groups=groups, dtype=dtype, layout=layout)
        check(x, layout=layout, delta_softplus=True)


@pytest.mark.parametrize("batch, length, channels", ((0, 5, 4), (2, 0, 4), (2, 5, 0)), ids=("batch", "length", "width"))
@both_layouts
@on_backends
def test_empty_tensors(backend, layout, batch, length, channels):
    x = make(batch, length, channels, 3, dtype=torch.float32, layout=layout)
    out, final, states, *gradients = results_and_gradients(run, x, layout=layout)
    assert out.shape == x["u"].shape and states.shape == (batch, 0, channels, 3)
    assert [g.shape for g in gradients] == [value.shape for value in x.values()]
    assert all(g.eq(0).all() for g in gradients[:-1])
    if length == 0:
        assert torch.equal(final, x["initial"]) and gradients[-1].abs().min() > 0


@both_directions
@both_layouts
@on_backends
def test_gradcheck(backend, layout, reverse):
    x = make(2, 4, 2, 2, groups=2, layout=layout)

    def call(*leaves):
        options = {"delta_softplus": True, "layout": layout, "reverse": reverse, "return_states_at": (2, 0)}
        return run(dict(zip(NAMES, leaves)), **options)

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in x.values()])


# --- sequences, states, threads


def packed_parts(x, ends):
    """The inputs of each sequence of packed (1, T, ...) inputs."""
    for s, (begin, end) in enumerate(zip(ends, ends[1:])):
        yield {
            name: value[s : s + 1] if name == "initial" else value[:, begin:end] if value.dim() > 2 else value
            for name, value in x.items()
        }


@both_directions
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_backends
def test_packed_equals_each_sequence(backend, dtype, reverse):
    ends = [0, 0, 5, 6, 6, 140, 173, 173]
    x = make(1, 180, 20, 3, dtype=dtype)
    x["initial"] = torch.randn(7, 20, 3)
    options = {"reverse": reverse, "delta_softplus": True}
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    out, final, _ = run(leaves, cu_seqlens=torch.tensor(ends), **options)
    go, gf = torch.randn(out.shape).to(dtype), torch.randn(final.shape)
    gradients = dict(zip(NAMES, torch.autograd.grad([out, final], list(leaves.values()), [go, gf])))
    assert out[:, 173:].eq(0).all() and all(gradients[name][:, 173:].eq(0).all() for name in ("u", "delta", "z", "B"))
    for s, part in enumerate(packed_parts(x, ends)):
        rows = slice(ends[s], ends[s + 1])
        part = {name: value.detach().requires_grad_() for name, value in part.items()}
        one_out, one_final, _ = run(part, **options)
        assert agree(backend, out[:, rows], one_out) and agree(backend, final[s : s + 1], one_final)
        grads = torch.autograd.grad([one_out, one_final], list(part.values()), [go[:, rows], gf[s : s + 1]],
                                    allow_unused=True)  # fmt: skip
        for name, grad in zip(NAMES, grads):
            if name in ("u", "delta", "B", "C", "z") and grad is not None:
                assert agree(backend, gradients[name][:, rows], grad), name
            if name == "initial":
                assert agree(backend, gradients[name][s : s + 1], grad), name


@both_layouts
@on_backends
def test_packed_without_batch_dim(backend, layout):
    x = make(1, 9, 4, 2, dtype=torch.float32, layout=layout)
    x["initial"] = torch.randn(2, 4, 2)
    options = {"cu_seqlens": torch.tensor([0, 4, 7]), "layout": layout, "return_states_at": [5, 8, 3]}
    out, final, states = run(x, **options)
    flat = {name: value[0] if value.dim() > 2 and name != "initial" else value for name, value in x.items()}
    flat_out, flat_final, flat_states = run(flat, **options)
    assert torch.equal(flat_out, out[0]) and torch.equal(flat_final, final) and torch.equal(flat_states, states[0])
    assert torch.equal(flat_states[2], final[0]) and flat_states[1].eq(0).all()  # token 8 belongs to no sequence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_directions
@on_backends
def test_split_and_resume(backend, dtype, reverse):
    x = make(2, 150, 5, 3, dtype=dtype)
    cuts = [0, *sorted(torch.randperm(149)[:4].add(1).tolist()), 150]
    spans = list(zip(cuts, cuts[1:]))
    spans = spans[::-1] if reverse else spans
    after = [begin if reverse else end - 1 for begin, end in spans]  # the token of each span that is walked last
    whole, last, states = run(x, reverse=reverse, return_states_at=after)
    outs, state = {}, x["initial"]
    for k, (begin, end) in enumerate(spans):
        part = {name: value[:, begin:end] if name in ("u", "delta", "z", "B", "C") else value
                for name, value in x.items()}  # fmt: skip
        outs[begin], state, _ = run({**part, "initial": state}, reverse=reverse)
        assert agree(backend, states[:, k], state)
    assert agree(backend, torch.cat([outs[begin] for begin in sorted(outs)], 1), whole)
    assert agree(backend, state, last)


@both_layouts
@on_backends
def test_reverse_is_flip_run_flip(backend, layout):
    x = make(2, 77, 18, 3, dtype=torch.float32, layout=layout)
    time = 2 if layout == "BDL" else 1
    flip = {"u": time, "delta": time, "z": time, "B": x["B"].dim() - 1 if time == 2 else 1}
    flip["C"] = flip["B"]
    flipped = {name: value.flip(flip[name]) if name in flip else value for name, value in x.items()}
    for mine, other in zip(run(x, layout=layout, reverse=True)[:2], run(flipped, layout=layout)[:2]):
        assert agree(backend, mine, other.flip(time) if mine.shape == x["u"].shape else other)


@both_layouts
def test_bitwise_independent_of_threads(native, layout):
    x = make(3, 300, 150, 5, dtype=torch.float32, layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(results_and_gradients(run, x, layout=layout, delta_softplus=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_states_of_all_tokens_are_never_in_memory(native):
    """The forward keeps none, or those before every 64 tokens."""
    x = make(2, 200, 8, 16, dtype=torch.float32)
    call = module._prepare(**{name: value for name, value in x.items() if name != "initial"}, layout="BLD")
    fwd = torch.ops.flowattn.selective_scan_fwd
    assert fwd(*call, 0)[3].numel() == 0
    carries = fwd(*call, module.CHUNK)[3]
    assert carries.shape == (2 * 200 // 64 + 2, 16, 8)
    state = fa.selective_scan(*(x[name] for name in NAMES[:-1]), layout="BLD", return_states_at=[127])[1]
    assert torch.equal(carries[2], state[0, 0].T)  # what enters the third tile of the first row


# --- inputs at the edge


@pytest.mark.parametrize("value", (-1e4, -100.0, -20.0, 19.9, 20.1, 1e4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@on_backends
def test_extreme_steps(backend, dtype, value):
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
def test_nan_stays_in_its_sequence_and_channel(backend, layout, name):
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
def test_any_strides(backend):
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
def test_gradients_of_some_inputs_only(backend, wanted):
    x = make(dtype=torch.float32)
    everything = dict(zip(NAMES, results_and_gradients(run, x)[3:]))
    leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in x.items()}
    outputs = run(leaves)[:2]
    generator = torch.Generator().manual_seed(1)
    go = [torch.randn(y.shape, generator=generator) for y in outputs]
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


# --- both directions at once


@both_layouts
def test_both_directions_equal_two_scans(native, layout):
    time = 2 if layout == "BDL" else 1
    first, second = (make(2, 40, width, 3, dtype=torch.float32, layout=layout) for width in (6, 17))
    inputs = [fa.SelectiveInputs(*(x[name] for name in NAMES[:-1])) for x in (first, second)]
    states = (first["initial"], second["initial"])
    options = {"delta_softplus": True, "layout": layout}
    outs, finals = fa.bi_selective_scan(*inputs, initial_states=states, output_final_state=True, **options)
    out, final, _ = run(first, **options)
    assert torch.equal(outs[0], out) and torch.equal(finals[0], final)
    flipped = {name: value.flip(-1 if time == 2 else 1) if name in ("u", "delta", "z", "B", "C") else value
               for name, value in second.items()}  # fmt: skip
    out, final, _ = run(flipped, **options)
    assert torch.equal(outs[1], out.flip(time)) and torch.equal(finals[1], final)


# --- Triton


@pytest.mark.parametrize("case", ("bare", "full", "groups"))
@pytest.mark.parametrize(
    "dtype, layout, reverse", ((torch.float32, "BLD", False), (torch.float16, "BDL", True)), ids=str
)
@on_triton
def test_triton(backend, device, dtype, layout, reverse, case):
    inputs, options = CASES[case]
    x = make(2, 37, 4, 2, dtype=dtype, layout=layout, device=device, **inputs)
    check(x, layout=layout, reverse=reverse, **options)


@pytest.mark.parametrize("spans", (1, 2, 3))
@on_triton
def test_triton_carries_states_over_tiles_and_spans(backend, device, monkeypatch, spans):
    from flowattn.triton_kernels import selective_scan_configs

    monkeypatch.setattr(selective_scan_configs, "spans", lambda programs, tokens: spans)
    x = make(1, 150, 3, 2, dtype=torch.float32, device=device)
    check(x, delta_softplus=True, reverse=spans == 2, return_states_at=(70, 149, 3))


@both_directions
@on_triton
def test_triton_packed(backend, device, monkeypatch, reverse):
    from flowattn.triton_kernels import selective_scan_configs

    monkeypatch.setattr(selective_scan_configs, "spans", lambda programs, tokens: 1 + reverse)
    ends = [0, 0, 5, 71, 71]
    x = make(1, 75, 3, 2, dtype=torch.float32, device=device)
    x["initial"] = torch.randn(4, 3, 2, device=device)
    options = {"reverse": reverse, "cu_seqlens": torch.tensor(ends, device=device)}
    got = results_and_gradients(run, x, **options)
    with fa.use_backend("reference"):
        expected = results_and_gradients(run, x, **options)
    for name, mine, yours in zip(("out", "final", "states", *NAMES), got, expected):
        assert_near(name, mine, yours, 1e-5)


@on_triton
def test_triton_edges(backend, device):
    check(make(2, 1, 1, 1, dtype=torch.float32, device=device))
    for sizes in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        x = make(*sizes, 3, dtype=torch.float32, device=device)
        out, final, _, *gradients = results_and_gradients(run, x)
        assert all(g.eq(0).all() for g in gradients[:-1])
        assert sizes[1] or torch.equal(final, x["initial"])
    x = make(1, 9, 3, 2, dtype=torch.float32, device=device)
    x["delta"][:] = torch.tensor([-1e4, 20.1, 1e4], device=device)
    check(x, delta_softplus=True)


# --- registration, compilation, choice of a backend


def private_call(**options):
    x = make(2, 9, 4, 3, groups=2, dtype=torch.float32, layout=options["layout"])
    initial = x.pop("initial")
    return module._prepare(**x, initial_state=initial, return_states_at=[4, 0], delta_softplus=True, **options)


@both_layouts
def test_opcheck(native, layout):
    torch.use_deterministic_algorithms(False)  # opcheck compares with runs on other memory
    fwd, bwd = (getattr(torch.ops.flowattn, f"selective_scan_{pass_}").default for pass_ in ("fwd", "bwd"))
    for call in (private_call(layout=layout), private_call(layout=layout, reverse=True)):
        torch.library.opcheck(fwd, (*call, 4))
        out, final, states, carries = fwd(*call, 4)
        grads = [torch.randn_like(y) for y in (out, final, states)]
        torch.library.opcheck(bwd, (*grads, *call[:8], True, *call[9:11], carries, *call[12:], 4))
        bare = (*call[:5], None, None, None, None, None, None, 0, *call[12:])
        torch.library.opcheck(fwd, (*bare, 0))
        carries = fwd(*bare, 4)[3]
        torch.library.opcheck(bwd, (grads[0], None, None, *bare[:8], False, None, None, carries, *bare[12:], 4))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_without_graph_breaks(native, dynamic):
    x = make(dtype=torch.float32)

    def call(leaves):
        out, final, states = run(leaves, delta_softplus=True, return_states_at=[3])
        return out.square().sum() + final.sum() + states.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    expected, got = (torch.autograd.grad(f(leaves), list(leaves.values())) for f in (call, compiled))
    for mine, yours in zip(got, expected):
        torch.testing.assert_close(mine, yours)


def test_autocast_inference_mode_and_explain(native, capsys):
    x = make(dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out, final, _ = run(x)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    half = {name: value if name in ("A", "skip", "delta_bias", "initial") else value.bfloat16()
            for name, value in x.items()}  # fmt: skip
    assert torch.equal(out, run(half)[0])
    assert fa.explain("selective_scan", *(x[name] for name in NAMES[:5]), layout="BLD") == "cpu"
    assert "triton" in capsys.readouterr().out


X = make(2, 5, 4, 3, dtype=torch.float32)
FIVE = tuple(X[name] for name in NAMES[:5])


def scan(*inputs, **options):
    return fa.selective_scan(*inputs, layout=options.pop("layout", "BLD"), **options)


@pytest.mark.parametrize(
    "error, text, call",
    (
        (ValueError, 'layout must be "BDL" or "BLD"', lambda: scan(*FIVE, layout="LBD")),
        (TypeError, "u must be float16", lambda: scan(*(x.long() for x in FIVE))),
        (TypeError, "delta must have the dtype of u", lambda: scan(FIVE[0], FIVE[1].half(), *FIVE[2:])),
        (ValueError, r"u must have shape \(B, L, D\)", lambda: scan(FIVE[0][0], *FIVE[1:])),
        (ValueError, "delta must have the shape of u", lambda: scan(FIVE[0], FIVE[1][:, 1:], *FIVE[2:])),
        (TypeError, "A must be torch.float32", lambda: scan(*FIVE[:2], FIVE[2].double(), *FIVE[3:])),
        (ValueError, r"A must have shape \(4, N\)", lambda: scan(*FIVE[:2], FIVE[2][1:], *FIVE[3:])),
        (ValueError, "A must have 1 to 256 columns", lambda: scan(*FIVE[:2], torch.ones(4, 300), *FIVE[3:])),
        (ValueError, r"B must have shape \(2, 5, G, 3\)", lambda: scan(*FIVE[:3], FIVE[3][..., 1:], FIVE[4])),
        (ValueError, "C must have the shape of B", lambda: scan(*FIVE[:4], FIVE[4][:, :, None].expand(2, 5, 2, 3))),
        (
            ValueError,
            "the groups of B must divide the 4 channels",
            lambda: scan(*FIVE[:3], *(x[:, :, None].expand(2, 5, 3, 3) for x in FIVE[3:])),
        ),
        (ValueError, r"skip must have shape \(4,\)", lambda: scan(*FIVE, torch.ones(3))),
        (ValueError, "initial_state must have shape", lambda: scan(*FIVE, initial_state=torch.zeros(1, 4, 3))),
        (ValueError, "return_states_at must hold different tokens of 0..4", lambda: scan(*FIVE, return_states_at=[5])),
        (ValueError, "return_states_at must hold different", lambda: scan(*FIVE, return_states_at=[1, 1])),
        (ValueError, "leading dim of 1 or none", lambda: scan(*FIVE, cu_seqlens=torch.tensor([0, 5]))),
        (
            ValueError,
            "cu_seqlens must start at 0",
            lambda: scan(*(x if x is FIVE[2] else x[0] for x in FIVE), cu_seqlens=torch.tensor([0, 9])),
        ),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_bad_offsets_and_slots_never_reach_memory(native):
    """The private op repeats what protects memory."""
    call = list(private_call(layout="BLD"))
    call[:2], call[3:5], call[6] = [x[:1] for x in call[:2]], [x[:1] for x in call[3:5]], call[6][:1]
    for ends in ([0, 10], [1, 5], [0, 4, 2], [-1, 5]):
        call[8:10] = None, torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="selective_scan: cu_seqlens must start at 0"):
            torch.ops.flowattn.selective_scan_fwd(*call, 0)
    call[9], call[11] = None, 1
    with pytest.raises(RuntimeError, match="selective_scan: slots must lie below 1"):
        torch.ops.flowattn.selective_scan_fwd(*call, 0)


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
