"""varlen_attention: torch integration (opcheck, compile, autocast) and error messages."""

import pytest
import torch
from test_varlen_attention import BACKENDS, BF16, F16, Case, make, offsets, run, same_bits, strided, work_dtype

import flowattn as fa
from flowattn._library import op
from flowattn.triton_kernels import varlen_attention_configs as configs


@pytest.mark.parametrize("layout", ["dense", "heads-first", "one-buffer", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_opcheck(backend, layout, place):
    if (backend, layout) == ("cuda", "expanded"):
        pytest.skip("bulk copies need rows at different addresses")
    x = make(Case("", [3, 0, 17], heads=2), work_dtype(backend), place)
    x = x if layout == "dense" else strided(x, layout)
    options = (17, 17, 0.3, 4, 0, False)
    arguments = (*x[:5], None, *options)
    forward = op("varlen_attention_fwd_triton" if backend == "triton" else "varlen_attention_fwd")
    torch.library.opcheck(forward, arguments)
    out, lse = forward(*arguments)
    for dlse in (None, x.dlse):
        backward = (x.dout, dlse, *x[:3], out, lse, x.cu_q, x.cu_k, None, *options, True)
        name = "varlen_attention_bwd" if backend == "cpu" else "varlen_attention_bwd_triton"
        torch.library.opcheck(op(name), backward)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_compile_without_recompiling(backend, place):
    """Batches of other lengths, forward and backward in one graph each; none compiles after the second."""
    compiled = torch.compile(fa.varlen_attention, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for i in range(4):
        x = make(Case("", [3 + i, 2, 5 * i + 1] + [4] * i), work_dtype(backend), place)
        same_bits(run(x, compiled, causal=True), run(x, causal=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1], f"graphs after each batch: {graphs}"


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_autocast_and_inference_mode(backend, place):
    x = make(Case("", [5, 20]), torch.float32, place)
    dtype = BF16 if backend in ("reference", "cpu") else F16
    want = fa.varlen_attention(*(t.to(dtype) for t in x[:3]), x.cu_q)
    with torch.autocast(place, dtype):
        out = fa.varlen_attention(*(t.requires_grad_() for t in x[:3]), x.cu_q)
        assert out.dtype == dtype and torch.equal(out, want)
        out.sum().backward()
    assert x.q.grad.dtype == torch.float32 and x.q.grad.any()
    with torch.inference_mode():
        assert torch.equal(fa.varlen_attention(*(t.detach().to(dtype) for t in x[:3]), x.cu_q), want)


# --- errors

Q = torch.zeros(5, 2, 8)
CU = offsets([2, 3], "cpu")
RULES = {
    "q-rank": (ValueError, r"q must have shape \(T, heads, width\)", (Q[0], Q, Q, CU), {}),
    "batch": (ValueError, "a leading dim of q, k, v must be 1", (Q.expand(2, -1, -1, -1),) * 3 + (CU,), {}),
    "dtype": (TypeError, "q must be float16, bfloat16, float32 or float64", (Q.int(),) * 3 + (CU,), {}),
    "dtypes": (TypeError, "k must have the dtype of q", (Q, Q.double(), Q, CU), {}),
    "last-dim": (ValueError, "the last dim of v must be contiguous", (Q, Q, Q.mT.contiguous().mT, CU), {}),
    "k-width": (ValueError, "k must have the width of q, 8", (Q, Q[..., :4], Q, CU), {}),
    "v-rows": (ValueError, "v must have the rows and heads of k", (Q, Q, Q[:4], CU), {}),
    "heads": (ValueError, "the heads of k must divide the heads of q", (Q, *(Q.repeat(1, 2, 1),) * 2, CU), {}),
    "no-width": (ValueError, "head widths must be positive", (Q[..., :0], Q[..., :0], Q, CU), {}),
    "cu-type": (TypeError, "cu_seqlens_q must be a tensor", (Q, Q, Q, [0, 2, 5]), {}),
    "cu-dtype": (TypeError, "cu_seqlens_q must be int32 or int64", (Q, Q, Q, CU.float()), {}),
    "cu-rank": (ValueError, r"cu_seqlens_q must have shape \(B\+1,\)", (Q, Q, Q, CU[None]), {}),
    "cu-empty": (ValueError, r"cu_seqlens_q must have shape \(B\+1,\)", (Q, Q, Q, CU[:0]), {}),
    "cu-device": (ValueError, "cu_seqlens_q must be on the device of q", (Q, Q, Q, CU.to("meta")), {}),
    "cu-lengths": (ValueError, "cu_seqlens_q and cu_seqlens_k must have one length", (Q, Q, Q, CU, CU[:2]), {}),
    "rows": (ValueError, "q and k must have the same rows without cu_seqlens_k", (Q, Q[:4], Q[:4], CU), {}),
    "align": (ValueError, "causal_align must be bottom_right or top_left", (Q, Q, Q, CU), {"causal_align": "left"}),
    "window": (ValueError, "window must hold -1", (Q, Q, Q, CU), {"window": (-2, 0)}),
    "softcap": (ValueError, "softcap must be >= 0", (Q, Q, Q, CU), {"softcap": -1.0}),
    "dropout": (ValueError, r"dropout_p must lie in \[0, 1\)", (Q, Q, Q, CU), {"dropout_p": 1.0}),
    "dropout-negative": (ValueError, "dropout_p must lie", (Q, Q, Q, CU), {"dropout_p": -0.1}),
    "alibi": (ValueError, "alibi_slopes must have shape", (Q, Q, Q, CU), {"alibi_slopes": torch.ones(3)}),
    "bias": (ValueError, "bias must have shape", (Q, Q, Q, CU), {"bias": torch.ones(3, 4, 4)}),
}  # fmt: skip
BAD_OFFSETS = {
    "start": [1, 2, 5],
    "negative": [0, -1, 5],
    "decreasing": [0, 4, 3],
    "beyond": [0, 2, 6],
    "huge": [0, 2**31 - 1, 5],
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    error, message, arguments, options = RULES[rule]
    with pytest.raises(error, match=f"^varlen_attention: {message}.*; got "):
        fa.varlen_attention(*arguments, **options)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("values", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_bad_offsets(native, values, side):
    bad = torch.tensor(values, dtype=torch.int32)
    cu = (bad, CU) if side == "q" else (CU, bad)
    message = f"cu_seqlens_{side} must start at 0, never decrease and end at or before the 5 packed rows; got"
    with pytest.raises(ValueError, match=message):
        fa.varlen_attention(Q, Q, Q, *cu)
    options = (None, 5, 5, 1.0, -1, -1, False)
    with pytest.raises(RuntimeError, match=message):
        op("varlen_attention_fwd")(Q, Q, Q, *cu, *options)
    with pytest.raises(RuntimeError, match=message):
        op("varlen_attention_bwd")(Q, None, Q, Q, Q, Q, torch.zeros(2, 5), *cu, *options, True)


def test_private_ops_check_what_protects_memory(native):
    options, lse = (None, 5, 5, 1.0, -1, -1, False), torch.zeros(2, 5)
    wrong = [
        ("fwd", (Q, Q[:, :, :4], Q, CU, CU), "k must have shape"),
        ("fwd", (Q, Q, Q[:4], CU, CU), "v must have shape"),
        ("fwd", (Q, Q.double(), Q, CU, CU), "k must have the dtype of q"),
        ("fwd", (Q.int(), Q, Q, CU, CU), "q must be float16"),
        ("fwd", (Q, Q, Q, CU.long(), CU), "cu_seqlens_q must be an int32"),
        ("fwd", (Q, Q, Q, CU, CU[:2]), "cu_seqlens_q and cu_seqlens_k must have one length"),
        ("bwd", (Q[:4], None, Q, Q, Q, Q, lse, CU, CU), "dout must have shape"),
        ("bwd", (Q, None, Q, Q, Q, Q[:, :1], lse, CU, CU), "out must have shape"),
        ("bwd", (Q, None, Q, Q, Q, Q, lse[:1], CU, CU), "lse must be a Float"),
        ("bwd", (Q, lse.double(), Q, Q, Q, Q, lse, CU, CU), "dlse must be a Float"),
    ]
    for name, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=f"varlen_attention: {message}.*; got "):
            op(f"varlen_attention_{name}")(*arguments, *options, *[True] * (name == "bwd"))


@pytest.mark.parametrize("dtype", (F16, torch.float32), ids=str)
@pytest.mark.parametrize("scored", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_statistics_of_whole_blocks_are_written(masked, scored, dtype):
    for width in (16, 64, 128, 256):
        options = (dtype, width, 512, masked, scored)
        assert configs.dq_config(*options)[0] % configs.dkv_config(*options)[0] == 0, width
