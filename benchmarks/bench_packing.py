"""pack_plan, pack and unpack against plain torch indexing: memory-bound, so GB/s of a copy is the yardstick."""

import torch

import flowattn as fa
from benchmarks.harness import Bound, Case, Unsupported

OP = "packing"
WIDTH, LONGEST = 768, 512
MEGABYTES = (1, 4, 16, 64)  # of the padded tensor
QUICK = (0.05,)


def cases(device, quick):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    longest, width = (16, 32) if quick else (LONGEST, WIDTH)
    for megabytes in QUICK if quick else MEGABYTES:
        batch = max(1, round(megabytes * 2**20 / (longest * width * dtype.itemsize)))
        mask = make_mask(batch, longest, device)
        size = f"B{batch} S{longest}"
        yield plan_case(size, mask)
        yield move_case(f"pack {size} d{width}", mask, (batch, longest, width), dtype, unpack=False)
        yield move_case(f"unpack {size} d{width}", mask, (int(mask.sum()), width), dtype, unpack=True)


def make_mask(batch, longest, device):
    """Right padding to lengths uniform in [longest / 10, longest]."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 10, longest + 1, (batch, 1), generator=generator)
    return (torch.arange(longest) < lengths).to(device)


def indices_of(mask):
    """cu_seqlens, indices, inverse and position_ids in plain torch."""
    flat = mask.flatten()
    indices = flat.nonzero().squeeze(1)
    inverse = (flat.cumsum(0) - 1).masked_fill(~flat, -1)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return tuple(x.to(torch.int32) for x in (cu_seqlens, indices, inverse, indices % mask.shape[1]))


def plan_case(size, mask):
    expected = tuple(x.double() for x in indices_of(mask))
    count = mask.numel() + 4 * sum(x.numel() for x in expected)  # reads the mask, writes four int32 results
    return Case(f"pack_plan {size}", (mask,), None, {"fwd": expected}, {"fwd": expected}, {"fwd": count}, {}, "plan")


def move_case(name, mask, shape, dtype, unpack):
    """pack of a padded tensor of `shape`, or unpack of a packed one."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(mask.device, dtype)
    if unpack:
        expected = x.new_zeros(*mask.shape, shape[-1])
        expected[mask] = x
        moved = x.numel() + expected.numel()
    else:
        expected = x[mask]
        moved = 2 * expected.numel()  # padding is never read
    plan, indices = fa.pack_plan(mask), indices_of(mask)[1]
    exact = (expected.double(),)
    context = ("unpack" if unpack else "pack", mask, plan, indices)
    return Case(name, (x,), None, {"fwd": exact}, {"fwd": (expected,)}, {"fwd": moved * x.element_size()}, {}, context)


def flowattn_call(case):
    if case.context == "plan":
        return Bound(fa.pack_plan, collect=plan_results)
    kind, _, plan, _ = case.context
    return Bound(lambda x: fa.unpack(x, plan) if kind == "unpack" else fa.pack(x, plan))


def flowattn_capacity(case):
    """The plan with room for every position: no host sync, so it can be captured."""
    if case.context != "plan":
        raise Unsupported("pack and unpack do not depend on how the plan was made")

    def collect(plan):
        total = int(plan.total)
        return plan_results(plan._replace(indices=plan.indices[:total], position_ids=plan.position_ids[:total]))

    return Bound(lambda mask: fa.pack_plan(mask, capacity=mask.numel()), collect=collect)


def plan_results(plan):
    return plan.cu_seqlens, plan.indices, plan.inverse, plan.position_ids


def plain_torch(case):
    """Indexing in plain torch; its plan has no tile list, which ours builds in the same launch."""
    if case.context == "plan":
        return Bound(indices_of)
    kind, mask, _, indices = case.context
    if kind == "pack":
        return Bound(lambda x: x.flatten(0, 1).index_select(0, indices))
    index = indices.long()  # index_copy_ takes int64 alone

    def unpack(y):
        return y.new_zeros(mask.numel(), y.shape[1]).index_copy_(0, index, y).view(*mask.shape, y.shape[1])

    return Bound(unpack)


PROVIDERS = (
    ("flowattn", flowattn_call),
    ("flowattn with capacity", flowattn_capacity),
    ("plain torch", plain_torch),
)
MINE = ("flowattn", "flowattn with capacity")
NOTE = "pack_plan without capacity, like nonzero, reads sizes back to the host."
