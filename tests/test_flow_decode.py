"""The decode kernels of flow_inverse against the reference: every kind of block, few rows and many, honest endings."""

import pytest
import torch
from flow_oracle import toy, toy_star

import flowattn as fa
from flowattn.ops import flow_network

configs = pytest.importorskip("flowattn.triton_kernels.flow_decode_configs")
Status = fa.InverseStatus
WHOLE, FEW, MANY = {"whole": 8}, {"whole": 0, "few": 8}, {"whole": 0, "few": 0}
paths = pytest.mark.parametrize("path", [WHOLE, FEW, MANY], ids=["whole", "few", "many"])


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch, device):
    """Few programs where an interpreter runs them one after the other, and still more than one."""
    small = {"programs": 4, "keys": 8, "columns": 64, "splits": 2}
    small = {} if device == "cuda" else small
    monkeypatch.setattr(configs, "DEFAULT", configs.DEFAULT._replace(**small))


@pytest.fixture
def run(monkeypatch, device):
    """Inverses by the kernels: whole steps, or the launches for few or for many rows."""
    from flowattn.triton_kernels.flow_decode_whole import FlowDecodeWhole

    calls, step = [], FlowDecodeWhole.__call__
    monkeypatch.setattr(FlowDecodeWhole, "__call__", lambda *arguments: calls.append(step(*arguments)))
    able = device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)

    def inverse(z, block, path, **options):
        monkeypatch.setattr(configs, "DEFAULT", configs.DEFAULT._replace(**path))
        calls.clear()
        with fa.use_backend("triton"):
            result = fa.flow_inverse(z, block, method="sequential", **options)
        assert bool(calls) == (able and path is WHOLE)
        return result

    return inverse


def expected(z, block, **options):
    with fa.use_backend("reference"):
        return fa.flow_inverse(z, block, method="sequential", **options)


def close(x, y, dtype):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    assert (x - y).abs().max() <= tolerance * y.abs().max()


VARIANTS = {
    "plain": {},
    "rms": {"norm": "rms"},
    "gated-grouped": {"mlp": "gated", "kv_heads": 1, "bias": False},
    "all-norms": {"norm": "rms", "qk_norm": True, "post_norm": True, "kv_heads": 1, "mlp": "gated"},
    "layer-norms": {"qk_norm": True, "post_norm": True, "final_norm": False, "scale": "exp", "soft_clip": 0.0},
}


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.no_grad()
def test_tarflow(path, dtype, run, device):
    block = toy(0.05, dtype).to(device).blocks[0]
    cond = block.condition(torch.tensor([1, -1], device=device), 2)
    z = torch.randn(2, 5, 8, device=device)
    close(run(z, block, path, cond=cond), expected(z, block, cond=cond), dtype)


@pytest.mark.parametrize("variant, path", [*((v, FEW) for v in VARIANTS), ("plain", MANY), ("all-norms", MANY),
                                           ("rms", WHOLE), ("gated-grouped", WHOLE)],
                         ids=[*VARIANTS, "plain-many", "all-many", "rms-whole", "gated-grouped-whole"])  # fmt: skip
@torch.no_grad()
def test_starflow(variant, path, run, device):
    """Start vector, rotary positions, text in front; guidance of two streams by every rule."""
    block = toy_star(0.03, layers=(2,), **VARIANTS[variant]).to(device).blocks[0]
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    prefix, other = torch.randn(2, 2, 3, 64, device=device)
    z, weight = torch.randn(2, 3, 3, device=device), torch.tensor([0.7, 2.0], device=device)
    rule = {"plain": "sigma_linear", "rms": "gaussian_ratio"}.get(variant, "log_linear")
    options = {"prefix": prefix, "prefix_uncond": other, "guidance": weight, "guidance_rule": rule, "anneal": True}
    x, info = run(z, block, path, return_info=True, **options)
    y, known = expected(z, block, return_info=True, **options)
    close(x, y, torch.float32)
    torch.testing.assert_close(info.max_log_scale, known.max_log_scale, rtol=1e-4, atol=1e-5)
    assert torch.equal(info.not_positive, known.not_positive)


@paths
@torch.no_grad()
def test_shares_of_the_keys(path, run, monkeypatch, device):
    """More shares than keys at first, shares of several tiles at the end."""
    monkeypatch.setattr(configs, "DEFAULT", configs.DEFAULT._replace(splits=4, programs=16))
    block = toy(0.05, layers_per_block=1, channels=32).to(device).blocks[0].flow_block()._replace(positions=None)
    z = torch.randn(1, 42, 8, device=device)
    known = expected(z, block)[:, :36]
    close(run(z, block, path, known=known), expected(z, block, known=known), torch.float32)


@torch.no_grad()
def test_weights_at_odd_addresses(run, device):
    """Whole steps need the layers' weights a multiple of 8 numbers apart; others take the launches."""
    block = toy(0.05, channels=32).to(device).blocks[0].flow_block()
    first, last = block.layers
    odd = last.qkv.weight.new_empty(last.qkv.weight.numel() + 1)[1:].view_as(last.qkv.weight).copy_(last.qkv.weight)
    moved = block._replace(layers=(first, last._replace(qkv=last.qkv._replace(weight=odd))))
    z = torch.randn(1, 3, 8, device=device)
    known = expected(z, block)
    close(run(z, block, WHOLE), known, torch.float32)
    close(run(z, moved, {**WHOLE}), known, torch.float32)


@torch.no_grad()
def test_more_rows_than_a_tile(run, device):
    block = toy(0.05, layers_per_block=1, channels=32).to(device).blocks[0]
    z = torch.randn(66, 3, 8, device=device)
    close(run(z, block, MANY), expected(z, block), torch.float32)


@torch.no_grad()
def test_positions_by_sample_and_means_alone(run, device):
    """A permutation of each sample's own; a block that preserves volume; guidance of the mean alone; no biases."""
    block = toy(0.05, layers_per_block=1, nvp=False).to(device).blocks[0]
    z = torch.randn(2, 4, 8, device=device)
    permutation = torch.stack([torch.randperm(4) for _ in range(2)]).to(device)
    cond, other = torch.randn(2, 2, 64, device=device)
    options = {"permutation": permutation, "cond": cond, "cond_uncond": other, "guidance": 1.5, "guidance_what": "b"}
    close(run(z, block, FEW, **options), expected(z, block, **options), torch.float32)


@paths
@torch.no_grad()
def test_a_bad_sample_stays_alone(path, run, device):
    """NaN in the noise, and an overflow: both are found where they are, and no other sample changes a bit."""
    block = toy(0.05, layers_per_block=1, channels=32).to(device).blocks[0]
    z = torch.randn(3, 5, 8, device=device)
    x, info = run(z, block, path, return_info=True)
    assert (info.status == Status.CONVERGED).all() and info.first_bad.tolist() == [-1] * 3
    again = run(z, block, path)
    assert torch.equal(again, x)
    bad = z.clone()
    bad[1, 3, 2], bad[2, 2, 5] = float("nan"), float("inf")
    got, found = run(bad, block, path, return_info=True)
    _, known = expected(bad, block, return_info=True)
    assert torch.equal(got[0], x[0]) and torch.equal(got[1, :3], x[1, :3]) and got[1, 3:].isnan().all()
    assert found.status.tolist() == [0, 3, 3] and found.first_bad.tolist() == known.first_bad.tolist() == [-1, 3, 2]


@torch.no_grad()
def test_what_a_cache_held_before_is_not_read(run, device):
    block, z = toy(0.05, layers_per_block=1).to(device).blocks[0], torch.randn(2, 5, 8, device=device)
    cache = flow_network.flow_cache(block.flow_block(), 2, 5, device=device)
    cache.keys.fill_(float("nan")), cache.values.fill_(float("inf"))
    close(run(z, block, FEW, cache=cache), expected(z, block), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.no_grad()
def test_windows(dtype, device):
    """Attention of ragged windows: grouped heads, two tiles of queries, slots that hold anything behind the window, and
    inside it a key that is not finite, which the queries before it must not notice."""
    rows, width, heads, kv_heads, slots = 2, 70, 4, 2, 90
    q = torch.randn(rows, width, heads, 16, device=device)
    keys, values = torch.randn(2, rows, kv_heads, slots, 16, device=device).to(dtype)
    first = torch.tensor([0, 19], device=device)
    keys[0, :, 71:], values[1, :, 89:] = float("nan"), float("inf")
    values[0, 1, 40, 3], keys[1, 0, 60, 1] = float("nan"), float("inf")
    scale = torch.tensor([0.25, 0.5], device=device)
    steps = first.unsqueeze(1) + torch.arange(width, device=device)
    from flowattn.reference.flow_inverse import attention
    from flowattn.triton_kernels.flow_window_attention import flow_window_attention

    y = attention(q, keys, values, scale, steps)
    x = flow_window_attention(q, keys, values, scale, steps)
    assert x.dtype == dtype and torch.equal(x.isnan(), y.isnan()) and 0 < y.isnan().sum() < y.numel() // 2
    torch.testing.assert_close(x.float(), y, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-3, equal_nan=True)


@pytest.mark.parametrize("method", ["gs_jacobi", "frontier"])
@torch.no_grad()
def test_sweeps(method, device):
    block, z = toy(0.05, layers_per_block=1).to(device).blocks[0], torch.randn(2, 8, 8, device=device)
    with fa.use_backend("triton"):
        x, info = fa.flow_inverse(z, block, method=method, segments=2, window=3, return_info=True)
    close(x, expected(z, block), torch.float32)
    assert (info.status == Status.CONVERGED).all()


@torch.no_grad()
def test_clamp_is_counted(run, device):
    block, z = toy(0.2, layers_per_block=1).to(device).blocks[0], 2 * torch.randn(2, 6, 8, device=device)
    x, info = run(z, block, FEW, clamp=1.5, return_info=True)
    y, known = expected(z, block, clamp=1.5, return_info=True)
    close(x, y, torch.float32)
    assert torch.equal(info.clamped, known.clamped) and (info.clamped > 0).all()


def test_refusals(device):
    """What the kernels do not take, and why."""
    table = fa.dispatch.tables()["flow_inverse"]
    z = torch.randn(1, 4, 8, device=device)

    def reason(block, z=z):
        return next(b for b in table.backends if b.name == "triton").refuse(*table.prepare(z, block))

    assert reason(toy().to(device).blocks[0]) is None
    assert "float64" in reason(toy(dtype=torch.float64).to(device).blocks[0], z.double())
    assert "power of 2" in reason(toy(channels=72, head_dim=36).to(device).blocks[0])
    mixed = toy().to(device).blocks[0]
    mixed.attn_blocks[1].mlp.half()
    assert "one dtype" in reason(mixed)


@pytest.mark.gpu
@torch.no_grad()
def test_bfloat16_and_captures(device):
    """Against float32 at the error of plain torch in bfloat16; inside a caller's capture the same bits."""
    model = toy(0.02, channels=256, head_dim=64).to(device)
    block, half = model.blocks[0], toy(0.02, torch.bfloat16, channels=256, head_dim=64).to(device).blocks[0]
    for batch in (1, 3, 40):
        z = torch.randn(batch, 16, 8, device=device)
        exact = expected(z, block)
        x = fa.flow_inverse(z, half, method="sequential")
        assert (x - exact).abs().max() <= 1.25 * (expected(z, half) - exact).abs().max() + 1e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fa.flow_inverse(z, half, method="sequential")
        graph.replay()
        assert torch.equal(captured, x)
