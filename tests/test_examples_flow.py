"""The spectral solver of examples/ifactformer_flow.py against flows that are known in closed form."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parents[1] / "examples" / "ifactformer_flow.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ifactformer_flow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_taylor_green_vortices_decay_as_known(example):
    """u = sin x cos y, v = -cos x sin y keeps its shape and decays with exp(-2 viscosity t)."""
    points = 16
    solver = example.Flow(points)
    x = np.arange(points) * 2 * np.pi / points
    u, v = np.sin(x)[:, None] * np.cos(x), -np.cos(x)[:, None] * np.sin(x)
    vorticity = solver.vorticity(u, v)
    np.testing.assert_allclose(vorticity, 2 * np.sin(x)[:, None] * np.sin(x), atol=1e-12)
    w = np.fft.rfft2(vorticity)
    for _ in range(10):
        w = solver.step(w, example.STEP)
    decay = np.exp(-2 * example.VISCOSITY * 10 * example.STEP)
    for got, expected in zip(solver.velocity(w), (u, v)):
        np.testing.assert_allclose(got, expected * decay, atol=1e-10)


def test_energy_changes_by_viscosity_alone(example):
    solver = example.Flow(32)
    w = solver.start(2, np.random.default_rng(0))

    def energy(w):
        return sum((c**2).mean((1, 2)) for c in solver.velocity(w))

    np.testing.assert_allclose(energy(w), 1.0, rtol=1e-12)
    dissipated = 2 * example.VISCOSITY * (np.fft.irfft2(w) ** 2).mean((1, 2))
    dt = 1e-3
    change = (energy(solver.step(w, dt)) - energy(w)) / dt
    np.testing.assert_allclose(change, -dissipated, rtol=2e-2)
