"""linear_attention: packed sequences, states, strides, threads, registration, errors."""

import pytest
import torch
from linear_attention_oracle import BF16, F16, F32, F64, assert_near, check

import flowattn as fa
from flowattn.reference.linear_attention import CAUSAL, NON_CAUSAL

on_backends = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
MODES = {"causal": {}, "reverse": {"reverse": True}, "full": {"causal": False}}
NORMALIZED = {"normalize": True, "feature_map": "elu1"}


def rows(length, dtype=F32, heads=2, width=8, value_width=12, batch=1):
    q, k = (torch.randn(batch, length, heads, width).to(dtype) for _ in range(2))
    return q, k, torch.randn(batch, length, heads, value_width).to(dtype)


def state(states=1, heads=2, width=8, value_width=12, dtype=F32):
    return torch.randn(states, heads, width, value_width, dtype=dtype), torch.rand(states, heads, width, dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ([0, 0, 1, 20, 20, 61], [0, 15], [0, 70]), ids=str)
@on_backends
def test_packed(backend, place, ends, mode):
    """Empty sequences, sequences of one token, rows beyond the last."""
    states = len(ends) - 1
    check(
        *rows(70), place=place, cu_seqlens=torch.tensor(ends, dtype=torch.int32), initial_state=state(states),
        key_mask=torch.rand(1, 70) > 0.2, token_scale=torch.rand(1, 70), learn=("token_scale", "decay"),
        decay=None if mode == "full" else -torch.rand(1, 70, 2), **NORMALIZED, **MODES[mode],
    )  # fmt: skip


@on_backends
def test_no_sequences(backend, place):
    q, k, v = (x.to(place).requires_grad_() for x in rows(9))
    cu = torch.zeros(1, dtype=torch.int32, device=place)
    out, final = fa.linear_attention(q, k, v, cu_seqlens=cu, output_final_state=True, **NORMALIZED)
    assert out.eq(0).all() and final.s.shape == (0, 2, 8, 12)
    for x in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True, materialize_grads=True):
        assert x.eq(0).all()


@pytest.mark.parametrize("ends", ([0, 15, 100, 300, 1200, 2000], [0, 256, 500, 1000], [0, 1, 100, 100, 2048]), ids=str)
def test_packed_equals_each_sequence_bitwise(native, ends):
    q, k, v = (x[0] for x in rows(ends[-1] + 9))
    decay, initial = -torch.rand(len(q), 2), fa.LinearState(*state(len(ends) - 1))
    cu = torch.tensor(ends)
    out, final = fa.linear_attention(
        q, k, v, decay=decay, cu_seqlens=cu, initial_state=initial, output_final_state=True, **NORMALIZED
    )
    assert out.shape == (len(q), 2, 12) and out[ends[-1] :].eq(0).all()
    for i, (begin, end) in enumerate(zip(ends, ends[1:])):
        part = (x[None, begin:end] for x in (q, k, v))
        own, last = fa.linear_attention(
            *part, decay=decay[None, begin:end], initial_state=tuple(x[i : i + 1] for x in initial),
            output_final_state=True, **NORMALIZED,
        )  # fmt: skip
        assert torch.equal(out[begin:end], own[0])
        assert torch.equal(final.s[i], last.s[0]) and torch.equal(final.z[i], last.z[0])


@on_backends
def test_both_directions_of_packed_sequences(backend, place):
    q, k, v = rows(40)
    check(q, k, v, place=place, causal=False, decay=-torch.rand(2), learn=("decay",), **NORMALIZED,
          cu_seqlens=torch.tensor([0, 3, 3, 30]))  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", ((F64, 1e-13), (F32, 1e-6), (BF16, 1e-3), (F16, 1e-3)), ids=str)
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@on_backends
def test_split_and_resume(backend, place, dtype, tolerance, reverse):
    """At random points, with gradients flowing through the states between the pieces."""
    q, k, v = (x.to(place).requires_grad_() for x in rows(150, dtype, batch=2))
    decay = (-torch.rand(2, 150, 2)).to(place)
    do = torch.randn(v.shape).to(v)
    options = {"reverse": reverse, "output_final_state": True, **NORMALIZED}
    whole, last = fa.linear_attention(q, k, v, decay=decay, **options)
    expected = torch.autograd.grad([whole, last.s], (q, k, v), [do, torch.ones_like(last.s)])
    cuts = [0, *sorted(torch.randint(0, 151, (4,)).tolist()), 150]
    spans = list(zip(cuts, cuts[1:]))
    outs, carried = {}, None
    for begin, end in reversed(spans) if reverse else spans:
        part = slice(begin, end)
        outs[begin, end], carried = fa.linear_attention(
            q[:, part], k[:, part], v[:, part], decay=decay[:, part], initial_state=carried, **options
        )
    out = torch.cat([outs[span] for span in spans], 1)
    assert_near("o", out, whole.double(), tolerance)
    assert_near("s", carried.s, last.s.double(), tolerance)
    got = torch.autograd.grad([out, carried.s], (q, k, v), [do, torch.ones_like(last.s)])
    for name, x, y in zip("qkv", got, expected):
        assert_near(f"d{name}", x, y.double(), 3 * tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ((0, 5, 2), (2, 0, 2), (1, 1, 1)), ids=str)
@on_backends
def test_few_or_no_tokens(backend, place, shape, mode):
    batch, length, heads = shape
    leaves = [x.to(place).requires_grad_() for x in rows(length, batch=batch, heads=heads)]
    states = tuple(x.to(place).requires_grad_() for x in state(batch, heads))
    out, final = fa.linear_attention(
        *leaves, initial_state=states, output_final_state=True, **NORMALIZED, **MODES[mode]
    )
    assert out.shape == (batch, length, heads, 12)
    total = out.sum() + 2 * final.s.sum() + 3 * final.z.sum()
    grads = torch.autograd.grad(total, [*leaves, *states], allow_unused=True, materialize_grads=True)
    assert [x.shape for x in grads] == [x.shape for x in (*leaves, *states)]
    if length == 0:
        assert torch.equal(final.s, states[0]) and torch.equal(final.z, states[1])
        assert grads[3].eq(2).all() and grads[4].eq(3).all()


@pytest.mark.parametrize("mode", MODES)
@on_backends
def test_any_strides(backend, place, mode):
    q, k, v = (x.to(place) for x in rows(40, batch=2))
    decay = None if mode == "full" else -torch.rand(2, 40, 2).to(place)
    options = {"decay": decay, **NORMALIZED, **MODES[mode]}
    expected = fa.linear_attention(q, k, v, **options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    packed = torch.randn(2, 40, 2, 3, 12).to(place)
    packed[..., 0, :8], packed[..., 1, :8], packed[..., 2, :] = q, k, v
    views = packed[..., 0, :8], packed[..., 1, :8], packed[..., 2, :]
    for given in (heads_first, views):
        assert torch.equal(fa.linear_attention(*given, **options), expected)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fa.linear_attention(*leaves, **options)
    from_sum = torch.autograd.grad(out.sum(), leaves, retain_graph=True)  # the gradient of sum has strides 0
    from_ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(from_sum, from_ones))


def test_expanded_keys_of_one_head(native):
    q, k, v = rows(30, heads=4)
    one_k, one_v = k[:, :, :1], v[:, :, :1]
    expanded = fa.linear_attention(q, one_k.expand(-1, -1, 4, -1), one_v.expand(-1, -1, 4, -1))
    assert torch.equal(fa.linear_attention(q, one_k, one_v), expanded)


@on_backends
def test_only_one_input_wants_a_gradient(backend, place):
    q, k, v = (x.to(place) for x in rows(20))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(fa.linear_attention(*leaves).sum(), leaves)
    for i in range(3):
        inputs = [leaves[j] if j == i else x for j, x in enumerate((q, k, v))]
        assert torch.equal(torch.autograd.grad(fa.linear_attention(*inputs).sum(), leaves[i])[0], expected[i])


@pytest.mark.parametrize("length, heads", ((9001, 1), (200, 3)), ids=("long", "short"))
@pytest.mark.parametrize("causal", (True, False))
def test_bitwise_independent_of_threads(native, length, heads, causal):
    """One row of 9001 tokens is cut where there are three threads or more."""
    tensors = rows(length, heads=heads)
    decay, do = -torch.rand(1, length, heads), torch.randn(1, length, heads, 12)

    def call(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [x.clone().requires_grad_() for x in (*tensors, decay)]
            out, final = fa.linear_attention(
                *leaves[:3], decay=leaves[3] if causal else None, causal=causal, output_final_state=True, **NORMALIZED
            )
            wanted = leaves if causal else leaves[:3]
            return out, final.s, *torch.autograd.grad([out, final.s], wanted, [do, torch.ones_like(final.s)])
        finally:
            torch.set_num_threads(before)

    one, two, eight = (call(n) for n in (1, 2, 8))
    for x, y, z in zip(one, two, eight):
        assert torch.equal(x, y) and torch.equal(x, z)


# --- registration, compilation


@pytest.mark.parametrize("mode", ("causal", "reverse", "full", "both"))
@on_backends
def test_gradcheck(backend, mode):
    q, k = (torch.randn(2, 5, 2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 5, 2, 2, dtype=F64, requires_grad=True)
    states = [torch.rand(2, 2, 3, 2, dtype=F64, requires_grad=True), torch.rand(2, 2, 3, dtype=F64, requires_grad=True)]
    decay = (-torch.rand(2, 5, 2, dtype=F64)).requires_grad_()
    options = dict(MODES | {"both": {"causal": False}})[mode] | {"normalize": True, "feature_map": "softmax"}
    if mode == "both":
        assert torch.autograd.gradcheck(
            lambda q, k, v, g: fa.linear_attention(q, k, v, decay=g, **options), (q, k, v, decay)
        )
        return

    def call(q, k, v, s, z, g):
        out, final = fa.linear_attention(
            q, k, v, initial_state=(s, z), decay=None if mode == "full" else g, output_final_state=True, **options
        )
        return out, final.s, final.z

    assert torch.autograd.gradcheck(call, (q, k, v, *states, decay))


def test_gradients_of_gradients_are_refused(native):
    q, k, v = (x.requires_grad_() for x in rows(5))
    (dq,) = torch.autograd.grad(fa.linear_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_opcheck(native):
    torch.use_deterministic_algorithms(False)  # opcheck compares with runs on other memory
    fwd, bwd = torch.ops.flowattn.linear_attention_fwd.default, torch.ops.flowattn.linear_attention_bwd.default
    q, k, v = rows(7, batch=2)
    weight, decay = torch.ones(2, 7), -torch.rand(2, 7, 2)
    plain = (q, k, v, None, None, None, None, None, None, 0.5, 1e-6, 0, 0, NON_CAUSAL, False)
    full = (q, k, v, decay, weight, weight, *state(2), None, 0.5, 1e-6, 1, 1, CAUSAL, True)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = (*rows(7, BF16), None, None, None, None, None, cu, 0.5, 1e-6, 0, 0, CAUSAL, False)
    for call in (plain, full, packed):
        torch.library.opcheck(fwd, call)
        out, den, s, z = fwd(*call)
        grads = (torch.randn_like(out), torch.randn_like(s), torch.randn_like(z) if call[-1] else None)
        torch.library.opcheck(bwd, (*grads, *call[:9], out, den, s, z, *call[9:], call[3] is not None))


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("mode", ("causal", "full", "both"))
def test_compiles_without_graph_breaks(native, mode, dynamic):
    leaves = [x.requires_grad_() for x in (*rows(9, batch=2), -torch.rand(2))]
    options = dict(MODES | {"both": {"causal": False}})[mode] | NORMALIZED

    def call(q, k, v, decay):
        if mode == "both":
            return fa.linear_attention(q, k, v, decay=decay, **options).square().sum()
        out, final = fa.linear_attention(
            q, k, v, decay=decay if mode == "causal" else None, output_final_state=True, **options
        )
        return out.square().sum() + final.s.sum()

    wanted = leaves if mode != "full" else leaves[:3]
    expected = torch.autograd.grad(call(*leaves), wanted)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), wanted), expected):
        torch.testing.assert_close(got, want)


def test_autocast_inference_mode_and_explain(native, capsys):
    q, k, v = rows(9)
    with torch.autocast("cpu", dtype=BF16):
        out, final = fa.linear_attention(q, k, v, output_final_state=True)
    assert out.dtype == BF16 and final.s.dtype == F32
    with torch.inference_mode():
        assert torch.equal(fa.linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()), out)
    assert fa.explain("linear_attention", q, k, v) == "cpu"
    assert "triton" in capsys.readouterr().out


def test_states_of_other_shapes_and_kinds(native):
    q, k, v = rows(9)
    s, z = state()
    expected = fa.linear_attention(q, k, v, initial_state=fa.LinearState(s, z), **NORMALIZED)
    assert torch.equal(fa.linear_attention(q, k, v, initial_state=(s, z.unsqueeze(1)), **NORMALIZED), expected)
    out, final = fa.linear_attention(q, k, v, initial_state=(s, None), output_final_state=True)
    assert final.z is None and torch.equal(out, fa.linear_attention(q, k, v, initial_state=(s, z)))


Q, K, V = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 6)
S, CU = torch.zeros(2, 4, 8, 6), torch.tensor([0, 5])


@pytest.mark.parametrize(
    "error, text, arguments, options",
    (
        (TypeError, "q must be float16", (Q.long(), K.long(), V.long()), {}),
        (TypeError, "k must have the dtype of q", (Q, K.half(), V), {}),
        (ValueError, "q must have shape", (Q[0], K, V), {}),
        (ValueError, "k must have the batch and width", (Q, K[..., :4], V), {}),
        (ValueError, "v must have the batch, length and heads", (Q, K, V[:, 1:]), {}),
        (ValueError, "must divide", (Q[:, :, :3], K, V), {}),
        (ValueError, "one length", (Q[:, 1:], K, V), {}),
        (ValueError, "one length", (Q[:, 1:], K, V), {"causal": False, "decay": torch.zeros(4)}),
        (ValueError, "the last dim of q", (Q.transpose(1, 3), K.transpose(1, 3), V.transpose(1, 3)), {}),
        (ValueError, "feature_map must be", (Q, K, V), {"feature_map": "elu"}),
        (ValueError, "decay must have shape", (Q, K, V), {"decay": torch.zeros(2)}),
        (TypeError, "decay must be float16", (Q, K, V), {"decay": torch.zeros(4, dtype=torch.int32)}),
        (TypeError, "key_mask must be bool", (Q, K, V), {"key_mask": torch.ones(2, 5)}),
        (ValueError, "key_mask must have shape", (Q, K, V), {"key_mask": torch.ones(2, 4, dtype=torch.bool)}),
        (ValueError, "token_scale must have shape", (Q, K, V), {"token_scale": torch.ones(5)}),
        (ValueError, "leading dim of 1", (Q, K, V), {"cu_seqlens": CU}),
        (ValueError, "must start at 0", (Q[0], K[0], V[0]), {"cu_seqlens": torch.tensor([0, 9])}),
        (TypeError, "initial_state must be a LinearState", (Q, K, V), {"initial_state": S}),
        (ValueError, "s of initial_state must have shape", (Q, K, V), {"initial_state": (S[:, :2], None)}),
        (TypeError, "z of initial_state", (Q, K, V), {"initial_state": (S, None), **NORMALIZED}),
        (NotImplementedError, "states have a direction", (Q, K, V),
         {"causal": False, "decay": torch.zeros(4), "output_final_state": True}),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_errors(error, text, arguments, options):
    with pytest.raises(error, match=f"linear_attention: .*{text}"):
        fa.linear_attention(*arguments, **options)


def test_step_errors():
    with pytest.raises(ValueError, match="linear_attention_step: q must have shape"):
        fa.linear_attention_step(Q, K[:, 0], V[:, 0])


def test_bad_offsets_never_read_out_of_bounds(native):
    """The private op repeats what protects memory."""
    for ends in ([0, 6], [1, 5], [0, 4, 2], [-1, 5]):
        cu = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="linear_attention: cu_seqlens must start at 0"):
            torch.ops.flowattn.linear_attention_fwd(
                Q[:1], K[:1], V[:1], None, None, None, None, None, cu, 1.0, 0.0, 0, 0, CAUSAL, False
            )
