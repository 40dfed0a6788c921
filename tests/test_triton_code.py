"""The machine code of Triton kernels for Hopper: products take their operands from where these lie (triton_code.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="this Triton does not compile for NVIDIA GPUs")


def programs(*arguments):
    """(products, stray ones) of each program that triton_code.py compiles, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("triton_code.py")), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return [tuple(map(int, found)) for found in re.findall(r"_kernel (\d+) (\d+)", result.stdout)], result.stdout


def test_products_have_their_operands():
    found, printed = programs()
    assert sum(products for products, _ in found) > 700 and not any(strays for _, strays in found), printed


def test_a_wrong_address_is_found():
    version = subprocess.run([PTXAS, "--version"], capture_output=True, text=True).stdout
    if "release 12.8" not in version:
        pytest.skip("only ptxas 12.8 is known to be wrong")
    found, printed = programs("control")
    assert any(strays for _, strays in found), printed
