"""The benchmark harness: clocks, floors, records, tables; peers that are missing, wrong or slow; the command line."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from flowattn import bench

harness, records, tables, timing = map(bench.load, ("harness", "records", "tables", "timing"))
CPU = torch.device("cpu")
FLOORS = {"copy": 1e11, "matmul": 1e12, "dtype": "float32"}


def line(provider="flowattn", ms=1.0, **changes):
    """A record as the harness writes it; the call takes `ms` in a graph and twice that by the wall clock."""
    made = {"op": "double", "case": "B2", "dtype": "float32", "direction": "fwd", "provider": provider}
    made |= {"ours": provider == "flowattn", "status": "ok", "note": None, "peak_mem_bytes": None}
    made |= {"ms": ms, "ms_p20": ms, "ms_p80": ms, "wall_ms": 2 * ms, "wall_p20": 2 * ms, "wall_p80": 2 * ms}
    made |= {"bytes": 10**7, "flops": 0, "floor_ms": 0.1, "pct_floor": 10 / ms}
    made |= {"copy_bytes_per_s": 1e11, "matmul_flops_per_s": 1e12, "matmul_dtype": "float32"}
    made |= {"slug": "gpu", "device": "GPU", "driver": "1", "torch": "2.0", "triton": "3.0", "revision": "abc"}
    made["date"] = "2026-01-01T00:00:00Z"
    return made | changes


def double_module(**providers):
    """A bench module for y = 2 x with the given providers besides ours."""
    x = torch.arange(6.0)

    def ours(case):
        return harness.Bound(lambda x: 2 * x)

    def cases(device, quick):
        exact = {"fwd": (2 * x.double(),), "bwd": (torch.full((6,), 2.0, dtype=torch.float64),)}
        plain = {key: tuple(value.float() for value in values) for key, values in exact.items()}
        yield harness.Case("T6", (x,), torch.ones(6), exact, plain, {"fwd": 48, "bwd": 48}, {"fwd": 6}, None)

    pairs = (("flowattn", ours), *providers.items())
    return SimpleNamespace(OP="double", NOTE="", MINE=("flowattn",), PROVIDERS=pairs, cases=cases)


def measure(**providers):
    """(records by provider and direction, printed text) of a quick run."""
    said = []
    module = double_module(**providers)
    environment = records.environment(CPU)
    lines = list(harness.run(module, CPU, environment=environment, floors=FLOORS, quick=True, say=said.append))
    return {(made["provider"], made["direction"]): made for made in lines}, "\n".join(said)


@pytest.mark.parametrize("only, count", (("", 2), ("T6", 2), ("T7", 0)))
def test_some_of_the_cases(only, count):
    options = {"environment": records.environment(CPU), "floors": FLOORS, "quick": True, "say": lambda text: None}
    assert len(list(harness.run(double_module(), CPU, only=only, **options))) == count


def test_summary_is_median_and_percentiles():
    assert timing.summarise([5, 1, 2, 4, 3, 6, 7, 8, 9, 10, 11]) == (6, 3, 9)


def test_floor_is_the_slower_of_copy_and_matmul():
    assert timing.floor_ms(1e9, 1e9, FLOORS) == pytest.approx(10.0)
    assert timing.floor_ms(1e6, 1e12, FLOORS) == pytest.approx(1000.0)


def test_copies_leave_the_cache():
    assert (timing.copies(3, CPU), timing.copies(1 << 40, CPU)) == (timing.MAX_COPIES, 2)
    assert (timing.copies(timing.CPU_COLD_BYTES // 4, CPU) - 1) * timing.CPU_COLD_BYTES // 4 == timing.CPU_COLD_BYTES


def test_wall_time_walks_over_the_copies():
    calls = []
    slow = [lambda: (calls.append(0), time.sleep(0.002)), lambda: (calls.append(1), time.sleep(0.002))]
    times = timing.wall_times(slow, CPU, budget=0)
    assert calls == [0, 1, 0, 1] and 2 <= times.p20 <= times.median <= times.p80


def test_another_function_is_timed_and_is_never_the_best_peer():
    lines, text = measure(other=lambda case: harness.Bound(lambda x: 3 * x, unlike="thrice"))
    made = lines["other", "fwd"]
    assert made["status"] == "ok" and made["unlike"] and made["wall_ms"] > 0 and "(thrice)" in text
    assert "unlike" not in lines["flowattn", "fwd"]
    assert tables.compare([line(), line("other", ms=0.5, unlike=True)])[1:] == (None, None)


def test_measured_rates_are_finite():
    floors = timing.measure_floors(CPU, torch.float32, quick=True)
    assert all(1e6 < floors[rate] < 1e15 for rate in ("copy", "matmul")) and floors["dtype"] == "float32"


def test_run_measures_both_directions():
    made, said = measure()
    for direction in ("fwd", "bwd"):
        record = made["flowattn", direction]
        assert record["status"] == "ok" and record["ms"] is None and record["wall_ms"] > 0
        assert record["pct_floor"] == pytest.approx(100 * record["floor_ms"] / record["wall_ms"])
    assert made["flowattn", "fwd"]["flops"] == 6 and made["flowattn", "bwd"]["flops"] == 0
    assert "% of the floor" in said


def test_missing_and_unsupported_peers_are_skipped_with_one_line():
    def missing(case):
        import no_such_package  # noqa: F401

    def unsupported(case):
        raise harness.Unsupported("it needs two GPUs")

    made, said = measure(missing=missing, other=unsupported)
    assert {provider for provider, _ in made} == {"flowattn"}
    assert said.count("missing: skipped, not installed") == 1
    assert said.count("other: skipped, it needs two GPUs") == 1


@pytest.mark.parametrize(
    "call, direction",
    [
        (lambda x: 2 * x + 1e-3, "fwd"),
        (lambda x: x * float("nan"), "fwd"),
        (lambda x: 2 * x[:-1], "fwd"),
        (lambda x: 2 * x.detach() + 0 * x, "bwd"),
    ],
    ids=["off", "nan", "shape", "gradient"],
)
def test_wrong_peer_is_reported_and_not_timed(call, direction):
    made, said = measure(peer=lambda case: harness.Bound(call))
    record = made["peer", direction]
    assert record["status"] == "wrong" and record["wall_ms"] is None
    assert f"peer {direction}: wrong: result 0" in said


def test_failing_peer_does_not_end_the_run():
    def fails(x):
        raise RuntimeError("no kernel\nsecond line")

    made, said = measure(broken=lambda case: harness.Bound(fails), good=lambda case: harness.Bound(lambda x: x + x))
    assert made["broken", "fwd"]["status"] == "failed" and made["good", "fwd"]["status"] == "ok"
    assert made["broken", "fwd"]["note"] == "RuntimeError: no kernel"


def test_resident_bytes_count_like_inputs(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "copies", lambda count, device: seen.append(count) or 2)
    (case,) = double_module().cases(CPU, quick=False)
    harness.measure(case._replace(resident=1000), harness.Bound(lambda x: 2 * x), "fwd", CPU)
    assert seen == [1000 + 6 * 4]


def test_layout_conversions_are_outside_the_clock():
    """A peer with transposed inputs and outputs is checked in the case's layout, gradients too."""
    flipped = harness.Bound(lambda x: 2 * x, prepare=lambda x: x.flip(0), collect=lambda x: x.flip(0))
    made, _ = measure(flipped=lambda case: flipped)
    assert made["flipped", "fwd"]["status"] == made["flipped", "bwd"]["status"] == "ok"


def test_records_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWATTN_REVISION", "v1-test")
    made = [line(**records.environment(CPU)), line(slug="other-device")]
    files = records.write(made[:1], tmp_path) + records.write(made[1:], tmp_path)
    assert [path.name for path in files] == [f"cpu-{torch.get_num_threads()}threads.jsonl", "other-device.jsonl"]
    assert records.read(tmp_path) == made
    assert made[0]["revision"] == "v1-test" and made[0]["driver"] is None and made[0]["torch"] == torch.__version__
    json.loads(files[0].read_text())  # one line, one JSON value


def test_newest_run_wins_and_runs_are_not_mixed():
    old, new = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
    lines = [line(ms=9.0, date=old), line("gone", date=old), line(ms=1.0, date=new), line(ms=5.0, date=old)]
    cases = records.newest([*lines, line(op="other")], "double")["gpu"]
    assert [[(made["provider"], made["ms"]) for made in group] for group in cases.values()] == [[("flowattn", 1.0)]]


def test_table_prints_a_loss_like_a_win():
    lines = [
        line(ms=0.5),
        line("fast", ms=1.0),
        line("slow", ms=4.0),
        line(ms=3.0, direction="bwd"),
        line("fast", ms=1.5, direction="bwd"),
        line("slow", direction="bwd", status="wrong"),
    ]
    text = tables.section("double", lines, "A note.")
    forward, backward = (row for row in text.splitlines() if row.startswith("| B2"))
    assert forward == "| B2 | forward | 0.100 | 0.500 | 1.00 | 4.00 | 20.0 GB/s | 20 % | 0.50 (fast) |"
    assert backward == "| B2 | backward | 0.100 | 3.00 | 1.50 | wrong | 3.33 GB/s | 3 % | 2.00 (fast) |"
    assert "faster in 1 of 2, slower in 1." in text
    assert "**GPU**, 2026-01-01, float32, driver 1, torch 2.0, triton 3.0, revision abc" in text
    assert text.endswith("A note.")


def test_table_compares_by_a_clock_that_both_have():
    """A peer that cannot be captured is compared by wall time, which is marked: 2 x 1.0 against 4.0 ms."""
    lines = [line(ms=1.0), line("eager", wall_ms=4.0) | {"ms": None}]
    row = next(row for row in tables.section("double", lines).splitlines() if row.startswith("| B2"))
    assert row == "| B2 | forward | 0.100 | 1.00 | 4.00\\* | 10.0 GB/s | 10 % | 0.50 (eager) |"


def test_table_without_a_timed_peer_or_time():
    rows = tables.section("double", [line(), line(status="failed", case="B3")]).splitlines()
    assert [row for row in rows if row.startswith("| B")] == [
        "| B2 | forward | 0.100 | 1.00 | 10.0 GB/s | 10 % | no peer |",
        "| B3 | forward | 0.100 | failed |  |  | no peer |",
    ]


def test_rate_is_that_of_the_floor():
    assert tables.rate(line(flops=10**11)) == "100 TFLOP/s"
    assert tables.rate(line(ms=2.0, flops=10**9)) == "500 GFLOP/s"
    assert tables.rate(line(flops=10**6)) == "10.0 GB/s"


@pytest.mark.parametrize(
    "value, text", [(0.06137, "0.0614"), (4.1, "4.10"), (9.999, "10.0"), (126.4, "126"), (12345, "12300"), (0, "0.00")]
)
def test_three_significant_digits(value, text):
    assert tables.significant(value) == text


def test_readme_sections_are_replaced_and_nothing_else():
    start, end = tables.markers("double")
    text = f"before\n{start}\nstale\n{end}\nafter\n"
    filled = tables.fill(text, [line()], {"double": "A note."})
    assert filled == f"before\n{start}\n{tables.section('double', [line()], 'A note.')}\n{end}\nafter\n"
    assert tables.fill(filled, [line()], {"double": "A note."}) == filled
    assert "No measurement has been recorded yet." in tables.fill(text, [], {})
    with pytest.raises(ValueError, match="needs a pair of markers"):
        tables.fill("plain", [], {})
    with pytest.raises(ValueError, match="must be closed"):
        tables.fill(start, [], {})


def test_check_finds_a_stale_table(tmp_path, capsys):
    start, end = tables.markers("packing")
    path = tmp_path / "README.md"
    path.write_text(f"{start}\nstale\n{end}\n")
    assert not bench.readme(path, check=True) and "stale" in path.read_text()
    assert not bench.readme(path, check=False) and "stale" not in path.read_text()
    assert bench.readme(path, check=True)
    assert "wrote the tables" in capsys.readouterr().out


@pytest.mark.skipif(not (records.ROOT / "README.md").exists(), reason="no README.md in this tree")
def test_readme_tables_are_those_of_the_results():
    assert bench.main(["--check"]) == 0


def test_plot_draws_bars(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [line(), line("peer", ms=2.0), line(direction="bwd") | {"ms": None}, line("off", status="wrong")]
    (path,) = bench.load("plots").draw("double", lines, tmp_path)
    assert path.name == "double-gpu.png" and path.read_bytes().startswith(b"\x89PNG")


def test_quick_run_checks_every_provider():
    """The command as it is typed, without Triton's interpreter, which conftest switches on and which takes a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # idle threads of other processes would be waited for in every tiny call
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "flowattn.bench", "--quick", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "flowattn bwd: wall" in printed and "SDPA loop over sequences bwd: wall" in printed
    assert "wrong" not in printed and "failed" not in printed


def test_unknown_op_missing_checkout_and_missing_readme(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["no_such_op"])
    assert "op must be one of " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["packing", "--quick", "--device", "cpu", "--case", "no such case"])
    assert "case must be part of the name of a case of packing; got 'no such case'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="needs a source checkout"):
        bench.find_checkout([tmp_path])
    with pytest.raises(SystemExit, match="needs .*README.md"):
        bench.readme(tmp_path / "README.md", check=True)
