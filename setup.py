"""Build of `cfengine`: the map of folders to packages, and the compiled extension where a compiler is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MAPPED = ("kernels", "export", "bench")  # folder -> cfengine.<folder>
ROOT = Path(__file__).resolve().parent


def packages() -> list[str]:
    """List every package, the mapped ones under their installed names."""
    found = ["cfengine", *find_packages(str(ROOT / "cfengine"))]
    found[1:] = [f"cfengine.{name}" for name in found[1:]]
    for folder in MAPPED:
        found += [f"cfengine.{folder}", *(f"cfengine.{folder}.{name}" for name in find_packages(str(ROOT / folder)))]
    return found


def compiler() -> str | None:
    """Return the C++ compiler that CMake would take, or None."""
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cmake() -> str | None:
    """Return a cmake that runs, or None: the one of an active environment does not in the isolated one of a build."""
    found = shutil.which("cmake")
    runs = found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    return found if runs else None


class CMakeBuild(build_ext):
    """Build `cfengine._C` with CMake; without the means to do so, warn once and go on without it."""

    def run(self) -> None:
        # a binary of older sources would take the new arguments as they come: none is better
        Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)
        try:
            try:
                self.build_with_cmake("AUTO")
            except subprocess.CalledProcessError as error:
                again = f"the build failed ({error}); it starts again without CUDA kernels"
                print(f"\nWARNING: {again}\n", file=sys.stderr, flush=True)  # noqa: T201
                self.build_with_cmake("OFF")
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            self.extensions = []
            print(f"\nWARNING: {self.loss(error)}\n", file=sys.stderr, flush=True)  # noqa: T201

    def build_with_cmake(self, cuda: str) -> None:
        if compiler() is None:
            raise FileNotFoundError("no C++ compiler was found")
        program = cmake()
        if program is None:
            raise FileNotFoundError("cmake was not found")
        import pybind11

        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        build = Path(self.build_temp).resolve() / sysconfig.get_config_var("SOABI")
        build.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)  # an isolated build's tools are gone by the next one
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            program,
            str(ROOT),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCF_CUDA={cuda}",
        ]
        subprocess.run(configure, cwd=build, check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run([program, "--build", ".", "--parallel", jobs], cwd=build, check=True)
        if not target.is_file():
            raise FileNotFoundError(f"the build did not leave {target}")

    @staticmethod
    def loss(error: Exception) -> str:
        return (
            f"cfengine is installed without its compiled kernels ({error}). Everything works, but slower: "
            "plain torch serves every operation. Install a C++ compiler (Debian, Ubuntu: apt install g++ python3-dev) "
            "and cmake (pip install cmake), then repeat the installation."
        )


setup(
    packages=packages(),
    package_dir={"cfengine": "cfengine", **{f"cfengine.{folder}": folder for folder in MAPPED}},
    package_data={"cfengine": ["weights/**/*.safetensors", "weights/**/*.json", "training/configs/*.toml"]},
    ext_modules=[Extension("cfengine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=["cmake"] if compiler() and not cmake() else [],
)
