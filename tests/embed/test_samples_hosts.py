"""The samples for engines: the C# binding against the C library, the OpenXR loop, the files of the Godot extension."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.embed, pytest.mark.hosts]

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("sample_tools", HERE / "sample_tools.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

HEADER = tools.ROOT / "csrc" / "client" / "include" / "cfengine_client.h"
UNITY = tools.SAMPLES / "unity"
BINDING = (UNITY / "CFEngineClient.cs", UNITY / "CFEngineSession.cs")


# What cfengine_client.h says ------------------------------------------------------------------------------------------


def header() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)


def struct_fields() -> dict[str, list[str]]:
    """Name of each structure -> names of its fields, anonymous unions by their name."""
    found = {}
    for body, name in re.findall(r"typedef struct cf_\w+ \{(.*?)\n\} (cf_\w+);", header(), flags=re.S):
        flat = re.sub(r"union \{.*?\} (\w+);", r"union \1;", body, flags=re.S)
        lines = [re.sub(r"\[\d+\]", "", line) for line in flat.split(";") if line.strip()]
        found[name] = [re.findall(r"\w+", part)[-1] for line in lines for part in line.split(",")]
    return found


def constants() -> dict[str, int]:
    """CF_... -> number, of every enumeration."""
    found = {}
    for body in re.findall(r"enum \{(.*?)\}", header(), flags=re.S):
        found |= {name: int(value) for name, value in re.findall(r"(CF_\w+) = (-?\d+)", body)}
    return found


def test_the_header_is_read_whole():
    fields, values = struct_fields(), constants()
    assert len(fields) == 13 and fields["cf_frame"][-3:] == ["plane_count", "planes", "offsets"]
    assert fields["cf_event"] == ["header", "kind", "as"] and fields["cf_plane"] == ["data", "stride", "size"]
    assert values["CF_ERROR_SYSTEM"] == -14 and values["CF_FRAME_LATE"] == 4
    assert len(re.findall(r"\bCF_\w+ = ", header())) == len(values)


# C# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with sample_writer, libcfengine_client.so and sample_interop.exe."""
    folder = tmp_path_factory.mktemp("hosts")
    sources = tools.client_sources()
    tools.compile_c(folder / "sample_writer", HERE / "sample_writer.c", *sources)
    tools.compile_c(folder / "libcfengine_client.so", "-shared", "-fPIC", "-DCF_BUILD_SHARED", *sources)
    compile_cs(folder / "sample_interop.exe", HERE / "sample_interop.cs", *BINDING)
    return folder


def compile_cs(out: Path, *sources: Path, target: str = "exe") -> None:
    strict = ["-unsafe", "-langversion:7", "-warnaserror", f"-target:{target}"]  # 7 is older than what Unity has
    tools.run(tools.need("mcs", "mono-mcs"), *strict, f"-out:{out}", *sources)


def interop(built: Path, *words: str) -> str:
    env = {**os.environ, "LD_LIBRARY_PATH": str(built)}
    return tools.run(tools.need("mono", "mono-runtime"), built / "sample_interop.exe", *words, env=env).stdout


def told_by_cs(built: Path) -> dict[tuple[str, str], int]:
    """(structure, field) or (enumeration, constant) -> offset or value."""
    rows = (line.split() for line in interop(built, "layout").splitlines())
    return {(name, field): int(number) for name, field, number in rows}


def test_structures_of_cs_lie_as_those_of_c(built, tmp_path):
    fields = struct_fields()
    probe = ['#include "cfengine_client.h"', "#include <stdio.h>", "int main(void) {"]
    for name, members in fields.items():
        probe.append(f'printf("{name} - %zu\\n", sizeof({name}));')
        probe += [f'printf("{name} {member} %zu\\n", offsetof({name}, {member}));' for member in members]
    (tmp_path / "probe.c").write_text("\n".join([*probe, "return 0; }"]), encoding="utf-8")
    rows = (
        line.split()
        for line in tools.run(tools.compile_c(tmp_path / "probe", tmp_path / "probe.c")).stdout.splitlines()
    )
    in_c = {(name, field): int(number) for name, field, number in rows}
    in_cs = {key: number for key, number in told_by_cs(built).items() if key[0] in fields}
    assert in_cs == in_c


def test_constants_of_cs_are_those_of_c(built):
    prefixes = {"cf_result": "", "cf_struct_type": "STRUCT_", "cf_frame_flags": "FRAME_", "cf_event_kind": "EVENT_"}
    prefixes |= {"cf_session_flags": "SESSION_"}
    prefixes |= {f"cf_{name}": f"{name.upper()}_" for name in ("state", "format", "memory", "policy")}
    in_cs = {
        f"CF_{prefixes[name]}{field.upper()}": number
        for (name, field), number in told_by_cs(built).items()
        if name in prefixes and not name == field == "-"
    }
    assert in_cs == constants()


def test_cs_reads_every_pixel_and_steers(built):
    ring = f"samples-cs-{os.getpid()}"
    with tools.Program(built / "sample_writer", ring, "rgba", "50", "30", "30") as writer:  # rows of 50 are padded
        writer.wait_for("ready")
        said = interop(built, "play", ring)
        events = [line for line in writer.end() if line.startswith("event")]
    assert said.startswith("wrong 0 garbage 0 state Running size 50x30 new ")  # garbage: bytes while frames were read
    assert events == ["event 1 action 1 -1", "event 2 prompt hügel", "event 3 reset"]


def test_the_unity_view_compiles(tmp_path):
    sources = [HERE / "sample_unity_stubs.cs", *BINDING, UNITY / "CFEngineView.cs"]
    compile_cs(tmp_path / "view.dll", *sources, target="library")


# OpenXR ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xr_loop(tmp_path_factory) -> Path:
    """The sample loop over a stand-in for a runtime, which checks what it is asked."""
    tools.need_file("/usr/include/openxr/openxr.h", "libopenxr-dev")
    out = tmp_path_factory.mktemp("xr") / "sample_xr_runtime"
    loop = tools.SAMPLES / "openxr" / "stream_layer.c"
    return tools.compile_c(out, HERE / "sample_xr_runtime.c", loop, *tools.client_sources())


@pytest.mark.parametrize("hz", [72, 90, 120])
def test_the_openxr_loop_shows_the_nearest_frame(hz, xr_loop):
    said = tools.run(xr_loop, f"samples-xr-{os.getpid()}", str(hz), "2000").stdout.split()
    done = {name: int(number) for name, number in zip(said[:4:2], said[1:4:2], strict=True)}
    assert abs(done["frames"] - 2000 / hz * 16) <= 2  # what 2000 turns last; the lead of the display adds one
    assert done["uploads"] <= done["frames"] <= done["uploads"] + 2


# Godot ----------------------------------------------------------------------------------------------------------------


def test_the_godot_project_names_what_the_extension_has():
    """Without Godot: names that the project's files use are those that the C code registers."""
    godot = tools.SAMPLES / "godot"
    code = (godot / "view.c").read_text(encoding="utf-8")
    names = ("cfengine.gdextension", "main.gd", "main.tscn")
    project = {name: (godot / "project" / name).read_text(encoding="utf-8") for name in names}
    (symbol,) = re.findall(r'entry_symbol = "(\w+)"', project["cfengine.gdextension"])
    assert f"GDExtensionBool {symbol}(" in code
    methods = set(re.findall(r'^    \{"(\w+)", \1,', code, flags=re.M))
    called = set(re.findall(r"\bview\.(\w+)\(", project["main.gd"]))
    assert len(methods) == 10 and called and called <= methods
    (node,) = re.findall(r'\[node name="View" type="(\w+)"', project["main.tscn"])
    assert re.search(rf'view_class = *\{{\s*"{node}",\s+"Node"', code)


def test_missing_godot_headers_are_a_sentence(tmp_path):
    without = tools.run(tools.need("cmake", "cmake"), "-S", tools.SAMPLES / "godot", "-B", tmp_path, check=False)
    assert without.returncode != 0 and "--dump-gdextension-interface" in without.stderr
