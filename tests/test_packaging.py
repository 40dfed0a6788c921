"""What an installation holds: wheels, editable installs, installs without a compiler, switches, symbols, versions."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import flowattn as fa

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]
VERSION = fa.__version__
RUN_OPS = """
import torch, flowattn as fa
mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
plan = fa.pack_plan(mask)
x = fa.pack(torch.ones(2, 3, 4), plan)[:, None]
out = fa.varlen_attention(x, x, x, plan.cu_seqlens)
assert torch.equal(fa.unpack(out[:, 0], plan), mask[..., None].float().expand(2, 3, 4))
print(fa.__file__)
print(fa.explain("varlen_attention", x, x, x, plan.cu_seqlens))
"""


def run(*command, cwd=ROOT, check=True, **environment):
    """Run in a clean environment; a variable given as None is removed."""
    own = ("FLOWATTN_", "TRITON_", "PYTHONPATH", "CXX")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)} | environment
    env = {k: str(v) for k, v in env.items() if v is not None}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, text=True, capture_output=True)
    assert result.returncode == 0 or not check, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def pip(*command, **options):
    return run(sys.executable, "-m", "pip", *command, **options)


def build_wheel(folder, *options, **environment):
    """The text pip printed and the path of the wheel of this checkout."""
    result = pip("wheel", ROOT, "-v", "--no-deps", *options, "-w", folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return result.stdout + result.stderr, wheel


def new_environment(folder):
    """Python of a new virtual environment that sees the torch installed here, and nothing of this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{SITE}\n")
    return folder / "bin" / "python"


def install(python, *options, **environment):
    pip("--python", python, "install", "--no-deps", "--no-index", *options, **environment)


def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if build_script().missing():
        pytest.skip(f"no native build here: {build_script().missing()}")
    return build_wheel(tmp_path_factory.mktemp("wheel"), "--no-build-isolation")[1]


def build_script():
    """setup.py as a module: its functions, without a build."""
    spec = importlib.util.spec_from_file_location("flowattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT))
    return module


def test_wheel_holds_one_package_with_both_native_modules(wheel):
    files = names(wheel)
    assert {name.split("/")[0] for name in files} == {"flowattn", f"flowattn-{VERSION}.dist-info"}
    assert {"flowattn/_C.abi3.so", "flowattn/_build.json", "flowattn/triton_kernels/__init__.py"} <= set(files)
    assert [name for name in files if re.fullmatch(r"flowattn/_host\.cpython-\d+-.*\.so", name)]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"flowattn-{re.escape(VERSION)}-{tag}-{tag}-linux_\w+\.whl", wheel.name)


def test_wheel_serves_outside_the_checkout(wheel, tmp_path):
    python = new_environment(tmp_path / "env")
    install(python, wheel)
    where, *table, name = run(python, "-c", RUN_OPS, cwd=tmp_path).stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "env")
    assert name == "cpu"
    run(python, "-c", "import flowattn.triton_kernels", cwd=tmp_path)


def test_library_uses_the_stable_abi_only(wheel, tmp_path):
    """One _C for torch >= 2.10 and Python >= 3.10: C shims of torch, the limited C API, no C++ of either."""
    library = zipfile.ZipFile(wheel).extract("flowattn/_C.abi3.so", tmp_path)
    lines = run("nm", "-D", "--undefined-only", library).stdout.splitlines()
    symbols = {line.split()[-1] for line in lines if line.split()[-2] == "U"}
    mangled = {symbol for symbol in symbols if symbol.startswith("_Z")}
    assert not [symbol for symbol in mangled if re.search(r"(?<!\d)(2at|3c10|5torch)(?=\d|[A-Z])", symbol)]
    unversioned = {symbol for symbol in symbols - mangled if "@" not in symbol}
    others = {symbol for symbol in unversioned if not symbol.startswith(("aoti_torch_", "torch_"))}
    assert others == {"PyModule_Create2"}


def test_source_distribution_can_be_built_from(tmp_path):
    code = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", code, tmp_path).stdout.splitlines()[-1]
    shutil.unpack_archive(tmp_path / name, tmp_path)
    unpacked = tmp_path / name.removesuffix(".tar.gz")
    for pattern in ("*.py", "csrc/**/*.*", "triton_kernels/*.py", "python/**/*.py"):
        expected = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert expected <= {path.relative_to(unpacked) for path in unpacked.glob(pattern)}


def test_editable_install_follows_both_folders(tmp_path):
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*.so", "_build.json", "out")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    (copy / "python" / "flowattn" / "triton_kernels").unlink(missing_ok=True)
    python = new_environment(tmp_path / "env")
    install(python, "--no-build-isolation", "-e", copy, FLOWATTN_NATIVE=0)
    (copy / "python" / "flowattn" / "new.py").write_text("where = 'python'")
    (copy / "triton_kernels" / "new.py").write_text("where = 'triton_kernels'")
    code = "import flowattn.new, flowattn.triton_kernels.new as t; print(flowattn.new.where, t.where)"
    assert run(python, "-c", code, cwd=tmp_path).stdout.split() == ["python", "triton_kernels"]
    build = json.loads((copy / "python" / "flowattn" / "_build.json").read_text())
    assert build == {"native": False, "missing": "FLOWATTN_NATIVE=0 was set", "cuda_archs": []}


def test_install_without_a_compiler_is_pure_and_works(tmp_path):
    line = "no C++ compiler (install g++ 11 or later, or set CXX)"
    text, wheel = build_wheel(tmp_path, "--no-build-isolation", PATH=tmp_path)
    assert f"flowattn: installed without native kernels: {line}" in text
    assert wheel.name == f"flowattn-{VERSION}-py3-none-any.whl"
    assert not [name for name in names(wheel) if name.endswith(".so")]
    python = new_environment(tmp_path / "env")
    install(python, wheel)
    result = run(python, "-c", RUN_OPS, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "reference"
    assert f"cpu        refused: native library missing: {line}" in result.stdout
    info = run(python, "-m", "flowattn.info", cwd=tmp_path).stdout
    assert re.search(rf"^native +no: {re.escape(line)}$", info, re.M)
    with pytest.raises(AssertionError, match="FLOWATTN_CUDA=1 cannot be done: no C"):
        build_wheel(tmp_path / "cuda", "--no-build-isolation", PATH=tmp_path, FLOWATTN_CUDA=1)


def test_info_names_versions_and_every_op(native):
    text = run(sys.executable, "-m", "flowattn.info", FLOWATTN_BACKEND="reference", PYTHONPATH=ROOT / "python").stdout
    version = re.escape(torch.__version__)
    for line in (f"flowattn +{VERSION} ", f"torch +{version}", "native +yes", "switch +FLOWATTN_BACKEND=reference"):
        assert re.search(f"^{line}", text, re.M), line
    assert re.search(r"^  C\+\+ +(baseline|avx2|avx512) kernels on this CPU$", text, re.M)
    for op in fa.dispatch.tables():
        assert f"\n{op} on cpu\n" in text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FLOWATTN_CUDA": "yes"}, "setup.py: FLOWATTN_CUDA must be auto, 0 or 1; got 'yes'"),
        ({"FLOWATTN_CUDA": "1", "CUDA_HOME": "/nowhere"}, "setup.py: FLOWATTN_CUDA=1 needs nvcc; got none"),
        ({"FLOWATTN_CUDA_ARCHS": "sm_90"}, "setup.py: FLOWATTN_CUDA_ARCHS must read like 8.0+PTX;9.0a; got 'sm_90'"),
    ],
    ids=["unknown", "no-nvcc", "archs"],
)
def test_bad_switches_stop_the_build(tmp_path, native, environment, message):
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path)
    result = run(*command, check=False, **environment)
    assert result.returncode != 0 and message in result.stderr


def test_missing_prerequisites_are_named(monkeypatch):
    script = build_script()
    monkeypatch.delenv("FLOWATTN_NATIVE", raising=False)
    for change, expected in (
        (("installed_torch", lambda: None), "no torch>=2.10 headers (install torch first)"),
        (("find_ninja", lambda: None), "no ninja (pip install ninja)"),
        (("find_pybind11", lambda: None), "no pybind11 (pip install pybind11)"),
        (("find_cxx", lambda: None), "no C++ compiler (install g++ 11 or later, or set CXX)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(script, "find_cxx", lambda: "g++")
            patch.setattr(script, *change)
            script.missing.cache_clear()
            assert script.missing() == expected


@pytest.mark.parametrize(
    ("version", "headers", "required"),
    [
        ("2.13.0+cpu", True, []),
        ("2.10.0", True, []),
        ("2.9.1", True, ["torch>=2.10"]),
        ("2.13.0", False, ["torch>=2.10"]),
    ],
    ids=["newer", "minimum", "older", "no-headers"],
)
def test_isolated_build_asks_for_torch_only_where_there_is_none(monkeypatch, tmp_path, version, headers, required):
    monkeypatch.syspath_prepend(ROOT)
    import build_backend

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (tmp_path / "torch" / "include").mkdir()
    monkeypatch.setattr(build_backend, "_folders", lambda: [tmp_path])
    assert build_backend._torch_requirement() == required


def test_isolated_build(wheel, tmp_path):
    """Plain `pip install .`: build requirements come from the registry, torch from the environment."""
    if pip("download", "--no-deps", "-d", tmp_path, "ninja", check=False).returncode:
        pytest.skip("no package registry can be reached")
    _, isolated = build_wheel(tmp_path / "isolated")
    assert isolated.name == wheel.name and set(names(isolated)) == set(names(wheel))


def test_versions_agree():
    assert re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1) == VERSION
