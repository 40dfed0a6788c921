"""Best-fit packing of lengths, and the batch sampler built on it."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

import flowattn as fa
from flowattn import _native, data

DISTRIBUTIONS = {
    "uniform": lambda r, n, cap: r.integers(0, cap + 1, n),
    "short": lambda r, n, cap: r.integers(0, max(1, cap // 7) + 1, n),
    "long-tailed": lambda r, n, cap: np.minimum(np.exp(r.normal(np.log(cap) / 2, 1.0, n)).astype(np.int64), cap),
    "few-values": lambda r, n, cap: r.choice([0, 1, cap // 3, cap // 2, cap], n),
}


def bins_of(lengths, capacity):
    order, offsets = fa.pack_sequences(lengths, capacity)
    return [order[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def best_fit_decreasing(lengths, capacity):
    """The definition, one scan over all bins a sequence; of equally full bins the last filled."""
    bins, rooms, filled = [], [], []
    for turn, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b in range(len(bins)) if rooms[b] >= lengths[i]]
        if fitting:
            b = min(fitting, key=lambda b: (rooms[b], -filled[b]))
        else:
            b = len(bins)
            bins.append([]), rooms.append(capacity), filled.append(0)
        bins[b].append(i)
        rooms[b] -= lengths[i]
        filled[b] = turn
    return bins


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("capacity", [1, 2, 63, 64, 65, 4097, 1 << 20, (1 << 20) + 1, 1 << 40])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_packing_is_best_fit_decreasing(distribution, capacity, n):
    lengths = DISTRIBUTIONS[distribution](np.random.default_rng(n), n, capacity)
    want = best_fit_decreasing(lengths.tolist(), capacity)
    assert bins_of(lengths, capacity) == want
    order, offsets = data._pack_sequences(lengths, capacity)
    assert [order[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == want
    assert order.dtype == offsets.dtype == np.int64


@pytest.mark.skipif(_native.host is None, reason=f"flowattn._host is missing: {_native.HOST_MISSING}")
@pytest.mark.parametrize("capacity", [4096, 1 << 21], ids=["dense", "sparse"])
def test_native_and_fallback_agree(capacity):
    lengths = DISTRIBUTIONS["long-tailed"](np.random.default_rng(1), 30_000, capacity)
    for a, b in zip(_native.host.pack_sequences(lengths, capacity), data._pack_sequences(lengths, capacity)):
        assert np.array_equal(a, b)


def test_fallback_serves_without_the_native_module(monkeypatch):
    monkeypatch.setattr(_native, "host", None)
    assert bins_of([5, 1, 4, 6, 2, 2], 10) == [[3, 2], [0, 4, 5, 1]]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_two_bins_could_be_one_and_waste_is_small(distribution):
    capacity = 2048
    lengths = DISTRIBUTIONS[distribution](np.random.default_rng(2), 20_000, capacity)
    bins = bins_of(lengths, capacity)
    sums = sorted(int(lengths[b].sum()) for b in bins)
    assert sums[-1] <= capacity
    assert sums[0] + sums[1] > capacity
    bound = max(-(-int(lengths.sum()) // capacity), int((lengths > capacity // 2).sum()))  # no packing needs fewer
    assert len(bins) <= 11 / 9 * bound + 4
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))


def test_a_perfect_packing_is_found():
    """Every length has its complement, so best fit must leave no room anywhere."""
    random = np.random.default_rng(3)
    first = random.integers(1, 1000, 5000)
    lengths = random.permutation(np.concatenate([first, 1000 - first]))
    assert {int(lengths[b].sum()) for b in bins_of(lengths, 1000)} == {1000}


def test_inputs_of_other_kinds():
    want = bins_of([3, 4, 5], 8)
    for lengths in (torch.tensor([3, 4, 5]), np.array([3, 9, 4, 9, 5], np.int16)[::2], (3, 4, 5)):
        assert bins_of(lengths, 8) == want
    assert bins_of([], 8) == []


def test_a_million_lengths_take_less_than_two_seconds(native):
    lengths = DISTRIBUTIONS["long-tailed"](np.random.default_rng(4), 1_000_000, 8192)
    start = time.perf_counter()
    fa.pack_sequences(lengths, 8192)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("host", ["native", "fallback"])
def test_bad_values(host, request, monkeypatch):
    if host == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(_native, "host", None)
    for lengths, capacity, message in (
        ([1, 9], 8, "no length may exceed capacity=8; got 9"),
        ([1, -2], 8, "lengths must be >= 0; got -2"),
        ([], 0, "capacity must be >= 1; got 0"),
        ([[1]], 8, r"lengths must have shape \(n,\); got \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=f"^pack_sequences: {message}$"):
            fa.pack_sequences(lengths, capacity)
    with pytest.raises(TypeError, match="^pack_sequences: lengths must be integers; got float64$"):
        fa.pack_sequences([1.5], 8)


LENGTHS = DISTRIBUTIONS["short"](np.random.default_rng(5), 1000, 512)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
def test_sampler_covers_each_index_once_within_the_budget(shuffle, epoch):
    sampler = fa.TokenBudgetBatchSampler(LENGTHS, 512, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(type(i) is int for i in batches[0])
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert max(LENGTHS[batch].sum() for batch in batches) <= 512


def test_shuffling_depends_on_seed_and_epoch_alone():
    def batches(epoch, **options):
        sampler = fa.TokenBudgetBatchSampler(LENGTHS, 512, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = batches(0, shuffle=True)
    assert first == batches(0, shuffle=True)
    for other in (batches(1, shuffle=True), batches(0, shuffle=True, seed=1)):
        assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}
    assert batches(0) == batches(1) == bins_of(LENGTHS, 512)


@pytest.mark.parametrize("shuffle", [False, True])
def test_drop_last_leaves_out_the_last_batch_unless_full(shuffle):
    kept = fa.TokenBudgetBatchSampler([6, 4, 3, 3], 10, shuffle=shuffle, drop_last=True)
    assert sorted(map(sorted, kept)) == [[0, 1]]
    assert len(kept) == 1
    full = fa.TokenBudgetBatchSampler([6, 4, 7, 3], 10, shuffle=shuffle, drop_last=True)
    assert sorted(map(sorted, full)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 5, 200])
def test_replicas_share_the_batches_in_equal_steps(replicas, shuffle):
    def ranks(drop_last):
        samplers = [
            fa.TokenBudgetBatchSampler(
                LENGTHS, 512, shuffle=shuffle, drop_last=drop_last, num_replicas=replicas, rank=r
            )
            for r in range(replicas)
        ]
        batches = [list(sampler) for sampler in samplers]
        assert [len(b) for b in batches] == [len(s) for s in samplers] == [len(samplers[0])] * replicas
        return Counter(i for rank in batches for batch in rank for i in batch)

    assert set(ranks(False)) == set(range(1000))
    assert all(count == 1 for count in ranks(True).values())


def test_sampler_of_nothing():
    for drop_last in (False, True):
        sampler = fa.TokenBudgetBatchSampler([], 8, shuffle=True, drop_last=drop_last, num_replicas=2)
        assert (list(sampler), len(sampler)) == ([], 0)


def test_sampler_errors():
    with pytest.raises(ValueError, match="^TokenBudgetBatchSampler: rank must be in 0..1; got 2$"):
        fa.TokenBudgetBatchSampler([1], 8, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="^TokenBudgetBatchSampler: num_replicas must be >= 1; got 0$"):
        fa.TokenBudgetBatchSampler([1], 8, num_replicas=0)
    with pytest.raises(ValueError, match="^pack_sequences: no length may exceed capacity=8; got 9$"):
        fa.TokenBudgetBatchSampler([1, 9], 8)


def test_sampler_drives_a_data_loader():
    class Items(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return torch.full((int(LENGTHS[i]),), i)

    sampler = fa.TokenBudgetBatchSampler(LENGTHS, 512, shuffle=True)
    loader = torch.utils.data.DataLoader(Items(), batch_sampler=sampler, collate_fn=torch.cat)
    sizes = [len(batch) for batch in loader]
    assert (len(sizes), sum(sizes), max(sizes) <= 512) == (len(sampler), LENGTHS.sum(), True)
