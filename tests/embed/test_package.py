"""The client library as others get it: built alone, installed, found by CMake and by pkg-config, plain C."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.embed

CLIENT = Path(__file__).resolve().parent.parent.parent / "csrc" / "client"

CONSUMER = """
#include <cfengine_client.h>
#include <stdio.h>

int main(void) {
    cf_version version = CF_VERSION_INIT;
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    if (cf_get_version(CF_VERSION_MAJOR, &version) != CF_SUCCESS) return 1;
    info.name = "nobody-writes-this";
    const cf_result result = cf_session_open(&info, &session);
    printf("%u.%u %s: %s\\n", version.major, version.minor, cf_result_name(result), cf_last_error());
    return result == CF_ERROR_NOT_FOUND ? 0 : 1;
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES C)
find_package(cfengine_client 1.0 REQUIRED)
add_executable(dynamic main.c)
target_link_libraries(dynamic PRIVATE cfengine::client)
add_executable(fixed main.c)
target_link_libraries(fixed PRIVATE cfengine::client_static)
"""
SAYS = "1.1 CF_ERROR_NOT_FOUND: there is no ring nobody-writes-this"


def run(*command, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def cmake(tool):
    return tool("cmake", "install it: pip install cmake, or apt install cmake")


@pytest.fixture(scope="module")
def installed(cmake, tmp_path_factory):
    """Prefix that the client alone was built for and installed to."""
    folder = tmp_path_factory.mktemp("client")
    prefix = folder / "prefix"
    run(cmake, "-S", CLIENT, "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_INSTALL_LIBDIR=lib")
    run(cmake, "--build", folder / "build")
    run(cmake, "--install", folder / "build")
    return prefix


@pytest.fixture
def consumer(tmp_path):
    (tmp_path / "main.c").write_text(CONSUMER)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    return tmp_path


def test_a_cmake_project_finds_it(cmake, installed, consumer):
    run(cmake, "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run(cmake, "--build", consumer / "build")
    assert run(consumer / "build" / "dynamic").startswith(SAYS)
    assert run(consumer / "build" / "fixed").startswith(SAYS)


def test_pkg_config_finds_it(tool, compiler, installed, consumer):
    pkg_config = tool("pkg-config", "install it: apt install pkgconf")
    environment = {"PKG_CONFIG_PATH": str(installed / "lib" / "pkgconfig"), "PATH": "/usr/bin:/bin"}
    flags = run(pkg_config, "--cflags", "--libs", "cfengine_client", env=environment).split()
    run(compiler, "-std=c11", consumer / "main.c", "-o", consumer / "main", *flags, f"-Wl,-rpath,{installed}/lib")
    assert run(consumer / "main").startswith(SAYS)
    assert run(pkg_config, "--modversion", "cfengine_client", env=environment).strip() == "1.1.0"


def test_it_needs_libc_alone_and_shows_the_interface_alone(tool, installed):
    readelf = tool("readelf", "install binutils")
    library = installed / "lib" / "libcfengine_client.so"
    needed = re.findall(r"NEEDED.*\[(.+?)\]", run(readelf, "-d", library))
    assert needed and all(re.match(r"(libc|librt|libpthread|ld-linux)\b", name) for name in needed), needed
    symbols = run(readelf, "--dyn-syms", "-W", library).splitlines()
    shown = {
        words[7] for line in symbols if len(words := line.split()) == 8 and words[6].isdigit() and words[4] == "GLOBAL"
    }
    header = (installed / "include" / "cfengine_client.h").read_text()
    assert shown == set(re.findall(r"^CF_API [^;]*?(cf_\w+)\(", header, re.M)) and len(shown) == 12


def test_a_static_library_takes_no_name_of_the_program(tool, installed):
    nm = tool("nm", "install binutils")
    names = re.findall(r" [TDBRC] (\w+)", run(nm, "--defined-only", installed / "lib" / "libcfengine_client.a"))
    assert names and all(name.startswith("cf_") for name in names), names


@pytest.mark.parametrize(("language", "standard"), [("c", "c99"), ("c", "c11"), ("c++", "c++11"), ("c++", "c++17")])
def test_the_header_is_plain(compiler, installed, consumer, language, standard):
    strict = ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wpedantic", "-Werror", "-fsyntax-only"]
    run(compiler, "-x", language, f"-std={standard}", *strict, f"-I{installed}/include", consumer / "main.c")
