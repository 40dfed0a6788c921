"""pack and unpack: values, gradients and memory, over all backends, bit for bit."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowattn as fa

backends = pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"], indirect=True)
kernels = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)


def half_kept(batch, width, place):
    """A mask with holes whose first row is empty."""
    mask = torch.rand(batch, width, device=place) < 0.5
    mask[0] = False
    return mask


TRAILING = [(), (1,), (3,), (64,), (2, 5), (4, 16), (0,), (2, 3, 4)]
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.complex64,
    torch.float8_e4m3fn,
]


def values(shape, dtype, place):
    if dtype == torch.bool:
        return torch.rand(shape, device=place) < 0.5
    return (torch.randn(shape, device=place) * 50).abs().to(dtype)


def same(a, b):
    """Bitwise equality, whatever the dtype."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(-1).tolist() == b.contiguous().view(-1).tolist()
    )


@backends
@pytest.mark.parametrize("trailing", TRAILING, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype, trailing, place):
    mask = half_kept(8, 13, place)
    x = values((8, 13, *trailing), dtype, place)
    for capacity in (None, mask.numel() + 3):
        plan = fa.pack_plan(mask, capacity=capacity)
        packed = fa.pack(x, plan)
        assert same(packed[: int(plan.total)], x[mask])
        assert same(packed[int(plan.total) :], torch.zeros_like(packed[int(plan.total) :]))
        back = fa.unpack(packed, plan)
        keep = mask.view(8, 13, *[1] * len(trailing))
        assert same(back, torch.where(keep, x, torch.zeros((), dtype=dtype, device=place)))


@backends
def test_round_trip_of_empty_batches(place):
    for shape in ((0, 5), (4, 0), (0, 0)):
        plan = fa.pack_plan(torch.ones(shape, dtype=torch.bool, device=place))
        packed = fa.pack(torch.ones(*shape, 3, device=place), plan)
        assert packed.shape == (0, 3)
        assert fa.unpack(packed, plan).shape == (*shape, 3)
    plan = fa.pack_plan(torch.ones(0, 5, dtype=torch.bool, device=place), capacity=2)
    assert fa.pack(torch.ones(0, 5, 3, device=place), plan).tolist() == [[0.0] * 3] * 2


class Recorder(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


VIEWS = {
    "time-first": lambda place: torch.randn(13, 8, 4, 6, device=place).transpose(0, 1),
    "heads-first": lambda place: torch.randn(8, 4, 13, 6, device=place).transpose(1, 2),
    "one-of-qkv": lambda place: torch.randn(8, 13, 3, 4, 6, device=place)[:, :, 1],
    "cut-columns": lambda place: torch.randn(8, 13, 4, 9, device=place)[..., 1:7],
    "expanded": lambda place: torch.randn(1, 13, 1, 6, device=place).expand(8, -1, 4, -1),
    "odd-offset": lambda place: torch.randn(8 * 13 * 24 + 1, device=place)[1:].view(8, 13, 4, 6),
    "one-head": lambda place: torch.randn(8, 13, 7, device=place)[..., :6],
}


@kernels
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_views_are_read_in_place(view, dtype, place):
    mask = half_kept(8, 13, place)
    plan = fa.pack_plan(mask)
    x = view(place).to(dtype)  # keeps the strides, except of expanded tensors
    with Recorder() as ran:
        packed = fa.pack(x, plan)
    assert torch.equal(packed, x[mask])
    views = {"aten::unsqueeze", "aten::view", "aten::_unsafe_view", "aten::alias", "aten::slice", "aten::detach"}
    assert ran.names - views <= {"flowattn::gather_rows", "aten::new_empty", "aten::empty", "aten::fill_"}
    back = fa.unpack(packed, plan)
    assert torch.equal(back[mask], packed)
    strided = packed.repeat_interleave(2, 0)[::2]  # packed rows with gaps between them
    assert torch.equal(fa.unpack(strided, plan), back)


@backends
def test_a_strided_last_dim_is_copied(place):
    mask = half_kept(8, 13, place)
    x = torch.randn(8, 13, 6, 4, device=place).transpose(2, 3)
    assert torch.equal(fa.pack(x, fa.pack_plan(mask)), x[mask])


@backends
@pytest.mark.parametrize(
    "dtype, fill",
    [
        (torch.float32, -1.5),
        (torch.bfloat16, float("-inf")),
        (torch.int64, -100),
        (torch.uint8, 255),
        (torch.bool, 1),
        (torch.float16, 0.1),
    ],
    ids=str,
)
def test_fill(dtype, fill, place):
    mask = half_kept(6, 9, place)
    plan = fa.pack_plan(mask)
    x = values((6, 9, 5), dtype, place)
    got = fa.unpack(fa.pack(x, plan), plan, fill=fill)
    assert torch.equal(got, torch.where(mask[..., None], x, torch.tensor(fill, dtype=dtype, device=place)))


@backends
def test_rows_out_of_range_are_filled(place, backend):
    """Whatever a damaged plan holds, no row is read from outside the tensor."""
    plan = fa.pack_plan(torch.ones(2, 3, dtype=torch.bool, device=place))
    wild = torch.tensor([-1, 5, 6, 2**31 - 1, -(2**31), 0], dtype=torch.int32, device=place)
    x = torch.arange(1.0, 7.0, device=place).view(2, 3)
    assert fa.pack(x, plan._replace(indices=wild)).tolist() == [0, 6, 0, 0, 0, 1]


@kernels
def test_offsets_beyond_32_bits(place):
    """Rows of 1 MiB at byte offsets up to 3 GiB; on the CPU the pages that nothing touches are never allocated."""
    shape = (3, 1024, 1 << 20)
    x = (
        torch.from_numpy(np.zeros(shape, np.uint8))
        if place == "cpu"
        else torch.zeros(shape, dtype=torch.uint8, device=place)
    )
    x[2, 1023, 5], x[2, 0, 7] = 9, 8
    mask = torch.zeros(3, 1024, dtype=torch.bool, device=place)
    mask[2, 1023] = mask[2, 0] = True
    packed = fa.pack(x, fa.pack_plan(mask))
    assert packed.sum(1).tolist() == [8, 9]
    assert (packed[1, 5], packed[0, 7]) == (9, 8)


@backends
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("spare", [None, 4], ids=["exact", "capacity"])
def test_gradients(trailing, spare, place):
    mask = half_kept(4, 5, place)
    plan = fa.pack_plan(mask, capacity=None if spare is None else int(mask.sum()) + spare)
    x = torch.randn(4, 5, *trailing, dtype=torch.float64, device=place, requires_grad=True)
    y = torch.randn(plan.indices.shape[0], *trailing, dtype=torch.float64, device=place, requires_grad=True)
    for function, argument in ((fa.pack, x), (fa.unpack, y)):
        # The plan is bound: gradcheck would take a NamedTuple apart.
        torch.autograd.gradcheck(lambda t, function=function: function(t, plan), argument)
        torch.autograd.gradgradcheck(lambda t, function=function: function(t, plan), argument)
    with torch.no_grad():
        adjoint = torch.tensordot(fa.pack(x, plan), y, y.dim()), torch.tensordot(x, fa.unpack(y, plan), x.dim())
    torch.testing.assert_close(*adjoint)


@backends
def test_gradient_of_a_sum(place):
    """The incoming gradient is an expanded scalar."""
    mask = half_kept(4, 5, place)
    x = torch.randn(4, 5, 3, device=place, requires_grad=True)
    fa.pack(x, fa.pack_plan(mask)).sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand(-1, -1, 3).float())
