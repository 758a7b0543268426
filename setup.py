# SPDX-License-Identifier: Apache-2.0
"""Hands the build to CMake, which owns all compilation (CMakeLists.txt); metadata is in pyproject.toml."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def run(self) -> None:
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "palmette needs torch >= 2.13 to build: install it, and pass --no-build-isolation to pip"
            )
        package = Path("python" if self.inplace else self.build_lib).resolve() / "palmette"
        build = "build" if self.inplace else self.build_temp
        options = [f"-DPALMETTE_LIBRARY_DIR={package / 'lib'}", f"-DPython_EXECUTABLE={sys.executable}"]
        os.environ["PATH"] = (
            f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this venv
        )
        subprocess.run(["cmake", "-S", ".", "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(p) for p in Path(self.build_lib, "palmette", "lib").glob("*.so")]


class PlatformWheel(bdist_wheel):
    # The library has no Python.h in it: one wheel for every Python of a platform.
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    ext_modules=[Extension("palmette.lib", [])],
)
