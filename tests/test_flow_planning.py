"""Calibration, the cost model, the choice of a method, and the ranking metrics."""

import pytest
import torch
from flow_oracle import tarflow_params, toy

import flowattn as fa
from flowattn.ops import flow_planning
from flowattn.ops.flow_inverse import BlockPlan
from flowattn.ops.flow_planning import Calibration, Measured, Rates

F64 = torch.float64


def test_metrics_are_the_published_ones():
    model = toy(0.05, F64)
    x, state = torch.randn(4, 16, 8, dtype=F64), model.state_dict()
    block, order = model.blocks[1], torch.arange(15, -1, -1)
    u = x[:, order]
    alpha, mu = (torch.stack(p) for p in zip(*(tarflow_params(s, state, 1, 2, 2) for s in u)))
    z = (u - mu) * torch.exp(-alpha)
    options = {"permutation": "reverse", "cond": block.condition(None, 4)}
    errors = {}
    for guess in ("z", "zero"):
        v = z.clone() if guess == "z" else torch.zeros_like(z)
        v[:, 0] = u[:, 0]
        a, m = (torch.stack(p) for p in zip(*(tarflow_params(s, state, 1, 2, 2) for s in v)))
        error = z * torch.exp(a) + m - u
        errors[guess] = torch.linalg.matrix_norm(error.mean(0), 2).item()
        assert flow_planning.igm(block, x, guess, **options) == pytest.approx(errors[guess], rel=1e-9)
        each = flow_planning.igm(block, x, guess, mean_of_norms=True, **options)
        assert each == pytest.approx(torch.linalg.matrix_norm(error, 2).mean().item(), rel=1e-9)
    weight = state["blocks.1.proj_out.weight"]
    norms = [torch.linalg.matrix_norm(w, 2).item() for w in weight.chunk(2)]
    expected = torch.linalg.matrix_norm((u * torch.exp(-alpha)).mean(0), 2).item() * norms[0] + norms[1]
    assert flow_planning.crm(block, x, **options) == pytest.approx(expected, rel=1e-9)
    assert flow_planning.shares([1.0, 3.0]) == [25.0, 75.0]


@torch.no_grad()
def test_calibration_measures_what_runs():
    model = toy(0.03)
    x = torch.randn(4, 16, 8)
    found, z = flow_planning.calibrate(model.blocks[0], x, cond=model.blocks[0].condition(None, 4))
    expected, _ = fa.flow_forward(x, model.blocks[0], cond=model.blocks[0].condition(None, 4))
    assert torch.equal(z, expected) and found.measured[0].plan.method == "jacobi"
    for measured in found.measured:
        options = {"plan": measured.plan, "cond": model.blocks[0].condition(None, 4), "return_info": True}
        _, info = fa.flow_inverse(z, model.blocks[0], **options)
        assert measured.sweeps == info.sweeps.max() and measured.rows == info.rows.double().mean()
    assert measured.plan.guess == min(found.igm, key=found.igm.get)


def test_plan_weighs_sweeps_against_bytes_and_arithmetic():
    """Bound by bytes few sweeps win; bound by arithmetic every row counts; launches count against many sweeps."""
    block = toy(0.03).blocks[0]
    few = Measured(BlockPlan("jacobi"), 4, 60.0)
    small = Measured(BlockPlan("frontier", window=4), 8, 24.0)
    found = Calibration(16, (few, small), 1.0, {})

    def method(batch=1, **rates):
        return flow_planning.plan(
            block, found, Rates(**{"bytes": 1e9, "flops": 1e15, "launch": 0.0, **rates}), batch
        ).method

    assert method() == "jacobi"
    assert method(flops=1e9, bytes=1e15) == "sequential"
    assert method(flops=2.5e9) == "frontier"
    assert method(launch=1.0) == "sequential"
    assert method(flops=2.5e9, batch=64) == "sequential"
    assert flow_planning.plan(block, found, Rates(1e9, 1e15, 0.0), 1) == BlockPlan("jacobi")


def test_cost_is_the_formula():
    block = toy(0.03, layers_per_block=2).blocks[0]
    weights = sum(p.numel() for name, p in block.named_parameters() if not name.endswith("_embed"))
    bytes_only, flops_only = Rates(1.0, float("inf"), 0.0), Rates(float("inf"), 1.0, 0.0)
    read = flow_planning.cost(block, bytes_only, 3, 30, 2, 16, 0)
    assert read == 3 * 4 * (weights + 2 * 2 * 2 * 64 * 8)
    assert flow_planning.cost(block, flops_only, 3, 30, 2, 16, 0) == 2 * 30 * (2 * weights + 4 * 2 * 64 * 8)
    assert flow_planning.cost(block, Rates(float("inf"), float("inf"), 0.5), 3, 30, 2, 16, 3) == 1.5


def test_a_model_remembers_its_plans():
    model = toy(0.01)
    x = torch.randn(2, 2, 8, 8)
    z = model(x)[0].detach()
    with torch.no_grad():
        expected = model.inverse(z)
        found = model.calibrate(x)
        assert len(found) == len(model.plans) == 2
        model.plans = [BlockPlan("frontier", window=8), BlockPlan("gs_jacobi", 2)]
        got, info = model.inverse(z, return_info=True)
    assert info.method == ("frontier", "gs_jacobi")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_rates_are_measured_once():
    block, z = toy(0.01).blocks[0], torch.randn(1, 16, 8)
    rates = flow_planning.measure_rates(block, z)
    assert all(value > 0 for value in rates) and flow_planning.measure_rates(block, z) is rates
