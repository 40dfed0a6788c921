"""Flow-Attention and chunk_hybrid_attention: registration, compilation, choice of a backend, errors, memory."""

import subprocess
import sys

import pytest
import torch

import flowattn as fa

FLOW = (False, 1.0, 1e-6, 0.0)  # relu, clamp, eps, extra
Q, V, GATE = torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 4), torch.randn(2, 9, 2)


def checked(op, arguments):
    torch.library.opcheck(op, arguments)
    return op(*arguments)


@pytest.fixture
def plain_memory():
    """opcheck compares with runs on other memory."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("packed", (False, True), ids=("batch", "packed"))
def test_opcheck_whole(native, plain_memory, packed):
    q, v, ops = Q[:1] if packed else Q, V[:1] if packed else V, torch.ops.flowattn
    cu = torch.tensor([0, 4, 4, 8], dtype=torch.int32) if packed else None
    mask = torch.rand(q.shape[:2]) > 0.2
    y, *saved = checked(ops.flow_attention_fwd.default, (q, q, v, mask, None, cu, *FLOW))
    checked(ops.flow_attention_bwd.default, (torch.randn_like(y), q, q, v, mask, None, cu, *saved, *FLOW))


@pytest.mark.parametrize("resumed", (False, True), ids=("fresh", "resumed"))
def test_opcheck_causal(native, plain_memory, resumed):
    ops, state = torch.ops.flowattn, (None,) * 4
    if resumed:
        sums, total, s = torch.rand(2, 2, 4, 8) + 1, torch.rand(2, 2) + 1, torch.randn(2, 2, 8, 4)
        state = (sums, total, torch.tensor([3, 5]), s)
    y, flows, *finals = checked(ops.causal_flow_attention_fwd.default, (Q, Q, V, None, None, *state, *FLOW))
    grads = [torch.randn_like(x) for x in finals] if resumed else (None,) * 3
    arguments = (torch.randn_like(y), *grads, Q, Q, V, None, None, *state, flows, *FLOW)
    checked(ops.causal_flow_attention_bwd.default, arguments)


def test_opcheck_chunk_hybrid(native, plain_memory):
    ops, state = torch.ops.flowattn, torch.randn(2, 2, 8, 4)
    o, lse, final = checked(ops.chunk_hybrid_attention_fwd.default, (Q, Q, V, GATE, state, 3))
    grads = (torch.randn_like(o), torch.randn_like(final))
    checked(ops.chunk_hybrid_attention_bwd.default, (*grads, Q, Q, V, GATE, state, lse, 3))


def whole(q, k, v):
    return fa.flow_attention(q, k, v)


def causal(q, k, v):
    y, state = fa.flow_attention(q, k, v, causal=True, output_final_state=True)
    y, state = fa.flow_attention(q + y.mean(), k, v, causal=True, initial_state=state, output_final_state=True)
    return y.square().sum() + state.s.sum() + state.k2.sum() + state.n.sum()


def hybrid(q, k, v):
    o, state = fa.chunk_hybrid_attention(q, k, v, q[..., 0], chunk=3, output_final_state=True)
    return o.square().sum() + state.sum()


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("call", (whole, causal, hybrid))
def test_compiles_without_graph_breaks(native, call, dynamic):
    leaves = [x.clone().requires_grad_() for x in (Q, Q + 1, V)]
    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected):
        torch.testing.assert_close(got, want)


def test_inference_mode_and_explain(native, capsys):
    with torch.inference_mode():
        assert fa.flow_attention(Q, Q, V, causal=True).shape == V.shape
        assert fa.chunk_hybrid_attention(Q, Q, V, GATE, chunk=9).shape == V.shape
    assert fa.explain("flow_attention", Q, Q, V) == "cpu"
    assert fa.explain("flow_attention", Q, Q, V, competition_axis="heads") == "reference"
    assert "the softmax runs over the tokens of a head" in capsys.readouterr().out
    assert fa.explain("chunk_hybrid_attention", Q, Q, V, GATE, chunk=3) == "cpu"


MEMORY = """
import resource, torch, flowattn as fa
torch.set_num_threads(1)
q, k, v = (torch.randn(1, {tokens}, 8, 64, requires_grad=True) for _ in range(3))
grad = torch.randn(1, {tokens}, 8, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fa.flow_attention(q, k, v, causal=True).backward(grad)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_causal_memory_is_linear(native):
    """8192 tokens of 8 heads of width 64, forward and backward: the eager form would make two tensors of 1 GiB."""
    result = subprocess.run([sys.executable, "-c", MEMORY.format(tokens=8192)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 400e6  # ru_maxrss counts kilobytes


def test_launches_of_other_dtypes_get_kernels_of_their_own():
    """The key under which a compiled kernel is kept: pointers to another dtype, or less aligned, are another kernel."""
    launch = pytest.importorskip("flowattn.triton_kernels.launch")
    keys = [launch.alignments(*x) for x in ((Q, GATE), (Q, GATE.half()), (Q, None), (Q, GATE.flatten()[1:]))]
    assert len(set(keys)) == 4 and keys[0] == launch.alignments(Q + 1, GATE + 1)


def bad_state(**changes):
    state = fa.flow_attention(Q, Q, V, causal=True, output_final_state=True)[1]
    return {"causal": True, "initial_state": state._replace(**changes)}


@pytest.mark.parametrize(
    "error, text, call",
    (
        (TypeError, "q must be float16", lambda: fa.flow_attention(Q.long(), Q.long(), V.long())),
        (TypeError, "v must have the dtype of q", lambda: fa.flow_attention(Q, Q, V.half())),
        (ValueError, "q must have shape", lambda: fa.flow_attention(Q[0], Q, V)),
        (ValueError, "k must have the batch and width", lambda: fa.flow_attention(Q, Q[..., :4], V)),
        (ValueError, "v must have the batch, tokens", lambda: fa.flow_attention(Q, Q, V[:, 1:])),
        (ValueError, "heads of k must divide", lambda: fa.flow_attention(Q[:, :, :1], Q, V)),
        (ValueError, "one length where causal", lambda: fa.flow_attention(Q[:, 1:], Q, V, causal=True)),
        (ValueError, "last dim of q", lambda: fa.flow_attention(Q.mT.contiguous().mT, Q, V)),
        (ValueError, "feature_map must be", lambda: fa.flow_attention(Q, Q, V, feature_map="elu")),
        (ValueError, "clamp must be positive", lambda: fa.flow_attention(Q, Q, V, clamp=0.0)),
        (ValueError, "eps and extra_eps", lambda: fa.flow_attention(Q, Q, V, eps=-1.0)),
        (ValueError, "only the causal form", lambda: fa.flow_attention(Q, Q, V, output_final_state=True)),
        (ValueError, "key_mask must have shape", lambda: fa.flow_attention(Q, Q, V, key_mask=GATE[..., 0, None] > 0)),
        (TypeError, "query_mask must be bool", lambda: fa.flow_attention(Q, Q, V, query_mask=GATE[..., 0])),
        (ValueError, "leading dim of 1", lambda: fa.flow_attention(Q, Q, V, cu_seqlens=torch.tensor([0, 9]))),
        (
            ValueError,
            "cu_seqlens must start at 0",
            lambda: fa.flow_attention(Q[0], Q[0], V[0], cu_seqlens=torch.tensor([0, 10])),
        ),
        (TypeError, "must be a FlowState", lambda: fa.flow_attention(Q, Q, V, causal=True, initial_state=Q)),
        (ValueError, "initial_state.q1 must have shape", lambda: fa.flow_attention(Q, Q, V, **bad_state(q1=Q[:1, 0]))),
        (TypeError, "initial_state.n must be int64", lambda: fa.flow_attention(Q, Q, V, **bad_state(n=Q[:, 0, 0, 0]))),
        (
            NotImplementedError,
            "has no causal form",
            lambda: fa.flow_attention(Q, Q, V, causal=True, competition_axis="heads"),
        ),
        (ValueError, "q must have shape", lambda: fa.flow_attention_step(Q, Q, V)),
        (ValueError, "multiple of chunk=4", lambda: fa.chunk_hybrid_attention(Q, Q, V, GATE, chunk=4)),
        (ValueError, "chunk must be >= 1", lambda: fa.chunk_hybrid_attention(Q, Q, V, GATE, chunk=0)),
        (ValueError, "gate must have shape", lambda: fa.chunk_hybrid_attention(Q, Q, V, GATE[..., :1], chunk=3)),
        (ValueError, "k must have the batch", lambda: fa.chunk_hybrid_attention(Q, Q[:, 1:], V, GATE, chunk=3)),
        (
            TypeError,
            "initial_state must be torch.float32",
            lambda: fa.chunk_hybrid_attention(Q, Q, V, GATE, chunk=3, initial_state=torch.zeros(2, 2, 8, 4).half()),
        ),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_bad_offsets_never_read_out_of_bounds(native):
    """The private op repeats what protects memory."""
    for ends in ([0, 10], [1, 5], [0, 4, 2], [-1, 5]):
        cu = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="flow_attention: cu_seqlens must start at 0"):
            torch.ops.flowattn.flow_attention_fwd(Q[:1], Q[:1], V[:1], None, None, cu, *FLOW)
