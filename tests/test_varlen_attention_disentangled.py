"""varlen_attention with DeBERTa's disentangled bias, and the gradients of its tables."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from test_varlen_attention import BF16, F16, F32, F64, FACTOR, Case, check, loops, make, offsets, runnable

import flowattn as fa
from flowattn._library import op
from flowattn.ops.attention_scores import deberta_lut
from flowattn.reference.dropout import keep_mask
from flowattn.reference.varlen_attention import attend, disentangled_bias, visible

GPU = torch.cuda.is_available()
KERNELS = ["cpu", "triton"]
BACKENDS = ["reference", *KERNELS]
CASE = Case("", [5, 66, 0, 20, 301], [7, 66, 3, 0, 290], heads=4, heads_kv=2, d=16)
FEW = Case("", [5, 40, 0, 3], [7, 36, 3, 0], heads=2, heads_kv=1, d=8, interpreted=True)  # for Triton's interpreter
SMALL = Case("", [3, 40, 20], heads=2, d=8)
TINY = Case("", [3, 20], heads=2, heads_kv=1, d=8)
TERMS = {"both": (True, True), "keys": (True, False), "queries": (False, True)}
EVERYTHING = {"causal": True, "window": (200, -1), "softcap": 1.5, "dropout_p": 0.3}
NAMES = (*FACTOR, "dposition_keys", "dposition_queries")
# Name -> (rows of the tables, lut): a row a distance, logarithmic rows, and rows in no order at all.
LUTS = {
    "exact": (60, deberta_lut(30)),
    "log": (16, deberta_lut(8, 40)),
    "scattered": (9, torch.randint(0, 9, (101,), generator=torch.Generator().manual_seed(1)).to(torch.int16)),
}


def make_bias(case, lut="log", terms="both", dtype=F32, device="cpu"):
    rows, lut = LUTS[lut]
    tables = (torch.randn(rows, case.heads, case.d, dtype=F64).to(device, dtype) if t else None for t in TERMS[terms])
    return fa.DisentangledBias(*tables, lut.to(device))


def interpreted(backend):
    return backend == "triton" and not GPU


def kernels(dtypes, *parameters):
    """pytest parameters (backend, dtype, *one of each further list) for the kernels; the interpreter takes no lut of
    many rows, and float16, whose code is that of float32, with the "log" lut only."""
    return [
        pytest.param(backend, dtype, *rest, id="-".join((backend, str(dtype)[6:], *map(str, rest))))
        for backend, dtype, *rest in itertools.product(KERNELS, dtypes, *parameters)
        if runnable(backend, FEW, dtype)
        and not (interpreted(backend) and ("exact" in rest or (dtype == F16 and "log" not in rest)))
    ]


def fitting(backend, case, few=TINY):
    """The case, or a smaller one in the interpreter."""
    return few if interpreted(backend) else case


def run(x, bias, function=fa.varlen_attention, dtype=None, **options):
    """out, lse and the gradients of q, k, v and the tables there are, by name, in `dtype`."""
    tables = [t for t in bias[:2] if t is not None]
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (*x[:3], *tables)]
    given = iter(inputs[3:])
    bias = fa.DisentangledBias(*(t if t is None else next(given) for t in bias[:2]), bias.lut)
    torch.manual_seed(5)  # of the dropout
    out, lse = function(*inputs[:3], x.cu_q, x.cu_k, bias=bias, **options, return_lse=True)
    grads = torch.autograd.grad((out, lse), inputs, (x.dout.to(out.dtype), x.dlse.to(lse.dtype)))
    names = [n for n, t in zip(NAMES, (out, lse, *x[:3], *bias[:2])) if t is not None]
    return dict(zip(names, (out.detach(), lse.detach(), *grads)))


def exact(x, bias, **options):
    with fa.use_backend("reference"):
        return run(x, bias, dtype=F64, **options)


def plain_torch(q, k, v, cu_q, cu_k, *, bias, return_lse, causal=False, window=(-1, -1), softcap=0.0, dropout_p=0.0):
    """The formula in the dtype of the inputs throughout."""
    rng, results, scale = torch.randint(2**63 - 1, (2,), device=q.device), [], q.shape[-1] ** -0.5
    for b, (a, e, c, d) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist())):
        lq, lk = e - a, d - c
        added = disentangled_bias(q[a:e], k[c:d], scale, lk - lq, *bias)
        factors = keep_mask(rng, dropout_p, b, q.shape[1], lq, lk).to(q.dtype) / (1 - dropout_p)
        keep = visible(lq, lk, window[0], 0 if causal else window[1], False, q.device)
        results.append(attend(q[a:e], k[c:d], v[c:d], keep, scale, softcap=softcap, bias=added, dropout=factors))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


def check_all(got, want, plain, dtype, cut=0.0):
    """test_varlen_attention.check, with the tables' gradients under the rule of dq."""
    check({n: got[n] for n in FACTOR}, want, plain, dtype, cut)
    for name in got.keys() - FACTOR.keys():
        check(*({"dq": results[name]} for results in (got, want, plain)), dtype, cut)


@pytest.mark.parametrize("backend, dtype, lut", kernels([F32, F16, BF16, F64], LUTS), indirect=["backend"])
def test_against_float64(backend, place, lut, dtype):
    """With every other option over several tiles of queries and keys, unequal lengths and GQA."""
    case, options = fitting(backend, CASE, FEW), EVERYTHING
    options = options if case is CASE else options | {"window": (20, -1)}
    x, bias = make(case, dtype, place), make_bias(case, lut, dtype=dtype, device=place)
    check_all(run(x, bias, **options), exact(x, bias, **options), run(x, bias, plain_torch, **options), dtype)


@pytest.mark.parametrize("backend, dtype, lut, terms", kernels([F32], ["exact", "log"], TERMS), indirect=["backend"])
def test_terms_alone(backend, place, dtype, lut, terms):
    case = fitting(backend, CASE)
    x, bias = make(case, dtype, place), make_bias(case, lut, terms, device=place)
    got = run(x, bias)
    check_all(got, exact(x, bias), run(x, bias, plain_torch), dtype)
    assert len(got) == 5 + sum(TERMS[terms])


@pytest.mark.parametrize("lengths", [[1], [31, 32, 33], [63, 64, 65], [255, 256, 257], [1] * 40], ids=str)
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_tile_edges(backend, place, lengths):
    if interpreted(backend) and (max(lengths) > 33 or len(lengths) > 9):
        pytest.skip("too slow in the interpreter")
    case = Case("", lengths, heads=2, d=8)
    x, bias = make(case, F32, place), make_bias(case, "scattered", device=place)
    check_all(run(x, bias), exact(x, bias), run(x, bias, plain_torch), F32)


@pytest.mark.parametrize("lengths", [[230], [3] * 30], ids=["one", "several"])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_shares_of_the_tables_gradients(backend, place, lengths):
    """Enough tiles that several programs, or groups of sequences, share the gradient of a row."""
    case, options = Case("", lengths, heads=1, heads_kv=1, d=8), {"window": (3, 2)}
    x, bias = make(case, F32, place), make_bias(case, "scattered", device=place)
    check_all(run(x, bias, **options), exact(x, bias, **options), run(x, bias, plain_torch, **options), F32)


WIDTHS = [(8, 8), (40, 24), (64, 64), (80, 96), (128, 128), (192, 256), (256, 256)]


@pytest.mark.parametrize("d, dv", WIDTHS, ids=str)
@pytest.mark.parametrize("backend, dtype", kernels([F32, F16]), indirect=["backend"])
def test_head_widths(backend, place, dtype, d, dv):
    if interpreted(backend) and (d != 40 or dtype == F32):
        pytest.skip("the code of the others is the same, and slow in the interpreter")
    case = Case("", [1, 17, 36], heads=2, heads_kv=2, d=d, dv=dv)
    x, bias = make(case, dtype, place), make_bias(case, "scattered", dtype=dtype, device=place)
    # A tensor core cuts the sum behind every 8 columns instead of rounding it: half of the last bit each, always down.
    cut = d / 8 * 2**-25 if backend == "triton" and GPU and dtype == F32 else 0.0
    check_all(run(x, bias), exact(x, bias), run(x, bias, plain_torch), dtype, cut)


@pytest.mark.parametrize("top_left", [False, True], ids=["bottom_right", "top_left"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_against_loops(backend, place, top_left):
    """One number at a time; the softcap comes before the bias, and the shift of the mask is that of the distances."""
    lq, lk, scale = [3, 0, 5, 2], [4, 2, 9, 0], 0.6
    q, k, v = (torch.randn(sum(n), h, 3, dtype=F64) for n, h in ((lq, 4), (lk, 2), (lk, 2)))
    keys, queries, lut = torch.randn(5, 4, 3, dtype=F64), torch.randn(5, 4, 3, dtype=F64), [3, 1, 0, 4, 2]
    dense, (dtype, tolerance) = torch.zeros(4, 4, 5, 9, dtype=F64), (F32, 2e-6) if backend == "triton" else (F64, 1e-12)
    for b, h in itertools.product(range(4), range(4)):
        for i, j in itertools.product(range(lq[b]), range(lk[b])):
            distance = j - i - (0 if top_left else lk[b] - lq[b])
            row = lut[min(max(distance, -2), 2) + 2]
            query, key = q[sum(lq[:b]) + i, h], k[sum(lk[:b]) + j, h // 2]
            dense[b, h, i, j] = scale * (query @ keys[row, h] + key @ queries[row, h])
    want_out, want_lse = loops(q, k, v, lq, lk, scale, -1, 1, top_left, softcap=2.0, bias=dense)
    q, k, v, keys, queries = (t.to(place, dtype) for t in (q, k, v, keys, queries))
    bias = fa.DisentangledBias(keys, queries, torch.tensor(lut, dtype=torch.int16, device=place))
    out, lse = fa.varlen_attention(
        q, k, v, offsets(lq, place), offsets(lk, place), scale=scale, softcap=2.0, bias=bias, window=(-1, 1),
        causal_align="top_left" if top_left else "bottom_right", return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend, place):
    case = Case("", [2, 0, 5], [4, 3, 5], heads=2, heads_kv=1, d=2)
    x, bias = make(case, F64, place), make_bias(case, "scattered", dtype=F64, device=place)
    inputs = [t.requires_grad_() for t in (*x[:3], *bias[:2])]

    def attention(q, k, v, keys, queries):
        given = fa.DisentangledBias(keys, queries, bias.lut)
        return fa.varlen_attention(q, k, v, x.cu_q, x.cu_k, bias=given, softcap=3.0, causal=True, return_lse=True)

    def finite(*inputs):  # the first rows of the last sequence see few keys, those without any have an LSE of -inf
        out, lse = attention(*inputs)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(finite, inputs)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_alibi_goes_with_it(backend, place):
    case = fitting(backend, SMALL)
    x, bias = make(case, F32, place), make_bias(case, "scattered", device=place)
    options = {"alibi_slopes": torch.rand(len(case.lq), 2, device=place)}
    got = run(x, bias, **options)
    for name, want in exact(x, bias, **options).items():
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_only_what_requires_grad(backend, place):
    """Tables alone have the gradients they have with the others; without them no gradient of a table is made."""
    case = fitting(backend, SMALL)
    x, bias = make(case, F32, place), make_bias(case, "scattered", device=place)
    want = run(x._replace(dlse=torch.zeros_like(x.dlse)), bias)
    keys = bias.position_keys.detach().requires_grad_()
    out = fa.varlen_attention(*x[:3], x.cu_q, bias=bias._replace(position_keys=keys))
    assert torch.equal(torch.autograd.grad(out, keys, x.dout)[0], want["dposition_keys"])
    q = x.q.detach().requires_grad_()
    out = fa.varlen_attention(q, *x[1:3], x.cu_q, bias=bias)
    assert torch.equal(torch.autograd.grad(out, q, x.dout)[0], want["dq"])


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_table_dtypes_and_strides(backend, place):
    """float32 tables beside 16-bit rows keep their dtype; any strides and alignments, and views of one projection in
    the place of q, k and v, give the same bits."""
    if interpreted(backend):
        pytest.skip("many passes are slow in the interpreter")
    dtype = BF16 if backend == "cpu" or GPU else F16
    case = fitting(backend, SMALL, TINY._replace(heads_kv=2))
    x, bias = make(case, dtype, place), make_bias(case, "scattered", device=place)
    wide = run(x, bias)
    both = torch.stack([bias.position_keys, bias.position_queries], 2)  # (rows, H, 2, D), as one projection gives
    q, k, v = torch.stack(x[:3], 2).unbind(2)
    variants = [
        fa.DisentangledBias(both[:, :, 0], both[:, :, 1], bias.lut.short()),
        fa.DisentangledBias(*(t.mT.contiguous().mT for t in bias[:2]), bias.lut),  # channels apart
    ]
    given = [bias.position_keys.to(dtype), bias.position_queries.to(dtype)]
    narrow = run(x, fa.DisentangledBias(*given, bias.lut))
    unaligned = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in given]
    for variant in variants:
        strided = run(x._replace(q=q, k=k, v=v), variant)
        for name in NAMES:
            assert torch.equal(wide[name], strided[name]), name
    assert wide["dposition_keys"].dtype == F32 and wide["dq"].dtype == dtype
    again = run(x, fa.DisentangledBias(*unaligned, bias.lut))
    for name in NAMES:
        assert torch.equal(narrow[name], again[name]), name


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_same_bits_every_time(backend, place):
    case = fitting(backend, CASE)
    x, bias = make(case, F32, place), make_bias(case, "scattered", device=place)
    first = run(x, bias, dropout_p=0.1)
    for _ in range(20 if GPU else 1):
        for name, again in run(x, bias, dropout_p=0.1).items():
            assert torch.equal(first[name], again), name


@pytest.mark.parametrize("lengths", [[700], [400, 3, 70], [40] * 30], ids=["one", "few", "many"])
def test_threads_change_no_bit(native, lengths):
    case, threads, results = Case("", lengths, heads=4, heads_kv=2, d=8), torch.get_num_threads(), []
    x, bias = make(case, F32, "cpu"), make_bias(case)
    with fa.use_backend("cpu"):
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(run(x, bias, dropout_p=0.1))
        torch.set_num_threads(threads)
    for name in NAMES:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_sequences_are_alone(backend, place):
    """NaN in one sequence reaches no other, and a sequence has the bits it has by itself."""
    x, bias = make(SMALL, F32, place), make_bias(SMALL, "scattered", device=place)
    clean = run(x, bias)
    for t in x[:3]:
        t[3:43] = math.nan
    dirty = run(x, bias)
    alone = fa.varlen_attention(*(t[43:] for t in x[:3]), offsets([20], place), bias=bias)
    for name in ("out", "dq", "dk", "dv"):
        assert dirty[name][3:43].isnan().all()
        assert torch.equal(dirty[name][:3], clean[name][:3]) and torch.equal(dirty[name][43:], clean[name][43:])
    assert torch.equal(alone, clean["out"][43:])


@pytest.mark.gpu
def test_graph_replays_other_lengths():
    case = Case("", [40, 3, 60], heads=2, d=64)
    x, bias = make(case, F16, "cuda", extra_rows=30), make_bias(case, dtype=F16, device="cuda")
    fa.varlen_attention(*x[:3], x.cu_q, bias=bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.varlen_attention(*x[:3], x.cu_q, bias=bias)
    x.cu_q.copy_(offsets([70, 0, 63], "cuda"))
    graph.replay()
    assert torch.equal(out, fa.varlen_attention(*x[:3], x.cu_q, bias=bias)) and out.any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_empty_batches_and_rows_beyond(backend, place):
    q = torch.randn(3, 2, 8, device=place, requires_grad=True)
    bias = make_bias(SMALL, "scattered", device=place)
    learned = [t.requires_grad_() for t in bias[:2]]
    for lengths in ([], [0, 0], [2]):
        out, lse = fa.varlen_attention(q, q, q, offsets(lengths, place), bias=bias, return_lse=True)
        total = sum(lengths)
        assert out[:total].all() and not out[total:].any() and (lse[:, total:] == -math.inf).all()
        dq, *grads = torch.autograd.grad(out.square().sum(), (q, *learned))
        assert not dq[total:].any() and all(bool(g.any()) == bool(total) for g in (dq[:total], *grads))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(native, isa):
    """The copies of the kernels that this machine would not choose are right too."""
    program = """
import torch, test_varlen_attention_disentangled as t
torch.manual_seed(8)  # the largest error of dq is often that of one row, whose terms cancel, and then a matter of luck
for dtype in (t.F32, t.BF16, t.F64):
    x, bias = t.make(t.CASE, dtype, "cpu"), t.make_bias(t.CASE, dtype=dtype)
    with t.fa.use_backend("cpu"):
        got = t.run(x, bias, **t.EVERYTHING)
    t.check_all(got, t.exact(x, bias, **t.EVERYTHING), t.run(x, bias, t.plain_torch, **t.EVERYTHING), dtype)
"""
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = os.environ | {"FLOWATTN_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- torch integration and errors


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_opcheck(backend, place, terms):
    checks = ("test_schema", "test_faketensor")
    if interpreted(backend) and terms != "keys":
        pytest.skip("many passes are slow in the interpreter")
    if not interpreted(backend):
        checks = (*checks, "test_autograd_registration", "test_aot_dispatch_dynamic")
    case, suffix = Case("", [3, 0, 5], heads=2, d=8), "_triton" * (backend == "triton")
    forward, backward = (op(f"varlen_attention_disentangled_{name}{suffix}") for name in ("fwd", "bwd"))
    x, (keys, queries, lut) = make(case, F32, place), make_bias(case, "scattered", terms, device=place)
    options = (None, 5, 5, 0.3, 4, 0, False)
    rng, slopes = torch.arange(2, device=place), torch.rand(2, device=place)
    scores = (1.5, slopes, None, None, lut, 0.2, rng, keys, queries)
    torch.library.opcheck(forward, (*x[:5], *options, *scores), test_utils=checks)
    out, lse = forward(*x[:5], *options, *scores)
    for want in (False, True):
        call = (x.dout, x.dlse, *x[:3], out, lse, x.cu_q, x.cu_k, *options, True, *scores, want)
        torch.library.opcheck(backward, call, test_utils=checks)


def test_compile(native):
    torch._dynamo.reset()
    compiled = torch.compile(fa.varlen_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 17], [5, 2, 9], [1, 4, 7, 2]):  # the second and third with symbolic sizes
        case = Case("", lengths, heads=2)
        x, bias = make(case, F32, "cpu"), make_bias(case)
        got, want = run(x, bias, compiled), run(x, bias)
        for name in NAMES:
            assert torch.equal(got[name], want[name]), name


Q, CU, LUT = torch.zeros(5, 2, 8), offsets([2, 3], "cpu"), torch.zeros(5, dtype=torch.int16)
TABLE = torch.zeros(4, 2, 8)
RULES = {
    "neither": (ValueError, "bias must have position_keys or position_queries", (None, None, LUT)),
    "heads": (ValueError, r"bias.position_keys must have shape \(4, 2, 8\)", (TABLE[:, :1], TABLE, LUT)),
    "no-rows": (ValueError, "bias.position_keys must have rows", (TABLE[:0], None, LUT)),
    "rows": (ValueError, r"bias.position_queries must have shape \(4, 2, 8\)", (TABLE, TABLE[:3], LUT)),
    "dtype": (TypeError, "bias.position_keys must be float32 or have the dtype of q", (TABLE.half(), None, LUT)),
    "device": (ValueError, "bias.position_queries must be on the device of q", (None, TABLE.to("meta"), LUT)),
    "lut-dtype": (TypeError, "bias.lut must be int16 or int32", (TABLE, None, LUT.long())),
    "lut-even": (ValueError, "bias.lut must have an odd length", (TABLE, None, LUT[:4])),
    "lut-values": (ValueError, "bias.lut must hold buckets 0..3", (TABLE, None, LUT + 4)),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    error, message, bias = RULES[rule]
    with pytest.raises(error, match=f"^varlen_attention: {message}.*; got "):
        fa.varlen_attention(Q, Q, Q, CU, bias=fa.DisentangledBias(*bias))


def test_deberta_constructor():
    bias = fa.DisentangledBias.deberta(TABLE, None)
    assert bias.lut.tolist() == [3, 3, 2, 1, 0] and bias.position_keys is TABLE and bias.position_queries is None
    assert torch.equal(fa.DisentangledBias.deberta(None, TABLE, max_distance=9).lut, deberta_lut(2, 9))
    with pytest.raises(ValueError, match="needs one of the tables; got neither"):
        fa.DisentangledBias.deberta(None, None)
    for span, most in ((3, 9), (0, 9), (8, 5)):
        with pytest.raises(ValueError, match="deberta_lut: span must be even"):
            deberta_lut(span, most)


def test_who_serves_it(native, device):
    q, cu, bias = Q.to(device), CU.to(device), make_bias(SMALL, device=device)
    assert fa.explain("varlen_attention", q, q, q, cu, bias=bias) == ("triton" if GPU else "cpu")
    with (
        pytest.raises(NotImplementedError, match="triton' was forced; it refuses: no float64"),
        fa.use_backend("triton"),
    ):
        fa.varlen_attention(q.double(), q.double(), q.double(), cu, bias=bias)


def test_private_ops_check_what_protects_memory(native):
    options, none = (None, 5, 5, 1.0, -1, -1, False), (0.0, None, None, None)
    wrong = [
        ((*none, None, 0.0, None, TABLE), "a table and rel_lut must be given together"),
        ((*none, LUT, 0.0, None, TABLE[..., :4]), "position_keys must be"),
        ((*none, LUT, 0.0, None, TABLE, TABLE[:2]), "position_queries must be"),
        ((*none, LUT + 4, 0.0, None, TABLE), "rel_lut must hold buckets"),
        ((0.0, None, torch.zeros(1, 1, 3, 3), None, LUT, 0.0, None, TABLE), "position tables stand alone"),
    ]
    for scores, message in wrong:
        with pytest.raises((RuntimeError, ValueError), match=f"varlen_attention: {message}.*; got "):
            op("varlen_attention_disentangled_fwd")(Q, Q, Q, CU, CU, *options, *scores)
