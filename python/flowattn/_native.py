"""Loads the two native modules and remembers why one of them is missing."""

import json
from pathlib import Path

_FOLDER = Path(__file__).parent


def _read_build():
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except OSError:
        return {"native": False, "missing": "the package was not built (pip install it)", "cuda_archs": []}


def _load():
    """(is _C loaded, why not)."""
    if not BUILD["native"]:
        return False, BUILD["missing"]
    try:
        from flowattn import _C  # noqa: F401
    except ImportError as error:
        return False, f"flowattn._C did not load: {error}"
    return True, ""


BUILD = _read_build()  # {"native": bool, "missing": str, "cuda_archs": [str]}
LOADED, MISSING = _load()
CUDA_BUILT = LOADED and bool(BUILD["cuda_archs"])

try:
    from flowattn import _host as host
except ImportError:
    host = None  # numpy fallbacks serve


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
