"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before import."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if PROCESSES > 1:  # they share the cores; threads that wait by spinning would stop each other
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

import flowattn as fa  # noqa: E402
from flowattn import _native  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    on_cpu = pytest.mark.skip(reason="float64 is plain torch on a GPU, in thousands of launches: checked on a CPU")
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        if GPU and item.name.startswith("test_gradcheck"):
            item.add_marker(on_cpu)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fill uninitialised memory with NaN: an element no kernel wrote then fails the test instead of passing by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def native():
    """Skip where the native library was not built."""
    if not _native.LOADED:
        pytest.skip(f"native library missing: {_native.MISSING}")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def backend(request):
    """Indirect parameter: run the test with this backend forced, or skip it where it cannot run."""
    name = request.param
    if name == "cpu" and not _native.LOADED:
        pytest.skip(f"native library missing: {_native.MISSING}")
    if name == "cuda" and not (GPU and _native.CUDA_BUILT):
        pytest.skip("needs an NVIDIA GPU and CUDA kernels")
    with fa.use_backend(name):
        yield name


@pytest.fixture
def place(backend, device):
    """The device on which the forced backend runs."""
    return {"cpu": "cpu", "cuda": "cuda"}.get(backend, device)


@pytest.fixture
def scan_backend(request, backend):
    """The forced backend, with tensors made on its device. What it does not take is skipped."""
    parameters = request.node.callspec.params
    if backend == "cuda" and parameters.get("dtype") == torch.float64:
        pytest.skip("float64 runs on the reference")
    if backend == "cuda" and request.node.originalname.startswith("test_empty") and parameters["shape"][-1] == 0:
        pytest.skip("rows without columns run on the reference")
    with torch.device("cuda" if backend == "cuda" else "cpu"):
        yield backend


@pytest.fixture
def assert_same(scan_backend):
    """Asserts equal bits; on a GPU near equality, since a token's place in its tile decides the order of its sums."""

    def check(got, expected):
        if scan_backend == "cuda":
            low = got.dtype in (torch.float16, torch.bfloat16)
            torch.testing.assert_close(got, expected, rtol=2e-2 if low else 2e-5, atol=2e-2 if low else 2e-5)
        else:
            assert torch.equal(got, expected)

    return check
