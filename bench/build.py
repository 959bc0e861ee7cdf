"""Build the compiled extension into this checkout, for a machine where nothing is installed: no pip, no index.

    python -m cfengine.bench.build [--force]

Needs CMake, a C++ compiler and pybind11; with nvcc the CUDA kernels are built too. Does nothing where the extension is
newer than its sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from cfengine.bench.records import record, write
from cfengine.errors import CFEngineError, ConfigError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("CMakeLists.txt", "csrc/**/*", "kernels/**/*.cpp", "kernels/**/*.h", "kernels/**/*.cu", "kernels/**/*.cuh")


def target() -> Path:
    """Where the extension of this Python lies."""
    return ROOT / "cfengine" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def needed() -> bool:
    """Whether the extension is missing or older than one of its sources."""
    if not target().is_file():
        return True
    built = target().stat().st_mtime
    files = (path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file())
    return any(path.stat().st_mtime > built for path in files)


def commands(folder: Path) -> list[list[str]]:
    """Configure and build in `folder`; ConfigError names what is missing."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise ConfigError("cmake was not found; install it, or go on without compiled kernels")
    try:
        import pybind11
    except ImportError:
        raise ConfigError("pybind11 was not found; pip install pybind11, or go on without compiled kernels") from None
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(folder)),
        *(("-G", "Ninja") if shutil.which("ninja") else ()),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target().parent}",
    ]
    return [configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]]


def build(force: bool = False) -> float | None:
    """Build where needed; -> seconds, or None where nothing was to do.  CFEngineError where the build fails."""
    if not force and not needed():
        return None
    begin = time.perf_counter()
    folder = ROOT / "build" / f"in-place-{sysconfig.get_config_var('SOABI')}"
    for words in commands(folder):
        if subprocess.run(words, cwd=ROOT).returncode:
            raise CFEngineError(f"the build failed at: {' '.join(words)}; its output above says why")
    if not target().is_file():
        raise CFEngineError(f"the build did not leave {target()}; its output above may say why")
    os.utime(target())  # an unchanged module is not linked again
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cfengine.bench.build", description=__doc__.split("\n")[0])
    parser.add_argument("--force", action="store_true", help="build even where nothing has changed")
    parser.add_argument("--json", metavar="FILE", help="write how long it took")
    options = parser.parse_args(arguments)
    try:
        seconds = build(options.force)
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    words = "is newer than its sources" if seconds is None else f"was built in {seconds:.0f} s"
    sys.stdout.write(f"{target().name} {words}\n")
    if options.json:
        write(options.json, [record("build_seconds", seconds or 0.0, "s", config={"file": target().name})])
    return 0


if __name__ == "__main__":
    sys.exit(main())
