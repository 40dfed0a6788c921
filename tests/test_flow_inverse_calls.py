"""flow_inverse: kinds of noise, sizes, caches, threads, modes, captures and errors."""

import pytest
import torch
from flow_oracle import toy, toy_star
from torch.library import opcheck

import flowattn as fa
from flowattn.ops import flow_block, flow_network
from flowattn.ops.flow_inverse import BlockPlan

backends = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
SWEEPING = ("jacobi", "gs_jacobi", "frontier")
F64 = torch.float64
Status = fa.InverseStatus


def block_of(std=0.03, dtype=torch.float32, place="cpu", number=0, **options):
    return toy(std, dtype, **options).to(place).blocks[number]


def noise(place, batch=3, dtype=torch.float32, tokens=16, features=8):
    return torch.randn(batch, tokens, features, dtype=dtype, device=place)


@torch.no_grad()
def test_half_precision_noise(device):
    block, z = block_of(0.03, place=device), noise(device)
    for dtype in (torch.float16, torch.bfloat16):
        x = fa.flow_inverse(z.to(dtype), block)
        assert x.dtype == dtype
        assert torch.equal(x, fa.flow_inverse(z.to(dtype).float(), block).to(dtype))
    block.proj_out.bias[8:] = 7e4  # beyond float16
    x, info = fa.flow_inverse(z.half(), block, return_info=True)
    assert (info.status == Status.NONFINITE).all() and info.first_bad.tolist() == [1] * 3


@backends
@torch.no_grad()
def test_strided_noise_is_read_and_left_alone(place):
    block, z = block_of(0.05, place=place), noise(place)
    expected = fa.flow_inverse(z, block)
    wide = torch.zeros(16, 20, 3, device=place)
    strided = wide[:, 3:11].permute(2, 0, 1)
    strided.copy_(z)
    assert torch.equal(fa.flow_inverse(strided, block), expected)
    expanded = z[:1].expand(3, 16, 8)
    before = z.clone()
    got = fa.flow_inverse(expanded, block, method="frontier")
    torch.testing.assert_close(got, expected[:1].expand(3, 16, 8), rtol=0, atol=1e-4)
    assert torch.equal(z, before)


@backends
@pytest.mark.parametrize("method", ("sequential", *SWEEPING))
@torch.no_grad()
def test_degenerate_sizes(method, place):
    block = block_of(0.1, place=place)
    for shape in ((0, 16, 8), (2, 0, 8), (2, 1, 8), (2, 2, 8)):
        z = torch.randn(shape, device=place)
        x, logdet, info = fa.flow_inverse(z, block, method=method, return_logdet=True, return_info=True)
        assert x.shape == shape and logdet.shape == info.status.shape == shape[:1]
        torch.testing.assert_close(fa.flow_forward(x, block)[0], z, rtol=0, atol=1e-5)
    star = toy_star(0.1, text_dim=0, text_len=0).to(place).blocks[0]
    z = torch.randn(2, 1, 3, device=place)
    x = fa.flow_inverse(z, star, method=method)
    assert (x - z).abs().max() > 1e-4
    torch.testing.assert_close(fa.flow_forward(x, star)[0], z, rtol=0, atol=1e-5)
    empty = toy(0.1, layers_per_block=0).to(place).blocks[0]
    z = noise(place)
    x, logdet = fa.flow_inverse(z, empty, method=method, return_logdet=True)
    assert torch.equal(x, z) and torch.equal(logdet, torch.zeros_like(logdet))
    assert torch.equal(fa.flow_forward(z, empty)[0], z)


@backends
@pytest.mark.parametrize("channels, head_dim", [(96, 32), (64, 64), (128, 128), (256, 256), (72, 36)])
@torch.no_grad()
def test_head_sizes(channels, head_dim, place):
    options = {"channels": channels, "head_dim": head_dim, "num_blocks": 1, "layers_per_block": 1}
    block, x = block_of(0.05, F64, place, **options), noise(place, 2, F64)
    z, _ = fa.flow_forward(x, block)
    for method in ("sequential", "frontier"):
        torch.testing.assert_close(fa.flow_inverse(z, block, method=method), x, rtol=0, atol=1e-10)


@backends
@torch.no_grad()
def test_cache_serves_several_calls(place):
    block = block_of(0.05, place=place)
    cache = flow_network.flow_cache(block.flow_block(), 4, 16)
    cache.keys.fill_(float("nan")), cache.values.fill_(float("inf"))  # what an earlier call may have left
    for batch in (4, 1, 3):
        z = noise(place, batch)
        expected = fa.flow_inverse(z, block)
        for method in ("sequential", "frontier"):
            x = fa.flow_inverse(z, block, method=method, cache=cache)
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="cache must hold .*make it with flow_cache"):
        fa.flow_inverse(noise(place, 5), block, cache=cache)


def all_bits(block, z, **options):
    """Results for one, two and three threads, which must be the same to the last bit."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([fa.flow_inverse(z, block, method=m, **options) for m in ("sequential", "jacobi")])
    finally:
        torch.set_num_threads(threads)
    assert results[0][0].isfinite().all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    return results[0]


@torch.no_grad()
def test_threads_change_no_bit(native):
    block, z = block_of(0.02, channels=128, layers_per_block=1), noise("cpu", 5)
    for method, whole in zip(("sequential", "jacobi"), all_bits(block, z)):  # nor does the batch
        assert torch.equal(fa.flow_inverse(z[2:3], block, method=method)[0], whole[2])
    torch.manual_seed(0)  # one sample of many steps: the threads share its rows
    block = toy(0.02, channels=128, layers_per_block=1).blocks[0].flow_block()._replace(positions=None)
    all_bits(block, noise("cpu", 1, tokens=300), max_sweeps=2)
    options = {"norm": "rms", "qk_norm": True, "post_norm": True, "mlp": "gated", "kv_heads": 2}
    star = toy_star(0.02, layers=(2,), **options).blocks[0].flow_block()._replace(rope=None)
    all_bits(star, noise("cpu", 1, tokens=70, features=3), max_sweeps=2)


@torch.no_grad()
def test_opcheck(native):
    ops, block, z = torch.ops.flowattn, block_of(0.05), noise("cpu")
    none = flow_block.conditions("test", block.flow_block(), z, None, None, None, None, None, 1.0, False)
    network = flow_network.NativeNetwork(block.flow_block(), z, none)
    lo, hi = torch.tensor([0, 2, 5]), torch.tensor([4, 6, 5])
    network.keys.zero_(), network.values.zero_()
    opcheck(ops.flow_window.default, (z.clone(), *network.arguments, lo, hi, 4, 16, 1e-5))
    options = (z, None, 0, 0, True, True, False, 0.0, 0.0, 1e-5)
    opcheck(ops.flow_sequential.default, (z.clone(), *network.arguments, *options))
    opcheck(ops.flow_pack.default, (torch.randn(70, 5), torch.zeros(128 * 5), 0))


def test_forward_compiles_without_graph_breaks(native):
    model, x = toy(0.05), torch.randn(2, 2, 8, 8)
    compiled = torch.compile(lambda x: model.loss(x), fullgraph=True, backend="aot_eager")
    weights = list(model.parameters())
    got, expected = (torch.autograd.grad(f(x), weights, allow_unused=True) for f in (compiled, model.loss))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_autocast_and_inference_mode(device):
    block, z = block_of(0.05, place=device), noise(device)
    expected = fa.flow_inverse(z, block, method="frontier")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(fa.flow_inverse(z, block, method="frontier"), expected)
    with torch.inference_mode():
        assert torch.equal(fa.flow_inverse(z, block, method="frontier"), expected)


@torch.no_grad()
def test_auto_follows_the_plan(device):
    block, z = block_of(place=device), noise(device)
    plans = (None, BlockPlan("frontier", window=4), BlockPlan("jacobi"), BlockPlan("gs_jacobi", 3))
    for plan in plans:
        method = plan.method if plan else "sequential"
        assert fa.flow_inverse(z, block, plan=plan, return_info=True)[1].method == method


@torch.no_grad()
def test_gaussian_ratio_keeps_samples_apart(device):
    """A published sampler lets the scale ratio of sample 0 into every mean."""
    block, z = block_of(0.03, F64, device), noise(device, dtype=F64)
    cond = {
        "cond": torch.randn(3, 64, dtype=F64, device=device),
        "cond_uncond": torch.zeros(3, 64, dtype=F64, device=device),
    }
    options = {"guidance": 2.0, "guidance_rule": "gaussian_ratio"}
    whole = fa.flow_inverse(z, block, **cond, **options)
    for b in range(3):
        alone = fa.flow_inverse(z[b : b + 1], block, **{k: v[b : b + 1] for k, v in cond.items()}, **options)
        torch.testing.assert_close(alone[0], whole[b], rtol=0, atol=1e-12)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_by_the_caller():
    block, z = block_of(place="cuda"), noise("cuda")
    for method in ("sequential", "frontier"):
        expected = fa.flow_inverse(z, block, method=method)
        stream, graph, static = torch.cuda.Stream(), torch.cuda.CUDAGraph(), z.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fa.flow_inverse(static, block, method=method)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            x = fa.flow_inverse(static, block, method=method)
        static.copy_(z)
        graph.replay()
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_graphed_steps_are_the_eager_ones():
    block, z = block_of(0.05, place="cuda"), noise("cuda")
    graphed = fa.flow_inverse(z, block, method="sequential")
    torch.testing.assert_close(graphed, fa.flow_inverse(z, block, method="frontier", window=1), rtol=0, atol=1e-5)


Z = torch.zeros(2, 16, 8)
BAD = (
    (r"z must have shape \(B, T, 8\)", {}, torch.zeros(2, 16, 7)),
    ("T must be at most 16", {}, torch.zeros(2, 17, 8)),
    ("method must be one of", {"method": "newton"}, Z),
    ("criterion must be one of", {"criterion": "l2"}, Z),
    ('criterion must be "max" for', {"criterion": "fro", "method": "frontier"}, Z),
    ("commit must be", {"commit": "lazy"}, Z),
    ("on_nonfinite must be", {"on_nonfinite": "ignore"}, Z),
    ("clamp must be None or > 0", {"clamp": 0.0}, Z),
    ("max_sweeps must be >= 0", {"max_sweeps": -1}, Z),
    ("window must be >= 1", {"window": 0}, Z),
    ("segments must be >= 1", {"segments": 0}, Z),
    ("attn_temp_uncond must be > 0", {"attn_temp_uncond": 0.0}, Z),
    ("attn_temp_uncond must be > 0", {"attn_temp_uncond": -1.0, "guidance": 1.0}, Z),
    ("guess must be", {"guess": "half", "method": "jacobi"}, Z),
    ("guess must have shape", {"guess": torch.zeros(3), "method": "jacobi"}, Z),
    (r"cond must have shape \(2, 64\)", {"cond": torch.zeros(2, 63)}, Z),
    ("known must have shape", {"known": torch.zeros(2, 17, 8)}, Z),
    ("permutation must be None", {"permutation": "forward"}, Z),
    ("permutation must have shape", {"permutation": torch.arange(5)}, Z),
    ("permutation must be int64", {"permutation": torch.arange(16).int()}, Z),
    ("guidance must be a number", {"guidance": torch.zeros(3), "cond_uncond": torch.zeros(2, 64)}, Z),
)


@pytest.mark.parametrize("text, options, z", BAD, ids=[text for text, *_ in BAD])
def test_errors(text, options, z):
    with pytest.raises(ValueError, match=f"flow_inverse: {text}"):
        fa.flow_inverse(z, block_of(), **options)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="flow_inverse: block must be a FlowBlock"):
        fa.flow_inverse(Z, object())
    with pytest.raises(TypeError, match="flow_forward: z must be float16"):
        fa.flow_forward(Z.long(), block_of())


def test_explain(native, capsys):
    assert fa.explain("flow_inverse", Z, block_of()) == "cpu"
    assert "reference" in capsys.readouterr().out
