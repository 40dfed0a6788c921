"""prefix_attention against softmax over every prefix in float64: masks, segments, rows, extreme numbers."""

import pytest
import torch
from prefix_oracle import DTYPES, assert_near, check_against_oracle, gradients, inputs, random_state, wide

import flowattn as fa

BACKENDS = ("cpu", "cuda", "reference")


def on_backends(test):
    return pytest.mark.parametrize("backend", BACKENDS, indirect=True)(pytest.mark.usefixtures("scan_backend")(test))


on_cpu_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)


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
    state = random_state(dtype=torch.float32)
    u, w = state.u.requires_grad_(), state.w.requires_grad_()
    values = torch.zeros(2, 0, 3, 24)
    _, final = fa.prefix_attention(values[..., 0], values, initial_state=state, output_final_state=True)
    assert all(torch.equal(x, y) for x, y in zip(final, state))
    du, dw = torch.autograd.grad(final.u.sum() * 2 + final.w.sum() * 3, (u, w))
    assert du.eq(2).all() and dw.eq(3).all()


@pytest.mark.parametrize("name", ("plain", "mask_reset"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@on_cpu_backends
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
    scores, values = inputs(length=7, dtype=torch.float32)
    state = random_state(dtype=torch.float32)
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
def test_packed_equals_each_sequence(backend, assert_same, dtype, reverse):
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
            assert_same(got, expected)


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
    scores, values = inputs(2, 4, dtype=torch.float32)
    reset = torch.tensor([[True] + [False] * 3, [False] * 4])
    state = random_state(dtype=torch.float32)
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
    m, u, w = (x.double().unsqueeze(1) for x in state)
    weight = scores.double().exp()  # the scores are small: sums without a gauge are exact enough in float64
    total = (u * m.exp() + weight.cumsum(1)).unsqueeze(-1)
    truth = (w * m.exp().unsqueeze(-1) + (weight.unsqueeze(-1) * values.double()).cumsum(1)) / total
    largest = torch.maximum(values.abs().max(), (state.w / state.u.unsqueeze(-1)).abs().max())
    assert_near("out", one[0], truth, 2e-6, largest)


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
    scores, values = inputs(2, 9, 2, 3, torch.float32)
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
