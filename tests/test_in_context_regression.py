"""The example on in-context regression: its four identities in float64, and that training finds the third."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "in_context_regression.py"
spec = importlib.util.spec_from_file_location("in_context_regression", PATH)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("name", ("one gradient step", "least squares", "optimum of training", "mesa-optimiser"))
def test_identities(name, seed):
    got, expected = example.identities(seed)[name]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_training_reaches_the_optimal_weights(capsys):
    covariance, pairs = torch.tensor([1.0, 0.5]), 20
    weights, _ = example.train(600, covariance, pairs, batch=128)
    generator = torch.Generator().manual_seed(1)
    x, y, queries, _ = example.prompts(500, pairs, covariance, generator, torch.float32)
    trained, (optimal, _) = example.layer(weights, x, y, queries), example.optimum(x, y, queries, covariance)
    assert (trained - optimal).square().mean() < 0.01 * optimal.square().mean()


def test_it_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "plot.png"
    monkeypatch.setattr("sys.argv", ["in_context_regression.py", "--steps", "20", "--out", str(target)])
    example.main()
    assert target.stat().st_size > 10000 and "least squares" in capsys.readouterr().out
