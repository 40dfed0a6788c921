"""Host-side cost, by pytest-benchmark: what a call costs before any kernel matters, and packing of lengths alone.

Run with `pytest benchmarks`. The tensors are tiny on purpose: the time is that of Python, checks and dispatch.
"""

import pytest
import torch

import flowattn as fa


@pytest.fixture
def mask():
    return torch.arange(16) < torch.tensor([16, 3, 9, 12])[:, None]


def test_pack_plan(benchmark, mask):
    plan = benchmark(fa.pack_plan, mask)
    assert plan.total == 40


def test_pack(benchmark, mask):
    plan, x = fa.pack_plan(mask), torch.randn(4, 16, 8)
    assert torch.equal(benchmark(fa.pack, x, plan), x[mask])


def test_unpack(benchmark, mask):
    plan, x = fa.pack_plan(mask), torch.randn(4, 16, 8)
    assert torch.equal(benchmark(fa.unpack, x[mask], plan), x * mask[..., None])


def test_varlen_attention(benchmark):
    q, cu = torch.randn(8, 2, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    out = benchmark(fa.varlen_attention, q, q, q, cu)
    expected = torch.nn.functional.scaled_dot_product_attention(*(q[:3].transpose(0, 1)[None],) * 3)
    torch.testing.assert_close(out[:3], expected[0].transpose(0, 1))


@pytest.mark.parametrize("count", [1_000, 100_000])
def test_pack_sequences(benchmark, count):
    data = pytest.importorskip("flowattn.data")
    lengths = torch.randint(51, 513, (count,), generator=torch.Generator().manual_seed(0)).numpy()
    benchmark(data.pack_sequences, lengths, 512)
