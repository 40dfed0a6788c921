"""One picture for each op and device: bars of every provider, the floor as a line, from the recorded lines."""

import math

from benchmarks import records, tables

OURS, PEER, FLOOR = "#1f6f8b", "#c3ccd3", "#c8553d"
FOLDER = records.ROOT / "benchmarks" / "plots"


def draw(op, lines, folder=FOLDER):
    """Write <folder>/<op>-<slug>.png for each device; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for slug, cases in records.newest(lines, op).items():
        groups = [[line for line in group if line["status"] == "ok"] for group in cases.values()]
        groups = [group for group in groups if group]
        if not groups:
            continue
        newest = max(sum(groups, []), key=lambda line: line["date"])
        columns = len({group[0]["direction"] for group in groups})
        columns = 3 if columns == 1 and len(groups) > 2 else columns  # forward only: three cases a row
        rows = math.ceil(len(groups) / columns)
        height = 0.7 + rows * (0.7 + 0.3 * max(map(len, groups)))  # inches
        figure, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, height), squeeze=False, layout="constrained")
        for axes in grid.flat[len(groups) :]:
            axes.axis("off")
        for axes, group in zip(grid.flat, groups):
            floor = _bars(axes, group)
        clock = "CUDA-graph time" if any(line["ms"] is not None for line in sum(groups, [])) else "wall time"
        figure.suptitle(f"{op}, {newest['device']}, {newest['date'][:10]}\nmilliseconds, {clock}, shorter is better")
        figure.legend([floor], ["floor"], loc="upper right", frameon=False)
        paths.append(folder / f"{op}-{slug}.png")
        figure.savefig(paths[-1], dpi=140)
        plt.close(figure)
    return paths


def _bars(axes, group):
    """The bars of one case and pass; returns the floor's line for the legend."""
    times = [tables.clock(line) for line in group]
    mixed = any(line["ms"] is not None for line in group)
    names = [line["provider"] + (" (wall)" if mixed and line["ms"] is None else "") for line in group]
    bars = axes.barh(names, times, color=[OURS if line["ours"] else PEER for line in group], height=0.72)
    axes.bar_label(bars, [tables.significant(time) for time in times], padding=3, fontsize=8)
    axes.set_title(f"{group[0]['case']}, {tables.DIRECTIONS[group[0]['direction']]}", fontsize=9, loc="left")
    axes.set_xlim(0, 1.15 * max(*times, group[0]["floor_ms"]))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes.axvline(group[0]["floor_ms"], color=FLOOR, linewidth=1.2, linestyle="--")
