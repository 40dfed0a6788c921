"""varlen_attention: the reference against plain loops, every backend against the float64 reference."""

import itertools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import flowattn as fa
from flowattn import _native
from flowattn.reference.varlen_attention import attend, visible
from flowattn.reference.varlen_attention import varlen_attention as reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = ["reference", "cpu", "triton"] + ["cuda"] * (HOPPER and _native.CUDA_BUILT)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# How much larger than plain torch's in the same dtype an error against float64 may be: the factors FlashAttention 2 is
# tested with. `atol` below adds twice the rounding of the result itself, for results that plain torch gets exactly.
FACTOR = {"out": 2, "lse": 2, "dq": 3, "dk": 3, "dv": 3}
# Where plain torch is no measure: it has a 16-bit LSE where every backend has a float32 one, and in float64 it is the
# reference itself.
LSE_ATOL_16, ATOL_64 = 1e-3, 1e-12


class Case(NamedTuple):
    name: str
    lq: list
    lk: list = None  # None: as lq
    heads: int = 2
    heads_kv: int = 2
    d: int = 32
    dv: int = None  # None: as d
    options: dict = {}
    interpreted: bool = False  # small enough for Triton's interpreter

    @property
    def lengths(self):
        return self.lq, self.lq if self.lk is None else self.lk


EDGES = [63, 64, 65, 127, 128, 129]
CAUSAL, TOP_LEFT = {"causal": True}, {"causal": True, "causal_align": "top_left"}
UNEQUAL = [0, 3, 5, 0, 1, 70, 0], [4, 0, 9, 1, 0, 33, 0]
CASES = [
    Case("lengths-1-prime", [1, 7, 31, 2], interpreted=True),
    Case("tile-edges", EDGES),
    Case("several-tiles", [300, 5, 521]),
    Case("several-tiles-causal", [300, 5, 521], options=CAUSAL),
    Case("empty-first-middle-last", [0, 0, 5, 0, 9, 0, 0], interpreted=True),
    Case("all-empty", [0, 0, 0], interpreted=True),
    Case("no-sequences", [], interpreted=True),
    Case("unequal", *UNEQUAL, interpreted=True),
    Case("unequal-causal", *UNEQUAL, options=CAUSAL, interpreted=True),
    Case("unequal-top-left", *UNEQUAL, options=TOP_LEFT, interpreted=True),
    Case("one-query-many-keys", [1] * 9, [200, 0, 65, 129, 64, 31, 300, 1, 99], heads=4),
    Case("causal", [1, 66, 17], options=CAUSAL, interpreted=True),
    Case("window-0-0", [20, 66], options={"window": (0, 0)}, interpreted=True),
    Case("window-5-3", [20, 66, 301], options={"window": (5, 3)}),
    Case("window-wider-than-L", [20, 66], options={"window": (1000, 2**62)}),
    Case("window-left-only", [20, 66, 150], options={"window": (7, -1)}),
    Case("window-right-only", [20, 66, 150], options={"window": (-1, 9)}),
    Case("window-causal-unequal", [40, 130, 9], [70, 64, 0], options={"causal": True, "window": (16, -1)}),
    Case("window-top-left", [40, 130, 9], [70, 64, 4], options={"window": (6, 2), "causal_align": "top_left"}),
    Case("gqa", [5, 66, 20], heads=6, heads_kv=2, options=CAUSAL, interpreted=True),
    Case("mqa", [5, 66, 200], heads=4, heads_kv=1),
    Case("dv-larger", [5, 66, 20], dv=48, interpreted=True),
    Case("dv-smaller", [5, 66, 20], d=40, dv=8, options=CAUSAL),
    Case("long-among-tiny", [1] * 20 + [700] + [1] * 30, heads=1, heads_kv=1),
    Case("scale", [5, 66], options={"scale": 0.7}),
    Case("scale-negative", [5, 66], options={"scale": -0.7}),
    Case("scale-zero", [5, 66], options={"scale": 0.0} | CAUSAL, interpreted=True),
]
WIDTHS = [8, 16, 32, 40, 64, 72, 80, 96, 111, 128, 192, 256]


def runnable(backend, case, dtype):
    """False for what a backend is not asked to do; the interpreter's bf16 dot is wrong, and it is slow."""
    if backend == "cuda":
        widths = (case.d, case.dv or case.d)
        fits = all(width <= 64 and width % 8 == 0 for width in widths)
        return dtype in (F16, BF16) and fits and case.options.get("scale", 1.0) > 0
    if backend == "triton":
        return dtype != F64 and (torch.cuda.is_available() or (case.interpreted and dtype != BF16))
    return dtype != F64 or backend == "cpu"


def work_dtype(backend):
    """A dtype that the backend takes; the kernels' paths do not depend on it."""
    return F16 if backend == "cuda" else F32


def combinations(cases, dtypes):
    """pytest parameters (backend, case, dtype) with one id each."""
    return [
        pytest.param(backend, case, dtype, id=f"{backend}-{case.name}-{str(dtype)[6:]}")
        for backend, case, dtype in itertools.product(BACKENDS, cases, dtypes)
        if runnable(backend, case, dtype)
    ]


def offsets(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor


def make(case, dtype, device, extra_rows=0):
    lq, lk = case.lengths
    tq, tk, dv = sum(lq) + extra_rows, sum(lk) + extra_rows, case.dv or case.d

    def random(*shape):
        return torch.randn(shape, dtype=F64, device=device).to(dtype)

    q, k, v = random(tq, case.heads, case.d), random(tk, case.heads_kv, case.d), random(tk, case.heads_kv, dv)
    dlse = torch.randn(case.heads, tq, dtype=torch.promote_types(dtype, F32), device=device)
    return Inputs(q, k, v, offsets(lq, device), offsets(lk, device), random(tq, case.heads, dv), dlse)


def run(x, function=fa.varlen_attention, dtype=None, **options):
    """out, lse and the three gradients by name, from the inputs in `dtype`."""
    q, k, v = (t.detach().to(dtype or t.dtype).requires_grad_() for t in x[:3])
    out, lse = function(q, k, v, x.cu_q, x.cu_k, **options, return_lse=True)
    grads = torch.autograd.grad((out, lse), (q, k, v), (x.dout.to(out.dtype), x.dlse.to(lse.dtype)))
    return dict(zip(FACTOR, (out.detach(), lse.detach(), *grads)))


def exact(x, **options):
    with fa.use_backend("reference"):
        return run(x, dtype=F64, **options)


def plain_torch(
    q, k, v, cu_q, cu_k, *, causal=False, causal_align="bottom_right", window=(-1, -1), scale=None, return_lse
):
    """The formula in the dtype of the inputs throughout, which is the measure for the kernels' errors."""
    results = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        keep = visible(b - a, d - c, window[0], 0 if causal else window[1], causal_align == "top_left", q.device)
        results.append(attend(q[a:b], k[c:d], v[c:d], keep, q.shape[-1] ** -0.5 if scale is None else scale))
    if not results:  # B = 0: a sequence of no rows
        return attend(q, k, v, visible(0, 0, -1, -1, False, q.device), 1.0)
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


def check(got, want, plain, dtype, cut=0.0):
    """cut: what the kernel's products may lose of the largest number besides."""
    for name in got:
        a, b, c, factor = got[name].double(), want[name], plain[name].double(), FACTOR[name]
        hidden = b == -math.inf
        assert torch.equal(a == -math.inf, hidden), f"{name}: -inf in the wrong places"
        error, reach = ((x - b).masked_fill(hidden, 0).abs().amax(dim=None) if b.numel() else 0.0 for x in (a, c))
        finite = b.masked_fill(hidden, 0)
        rounded = finite.to(torch.promote_types(dtype, F32) if name == "lse" else dtype)
        atol, size = (
            (2 * float((rounded + 0.3 - 0.3 - rounded).abs().max()), float(finite.abs().max())) if b.numel() else (0, 0)
        )
        atol = (ATOL_64 if dtype == F64 else atol) + cut * size
        limit = LSE_ATOL_16 if name == "lse" and dtype in (F16, BF16) else factor * reach + atol
        assert error <= limit, f"{name}: error {error:.3g} against float64, plain torch allows {limit:.3g}"


def same_bits(a, b):
    """Equal including NaN; names the first result that differs."""
    for name in FACTOR:
        assert torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)), f"{name} differs"


@pytest.mark.parametrize("backend, case, dtype", combinations(CASES, [F32, F16, BF16, F64]), indirect=["backend"])
def test_against_float64(backend, case, dtype, place):
    x = make(case, dtype, place)
    check(run(x, **case.options), exact(x, **case.options), run(x, plain_torch, **case.options), dtype)


WIDE_CASES = [Case(f"d{d}", [1, 17, 66], d=d, options=CAUSAL, interpreted=d in (8, 40, 64)) for d in WIDTHS]


@pytest.mark.parametrize("backend, case, dtype", combinations(WIDE_CASES, [F32, F16]), indirect=["backend"])
def test_head_widths(backend, case, dtype, place):
    x = make(case, dtype, place)
    check(run(x, **case.options), exact(x, **case.options), run(x, plain_torch, **case.options), dtype)


# --- the reference


def loops(q, k, v, lq, lk, scale, left, right, top_left, softcap=0.0, alibi_slopes=None, bias=None):
    """out (Tq, H, Dv) and lse (H, Tq) straight from the formulas, one number at a time."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.zeros(*q.shape[:2], v.shape[2], dtype=F64), torch.full((heads, q.shape[0]), -math.inf, dtype=F64)
    q0 = k0 = 0
    for b, (n, m) in enumerate(zip(lq, lk)):
        shift = 0 if top_left else m - n
        for h, i in itertools.product(range(heads), range(n)):
            scores = {}
            for j in range(m):
                if (left >= 0 and j < i + shift - left) or (right >= 0 and j > i + shift + right):
                    continue
                z = scale * sum(float(a) * float(c) for a, c in zip(q[q0 + i, h], k[k0 + j, h // group]))
                z = softcap * math.tanh(z / softcap) if softcap else z
                if alibi_slopes is not None:
                    z -= float(alibi_slopes[b, h] if alibi_slopes.dim() == 2 else alibi_slopes[h]) * abs(i + shift - j)
                if bias is not None:
                    z += float(bias[b, h, i, j] if bias.dim() == 4 else bias[h, i, j])
                scores[j] = z
            if scores:
                top = max(scores.values())
                total = sum(math.exp(z - top) for z in scores.values())
                lse[h, q0 + i] = top + math.log(total)
                out[q0 + i, h] = sum(math.exp(z - top) / total * v[k0 + j, h // group] for j, z in scores.items())
        q0, k0 = q0 + n, k0 + m
    return out, lse


@pytest.mark.parametrize("top_left", [False, True], ids=["bottom_right", "top_left"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1), (0, 0), (-1, 2), (3, -1)], ids=str)
@pytest.mark.parametrize("extra", ["plain", "softcap", "alibi", "alibi-batch", "bias", "bias-batch", "all"])
def test_reference_against_loops(extra, window, top_left):
    lq, lk = [3, 0, 5, 2], [4, 2, 3, 0]
    q, k, v = (torch.randn(sum(n), h, d, dtype=F64) for n, h, d in ((lq, 4, 3), (lk, 2, 3), (lk, 2, 2)))
    extras = {
        "plain": {},
        "softcap": {"softcap": 0.8},
        "alibi": {"alibi_slopes": torch.rand(4)},
        "alibi-batch": {"alibi_slopes": torch.rand(4, 4)},
        "bias": {"bias": torch.randn(4, 5, 4)},
        "bias-batch": {"bias": torch.randn(4, 4, 5, 4)},
        "all": {"softcap": 0.8, "alibi_slopes": torch.rand(4), "bias": torch.randn(4, 5, 4)},
    }[extra]
    out, lse = reference(q, k, v, offsets(lq, "cpu"), offsets(lk, "cpu"), 0.6, *window, top_left, **extras)
    want_out, want_lse = loops(q, k, v, lq, lk, 0.6, *window, top_left, **extras)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_extras_reach_the_reference():
    q = torch.randn(5, 2, 4, dtype=F64)
    cu, slopes, bias = offsets([2, 3], "cpu"), torch.rand(2), torch.randn(2, 3, 3)
    out = fa.varlen_attention(q, q, q, cu, softcap=0.8, alibi_slopes=slopes, bias=bias)
    want, _ = loops(q, q, q, [2, 3], [2, 3], 0.5, -1, -1, False, softcap=0.8, alibi_slopes=slopes, bias=bias)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


# --- values, layouts, isolation


def sdpa_loop(x):
    """Output and gradients of torch's own attention, sequence by sequence, in the dtype of the inputs."""
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    bounds = list(itertools.pairwise(x.cu_q.tolist()))
    heads_first = [[t[a:b].transpose(0, 1)[None] for t in (q, k, v)] for a, b in bounds]
    out = torch.cat([torch.nn.functional.scaled_dot_product_attention(*t)[0].transpose(0, 1) for t in heads_first])
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout))))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_scores_beyond_half_precision(backend, place):
    """q . k overflows float16, so the formula in float16 is no measure: torch's attention, which sums in float32, is,
    and for the LSE the reference."""
    x = make(Case("", [5, 66, 20] * 8, d=64), F16, place)  # largest errors of many rows, not the luck of a few
    x = x._replace(q=x.q * 60, k=x.k * 60, dlse=torch.zeros_like(x.dlse))
    assert torch.einsum("ihd,jhd->hij", x.q, x.k).isinf().any()
    with fa.use_backend("reference"):
        plain = run(x)
    got = run(x)
    check({"lse": got.pop("lse")}, exact(x), plain, F32)
    check(got, exact(x), sdpa_loop(x), F16)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
def test_one_key_of_a_large_score(backend, dtype, place):
    """P is 1, and no rounding of a score in the thousands shows: the output is v, and the gradient of v that of out."""
    x = make(Case("", [1] * 40, d=64), dtype, place)
    x = x._replace(q=x.q * 34, k=x.k * 34)
    got = run(x)
    assert 2000 < got["lse"].abs().max() < 4096
    # Three tf32 products hold 22 of the 24 bits of a float32 operand.
    rounds = 2.0**-21 if backend == "triton" and dtype == F32 and place == "cuda" else 0.0
    for result, expected in ((got["out"], x.v), (got["dv"], x.dout)):
        torch.testing.assert_close(result, expected, rtol=rounds, atol=0.0)


def strided(x, layout):
    """The same values as x in another layout of q, k and v."""
    if layout == "one-buffer":
        q, k, v = torch.stack((x.q, x.k, x.v), 1).unbind(1)
    elif layout == "heads-first":
        q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x.q, x.k, x.v))
    elif layout == "unaligned":
        q, k, v = (torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (x.q, x.k, x.v))
    else:
        assert layout == "expanded"
        q, k, v = (t[:1, :1].expand(t.shape) for t in (x.q, x.k, x.v))
    return x._replace(q=q, k=k, v=v)


@pytest.mark.parametrize("layout", ["one-buffer", "heads-first", "unaligned", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_layouts_give_the_same_bits(backend, layout, place):
    if backend == "cuda" and layout in ("unaligned", "expanded"):
        pytest.skip("bulk copies need rows at different multiples of 16 bytes")
    x = strided(make(Case("", [5, 66, 20]), work_dtype(backend), place), layout)
    dense = x._replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous())
    same_bits(run(x, causal=True), run(dense, causal=True))


@pytest.mark.parametrize(
    "backend, case, dtype", combinations([Case("", [5, 66, 20], interpreted=True)], [F32, F16]), indirect=["backend"]
)
def test_spellings_give_the_same_bits(backend, case, dtype, place):
    """int64 or strided offsets, hints larger than needed, a leading dim of 1 and default arguments change nothing."""
    x = make(case, dtype, place)
    want = run(x)
    same_bits(run(x._replace(cu_q=x.cu_q.long(), cu_k=x.cu_k.long())), want)
    spread = x.cu_q.repeat_interleave(2)[::2]
    same_bits(run(x._replace(cu_q=spread, cu_k=spread)), want)
    got = run(x, max_seqlen_q=4000, max_seqlen_k=5000)
    same_bits(want | {name: got[name] for name in ("out", "lse")}, want)
    near = 2e-3 if dtype == F16 else 0
    for name in ("dq", "dk", "dv"):  # the hints choose the kernel of the backward in half precision
        torch.testing.assert_close(got[name], want[name], atol=near, rtol=near)
    same_bits(run(x, max_seqlen_q=66, max_seqlen_k=66), want)
    assert torch.equal(fa.varlen_attention(*x[:3], x.cu_q), want["out"])
    lifted = x._replace(**{name: getattr(x, name)[None] for name in ("q", "k", "v", "dout", "dlse")})
    got = run(lifted)
    assert got["out"].shape == (1, *want["out"].shape) and got["lse"].shape == (1, *want["lse"].shape)
    same_bits({name: t[0] for name, t in got.items()}, want)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_beyond_the_last_sequence(backend, place):
    x = make(Case("", [5, 66, 20], heads=4), work_dtype(backend), place, extra_rows=3)
    for tensor in x[:3] + (x.dout,):
        tensor[-3:] = math.nan
    x.dlse[:, -3:] = math.nan
    got = run(x)
    assert all(not got[name][-3:].any() for name in ("out", "dq", "dk", "dv"))
    assert (got["lse"][:, -3:] == -math.inf).all()
    same_bits({n: t[:, :-3] if n == "lse" else t[:-3] for n, t in got.items()}, run(cut(x, 0, 91)))


def cut(x, begin, end, lengths=(5, 66, 20)):
    """Rows begin..end of self-attention inputs, which hold sequences of the given lengths."""
    cu = offsets(lengths, x.q.device)
    q, k, v, dout = (t[begin:end] for t in (x.q, x.k, x.v, x.dout))
    return Inputs(q, k, v, cu, cu, dout, x.dlse[:, begin:end])


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_sequence(backend, poison, place):
    x = make(Case("", [5, 66, 20, 70]), work_dtype(backend), place)
    want = run(x)
    for tensor in x[:3] + (x.dout,):
        tensor[5:71] = poison
    got = run(x)
    for name in FACTOR:
        a, b = (t[name].transpose(0, 1) if name == "lse" else t[name] for t in (got, want))
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[71:], b[71:]), f"{name} of another sequence changed"
        assert not a[5:71].isfinite().any() or name == "lse", f"{name} hides the poison"


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize(
    "backend, lengths",
    [("reference", [5, 66, 20]), ("cpu", [5, 300, 20, 129]), ("triton", [5, 66])]
    + [("cuda", [5, 300, 20, 129])] * ("cuda" in BACKENDS),
    indirect=["backend"],
)
def test_neighbours_change_no_bit(backend, lengths, options, place):
    """Each sequence packed alone gives the bits it gives in company, outputs and gradients."""
    x = make(Case("", lengths, heads=3, heads_kv=3), work_dtype(backend), place)
    together, begin = run(x, **options), 0
    for length in lengths:
        alone = run(cut(x, begin, begin + length, [length]), **options)
        rows = slice(begin, begin + length)
        same_bits(alone, {n: t[:, rows] if n == "lse" else t[rows] for n, t in together.items()})
        begin += length


def test_threads_change_no_bit(native):
    """One thread takes one backward pass over a lone long head, two threads split it into two passes."""
    x, threads = make(Case("", [700, 3], heads=2, heads_kv=1), F32, "cpu"), torch.get_num_threads()
    results = []
    with fa.use_backend("cpu"):
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(run(x, window=(300, 40)))
        torch.set_num_threads(threads)
    same_bits(*results)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(native, isa):
    """The copies of the kernels that this machine would not choose are right too."""
    program = """
import torch, test_varlen_attention as t
for dtype in (t.F32, t.F16, t.BF16, t.F64):
    case = t.Case("", [5, 66, 20, 300], heads=4, d=40, dv=23, options={"causal": True, "window": (70, -1)})
    x = t.make(case, dtype, "cpu")
    with t.fa.use_backend("cpu"):
        got = t.run(x, **case.options)
    t.check(got, t.exact(x, **case.options), t.run(x, t.plain_torch, **case.options), dtype)
"""
    environment = os.environ | {
        "FLOWATTN_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_ten_thousand_sequences(backend):
    """One-token sequences return their value; the long one among them is checked against itself alone."""
    lengths = [1] * 5000 + [3000] + [1] * 4999
    x = make(Case("", lengths, heads=1, heads_kv=1, d=8), F32, "cpu")
    got = run(x)
    single = torch.cat((torch.arange(5000), torch.arange(8000, 12999)))
    torch.testing.assert_close(got["out"][single], x.v[single], rtol=0, atol=0)
    torch.testing.assert_close(got["dv"][single], x.dout[single], rtol=0, atol=0)
    alone = run(cut(x, 5000, 8000, [3000]))
    same_bits(alone, {n: t[:, 5000:8000] if n == "lse" else t[5000:8000] for n, t in got.items()})


# --- gradients


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradient_of_lse_alone(backend, place):
    x = make(Case("", [5, 66, 20], heads=4), work_dtype(backend), place)
    got = run(x._replace(dout=torch.zeros_like(x.dout)))
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    _, lse = fa.varlen_attention(q, k, v, x.cu_q, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), x.dlse, materialize_grads=True)
    assert not dv.any()
    same_bits({**got, "dq": dq, "dk": dk, "dv": dv}, got)
    assert got["dq"].any() and got["dk"].any()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_of_some_inputs(backend, needed, place):
    x = make(Case("", [5, 20]), work_dtype(backend), place)
    want = run(x._replace(dlse=torch.zeros_like(x.dlse)))
    tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(x[:3])]
    grads = torch.autograd.grad(fa.varlen_attention(*tensors, x.cu_q), [tensors[i] for i in needed], x.dout)
    for i, grad in zip(needed, grads):
        torch.testing.assert_close(grad, want[("dq", "dk", "dv")[i]], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, CAUSAL, {"window": (1, 1), "causal_align": "top_left"}], ids=["full", "causal", "window"]
)
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend, options):
    x = make(Case("", [3, 0, 2, 1], [2, 2, 4, 0], heads=2, heads_kv=1, d=3, dv=2), F64, "cpu")

    def finite(q, k, v):
        out, lse = fa.varlen_attention(q, k, v, x.cu_q, x.cu_k, **options, return_lse=True)
        return out, lse[lse > -math.inf]

    assert torch.autograd.gradcheck(finite, [t.requires_grad_() for t in x[:3]])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_repeat_bitwise(backend, place):
    x = make(Case("", [5, 66, 20], heads=4, heads_kv=2), work_dtype(backend), place)
    first = run(x, deterministic=True)
    for _ in range(3):
        same_bits(run(x, deterministic=True), first)
