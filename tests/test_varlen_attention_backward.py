"""The Hopper backward of varlen_attention, whichever lengths it is chosen for."""

import pytest
import torch
from test_varlen_attention import BF16, CASES, F16, Case, check, exact, make, plain_torch, run, runnable, same_bits

import flowattn as fa
from flowattn.ops import varlen_attention as op

MANY = [Case("many", list(range(0, 500, 7)), heads=4), Case("long", [1000, 2, 900, 1500], options={"causal": True})]


def taken(case):
    return runnable("cuda", case, F16) and case.options.get("scale", 1) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES + MANY if taken(c)], ids=lambda case: case.name)
def test_hopper_backward(case, dtype, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(op, "_SHORT", 2**31)
    x = make(case, dtype, "cuda")
    with fa.use_backend("cuda"):
        got = run(x, **case.options)
        again = run(x, **case.options)
    check(got, exact(x, **case.options), run(x, plain_torch, **case.options), dtype)
    same_bits(got, again)
