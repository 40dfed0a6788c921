"""Microbenchmarks with peers and floors, from the command line: python -m flowattn.bench [op ...] [options].

The benchmarks live in the `benchmarks` folder of a source checkout, beside their results; they are not installed. They
are looked for beside this package (a checkout or an editable install), then in the current folder (a checkout whose
package was installed normally).
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch


def find_checkout(places=None):
    """Folder of the source checkout that holds benchmarks/harness.py; exits with one line if there is none."""
    places = [Path(__file__).resolve().parents[2], Path.cwd()] if places is None else places
    for place in places:
        if (place / "benchmarks" / "harness.py").is_file():
            return place
    raise SystemExit(
        f"bench: needs a source checkout; got no benchmarks folder in {' or '.join(map(str, places))} "
        "(clone the repository and run this from its root)"
    )


def load(name):
    """A module of the benchmarks folder."""
    root = str(find_checkout())
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"benchmarks.{name}")


def ops():
    """Names of the ops that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in (find_checkout() / "benchmarks").glob("bench_*.py"))


def measure(names, device, quick, seconds=None, only=""):
    """Run the benchmarks of `names`, each clock for `seconds`; yield their records, which share date and floors.

    only: part of the names of the cases to measure.
    """
    harness, timing, records = load("harness"), load("timing"), load("records")
    environment = records.environment(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    floors = timing.measure_floors(device, dtype, quick)
    rates = f"copy {floors['copy'] * 1e-9:.4g} GB/s, matmul {floors['matmul'] * 1e-12:.4g} TFLOP/s"
    print(f"{environment['device']}: {rates}")
    for name in names:
        options = {"environment": environment, "floors": floors, "quick": quick, "only": only}
        yield from harness.run(load(f"bench_{name}"), device, **options, seconds=seconds or harness.SECONDS)


def readme(path, check):
    """Regenerate the tables in `path`, or only compare; True if they were current already."""
    if not path.exists():
        raise SystemExit(f"bench: needs {path} to hold the tables; got no such file")
    before = path.read_text()
    notes = {op: load(f"bench_{op}").NOTE for op in ops()}
    after = load("tables").fill(before, load("records").read(), notes)
    if before != after and not check:
        path.write_text(after)
        print(f"bench: wrote the tables of {path.name}")
    return before == after


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m flowattn.bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"all by default; {', '.join(ops())}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for flag, text in (
        ("--quick", "tiny cases and short clocks, to see that it runs; nothing is recorded"),
        ("--plot", "draw the recorded results into benchmarks/plots; measures nothing"),
        ("--readme", "regenerate the tables of README.md from the recorded results; measures nothing"),
        ("--check", "exit 1 if the tables of README.md are not those of the recorded results; measures nothing"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--seconds", type=float, help="how long each clock takes samples; 0.2 by default")
    parser.add_argument("--case", default="", help="measure only cases whose names contain this")
    options = parser.parse_args(arguments)
    names = options.op or ops()
    for name in names:
        if name not in ops():
            parser.error(f"op must be one of {', '.join(ops())}; got {name!r}")
    records = load("records")
    if not (options.plot or options.readme or options.check):
        broken, lines = False, 0
        for line in measure(names, torch.device(options.device), options.quick, options.seconds, options.case):
            lines += 1
            broken |= line["ours"] and line["status"] != "ok"
            if not options.quick:
                records.write([line])  # at once, so that an interrupted run keeps what it measured
        if options.case and not lines:
            parser.error(f"case must be part of the name of a case of {', '.join(names)}; got {options.case!r}")
        return int(broken)
    if options.plot:
        for name in names:
            for path in load("plots").draw(name, records.read()):
                print(f"bench: drew {path.relative_to(records.ROOT)}")
    if options.readme or options.check:
        current = readme(records.ROOT / "README.md", options.check)
        if options.check and not current:
            print("bench: the README's tables are not those of the results (run python -m flowattn.bench --readme)")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
