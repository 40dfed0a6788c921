"""A float64 loop over tokens for selective_scan, and what its test files share."""

import pytest
import torch
import torch.nn.functional as F

import flowattn as fa

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("u", "delta", "A", "B", "C", "skip", "z", "delta_bias", "initial")
on_backends = pytest.mark.parametrize("backend", ("cuda", "cpu", "reference"), indirect=True)
on_native = pytest.mark.parametrize("backend", ("cuda", "cpu"), indirect=True)
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
         device=None):  # fmt: skip
    """Inputs by name; groups=None: B and C without a dim of groups. full: with skip, z, bias and initial state."""
    device = device or torch.get_default_device()
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
    """Bitwise on the CPU in C++; torch and a GPU may add in another order for another shape."""
    if backend == "cpu":
        return torch.equal(got, expected)
    tolerance = 1e-12 if got.dtype == torch.float64 else 1e-5 if got.dtype == torch.float32 else 8e-3
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance)


def results_and_gradients(function, x, dtype=None, **options):
    """(out, final, states, gradients of every input that is there), with fixed output gradients, rounded to dtype."""
    leaves = {name: None if value is None else value.detach().clone().requires_grad_() for name, value in x.items()}
    outputs = function(leaves, **options)
    generator = torch.Generator("cpu").manual_seed(1)
    go = [torch.randn(y.shape, generator=generator, device="cpu").to(dtype or x["u"].dtype).to(y) for y in outputs]
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
