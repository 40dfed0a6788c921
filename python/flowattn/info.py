"""What is installed here and which backend each op would use: `python -m flowattn.info`, the text for a bug report."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import flowattn
from flowattn import _native, dispatch

SWITCHES = ("FLOWATTN_BACKEND", "FLOWATTN_STRICT", "TRITON_INTERPRET")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def _gpus():
    """One line a GPU, as the driver reports it: also where torch is a CPU build."""
    if not shutil.which("nvidia-smi"):
        return ["none (no nvidia-smi)"]
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    if result.returncode:
        return [f"none (nvidia-smi: {(result.stdout + result.stderr).strip().splitlines()[0]})"]
    lines = []
    for line in result.stdout.strip().splitlines():
        name, capability, driver = line.split(", ")
        lines.append(f"{name}, compute capability {capability}, driver {driver}")
    return lines if torch.cuda.is_available() else [*lines, "not usable: torch sees no GPU"]


def _native_lines():
    if _native.LOADED and _native.host:
        archs = ", ".join(_native.BUILD["cuda_archs"])
        yield "native", f"yes, built by C++ compiler {_native.host.compiler()}"
        yield "  C++", f"{_native.host.cpu_isa()} kernels on this CPU"
        yield "  CUDA", f"built for {archs}" if archs else "no CUDA kernels (rebuild with FLOWATTN_CUDA=1)"
    else:
        yield "native", f"no: {_native.MISSING or _native.HOST_MISSING}"


def report():
    """The whole text."""
    lines = [("flowattn", f"{flowattn.__version__} in {_native.FOLDER}")]
    lines += [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [("torch", torch.__version__), ("  CUDA", torch.version.cuda or "CPU build")]
    lines += [(package, _version(package)) for package in ("triton", "transformers", "numpy")]
    lines += [("cpu", _cpu()), *(("gpu", line) for line in _gpus()), *_native_lines()]
    lines += [("switch", f"{name}={os.environ[name]}") for name in SWITCHES if name in os.environ]
    text = [f"{name:<13} {value}" for name, value in lines]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for table in dispatch.tables().values():
            text += ["", f"{table.op} on {device}", table.describe(table.prepare(*table.probe(device)))]
    return "\n".join(text)


if __name__ == "__main__":
    print(report())
