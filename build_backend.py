"""PEP 517 backend: setuptools, plus torch as a build requirement only where the target environment has none.

The native library is built on the LibTorch Stable ABI and needs torch's headers alone, so an isolated build uses the
torch that is already installed beside it instead of downloading a second one.
"""

import sysconfig
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _editable_requires
from setuptools.build_meta import get_requires_for_build_wheel as _wheel_requires


def _torch_requirement():
    installed = (Path(sysconfig.get_path("platlib")) / "torch" / "include").is_dir()
    return [] if installed else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _wheel_requires(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _editable_requires(config_settings) + _torch_requirement()
