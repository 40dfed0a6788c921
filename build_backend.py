"""PEP 517 backend: setuptools, plus torch as a build requirement only where the target environment has none.

The native library is built on the LibTorch Stable ABI and needs torch's headers alone, so an isolated build uses the
torch that is already installed beside it instead of downloading a second one.
"""

import re
import site
import sys
import sysconfig
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _editable_requires
from setuptools.build_meta import get_requires_for_build_wheel as _wheel_requires

TORCH_MINIMUM = (2, 10)


def _folders():
    """Where packages are installed; build isolation takes some of these from sys.path, but not from disk."""
    yield sysconfig.get_path("platlib")
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if settings.is_file() and re.search(r"(?mi)^include-system-site-packages *= *true", settings.read_text()):
        yield from site.getsitepackages([sys.base_prefix])
        yield site.getusersitepackages()
    yield from sys.path


def installed_torch():
    """Folder of the first installed torch that is new enough, without importing it, or None."""
    for folder in _folders():
        torch = Path(folder) / "torch"
        if (torch / "include").is_dir() and (torch / "version.py").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
            if version and tuple(map(int, version.groups())) >= TORCH_MINIMUM:
                return torch
    return None


def _torch_requirement():
    return [] if installed_torch() else ["torch>=" + ".".join(map(str, TORCH_MINIMUM))]


def get_requires_for_build_wheel(config_settings=None):
    return _wheel_requires(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _editable_requires(config_settings) + _torch_requirement()
