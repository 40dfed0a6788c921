"""selective_scan on a GPU in CUDA C++: spans of long sequences, repeated and captured runs, what its kernels refuse.

Everything else is in the other test_selective_scan*.py.
"""

import pytest
import torch
from selective_oracle import both_directions, both_layouts, check, make, results_and_gradients, run

import flowattn as fa
from flowattn.ops import selective_scan as module

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"), fa.use_backend("cuda"):
        yield


@pytest.mark.parametrize("channels, states", ((40, 16), (9, 3), (17, 17), (5, 64), (3, 100)))
@both_layouts
def test_spans(layout, channels, states):
    """A few hundred channels do not fill a GPU, so time is cut: into 3 spans here, the last one short."""
    x = make(1, 1000, channels, states, dtype=torch.float32, layout=layout)
    options = {"delta_softplus": True, "return_states_at": (70, 999, 3), "reverse": states == 17}
    check(x, layout=layout, **options)


def test_sums_of_many_rows():
    """dB and dC from 32768 numbers on are summed over the blocks of channels in vectors."""
    check(make(4, 525, 70, 16, dtype=torch.float32), delta_softplus=True)


@both_directions
def test_packed_spans(reverse):
    """Some spans of a packed call lie behind the end of their sequence."""
    ends = [0, 0, 5, 700, 701, 1300, 1300]
    x = make(1, 1400, 20, 3, dtype=torch.float32)
    x["initial"] = torch.randn(6, 20, 3)
    options = {"reverse": reverse, "cu_seqlens": torch.tensor(ends), "return_states_at": [650, 1350, 702]}
    got = results_and_gradients(run, x, **options)
    on_cpu = {name: value.double().cpu() for name, value in x.items()}
    with torch.device("cpu"), fa.use_backend("reference"):
        true = results_and_gradients(run, on_cpu, torch.float32, **options | {"cu_seqlens": torch.tensor(ends)})
    for mine, yours in zip(got, true):
        assert (mine.double().cpu() - yours).abs().max() <= 1e-5 * yours.abs().max()


def test_same_bits_every_time():
    x = make(2, 600, 70, 16, dtype=torch.float32)
    first, *others = (results_and_gradients(run, x, delta_softplus=True) for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_graph_replay():
    x = make(2, 600, 40, 16, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in x.items() if name != "initial"}
    dout = torch.randn(2, 600, 40)

    def call():
        out = fa.selective_scan(**leaves, layout="BLD")
        return (out, *torch.autograd.grad(out, list(leaves.values()), dout))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
    for _ in range(2):
        dout.copy_(torch.randn(2, 600, 40))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, yours) for mine, yours in zip(captured, call()))


def test_lying_offsets_and_slots_stay_inside():
    """Their results are unspecified, but nothing is read or written out of bounds."""
    x = make(1, 50, 8, 4, dtype=torch.float32)
    initial = x.pop("initial").expand(3, -1, -1).contiguous()
    call = list(module._prepare(**x, initial_state=initial[:1], return_states_at=[4], layout="BLD"))
    call[8], call[9] = initial, torch.tensor([40, 10, 90, -5], dtype=torch.int32)
    call[10] = torch.full((50,), 7, dtype=torch.int32)
    out, _, _, carries = torch.ops.flowattn.selective_scan_fwd(*call, module.CUDA_CHUNK)
    backward = (out, None, None, *call[:8], True, *call[9:11], carries, *call[12:], module.CUDA_CHUNK)
    torch.ops.flowattn.selective_scan_bwd(*backward)
    torch.cuda.synchronize()


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match="takes no float64"):
        run(make(1, 5, 2, 2))
