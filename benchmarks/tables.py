"""README tables from the recorded lines: deterministic, a loss in the same words as a win."""

import re
from decimal import Decimal

from benchmarks import records

DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
WALL = "\\*"  # marks a wall time where the column otherwise holds graph times


def clock(line, other=None):
    """Milliseconds of a line by the best clock it has, or by the best one that `other` has too; None if not timed."""
    if line["status"] != "ok":
        return None
    wall = line["ms"] is None or (other is not None and other["ms"] is None)
    return line["wall_ms"] if wall else line["ms"]


def compare(group):
    """(our line, ratio of our time to the best peer's, that peer's line); ratio and peer None without a timed peer."""
    ours = next((line for line in group if line["ours"]), None)
    if ours is None or ours["status"] != "ok":
        return ours, None, None
    peers = [line for line in group if not line["ours"] and line["status"] == "ok" and not line.get("unlike")]
    ratios = [(clock(ours, peer) / clock(peer, ours), peer) for peer in peers]
    return ours, *max(ratios, key=lambda pair: pair[0], default=(None, None))


def significant(value, digits=3):
    """A number with `digits` significant digits and no exponent: 0.0614, 4.10, 126."""
    return format(Decimal(f"{value:.{digits - 1}e}"), "f")


def rate(line):
    """What the op reached: FLOP/s where arithmetic sets its floor, else GB/s."""
    seconds = clock(line) * 1e-3
    if line["flops"] / line["matmul_flops_per_s"] > line["bytes"] / line["copy_bytes_per_s"]:
        flops = line["flops"] / seconds * 1e-12
        return f"{significant(flops)} TFLOP/s" if flops >= 1 else f"{significant(1000 * flops)} GFLOP/s"
    return f"{significant(line['bytes'] / seconds * 1e-9)} GB/s"


def section(op, lines, note=""):
    """The markdown between an op's markers: for each device a line on the run, a table and the score; then the note."""
    devices = records.newest(lines, op)
    if not devices:
        return "No measurement has been recorded yet."
    parts = []
    for slug, cases in devices.items():
        parts.append(_device_table(list(cases.values())))
        plot = f"benchmarks/plots/{op}-{slug}.png"
        if (records.ROOT / plot).exists():
            parts.append(f"![{op}, {slug}]({plot})")
    return "\n\n".join(parts + [note] if note else parts)


def _device_table(groups):
    every = [line for group in groups for line in group]
    providers = list(dict.fromkeys(line["provider"] for line in every))
    timed_by_graph = any(line["ms"] is not None for line in every)
    header = ["case", "pass", "floor", *providers, "rate", "of floor", "ours / best peer"]
    rows = [_row(group, providers, timed_by_graph) for group in groups]
    if len(_float_dtypes(every)) > 1:
        for row, group in zip(rows, groups):
            row[0] += f" {group[0]['dtype']}"
    rule = ["---"] * 2 + ["---:"] * (len(header) - 3) + ["---"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
    return "\n\n".join([_heading(every, timed_by_graph), table, _score(groups)])


def _float_dtypes(lines):
    """The dtypes of the lines; a mask's says nothing."""
    return list(dict.fromkeys(line["dtype"] for line in lines if "float" in line["dtype"]))


def _heading(lines, timed_by_graph):
    newest = max(lines, key=lambda line: line["date"])

    def each(key):
        return ", ".join(dict.fromkeys(str(line[key]) for line in lines if line[key] is not None))

    dates = ", ".join(dict.fromkeys(line["date"][:10] for line in lines))
    versions = [f"{name} {each(name)}" for name in ("driver", "torch", "triton", "revision") if each(name)]
    copy, matmul = significant(newest["copy_bytes_per_s"] * 1e-9), significant(newest["matmul_flops_per_s"] * 1e-12)
    floors = f"copy {copy} GB/s, {newest['matmul_dtype']} matmul {matmul} TFLOP/s"
    how = f"CUDA-graph time; {WALL} = wall time, the call cannot be captured" if timed_by_graph else "wall time"
    about = ", ".join([f"**{newest['device']}**", dates, *_float_dtypes(lines), *versions])
    return f"{about}. Measured floors: {floors}. Milliseconds, median {how}."


def _row(group, providers, timed_by_graph):
    first = group[0]
    ours, ratio, peer = compare(group)
    by_name = {line["provider"]: line for line in group}
    cells = [first["case"], DIRECTIONS[first["direction"]], significant(first["floor_ms"])]
    cells += [_cell(by_name.get(name), timed_by_graph) for name in providers]
    timed = ours is not None and ours["status"] == "ok"
    cells += [rate(ours), f"{ours['pct_floor']:.0f} %" if ours["pct_floor"] >= 1 else "<1 %"] if timed else ["", ""]
    cells.append(f"{ratio:.2f} ({peer['provider']})" if peer else "no peer")
    return cells


def _cell(line, timed_by_graph):
    if line is None:
        return ""
    if line["status"] != "ok":
        return line["status"]
    return significant(clock(line)) + (WALL if timed_by_graph and line["ms"] is None else "")


def _score(groups):
    ratios = [ratio for _, ratio, _ in map(compare, groups) if ratio is not None]
    faster, slower = sum(ratio < 1 for ratio in ratios), sum(ratio > 1 for ratio in ratios)
    return f"Against the best peer of each row: faster in {faster} of {len(ratios)}, slower in {slower}."


def markers(op):
    return f"<!-- bench:{op} -->", f"<!-- /bench:{op} -->"


def fill(text, lines, notes):
    """`text` with what stands between every pair of markers regenerated from `lines`; `notes`: op -> its note.

    Raises ValueError for text without any markers, and for one that is opened and never closed.
    """
    ops = re.findall(r"<!-- bench:(\w+) -->", text)
    if not ops:
        raise ValueError("readme: needs a pair of markers; got none (add <!-- bench:OP --> and <!-- /bench:OP -->)")
    for op in ops:
        start, end = markers(op)
        if end not in text:
            raise ValueError(f"readme: every marker must be closed; got {start} alone (add {end})")
        head, rest = text.split(start, 1)
        text = f"{head}{start}\n{section(op, lines, notes.get(op, ''))}\n{end}{rest.split(end, 1)[1]}"
    return text
