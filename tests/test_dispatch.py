"""Backend tables: forcing, explaining, falling back, and what `import flowattn` costs."""

import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import flowattn as fa
from flowattn import _native, dispatch

ON_GPU, ON_CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)


def refuse_small(x, size):
    return None if size >= 4 else f"size must be at least 4; got {size}"


@pytest.fixture
def table(monkeypatch):
    """An op `toy(x, size)` whose kernel takes sizes from 4 on; it is gone, and warnings are fresh, after the test."""
    monkeypatch.setattr(dispatch, "_tables", dict(dispatch.tables()))
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_forced", None)
    monkeypatch.setattr(dispatch, "_strict", False)
    return dispatch.Table(
        "toy",
        lambda x, size: (x, size),
        dispatch.Backend("cuda", refuse_small, "kernel"),
        dispatch.Backend("reference", dispatch.never, "plain"),
        probe=lambda device: (ON_CPU, 4),
    )


def python(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLOWATTN_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_first_willing_backend_is_chosen(table):
    assert table.choose(ON_GPU, 4).fwd == "kernel"
    assert table.choose(ON_CPU, 3).fwd == "plain"


def test_no_willing_backend_says_why(monkeypatch, table):
    monkeypatch.setattr(table, "backends", table.backends[:1])
    with pytest.raises(
        NotImplementedError, match=r"toy: no backend takes this call:\n.*size must be at least 4; got 3"
    ):
        table.choose(ON_CPU, 3)


def test_use_backend_forces_and_restores(table):
    with fa.use_backend("reference"):
        assert table.choose(ON_CPU, 4).fwd == "plain"
        with fa.use_backend(None):
            assert table.choose(ON_CPU, 4).fwd == "kernel"
        assert table.choose(ON_CPU, 4).fwd == "plain"
    assert table.choose(ON_CPU, 4).fwd == "kernel"
    with pytest.raises(ZeroDivisionError), fa.use_backend("reference"):
        raise ZeroDivisionError
    assert table.choose(ON_CPU, 4).fwd == "kernel"


def test_forced_backend_that_refuses_raises_with_the_reason(table):
    with fa.use_backend("cuda"):
        with pytest.raises(NotImplementedError, match="'cuda' was forced; it refuses: size must be at least 4; got 3"):
            table.choose(ON_GPU, 3)
    with fa.use_backend("triton"):
        with pytest.raises(NotImplementedError, match="'triton' was forced; this op has cuda, reference"):
            table.choose(ON_GPU, 4)


def test_unknown_names_are_value_errors():
    with pytest.raises(ValueError, match="use_backend: must be one of cuda, triton, cpu, reference; got 'cudnn'"):
        with fa.use_backend("cudnn"):
            pass
    with pytest.raises(ValueError, match="explain: op must be one of .*pack.*; got 'softmax'"):
        fa.explain("softmax")


def test_fallback_on_a_gpu_warns_once_per_op(table):
    with pytest.warns(fa.FallbackWarning, match=r"toy: runs the plain torch reference[\s\S]*got 3"):
        table.choose(ON_GPU, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.choose(ON_GPU, 3)
        table.choose(ON_CPU, 3)  # never a surprise on a CPU


def test_forced_reference_on_a_gpu_does_not_warn(table):
    with fa.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.choose(ON_GPU, 3).fwd == "plain"


def test_explain_prints_every_backend_and_does_not_warn(table, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fa.explain("toy", ON_GPU, 3) == "reference"
    assert capsys.readouterr().out.splitlines() == [
        "toy",
        "     cuda       refused: size must be at least 4; got 3",
        "  -> reference  chosen",
    ]
    with fa.use_backend("reference"):
        assert fa.explain("toy", ON_GPU, 4) == "reference"
    assert capsys.readouterr().out.splitlines()[1:] == [
        "     cuda       ok",
        "  -> reference  chosen (forced)",
    ]


@pytest.mark.parametrize("op", dispatch.tables())
def test_every_op_can_be_probed(op, device):
    table = dispatch.tables()[op]
    call = table.prepare(*table.probe(device))
    assert len(table.describe(call).splitlines()) == len(table.backends)
    assert table.pick(call).name in dispatch.NAMES


def test_environment_forces_a_backend():
    code = "import flowattn as fa, torch; print(fa.explain('pack_plan', torch.ones(1, 2, dtype=torch.bool)))"
    result = python(code, FLOWATTN_BACKEND="reference")
    assert result.returncode == 0 and result.stdout.endswith("chosen (forced)\nreference\n"), result
    result = python(code, FLOWATTN_BACKEND="cudnn")
    assert "ValueError: FLOWATTN_BACKEND: must be one of cuda, triton, cpu, reference; got 'cudnn'" in result.stderr


def test_environment_makes_a_fallback_an_error():
    code = """
from types import SimpleNamespace
from flowattn import dispatch
row = dispatch.Backend("reference", dispatch.never, None)
dispatch.Table("toy", None, row, probe=None).choose(SimpleNamespace(is_cuda=True))
"""
    assert "FallbackWarning: toy: runs the plain torch reference" in python(code).stderr
    strict = python(code, FLOWATTN_STRICT="1")
    assert strict.returncode != 0 and "NotImplementedError: toy: runs the plain torch reference" in strict.stderr


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),  # the same major runs
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (10, 0), True),  # compiled at first use
        (["8.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),  # arch-specific code runs nowhere else
    ],
    ids=str,
)
def test_cuda_kernels_refuse_gpus_they_were_not_built_for(monkeypatch, archs, capability, runs):
    monkeypatch.setattr(_native, "LOADED", True)
    monkeypatch.setattr(_native, "CUDA_BUILT", True)
    monkeypatch.setattr(_native, "BUILD", {"cuda_archs": archs})
    monkeypatch.setattr(_native, "_ARCHS", [_native._arch(text) for text in archs])
    monkeypatch.setattr(_native, "capability", lambda device: capability)
    reason = _native.refuse_cuda(SimpleNamespace(device=torch.device("cuda", 0)))
    version = "{}.{}".format(*capability)
    expected = f"no kernel for compute capability {version}; built for {archs[0]} "
    assert reason is None if runs else reason.startswith(expected)


def test_import_pulls_in_nothing_but_torch():
    code = """
import sys, torch
before = set(sys.modules)
import flowattn
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    result = python(code)
    assert set(result.stdout.split()) <= {"flowattn", "torch"}, result


def test_kernels_leave_the_names_of_tritons_binder_alone():
    """Triton generates a function that binds the arguments; one of its own names among them breaks it."""
    from flowattn import triton_kernels
    from flowattn.triton_kernels.launch import Launcher

    names = [module.name for module in pkgutil.iter_modules(triton_kernels.__path__)]
    modules = [importlib.import_module(f"flowattn.triton_kernels.{name}") for name in names]
    launchers = {x for module in modules for x in vars(module).values() if isinstance(x, Launcher)}
    assert len(launchers) > 30
    for launcher in launchers:
        assert not {"params", "specialization", "options"} & set(launcher.kernel.arg_names), launcher.kernel
