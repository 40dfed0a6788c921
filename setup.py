"""Builds the two native modules of flowattn with ninja.

flowattn._C     CPU and CUDA kernels on the LibTorch Stable ABI (one abi3 library for torch >= 2.10, Python >= 3.10)
flowattn._host  torch-free pybind11 helpers

Environment:
  FLOWATTN_CUDA=auto|0|1     auto (default): CUDA kernels when nvcc is found and the installed torch is a CUDA build
  FLOWATTN_CUDA_ARCHS=...    default "8.0+PTX;9.0a"; +PTX: GPUs newer than the build compile that code at first use
  FLOWATTN_NATIVE=0          install the pure-Python package only
  CXX, CUDA_HOME, MAX_JOBS   compiler, CUDA toolkit, parallel compile jobs

Where something the build needs is missing (compiler, torch headers) the result is a working pure-Python package (wheel
tag py3-none-any) and one line that names it; `python -m flowattn.info` repeats the line. Code that does not compile
is an error.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_backend import TORCH_MINIMUM, installed_torch

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "python" / "flowattn"
CSRC = Path("../../csrc")  # as the compilers see it: ninja runs in build/<name>, and a moved checkout keeps its objects
MODULES = ("_C", "_host")
STABLE_ABI_TARGET = "0x{:02x}{:02x}000000000000".format(*TORCH_MINIMUM)
PYTHON_ABI_TARGET = "0x030a0000"  # Python 3.10

# Kernels named *_kernel.cpp are compiled once per instruction set and picked at run time (csrc/cpu/isa.h).
ISAS = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
CXXFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fdiagnostics-color=always", "-Wall", "-Wno-psabi"]
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-funroll-loops"]
# No -lineinfo: it more than doubles the library. A profiler's build adds it with NVCC_APPEND_FLAGS, which nvcc reads.
NVCCFLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_cxx():
    if "CXX" in os.environ:
        cxx = os.environ["CXX"]
        return cxx if shutil.which(cxx.split()[0]) else None
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def find_ninja():
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR) / "ninja")


def find_pybind11():
    try:
        import pybind11
    except ImportError:
        return None
    return pybind11.get_include()


def find_nvcc():
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def missing():
    """What keeps the native modules from being built here, in one line, or None."""
    if os.environ.get("FLOWATTN_NATIVE", "1") == "0":
        return "FLOWATTN_NATIVE=0 was set"
    if sys.platform != "linux":
        return f"native kernels are built on Linux only; this is {sys.platform}"
    if not find_cxx():
        return "no C++ compiler (install g++ 11 or later, or set CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python headers (install python3-dev)"
    if not installed_torch():
        return "no torch>={}.{} headers (install torch first)".format(*TORCH_MINIMUM)
    for name, found in (("ninja", find_ninja()), ("pybind11", find_pybind11())):
        if not found:
            return f"no {name} (pip install {name})"
    return None


def torch_is_cuda_build():
    match = re.search(r"^cuda[^=]*= *(.+)$", (installed_torch() / "version.py").read_text(), re.M)
    return bool(match) and match.group(1).strip() != "None"


def cuda_wanted():
    switch = os.environ.get("FLOWATTN_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: FLOWATTN_CUDA must be auto, 0 or 1; got {switch!r}")
    if switch == "1" and not find_nvcc():
        raise SystemExit("setup.py: FLOWATTN_CUDA=1 needs nvcc; got none (install the CUDA toolkit, or set CUDA_HOME)")
    return switch == "1" or (switch == "auto" and bool(find_nvcc()) and torch_is_cuda_build())


def cuda_archs():
    archs = [a.strip() for a in os.environ.get("FLOWATTN_CUDA_ARCHS", "8.0+PTX;9.0a").split(";")]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\da?(\+PTX)?", arch):
            raise SystemExit(f"setup.py: FLOWATTN_CUDA_ARCHS must read like 8.0+PTX;9.0a; got {arch!r}")
    return archs


def sources(pattern):
    return sorted(CSRC / path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").glob(pattern))


def cuda_sources():
    return sources("cuda/*.cu")


class Ninja:
    """A build.ninja file: compile rules, one edge per object, one link edge per module."""

    def __init__(self, folder):
        self.folder = folder
        depfile = "\n  depfile = $out.d\n  deps = gcc"
        self.lines = [
            "ninja_required_version = 1.3",
            f"cxx = {find_cxx()}",
            f"nvcc = {find_nvcc()}",
            f"rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out{depfile}\n  description = C++ $in $isa",
            f"rule nvcc\n  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out{depfile}\n  description = CUDA $in",
            "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out",
            # nvcc knows where its own static cudart lies.
            "rule nvlink\n  command = $nvcc -shared -cudart=static $in -o $out $flags\n  description = link $out",
        ]

    def edge(self, rule, output, inputs, **variables):
        self.lines.append(f"build {output}: {rule} {' '.join(map(str, inputs))}")
        self.lines += [f"  {k} = {v if isinstance(v, str) else ' '.join(map(str, v))}" for k, v in variables.items()]

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([find_ninja(), "-C", str(self.folder), *jobs]).returncode:
            raise SystemExit("setup.py: the native build failed, see above (FLOWATTN_NATIVE=0 installs without it)")


def nvcc_flags(archs):
    includes = [f"-I{CSRC}", f"-isystem={installed_torch() / 'include'}"]
    codes = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        kinds = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        codes.append(f"'-gencode=arch=compute_{number},code=[{kinds}]'")
    return NVCCFLAGS + includes + codes + [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", "-DUSE_CUDA"]


def torch_link_flags():
    """In the form that g++ and nvcc both hand on to the linker."""
    libraries = ["--no-as-needed", f"-L{installed_torch() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return [f"-Xlinker {option}" for option in [*libraries, "--exclude-libs=ALL"]]


def record(package, archs=()):
    """Write what flowattn._native reads: whether the native modules are there, or why not."""
    reason = missing()
    if reason:
        print(f"flowattn: installed without native kernels: {reason}", file=sys.stderr, flush=True)
    package.mkdir(parents=True, exist_ok=True)
    state = {"native": not reason, "missing": reason or "", "cuda_archs": list(archs)}
    (package / "_build.json").write_text(json.dumps(state))


class Build(build):
    """Starts from an empty build_lib: what an earlier build left there would end up in the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    """Without native modules setuptools runs no build_ext, so the reason is recorded here."""

    def run(self):
        super().run()
        if missing():
            if os.environ.get("FLOWATTN_CUDA") == "1":
                raise SystemExit(f"setup.py: FLOWATTN_CUDA=1 cannot be done: {missing()}")
            record(PACKAGE if self.editable_mode else Path(self.build_lib) / "flowattn")


class BuildNative(build_ext):
    """Builds both modules into build_lib, or into the source tree for an editable install."""

    def run(self):
        if self.inplace:
            link = PACKAGE / "triton_kernels"  # lets PYTHONPATH=python serve without an installation
            if not link.is_symlink():
                link.symlink_to(Path("../../triton_kernels"))
        if missing():  # `setup.py build_ext --inplace` alone comes here
            return record(PACKAGE)
        cuda, archs = cuda_wanted(), cuda_archs()
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}{'-cuda' if cuda else ''}"
        ninja = Ninja(folder)
        self.add_kernels(ninja, cuda)
        self.add_host(ninja)
        ninja.run()
        for name in MODULES:
            target = Path(self.get_ext_fullpath(f"flowattn.{name}")).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{name}.so", f"{target}.new")
            os.replace(f"{target}.new", target)  # a process that has the old file mapped keeps it
        record(target.parent, archs if cuda and cuda_sources() else ())

    def add_kernels(self, ninja, cuda):
        includes = [f"-isystem {path}" for path in (installed_torch() / "include", sysconfig.get_path("include"))]
        common = [f"-I{CSRC}", *includes]
        common += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", f"-DPy_LIMITED_API={PYTHON_ABI_TARGET}"]
        objects = []
        for source in [CSRC / "ops.cpp", *sources("cpu/*.cpp")]:
            if source.stem.endswith("_kernel"):
                isas = ISAS if os.uname().machine == "x86_64" else {"baseline": []}
                for isa, flags in isas.items():
                    objects.append(f"{source.stem}.{isa}.o")
                    flags = CXXFLAGS + KERNEL_FLAGS + flags + common + [f"-DFLOWATTN_ISA={isa}"]
                    ninja.edge("cxx", objects[-1], [source], flags=flags, isa=f"[{isa}]")
            else:
                objects.append(f"{source.stem}.o")
                ninja.edge("cxx", objects[-1], [source], flags=CXXFLAGS + common)
        for source in cuda_sources() if cuda else []:
            objects.append(f"{source.stem}.cuda.o")
            ninja.edge("nvcc", objects[-1], [source], flags=nvcc_flags(cuda_archs()))
        ninja.edge("nvlink" if cuda else "link", "_C.so", objects, flags=torch_link_flags())

    def add_host(self, ninja):
        includes = [f"-isystem {path}" for path in (find_pybind11(), sysconfig.get_path("include"))]
        objects = []
        for source in sources("host/*.cpp"):
            objects.append(f"host_{source.stem}.o")
            ninja.edge("cxx", objects[-1], [source], flags=[*CXXFLAGS, f"-I{CSRC}", *includes])
        ninja.edge("link", "_host.so", objects, flags=[])


def cuda_check():
    """Compile every .cu for sm_80 and sm_90a and load the result; a CPU-only torch and no GPU will do."""
    if missing() or not find_nvcc():
        raise SystemExit(f"cuda-check: {missing() or 'no nvcc on PATH or in CUDA_HOME'}")
    if not cuda_sources():
        return print("cuda-check: csrc/cuda has no .cu files")
    ninja = Ninja(ROOT / "build" / "cuda-check")
    libraries = []
    for arch in ("8.0", "9.0a"):
        objects = [f"{source.stem}.sm{arch}.o" for source in cuda_sources()]
        for source, output in zip(cuda_sources(), objects):
            ninja.edge("nvcc", output, [source], flags=nvcc_flags([arch]))
        libraries.append(f"cuda.sm{arch}.so")
        ninja.edge("nvlink", libraries[-1], objects, flags=torch_link_flags())
    ninja.run()
    load = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    for library in libraries:
        subprocess.run([sys.executable, "-c", load, str(ninja.folder / library)], check=True)
    print(f"cuda-check: {len(cuda_sources())} files compile for sm_80 and sm_90a and load beside the installed torch")


if __name__ == "__main__":
    if sys.argv[1:] == ["cuda_check"]:
        cuda_check()
    else:
        extensions = [Extension("flowattn._C", [], py_limited_api=True), Extension("flowattn._host", [])]
        setup(
            ext_modules=[] if missing() else extensions,
            cmdclass={"build": Build, "build_py": BuildPython, "build_ext": BuildNative},
        )
