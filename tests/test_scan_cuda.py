"""The scans on a GPU: lines of many tiles, which look back, and what a GPU adds to the contract.

Everything else is in test_prefix_attention*.py and test_linear_scan.py; their short inputs fit one tile.
"""

import pytest
import torch

import flowattn as fa

pytestmark = pytest.mark.gpu
HALF, FLOAT = torch.bfloat16, torch.float32
# Error by the largest true magnitude, of results and of gradients: rounding to bfloat16, and sums in float32.
TOLERANCE = {HALF: (8e-3, 2e-2), FLOAT: (3e-6, 2e-5)}
SHAPES = (  # B, T, H, D: a line is (row, head, column block)
    (1, 20_000, 2, 64),  # several blocks of tiles
    (1, 3_001, 1, 40),  # idle lanes
    (1, 1_100, 2, 264),  # several column blocks
    (2, 1_500, 1, 5),  # single elements instead of vectors
    (40, 700, 8, 64),  # lines enough to take their tiles in turn
    (2, 1_000, 3, 64),  # few tiles: clusters, where the GPU has them
)
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-T{}-H{}-D{}".format(*shape))


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"), fa.use_backend("cuda"):
        yield


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, name
    error, scale = (got.double() - true.double()).abs().max().item(), true.abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), f"{name}: off by {error:.3g}, scale {scale:.3g}"


def segments(shape):
    """Resets that leave segments longer and shorter than a tile; no row loses its initial state at once."""
    reset = torch.rand(shape[:2]) < 4 / shape[1]
    reset[:, : shape[1] // 3] = False
    reset[:, shape[1] // 2 : shape[1] // 2 + 3] = True
    return reset


def gates_of(kind, shape, dtype):
    gates = torch.rand({"full": shape, "head": shape[:3], "constant": shape[2:], "constant_head": shape[2:3]}[kind])
    return (0.4 + 0.59 * gates).to(dtype)


def cpu_linear_scan(gates, tokens, initial, options):
    with torch.device("cpu"), fa.use_backend("cpu"):
        return fa.linear_scan(gates, tokens, initial, output_final_state=True, **options)


def run_both(function, truth, leaves, grads):
    """Results and gradients on the GPU, and in float64 on the CPU."""
    results = []
    for call, cast in ((function, lambda x: x), (truth, lambda x: x.double().cpu())):
        inputs = [cast(x).detach().clone().requires_grad_() for x in leaves]
        outputs = call(*inputs)
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, [cast(x) for x in grads])))
    return [x.cpu() for x in results[0]], results[1]


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("kind", ("full", "head", "constant", "constant_head"))
@pytest.mark.parametrize("dtype", (FLOAT, HALF), ids=str)
@on_shapes
def test_linear_scan(native, shape, dtype, kind, reverse):
    gates, tokens = gates_of(kind, shape, dtype), torch.randn(shape).to(dtype)
    initial, reset = torch.randn(shape[0], *shape[2:]), segments(shape)
    grads = [torch.randn(shape).to(dtype), torch.randn_like(initial)]
    options = {"reverse": reverse, "gate": "linear"}

    def gpu(*leaves):
        return fa.linear_scan(*leaves, reset=reset, output_final_state=True, **options)

    def cpu(*leaves):
        return cpu_linear_scan(*leaves, {"reset": reset.cpu(), **options})

    got, true = run_both(gpu, cpu, (gates, tokens, initial), grads)
    for name, x, y in zip(("h", "final", "da", "db", "dh0"), got, true):
        assert_near(name, x, y, TOLERANCE[dtype][name not in ("h", "final")])


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("dtype", (FLOAT, HALF), ids=str)
@on_shapes
def test_prefix_attention(native, shape, dtype, reverse):
    scores, values = 3 * torch.randn(shape[:3]), torch.randn(shape).to(dtype)
    states = (torch.rand(shape[0], shape[2]) + 0.1, torch.randn(shape[0], *shape[2:]))
    mask, reset, gauge = torch.rand(shape[:2]) > 0.3, segments(shape), torch.randn(shape[0], shape[2])
    grads = [torch.randn(shape).to(dtype), torch.randn_like(states[1])]

    def gpu(s, v, u, w, mask=mask, reset=reset, gauge=gauge):
        start = fa.PrefixState(gauge, u, w)
        out, final = fa.prefix_attention(
            s, v, mask=mask, reset=reset, initial_state=start, output_final_state=True, reverse=reverse
        )
        return out, final.read()

    def cpu(*leaves):
        with torch.device("cpu"), fa.use_backend("cpu"):
            return gpu(*leaves, mask.cpu(), reset.cpu(), gauge.double().cpu())

    got, true = run_both(gpu, cpu, (scores, values, *states), grads)
    for name, x, y in zip(("o", "final", "ds", "dv", "du0", "dw0"), got, true):
        assert_near(name, x, y, TOLERANCE[dtype][name not in ("o", "final")])


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
def test_packed_sequences_of_many_tiles(native, reverse):
    ends = torch.tensor([0, 0, 1_500, 1_501, 9_000, 9_000, 9_700], dtype=torch.int32)
    scores, values, initial = torch.randn(9_800, 2), torch.randn(9_800, 2, 64), torch.randn(6, 2, 64)
    out, final = fa.prefix_attention(scores, values, cu_seqlens=ends, reverse=reverse, output_final_state=True)
    h, last = fa.linear_scan(
        scores.sigmoid(), values, initial, cu_seqlens=ends, reverse=reverse, output_final_state=True
    )
    assert out[9_700:].eq(0).all() and h[9_700:].eq(0).all() and torch.equal(last[0], initial[0])
    assert final.u[0].eq(0).all() and final.m[0].eq(float("-inf")).all()
    for i, (begin, end) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        if begin == end:
            continue
        rows, one = slice(begin, end), slice(i, i + 1)
        part, state = fa.prefix_attention(
            scores[None, rows], values[None, rows], reverse=reverse, output_final_state=True
        )
        assert_near("o", out[None, rows], part, 3e-6)
        assert_near("w", final.w[one], state.w, 1e-5)
        part, state = fa.linear_scan(
            scores[None, rows].sigmoid(), values[None, rows], initial[one], reverse=reverse, output_final_state=True
        )
        assert_near("h", h[None, rows], part, 1e-5)
        assert_near("final", last[one], state, 1e-5)


def test_offsets_that_lie_read_nothing_out_of_bounds(native):
    """The results are wrong, the memory is not: compute-sanitizer runs this too."""
    scores, values, reset = torch.randn(500, 2), torch.randn(500, 2, 64), torch.rand(500) < 0.1
    for ends in ([0, 10_000], [-7, 300, 200, 500], [300, 100], [2**31 - 1, -(2**31)]):
        cu = torch.tensor(ends, dtype=torch.int32)
        for reverse in (False, True):
            options = {"cu_seqlens": cu, "reset": reset, "reverse": reverse, "output_final_state": True}
            out, h = fa.prefix_attention(scores, values, **options)[0], fa.linear_scan(scores, values, **options)[0]
            assert out.shape == h.shape == values.shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("step", (0.0, 100.0, -100.0), ids=("equal", "rising", "falling"))
def test_prefix_attention_of_262144_tokens(native, step):
    """Equal scores give the running mean; scores far apart make the largest so far win."""
    length = 262_144
    values = torch.randn(1, length, 8, 64, dtype=HALF)
    scores = (step * torch.arange(length, dtype=FLOAT)).view(1, length, 1).expand(1, length, 8)
    out = fa.prefix_attention(scores, values)
    if step > 0:
        assert torch.equal(out, values)
    elif step < 0:
        assert torch.equal(out, values[:, :1].expand_as(values))
    else:
        count = torch.arange(1, length + 1, dtype=torch.float64).view(1, -1, 1, 1)
        for head in range(8):
            mean = values[:, :, head : head + 1].double().cumsum(1) / count
            assert_near("o", out[:, :, head : head + 1], mean, 8e-3)


def test_linear_scan_of_262144_tokens(native):
    """A constant gate of 1 is a running sum of integers, exact in float32."""
    tokens = torch.randint(-3, 4, (1, 262_144, 2, 8)).float()
    assert torch.equal(fa.linear_scan(torch.ones(2), tokens).double(), tokens.double().cumsum(1))


def test_overflowing_products_of_gates(native):
    """2 ** 4000 overflows, but nothing reaches the state; then 2 ** 200 acts on a state of 2 ** -140."""
    gates, tokens = torch.full((1, 13_000, 1, 4), 2.0), torch.zeros(1, 13_000, 1, 4)
    gates[:, 4_200:] = 1.0
    tokens[:, 4_000] = 2.0**-140
    out = fa.linear_scan(gates, tokens)
    assert out[:, :4_000].eq(0).all() and out[:, -1].eq(2.0**59).all()


def make_call(op, shape):
    """(a function that runs op forward and backward, its inputs)"""
    leaves = [torch.randn(shape[:3]).sigmoid().requires_grad_(), torch.randn(shape, dtype=HALF, requires_grad=True)]
    go = torch.randn(shape, dtype=HALF)

    def call():
        out = op(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, go)

    return call, (*leaves, go)


OPS = pytest.mark.parametrize("op", (fa.prefix_attention, fa.linear_scan), ids=lambda op: op.__name__)
LONG, MANY, SHORT = (1, 40_000, 8, 64), (64, 1_000, 8, 64), (1, 1_000, 8, 64)  # each schedule of tiles


@pytest.mark.parametrize("shape", (LONG, MANY, SHORT), ids=("look_back", "in_turn", "cluster"))
@OPS
def test_bitwise_repeatable(native, op, shape):
    """In every schedule, with the flag and without; other work on the GPU changes when tiles run."""
    torch.use_deterministic_algorithms(False)
    call, _ = make_call(op, shape)
    first, noise = call(), torch.randn(4_096, 4_096)
    for repeat in range(5):
        torch.use_deterministic_algorithms(repeat % 2 == 0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            noise @ noise
        assert all(torch.equal(x, y) for x, y in zip(call(), first))


@pytest.mark.parametrize("shape", (LONG, MANY, SHORT), ids=("look_back", "in_turn", "cluster"))
@OPS
def test_graph_replay(native, op, shape):
    torch.use_deterministic_algorithms(False)
    leaves = torch.randn(shape[:3]).sigmoid(), torch.randn(shape, dtype=HALF)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        op(*leaves)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = op(*leaves)
    for _ in range(2):
        leaves[0].copy_(torch.randn(shape[:3]).sigmoid()), leaves[1].copy_(torch.randn(shape))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, op(*leaves))


@OPS
def test_other_stream(native, op):
    torch.use_deterministic_algorithms(False)
    call, _ = make_call(op, LONG)
    expected, stream = call(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call()
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, expected))


@pytest.mark.parametrize("shape", (LONG, MANY), ids=("look_back", "in_turn"))
@OPS
def test_peak_memory(native, op, shape):
    """The forward: inputs and outputs, and 5 % for what tiles publish."""
    torch.use_deterministic_algorithms(False)
    gates, values = torch.randn(shape[:3]).sigmoid(), torch.randn(shape, dtype=HALF)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = op(gates, values)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 0.05 * (gates.nbytes + values.nbytes + out.nbytes)
