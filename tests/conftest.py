"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before import."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import flowattn as fa  # noqa: E402
from flowattn import _native  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def pytest_collection_modifyitems(items):
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fill uninitialised memory with NaN, so that an element no kernel wrote fails the test instead of passing by luck."""
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
