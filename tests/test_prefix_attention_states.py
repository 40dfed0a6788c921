"""States, identities and registration of prefix_attention, and aaren_attention."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from prefix_oracle import DTYPES, TOLERANCE, assert_near, inputs, oracle, random_state

import flowattn as fa
from flowattn.ops import prefix_attention as module

BACKENDS = ("cpu", "cuda", "reference")


def on_backends(test):
    return pytest.mark.parametrize("backend", BACKENDS, indirect=True)(pytest.mark.usefixtures("scan_backend")(test))


on_cpu_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)


# --- states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@on_backends
def test_split_and_resume(backend, dtype, reverse):
    scores, values = inputs(2, 60, 3, 8, dtype)
    whole, whole_state = fa.prefix_attention(scores, values, output_final_state=True, reverse=reverse)
    cuts = [0, *sorted(torch.randint(0, 61, (5,)).tolist()), 60]
    spans = list(zip(cuts, cuts[1:]))
    outs, state = {}, None
    for begin, end in reversed(spans) if reverse else spans:
        part = slice(begin, end)
        outs[begin, end], state = fa.prefix_attention(
            scores[:, part], values[:, part], initial_state=state, output_final_state=True, reverse=reverse
        )
    tolerance = {torch.float64: 1e-12, torch.float32: 4e-6}.get(dtype, TOLERANCE[dtype]["out"])
    assert_near("out", torch.cat([outs[span] for span in spans], 1), whole.double(), tolerance, values.abs().max())
    assert_near("state", state.read(), whole_state.read().double(), min(tolerance, 4e-6), values.abs().max())


@on_backends
def test_steps_equal_the_parallel_form(backend):
    scores, values = inputs(2, 12, 3, 8, torch.float32)
    whole, whole_state = fa.prefix_attention(scores, values, output_final_state=True)
    state, outs = None, []
    for t in range(12):
        out, state = fa.prefix_attention_step(state, scores[:, t], values[:, t])
        outs.append(out)
    assert_near("out", torch.stack(outs, 1), whole.double(), 4e-6, values.abs().max())
    assert torch.equal(state.m, whole_state.m)
    assert_near("u", state.u, whole_state.u.double(), 4e-6, whole_state.u.max())


@on_cpu_backends
def test_final_state_is_the_softmax_sums(backend):
    scores, values = inputs(2, 20, 3, 4)
    _, (m, u, w) = fa.prefix_attention(scores, values, output_final_state=True)
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    assert torch.equal(m, scores.amax(1))
    torch.testing.assert_close(u, weights.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(w, (weights[..., None] * values).sum(1), rtol=1e-11, atol=1e-12)


def test_merge_is_associative_and_commutative_and_equals_the_scan():
    scores, values = inputs(2, 30, 3, 4)
    parts = [
        fa.prefix_attention(scores[:, p], values[:, p], output_final_state=True)[1]
        for p in (slice(7), slice(7, 8), slice(8, 30))
    ]
    a, b, c = parts
    nothing = fa.PrefixState(torch.full_like(a.m, float("-inf")), torch.zeros_like(a.u), torch.zeros_like(a.w))
    whole = fa.prefix_attention(scores, values, output_final_state=True)[1]
    for merged in (
        fa.prefix_state_merge(fa.prefix_state_merge(a, b), c),
        fa.prefix_state_merge(a, fa.prefix_state_merge(b, c)),
        fa.prefix_state_merge(fa.prefix_state_merge(c, nothing), fa.prefix_state_merge(b, a)),
    ):
        for got, expected in zip(merged, whole):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    both = fa.prefix_state_merge(nothing, nothing)
    assert both.u.eq(0).all() and both.read().eq(0).all()
    leaves = [a.u.clone().requires_grad_(), a.w.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda u, w: fa.prefix_state_merge(fa.PrefixState(a.m, u, w), b).read(), leaves)


@on_backends
def test_a_zero_state_is_no_state(backend):
    """A state (0, 0, 0) must not raise the gauge: exp(s - 0) is 0 for scores far below 0."""
    scores, values = inputs(2, 5, 3, 4, torch.float32)
    zeros = fa.PrefixState(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, 4))
    got = fa.prefix_attention(scores - 1000, values, initial_state=zeros)
    assert torch.equal(got, fa.prefix_attention(scores - 1000, values))


# --- identities


@on_backends
def test_reverse_is_flip_run_flip(backend):
    scores, values = inputs(2, 21, 3, 4, torch.float32)
    mask, reset = torch.rand(2, 21) > 0.3, torch.rand(2, 21) > 0.8
    flipped = fa.prefix_attention(scores.flip(1), values.flip(1), mask=mask.flip(1), reset=reset.flip(1)).flip(1)
    assert torch.equal(fa.prefix_attention(scores, values, mask=mask, reset=reset, reverse=True), flipped)


@on_backends
def test_a_masked_token_is_a_removed_token(backend, assert_same):
    scores, values = inputs(1, 21, 3, 4, torch.float32)
    keep = torch.rand(21) > 0.4
    out = fa.prefix_attention(scores, values, mask=keep[None])
    assert_same(out[:, keep], fa.prefix_attention(scores[:, keep], values[:, keep]))
    for t in range(1, 21):
        if not keep[t]:
            assert_same(out[:, t], out[:, t - 1])


@on_cpu_backends
def test_order_inside_a_prefix_and_a_constant_do_not_matter(backend):
    scores, values = inputs(1, 40, 2, 4, torch.float32)
    last = fa.prefix_attention(scores, values)[:, -1]
    order = torch.randperm(40)
    assert_near("order", fa.prefix_attention(scores[:, order], values[:, order])[:, -1], last.double(), 4e-6)
    shifted = scores.double() + 700
    assert_near("constant", fa.prefix_attention(shifted, values.double())[:, -1], last.double(), 4e-6)


def test_equals_causal_attention_with_one_query(native):
    query, keys, values = torch.randn(3, 8), torch.randn(2, 33, 3, 8), torch.randn(2, 33, 3, 5)
    out = fa.aaren_attention(query, keys, values)
    q = query[None, :, None].expand(2, 3, 33, 8)
    expected = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=3e-6)


@on_cpu_backends
def test_is_a_linear_scan_with_scalar_gates(backend):
    scores, values = inputs(2, 30, 3, 4)
    out, lse = fa.prefix_attention(scores, values, return_lse=True)
    before = F.pad(lse[:, :-1], (0, 0, 1, 0), value=float("-inf"))
    tokens = (scores - lse).exp()[..., None] * values
    torch.testing.assert_close(fa.linear_scan((before - lse).exp(), tokens), out, rtol=1e-10, atol=1e-12)


# --- aaren_attention


@pytest.mark.parametrize("per_row", (False, True), ids=("one_query", "query_per_row"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_aaren(backend, dtype, per_row):
    width = 24
    query = torch.randn(2, 3, width) if per_row else torch.randn(3, width)
    leaves = [x.to(dtype).requires_grad_() for x in (query, torch.randn(2, 1030, 3, width), torch.randn(2, 1030, 3, 4))]
    out = fa.aaren_attention(*leaves, scale=0.3)
    go = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, leaves, go)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    expand = truth[0][:, None] if per_row else truth[0]
    true_out, _ = oracle(0.3 * (expand * truth[1]).sum(-1), truth[2])
    true_grads = torch.autograd.grad(true_out, truth, go.double())
    tolerance = TOLERANCE[dtype]
    assert_near("out", out, true_out, tolerance["out"] * 2, leaves[2].abs().max())
    for name, got, true in zip(("dq", "dk", "dv"), grads, true_grads):
        assert got.dtype == dtype
        assert_near(name, got, true, tolerance["ds"], true.abs().max())


def test_aaren_scores_are_not_rounded_to_half(native):
    """300 and 301 / 300 apart: bfloat16 scores could not tell them apart."""
    keys = torch.tensor([300.0, 301.0]).view(1, 2, 1, 1).expand(1, 2, 1, 16).contiguous().bfloat16()
    keys[0, 1, 0, 0] = 302
    values = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).bfloat16()
    query = torch.ones(1, 16).bfloat16()
    scores = (query.double() * keys.double()).sum(-1)[0, :, 0]
    expected = torch.sigmoid(scores[1] - scores[0])
    assert_near("out", fa.aaren_attention(query, keys, values, scale=1.0)[0, 1].flatten(), expected.view(1), 4e-3)


def test_aaren_packed(native):
    query, keys, values = torch.randn(3, 8), torch.randn(20, 3, 8), torch.randn(20, 3, 5)
    ends = torch.tensor([0, 6, 20])
    out = fa.aaren_attention(query, keys, values, cu_seqlens=ends)
    parts = [fa.aaren_attention(query, keys[None, a:b], values[None, a:b])[0] for a, b in ((0, 6), (6, 20))]
    assert torch.equal(out, torch.cat(parts))


# --- registration, compilation, choice of a backend


def op_calls():
    scores, values = inputs(2, 7, 3, 4, torch.float32)
    state = random_state(2, 3, 4, torch.float32)
    mask, reset = torch.rand(2, 7, 3) > 0.3, torch.rand(2, 7) > 0.7
    fwd, bwd = torch.ops.flowattn.prefix_attention_fwd.default, torch.ops.flowattn.prefix_attention_bwd.default
    for keep_sums, keep_lse in ((False, False), (True, False), (False, True)):
        yield fwd, (scores, values, mask, reset, None, *state, False, keep_sums, keep_lse)
    ends = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    yield fwd, (scores[:1], values[:1].bfloat16(), None, None, ends, None, None, None, True, True, True)
    out, m, u, _, _, u_final, w_final = fwd(scores, values, mask, reset, None, *state, False, True, False)
    final = (torch.randn_like(u), torch.randn_like(u_final), torch.randn_like(w_final))
    yield bwd, (torch.randn_like(out), *final, scores, values, mask, reset, None, state.m, out, m, u, u_final, False)
    fwd, bwd = torch.ops.flowattn.aaren_scores_fwd.default, torch.ops.flowattn.aaren_scores_bwd.default
    query, keys = torch.randn(1, 3, 4).bfloat16(), values.bfloat16()
    yield fwd, (query, keys, 0.5)
    yield bwd, (scores, query, keys, 0.5)


def test_opcheck(native):
    torch.use_deterministic_algorithms(False)  # opcheck compares with runs on other memory
    for op, arguments in op_calls():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_without_graph_breaks(native, dynamic):
    query = torch.randn(3, 8, requires_grad=True)
    keys, values = torch.randn(2, 9, 3, 8, requires_grad=True), torch.randn(2, 9, 3, 5, requires_grad=True)
    state = random_state(2, 3, 5, torch.float32)

    def call(q, k, v):
        out, final, lse = fa.aaren_attention(
            q, k, v, initial_state=state, output_final_state=True, return_lse=True, reverse=True
        )
        return out.square().sum() + final.read().sum() + lse.sum()

    expected = torch.autograd.grad(call(query, keys, values), (query, keys, values))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(torch.autograd.grad(compiled(query, keys, values), (query, keys, values)), expected):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        compiled = torch.compile(fa.prefix_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(keys[..., 0], values), fa.prefix_attention(keys[..., 0], values))


def test_autocast(native):
    scores, values = inputs(2, 6, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fa.prefix_attention(scores.bfloat16(), values)
        query, keys = torch.randn(3, 8), torch.randn(2, 6, 3, 8)
        out = fa.aaren_attention(query, keys, values)
    assert torch.equal(mixed, fa.prefix_attention(scores.bfloat16().float(), values)) and out.dtype == torch.float32


def test_inference_mode_and_explain(native, capsys):
    scores, values = inputs(1, 4, 2, 3, torch.float32)
    with torch.inference_mode():
        assert fa.prefix_attention(scores, values).shape == values.shape
    assert fa.explain("prefix_attention", scores, values) == "cpu"
    assert fa.explain("aaren_attention", values[0, 0], values, values) == "cpu"
    assert "reference" in capsys.readouterr().out


def test_memory_of_the_forward_is_its_outputs(native):
    """Beyond the output only the state and, where a gradient is wanted, two scalars a head and token."""
    scores, values = inputs(2, 7, 3, 4, torch.float32)
    out, m, u, lse, *_ = torch.ops.flowattn.prefix_attention_fwd(scores, values, *[None] * 6, False, False, False)
    assert m.numel() == u.numel() == lse.numel() == 0 and out.shape == values.shape


SCORES, VALUES = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    "error, text, call",
    (
        (TypeError, "values must be float16", lambda: fa.prefix_attention(SCORES, VALUES.long())),
        (TypeError, "scores must have the dtype of values", lambda: fa.prefix_attention(SCORES.half(), VALUES)),
        (ValueError, r"values must have shape \(B, T, H, D\)", lambda: fa.prefix_attention(SCORES, VALUES[0])),
        (ValueError, "scores must have the shape of values", lambda: fa.prefix_attention(SCORES[:, 1:], VALUES)),
        (ValueError, "last dim of values", lambda: fa.prefix_attention(SCORES, torch.zeros(2, 5, 4, 3).mT)),
        (TypeError, "mask must be bool", lambda: fa.prefix_attention(SCORES, VALUES, mask=SCORES)),
        (ValueError, "mask must have shape", lambda: fa.prefix_attention(SCORES, VALUES, mask=SCORES[0] > 0)),
        (TypeError, "reset must be bool", lambda: fa.prefix_attention(SCORES, VALUES, reset=SCORES[..., 0])),
        (ValueError, "reset must have shape", lambda: fa.prefix_attention(SCORES, VALUES, reset=SCORES > 0)),
        (ValueError, "leading dim", lambda: fa.prefix_attention(SCORES, VALUES, cu_seqlens=torch.tensor([0, 5]))),
        (
            ValueError,
            "cu_seqlens must start at 0",
            lambda: fa.prefix_attention(SCORES[0], VALUES[0], cu_seqlens=torch.tensor([0, 4, 3])),
        ),
        (TypeError, "PrefixState", lambda: fa.prefix_attention(SCORES, VALUES, initial_state=SCORES)),
        (
            ValueError,
            "m of initial_state must have shape",
            lambda: fa.prefix_attention(SCORES, VALUES, initial_state=random_state(3, 3, 4, torch.float32)),
        ),
        (
            TypeError,
            "m of initial_state must be torch.float32",
            lambda: fa.prefix_attention(SCORES, VALUES, initial_state=random_state(2, 3, 4)),
        ),
        (ValueError, "query must have shape", lambda: fa.aaren_attention(VALUES[0], VALUES, VALUES)),
        (
            TypeError,
            "query must have the dtype of keys",
            lambda: fa.aaren_attention(VALUES[0, 0].half(), VALUES, VALUES),
        ),
        (ValueError, r"values must have shape \(B, H, D\)", lambda: fa.prefix_attention_step(None, SCORES, VALUES)),
        (ValueError, "u of both states", lambda: fa.prefix_state_merge((SCORES,) * 3, (SCORES, VALUES, SCORES))),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_bad_offsets_never_read_out_of_bounds(native):
    """The private op repeats what protects memory."""
    scores, values = inputs(1, 5, 3, 4, torch.float32)
    for ends in ([0, 6], [1, 5], [0, 4, 2], [-1, 5]):
        cu = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="prefix_attention: cu_seqlens must start at 0"):
            torch.ops.flowattn.prefix_attention_fwd(scores, values, None, None, cu, None, None, None, *[False] * 3)


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
