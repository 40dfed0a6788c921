"""One JSON line per measurement: what is written, where, and which lines are the newest."""

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def revision():
    """FLOWATTN_REVISION if set, else `git describe`, else "unknown"."""
    if os.environ.get("FLOWATTN_REVISION"):
        return os.environ["FLOWATTN_REVISION"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device):
    """What every line of one run shares: slug, device, driver, torch, triton, revision, date."""
    name = timing.device_name(device)
    slug = f"cpu-{torch.get_num_threads()}threads" if device.type == "cpu" else name
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-"),
        "device": name,
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write(lines, folder=RESULTS):
    """Append each record to <folder>/<slug>.jsonl; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for line in lines:
        path = folder / f"{line['slug']}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if path not in files:
            files.append(path)
    return files


def read(folder=RESULTS):
    """Every record of every file, files in name order, lines as written."""
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def newest(lines, op):
    """{slug: {(case, dtype, direction): records of the last run that measured it}}, in the order they were written.

    A run is known by its date. Providers are never mixed across runs: a ratio of two runs says nothing.
    """
    devices = {}
    for line in lines:
        if line["op"] == op:
            cases = devices.setdefault(line["slug"], {})
            group = cases.setdefault((line["case"], line["dtype"], line["direction"]), [])
            if group and group[0]["date"] > line["date"]:
                continue
            if group and group[0]["date"] < line["date"]:
                group.clear()
            group.append(line)
    return dict(sorted(devices.items()))
