"""Every example in the README and in a docstring runs, and every command they name exists."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import flowattn
import flowattn.triton_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    """(line number, text) of each fenced block of the README."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return [(README[: match.start()].count("\n") + 2, match.group(1)) for match in found]


def modules():
    """Every Python module of the package; pkgutil reaches triton_kernels by itself only in an in-place build."""
    found = {"flowattn"}
    for package in (flowattn, flowattn.triton_kernels):
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(found - {"flowattn._C", "flowattn._host"})


@pytest.mark.parametrize(("line", "code"), blocks("python"), ids=lambda value: f"line{value}" * isinstance(value, int))
def test_readme_python(line, code):
    exec(compile("\n" * (line - 1) + code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_first_example_is_short():
    code = [line for line in blocks("python")[0][1].splitlines() if line and not line.startswith("import")]
    assert len(code) <= 8


def test_commands_exist():
    pages = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path, text in pages.items():
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
        assert named <= targets, f"{path.name} names make targets that do not exist: {named - targets}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), f"{path.name} names {module}, which does not exist"


def test_links_and_paths_exist():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:csrc|python|tests|docs)/[\w./]+)`", text)
        missing = [name for name in named if not ((path.parent / name).exists() or (ROOT / name).exists())]
        assert not missing, f"{path.name} names {missing}"


def test_bench_markers_are_paired():
    opened, closed = (re.findall(rf"^<!-- {slash}bench:(\w+) -->$", README, re.M) for slash in ("", "/"))
    assert opened and opened == closed


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
