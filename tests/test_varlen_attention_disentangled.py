"""varlen_attention with DeBERTa's disentangled bias, and the gradients of its tables."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from test_varlen_attention import BF16, F16, F32, F64, FACTOR, Case, check, loops, make, offsets

import flowattn as fa
from flowattn._library import op
from flowattn.ops.attention_scores import deberta_lut
from flowattn.reference.dropout import keep_mask
from flowattn.reference.varlen_attention import attend, disentangled_bias, visible

BACKENDS = ["reference", "cpu"]
CASE = Case("", [5, 66, 0, 20, 301], [7, 66, 3, 0, 290], heads=4, heads_kv=2, d=16)
SMALL = Case("", [3, 70, 20], heads=2, d=8)
TERMS = {"both": (True, True), "keys": (True, False), "queries": (False, True)}
EVERYTHING = {"causal": True, "window": (200, -1), "softcap": 1.5, "dropout_p": 0.3}
NAMES = (*FACTOR, "dposition_keys", "dposition_queries")
# Name -> (rows of the tables, lut): a row a distance, logarithmic rows, and rows in no order at all.
LUTS = {
    "exact": (120, deberta_lut(60)),
    "log": (32, deberta_lut(16, 80)),
    "scattered": (9, torch.randint(0, 9, (101,), generator=torch.Generator().manual_seed(1)).to(torch.int16)),
}


def make_bias(case, lut="log", terms="both", dtype=F32, device="cpu"):
    rows, lut = LUTS[lut]
    tables = (torch.randn(rows, case.heads, case.d, dtype=F64).to(device, dtype) if t else None for t in TERMS[terms])
    return fa.DisentangledBias(*tables, lut.to(device))


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
    rng, results, scale = torch.randint(2**63 - 1, (2,)), [], q.shape[-1] ** -0.5
    for b, (a, e, c, d) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist())):
        lq, lk = e - a, d - c
        added = disentangled_bias(q[a:e], k[c:d], scale, lk - lq, *bias)
        factors = keep_mask(rng, dropout_p, b, q.shape[1], lq, lk).to(q.dtype) / (1 - dropout_p)
        keep = visible(lq, lk, window[0], 0 if causal else window[1], False)
        results.append(attend(q[a:e], k[c:d], v[c:d], keep, scale, softcap=softcap, bias=added, dropout=factors))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


def check_all(got, want, plain, dtype):
    """test_varlen_attention.check, with the tables' gradients under the rule of dq."""
    check({n: got[n] for n in FACTOR}, want, plain, dtype)
    for name in got.keys() - FACTOR.keys():
        check(*({"dq": results[name]} for results in (got, want, plain)), dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("lut", LUTS)
def test_against_float64(native, lut, dtype):
    """With every other option over several tiles of queries and keys, unequal lengths and GQA."""
    x, bias = make(CASE, dtype, "cpu"), make_bias(CASE, lut, dtype=dtype)
    with fa.use_backend("cpu"):
        got = run(x, bias, **EVERYTHING)
    check_all(got, exact(x, bias, **EVERYTHING), run(x, bias, plain_torch, **EVERYTHING), dtype)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("lut", ["exact", "log"])
def test_terms_alone(native, lut, terms):
    x, bias = make(CASE, F32, "cpu"), make_bias(CASE, lut, terms)
    with fa.use_backend("cpu"):
        got = run(x, bias)
    check_all(got, exact(x, bias), run(x, bias, plain_torch), F32)
    assert len(got) == 5 + sum(TERMS[terms])


@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [255, 256, 257], [1] * 40])
def test_tile_edges(native, lengths):
    case = Case("", lengths, heads=2, d=8)
    x, bias = make(case, F32, "cpu"), make_bias(case)
    with fa.use_backend("cpu"):
        check_all(run(x, bias), exact(x, bias), run(x, bias, plain_torch), F32)


@pytest.mark.parametrize("top_left", [False, True], ids=["bottom_right", "top_left"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_against_loops(backend, place, top_left):
    """One number at a time; the softcap comes before the bias, and the shift of the mask is that of the distances."""
    lq, lk, scale = [3, 0, 5, 2], [4, 2, 9, 0], 0.6
    q, k, v = (torch.randn(sum(n), h, 3, dtype=F64) for n, h in ((lq, 4), (lk, 2), (lk, 2)))
    keys, queries, lut = torch.randn(5, 4, 3, dtype=F64), torch.randn(5, 4, 3, dtype=F64), [3, 1, 0, 4, 2]
    dense = torch.zeros(4, 4, 5, 9, dtype=F64)
    for b, h in itertools.product(range(4), range(4)):
        for i, j in itertools.product(range(lq[b]), range(lk[b])):
            distance = j - i - (0 if top_left else lk[b] - lq[b])
            row = lut[min(max(distance, -2), 2) + 2]
            query, key = q[sum(lq[:b]) + i, h], k[sum(lk[:b]) + j, h // 2]
            dense[b, h, i, j] = scale * (query @ keys[row, h] + key @ queries[row, h])
    want_out, want_lse = loops(q, k, v, lq, lk, scale, -1, 1, top_left, softcap=2.0, bias=dense)
    bias = fa.DisentangledBias(keys.to(place), queries.to(place), torch.tensor(lut, dtype=torch.int16, device=place))
    out, lse = fa.varlen_attention(
        q.to(place), k.to(place), v.to(place), offsets(lq, place), offsets(lk, place), scale=scale, softcap=2.0,
        bias=bias, window=(-1, 1), causal_align="top_left" if top_left else "bottom_right", return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu(), want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
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


def test_alibi_goes_with_it(native):
    x, bias = make(SMALL, F32, "cpu"), make_bias(SMALL)
    options = {"alibi_slopes": torch.rand(3, 2)}
    with fa.use_backend("cpu"):
        got = run(x, bias, **options)
    for name, want in exact(x, bias, **options).items():
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-5)


def test_only_what_requires_grad(native):
    """Tables alone have the gradients they have with the others; without them no gradient of a table is made."""
    x, bias = make(SMALL, F32, "cpu"), make_bias(SMALL)
    with fa.use_backend("cpu"):
        want = run(x._replace(dlse=torch.zeros_like(x.dlse)), bias)
        keys = bias.position_keys.detach().requires_grad_()
        out = fa.varlen_attention(*x[:3], x.cu_q, bias=bias._replace(position_keys=keys))
        assert torch.equal(torch.autograd.grad(out, keys, x.dout)[0], want["dposition_keys"])
        q = x.q.detach().requires_grad_()
        out = fa.varlen_attention(q, *x[1:3], x.cu_q, bias=bias)
        assert torch.equal(torch.autograd.grad(out, q, x.dout)[0], want["dq"])


def test_table_dtypes_and_strides(native):
    """float32 tables beside bfloat16 rows keep their precision and their dtype; any strides give the same bits."""
    x, bias = make(SMALL, BF16, "cpu"), make_bias(SMALL)
    with fa.use_backend("cpu"):
        wide = run(x, bias)
        both = torch.stack([bias.position_keys, bias.position_queries], 2)  # (rows, H, 2, D), as one projection gives
        strided = run(x, fa.DisentangledBias(both[:, :, 0], both[:, :, 1], bias.lut.short()))
    assert wide["dposition_keys"].dtype == F32 and wide["dq"].dtype == BF16
    for name in NAMES:
        assert torch.equal(wide[name], strided[name]), name


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


def test_sequences_are_alone(native):
    """NaN in one sequence reaches no other, and a sequence has the bits it has by itself."""
    x, bias = make(SMALL, F32, "cpu"), make_bias(SMALL)
    with fa.use_backend("cpu"):
        clean = fa.varlen_attention(*x[:3], x.cu_q, bias=bias)
        for t in x[:3]:
            t[3:73] = math.nan
        dirty = fa.varlen_attention(*x[:3], x.cu_q, bias=bias)
        alone = fa.varlen_attention(*(t[73:] for t in x[:3]), offsets([20], "cpu"), bias=bias)
    assert dirty[3:73].isnan().all() and torch.equal(dirty[:3], clean[:3])
    assert torch.equal(dirty[73:], clean[73:]) and torch.equal(alone, clean[73:])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_empty_batches_and_rows_beyond(backend, place):
    q = torch.randn(3, 2, 8, device=place, requires_grad=True)
    bias = make_bias(SMALL, device=place)
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
import test_varlen_attention_disentangled as t
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
def test_opcheck(native, terms):
    case = Case("", [3, 0, 17], heads=2)
    x, (keys, queries, lut) = make(case, F32, "cpu"), make_bias(case, terms=terms)
    options = (None, 17, 17, 0.3, 4, 0, False)
    scores = (1.5, torch.rand(2), None, None, lut, 0.2, torch.arange(2), keys, queries)
    torch.library.opcheck(op("varlen_attention_disentangled_fwd"), (*x[:5], *options, *scores))
    out, lse = op("varlen_attention_disentangled_fwd")(*x[:5], *options, *scores)
    for want in (False, True):
        backward = (x.dout, x.dlse, *x[:3], out, lse, x.cu_q, x.cu_k, *options, True, *scores, want)
        torch.library.opcheck(op("varlen_attention_disentangled_bwd"), backward)


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


def test_who_serves_it(native, capsys):
    bias = make_bias(SMALL)
    assert fa.explain("varlen_attention", Q, Q, Q, CU, bias=bias) == "cpu"
    assert "has no DisentangledBias" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="refuses: has no DisentangledBias"), fa.use_backend("triton"):
        fa.varlen_attention(Q, Q, Q, CU, bias=bias)


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
