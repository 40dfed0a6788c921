"""Loads the two native modules and remembers why one of them is missing."""

import importlib
import json
from pathlib import Path

import torch

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


def _arch(text):
    """(compute capability, kind) of one entry of FLOWATTN_CUDA_ARCHS: "8.0", "8.0+PTX", "9.0a"."""
    kind = "ptx" if text.endswith("+PTX") else "exact" if text.endswith("a") else "major"
    return tuple(map(int, text.removesuffix("+PTX").rstrip("a").split("."))), kind


def _runs(arch, capability):
    """Whether code built for `arch` runs on this compute capability."""
    built, kind = arch
    if kind == "exact":
        return capability == built
    return capability >= built and (kind == "ptx" or capability[0] == built[0])


BUILD = _read_build()  # {"native": bool, "missing": str, "cuda_archs": [str]}
_module, MISSING = _load("_C")
LOADED = _module is not None
CUDA_BUILT = LOADED and bool(BUILD["cuda_archs"])
_ARCHS = [_arch(text) for text in BUILD["cuda_archs"]]
_capabilities = {}
host, HOST_MISSING = _load("_host")  # without it numpy fallbacks serve


def capability(device):
    """(major, minor) of a CUDA device; remembered, because every call asks."""
    if torch.compiler.is_compiling():  # torch.compile folds the properties to a constant, but not the capability
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.minor
    if device.index not in _capabilities:
        _capabilities[device.index] = torch.cuda.get_device_capability(device)
    return _capabilities[device.index]


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
    major, minor = capability(tensor.device)
    if not any(_runs(arch, (major, minor)) for arch in _ARCHS):
        built = ", ".join(BUILD["cuda_archs"])
        hint = f"rebuild with FLOWATTN_CUDA_ARCHS={major}.{minor}"
        return f"no kernel for compute capability {major}.{minor}; built for {built} ({hint})"
    return None
