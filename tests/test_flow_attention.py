"""Flow-Attention: results and gradients of every backend against float64, identities, masks, packed sequences."""

import doctest

import flow_oracle
import pytest
import torch

import flowattn as fa
from flowattn.ops import flow_attention as module

BACKENDS = ("cpu", "triton", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
both_forms = pytest.mark.parametrize("causal", (False, True), ids=("whole", "causal"))
SIGMA_1 = torch.sigmoid(torch.ones((), dtype=torch.float64)).item()

# Largest rms error, as a share of the rms of the truth: of y and the state, of the gradients.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (5e-3, 1.5e-2),
    torch.float16: (1e-3, 5e-3),
}


def rms_ratio(got, true):
    true = true.detach().double()
    error = (got.detach().double().to(true.device) - true).square().mean().sqrt()
    return (error / (true.square().mean().sqrt() + 1e-8)).item()


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, name
    assert got.isfinite().all(), name
    if true.numel():
        assert rms_ratio(got, true) <= tolerance, f"{name}: {rms_ratio(got, true):.3g}"


def takes(backend, dtype):
    """Whether this backend computes this dtype here: Triton has no float64, its interpreter no bfloat16 product."""
    if backend == "triton":
        return dtype != torch.float64 and (dtype != torch.bfloat16 or torch.cuda.is_available())
    return True


def inputs(
    shape=(2, 37, 3, 20), sources=None, width_v=12, heads_kv=None, dtype=torch.float32, device="cpu", spread=1.0
):
    batch, length, heads, width = shape
    sources = length if sources is None else sources
    heads_kv = heads if heads_kv is None else heads_kv
    shapes = (shape, (batch, sources, heads_kv, width), (batch, sources, heads_kv, width_v))
    return tuple((spread * torch.randn(s)).to(device, dtype) for s in shapes)


def random_state(batch, heads, width, width_v, dtype, device):
    vectors = [(torch.rand(batch, heads, width) * 5 + 1).to(device, dtype) for _ in range(4)]
    e, s = (torch.rand(batch, heads) * 7 + 1).to(device, dtype), torch.randn(batch, heads, width, width_v)
    return fa.FlowState(*vectors, e, torch.arange(5, 5 + batch, device=device), s.to(device, dtype))


def floats(state):
    return [x for x in state if x.is_floating_point()]


def outcome(tensors, state=None, **options):
    """y, the final state and all gradients for fixed output gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if state is not None:
        state = fa.FlowState(*(x.clone().requires_grad_() if x.is_floating_point() else x for x in state))
        options |= {"initial_state": state, "output_final_state": True}
        leaves += floats(state)
    outs = fa.flow_attention(*leaves[:3], **options)
    outs = [outs[0], *floats(outs[1])] if state is not None else [outs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, tensors[0].dtype).to(x.dtype) for x in outs]
    return len(outs), (*outs, *torch.autograd.grad(outs, leaves, grads))


def check(backend, tensors, state=None, **options):
    """Results and gradients of `backend` against the reference in float64 on the same, rounded, inputs."""
    dtype = tensors[0].dtype
    count, got = outcome(tensors, state, **options)
    with fa.use_backend("reference"):
        wide = None if state is None else fa.FlowState(*(x.double() if x.is_floating_point() else x for x in state))
        _, true = outcome([x.double() for x in tensors], wide, **options)
    assert got[0].dtype == dtype
    for i, (x, y) in enumerate(zip(got, true)):
        assert_near(f"result {i}", x, y, TOLERANCE[dtype][i >= count])


# --- the formulas


@pytest.mark.parametrize("options", ({}, {"clamp": None}, {"feature_map": "relu"}, {"extra_eps": 1e-2, "eps": 1e-3}))
def test_reference_whole_against_loops(options):
    tensors = inputs((2, 7, 2, 5), sources=6, width_v=4, heads_kv=1, dtype=torch.float64)
    with fa.use_backend("reference"):
        y = fa.flow_attention(*tensors, **options)
    torch.testing.assert_close(y, flow_oracle.heads(flow_oracle.whole, *tensors, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ({}, {"clamp": 5.0}, {"clamp": 10.0, "feature_map": "relu"}, {"eps": 1e-3}))
def test_reference_causal_against_loops(options):
    tensors = inputs((2, 9, 2, 5), width_v=4, heads_kv=1, dtype=torch.float64)
    with fa.use_backend("reference"):
        y = fa.flow_attention(*tensors, causal=True, **options)
    torch.testing.assert_close(y, flow_oracle.heads(flow_oracle.causal, *tensors, **options), rtol=1e-12, atol=1e-12)


# Few tokens (with one, nothing reaches q and k), below, at and beyond one and two chunks; widths that fill no vector
# and more than one; shared key/value heads.
SHAPES = {
    "few tokens": ((2, 5, 1, 8), {}),
    "below a chunk": ((2, 63, 2, 16), {"width_v": 32}),
    "a chunk": ((1, 64, 1, 64), {"width_v": 64}),
    "odd": ((2, 131, 4, 20), {"width_v": 12, "heads_kv": 2}),
}


@both_forms
@pytest.mark.parametrize("feature_map", ("sigmoid", "relu"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_backends
def test_results_and_gradients(backend, place, dtype, shape, feature_map, causal):
    if not takes(backend, dtype) or (backend == "triton" and shape == "odd" and dtype == torch.float16):
        pytest.skip("not computed by this backend, or slow in the interpreter and covered by float32")
    size, extra = SHAPES[shape]
    check(backend, inputs(size, dtype=dtype, device=place, **extra), causal=causal, feature_map=feature_map)


@pytest.mark.parametrize("preset", [name for name in fa.FLOW_PRESETS if name != "lra"])
@on_backends
def test_presets(backend, place, preset):
    check(backend, inputs(device=place), **fa.FLOW_PRESETS[preset])


@both_forms
@pytest.mark.parametrize("options", ({"clamp": None}, {"extra_eps": 0.1}, {"eps": 1e-2}), ids=str)
@on_backends
def test_options(backend, place, options, causal):
    check(backend, inputs((1, 70, 2, 16), device=place), causal=causal, **options)


def test_preset_lra_runs_the_softmax_over_heads():
    q, k, v = inputs((1, 9, 4, 6), dtype=torch.float64)
    y = fa.flow_attention(q, k, v, **fa.FLOW_PRESETS["lra"])
    for b in range(4):  # with one head the weights are S, whatever flows
        one = fa.flow_attention(*(x[:, :, b : b + 1] for x in (q, k, v)), **fa.FLOW_PRESETS["lra"])
        assert one.shape == y[:, :, :1].shape
    fq, fk = (x[0, :, 0].clamp(min=0) + 1e-6 for x in (q, k))
    incoming = ((fq + 1e-6) * (fk.sum(0) + 1e-6)).sum(1)
    outgoing = ((fk + 1e-6) * (fq.sum(0) + 1e-6)).sum(1)
    allocation = torch.sigmoid(((fq + 1e-6) * ((fk / outgoing[:, None]).sum(0) + 1e-6)).sum(1))
    expected = (allocation / incoming)[:, None] * (fq @ fk.T @ v[0, :, 0]) * 9
    one = fa.flow_attention(*(x[:, :, :1] for x in (q, k, v)), **fa.FLOW_PRESETS["lra"])
    torch.testing.assert_close(one[0, :, 0], expected)


@pytest.mark.parametrize("sources", (5, 90))
@on_backends
def test_more_sinks_than_sources_and_fewer(backend, place, sources):
    check(backend, inputs((2, 37, 2, 16), sources=sources, device=place))


# --- identities


@both_forms
@on_backends
def test_one_token_gives_its_value_times_sigmoid_of_one(backend, place, causal):
    q, k, v = inputs((3, 1, 2, 16), device=place)
    y = fa.flow_attention(q, k, v, causal=causal)
    torch.testing.assert_close(y, SIGMA_1 * v, rtol=1e-5, atol=1e-6)


@both_forms
@on_backends
def test_constant_queries_and_keys_give_means(backend, place, causal):
    _, _, v = inputs((1, 70, 2, 8), width_v=16, device=place)
    x = torch.full((1, 70, 2, 8), 0.3, device=place)
    y = fa.flow_attention(x, x, v, causal=causal)
    means = v.cumsum(1) / torch.arange(1, 71, device=place)[:, None, None] if causal else v.mean(1, keepdim=True)
    torch.testing.assert_close(y, (SIGMA_1 * means).expand(y.shape), rtol=1e-4, atol=1e-5)


@both_forms
@on_backends
def test_linear_in_values(backend, place, causal):
    q, k, v = inputs(device=place)
    u = torch.randn_like(v)
    y, z, both = (fa.flow_attention(q, k, x, causal=causal) for x in (v, u, 2 * v - 3 * u))
    torch.testing.assert_close(both, 2 * y - 3 * z, rtol=1e-5, atol=1e-5)


@on_backends
def test_permuted_sources_change_nothing(backend, place):
    q, k, v = inputs(device=place)
    order = torch.randperm(37, device=place)
    y = fa.flow_attention(q, k, v)
    torch.testing.assert_close(fa.flow_attention(q, k[:, order], v[:, order]), y, rtol=1e-5, atol=1e-6)


def test_weights_sum_to_the_number_of_sources():
    """With q constant and k along v = k^-1 the weights themselves come out: sum_s w_s over q . k = 1."""
    q, k, _ = inputs((1, 40, 1, 1), sources=23, dtype=torch.float64)
    v = 1 / torch.sigmoid(k)
    y = fa.flow_attention(q, k, v, clamp=None, eps=0.0)
    fq, fk = torch.sigmoid(q), torch.sigmoid(k)
    conserved = fq * (fk / (fk * fq.sum(1, keepdim=True))).sum(1, keepdim=True)
    expected = torch.sigmoid(conserved * 40 / 23) / (fq * fk.sum(1, keepdim=True)) * fq * 23
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@on_backends
def test_causal_to_the_last_bit(backend, place):
    q, k, v = inputs((1, 140, 2, 16), device=place)
    before = fa.flow_attention(q, k, v, causal=True)
    for cut in (1, 63, 64, 100):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, cut:] = torch.randn_like(x[:, cut:]) * 3
        after = fa.flow_attention(*changed, causal=True)
        assert torch.equal(after[:, :cut], before[:, :cut]) and not torch.equal(after[:, cut:], before[:, cut:])


# --- masks and packed sequences


@both_forms
@on_backends
def test_masked_tokens_are_as_if_not_there(backend, place, causal):
    q, k, v = inputs((2, 70, 2, 16), width_v=8, device=place)
    mask = torch.rand(2, 70, device=place) > 0.4
    mask[0, :9], mask[1, 0] = False, True
    hidden = ~mask[..., None, None]
    k, v, q = (x.masked_fill(hidden, float("nan")) for x in (k, v, q))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    masks = {"key_mask": mask} if causal else {"key_mask": mask, "query_mask": mask}
    y = fa.flow_attention(*leaves, causal=causal, **masks)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, grad)
    assert y.masked_select(hidden).eq(0).all()
    for b in range(2):
        parts = [x[b : b + 1, mask[b]].detach().requires_grad_() for x in leaves]
        alone = fa.flow_attention(*parts, causal=causal)
        assert_near("y", y[b : b + 1, mask[b]], alone, 2e-6)
        for got, true in zip(grads, torch.autograd.grad(alone, parts, grad[b : b + 1, mask[b]])):
            assert got[b, ~mask[b]].eq(0).all()
            assert_near("gradient", got[b : b + 1, mask[b]], true, 2e-5)


@on_backends
def test_masks_of_sinks_and_sources_differ(backend, place):
    tensors = inputs((2, 37, 2, 16), sources=50, device=place)
    key_mask, query_mask = torch.rand(2, 50, device=place) > 0.5, torch.rand(2, 37, device=place) > 0.2
    check(backend, tensors, key_mask=key_mask, query_mask=query_mask)


@both_forms
@pytest.mark.parametrize("eps", (1e-6, 0.0))
@on_backends
def test_no_source_left_gives_zeros(backend, place, eps, causal):
    leaves = [x.requires_grad_() for x in inputs(device=place)]
    mask = torch.ones(2, 37, dtype=torch.bool, device=place)
    mask[1] = False
    y = fa.flow_attention(*leaves, key_mask=mask, causal=causal, eps=eps)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y[1].eq(0).all() and y.isfinite().all() and y[0].ne(0).any()
    assert all(x[1].eq(0).all() and x.isfinite().all() for x in grads)


@both_forms
@on_backends
def test_packed_equals_each_sequence(backend, place, causal):
    q, k, v = inputs((1, 150, 2, 16), width_v=8, heads_kv=1, device=place)
    leaves = [x[0].requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 0, 5, 6, 6, 70, 140, 140], device=place)
    mask = torch.rand(150, device=place) > 0.2
    options = {"causal": causal, "key_mask": mask, "query_mask": mask}
    y = fa.flow_attention(*leaves, cu_seqlens=ends, **options)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, grad)
    assert y[140:].eq(0).all() and all(x[140:].eq(0).all() for x in grads)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:]):
        if begin == end:
            continue
        parts = [x[None, begin:end].detach().requires_grad_() for x in leaves]
        part_masks = {name: mask[None, begin:end] for name in ("key_mask", "query_mask")}
        alone = fa.flow_attention(*parts, causal=causal, **part_masks)
        assert_near("y", y[None, begin:end], alone, 1e-6)
        for got, true in zip(grads, torch.autograd.grad(alone, parts, grad[None, begin:end])):
            assert_near("gradient", got[None, begin:end], true, 1e-5)


# --- states


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_backends
def test_states_and_their_gradients(backend, place, dtype):
    if not takes(backend, dtype):
        pytest.skip("not computed by this backend")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = random_state(2, 2, 16, 8, wide, place)
    check(backend, inputs((2, 70, 2, 16), width_v=8, dtype=dtype, device=place), state, causal=True)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)), ids=str)
@on_backends
def test_split_and_resume(backend, place, dtype, tolerance):
    if not takes(backend, dtype):
        pytest.skip("not computed by this backend")
    q, k, v = inputs((2, 150, 2, 16), dtype=dtype, device=place)
    whole, last = fa.flow_attention(q, k, v, causal=True, output_final_state=True)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 1), (1, 70), (70, 128), (128, 150)):
        piece = (x[:, begin:end] for x in (q, k, v))
        y, state = fa.flow_attention(*piece, causal=True, initial_state=state, output_final_state=True)
        parts.append(y)
    assert_near("y", torch.cat(parts, 1), whole, tolerance)
    assert state.n.tolist() == last.n.tolist() == [150, 150]
    for name, x, y in zip(fa.FlowState._fields, state, last):
        assert_near(name, x.double(), y.double(), 1e-6)


@on_backends
def test_steps_equal_the_parallel_form(backend, place):
    q, k, v = inputs((2, 70, 4, 16), heads_kv=2, device=place)
    whole = fa.flow_attention(q, k, v, causal=True, clamp=5.0)
    state, rows = None, []
    for t in range(70):
        y, state = fa.flow_attention_step(q[:, t], k[:, t], v[:, t], state, clamp=5.0)
        rows.append(y)
    assert_near("y", torch.stack(rows, 1), whole, 1e-6)


def test_count_of_masked_and_packed_tokens():
    q, k, v = inputs((1, 9, 1, 4))
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1]]).bool()
    ends = torch.tensor([0, 3, 3, 8])
    options = {"causal": True, "output_final_state": True}
    assert fa.flow_attention(q, k, v, key_mask=mask, **options)[1].n.tolist() == [6]
    assert fa.flow_attention(q, k, v, cu_seqlens=ends, **options)[1].n.tolist() == [3, 0, 5]
    assert fa.flow_attention(q, k, v, cu_seqlens=ends, query_mask=mask, **options)[1].n.tolist() == [2, 0, 3]


@on_backends
def test_empty_sequences_pass_their_state_on(backend, place):
    state = random_state(3, 2, 16, 8, torch.float32, place)
    q, k, v = inputs((1, 9, 2, 16), width_v=8, device=place)
    leaves = fa.FlowState(*(x.clone().requires_grad_() if x.is_floating_point() else x for x in state))
    ends = torch.tensor([0, 0, 9, 9], device=place)
    _, last = fa.flow_attention(
        q, k, v, causal=True, cu_seqlens=ends, initial_state=leaves, output_final_state=True
    )  # fmt: skip
    grads = torch.autograd.grad([x.sum() for x in floats(last)], floats(leaves))
    assert last.n.tolist() == [5, 15, 7]
    for x, y, dx in zip(floats(last), floats(state), grads):
        assert torch.equal(x[[0, 2]], y[[0, 2]]) and dx[[0, 2]].eq(1).all()


def test_long_sums_are_compensated(native):
    """Half a million equal tokens: the sums of q and k keep full precision; that of k (w v)^T, added up chunk by chunk
    in float32, keeps four digits in this worst case, in which every rounding error has the same sign."""
    length = 1 << 19
    x = torch.full((1, length, 1, 8), 0.3)
    v = torch.ones(1, length, 1, 8)
    with torch.no_grad():
        y, state = fa.flow_attention(x, x, v, causal=True, output_final_state=True)
    truth = length * torch.sigmoid(torch.tensor(0.3, dtype=torch.float64)).item()
    assert abs(state.k1.double() / truth - 1).max() < 1e-7
    assert abs(fa.flow_attention(x, x, v) / SIGMA_1 - 1).max() < 5e-5
    assert abs(y / SIGMA_1 - 1).max() < 5e-5


# --- edges


@both_forms
@pytest.mark.parametrize("shape", ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)), ids=str)
@on_backends
def test_nothing_to_do(backend, place, shape, causal):
    if shape[2] == 0:
        with pytest.raises(ValueError, match="heads of k"):
            fa.flow_attention(*inputs(shape, device=place), causal=causal)
        return
    leaves = [x.requires_grad_() for x in inputs(shape, device=place)]
    y = fa.flow_attention(*leaves, causal=causal)
    assert y.shape == (*shape[:3], 12)
    assert all(dx.shape == x.shape for dx, x in zip(torch.autograd.grad(y.sum(), leaves), leaves))


@on_backends
def test_no_sources_and_no_sinks(backend, place):
    q, k, v = (x.requires_grad_() for x in inputs((2, 5, 2, 8), sources=0, device=place))
    y = fa.flow_attention(q, k, v)
    assert y.eq(0).all() and torch.autograd.grad(y.sum(), q)[0].eq(0).all()
    q, k, v = (x.requires_grad_() for x in inputs((2, 0, 2, 8), sources=6, device=place))
    for x in torch.autograd.grad(fa.flow_attention(q, k, v).sum(), (k, v)):
        assert x.eq(0).all()


@both_forms
@pytest.mark.parametrize("feature_map", ("sigmoid", "relu"))
@on_backends
def test_extreme_values_stay_finite(backend, place, feature_map, causal):
    q, k, v = inputs((1, 40, 2, 16), device=place, spread=1e4 if feature_map == "sigmoid" else 1.0)
    if feature_map == "relu":
        k[:, :, 0] = -1.0  # phi is 1e-6 everywhere
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = fa.flow_attention(*leaves, causal=causal, feature_map=feature_map)
    assert y.isfinite().all() and all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), leaves))


@both_forms
@on_backends
def test_any_strides(backend, place, causal):
    q, k, v = inputs((2, 13, 3, 8), width_v=8, device=place)
    expected = fa.flow_attention(q, k, v, causal=causal)
    packed = torch.cat([q, k, v], -1)  # one projection, as a layer makes it
    views = packed.split(8, -1)
    same = torch.allclose if backend == "reference" else torch.equal  # plain torch adds in an order of its own
    assert same(fa.flow_attention(*views, causal=causal), expected)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert same(fa.flow_attention(*heads_first, causal=causal), expected)
    mask = torch.rand(13, 2, device=place).T > 0.3
    masked = [fa.flow_attention(q, k, v, causal=causal, key_mask=m) for m in (mask, mask.contiguous())]
    assert same(*masked)


@both_forms
@on_backends
def test_only_the_query_needs_a_gradient(backend, place, causal):
    q, k, v = inputs((1, 20, 2, 8), device=place)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    all_grads = torch.autograd.grad(fa.flow_attention(*leaves, causal=causal).sum(), leaves)
    q.requires_grad_()
    (alone,) = torch.autograd.grad(fa.flow_attention(q, k, v, causal=causal).sum(), q)
    assert torch.equal(alone, all_grads[0])


@both_forms
@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
def test_gradcheck(backend, causal):
    leaves = [x.requires_grad_() for x in inputs((1, 6, 2, 3), width_v=2, heads_kv=1, dtype=torch.float64)]
    options = {"causal": causal, "clamp": 5.0}
    assert torch.autograd.gradcheck(lambda *x: fa.flow_attention(*x, **options), leaves)


def test_gradcheck_of_states(native):
    state = random_state(1, 1, 3, 2, torch.float64, "cpu")
    leaves = [x.requires_grad_() for x in (*inputs((1, 5, 1, 3), width_v=2, dtype=torch.float64), *floats(state))]

    def call(q, k, v, *parts):
        initial = fa.FlowState(*parts[:5], state.n, parts[5])
        y, last = fa.flow_attention(
            q, k, v, causal=True, clamp=5.0, initial_state=initial, output_final_state=True
        )  # fmt: skip
        return y, *floats(last)

    assert torch.autograd.gradcheck(call, leaves)


@both_forms
def test_bitwise_independent_of_threads(native, causal):
    leaves = [x.requires_grad_() for x in inputs((3, 200, 3, 16))]

    def call():
        y = fa.flow_attention(*leaves, causal=causal)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    before = torch.get_num_threads()
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(call())
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results))


@both_forms
@on_backends
def test_autocast_runs_in_its_dtype(backend, place, causal):
    if not takes(backend, torch.bfloat16):
        pytest.skip("not computed by this backend")
    q, k, v = inputs((1, 20, 2, 16), device=place)
    with torch.autocast(place, dtype=torch.bfloat16):
        y = fa.flow_attention(q, k, v, causal=causal)
    assert torch.equal(y, fa.flow_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal))


def test_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
