"""linear_attention against a float64 loop over tokens: modes, decays, feature maps, shapes, ranges."""

import math

import pytest
import torch
from linear_attention_oracle import BF16, F16, F32, F64, MAPS, assert_near, check, oracle

import flowattn as fa
from flowattn.reference.linear_attention import recurrence

on_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
MODES = {"causal": {}, "reverse": {"reverse": True}, "full": {"causal": False}}
PRESETS = ("retnet", "vir", "lightning", "lightning_layers")
DTYPES = (F64, F32, BF16, F16)


def wide(dtype):
    return F64 if dtype == F64 else F32


def inputs(length=70, dtype=F32, batch=2, heads=4, heads_kv=2, width=16, value_width=24, keys=None):
    keys = length if keys is None else keys
    q = torch.randn(batch, length, heads, width)
    k = torch.randn(batch, keys, heads_kv, width)
    v = torch.randn(batch, keys, heads_kv, value_width)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def state(states=2, heads=4, width=16, value_width=24, dtype=F32):
    return torch.randn(states, heads, width, value_width, dtype=dtype), torch.rand(states, heads, width, dtype=dtype)


def log_gates(*shape, divide=1.0):
    return torch.nn.functional.logsigmoid(torch.randn(*shape)) / divide


@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalize"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@on_backends
def test_modes(backend, place, mode, dtype, normalize):
    """Grouped heads, D != M, masked keys, token scales with gradient, states in and out."""
    options = {"normalize": True, "feature_map": "sigmoid"} if normalize else {}
    check(
        *inputs(dtype=dtype), place=place, key_mask=torch.rand(2, 70) > 0.2, learn=("token_scale",),
        token_scale=torch.rand(2, 70, dtype=wide(dtype)) + 0.5, initial_state=state(dtype=wide(dtype)),
        **MODES[mode], **options,
    )  # fmt: skip


@pytest.mark.parametrize("gate", ("head", "token"))
@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalize"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ("causal", "reverse", "both"))
@on_backends
def test_decays(backend, place, mode, dtype, normalize, gate):
    options = dict({"both": {"causal": False}} | MODES)[mode]
    options = options | ({"normalize": True, "feature_map": "elu1"} if normalize else {})
    if mode != "both":
        options["initial_state"] = state(dtype=wide(dtype))
    decay = (log_gates(4) if gate == "head" else log_gates(2, 70, 4)).to(wide(dtype))
    check(*inputs(dtype=dtype), place=place, decay=decay, learn=("decay",), **options)


@pytest.mark.parametrize("divide", (0.1, 1.0, 10.0))
@pytest.mark.parametrize("gate", ("head", "token"))
@on_backends
def test_strengths_of_decay(backend, place, gate, divide):
    decay = log_gates(4, divide=divide) if gate == "head" else log_gates(2, 150, 4, divide=divide)
    check(*inputs(150), place=place, decay=decay, learn=("decay",), key_mask=torch.rand(2, 150) > 0.3)


@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalize"))
@pytest.mark.parametrize("name", MAPS)
@on_backends
def test_feature_maps(backend, place, name, normalize):
    q, k, v = inputs()
    if name == "identity" and normalize:
        q, k = q.abs(), k.abs()  # its sums can cross 0
    q.view(-1)[:5], k.view(-1)[:5] = 0.0, 0.0  # where relu and elu1 have a kink
    check(q, k, v, place=place, feature_map=name, normalize=normalize, causal=True)


def test_functions_as_feature_maps():
    q, k, v = inputs()
    named = fa.linear_attention(q, k, v, feature_map="sigmoid", normalize=True)
    torch.testing.assert_close(fa.linear_attention(q, k, v, feature_map=torch.sigmoid, normalize=True), named)


@pytest.mark.parametrize("lengths", ((40, 9), (9, 40), (5, 0), (0, 5)), ids=str)
@on_backends
def test_queries_and_keys_of_other_lengths(backend, place, lengths):
    check(
        *inputs(lengths[0], keys=lengths[1]), place=place, causal=False, normalize=True, feature_map="relu_eps",
        key_mask=torch.rand(2, lengths[1]) > 0.3,
    )  # fmt: skip


@pytest.mark.parametrize("packed", (False, True))
@on_backends
def test_keys_too_large_for_exp(backend, place, packed):
    """Without causal, the largest key of a sequence is subtracted first."""
    q, k, v = inputs(30, batch=1)
    options = {"causal": False, "feature_map": "exp", "normalize": True, "key_mask": torch.rand(1, 30) > 0.3}
    options["cu_seqlens"] = torch.tensor([0, 11, 11, 26]) if packed else None
    small, large = (fa.linear_attention(q, k + shift, v, **options) for shift in (0.0, 300.0))
    assert_near("o", large, small.double(), 1e-4)


SHAPES = [  # T, D, M, H
    (1, 8, 8, 1), (15, 8, 16, 3), (16, 16, 8, 4), (63, 32, 16, 1), (64, 60, 30, 3), (65, 64, 128, 1),
    (127, 72, 72, 2), (500, 64, 64, 1), (913, 16, 32, 1), (129, 100, 50, 2), (66, 80, 96, 1), (70, 128, 64, 2),
    (130, 256, 128, 1), (65, 250, 256, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}-D{}-M{}-H{}".format(*shape))
def test_shapes(native, shape):
    length, width, value_width, heads = shape
    sizes = {"batch": 1, "heads": heads, "heads_kv": 1, "width": width, "value_width": value_width}
    check(*inputs(length, **sizes), decay=log_gates(1, length, heads, divide=10.0), learn=("decay",))


@pytest.mark.parametrize("length", (1000, 1024, 1213, 2048, 16384))
def test_lengths(native, length):
    """Against the reference in float64, itself checked against the loop above."""
    q, k, v = (x.requires_grad_() for x in inputs(length, batch=1, heads=2, width=8, value_width=8))
    decay, do = log_gates(1, length, 2).requires_grad_(), torch.randn(1, length, 2, 8)
    leaves = (q, k, v, decay)
    out = fa.linear_attention(*leaves[:3], decay=decay)
    got = out, *torch.autograd.grad(out, leaves, do)
    with fa.use_backend("reference"):
        leaves = [x.detach().double().requires_grad_() for x in leaves]
        out = fa.linear_attention(*leaves[:3], decay=leaves[3])
        true = out, *torch.autograd.grad(out, leaves, do.double())
    for name, x, y, tolerance in zip(("o", "dq", "dk", "dv", "dg"), got, true, (2e-6, 5e-6, 5e-6, 5e-6, 2e-5)):
        assert_near(name, x, y, tolerance)


# --- forms that must agree


def test_decay_presets():
    """Numbers worked out by hand from the published formulas."""
    gamma = {name: fa.decay_preset(name, 4, layer=1, layers=2).exp() for name in PRESETS}
    expected = {
        "retnet": [31 / 32, 63 / 64, 127 / 128, 255 / 256],
        "vir": [31 / 32, 1 - 2 ** (-19 / 3), 1 - 2 ** (-23 / 3), 511 / 512],
        "lightning": [math.exp(-(2.0**-n)) for n in (2, 4, 6, 8)],
        "lightning_layers": [math.exp(-h) for h in range(4)],
    }
    for name in PRESETS:
        torch.testing.assert_close(gamma[name], torch.tensor(expected[name]))
    six = [2.0**-n for n in (2, 4, 6, 8, 1, 3)]  # no power of two: those of 4, then every other of 8
    torch.testing.assert_close(-fa.decay_preset("lightning", 6), torch.tensor(six))
    with pytest.raises(ValueError, match="decay_preset: name must be"):
        fa.decay_preset("rwkv", 4)


@pytest.mark.parametrize("preset", PRESETS)
@on_backends
def test_parallel_chunked_and_recurrent_forms(backend, place, preset):
    q, k, v = (x.to(place) for x in inputs(100, heads_kv=4))
    decay = fa.decay_preset(preset, 4, device=place)
    apart = (torch.arange(100)[:, None] - torch.arange(100)).to(place)
    weights = torch.where(apart >= 0, decay.double()[:, None, None] * apart, float("-inf")).exp()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * weights * 16**-0.5
    parallel = torch.einsum("bhij,bjhm->bihm", scores, v.double())
    chunked, final = fa.linear_attention(q, k, v, decay=decay, output_final_state=True)
    state, outs = None, []
    for t in range(100):
        o, state = fa.linear_attention_step(q[:, t], k[:, t], v[:, t], state, decay=decay)
        outs.append(o)
    assert_near("chunked", chunked, parallel, 2e-6)
    assert_near("recurrent", torch.stack(outs, 1), parallel, 2e-6)
    assert_near("state", state.s, final.s.double(), 2e-6)


@on_backends
def test_steps_with_every_option(backend, place):
    q, k, v = (x.to(place) for x in inputs(9))
    decay, token_scale = log_gates(2, 9, 4).to(place), torch.rand(2, 9, device=place)
    options = {"feature_map": "elu1", "normalize": True, "scale": 0.3, "eps": 1e-3}
    whole, last = fa.linear_attention(q, k, v, decay=decay, token_scale=token_scale, output_final_state=True, **options)
    state = None
    for t in range(9):
        o, state = fa.linear_attention_step(
            q[:, t], k[:, t], v[:, t], state, decay=decay[:, t], token_scale=token_scale[:, t], **options
        )
        assert_near("o", o, whole[:, t].double(), 1e-6)
    assert_near("s", state.s, last.s.double(), 1e-6)
    assert_near("z", state.z, last.z.double(), 1e-6)


def test_normalised_constant_keys_give_running_means(native):
    v = torch.randn(1, 50, 2, 8)
    ones = torch.ones(1, 50, 2, 4)
    mean = v.cumsum(1) / torch.arange(1, 51).view(1, -1, 1, 1)
    torch.testing.assert_close(fa.linear_attention(ones, ones, v, normalize=True), mean)


# --- ranges


@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@on_backends
def test_elu1_of_very_negative_numbers(backend, place, dtype):
    """elu(x) + 1 in bfloat16 is 0 from about -8 down; phi must be e^x, and its derivative too."""
    x = torch.linspace(-20 if dtype != F16 else -7, -4, 64).to(dtype).view(64, 1, 1, 1).to(place).requires_grad_()
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    out = fa.linear_attention(x, zero, one, feature_map="elu1", scale=1.0)
    (dx,) = torch.autograd.grad(out.sum(), x)
    true = x.detach().double().exp()
    for value in (out, dx):
        assert value.ne(0).all()
        torch.testing.assert_close(value.double(), true, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)
    key = fa.linear_attention(zero, x, one, feature_map="elu1", scale=1.0)
    torch.testing.assert_close(key.double(), true, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)


@pytest.mark.parametrize("name", ("elu1", "relu", "sigmoid", "softmax", "exp"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@on_backends
def test_large_raw_values(backend, place, dtype, name):
    q, k, v = (x.to(place) for x in inputs(66, dtype=dtype))
    leaves = [(q * 1e4).requires_grad_(), (k * (1e4 if name != "exp" else 20)).requires_grad_(), v.requires_grad_()]
    out = fa.linear_attention(*leaves, feature_map=name, normalize=True)
    assert out.isfinite().all()
    for x in torch.autograd.grad(out.sum(), leaves):
        assert x.isfinite().all()


@on_backends
def test_keys_that_vanish(backend, place):
    """All phi(k) = 0: the normaliser is eps, the result 0."""
    q, k, v = (x.to(place).requires_grad_() for x in inputs(20))
    out = fa.linear_attention(q, k - 100, v, feature_map="relu", normalize=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.eq(0).all() and all(x.eq(0).all() for x in grads)


@on_backends
def test_masked_keys_leave_no_trace(backend, place):
    q, k, v = (x.to(place) for x in inputs(40))
    mask = (torch.rand(2, 40) > 0.4).to(place)
    other_k, other_v = (torch.where(mask[..., None, None], x, 1e3 * torch.randn_like(x)) for x in (k, v))
    options = {"feature_map": "sigmoid", "normalize": True, "key_mask": mask}
    assert torch.equal(fa.linear_attention(q, k, v, **options), fa.linear_attention(q, other_k, other_v, **options))
    leaf = k.clone().requires_grad_()
    (dk,) = torch.autograd.grad(fa.linear_attention(q, leaf, v, **options).sum(), leaf)
    assert dk[~mask].eq(0).all() and dk[mask].ne(0).any()
    nothing = fa.linear_attention(q, k, v, feature_map="relu", normalize=True, key_mask=torch.zeros_like(mask))
    assert nothing.eq(0).all()


@pytest.mark.parametrize("decay", (-0.03175, -1.0, -50.0, -1e6, float("-inf")))
def test_strong_decay_over_131072_tokens(native, decay):
    q, k, v = (x.requires_grad_() for x in inputs(131072, batch=1, heads=1, heads_kv=1, width=8, value_width=8))
    gates = torch.full((1, 131072, 1), decay).requires_grad_()
    out, final = fa.linear_attention(q, k, v, decay=gates, output_final_state=True)
    grads = torch.autograd.grad(out.square().sum() + final.s.sum(), (q, k, v, gates))
    assert all(x.isfinite().all() for x in (out, final.s, *grads))
    tail = slice(131072 - 2048, None)  # 31/32 has decayed to 5e-29 over it
    parts = [x[:, tail].detach() for x in (q, k, v)]
    true, _, _ = oracle(*parts, decay=gates[:, tail].detach())
    assert_near("o", out[:, -200:], true[:, -200:], 2e-6)


def test_a_reset_in_the_middle_of_a_chunk(native):
    """Gates after a strong one keep their digits."""
    gates = torch.full((1, 60, 1), -0.01)
    gates[:, 20] = -1e30
    check(*inputs(60, batch=1, heads=1, heads_kv=1), decay=gates)


def test_a_million_tokens(native):
    length = 1 << 20
    q, k, v = inputs(length, batch=1, heads=1, heads_kv=1, width=4, value_width=4)
    out = fa.linear_attention(q, k, v, decay=torch.tensor([-0.1]))
    part = [x[:, -500:] for x in (q, k, v)]
    assert_near("o", out[:, -100:], oracle(*part, decay=torch.tensor([-0.1]))[0][:, -100:], 2e-6)


def test_no_worse_than_plain_torch(native):
    """In bfloat16, against the masked product of scores; float64 is the truth."""
    q, k, v = inputs(300, dtype=BF16, heads_kv=4, width=64, value_width=64)
    true, _, _ = oracle(q, k, v)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril() * 0.125
    plain = torch.einsum("bhij,bjhm->bihm", scores, v)
    error, allowed = ((x.double() - true).square().mean().sqrt() for x in (fa.linear_attention(q, k, v), plain))
    assert error <= 1.5 * allowed


def test_the_recurrence_of_the_reference_needs_no_tokens():
    empty = torch.zeros(1, 0, 1, 2)
    y, c, s, z = recurrence(empty, empty, empty, None, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2))
    assert y.shape == (1, 0, 1, 2) and c.shape == (1, 0, 1) and s.eq(1).all() and z.eq(1).all()
