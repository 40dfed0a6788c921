"""selective_scan in Triton, under torch.compile and opcheck; choice of a backend, errors."""

import doctest

import pytest
import torch
from selective_oracle import (
    CASES,
    NAMES,
    assert_near,
    both_directions,
    both_layouts,
    check,
    make,
    on_triton,
    results_and_gradients,
    run,
)

import flowattn as fa
from flowattn.ops import selective_scan as module

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
