"""Loads the two native modules and remembers why one of them is missing."""

import importlib
import json
from pathlib import Path

FOLDER = Path(__file__).parent


def _read_build():
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except OSError:
        return {"native": False, "missing": "the package was not built (pip install . in its folder)", "cuda_archs": []}


def _load(name):
    """(module or None, why not)."""
    if not BUILD["native"]:
        return None, BUILD["missing"]
    try:
        return importlib.import_module(f"flowattn.{name}"), ""
    except ImportError as error:
        return None, f"flowattn.{name} did not load: {error}"


BUILD = _read_build()  # {"native": bool, "missing": str, "cuda_archs": [str]}
_module, MISSING = _load("_C")
LOADED = _module is not None
CUDA_BUILT = LOADED and bool(BUILD["cuda_archs"])
host, HOST_MISSING = _load("_host")  # without it numpy fallbacks serve


def refuse_cpu(tensor):
    """Reason why the C++ CPU kernels cannot take this tensor, or None."""
    if not LOADED:
        return f"native library missing: {MISSING}"
    if tensor.device.type != "cpu":
        return f"needs CPU tensors; got {tensor.device.type}"
    return None


def refuse_cuda(tensor):
    """Reason why the CUDA C++ kernels cannot take this tensor, or None."""
    if tensor.device.type != "cuda":
        return f"needs CUDA tensors; got {tensor.device.type}"
    if not LOADED:
        return f"native library missing: {MISSING}"
    if not CUDA_BUILT:
        return "built without CUDA kernels (rebuild with FLOWATTN_CUDA=1)"
    return None
