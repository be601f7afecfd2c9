"""setuptools' build backend, plus: where kernels are required, an isolated build also gets torch's headers and nvcc."""

import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a build backend is a module with these hooks)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toolchain


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *toolchain.missing_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *toolchain.missing_requirements()]
