"""Packing plans against a loop-level oracle, over all backends, bit for bit; the op-level contracts of packing."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flowattn as fa
from flowattn.reference.packing import TILE, tile_capacity, tile_shift

backends = pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"], indirect=True)
kernels = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
on_gpu = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def right_padded(lengths, width):
    return torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]


def random_mask(batch, width, seed):
    """Rows of every density, from empty to full, with holes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, width, generator=generator) < torch.linspace(-0.1, 1.1, batch)[:, None]


MASKS = {
    "right": right_padded([3, 7, 1, 5], 7),
    "left": right_padded([3, 7, 0, 5], 7).flip(1),
    "holes": random_mask(9, 11, 0),
    "none": torch.zeros(3, 5, dtype=torch.bool),
    "all": torch.ones(3, 5, dtype=torch.bool),
    "one": torch.ones(1, 1, dtype=torch.bool),
    "B0": torch.ones(0, 5, dtype=torch.bool),
    "S0": torch.ones(4, 0, dtype=torch.bool),
    "empty-rows": right_padded([0, 0, 4, 0, 2, 0], 4),
    "tile-edges": right_padded([127, 128, 129, 1, 0, 256, 257], 300),
    "aligned-rows": random_mask(40, 512, 1),
    "odd-rows": random_mask(7, 1543, 2),
    "many-rows": random_mask(1500, 9, 3),
    "long-rows": random_mask(3, 40_000, 4),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def oracle(mask, capacity):
    """The five tensors of a plan and (tokens, tiles of sequences, longest), one token at a time."""
    batch, width = mask.shape
    cu, indices, inverse, positions = [0], [], [], []
    for b, row in enumerate(mask.tolist()):
        for s, kept in enumerate(row):
            inverse.append(len(indices) if kept else -1)
            if kept:
                indices.append(b * width + s)
                positions.append(s)
        cu.append(len(indices))
    total = len(indices)
    lengths = [b - a for a, b in zip(cu, cu[1:])]
    unit = 2 ** tile_shift(width)
    tiles = []
    for b in sorted(range(batch), key=lambda b: -(lengths[b] // unit)):
        tiles += [(b, row, cu[b], lengths[b]) for row in range(0, lengths[b], TILE)]
    stats = (total, len(tiles), max(lengths, default=0))
    tiles += [(batch, row, total, capacity - total) for row in range(0, capacity - total, TILE)]
    tiles += [(batch, 0, 0, 0)] * (tile_capacity(capacity, batch) - len(tiles))
    spare = capacity - total
    return (cu, indices + [-1] * spare, inverse, positions + [0] * spare, tiles), stats


def assert_plan(plan, mask, capacity=None):
    """The plan, exact (capacity None) or not, is the oracle's."""
    (cu, indices, inverse, positions, tiles), stats = oracle(mask, int(mask.sum()) if capacity is None else capacity)
    if capacity is None:
        tiles = tiles[: stats[1]]
    want = {"cu_seqlens": cu, "indices": indices, "inverse": inverse, "position_ids": positions}
    for name, value in want.items():
        tensor = getattr(plan, name)
        assert tensor.dtype == torch.int32, name
        assert tensor.tolist() == value, name
    assert plan.tiles.dtype == torch.int32
    assert [tuple(entry) for entry in plan.tiles.tolist()] == tiles
    assert (plan.batch, plan.padded_len) == tuple(mask.shape)
    if capacity is None:
        assert (plan.total, plan.max_seqlen) == (stats[0], stats[2])
        assert isinstance(plan.total, int)
    else:
        assert (plan.total.item(), plan.max_seqlen) == (stats[0], mask.shape[1])
        assert plan.total.dtype == torch.int32


@backends
@masks
def test_plan_of_a_mask(mask, place):
    assert_plan(fa.pack_plan(mask.to(place)), mask)


@backends
@masks
@pytest.mark.parametrize("spare", [0, 1, 300], ids="spare{}".format)
def test_plan_with_capacity(mask, spare, place):
    capacity = int(mask.sum()) + spare
    assert_plan(fa.pack_plan(mask.to(place), capacity=capacity), mask, capacity)


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_plan_of_mask_dtypes(dtype, place):
    mask = random_mask(40, 528, 5)
    values = mask if dtype == torch.bool else mask * torch.randint(-128, -1, mask.shape)
    assert_plan(fa.pack_plan(values.to(dtype).to(place)), mask)


@backends
def test_plan_of_strided_masks(place):
    mask = random_mask(70, 64, 6).to(place)
    views = (mask.t(), mask[::3, 1::2], mask[:, 1:], mask[:1].expand(5, -1), mask[:, :1].expand(-1, 40))
    for view in views:
        assert_plan(fa.pack_plan(view), view.cpu())


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 5], [0, 0], [], [129, 7, 128, 250], [1, 2] * 700], ids=len)
def test_plan_of_lengths(lengths, dtype, place):
    longest = max(lengths, default=0)
    cu = torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], device=place)
    values = torch.tensor(lengths, dtype=dtype, device=place)
    wide = cu.int() if dtype == torch.uint8 else cu.to(dtype)  # offsets do not fit a byte
    for width in (longest, longest + 9):
        mask, rows = right_padded(lengths, width), sum(lengths) + 5
        assert_plan(fa.pack_plan(lengths=values, max_seqlen=width), mask)
        assert_plan(fa.pack_plan(cu_seqlens=wide, max_seqlen=width), mask)
        assert_plan(fa.pack_plan(lengths=values, max_seqlen=width, capacity=rows), mask, rows)
        assert_plan(fa.pack_plan(cu_seqlens=wide, max_seqlen=width, capacity=rows), mask, rows)
    assert_plan(fa.pack_plan(lengths=values), right_padded(lengths, longest))
    assert_plan(fa.pack_plan(cu_seqlens=wide.repeat_interleave(2)[::2]), right_padded(lengths, longest))


@backends
def test_tiles_cover_each_row_once_longest_first(place):
    mask = random_mask(50, 2000, 7)
    plan = fa.pack_plan(mask.to(place), capacity=mask.numel())
    covered = torch.zeros(mask.numel(), dtype=torch.int64)
    for _, row, start, length in plan.tiles.tolist():
        covered[start + row : start + min(row + TILE, length)] += 1
    assert covered.tolist() == [1] * mask.numel()
    sequence, _, _, length = plan.tiles.t()
    units = (length >> tile_shift(2000))[sequence < plan.batch]
    assert (units.diff() <= 0).all()


BAD = {
    "mask": (dict(mask=torch.ones(2, 3, dtype=torch.bool), capacity=5), "capacity=5 must hold all tokens; got 6"),
    "tokens": (dict(lengths=[4, 4], max_seqlen=4, capacity=7), "capacity=7 must hold all tokens; got 8"),
    "long": (dict(lengths=[5, 4], max_seqlen=4, capacity=20), "no sequence may be longer than max_seqlen=4; got 5"),
    "negative": (dict(lengths=[4, -1], max_seqlen=4, capacity=20), "lengths must be >= 0; got -1"),
    "decreasing": (dict(cu_seqlens=[0, 4, 2], max_seqlen=4, capacity=20), "lengths must be >= 0; got -2"),
    "start": (dict(cu_seqlens=[1, 4], max_seqlen=4, capacity=20), "cu_seqlens must start at 0; got 1"),
    "exact-long": (dict(lengths=[5, 4], max_seqlen=4), "no sequence may be longer than max_seqlen=4; got 5"),
    "exact-negative": (dict(lengths=[4, -1]), "lengths must be >= 0; got -1"),
    "exact-start": (dict(cu_seqlens=[1, 4]), "cu_seqlens must start at 0; got 1"),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bad_values_raise_on_the_cpu(arguments, message, dtype, backend):
    arguments = {k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"^pack_plan: {message}$"):
        fa.pack_plan(**arguments)


@pytest.mark.gpu
@on_gpu
def test_bad_values_are_cut_off_on_the_gpu(backend):
    """Lengths are clamped to 0..S and tokens beyond the capacity dropped: the plan of what is left is consistent."""
    generator = torch.Generator().manual_seed(8)
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        source = torch.randint(info.min, info.max, (301,), generator=generator, dtype=dtype)
        source[::3] %= 40
        for name in ("lengths", "cu_seqlens"):
            lengths = source if name == "lengths" else source.long().diff()
            lengths = lengths.clamp(0, 33)
            capacity = int(lengths.sum()) - 50
            cut = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).clamp(max=capacity).diff()
            plan = fa.pack_plan(**{name: source.cuda()}, max_seqlen=33, capacity=capacity)
            assert_plan(plan, right_padded(cut.tolist(), 33), capacity)


@kernels
def test_opcheck(place):
    mask = random_mask(6, 9, 15).to(place)
    lengths = mask.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    for source, kind in ((mask, 0), (mask.t().contiguous().t(), 0), (lengths, 1), (cu, 2)):
        torch.library.opcheck(torch.ops.flowattn.pack_plan.default, (source, kind, 9, 60))
    index = fa.pack_plan(mask, capacity=60).indices
    x = torch.randn(6, 9, 4, 2, device=place)
    for src in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.half()):
        torch.library.opcheck(torch.ops.flowattn.gather_rows.default, (src, index, 0.5))


@kernels
def test_fullgraph_compile_does_not_recompile_for_new_lengths(place):
    def step(x, mask, weight):
        plan = fa.pack_plan(mask, capacity=mask.numel())
        return fa.unpack(fa.pack(x, plan) * weight, plan, fill=-1.0), plan.total

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    weight = torch.randn(4, device=place, requires_grad=True)
    for seed, shape in enumerate([(3, 7), (5, 9), (2, 30), (8, 8), (4, 11), (6, 5)]):
        mask = random_mask(*shape, seed).to(place)
        x = torch.randn(*shape, 4, device=place, requires_grad=True)
        (out, total), (want, want_total) = compiled(x, mask, weight), step(x, mask, weight)
        assert torch.equal(out, want)
        assert total == want_total
        for got, expected in zip(
            torch.autograd.grad(out.sum(), (x, weight)), torch.autograd.grad(want.sum(), (x, weight))
        ):
            torch.testing.assert_close(got, expected)
        if seed == 1:
            warm = counter.frame_count
    assert counter.frame_count == warm


@kernels
def test_compile_of_lengths_and_offsets(place):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def plans(lengths, cu):
        return fa.pack_plan(lengths=lengths, max_seqlen=8, capacity=40), fa.pack_plan(
            cu_seqlens=cu, max_seqlen=8, capacity=40
        )

    lengths = torch.tensor([3, 8, 0, 5], device=place)
    for plan in plans(lengths, torch.tensor([0, 3, 11, 11, 16], device=place)):
        assert_plan(plan, right_padded(lengths.tolist(), 8), 40)


ones = torch.ones(2, 3, dtype=torch.bool)
three = torch.tensor([3, 3, 3])
ERRORS = {
    "none": (lambda: fa.pack_plan(), "pack_plan: takes exactly one of mask, lengths and cu_seqlens; got 0"),
    "two": (lambda: fa.pack_plan(ones, lengths=three), "pack_plan: takes exactly one of .*; got 2"),
    "list": (lambda: fa.pack_plan([[1]]), "pack_plan: its input must be a tensor; got list"),
    "float": (lambda: fa.pack_plan(ones.float()), "pack_plan: its input must be bool or integer; got torch.float32"),
    "dims": (lambda: fa.pack_plan(three), r"pack_plan: mask must have shape \(B, S\); got \(3,\)"),
    "lengths": (lambda: fa.pack_plan(lengths=ones), r"pack_plan: lengths must have shape \(B,\); got \(2, 3\)"),
    "cu": (lambda: fa.pack_plan(cu_seqlens=three[:0]), r"pack_plan: cu_seqlens must have shape \(B\+1,\); got \(0,\)"),
    "capacity": (lambda: fa.pack_plan(ones, capacity=-1), "pack_plan: capacity must be >= 0 and below .*; got -1"),
    "width": (lambda: fa.pack_plan(ones, max_seqlen=3), "pack_plan: max_seqlen belongs to lengths and .*; got 3"),
    "max": (lambda: fa.pack_plan(lengths=three, max_seqlen=-1), "pack_plan: max_seqlen must be >= 0; got -1"),
    "no-max": (
        lambda: fa.pack_plan(lengths=three, capacity=9),
        "pack_plan: capacity with .* needs max_seqlen; got None",
    ),
    "huge": (lambda: fa.pack_plan(lengths=three, max_seqlen=2**30), r"pack_plan: B \* S must be below 2\*\*31; got .*"),
    "pack": (
        lambda: fa.pack(torch.ones(2, 4), fa.pack_plan(ones)),
        r"pack: x must have shape \(B, S, ...\) with leading sizes \(2, 3\); got \(2, 4\)",
    ),
    "unpack": (
        lambda: fa.unpack(torch.ones(5, 4), fa.pack_plan(ones)),
        r"unpack: y must have shape \(R, ...\) with leading sizes \(6,\); got \(5, 4\)",
    ),
    "device": (
        lambda: fa.pack(torch.ones(2, 3, device="meta"), fa.pack_plan(ones)),
        "pack: x must be on the plan's device, cpu; got meta",
    ),
    "fill": (
        lambda: fa.unpack(torch.ones(6, dtype=torch.uint8), fa.pack_plan(ones), fill=-1.0),
        "unpack: fill must be a value of torch.uint8; got -1.0",
    ),
    "half": (
        lambda: fa.unpack(torch.ones(6).half(), fa.pack_plan(ones), fill=1e6),
        "unpack: fill must be a value of torch.float16; got 1000000.0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(TypeError if name in ("list", "float") else ValueError, match=f"^{message}$"):
        call()


def test_private_ops_refuse_what_could_leave_memory(native):
    plan, gather = torch.ops.flowattn.pack_plan.default, torch.ops.flowattn.gather_rows.default
    x, index = torch.ones(2, 3, 4, 5), torch.zeros(2, dtype=torch.int32)
    for call, message in (
        (lambda: plan(ones, 0, 4, 6), "padded_len must be the mask's width; got 4"),
        (lambda: plan(three, 3, 3, 6), "kind must be .*; got 3"),
        (lambda: plan(three, 1, -1, 6), "padded_len must be >= 0; got -1"),
        (lambda: plan(three, 1, 3, -6), "capacity must be >= 0 .*; got -6"),
        (lambda: plan(three.to(torch.int16), 1, 3, 6), "source must have 4 or 8 bytes an element, .*; got 2"),
        (lambda: gather(x[0], index, 0.0), "src must have 4 dims .*; got 3"),
        (lambda: gather(x.transpose(2, 3), index, 0.0), "the last dim of src must be contiguous; got 5"),
        (lambda: gather(x, index.long(), 0.0), "index must be a contiguous int32 vector .*; got 1"),
        (lambda: gather(x, index.expand(2, 2), 0.0), "index must be a contiguous int32 vector .*; got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_explain_names_the_backend(capsys):
    assert fa.explain("pack_plan", ones) in ("cpu", "reference")
    assert fa.explain("pack", torch.ones(2, 3), fa.pack_plan(ones)) in ("cpu", "reference")
    assert "chosen" in capsys.readouterr().out


@pytest.mark.gpu
@on_gpu
def test_capacity_mode_never_synchronises(backend):
    mask = random_mask(64, 700, 16).cuda()
    lengths = mask.sum(1)
    x = torch.randn(64, 700, 8, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = fa.pack_plan(mask, capacity=mask.numel())
        fa.pack_plan(lengths=lengths, max_seqlen=700, capacity=mask.numel())
        fa.unpack(fa.pack(x, plan), plan).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", [(3, 70), (64, 700)], ids=["one-block", "cooperative"])
def test_cuda_graph_replay_with_a_new_mask(shape, backend):
    mask = random_mask(*shape, 17).cuda()
    x = torch.randn(*shape, 24, device="cuda")

    def step():
        plan = fa.pack_plan(mask, capacity=mask.numel())
        return plan, fa.pack(x, plan), fa.unpack(fa.pack(x, plan), plan)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, packed, back = step()
    for seed in (18, 19):
        mask.copy_(random_mask(*shape, seed))
        graph.replay()
        assert_plan(plan, mask.cpu(), mask.numel())
        assert torch.equal(packed[: int(mask.sum())], x[mask])
        assert torch.equal(back, x * mask[..., None])


@pytest.mark.gpu
@on_gpu
def test_large_plans_agree_with_the_cpu(backend):
    for shape in ((4000, 512), (3, 1_000_000), (20_000, 33)):
        mask = random_mask(*shape, 20)
        on_gpu = fa.pack_plan(mask.cuda())
        with fa.use_backend("cpu"):
            on_cpu = fa.pack_plan(mask)
        for name, a, b in zip(on_cpu._fields, on_gpu, on_cpu):
            assert torch.equal(a.cpu(), b) if isinstance(b, torch.Tensor) else a == b, name
