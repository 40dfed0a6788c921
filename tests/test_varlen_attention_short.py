"""The backward with one program a sequence and key head, also where the hints are wrong or programs are few."""

import pytest
import torch
from test_varlen_attention import BF16, CASES, F16, Case, check, exact, make, plain_torch, run, runnable, same_bits

import flowattn as fa
from flowattn.triton_kernels import varlen_attention_configs as configs

MANY = [Case("many", list(range(0, 500, 7)), heads=4), Case("over-hint", [130, 0, 70], heads=2, interpreted=True)]


@pytest.mark.parametrize("longest", (64, 128))
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("case", CASES + MANY, ids=lambda case: case.name)
def test_one_program_a_sequence(case, dtype, longest, monkeypatch, device):
    if not runnable("triton", case, dtype) or (device == "cpu" and longest != 64 and case.name != "over-hint"):
        pytest.skip("left to a GPU")
    monkeypatch.setattr(configs, "processors", lambda device: 1)
    x = make(case, dtype, device)
    hints = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    with fa.use_backend("triton"):
        got = run(x, **case.options, **hints)
        again = run(x, **case.options, **hints)
    check(got, exact(x, **case.options), run(x, plain_torch, **case.options), dtype)
    same_bits(got, again)


def test_few_sequences_are_spread(monkeypatch):
    arguments = (F16, 64, 100, 131, torch.device("cpu"), False, False)
    monkeypatch.setattr(configs, "processors", lambda device: 132)
    assert configs.short_config(*arguments) is None
    monkeypatch.setattr(configs, "processors", lambda device: 131)
    assert configs.short_config(*arguments) is not None
