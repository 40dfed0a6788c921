"""Builds the two native modules of flowattn with ninja.

flowattn._C     CPU and CUDA kernels on the LibTorch Stable ABI (one abi3 library for torch >= 2.10, Python >= 3.10)
flowattn._host  torch-free pybind11 helpers

Environment:
  FLOWATTN_CUDA=auto|0|1     auto (default): CUDA kernels when nvcc is found and the installed torch is a CUDA build
  FLOWATTN_CUDA_ARCHS=...    default "8.0;9.0a"
  FLOWATTN_NATIVE=0          install the pure-Python package only

A build that cannot be made (no compiler, no torch headers) leaves a working pure-Python package and says what is
missing in one line; `python -m flowattn.info` repeats it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "python" / "flowattn"
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
PYTHON_ABI_TARGET = "0x030a0000"  # Python 3.10

# Kernels named *_kernel.cpp are compiled once per instruction set and picked at run time (csrc/cpu/isa.h).
ISAS = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
CXXFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fdiagnostics-color=always", "-Wall", "-Wno-psabi"]
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-funroll-loops"]
NVCCFLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo"]


class MissingTool(RuntimeError):
    """A prerequisite of the native build that is not here; the text names it."""


def find_torch():
    """Folder of the installed torch, without importing it (build isolation hides it from import, not from disk)."""
    for entry in [sysconfig.get_path("platlib"), *sys.path]:
        if (Path(entry) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(entry) / "torch"
    raise MissingTool("no torch>=2.10 headers (install torch first)")


def torch_is_cuda_build(torch_dir):
    match = re.search(r"^cuda[^=]*= *(.+)$", (torch_dir / "version.py").read_text(), re.M)
    return bool(match) and match.group(1).strip() != "None"


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_wanted(torch_dir):
    switch = os.environ.get("FLOWATTN_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: FLOWATTN_CUDA must be auto, 0 or 1; got {switch!r}")
    if switch == "1" and not find_nvcc():
        raise SystemExit("setup.py: FLOWATTN_CUDA=1 needs nvcc; got none on PATH or in CUDA_HOME (install the toolkit)")
    return switch == "1" or (switch == "auto" and bool(find_nvcc()) and torch_is_cuda_build(torch_dir))


def cuda_archs():
    return [a.strip() for a in os.environ.get("FLOWATTN_CUDA_ARCHS", "8.0;9.0a").split(";") if a.strip()]


class Ninja:
    """A build.ninja file: compile rules, one edge per object, one link edge per module."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []
        depfile = "\n  depfile = $out.d\n  deps = gcc"
        self.lines += [
            "ninja_required_version = 1.3",
            f"rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out{depfile}\n  description = C++ $in $isa",
            f"rule nvcc\n  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out{depfile}\n  description = CUDA $in",
            "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out",
        ]

    def edge(self, rule, output, inputs, **variables):
        self.lines.append(f"build {output}: {rule} {' '.join(map(str, inputs))}")
        self.lines += [f"  {k} = {v if isinstance(v, str) else ' '.join(map(str, v))}" for k, v in variables.items()]

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = shutil.which("ninja")
        if not ninja:
            raise MissingTool("no ninja (pip install ninja)")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([ninja, "-C", str(self.folder), *jobs], check=True)


def nvcc_flags(torch_dir, archs):
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem={torch_dir / 'include'}"]
    codes = [f"-gencode=arch=compute_{a.replace('.', '')},code=sm_{a.replace('.', '')}" for a in archs]
    return NVCCFLAGS + includes + codes + [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", "-DUSE_CUDA"]


def cuda_sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class BuildNative(build_ext):
    """Builds both modules into build_lib, or into the source tree for an editable install."""

    def run(self):
        native, reason, cuda = False, "", False
        try:
            if os.environ.get("FLOWATTN_NATIVE", "1") == "0":
                raise MissingTool("FLOWATTN_NATIVE=0 was set")
            cuda = self.build_native()
            native = True
        except MissingTool as error:
            reason = str(error)
            print(f"flowattn: installed without native kernels: {reason}", file=sys.stderr, flush=True)
        package = PACKAGE if self.inplace else Path(self.build_lib) / "flowattn"
        package.mkdir(parents=True, exist_ok=True)
        archs = cuda_archs() if cuda else []
        (package / "_build.json").write_text(json.dumps({"native": native, "missing": reason, "cuda_archs": archs}))

    def build_native(self):
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not cxx or not shutil.which(cxx.split()[0]):
            raise MissingTool("no C++ compiler (install g++ 11 or later, or set CXX)")
        torch_dir = find_torch()
        cuda = cuda_wanted(torch_dir)
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}{'-cuda' if cuda else ''}"
        outputs = {name: Path(self.get_ext_fullpath(f"flowattn.{name}")).resolve() for name in ("_C", "_host")}
        ninja = Ninja(folder)
        ninja.lines += [f"cxx = {cxx}", f"nvcc = {find_nvcc()}"]
        self.add_kernels(ninja, torch_dir, cuda, folder / "_C.so")
        self.add_host(ninja, folder / "_host.so")
        ninja.run()
        for name, target in outputs.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{name}.so", target)
        return cuda

    def add_kernels(self, ninja, torch_dir, cuda, output):
        python_include = sysconfig.get_path("include")
        common = [f"-I{ROOT / 'csrc'}", f"-isystem {torch_dir / 'include'}", f"-isystem {python_include}"]
        common += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", f"-DPy_LIMITED_API={PYTHON_ABI_TARGET}"]
        objects = []
        for source in [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
            if source.stem.endswith("_kernel"):
                isas = ISAS if os.uname().machine == "x86_64" else {"baseline": []}
                for isa, flags in isas.items():
                    objects.append(f"{source.stem}.{isa}.o")
                    flags = CXXFLAGS + KERNEL_FLAGS + flags + common + [f"-DFLOWATTN_ISA={isa}"]
                    ninja.edge("cxx", objects[-1], [source], flags=flags, isa=f"[{isa}]")
            else:
                objects.append(f"{source.stem}.o")
                ninja.edge("cxx", objects[-1], [source], flags=CXXFLAGS + common)
        link = [f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed -ltorch -ltorch_cpu -lc10", "-Wl,--exclude-libs,ALL"]
        if cuda:
            for source in cuda_sources():
                objects.append(f"{source.stem}.cuda.o")
                ninja.edge("nvcc", objects[-1], [source], flags=nvcc_flags(torch_dir, cuda_archs()))
            home = Path(os.path.realpath(find_nvcc())).parents[1]
            link += [f"-L{home / folder}" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
            link += ["-Wl,-Bstatic -lcudart_static -Wl,-Bdynamic -ldl -lrt -lpthread"]
        ninja.edge("link", output.name, objects, flags=link)

    def add_host(self, ninja, output):
        try:
            import pybind11
        except ImportError as error:
            raise MissingTool("no pybind11 (pip install pybind11)") from error
        includes = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
        objects = []
        for source in sorted((ROOT / "csrc" / "host").glob("*.cpp")):
            objects.append(f"host_{source.stem}.o")
            ninja.edge("cxx", objects[-1], [source], flags=CXXFLAGS + includes)
        ninja.edge("link", output.name, objects, flags=[])


def cuda_check():
    """Compile every .cu for sm_80 and sm_90a; needs nvcc and torch's headers, no GPU."""
    if not find_nvcc():
        raise SystemExit("cuda-check: no nvcc on PATH or in CUDA_HOME")
    torch_dir = find_torch()
    ninja = Ninja(ROOT / "build" / "cuda-check")
    ninja.lines.append(f"nvcc = {find_nvcc()}")
    for arch in ("8.0", "9.0a"):
        for source in cuda_sources():
            ninja.edge("nvcc", f"{source.stem}.sm{arch}.o", [source], flags=nvcc_flags(torch_dir, [arch]))
    ninja.run()
    print(f"cuda-check: {len(cuda_sources())} files compile for sm_80 and sm_90a")


if __name__ == "__main__":
    if sys.argv[1:] == ["cuda_check"]:
        cuda_check()
    else:
        extensions = [
            Extension("flowattn._C", [], py_limited_api=True),
            Extension("flowattn._host", []),
        ]
        setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
