"""varlen_attention: dropout of the attention probabilities, the same bits on every backend."""

import itertools
import math

import pytest
import torch
from test_varlen_attention import BF16, F16, F32, F64, Case, check, exact, make, offsets, run, same_bits
from test_varlen_attention_scores import make_options

import flowattn as fa
from flowattn.reference.dropout import dropout_threshold, keep_mask, philox4x32
from flowattn.reference.varlen_attention import attend, visible

BACKENDS = ["reference", "cpu"]


def seeded(seed, function, *args, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


def drawn(seed):
    """The rng tensor that the next call draws after manual_seed(seed)."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (2,))


def philox_of_ints(counter, key):
    """Philox4x32-10 from its definition, in plain Python ints."""
    x, y, z, w = counter
    low, high = key
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (b >> 32) ^ y ^ low, b % 2**32, (a >> 32) ^ w ^ high, a % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return x, y, z, w


def keep_of_ints(rng, p, b, h, i, j, heads):
    seed, offset = rng
    words = philox_of_ints((j // 4, i, b * heads + h, offset % 2**32), (seed % 2**32, seed // 2**32))
    return words[j % 4] >= round(p * 2**32)


@pytest.mark.parametrize("function", [philox_of_ints, philox4x32], ids=["ints", "reference"])
def test_philox_known_answers(function):
    """The vectors that Random123, the authors' library, publishes for philox4x32 with 10 rounds."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answers = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (pi, (0xA4093822, 0x299F31D0)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), want in answers.items():
        if function is philox4x32:
            counter, key = (tuple(torch.tensor(x) for x in words) for words in (counter, key))
        assert tuple(int(x) for x in function(counter, key)) == want


def test_reference_mask_against_ints():
    rng, heads = drawn(3), 3
    for b, p in ((0, 0.1), (5, 0.75)):
        mask = keep_mask(rng, p, b, heads, 4, 11)
        for h, i, j in itertools.product(range(heads), range(4), range(11)):
            assert mask[h, i, j] == keep_of_ints(rng.tolist(), p, b, h, i, j, heads)
    assert dropout_threshold(0.25) == 2**30 and dropout_threshold(1 - 2**-40) == 2**32 - 1


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_against_loops(backend):
    """One number at a time: softmax over all keys, then the mask, then the values; the LSE knows nothing of it."""
    lq, lk, heads, p = [3, 0, 5, 2], [6, 2, 9, 0], 4, 0.4
    q, k, v = (torch.randn(sum(n), h, 3, dtype=F64) for n, h in ((lq, heads), (lk, 2), (lk, 2)))
    cu_q, cu_k = offsets(lq, "cpu"), offsets(lk, "cpu")
    rng = drawn(1).tolist()
    out, lse = seeded(1, fa.varlen_attention, q, k, v, cu_q, cu_k, dropout_p=p, return_lse=True)
    want = torch.zeros_like(out)
    for b, h in itertools.product(range(4), range(heads)):
        q0, k0 = int(cu_q[b]), int(cu_k[b])
        for i in range(lq[b]):
            scores = [float(q[q0 + i, h] @ k[k0 + j, h // 2]) * 3**-0.5 for j in range(lk[b])]
            total = sum(math.exp(s) for s in scores)
            for j, s in enumerate(scores):
                if keep_of_ints(rng, p, b, h, i, j, heads):
                    want[q0 + i, h] += math.exp(s) / total / (1 - p) * v[k0 + j, h // 2]
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(lse, fa.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)[1])


def plain_torch(q, k, v, cu_q, cu_k, *, dropout_p, window, causal, softcap, alibi_slopes, bias, return_lse):
    """The formula in the dtype of the inputs throughout, with the mask of the reference."""
    rng, results = torch.randint(2**63 - 1, (2,)), []
    for b, (a, e, c, d) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist())):
        lq, lk, heads = e - a, d - c, q.shape[1]
        distance = torch.arange(lk) - torch.arange(lq)[:, None] - (lk - lq)
        added = bias[:, :lq, :lk].to(q.dtype) - (alibi_slopes[b][:, None, None] * distance.abs()).to(q.dtype)
        factors = keep_mask(rng, dropout_p, b, heads, lq, lk).to(q.dtype) / (1 - dropout_p)
        keep = visible(lq, lk, window[0], 0 if causal else window[1], False)
        scale = q.shape[-1] ** -0.5
        results.append(attend(q[a:e], k[c:d], v[c:d], keep, scale, softcap=softcap, bias=added, dropout=factors))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=lambda dtype: str(dtype)[6:])
def test_against_float64(native, dtype):
    """Dropout, GQA, window and every score option together, over several tiles."""
    case = Case("", [5, 66, 0, 20, 301], [7, 66, 3, 0, 290], heads=4, heads_kv=2, d=16)
    options = make_options(case, "dense-b") | {"causal": True, "window": (200, -1), "dropout_p": 0.3}
    x = make(case, dtype, "cpu")
    with fa.use_backend("cpu"):
        got = seeded(5, run, x, **options)
    check(got, seeded(5, exact, x, **options), seeded(5, run, x, plain_torch, **options), dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_fraction(native, p):
    """Uniform probabilities and values of 1: the output is the kept fraction over 1 - p."""
    q, v = torch.zeros(600, 4, 8), torch.ones(600, 4, 1)
    out = fa.varlen_attention(q, q, v, offsets([300, 300], "cpu"), dropout_p=p)
    assert abs(out.mean() * (1 - p) - (1 - p)) < 0.01
    rows = out.flatten() * (1 - p) * 300  # kept keys of each row: binomial
    assert abs(rows.std() / (300 * p * (1 - p)) ** 0.5 - 1) < 0.1


def kept(lengths, heads, p=0.5, **options):
    """(H, L, L) bools of the last sequence: which probabilities took part, read off one-hot values."""
    total, length = sum(lengths), lengths[-1]
    q = torch.zeros(total, heads, 4)
    v = torch.zeros(total, heads, length)
    v[total - length :] = torch.eye(length)[:, None]
    out = fa.varlen_attention(q, q, v, offsets(lengths, "cpu"), dropout_p=p, **options)
    return out[total - length :].transpose(0, 1) > 0


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_mask_depends_on_coordinates_alone(backend):
    """Other lengths before the sequence, and so other tiles and rows, change no bit; other seeds and batches do."""
    want = seeded(7, kept, [3, 0, 150], 2)
    assert torch.equal(want, keep_mask(drawn(7), 0.5, 2, 2, 150, 150))
    assert torch.equal(seeded(7, kept, [301, 17, 150], 2), want)
    assert torch.equal(seeded(7, kept, [1, 1, 70], 2), want[:, :70, :70])
    windowed = seeded(7, kept, [9, 9, 150], 2, window=(40, 13))
    assert torch.equal(windowed, want & visible(150, 150, 40, 13, False))
    for other in (seeded(8, kept, [3, 0, 150], 2), seeded(7, kept, [3, 150], 2)):
        assert 0.45 < (other == want).float().mean() < 0.55
    assert 0.45 < (want[0] == want[1]).float().mean() < 0.55  # heads are independent


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_replay(backend):
    """manual_seed repeats outputs and gradients; each call draws anew, and explain draws nothing."""
    x = make(Case("", [5, 66, 20]), F32, "cpu")
    first, second = seeded(2, run, x, dropout_p=0.2), run(x, dropout_p=0.2)
    assert not torch.equal(first["out"], second["out"])
    torch.manual_seed(2)
    fa.explain("varlen_attention", *x[:3], x.cu_q, dropout_p=0.2)
    same_bits(run(x, dropout_p=0.2), first)


def test_threads_change_no_bit(native):
    x, threads = make(Case("", [400, 3], heads=2, heads_kv=1, d=8), F32, "cpu"), torch.get_num_threads()
    results = []
    with fa.use_backend("cpu"):
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(seeded(4, run, x, dropout_p=0.25, deterministic=True))
        torch.set_num_threads(threads)
    same_bits(*results)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_p_0_is_no_dropout(backend):
    x = make(Case("", [5, 66, 20]), F32, "cpu")
    state = torch.get_rng_state()
    same_bits(run(x, dropout_p=0.0, softcap=2.0), run(x, softcap=2.0))
    same_bits(run(x, dropout_p=0.0), run(x))
    assert torch.equal(torch.get_rng_state(), state)  # and no number is drawn


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradcheck(backend):
    """The backward pass drops what the forward pass dropped: dropout, GQA, window and bias together."""
    x = make(Case("", [3, 0, 2, 1], [2, 2, 4, 0], heads=2, heads_kv=1, d=3, dv=2), F64, "cpu")
    bias = torch.randn(2, 5, 5, dtype=F64)

    def fixed(q, k, v, bias):
        torch.manual_seed(11)
        out, lse = fa.varlen_attention(
            q, k, v, x.cu_q, x.cu_k, dropout_p=0.4, bias=bias, window=(1, 2), return_lse=True
        )
        return out, lse[lse > -math.inf]

    assert torch.autograd.gradcheck(fixed, [t.requires_grad_() for t in (*x[:3], bias)])


def test_compile(native):
    compiled = torch.compile(fa.varlen_attention, fullgraph=True, backend="aot_eager")
    x = make(Case("", [3, 17]), F32, "cpu")
    same_bits(seeded(6, run, x, compiled, dropout_p=0.5), seeded(6, run, x, dropout_p=0.5))
