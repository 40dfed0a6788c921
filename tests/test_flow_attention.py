"""Flow-Attention: results and gradients of every backend against float64, identities, masks, packed sequences."""

import doctest

import flow_attention_oracle as oracle
import pytest
import torch
from flow_attention_oracle import SIGMA_1, TOLERANCE, assert_near, both_forms, check, inputs, on_backends, takes

import flowattn as fa
from flowattn.ops import flow_attention as module

# --- the formulas


@pytest.mark.parametrize("options", ({}, {"clamp": None}, {"feature_map": "relu"}, {"extra_eps": 1e-2, "eps": 1e-3}))
def test_reference_whole_against_loops(options):
    tensors = inputs((2, 7, 2, 5), sources=6, width_v=4, heads_kv=1, dtype=torch.float64)
    with fa.use_backend("reference"):
        y = fa.flow_attention(*tensors, **options)
    torch.testing.assert_close(y, oracle.heads(oracle.whole, *tensors, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ({}, {"clamp": 5.0}, {"clamp": 10.0, "feature_map": "relu"}, {"eps": 1e-3}))
def test_reference_causal_against_loops(options):
    tensors = inputs((2, 9, 2, 5), width_v=4, heads_kv=1, dtype=torch.float64)
    with fa.use_backend("reference"):
        y = fa.flow_attention(*tensors, causal=True, **options)
    torch.testing.assert_close(y, oracle.heads(oracle.causal, *tensors, **options), rtol=1e-12, atol=1e-12)


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


@both_forms
@pytest.mark.parametrize("backend", ("triton",), indirect=True)
def test_heads_cut_into_parts(backend, place, causal):
    """One long head is not one program: its parts meet in several launches instead of one."""
    tensors = inputs((1, 600, 1, 16), sources=600 if causal else 530, device=place)
    check(backend, tensors, causal=causal)
    key_mask, query_mask = (torch.rand(x.shape[:2], device=place) > 0.3 for x in (tensors[1], tensors[0]))
    key_mask[:, :256] = False  # a part without a source
    check(backend, tensors, causal=causal, clamp=None, key_mask=key_mask, query_mask=query_mask)


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
