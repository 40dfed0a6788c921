"""The examples on the real data that pip packages ship, trained for a shorter time."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[1] / "examples"


def load(name, package):
    pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_aaren_reads_digits_row_by_row(native):
    example = load("aaren_digits", "sklearn")
    seen, unseen = example.load()
    torch.manual_seed(0)
    body = example.Aaren(example.WIDTH, example.HEADS, example.LAYERS, example.HIDDEN)
    model, _ = example.train("Aaren", body, seen, epochs=4)
    right = example.accuracy(model, unseen)
    assert right[7] > 0.7 and right[7] > right[1]  # chance: 0.1
    sizes, _ = example.stream_costs(body, lambda length: example.aaren_state(body, length), repeats=1)
    assert len(set(sizes)) == 1  # however long the stream


def test_s_mamba_forecasts_births(native):
    example = load("s_mamba_forecast", "statsmodels")
    countries, series = example.load()
    assert series.shape == (52, 192) and len(countries) == 192
    seen = example.LAST_SEEN - example.FIRST + 1
    model = example.train_model(*example.windows(series[:seen]), epochs=15)
    past, future = example.windows(series[seen - example.WINDOW :])
    with torch.no_grad():
        error = F.mse_loss(example.forecast(model, past), future)
    assert error < 0.5 * F.mse_loss(example.last_value(past), future)
