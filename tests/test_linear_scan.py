"""linear_scan against a float64 loop over single numbers' recurrences."""

import doctest

import pytest
import torch

import flowattn as fa
from flowattn.ops import linear_scan as module

BACKENDS = ("cpu", "cuda", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATE_SHAPES = {"full": (2, 37, 3, 24), "head": (2, 37, 3), "constant": (3, 24), "constant_head": (3,)}
on_cpu_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)

# Largest error, by the largest true magnitude: of h, of the gradients. In half precision da inherits the rounded h.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (8e-3, 1.6e-2),
    torch.float16: (1e-3, 2e-3),
}


def on_backends(test):
    return pytest.mark.parametrize("backend", BACKENDS, indirect=True)(pytest.mark.usefixtures("scan_backend")(test))


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def oracle(gates, tokens, initial=None, *, gate="linear", reverse=False, reset=None):
    """(h, last h) in float64, row by row and token by token."""
    a, b = gates.double(), tokens.double()
    a = a.exp() if gate == "log" else a
    if a.shape != b.shape:
        a = a[..., None] if a.shape == b.shape[:-1] or a.dim() == 1 else a
    a = a.expand(b.shape)
    rows, finals = [], []
    for i in range(b.shape[0]):
        h = None if initial is None else initial[i].double()
        outs = {}
        for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
            if reset is not None and reset[i, t]:
                h = None
            h = b[i, t] if h is None else a[i, t] * h + b[i, t]
            outs[t] = h
        rows.append(torch.stack([outs[t] for t in range(b.shape[1])]))
        finals.append(h)
    return torch.stack(rows), torch.stack(finals)


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, name
    scale = true.abs().max().item() if true.numel() else 1.0
    error = (got.double() - true.double()).abs().max().item() if true.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), f"{name}: off by {error:.3g}, scale {scale:.3g}"


def gradients(outputs, leaves, grad_outputs=None):
    """torch.autograd.grad with zeros for leaves that no result depends on."""
    return torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True, materialize_grads=True)


def check_against_oracle(gates, tokens, initial=None, **options):
    """Results and every gradient of the public function against the oracle's."""
    results = []
    for truth in (False, True):
        leaves = [
            (x.double() if truth else x).detach().clone().requires_grad_()
            for x in (gates, tokens, initial)
            if x is not None
        ]
        if truth:
            out, final = oracle(*leaves, **options)
        else:
            out, final = fa.linear_scan(*leaves, output_final_state=True, **options)
        generator = torch.Generator(tokens.device).manual_seed(1)
        go = torch.randn(out.shape, generator=generator, device=tokens.device).to(tokens.dtype).to(out.dtype)
        gf = torch.randn(final.shape, generator=generator, device=tokens.device).to(final.dtype)
        results.append((out, final, *gradients([out, final], leaves, [go, gf])))
    got, true = results
    assert got[0].dtype == tokens.dtype and got[1].dtype == wide(tokens.dtype)
    forward, backward = TOLERANCE[tokens.dtype]
    for name, x, y in zip(("h", "final", "da", "db", "dh0"), got, true):
        assert_near(name, x, y, forward if name in ("h", "final") else backward)
    assert [x.dtype for x in got[2:]] == [x.dtype for x in (gates, tokens, initial) if x is not None]


def inputs(name, gate, dtype=torch.float64):
    gates = torch.rand(GATE_SHAPES[name]) * 1.9 - 0.9 if gate == "linear" else -torch.rand(GATE_SHAPES[name])
    if name.startswith("constant"):
        gates = gates.clamp(max=0.99)
    return gates.to(dtype), torch.randn(2, 37, 3, 24).to(dtype)


@pytest.mark.parametrize("case", ("fresh", "state", "state_reset"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("gate", ("linear", "log"))
@pytest.mark.parametrize("name", GATE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_results_and_gradients(backend, dtype, name, gate, reverse, case):
    gates, tokens = inputs(name, gate, dtype)
    initial = None if case == "fresh" else torch.randn(2, 3, 24, dtype=wide(dtype))
    reset = torch.rand(2, 37) > 0.8 if case == "state_reset" else None
    check_against_oracle(gates, tokens, initial, gate=gate, reverse=reverse, reset=reset)


@pytest.mark.parametrize("name", GATE_SHAPES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@on_backends
def test_float32_gates_of_half_tokens(backend, dtype, name):
    gates, tokens = inputs(name, "log", torch.float32)
    check_against_oracle(gates, tokens.to(dtype), torch.randn(2, 3, 24), gate="log")


@pytest.mark.parametrize("shape", ((2, 9, 5), (2, 9), (5,)), ids=("full", "token", "constant"))
@on_backends
def test_tokens_without_heads(backend, shape):
    gates, tokens, initial = torch.rand(shape), torch.randn(2, 9, 5), torch.randn(2, 5)
    with_heads = {3: gates[:, :, None] if len(shape) == 3 else gates, 2: gates[..., None], 1: gates[None]}[len(shape)]
    out, final = fa.linear_scan(gates, tokens, initial, output_final_state=True)
    expected, last = fa.linear_scan(with_heads, tokens[:, :, None], initial[:, None], output_final_state=True)
    assert torch.equal(out, expected[:, :, 0]) and torch.equal(final, last[:, 0])


@pytest.mark.parametrize("length", (1, 2, 31, 32, 33, 127, 4097))
@pytest.mark.parametrize("name", ("full", "head"))
def test_lengths(native, name, length):
    tokens = torch.randn(1, length, 1, 3)
    gates = torch.rand(1, length, 1, 3) if name == "full" else torch.rand(1, length, 1)
    check_against_oracle(gates, tokens, torch.randn(1, 1, 3))


@pytest.mark.parametrize(
    "heads, width", ((1, 1), (7, 1), (1, 2), (5, 3), (2, 24), (1, 64), (2, 80), (1, 192), (1, 512))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_widths(native, dtype, heads, width):
    shape = (2, 6, heads, width)
    for gates in (torch.rand(shape), torch.rand(shape[:3]), torch.rand(shape[2:])):
        check_against_oracle(gates.to(dtype), torch.randn(shape).to(dtype), torch.randn(2, heads, width))


@pytest.mark.parametrize("shape", ((0, 5, 2, 4), (2, 5, 0, 4), (2, 0, 3, 4), (2, 5, 2, 0)), ids=str)
@pytest.mark.parametrize("constant", (False, True), ids=("full", "constant"))
@on_backends
def test_empty_tensors(backend, shape, constant):
    gates = torch.rand(shape[2:] if constant else shape, requires_grad=True)
    tokens = torch.randn(shape, requires_grad=True)
    initial = torch.randn(shape[0], *shape[2:], requires_grad=True)
    out, final = fa.linear_scan(gates, tokens, initial, output_final_state=True)
    assert out.shape == shape
    dgates, dtokens, dinitial = gradients(out.sum() + 2 * final.sum(), (gates, tokens, initial))
    assert dgates.eq(0).all() and dtokens.shape == shape
    if shape[1] == 0:
        assert torch.equal(final, initial) and dinitial.eq(2).all()


@pytest.mark.parametrize("gate", ("linear", "log"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("name", GATE_SHAPES)
@on_cpu_backends
def test_gradcheck(backend, name, reverse, gate):
    gates, tokens = inputs(name, gate)
    gates = gates[:, :4, :2, ...] if not name.startswith("constant") else gates[:2]
    gates = gates[..., :2] if name in ("full", "constant") else gates
    leaves = [gates, tokens[:, :4, :2, :2], torch.randn(2, 2, 2, dtype=torch.float64)]
    reset = torch.tensor([[False, False, True, False], [False] * 4])

    def call(a, b, h0):
        return fa.linear_scan(a, b, h0, gate=gate, reverse=reverse, reset=reset, output_final_state=True)

    assert torch.autograd.gradcheck(call, [x.contiguous().requires_grad_() for x in leaves])


# --- packed sequences, states, threads


@pytest.mark.parametrize("name", ("full", "head"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_backends
def test_packed_equals_each_sequence(backend, assert_same, dtype, reverse, name):
    ends = torch.tensor([0, 0, 5, 6, 6, 40, 73, 73])
    tokens = torch.randn(80, 3, 24).to(dtype)
    gates = torch.rand(80, 3, 24).to(dtype) if name == "full" else torch.rand(80, 3).to(dtype)
    leaves = [x.requires_grad_() for x in (gates, tokens, torch.randn(7, 3, 24))]
    options = {"reverse": reverse, "output_final_state": True}
    out, final = fa.linear_scan(*leaves, cu_seqlens=ends, **options)
    go, gf = torch.randn(out.shape).to(dtype), torch.randn_like(final)
    da, db, dh = torch.autograd.grad([out, final], leaves, [go, gf])
    assert out[73:].eq(0).all() and da[73:].eq(0).all() and db[73:].eq(0).all()
    for i, (begin, end) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        rows, one = slice(begin, end), slice(i, i + 1)
        parts = [x.detach().requires_grad_() for x in (gates[None, rows], tokens[None, rows], leaves[2][one])]
        part_out, part_final = fa.linear_scan(*parts, **options)
        grads = gradients([part_out, part_final], parts, [go[None, rows], gf[one]])
        got = (out[None, rows], final[one], da[None, rows], db[None, rows], dh[one])
        for result, expected in zip(got, (part_out, part_final, *grads)):
            assert_same(result, expected)


def test_constant_gates_of_packed_sequences_sum_over_all(native):
    ends = torch.tensor([0, 3, 3, 9])
    tokens, gates = torch.randn(1, 9, 2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    a = gates.clone().requires_grad_()
    (packed,) = torch.autograd.grad(fa.linear_scan(a, tokens, cu_seqlens=ends).square().sum(), a)
    total = sum(fa.linear_scan(a, tokens[:, begin:end]).square().sum() for begin, end in ((0, 3), (3, 9)))
    torch.testing.assert_close(packed, torch.autograd.grad(total, a)[0], rtol=1e-13, atol=1e-13)


@on_backends
def test_reset_forgets_the_state_and_the_past(backend):
    gates, tokens = torch.rand(1, 9, 2, 4), torch.randn(1, 9, 2, 4)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 5]] = True
    out = fa.linear_scan(gates, tokens, torch.randn(1, 2, 4), reset=reset)
    pieces = [fa.linear_scan(gates[:, p], tokens[:, p]) for p in (slice(0, 5), slice(5, 9))]
    assert torch.equal(out, torch.cat(pieces, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@on_backends
def test_split_and_resume(backend, assert_same, dtype, reverse):
    gates, tokens = torch.rand(2, 60, 3, 8).to(dtype), torch.randn(2, 60, 3, 8).to(dtype)
    whole, last = fa.linear_scan(gates, tokens, output_final_state=True, reverse=reverse)
    cuts = [0, *sorted(torch.randint(0, 61, (5,)).tolist()), 60]
    spans = list(zip(cuts, cuts[1:]))
    outs, state = {}, None
    for begin, end in reversed(spans) if reverse else spans:
        part = slice(begin, end)
        outs[begin, end], state = fa.linear_scan(
            gates[:, part], tokens[:, part], state, output_final_state=True, reverse=reverse
        )
    assert_same(torch.cat([outs[span] for span in spans], 1), whole)  # the state is not rounded
    assert_same(state, last)


@on_backends
def test_reverse_is_flip_run_flip(backend):
    gates, tokens, initial = torch.rand(2, 21, 3, 4), torch.randn(2, 21, 3, 4), torch.randn(2, 3, 4)
    reset = torch.rand(2, 21) > 0.8
    flipped = fa.linear_scan(gates.flip(1), tokens.flip(1), initial, reset=reset.flip(1)).flip(1)
    assert torch.equal(fa.linear_scan(gates, tokens, initial, reset=reset, reverse=True), flipped)


def run_with_threads(threads, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ("full", "head", "constant", "constant_head"))
@pytest.mark.parametrize("length, heads", ((9001, 1), (70, 5)), ids=("long", "short"))
def test_bitwise_independent_of_threads(native, length, heads, name):
    """One row of 9001 tokens is cut into chunks where there are three threads or more."""
    shape = (1, length, heads, 3)
    gates = torch.rand({"full": shape, "head": shape[:3], "constant": shape[2:], "constant_head": shape[2:3]}[name])
    tokens, initial, go, gf = torch.randn(shape), torch.randn(1, heads, 3), torch.randn(shape), torch.randn(1, heads, 3)

    def call():
        leaves = [x.clone().requires_grad_() for x in (gates, tokens, initial)]
        out, final = fa.linear_scan(*leaves, output_final_state=True)
        return out, final, *torch.autograd.grad([out, final], leaves, [go, gf])

    one, two, eight = (run_with_threads(n, call) for n in (1, 2, 8))
    for x, y, z in zip(one, two, eight):
        assert torch.equal(x, y) and torch.equal(x, z)
    truth, last = oracle(gates, tokens, initial)
    assert_near("h", one[0], truth, 1e-5)
    assert_near("final", one[1], last, 1e-5)


# --- gates at the edge


@pytest.mark.parametrize("value", (0.0, 1.0, -1.0, 1e-30, -0.5))
@on_backends
def test_special_gates(backend, value):
    check_against_oracle(torch.full((2, 37, 3, 4), value), torch.randn(2, 37, 3, 4), torch.randn(2, 3, 4))


@on_backends
def test_gates_above_one_grow_like_the_loop(backend):
    check_against_oracle(torch.full((1, 60, 1, 2), 2.0), torch.randn(1, 60, 1, 2), torch.randn(1, 1, 2))


@pytest.mark.parametrize("threads", (1, 8))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
def test_overflowing_products_of_gates(native, threads, reverse):
    """2 ** 4000 overflows, but nothing reaches the state: first no token, then a state of 1e-30 that grows to 1e8."""
    length = 13000
    gates = torch.full((1, length, 1, 2), 2.0)
    gates[:, 4200:8300] = 1.0
    gates[:, 8300:] = 0.5
    gates[:, 4100:4200, :, 1] = 1.0
    tokens = torch.zeros(1, length, 1, 2)
    tokens[:, 4096] = 1e-30
    tokens[:, 8300:] = 1.0
    if reverse:
        gates, tokens = gates.flip(1), tokens.flip(1)
    leaves = [gates.requires_grad_(), tokens.requires_grad_(), torch.zeros(1, 1, 2, requires_grad=True)]

    def call():
        out = fa.linear_scan(*leaves, reverse=reverse)
        return out, torch.autograd.grad(
            out[:, length // 2 :].sum() if not reverse else out[:, : length // 2].sum(), leaves
        )

    out, (_, dtokens, _) = run_with_threads(threads, call)
    truth, _ = oracle(*(x.detach() for x in leaves), reverse=reverse)
    assert truth.abs().max() < 1e9
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=0)
    late = slice(0, 4000) if reverse else slice(9000, None)
    assert dtokens[:, late].isfinite().all()


def test_a_small_state_under_an_overflowing_product(native):
    """The chunk's product of gates is infinite, the state times it is not."""
    length = 8192
    gates = torch.ones(1, length, 1, 1)
    gates[:, 4096:4296] = 2.0
    tokens = torch.zeros(1, length, 1, 1)
    tokens[:, 0] = 2.0**-140
    for threads in (1, 8):
        out = run_with_threads(threads, lambda: fa.linear_scan(gates, tokens))
        assert out[0, -1].item() == 2.0**60


@on_backends
def test_denormal_products(backend):
    check_against_oracle(torch.full((1, 300, 1, 2), 0.5), torch.randn(1, 300, 1, 2), torch.randn(1, 1, 2))
    gates = torch.full((1, 300, 1, 2), 0.5)
    tokens = torch.zeros(1, 300, 1, 2)
    tokens[:, -1] = 1
    assert fa.linear_scan(gates, tokens, torch.ones(1, 1, 2))[0, -1].eq(1).all()


@on_backends
def test_the_first_gate_acts_on_nothing(backend):
    gates, tokens = torch.rand(1, 5, 2, 3), torch.randn(1, 5, 2, 3)
    expected = fa.linear_scan(gates, tokens)
    gates[:, 0] = float("inf")
    a = gates.requires_grad_()
    out = fa.linear_scan(a, tokens)
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), a)[0][:, 0].eq(0).all()


@on_backends
def test_nan_stays_in_its_element(backend):
    gates, tokens = torch.rand(2, 9, 2, 3), torch.randn(2, 9, 2, 3)
    clean = fa.linear_scan(gates, tokens)
    tokens[1, 4, 0, 1] = float("nan")
    out = fa.linear_scan(gates, tokens)
    assert out[1, 4:, 0, 1].isnan().all()
    out[1, 4:, 0, 1] = clean[1, 4:, 0, 1]
    assert torch.equal(out, clean)


@on_backends
def test_any_strides(backend):
    gates, tokens = torch.rand(2, 13, 3, 8), torch.randn(2, 13, 3, 8)
    expected = fa.linear_scan(gates, tokens)
    heads_first = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    wide_rows = torch.randn(2, 13, 3, 16)
    wide_rows[..., :8] = tokens
    expanded = gates[:, :1].expand(2, 13, 3, 8)
    for a, b in ((gates, heads_first), (gates, wide_rows[..., :8])):
        assert torch.equal(fa.linear_scan(a, b), expected)
    assert torch.equal(fa.linear_scan(expanded, tokens), fa.linear_scan(expanded.contiguous(), tokens))
    b = tokens.clone().requires_grad_()
    (from_sum,) = torch.autograd.grad(fa.linear_scan(gates, b).sum(), b)  # the gradient of sum has strides 0
    (from_ones,) = torch.autograd.grad(fa.linear_scan(gates, b), b, torch.ones(2, 13, 3, 8))
    assert torch.equal(from_sum, from_ones)


# --- registration, compilation, choice of a backend


def test_opcheck(native):
    torch.use_deterministic_algorithms(False)  # opcheck compares with runs on other memory
    fwd, bwd = torch.ops.flowattn.linear_scan_fwd.default, torch.ops.flowattn.linear_scan_bwd.default
    tokens, initial = torch.randn(2, 7, 3, 4), torch.randn(2, 3, 4)
    reset = torch.rand(2, 7) > 0.7
    for gates in (torch.rand(2, 7, 3, 4), torch.rand(2, 7, 3, 1), torch.rand(1, 1, 3, 4)):
        torch.library.opcheck(fwd, (gates, tokens, initial, None, reset, False, False))
        out, final = fwd(gates, tokens, initial, None, reset, False, False)
        grads = (torch.randn_like(out), torch.randn_like(final))
        torch.library.opcheck(bwd, (*grads, gates, out, initial, None, reset, False, False))
    ends = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    half = tokens[:1].bfloat16()
    torch.library.opcheck(fwd, (torch.rand(1, 7, 3, 4), half, None, ends, None, True, True))
    torch.library.opcheck(bwd, (half, None, torch.rand(1, 7, 3, 4), half, None, ends, None, True, True))


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("name", ("full", "head", "constant"))
def test_compiles_without_graph_breaks(native, name, dynamic):
    shape = (2, 9, 3, 4)
    gates = torch.rand({"full": shape, "head": shape[:3], "constant": shape[2:]}[name], requires_grad=True)
    tokens, initial = torch.randn(shape, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)

    def call(*leaves):
        out, final = fa.linear_scan(*leaves, gate="log", output_final_state=True)
        return out.square().sum() + final.sum()

    leaves = (gates, tokens, initial)
    expected = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(got, want)


def test_inference_mode_and_explain(native, capsys):
    tokens = torch.randn(1, 4, 2, 3)
    with torch.inference_mode():
        assert fa.linear_scan(torch.rand(2, 3), tokens).shape == tokens.shape
    assert fa.explain("linear_scan", torch.rand(2, 3), tokens) == "cpu"
    assert "reference" in capsys.readouterr().out


GATES, TOKENS = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    "error, text, call",
    (
        (TypeError, "tokens must be float16", lambda: fa.linear_scan(GATES, TOKENS.long())),
        (TypeError, "gates must have the dtype of tokens", lambda: fa.linear_scan(GATES.half(), TOKENS)),
        (ValueError, "gates must have one of the shapes", lambda: fa.linear_scan(GATES[:, 1:], TOKENS)),
        (ValueError, "tokens must have shape", lambda: fa.linear_scan(GATES[0, 0], TOKENS[0, 0])),
        (ValueError, "gate must be", lambda: fa.linear_scan(GATES, TOKENS, gate="exp")),
        (ValueError, "last dim of gates", lambda: fa.linear_scan(GATES.mT, TOKENS.mT)),
        (ValueError, "leading dim", lambda: fa.linear_scan(GATES, TOKENS, cu_seqlens=torch.tensor([0, 5]))),
        (
            ValueError,
            "cu_seqlens must start at 0",
            lambda: fa.linear_scan(GATES[0], TOKENS[0], cu_seqlens=torch.tensor([0, 9])),
        ),
        (ValueError, "reset must have shape", lambda: fa.linear_scan(GATES, TOKENS, reset=TOKENS > 0)),
        (ValueError, "initial_state must have shape", lambda: fa.linear_scan(GATES, TOKENS, torch.zeros(3, 3, 4))),
        (TypeError, "initial_state must be torch.float32", lambda: fa.linear_scan(GATES, TOKENS, GATES[:, 0].half())),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_bad_offsets_never_read_out_of_bounds(native):
    """The private op repeats what protects memory."""
    for ends in ([0, 6], [1, 5], [0, 4, 2], [-1, 5]):
        cu = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="linear_scan: cu_seqlens must start at 0"):
            torch.ops.flowattn.linear_scan_fwd(GATES[:1], TOKENS[:1], None, cu, None, False, False)


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
