"""varlen_attention: softcap, ALiBi, dense and relative bias, and the gradients of the biases."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from test_varlen_attention import BF16, F16, F32, F64, FACTOR, Case, check, loops, make, offsets, runnable

import flowattn as fa
from flowattn import _native
from flowattn._library import op
from flowattn.reference.varlen_attention import attend, position_bias, visible

GPU = torch.cuda.is_available()
# "dense" is a bias of every sequence and head; "-b", "-h" and "-bh" share it between sequences, heads, or both.
BIASES = ["none", "dense", "dense-b", "dense-h", "dense-bh", "relative"]
FACTORS = FACTOR | {"dbias": FACTOR["dq"]}
KERNELS = ["cpu", "triton"]
LENGTHS = [5, 66, 0, 20, 301], [7, 66, 3, 0, 290]
MASK = {"causal": True, "window": (200, -1)}
FEW = Case(
    "", [5, 66, 0, 3], [7, 70, 3, 0], heads=2, heads_kv=1, d=16, interpreted=True
)  # two tiles of the interpreter


def kernels(dtypes, *parameters):
    """pytest parameters (backend, dtype, *one of each further list) for the kernels; the interpreter takes 16-bit
    floats, whose code is that of float32, with a few kinds of bias only."""
    return [
        pytest.param(backend, dtype, *rest, id="-".join((backend, str(dtype)[6:], *map(str, rest))))
        for backend, dtype, *rest in itertools.product(KERNELS, dtypes, *parameters)
        if runnable(backend, FEW, dtype)
        and (GPU or (backend, dtype) != ("triton", F16) or rest[0] in ("dense-b", "relative"))
    ]


def make_bias(kind, case, dtype=F32, device="cpu"):
    lq, lk = (max(lengths, default=0) + 2 for lengths in case.lengths)
    batch, heads = len(case.lq), case.heads
    if kind == "none":
        return None
    if kind == "relative":
        return fa.RelativeBias.t5(torch.randn(12, heads, dtype=F64, device=device).to(dtype), 60, max_distance=50)
    shape = {
        "dense": (batch, heads, lq, lk), "dense-b": (heads, lq, lk), "dense-h": (batch, 1, lq, lk),
        "dense-bh": (1, 1, lq, lk),
    }[kind]  # fmt: skip
    return torch.randn(shape, dtype=F64, device=device).to(dtype)


def make_options(case, kind, dtype=F32, device="cpu"):
    slopes = torch.rand(len(case.lq), case.heads, device=device)
    return {"softcap": 1.5, "alibi_slopes": slopes, "bias": make_bias(kind, case, dtype, device)}


def run(x, function=fa.varlen_attention, dtype=None, *, bias=None, **options):
    """out, lse and every gradient by name; the dense bias or the table counts as one input more."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in x[:3]]
    names = list(FACTORS)[: 5 if bias is None else 6]
    if bias is not None:
        relative = isinstance(bias, fa.RelativeBias)
        learned = (bias.table if relative else bias).detach()
        inputs.append(learned.to(dtype or learned.dtype).requires_grad_())
        bias = bias._replace(table=inputs[3]) if relative else inputs[3]
    out, lse = function(*inputs[:3], x.cu_q, x.cu_k, bias=bias, **options, return_lse=True)
    grads = torch.autograd.grad((out, lse), inputs, (x.dout.to(out.dtype), x.dlse.to(lse.dtype)))
    return dict(zip(names, (out.detach(), lse.detach(), *grads)))


def exact(x, **options):
    with fa.use_backend("reference"):
        return run(x, dtype=F64, **options)


def plain_torch(q, k, v, cu_q, cu_k, *, bias, softcap, alibi_slopes, window, causal, return_lse):
    """The formula in the dtype of the inputs throughout."""
    table, lut = bias if isinstance(bias, fa.RelativeBias) else (None, None)
    dense = None if bias is None or table is not None else bias
    results = []
    for b, (a, e, c, d) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist())):
        lq, lk = e - a, d - c
        added = position_bias(b, lq, lk, lk - lq, q.dtype, q.device, alibi_slopes, dense, table, lut)
        keep = visible(lq, lk, window[0], 0 if causal else window[1], False, q.device)
        results.append(attend(q[a:e], k[c:d], v[c:d], keep, q.shape[-1] ** -0.5, softcap=softcap, bias=added))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


def check_all(got, want, plain, dtype):
    """test_varlen_attention.check, which knows no biases, plus the gradient of the bias under the same rule."""
    check({n: t for n, t in got.items() if n != "dbias"}, want, plain, dtype)
    if "dbias" in got:
        renamed = ({"dq": results["dbias"]} for results in (got, want, plain))
        check(*renamed, dtype)


@pytest.mark.parametrize("backend, dtype, kind", kernels([F32, F16, BF16, F64], BIASES), indirect=["backend"])
def test_against_float64(backend, kind, dtype, place):
    """All options at once over several tiles of queries and keys, unequal lengths, GQA, a causal window."""
    interpreted = backend == "triton" and not GPU
    case = FEW if interpreted else Case("", *LENGTHS, heads=4, heads_kv=2, d=16)
    x, options = make(case, dtype, place), make_options(case, kind, dtype, place) | MASK
    options |= {"window": (40, -1)} if interpreted else {}
    check_all(run(x, **options), exact(x, **options), run(x, plain_torch, **options), dtype)


@pytest.mark.parametrize("single", ["softcap", "alibi_slopes", "bias"])
@pytest.mark.parametrize("backend, dtype, kind", kernels([F32], ["dense-b", "relative"]), indirect=["backend"])
def test_options_one_at_a_time(backend, single, dtype, kind, place):
    case = Case("", [5, 36], heads=2)
    options = make_options(case, kind, device=place)
    options = {n: t if n == single else (0.0 if n == "softcap" else None) for n, t in options.items()}
    options |= {"causal": False, "window": (-1, -1)}
    x = make(case, dtype, place)
    check_all(run(x, **options), exact(x, **options), run(x, plain_torch, **options), dtype)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_softcap_of_small_and_large_scores(backend, place):
    """tanh keeps the relative precision of small scores, and large ones neither overflow nor lose their sign."""
    q = torch.tensor([1e-6, -1e-3, 0.3, -4.0, 1e3, -1e30], device=place)[:, None, None]
    k = v = torch.ones(6, 1, 1, device=place)
    cu = torch.arange(7, dtype=torch.int32, device=place)  # one key each: the LSE is the score
    _, lse = fa.varlen_attention(q, k, v, cu, scale=1.0, softcap=5.0, return_lse=True)
    want = 5 * torch.tanh(q.double() / 5).flatten()
    torch.testing.assert_close(lse[0].double(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("top_left", [False, True], ids=["bottom_right", "top_left"])
@pytest.mark.parametrize("backend", ["reference", *KERNELS], indirect=True)
def test_relative_bias_against_loops(backend, top_left, place):
    """Distances beyond the LUT count as its ends, and the shift of the mask is that of the distances."""
    lq, lk = [3, 0, 5, 2], [4, 2, 9, 0]
    q, k, v = (torch.randn(sum(n), h, 3, dtype=F64) for n, h in ((lq, 4), (lk, 2), (lk, 2)))
    table, lut = torch.randn(4, 4, dtype=F64), torch.tensor([3, 1, 0, 2, 1], dtype=torch.int16)
    dense = torch.zeros(4, 4, 5, 9, dtype=F64)
    for b, h, i, j in itertools.product(range(4), range(4), range(5), range(9)):
        distance = j - i - (0 if top_left else lk[b] - lq[b])
        dense[b, h, i, j] = table[lut[min(max(distance, -2), 2) + 2], h]
    want_out, want_lse = loops(q, k, v, lq, lk, 3**-0.5, -1, 1, top_left, softcap=2.0, bias=dense)
    dtype, tolerance = (F32, 2e-6) if backend == "triton" else (F64, 1e-12)
    q, k, v, table = (t.to(place, dtype) for t in (q, k, v, table))
    out, lse = fa.varlen_attention(
        q, k, v, offsets(lq, place), offsets(lk, place), softcap=2.0, bias=fa.RelativeBias(table, lut.to(place)),
        window=(-1, 1), causal_align="top_left" if top_left else "bottom_right", return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (64, 777)])
def test_t5_buckets(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers").models.t5.modeling_t5.T5Attention
    made = fa.RelativeBias.t5(torch.zeros(buckets, 1), 1000, bidirectional=bidirectional, max_distance=max_distance)
    want = t5._relative_position_bucket(torch.arange(-999, 1000), bidirectional, buckets, max_distance)
    assert made.lut.dtype == torch.int16 and torch.equal(made.lut.long(), want)


def test_t5_layer(native):
    """The scores of a T5 self-attention layer, from its own module."""
    t5 = pytest.importorskip("transformers").models.t5
    config = t5.T5Config(d_model=16, d_kv=4, num_heads=4, relative_attention_num_buckets=8, dropout_rate=0.0)
    layer = t5.modeling_t5.T5Attention(config, has_relative_attention_bias=True).eval()
    torch.nn.init.normal_(layer.relative_attention_bias.weight)
    x = torch.randn(1, 150, 16)
    bias = fa.RelativeBias.t5(layer.relative_attention_bias.weight, 150)
    q, k, v = (p(x[0]).unflatten(-1, (4, 4)) for p in (layer.q, layer.k, layer.v))
    out = fa.varlen_attention(q, k, v, offsets([150], "cpu"), scale=1.0, bias=bias)
    torch.testing.assert_close(layer.o(out.flatten(1))[None], layer(x)[0], rtol=1e-5, atol=1e-5)


# --- gradients


@pytest.mark.parametrize("kind", ["dense", "dense-b", "dense-h", "dense-bh", "relative"])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend, kind):
    """softcap, ALiBi, bias, window, causal and GQA together."""
    case = Case("", [3, 0, 2, 1], [2, 2, 4, 0], heads=2, heads_kv=1, d=3, dv=2)
    x, bias = make(case, F64, "cpu"), make_bias(kind, case, F64)
    lut = bias.lut if kind == "relative" else None
    learned = bias.table if kind == "relative" else bias
    slopes = torch.rand(4, 2)

    def finite(q, k, v, learned):
        given = learned if lut is None else fa.RelativeBias(learned, lut)
        out, lse = fa.varlen_attention(
            q, k, v, x.cu_q, x.cu_k, softcap=1.3, alibi_slopes=slopes, bias=given, causal=True, window=(2, -1),
            return_lse=True,
        )  # fmt: skip
        return out, lse[lse > -math.inf]

    assert torch.autograd.gradcheck(finite, [t.requires_grad_() for t in (*x[:3], learned)])


@pytest.mark.parametrize("backend, dtype, kind", kernels([F32], ["dense", "dense-b", "relative"]), indirect=["backend"])
def test_bias_alone_requires_grad(backend, dtype, kind, place):
    case = Case("", [5, 20], heads=2)
    x, options = make(case, dtype, place), make_options(case, kind, device=place)
    want = run(x._replace(dlse=torch.zeros_like(x.dlse)), **options)["dbias"]
    bias = options.pop("bias")
    learned = (bias.table if kind == "relative" else bias).detach().requires_grad_()
    given = bias._replace(table=learned) if kind == "relative" else learned
    out = fa.varlen_attention(*x[:3], x.cu_q, bias=given, **options)
    assert torch.equal(torch.autograd.grad(out, learned, x.dout)[0], want)
    q = x.q.detach().requires_grad_()  # and the reverse: no gradient of the bias is computed
    (dq,) = torch.autograd.grad(fa.varlen_attention(q, *x[1:3], x.cu_q, bias=bias, **options), q, x.dout)
    assert dq.any()


@pytest.mark.parametrize("layout", ["expanded", "keys-first", "every-other", "expanded-keys"])
@pytest.mark.parametrize(
    "backend, dtype", [("cpu", F32), ("cpu", BF16), ("triton", F32)], indirect=["backend"], ids=str
)
def test_bias_strides(backend, layout, dtype, place):
    """Any strides give the bits of a contiguous bias; the gradient of an expanded one is summed by expand itself.

    On a GPU Triton's compiler spreads the scores over threads as the bias lies in memory, and sums rows in that order.
    """
    case = Case("", [5, 0, 34], heads=2)
    x = make(case, dtype, place)
    base = {
        "expanded": torch.randn(1, 1, 40, 40), "keys-first": torch.randn(3, 2, 40, 40),
        "every-other": torch.randn(3, 4, 80, 80), "expanded-keys": torch.randn(3, 1, 1, 40),
    }[layout].to(place, dtype)  # fmt: skip
    base.requires_grad_()
    bias = {
        "expanded": lambda: base.expand(3, 2, 40, 40), "keys-first": lambda: base.mT,
        "every-other": lambda: base[:, ::2, ::2, ::2], "expanded-keys": lambda: base.expand(3, 2, 40, 40),
    }[layout]()  # fmt: skip
    dense = bias.detach().contiguous().requires_grad_()
    out, want = (fa.varlen_attention(*x[:3], x.cu_q, bias=b) for b in (bias, dense))
    (dense_grad,) = torch.autograd.grad(want, dense, x.dout)
    (got,) = torch.autograd.grad(out, base, x.dout)
    allowed = 16 * torch.finfo(dtype).eps if backend == "triton" and GPU else 0.0
    for a, b in ((out, want), (got, torch.autograd.grad(bias, base, dense_grad)[0])):
        assert (a - b).abs().max() <= allowed * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense-b", "dense-bh", "relative"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradients_repeat_bitwise(backend, kind, place):
    """Also where sequences and heads share a bias: its sums have one order."""
    case = Case("", *LENGTHS, heads=4, heads_kv=2, d=16)
    x, options = make(case, F32, place), make_options(case, kind, device=place)
    first = run(x, deterministic=True, **options)
    for _ in range(50):
        again = run(x, deterministic=True, **options)
        for name in FACTORS:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_bias_smaller_than_a_sequence(backend, place):
    """Triton cannot check what only the device knows: nothing beyond the bias is read or written: it counts as 0."""
    x, dense = make(Case("", [5, 20]), F32, place), torch.randn(2, 20, 20, device=place)
    dense[:, 9:], dense[:, :, 13:] = 0, 0
    small = run(x, bias=dense[:, :9, :13].contiguous())
    whole = run(x, bias=dense)
    whole["dbias"] = whole["dbias"][:, :9, :13]
    for name in FACTORS:
        assert torch.equal(small[name], whole[name]), name


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_sharers_of_a_bias(backend, place, monkeypatch):
    """One program for a tile of the bias, or several that divide those who share it: the same sums."""
    from flowattn.triton_kernels import dense_bias_gradient

    case = Case("", [5, 9, 0, 3], heads=3, heads_kv=3)
    x, options, results = make(case, F32, place), make_options(case, "dense-bh", device=place), []
    for programs in (1, 5, 512):  # 12 sharers in shares of 12, 3 and 1
        monkeypatch.setattr(dense_bias_gradient, "PROGRAMS", programs)
        results.append(run(x, **options)["dbias"])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_bucket_for_each_distance(backend, place):
    """A table of many buckets, none of which another distance shares, and a lut of 32-bit integers."""
    case, reach = Case("", [5, 36], [40, 9], heads=2, d=8), 300
    table = torch.randn(2 * reach + 1, 2, device=place)
    bias = fa.RelativeBias(table, torch.arange(2 * reach + 1, dtype=torch.int32, device=place))
    x, options = make(case, F32, place), {"softcap": 0.0, "alibi_slopes": None, "causal": False, "window": (-1, 9)}
    got, want = run(x, bias=bias, **options), exact(x, bias=bias, **options)
    check_all(got, want, run(x, plain_torch, bias=bias, **options), F32)
    assert torch.equal(got["dbias"].any(1), want["dbias"].any(1)), "a distance that no pair has"


@pytest.mark.parametrize("kind", BIASES[1:])
def test_threads_change_no_bit(native, kind):
    case, threads = Case("", [400, 3, 70], heads=4, heads_kv=2, d=8), torch.get_num_threads()
    x, options, results = make(case, F32, "cpu"), make_options(case, kind), []
    with fa.use_backend("cpu"):
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(run(x, deterministic=True, **options))
        torch.set_num_threads(threads)
    for name in FACTORS:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("backend", ["reference", *KERNELS], indirect=True)
def test_no_sequences_and_rows_beyond(backend, place):
    """Empty batches have gradients, zeros; minus infinity in a bias hides a key, and a row without keys gives 0."""
    q = torch.randn(3, 2, 4, device=place, requires_grad=True)
    bias, slopes = torch.zeros(2, 2, 2, device=place), torch.rand(1, 2, device=place)
    bias[:, 1] = -math.inf
    bias.requires_grad_()
    out, lse = fa.varlen_attention(q, q, q, offsets([2], place), bias=bias, alibi_slopes=slopes, return_lse=True)
    assert not out[1:].any() and (lse[:, 1:] == -math.inf).all() and out[0].all()
    grads = torch.autograd.grad(out.sum(), (q, bias))
    assert all(g.isfinite().all() for g in grads) and not grads[1][:, 1].any() and not grads[0][2].any()
    for learned, rows in itertools.product((torch.randn(2, 2, 2), torch.randn(8, 2)), (3, 0)):
        learned, x = learned.to(place).requires_grad_(), q[:rows]
        given = learned if learned.dim() == 3 else fa.RelativeBias.t5(learned, 4)
        out = fa.varlen_attention(x, x, x, offsets([], place), bias=given, softcap=1.0)
        (grad,) = torch.autograd.grad(out.sum(), learned)
        assert grad.shape == learned.shape and not grad.any()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(native, isa):
    """The copies of the kernels that this machine would not choose are right too, and drop the same probabilities."""
    program = """
import itertools, torch, test_varlen_attention_scores as t
case = t.Case("", *t.LENGTHS, heads=4, heads_kv=2, d=16)
for dtype, kind in itertools.product((t.F32, t.F16, t.BF16, t.F64), ("dense-b", "relative")):
    x, options = t.make(case, dtype, "cpu"), t.make_options(case, kind, dtype) | t.MASK
    with t.fa.use_backend("cpu"):
        got = t.run(x, **options)
    t.check_all(got, t.exact(x, **options), t.run(x, t.plain_torch, **options), dtype)
    outs = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        with t.fa.use_backend(backend):
            outs.append(t.fa.varlen_attention(*(y.double() for y in x[:3]), x.cu_q, x.cu_k, dropout_p=0.3))
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
"""
    environment = os.environ | {
        "FLOWATTN_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- torch integration and errors


@pytest.mark.parametrize(
    "backend, kind", [*(("cpu", kind) for kind in BIASES), ("triton", "dense-b")],
    indirect=["backend"],
)  # fmt: skip
def test_opcheck(backend, kind, place):
    case, twin = Case("", [3, 0, 5], heads=2), "_triton" * (backend == "triton")
    x, bias = make(case, F32, place), make_bias(kind, case, device=place)
    table, lut = bias if kind == "relative" else (None, None)
    dense = bias[None] if kind == "dense-b" else None if kind in ("none", "relative") else bias
    slopes, rng = torch.rand(2, device=place), torch.arange(2, device=place)
    options, scores = (None, 5, 5, 0.3, 4, 0, False), (1.5, slopes, dense, table, lut, 0.2, rng)
    torch.library.opcheck(op(f"varlen_attention_fwd{twin}"), (*x[:5], *options, *scores))
    out, lse = op(f"varlen_attention_fwd{twin}")(*x[:5], *options, *scores)
    for want in (True,) if twin else (False, True):  # the interpreter is slow
        backward = (x.dout, x.dlse, *x[:3], out, lse, x.cu_q, x.cu_k, *options, True, *scores, want)
        torch.library.opcheck(op(f"varlen_attention_bwd{twin}"), backward)


@pytest.mark.parametrize(
    "backend, kind", [("cpu", "dense-b"), ("cpu", "relative"), ("triton", "relative")], indirect=["backend"]
)
def test_compile(backend, kind, place):
    torch._dynamo.reset()
    compiled = torch.compile(fa.varlen_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 7], [5, 2, 9], [1, 4]):  # the second and third with symbolic sizes
        case = Case("", lengths, heads=2)
        x, options = make(case, F32, place), make_options(case, kind, device=place)
        got, want = run(x, compiled, **options), run(x, **options)
        for name in FACTORS:
            assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_autocast_keeps_a_float32_bias(backend, place):
    x, bias = make(Case("", [5, 20]), F32, place), torch.randn(2, 20, 20, device=place, requires_grad=True)
    with torch.autocast(place, F16 if backend == "triton" else BF16):
        fa.varlen_attention(*x[:3], x.cu_q, bias=bias).float().sum().backward()
    assert bias.grad.dtype == F32 and bias.grad.any()


Q, CU = torch.zeros(5, 2, 8), offsets([2, 3], "cpu")
LUT = torch.zeros(5, dtype=torch.int16)
RULES = {
    "alibi-dtype": (TypeError, "alibi_slopes must be float32", {"alibi_slopes": torch.ones(2, dtype=F64)}),
    "alibi-device": (ValueError, "alibi_slopes must be on the device of q", {"alibi_slopes": torch.ones(2).to("meta")}),
    "bias-kind": (TypeError, "bias must be a tensor, a RelativeBias or a Dis", {"bias": 1.0}),
    "bias-batch": (ValueError, "bias must have shape .* with B 1 or 2", {"bias": torch.ones(3, 2, 4, 4)}),
    "bias-dtype": (TypeError, "bias must be float32 or have the dtype of q", {"bias": torch.ones(2, 4, 4).double()}),
    "bias-rows": (ValueError, "bias must cover the longest sequences, 3 ", {"bias": torch.ones(2, 2, 3)}),
    "table": (ValueError, r"bias.table must have shape \(buckets, 2\)", {"bias": (torch.ones(4, 3), LUT)}),
    "table-empty": (ValueError, r"bias.table must have shape \(buckets, 2\)", {"bias": (torch.ones(0, 2), LUT)}),
    "lut-dtype": (TypeError, "bias.lut must be int16 or int32", {"bias": (torch.ones(4, 2), LUT.long())}),
    "lut-even": (ValueError, "bias.lut must have an odd length", {"bias": (torch.ones(4, 2), LUT[:4])}),
    "lut-values": (ValueError, "bias.lut must hold buckets 0..3", {"bias": (torch.ones(4, 2), LUT + 4)}),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_rules(backend, rule):
    error, message, options = RULES[rule]
    if isinstance(options["bias"] if "bias" in options else None, tuple):
        options = {"bias": fa.RelativeBias(*options["bias"])}
    with pytest.raises(error, match=f"^varlen_attention: {message}.*; got "):
        fa.varlen_attention(Q, Q, Q, CU, **options)


def test_backends_that_take_score_options(device, capsys):
    q, cu = Q.to(device), CU.to(device)
    want = "triton" if GPU else "cpu" if _native.LOADED else "triton"
    assert fa.explain("varlen_attention", q, q, q, cu, softcap=1.0, dropout_p=0.1) == want
    assert "triton     refused" not in capsys.readouterr().out


@pytest.mark.gpu
def test_cuda_kernel_refuses():
    q = Q.cuda().half()
    with fa.use_backend("cuda"), pytest.raises(NotImplementedError, match="has no softcap, alibi_slopes, bias or drop"):
        fa.varlen_attention(q, q, q, CU.cuda(), softcap=1.0)


def test_private_ops_check_what_protects_memory(native):
    options = (None, 5, 5, 1.0, -1, -1, False)
    wrong = [
        ((-1.0,), "softcap must be"),
        ((0.0, torch.ones(3)), "alibi_slopes must be"),
        ((0.0, None, torch.ones(2, 3, 3)), "bias must be a CPU tensor"),
        ((0.0, None, torch.ones(1, 2, 2, 3)), "bias must cover"),
        ((0.0, None, None, torch.ones(4, 2)), "a table and rel_lut"),
        ((0.0, None, None, torch.ones(4, 2), LUT - 1), "rel_lut must hold buckets"),
        ((0.0, None, None, None, None, 1.0), "dropout_p must lie"),
        ((0.0, None, None, None, None, 0.5), "rng must be"),
    ]
    for scores, message in wrong:
        with pytest.raises((RuntimeError, ValueError), match=f"varlen_attention: {message}.*; got "):
            op("varlen_attention_fwd")(Q, Q, Q, CU, CU, *options, *scores)
