"""prefix_attention, aaren_attention and their states against softmax over every prefix in float64."""

import doctest

import flowattn as fa
import pytest
import torch
import torch.nn.functional as F
from flowattn.ops import prefix_attention as module

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

# Largest errors: out by max |v|; dv and dw0 by max |go| + max |dv|; ds by max |go| max |v| sqrt(D), the size of go . v.
# Half precision: one rounding of the result (8e-3, 1e-3), twice that in ds, whose delta uses the rounded output.
TOLERANCE = {
    torch.float64: {"out": 1e-12, "lse": 1e-12, "dv": 1e-12, "ds": 1e-12},
    torch.float32: {"out": 2e-6, "lse": 1e-6, "dv": 5e-6, "ds": 1e-5},
    torch.bfloat16: {"out": 8e-3, "lse": 1e-6, "dv": 1e-2, "ds": 2e-2},
    torch.float16: {"out": 1e-3, "lse": 1e-6, "dv": 2e-3, "ds": 4e-3},
}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(batch=2, length=37, heads=3, width=24, dtype=torch.float64, spread=3.0):
    scores = (torch.randn(batch, length, heads) * spread).to(dtype)
    return scores, torch.randn(batch, length, heads, width).to(dtype)


def gradients(outputs, leaves, grad_outputs=None):
    """torch.autograd.grad with zeros for leaves that no result depends on."""
    return torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True, materialize_grads=True)


def random_state(states=2, heads=3, width=24, dtype=torch.float64):
    m, u = torch.randn(states, heads, dtype=dtype), torch.rand(states, heads, dtype=dtype) + 0.1
    return fa.PrefixState(m, u, torch.randn(states, heads, width, dtype=dtype))


def oracle(scores, values, *, mask=None, reset=None, state=None, reverse=False):
    """(out, lse) by the definition: a softmax over the visible tokens of every prefix, the state as one token more."""
    if reverse:
        scores, values, mask, reset = (None if x is None else x.flip(1) for x in (scores, values, mask, reset))
    batch, length, heads, _ = values.shape
    keep = scores != float("-inf")
    if mask is not None:
        keep = keep & (mask if mask.dim() == 3 else mask[..., None])
    segment = torch.zeros(batch, length) if reset is None else reset.long().cumsum(1)
    same = segment[:, :, None] == segment[:, None, :]
    visible = (same & torch.ones(length, length, dtype=torch.bool).tril())[..., None] & keep[:, None]  # (B, t, i, H)
    logits = scores.double()[:, None].masked_fill(~visible, float("-inf"))
    content = values.double().masked_fill(~keep[..., None], 0.0)
    if state is not None:
        m, u, w = (x.double() for x in state)
        reached = (segment == 0)[:, :, None, None].expand(batch, length, 1, heads)
        logits = torch.cat([(m + u.log())[:, None, None].masked_fill(~reached, float("-inf")), logits], 2)
        content = torch.cat([(w / u[..., None])[:, None], content], 1)
    none = (logits == float("-inf")).all(2)
    lse = logits.masked_fill(none[:, :, None], 0.0).logsumexp(2).masked_fill(none, float("-inf"))
    weights = logits.masked_fill(none[:, :, None], 0.0).softmax(2).masked_fill(none[:, :, None], 0.0)
    out = torch.einsum("btih,bihd->bthd", weights, content)
    return (out.flip(1), lse.flip(1)) if reverse else (out, lse)


def assert_near(name, got, true, tolerance, scale=1.0):
    assert got.shape == true.shape, name
    finite = true.isfinite()
    assert torch.equal(got.isfinite(), finite), name
    error = (got.double() - true.double())[finite].abs()
    bound = tolerance * torch.as_tensor(scale).double()
    worst = (error / (bound[finite] if bound.dim() else bound)).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{name}: {worst:.2f} times the tolerance {tolerance}"


def check_against_oracle(scores, values, state=None, lse_gradient=True, **options):
    """Outputs and every gradient of the public function against the oracle's, with the tolerances of the dtype."""
    tolerance, width = TOLERANCE[values.dtype], max(1, values.shape[-1])
    results = []
    for truth in (False, True):
        cast = (lambda x: x.double()) if truth else (lambda x: x)
        s, v = (cast(x).detach().clone().requires_grad_() for x in (scores, values))
        leaves, start = [s, v], None
        if state is not None:
            u, w = (cast(x).detach().clone().requires_grad_() for x in state[1:])
            leaves, start = [s, v, u, w], fa.PrefixState(cast(state.m), u, w)
        if truth:
            out, lse = oracle(s, v, state=start, **options)
        else:
            out, lse = fa.prefix_attention(s, v, initial_state=start, return_lse=True, **options)
        generator = torch.Generator().manual_seed(1)
        go = torch.randn(out.shape, generator=generator).to(values.dtype).to(out.dtype)
        gl = torch.randn(lse.shape, generator=generator).to(lse.dtype) * lse_gradient
        loss = (out * go).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * gl).sum()
        results.append((out, lse, *gradients(loss, leaves)))
    (out, lse, ds, dv, *dstate), (true_out, true_lse, true_ds, true_dv, *true_dstate) = results
    assert out.dtype == values.dtype and lse.dtype == wide(values.dtype)
    if values.numel() == 0:
        return
    largest = values.double().abs().max()
    if state is not None:
        largest = torch.maximum(largest, (state.w / state.u[..., None]).abs().max())
    assert_near("out", out, true_out, tolerance["out"], largest)
    assert_near("lse", lse, true_lse, tolerance["lse"], true_lse.abs().clamp(min=1))
    assert_near("dv", dv, true_dv, tolerance["dv"], go.abs().max() + true_dv.abs().max())
    ds_scale = go.double().abs().max() * largest * width**0.5
    assert_near("ds", ds, true_ds, tolerance["ds"], ds_scale)
    if state is not None:
        (du, dw), (true_du, true_dw) = dstate, true_dstate
        assert_near("dw0", dw, true_dw, tolerance["dv"], go.abs().max() + true_dw.abs().max())
        assert_near("du0", du, true_du, tolerance["ds"], ds_scale / state.u.min())


def options_named(name):
    batch, length, heads = 2, 37, 3
    mask = torch.rand(batch, length) > 0.4
    mask[0, :5] = False
    return {
        "plain": {},
        "mask": {"mask": mask},
        "head_mask": {"mask": torch.rand(batch, length, heads) > 0.5},
        "all_masked": {"mask": torch.zeros(batch, length, dtype=torch.bool)},
        "last_kept": {"mask": torch.arange(length).expand(batch, length) == length - 1},
        "reset": {"reset": torch.rand(batch, length) > 0.8},
        "mask_reset": {"mask": mask, "reset": torch.rand(batch, length) > 0.8},
    }[name]


# --- against the definition


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("with_state", (False, True), ids=("fresh", "state"))
@pytest.mark.parametrize("name", ("plain", "mask", "head_mask", "all_masked", "last_kept", "reset", "mask_reset"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_results_and_gradients(backend, dtype, name, with_state, reverse):
    scores, values = inputs(dtype=dtype)
    state = random_state(dtype=wide(dtype)) if with_state else None
    check_against_oracle(scores, values, state, reverse=reverse, **options_named(name))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@on_backends
def test_float32_scores_of_half_values(backend, dtype):
    scores, values = inputs(dtype=torch.float32)
    check_against_oracle(scores, values.to(dtype))


@pytest.mark.parametrize("length", (0, 1, 2, 31, 32, 33, 127))
@on_backends
def test_lengths(backend, length):
    check_against_oracle(*inputs(length=length, dtype=torch.float32), random_state(dtype=torch.float32))


@pytest.mark.parametrize("length", (4095, 4096, 4097))
def test_lengths_around_a_chunk(native, length):
    check_against_oracle(*inputs(1, length, 1, 2, torch.float32), random_state(1, 1, 2, torch.float32))


@pytest.mark.parametrize("width", (1, 2, 3, 24, 64, 80, 128, 256, 512))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_widths(native, dtype, width):
    check_against_oracle(*inputs(2, 9, 2, width, dtype))


@pytest.mark.parametrize("shape", ((0, 5, 2, 4), (2, 5, 0, 4), (2, 0, 3, 4), (2, 5, 2, 0)), ids=str)
@on_backends
def test_empty_tensors(backend, shape):
    scores, values = torch.randn(shape[:3], requires_grad=True), torch.randn(shape, requires_grad=True)
    out, state, lse = fa.prefix_attention(scores, values, output_final_state=True, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:3] and state.w.shape == (shape[0], *shape[2:])
    ds, dv = gradients(out.sum() + state.w.sum(), (scores, values))
    assert ds.eq(0).all() and dv.eq(0).all()


@on_backends
def test_no_token_passes_the_state_and_its_gradient(backend):
    state = random_state()
    u, w = state.u.requires_grad_(), state.w.requires_grad_()
    values = torch.zeros(2, 0, 3, 24, dtype=torch.float64)
    _, final = fa.prefix_attention(values[..., 0], values, initial_state=state, output_final_state=True)
    assert all(torch.equal(x, y) for x, y in zip(final, state))
    du, dw = torch.autograd.grad(final.u.sum() * 2 + final.w.sum() * 3, (u, w))
    assert du.eq(2).all() and dw.eq(3).all()


@pytest.mark.parametrize("name", ("plain", "mask_reset"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@on_backends
def test_gradcheck_through_the_state(backend, name, reverse):
    scores, values = inputs(2, 37, 3, 2)
    options = {k: x[:, :5] for k, x in options_named(name).items()}
    state = random_state(2, 3, 2)

    def call(s, v, u, w):
        start = fa.PrefixState(state.m, u, w)
        out, final, lse = fa.prefix_attention(
            s, v, initial_state=start, output_final_state=True, return_lse=True, reverse=reverse, **options
        )
        # Only read-out, merge and continuation give a state a meaning: m is a gauge.
        final_lse = final.m + final.u.log()
        if "mask" in options:
            lse, final_lse = (x.masked_fill(x == float("-inf"), 0.0) for x in (lse, final_lse))
        return out, lse, final.read(), final_lse

    leaves = [x[:, :5].clone() if x.dim() > 2 and x.shape[1] == 37 else x.clone() for x in (scores, values, *state[1:])]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


@on_backends
def test_gradients_of_subsets(backend):
    scores, values = inputs(length=7)
    state = random_state()
    everything = [x.clone().requires_grad_() for x in (scores, values, *state[1:])]

    def run(leaves):
        s, v, u, w = leaves
        out, final = fa.prefix_attention(
            s, v, initial_state=fa.PrefixState(state.m, u, w), output_final_state=True, reverse=False
        )
        return out.square().sum() + final.read().square().sum()

    full = torch.autograd.grad(run(everything), everything)
    for wanted in range(4):
        leaves = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate(everything)]
        (got,) = torch.autograd.grad(run(leaves), leaves[wanted : wanted + 1])
        assert torch.equal(got, full[wanted])


# --- packed sequences, rows, threads


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_backends
def test_packed_equals_each_sequence_bitwise(backend, dtype, reverse):
    ends = torch.tensor([0, 0, 5, 6, 6, 40, 73, 73])
    scores, values = inputs(1, 80, 3, 24, dtype)
    mask = torch.rand(1, 80) > 0.2
    state = random_state(7, dtype=torch.float32)
    leaves = [x[0].clone().requires_grad_() for x in (scores, values)] + [x.clone().requires_grad_() for x in state[1:]]
    options = {"reverse": reverse, "output_final_state": True, "return_lse": True}
    start = fa.PrefixState(state.m, *leaves[2:])
    out, final, lse = fa.prefix_attention(*leaves[:2], mask=mask[0], cu_seqlens=ends, initial_state=start, **options)
    go, gw = torch.randn_like(out), torch.randn_like(final.w)
    ds, dv, du, dw = torch.autograd.grad([out, final.w], leaves, [go, gw])
    assert out[73:].eq(0).all() and lse[73:].eq(float("-inf")).all() and ds[73:].eq(0).all() and dv[73:].eq(0).all()
    for i, (begin, end) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        rows = slice(begin, end)
        parts = [x[rows][None].detach().requires_grad_() for x in leaves[:2]]
        parts += [x[i : i + 1].detach().requires_grad_() for x in leaves[2:]]
        one = fa.PrefixState(state.m[i : i + 1], *parts[2:])
        part_out, part_final, part_lse = fa.prefix_attention(
            *parts[:2], mask=mask[:, rows], initial_state=one, **options
        )
        grads = gradients([part_out, part_final.w], parts, [go[None, rows], gw[i : i + 1]])
        pairs = [
            (out[None, rows], part_out),
            (lse[None, rows], part_lse),
            *zip((x[i : i + 1] for x in final), part_final),
        ]
        pairs += zip((ds[None, rows], dv[None, rows], du[i : i + 1], dw[i : i + 1]), grads)
        for got, expected in pairs:
            assert torch.equal(got, expected)


def test_packed_with_a_leading_dim_is_returned_alike():
    scores, values = inputs(1, 9)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    flat, flat_lse = fa.prefix_attention(scores[0], values[0], cu_seqlens=ends, return_lse=True)
    full, full_lse = fa.prefix_attention(scores, values, cu_seqlens=ends, return_lse=True)
    assert torch.equal(flat[None], full) and torch.equal(flat_lse[None], full_lse)


def test_reset_equals_packed(native):
    scores, values = inputs(1, 50)
    starts = [7, 8, 30]
    reset = torch.zeros(1, 50, dtype=torch.bool)
    reset[0, starts] = True
    packed = fa.prefix_attention(scores, values, cu_seqlens=torch.tensor([0, *starts, 50]))
    assert torch.equal(fa.prefix_attention(scores, values, reset=reset), packed)


@on_backends
def test_reset_at_the_first_token_drops_the_state(backend):
    scores, values = inputs(2, 4)
    reset = torch.tensor([[True] + [False] * 3, [False] * 4])
    state = random_state()
    out = fa.prefix_attention(scores, values, reset=reset, initial_state=state)
    assert torch.equal(out[:1], fa.prefix_attention(scores[:1], values[:1]))
    assert not torch.equal(out[1:], fa.prefix_attention(scores[1:], values[1:]))


def run_with_threads(threads, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", ((1, 9001, 1, 3), (3, 70, 5, 24)), ids=str)
def test_bitwise_independent_of_threads(native, shape):
    """One row of 9001 tokens is cut into chunks where there are three threads or more."""
    scores, values = inputs(*shape, torch.float32)
    state = random_state(shape[0], *shape[2:], torch.float32)
    go, gw = torch.randn(shape), torch.randn(shape[0], *shape[2:])

    def call():
        leaves = [x.clone().requires_grad_() for x in (scores, values, *state[1:])]
        start = fa.PrefixState(state.m, *leaves[2:])
        out, final = fa.prefix_attention(*leaves[:2], initial_state=start, output_final_state=True)
        return out, *final, *torch.autograd.grad([out, final.w], leaves, [go, gw])

    one, two, eight = (run_with_threads(n, call) for n in (1, 2, 8))
    for x, y, z in zip(one, two, eight):
        assert torch.equal(x, y) and torch.equal(x, z)
    truth, _ = oracle(scores, values, state=state)
    assert_near("out", one[0], truth, 2e-6, values.abs().max())


@on_backends
def test_rows_do_not_influence_each_other(backend):
    scores, values = inputs(3, 11, 3, 5, torch.float32)
    alone = fa.prefix_attention(scores[1:2, :, 1:2], values[1:2, :, 1:2])
    assert torch.equal(fa.prefix_attention(scores, values)[1:2, :, 1:2], alone)


@on_backends
def test_any_strides(backend):
    scores, values = inputs(2, 13, 3, 8, torch.float32)
    mask = torch.rand(2, 13) > 0.3
    expected = fa.prefix_attention(scores, values, mask=mask)
    heads_first = values.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.randn(2, 13, 3, 16)
    padded[..., :8] = values
    time_first = scores.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for s, v in ((time_first, heads_first), (scores, padded[..., :8])):
        assert torch.equal(fa.prefix_attention(s, v, mask=mask.T.contiguous().T), expected)
    v = values.clone().requires_grad_()
    (from_sum,) = torch.autograd.grad(fa.prefix_attention(scores, v).sum(), v)  # the gradient of sum has strides 0
    (from_ones,) = torch.autograd.grad(fa.prefix_attention(scores, v), v, torch.ones(2, 13, 3, 8))
    assert torch.equal(from_sum, from_ones)


# --- scores and values at the edge


@on_backends
def test_huge_scores(backend):
    scores = torch.tensor([1e4, -1e4, 3e38, -3e38, 1e4, 3e38]).view(1, 6, 1)
    values = torch.arange(6.0).view(1, 6, 1, 1)
    check_against_oracle(scores, values, lse_gradient=False)  # log 2 is lost beside 3e38
    assert fa.prefix_attention(scores, values).flatten().tolist() == [0, 0, 2, 2, 2, 3.5]


@pytest.mark.parametrize("step", (100.0, -100.0), ids=("rising", "falling"))
@on_backends
def test_scores_that_leave_the_range_of_exp(backend, step):
    scores = (step * torch.arange(200.0)).view(1, 200, 1)
    values = torch.randn(1, 200, 1, 4)
    expected = values if step > 0 else values[:, :1].expand_as(values)
    assert torch.equal(fa.prefix_attention(scores, values), expected)
    check_against_oracle(scores, values, lse_gradient=False)


@pytest.mark.parametrize("offset", (0.0, -300.0))
def test_a_million_equal_scores_give_the_running_mean(native, offset):
    length = 1_000_000
    values = torch.randn(1, length, 1, 2) + 1
    out, lse = fa.prefix_attention(torch.full((1, length, 1), offset), values, return_lse=True)
    count = torch.arange(1, length + 1, dtype=torch.float64)
    mean = values.double().cumsum(1) / count.view(1, -1, 1, 1)
    assert_near("out", out, mean, 2e-6, values.abs().max())
    true_lse = (count.log() + offset).view(1, -1, 1)
    assert_near("lse", lse, true_lse, 1e-6, true_lse.abs().clamp(min=1))


def test_slowly_rising_scores_do_not_drift(native):
    """Each token raises the maximum a little; rescaling the sum at each of them would add up its roundings."""
    length = 100_000
    scores = torch.linspace(0, 10, length).view(1, length, 1)
    values = torch.rand(1, length, 1, 1)
    weight = (scores.double() - 10).exp()
    truth = (weight[..., None] * values.double()).cumsum(1) / weight[..., None].cumsum(1)
    assert_near("out", fa.prefix_attention(scores, values), truth, 2e-6)


@pytest.mark.parametrize("where", ("score", "value", "infinite score"))
@on_backends
def test_nan_poisons_its_head_to_the_end_of_its_segment(backend, where):
    scores, values = inputs(2, 9, 2, 3, torch.float32)
    clean = fa.prefix_attention(scores, values)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[1, 7] = True
    clean = fa.prefix_attention(scores, values, reset=reset)
    if where == "value":
        values[1, 4, 0] = float("nan")
    else:
        scores[1, 4, 0] = float("nan" if where == "score" else "inf")
    out = fa.prefix_attention(scores, values, reset=reset)
    assert out[1, 4:7, 0].isnan().all()
    out[1, 4:7, 0] = clean[1, 4:7, 0] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("by", ("mask", "score"))
@on_backends
def test_masked_values_leak_nowhere(backend, bad, by):
    scores, values = inputs(2, 9, 2, 3)
    mask = torch.rand(2, 9) > 0.4
    mask[0] = False
    expected_inputs = values.masked_fill(~mask[..., None, None], 0.0)
    results = []
    for v in (values.masked_fill(~mask[..., None, None], bad), expected_inputs):
        s = scores.clone()
        if by == "score":
            s[~mask] = float("-inf")
        elif v is not expected_inputs:
            s[~mask] = bad
        leaves = [s.requires_grad_(), v.clone().requires_grad_()]
        out = fa.prefix_attention(*leaves, mask=mask if by == "mask" else None)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)
    assert results[0][1][~mask].eq(0).all() and results[0][2][~mask].eq(0).all()


@on_backends
def test_half_values_near_the_limit_stay_finite(backend):
    values = torch.full((1, 500, 1, 4), 65504.0, dtype=torch.float16)
    out = fa.prefix_attention(torch.randn(1, 500, 1), values)
    assert out.eq(65504).all()


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


@on_backends
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
def test_a_masked_token_is_a_removed_token(backend):
    scores, values = inputs(1, 21, 3, 4, torch.float32)
    keep = torch.rand(21) > 0.4
    out = fa.prefix_attention(scores, values, mask=keep[None])
    assert torch.equal(out[:, keep], fa.prefix_attention(scores[:, keep], values[:, keep]))
    for t in range(1, 21):
        if not keep[t]:
            assert torch.equal(out[:, t], out[:, t - 1])


@on_backends
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


@on_backends
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
    for keep in (False, True):
        yield fwd, (scores, values, mask, reset, None, *state, False, keep)
    ends = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    yield fwd, (scores[:1], values[:1].bfloat16(), None, None, ends, None, None, None, True, True)
    out, m, u, _, u_final, w_final = fwd(scores, values, mask, reset, None, *state, False, True)
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
    out, m, u, *_ = torch.ops.flowattn.prefix_attention_fwd(scores, values, *[None] * 6, False, False)
    assert m.numel() == u.numel() == 0 and out.shape == values.shape


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
            torch.ops.flowattn.prefix_attention_fwd(scores, values, None, None, cu, None, None, None, False, False)


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
