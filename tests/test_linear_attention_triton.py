"""linear_attention in Triton against the float64 loop: schedules and modes. Without a GPU, in the interpreter."""

import pytest
import torch
from conftest import GPU
from linear_attention_oracle import BF16, F16, F32, check

import flowattn as fa

pytest.importorskip("triton")
from flowattn.triton_kernels import linear_attention_configs as configs  # noqa: E402

MODES = {"causal": {}, "reverse": {"reverse": True}, "full": {"causal": False}}
NORMALIZED = {"normalize": True, "feature_map": "elu1"}
LENGTH = 300 if GPU else 38
HALF = (F16, BF16) if GPU else (F16,)  # the interpreter's bfloat16 product is wrong


@pytest.fixture(params=("whole", "segments", "passes over segments"))
def schedule(request, monkeypatch):
    """Whole sequences or segments of two chunks; gradients chunk by chunk or by passes, of rows mapped once.

    In the interpreter, chunks and slices that few tokens fill.
    """
    cut = request.param.endswith("segments")
    passes = request.param.startswith("passes")
    monkeypatch.setattr(configs, "by_passes", lambda *rest: passes)
    monkeypatch.setattr(configs, "maps_once", lambda dtype, width: passes and dtype in (F32, BF16))
    if not GPU:
        tiles = {"config": lambda width, values, whole, *rest: ((16, values if whole else 16, 4, 1), None)}
        tiles["gradients_config"] = lambda width, values, whole, single: (
            (1 if single else 2, 16, width if whole else 16, 16, 4, 1), None
        )  # fmt: skip
        tiles["states_config"] = lambda width, values, whole, *rest: (width if whole else 16, 16, 4, 1)
        for name, choose in tiles.items():
            monkeypatch.setattr(configs, name, lambda dtype, *rest, choose=choose: choose(*rest))
        monkeypatch.setattr(configs, "scan_config", lambda *rest: (2, 128, 4, 1))
    monkeypatch.setattr(
        configs, "segment_tokens", lambda device, programs, tokens, chunk: (2 * chunk if GPU else 32) * cut
    )
    with fa.use_backend("triton"):
        yield request.param


def rows(length=LENGTH, dtype=F32, heads=2, heads_kv=1, width=12, value_width=20, batch=1):
    q, k = torch.randn(batch, length, heads, width), torch.randn(batch, length, heads_kv, width)
    return q.to(dtype), k.to(dtype), torch.randn(batch, length, heads_kv, value_width).to(dtype)


def state(states=1, heads=2, width=12, value_width=20):
    return torch.randn(states, heads, width, value_width), torch.rand(states, heads, width)


@pytest.mark.parametrize("mode", MODES)
def test_normalised(schedule, device, mode):
    """Grouped heads, D != M, masked keys, token scales, states in and out, gradients through all of them."""
    check(
        *rows(), place=device, key_mask=torch.rand(1, LENGTH) > 0.2, token_scale=torch.rand(1, LENGTH) + 0.5,
        initial_state=state(), **NORMALIZED, **MODES[mode],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (F32, *HALF), ids=str)
@pytest.mark.parametrize("mode", ("causal", "reverse"))
def test_decays(schedule, device, mode, dtype):
    learn = () if schedule.startswith("passes") else ("decay",)
    options = {"decay": -torch.rand(2, LENGTH, 2), "learn": learn, "initial_state": state(2)}
    check(*rows(dtype=dtype, batch=2), place=device, **options, **MODES[mode])


@pytest.mark.parametrize("schedule", ("passes over whole sequences",), indirect=True)
@pytest.mark.parametrize("mode", ("causal", "reverse"))
def test_gradients_by_passes(schedule, device, mode):
    options = {"decay": -torch.rand(1, LENGTH, 2), "initial_state": state(), **NORMALIZED, **MODES[mode]}
    check(*rows(), place=device, key_mask=torch.rand(1, LENGTH) > 0.2, token_scale=torch.rand(1, LENGTH), **options)


@pytest.mark.parametrize("mode", MODES)
def test_packed(schedule, device, mode):
    ends = torch.tensor([0, 3, 3, LENGTH - 9, LENGTH - 5], dtype=torch.int32)
    decay = None if mode == "full" else -torch.rand(2)
    learn = () if schedule.startswith("passes") else ("decay",)
    check(*rows(), place=device, cu_seqlens=ends, decay=decay, learn=learn, initial_state=state(4),
          **NORMALIZED, **MODES[mode])  # fmt: skip


@pytest.mark.parametrize("schedule", ("whole",), indirect=True)
@pytest.mark.parametrize("name", ("identity", "relu", "relu_eps", "sigmoid", "exp", "softmax"))
def test_feature_maps(schedule, device, name):
    check(*rows(20), place=device, feature_map=name, normalize=name != "identity", causal=True)


@pytest.mark.parametrize("schedule", ("whole",), indirect=True)
@pytest.mark.parametrize("learn", ((), ("decay",)), ids=("fused", "learned"))
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_both_directions(schedule, device, packed, learn):
    """One kernel for both directions, or, for a learned decay, two calls."""
    ends = torch.tensor([0, 3, 3, LENGTH - 6, LENGTH - 2], dtype=torch.int32) if packed else None
    options = {"causal": False, "decay": -torch.rand(2), "cu_seqlens": ends, "learn": learn}
    check(*rows(), place=device, key_mask=torch.rand(1, LENGTH) > 0.2, **options, **NORMALIZED)
    check(*rows(dtype=HALF[-1]), place=device, token_scale=torch.rand(1, LENGTH), **options)


@pytest.mark.parametrize("schedule", ("whole",), indirect=True)
@pytest.mark.parametrize("lengths", ((20, 9), (0, 5), (5, 0), (0, 0)), ids=str)
def test_few_or_no_tokens(schedule, device, lengths):
    q, k, v = (rows(lengths[i > 0])[i] for i in range(3))
    check(q, k, v, place=device, causal=False, initial_state=state(), **NORMALIZED)
    if lengths[0] == lengths[1]:
        check(q, k, v, place=device, initial_state=state(), decay=-torch.rand(2), learn=("decay",))


@pytest.mark.parametrize("scale", (0.0, -2.5))
def test_scale(schedule, device, scale):
    """With 0 only what the gradient of the final state brings is left."""
    check(*rows(), place=device, scale=scale, initial_state=state()[:1])


def test_chunk_64_width_64_scale_1(device):
    """Triton 3.4 to 3.7 miscompiled such backward passes on Hopper where a product took another's transpose."""
    dtype = BF16 if GPU else F16
    with fa.use_backend("triton"):
        check(*rows(130, dtype, 1, 1, 64, 64), place=device, scale=1.0, initial_state=state(1, 1, 64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("width", (8, 16, 40, 60, 64, 72, 100, 128, 256))
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
def test_widths(device, dtype, width):
    for value_width in {width // 2, width, min(2 * width, 256)}:
        decay = -torch.rand(1, 200, 2)  # of one decay for all tokens the gradient is a sum that cancels
        check(*rows(200, dtype, 2, 1, width, value_width), place=device, decay=decay, learn=("decay",))
        if width <= 128:
            check(*rows(200, dtype, 2, 1, width, value_width), place=device, **NORMALIZED)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", (-1.0, -50.0, -1e6))
def test_strong_decay_over_131072_tokens(device, decay):
    q, k, v = (x.to(device).requires_grad_() for x in rows(131072, BF16, 1, 1, 64, 64))
    gates = torch.full((1, 131072, 1), decay, device=device, requires_grad=True)
    out = fa.linear_attention(q, k, v, decay=gates)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().square().sum(), (q, k, v, gates)))


@pytest.mark.gpu
def test_cuda_graph(device):
    q, k, v = (x.to(device) for x in rows(500, BF16))
    options = {"decay": -torch.rand(2, device=device), **NORMALIZED}
    expected = fa.linear_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.linear_attention(q, k, v, **options)
    graph.replay()
    assert torch.equal(out, expected)


def test_segments_fill_the_processors(monkeypatch):
    monkeypatch.setattr(configs, "processors", lambda device: 132)
    assert [configs.segment_tokens(None, programs, 65536, 64) for programs in (1, 64, 512)] == [256, 16384, 0]
    assert configs.segment_tokens(None, 1, 300, 64) == 0  # too short to be cut
