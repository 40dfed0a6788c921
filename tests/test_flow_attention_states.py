"""The state of causal Flow-Attention: resuming, stepping, counting, its gradients, and sums over many tokens."""

import pytest
import torch
from flow_attention_oracle import (
    SIGMA_1,
    TOLERANCE,
    assert_near,
    check,
    floats,
    inputs,
    on_backends,
    random_state,
    takes,
)

import flowattn as fa


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@on_backends
def test_states_and_their_gradients(backend, place, dtype):
    if not takes(backend, dtype):
        pytest.skip("not computed by this backend")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = random_state(2, 2, 16, 8, wide, place)
    check(backend, inputs((2, 70, 2, 16), width_v=8, dtype=dtype, device=place), state, causal=True)


@pytest.mark.parametrize("backend", ("triton",), indirect=True)
def test_parts_of_heads_start_from_the_state(backend, place):
    """Several programs a head, packed sequences of very different lengths, a mask."""
    tensors = inputs((1, 560, 1, 16), width_v=8, device=place)
    ends, mask = torch.tensor([0, 7, 7, 555], device=place), torch.rand(1, 560, device=place) > 0.2
    state = random_state(3, 1, 16, 8, torch.float32, place)
    check(backend, tensors, state, causal=True, cu_seqlens=ends, key_mask=mask)


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
    q, k, v = inputs((1, 70, 2, 16), heads_kv=1, device=place)
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
