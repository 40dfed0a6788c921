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
        groups = [group for group in cases.values() if any(line["status"] == "ok" for line in group)]
        if not groups:
            continue
        columns = max(len({line["direction"] for line in sum(groups, [])}), 1)
        rows = math.ceil(len(groups) / columns)
        bars = max(len(group) for group in groups)
        size = (6.4 * columns, (0.34 * bars + 0.9) * rows + 0.6)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(groups) :]:
            axes.axis("off")
        for axes, group in zip(grid.flat, groups):
            _bars(axes, group)
        newest = max(sum(groups, []), key=lambda line: line["date"])
        title = f"{op}, {newest['device']}, {newest['date'][:10]} (milliseconds, shorter is better)"
        figure.suptitle(title, fontsize=11)
        paths.append(folder / f"{op}-{slug}.png")
        figure.savefig(paths[-1], dpi=140)
        plt.close(figure)
    return paths


def _bars(axes, group):
    group = [line for line in group if line["status"] == "ok"]
    times = [tables.clock(line) for line in group]
    names = [line["provider"] + (" (wall)" if line["ms"] is None else "") for line in group]
    bars = axes.barh(names, times, color=[OURS if line["ours"] else PEER for line in group], height=0.72)
    axes.bar_label(bars, [tables.significant(time) for time in times], padding=3, fontsize=8)
    axes.axvline(group[0]["floor_ms"], color=FLOOR, linewidth=1.2, linestyle="--", label="floor")
    axes.set_title(f"{group[0]['case']}, {tables.DIRECTIONS[group[0]['direction']]}", fontsize=9, loc="left")
    axes.set_xlim(0, 1.15 * max(times))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
