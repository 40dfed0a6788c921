"""varlen_attention: dropout of the attention probabilities, the same bits on every backend."""

import itertools
import math

import pytest
import torch
from test_varlen_attention import BF16, F16, F32, F64, Case, check, exact, make, offsets, run, same_bits
from test_varlen_attention_scores import FEW, kernels, make_options

import flowattn as fa
from flowattn.reference.dropout import dropout_threshold, keep_mask, philox4x32
from flowattn.reference.varlen_attention import attend, position_bias, visible

KERNELS = ["cpu", "triton"]
BACKENDS = ["reference", *KERNELS]


def seeded(seed, function, *args, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


def drawn(seed, device="cpu"):
    """The rng tensor that the next call draws after manual_seed(seed)."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (2,), device=device)


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


def test_philox_of_triton(device):
    """Bit for bit, with seeds and offsets of all 63 bits and coordinates of all 31."""
    pytest.importorskip("triton")
    from triton_dropout_words import words_kernel

    for rng, row, key, stream in (((0, 0), 0, 0, 0), ((2**63 - 2, 2**63 - 1), 2**31 - 65, 2**31 - 64, 2**31 - 1)):
        rng = torch.tensor(rng, device=device)
        words = torch.empty(64, 32, dtype=torch.int32, device=device)
        words_kernel[(1,)](words, rng, row, key, stream, 64, 32)
        i, group = torch.arange(row, row + 64, device=device), torch.arange(key // 4, key // 4 + 8, device=device)
        seed = (rng[0] & 0xFFFFFFFF, rng[0] >> 32)
        want = torch.broadcast_tensors(*philox4x32((group, i[:, None], stream, rng[1] & 0xFFFFFFFF), seed))
        assert torch.equal(words.long() & 0xFFFFFFFF, torch.stack(want, -1).flatten(-2))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_against_loops(backend, place):
    """One number at a time: softmax over all keys, then the mask, then the values; the LSE knows nothing of it."""
    lq, lk, heads, p = [3, 0, 5, 2], [6, 2, 9, 0], 4, 0.4
    dtype, tolerance = (F32, 1e-6) if backend == "triton" else (F64, 1e-12)
    q, k, v = (torch.randn(sum(n), h, 3, device=place, dtype=dtype) for n, h in ((lq, heads), (lk, 2), (lk, 2)))
    cu_q, cu_k = offsets(lq, place), offsets(lk, place)
    rng = drawn(1, place).tolist()
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
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    assert torch.equal(lse, fa.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)[1])


def plain_torch(q, k, v, cu_q, cu_k, *, dropout_p, window, causal, softcap, alibi_slopes, bias, return_lse):
    """The formula in the dtype of the inputs throughout, with the mask of the reference."""
    rng, results = torch.randint(2**63 - 1, (2,), device=q.device), []
    for b, (a, e, c, d) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist())):
        lq, lk, heads = e - a, d - c, q.shape[1]
        added = position_bias(b, lq, lk, lk - lq, q.dtype, q.device, alibi_slopes, bias, None, None)
        factors = keep_mask(rng, dropout_p, b, heads, lq, lk).to(q.dtype) / (1 - dropout_p)
        keep = visible(lq, lk, window[0], 0 if causal else window[1], False, q.device)
        scale = q.shape[-1] ** -0.5
        results.append(attend(q[a:e], k[c:d], v[c:d], keep, scale, softcap=softcap, bias=added, dropout=factors))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("backend, dtype, kind", kernels([F32, F16, BF16, F64], ["dense-b"]), indirect=["backend"])
def test_against_float64(backend, dtype, kind, place):
    """Dropout, GQA, window and every score option together, over several tiles."""
    case = Case("", [5, 66, 0, 20, 301], [7, 66, 3, 0, 290], heads=4, heads_kv=2, d=16)
    case, window = (FEW, 40) if (backend, place) == ("triton", "cpu") else (case, 200)
    options = make_options(case, kind, device=place) | {"causal": True, "window": (window, -1), "dropout_p": 0.3}
    x = make(case, dtype, place)
    got = seeded(5, run, x, **options)
    check(got, seeded(5, exact, x, **options), seeded(5, run, x, plain_torch, **options), dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_kept_fraction(backend, p, place):
    """Uniform probabilities and values of 1: the output is the kept fraction over 1 - p."""
    length = 100 if (backend, place) == ("triton", "cpu") else 300
    q, v = torch.zeros(2 * length, 4, 8, device=place), torch.ones(2 * length, 4, 1, device=place)
    out = fa.varlen_attention(q, q, v, offsets([length, length], place), dropout_p=p)
    assert abs(out.mean() * (1 - p) - (1 - p)) < 0.01
    rows = out.flatten() * (1 - p) * length  # kept keys of each row: binomial
    assert abs(rows.std() / (length * p * (1 - p)) ** 0.5 - 1) < 0.1


def kept(lengths, heads, device, p=0.5, **options):
    """(H, L, L) bools of the last sequence: which probabilities took part, read off one-hot values."""
    total, length = sum(lengths), lengths[-1]
    q = torch.zeros(total, heads, 4, device=device)
    v = torch.zeros(total, heads, length, device=device)
    v[total - length :] = torch.eye(length, device=device)[:, None]
    out = fa.varlen_attention(q, q, v, offsets(lengths, device), dropout_p=p, **options)
    return out[total - length :].transpose(0, 1) > 0


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_mask_depends_on_coordinates_alone(backend, place):
    """Other lengths before the sequence, and so other tiles and rows, change no bit; other seeds and batches do."""
    long = 70 if (backend, place) == ("triton", "cpu") else 150
    want = seeded(7, kept, [3, 0, long], 2, place)
    assert torch.equal(want, keep_mask(drawn(7, place), 0.5, 2, 2, long, long))
    assert torch.equal(
        seeded(7, kept, [3, 0, long], 2, place, 0.123), keep_mask(drawn(7, place), 0.123, 2, 2, long, long)
    )
    assert torch.equal(seeded(7, kept, [97, 17, long], 2, place), want)
    assert torch.equal(seeded(7, kept, [1, 1, 40], 2, place), want[:, :40, :40])
    windowed = seeded(7, kept, [9, 9, long], 2, place, window=(40, 13))
    assert torch.equal(windowed, want & visible(long, long, 40, 13, False, place))
    for other in (seeded(8, kept, [3, 0, long], 2, place), seeded(7, kept, [3, long], 2, place)):
        assert 0.45 < (other == want).float().mean() < 0.55
    assert 0.45 < (want[0] == want[1]).float().mean() < 0.55  # heads are independent


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_tile_shapes_change_no_bit_of_the_mask(backend, place, monkeypatch):
    from flowattn.triton_kernels import varlen_attention as kernels

    want = seeded(7, kept, [3, 50], 2, place)
    for config in ((16, 64, 4, 1), (64, 16, 4, 1)):
        monkeypatch.setattr(kernels, "forward_config", lambda *args, config=config: config)
        assert torch.equal(seeded(7, kept, [3, 50], 2, place), want)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_replay(backend, place):
    """manual_seed repeats outputs and gradients; each call draws anew, and explain draws nothing."""
    x = make(Case("", [5, 36, 20]), F32, place)
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
def test_p_0_is_no_dropout(backend, place):
    x = make(Case("", [5, 36, 20]), F32, place)
    state = torch.get_rng_state()
    same_bits(run(x, dropout_p=0.0, softcap=2.0), run(x, softcap=2.0))
    same_bits(run(x, dropout_p=0.0), run(x))
    assert torch.equal(torch.get_rng_state(), state)  # and no number is drawn


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
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


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_compile(backend, place):
    compiled = torch.compile(fa.varlen_attention, fullgraph=True, backend="aot_eager")
    x = make(Case("", [3, 17]), F32, place)
    same_bits(seeded(6, run, x, compiled, dropout_p=0.5), seeded(6, run, x, dropout_p=0.5))
