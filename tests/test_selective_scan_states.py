"""selective_scan over sequences: packed, split, reversed, both directions; states and threads."""

import pytest
import torch
from selective_oracle import (
    DTYPES,
    NAMES,
    agree,
    both_directions,
    both_layouts,
    make,
    on_backends,
    results_and_gradients,
    run,
)

import flowattn as fa
from flowattn.ops import selective_scan as module


def packed_parts(x, ends):
    """The inputs of each sequence of packed (1, T, ...) inputs."""
    for s, (begin, end) in enumerate(zip(ends, ends[1:])):
        yield {
            name: value[s : s + 1] if name == "initial" else value[:, begin:end] if value.dim() > 2 else value
            for name, value in x.items()
        }


@both_directions
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_backends
def test_packed_equals_each_sequence(scan_backend, dtype, reverse):
    ends = [0, 0, 5, 6, 6, 140, 173, 173]
    x = make(1, 180, 20, 3, dtype=dtype)
    x["initial"] = torch.randn(7, 20, 3)
    options = {"reverse": reverse, "delta_softplus": True}
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    out, final, _ = run(leaves, cu_seqlens=torch.tensor(ends), **options)
    go, gf = torch.randn(out.shape).to(dtype), torch.randn(final.shape)
    gradients = dict(zip(NAMES, torch.autograd.grad([out, final], list(leaves.values()), [go, gf])))
    assert out[:, 173:].eq(0).all() and all(gradients[name][:, 173:].eq(0).all() for name in ("u", "delta", "z", "B"))
    for s, part in enumerate(packed_parts(x, ends)):
        rows = slice(ends[s], ends[s + 1])
        part = {name: value.detach().requires_grad_() for name, value in part.items()}
        one_out, one_final, _ = run(part, **options)
        assert agree(scan_backend, out[:, rows], one_out) and agree(scan_backend, final[s : s + 1], one_final)
        grads = torch.autograd.grad([one_out, one_final], list(part.values()), [go[:, rows], gf[s : s + 1]],
                                    allow_unused=True)  # fmt: skip
        for name, grad in zip(NAMES, grads):
            if name in ("u", "delta", "B", "C", "z") and grad is not None:
                assert agree(scan_backend, gradients[name][:, rows], grad), name
            if name == "initial":
                assert agree(scan_backend, gradients[name][s : s + 1], grad), name


@both_layouts
@on_backends
def test_packed_without_batch_dim(scan_backend, layout):
    x = make(1, 9, 4, 2, dtype=torch.float32, layout=layout)
    x["initial"] = torch.randn(2, 4, 2)
    options = {"cu_seqlens": torch.tensor([0, 4, 7]), "layout": layout, "return_states_at": [5, 8, 3]}
    out, final, states = run(x, **options)
    flat = {name: value[0] if value.dim() > 2 and name != "initial" else value for name, value in x.items()}
    flat_out, flat_final, flat_states = run(flat, **options)
    assert torch.equal(flat_out, out[0]) and torch.equal(flat_final, final) and torch.equal(flat_states, states[0])
    assert torch.equal(flat_states[2], final[0]) and flat_states[1].eq(0).all()  # token 8 belongs to no sequence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_directions
@on_backends
def test_split_and_resume(scan_backend, dtype, reverse):
    x = make(2, 150, 5, 3, dtype=dtype)
    cuts = [0, *sorted(torch.randperm(149)[:4].add(1).tolist()), 150]
    spans = list(zip(cuts, cuts[1:]))
    spans = spans[::-1] if reverse else spans
    after = [begin if reverse else end - 1 for begin, end in spans]  # the token of each span that is walked last
    whole, last, states = run(x, reverse=reverse, return_states_at=after)
    outs, state = {}, x["initial"]
    for k, (begin, end) in enumerate(spans):
        part = {name: value[:, begin:end] if name in ("u", "delta", "z", "B", "C") else value
                for name, value in x.items()}  # fmt: skip
        outs[begin], state, _ = run({**part, "initial": state}, reverse=reverse)
        assert agree(scan_backend, states[:, k], state)
    assert agree(scan_backend, torch.cat([outs[begin] for begin in sorted(outs)], 1), whole)
    assert agree(scan_backend, state, last)


@both_layouts
@on_backends
def test_reverse_is_flip_run_flip(scan_backend, layout):
    x = make(2, 77, 18, 3, dtype=torch.float32, layout=layout)
    time = 2 if layout == "BDL" else 1
    flip = {"u": time, "delta": time, "z": time, "B": x["B"].dim() - 1 if time == 2 else 1}
    flip["C"] = flip["B"]
    flipped = {name: value.flip(flip[name]) if name in flip else value for name, value in x.items()}
    for mine, other in zip(run(x, layout=layout, reverse=True)[:2], run(flipped, layout=layout)[:2]):
        assert agree(scan_backend, mine, other.flip(time) if mine.shape == x["u"].shape else other)


@both_layouts
def test_bitwise_independent_of_threads(native, layout):
    x = make(3, 300, 150, 5, dtype=torch.float32, layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(results_and_gradients(run, x, layout=layout, delta_softplus=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_states_of_all_tokens_are_never_in_memory(native):
    """The forward keeps none, or those before every 64 tokens."""
    x = make(2, 200, 8, 16, dtype=torch.float32)
    call = module._prepare(**{name: value for name, value in x.items() if name != "initial"}, layout="BLD")
    fwd = torch.ops.flowattn.selective_scan_fwd
    assert fwd(*call, 0)[3].numel() == 0
    carries = fwd(*call, module.CHUNK)[3]
    assert carries.shape == (2 * 200 // 64 + 2, 16, 8)
    state = fa.selective_scan(*(x[name] for name in NAMES[:-1]), layout="BLD", return_states_at=[127])[1]
    assert torch.equal(carries[2], state[0, 0].T)  # what enters the third tile of the first row


# --- both directions at once


@both_layouts
def test_both_directions_equal_two_scans(native, layout):
    time = 2 if layout == "BDL" else 1
    first, second = (make(2, 40, width, 3, dtype=torch.float32, layout=layout) for width in (6, 17))
    inputs = [fa.SelectiveInputs(*(x[name] for name in NAMES[:-1])) for x in (first, second)]
    states = (first["initial"], second["initial"])
    options = {"delta_softplus": True, "layout": layout}
    outs, finals = fa.bi_selective_scan(*inputs, initial_states=states, output_final_state=True, **options)
    out, final, _ = run(first, **options)
    assert torch.equal(outs[0], out) and torch.equal(finals[0], final)
    flipped = {name: value.flip(-1 if time == 2 else 1) if name in ("u", "delta", "z", "B", "C") else value
               for name, value in second.items()}  # fmt: skip
    out, final, _ = run(flipped, **options)
    assert torch.equal(outs[1], out.flip(time)) and torch.equal(finals[1], final)
