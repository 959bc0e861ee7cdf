"""The house rules: who may import whom, what loads late, where the environment is read, how tests are marked."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"config", "types", "errors", "events", "ranges"}  # anyone may import these; they import one another only
ANYTHING = None

# Part of cfengine -> the parts that it may import, besides itself and the leaves. An arrow never points back: memory
# knows nothing of torch modules, the model nothing of sessions, ops nothing of models, a kernel only tensors.
ALLOWED: dict[str, set[str] | None] = {
    "config": {"errors"},
    "types": set(),
    "errors": set(),
    "__init__": {"engine", "session"},  # the public names
    "ranges": set(),
    "events": {"errors"},
    "choices": {"model", "ops"},  # names of encoders, types and operations
    "pictures": {"video"},  # files of pictures
    "snapshot": set(),  # tensors by name, and values of JSON
    "playout": set(),  # a clock and whatever makes chunks
    "steering": set(),  # words
    "device": set(),
    "batch": {"session", "scheduler", "device"},
    "backends": {"choices", "model", "segments", "ops", "export"},  # export: one that has no export yet makes one
    "lanes": {"scheduler", "memory", "codec", "device", "choices", "ops"},  # what sessions run on, and who has it
    # ops: it chooses
    "engine": {
        "session",
        "backends",
        "batch",
        "lanes",
        "snapshot",
        "pictures",
        "choices",
        "scheduler",
        "memory",
        "model",
        "codec",
        "ops",
        "device",
        "loading",
        "serve",
        "stream",
    },
    "stream": {"session"},
    "loading": {"choices", "sources", "codec", "model", "device"},  # parts of an engine, from a name
    "sources": {"model", "checkpoint"},  # sizes of a checkpoint are read off its tensors, or said beside them
    "session": {"scheduler", "memory", "device", "snapshot"},
    "scheduler": {"memory", "segments", "codec", "ops"},
    "memory": {"ops"},
    "model": {"ops", "checkpoint"},
    "segments": {"model", "ops", "checkpoint"},
    "codec": {"ops", "checkpoint"},
    "checkpoint": set(),  # reads files of weights for the model and the codecs, and knows neither
    "ops": {"kernels", "_C"},  # the only door to kernels
    "video": {"provenance"},
    "provenance": set(),
    "testing": {"model", "segments", "memory", "scheduler", "ops", "export"},
    "training": {"model", "memory", "scheduler", "codec", "ops"},
    "embed": {"_C"},  # the ring is C; whoever has frames hands them over
    "serve": {"session", "playout", "embed", "steering"},
    "cli": ANYTHING,
    "cli_generate": ANYTHING,
    "cli_play": ANYTHING,
    "cli_serve": ANYTHING,
    "cli_export": ANYTHING,
    "cli_verify": ANYTHING,
    "cli_display": ANYTHING,
    "doctor": ANYTHING,
    "kernels": {"_C"},
    "export": {"model", "segments", "codec", "memory", "scheduler", "ops"},  # check runs a whole chunk
    "bench": ANYTHING,  # but for the internals of training, see TRAINING_FACE
}

# (importer, imported) -> why this one arrow is allowed although the table above does not have it.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("memory", "kernels"): "the table and the sizes of each rule are declared beside the references of the rules",
    ("testing", "kernels"): "replay undoes the rotation of stored keys, and names recorded actions",
    ("training", "kernels"): "a differentiable forward needs the same rotary tables",
    ("training", "bench"): "evaluate measures with the benches themselves, on the engine that opens what was trained",
    ("training", "engine"): "as above",
    ("training", "cli_display"): "a training shows its progress as the other commands do",
    ("scheduler", "model"): "chunks keep the modulations that the model computes once per timestep",
    ("segments", "memory"): "the walk hands q, k, v to the memory that fills the hole",
}

TRAINING_FACE = {"world", "measure", "data", "trials"}  # renderer and geometry that generated video is measured with

KERNELS_MAY_IMPORT = {"torch", "triton", "numpy"}  # beside the standard library
HEAVY = {
    "diffusers",
    "transformers",
    "av",
    "typer",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "huggingface_hub",
    "c2pa",
    "cryptography",
}
MARKERS = {"cpu", "gpu", "trt", "embed"}
MAGIC = {1560, 4680, 32760}  # sizes of one resolution; they are derived in config.py


class Import(NamedTuple):
    """One imported module: absolute dotted name, line, and whether it runs when the importing module loads."""

    name: str
    line: int
    at_load: bool


def sources() -> dict[str, Path]:
    """Installed dotted name -> file, of every module of the package."""
    found = {}
    for folder, prefix in (("cfengine", ""), ("kernels", "kernels"), ("export", "export"), ("bench", "bench")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(["cfengine", *filter(None, parts)])] = path
    return found


def imports(tree: ast.Module, module: str) -> Iterator[Import]:
    """Yield what a module imports; imports for type checkers alone never run and are left out."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from visit(ast.Module([other], []), at_load)
            elif isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module.split(".")[: -child.level]
                    base = ".".join([*package, *filter(None, [base])])
                yield from (Import(f"{base}.{alias.name}", child.lineno, at_load) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_load and not inside)

    return visit(tree, True)


def part(name: str) -> str | None:
    """Part of the house that a dotted name belongs to; None for other packages and for cfengine itself."""
    words = name.split(".")
    return words[1] if words[0] == "cfengine" and len(words) > 1 else None


def arrows(module: str, text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (importer, imported, where) for arrows between parts that the table does not allow."""
    importer = part(module) or "__init__"
    if importer not in ALLOWED:
        yield importer, "?", f"{module}: cfengine.{importer} is not in the list of the house; add it with its arrows"
        return
    allowed = ALLOWED[importer]
    for found in imports(ast.parse(text), module):
        imported = part(found.name)
        if found.name == "cfengine.__version__" or found.name.split(".")[0] != "cfengine":
            continue
        if imported not in ALLOWED and imported != "_C":
            imported = "__init__"  # a public name
        if imported == importer or allowed is ANYTHING:
            continue
        if imported in allowed or imported in LEAVES and importer not in LEAVES:
            continue
        yield importer, imported, f"{module}:{found.line} imports {found.name}"


def environment_reads(text: str) -> list[int]:
    """Lines that touch the process environment."""
    tree, lines = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv"):
            lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if "env" in alias.name]
    return lines


def marked(text: str) -> list[str]:
    """Names of tests in a file without one of MARKERS on the file, the class or the test."""

    def has(expressions: list[ast.expr]) -> bool:
        named = (node for e in expressions for node in ast.walk(e) if isinstance(node, ast.Attribute))
        return any(n.attr in MARKERS and ast.unparse(n.value) == "pytest.mark" for n in named)

    def unmarked(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not has(node.decorator_list):
                if isinstance(node, ast.ClassDef):
                    yield from unmarked(node.body)
                elif node.name.startswith("test"):
                    yield node.name

    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and has([node.value]):
            return []
    return list(unmarked(tree.body))


# The project ----------------------------------------------------------------------------------------------------------


def test_the_walk_sees_the_house():
    names = sources()
    for name in ("cfengine.config", "cfengine.memory.policies", "cfengine.kernels.rope", "cfengine.bench.__init__"):
        assert name in names
    assert len(names) > 30


def test_imports_follow_the_list():
    wrong = []
    for module, path in sources().items():
        found = arrows(module, path.read_text(encoding="utf-8"))
        wrong += [where for importer, imported, where in found if (importer, imported) not in EXCEPTIONS]
    assert not wrong, "arrows that the house does not have:\n" + "\n".join(wrong)


def test_every_exception_is_still_needed():
    used = set()
    for module, path in sources().items():
        used |= {(importer, imported) for importer, imported, _ in arrows(module, path.read_text(encoding="utf-8"))}
    assert set(EXCEPTIONS) <= used, f"delete the exceptions {sorted(set(EXCEPTIONS) - used)}"


def test_kernels_stay_plain():
    import sys

    wrong = []
    for module, path in sources().items():
        if part(module) != "kernels":
            continue
        for found in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            top = found.name.split(".")[0]
            if top != "cfengine" and top not in KERNELS_MAY_IMPORT and top not in sys.stdlib_module_names:
                wrong.append(f"{module}:{found.line} imports {found.name}")
    assert not wrong, "kernels import torch, triton, numpy and cfengine._C:\n" + "\n".join(wrong)


def test_benches_leave_training_internals_alone():
    wrong = []
    for module, path in sources().items():
        if part(module) != "bench":
            continue
        for found in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            words = found.name.split(".")
            if words[:2] == ["cfengine", "training"] and words[2] not in TRAINING_FACE:
                wrong.append(f"{module}:{found.line} imports {found.name}")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_load_late():
    wrong = []
    for module, path in sources().items():
        for found in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            if found.at_load and found.name.split(".")[0] in HEAVY and module != "cfengine.cli":
                wrong.append(f"{module}:{found.line} imports {found.name} when it loads; import it where it is used")
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_config_alone():
    wrong = [
        f"{module}:{line}"
        for module, path in sources().items()
        for line in environment_reads(path.read_text(encoding="utf-8"))
        if module != "cfengine.config"
    ]
    assert not wrong, "the environment is touched outside config.py: " + ", ".join(wrong)


def test_no_size_of_one_resolution_is_written_down():
    wrong = []
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in MAGIC and isinstance(node.value, int):
                wrong.append(f"{module}:{node.lineno} says {node.value}")
    assert not wrong, "sizes are derived in config.py:\n" + "\n".join(wrong)


def test_every_test_carries_a_marker():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    wrong = {str(path.relative_to(ROOT)): marked(path.read_text(encoding="utf-8")) for path in files}
    wrong = {name: tests for name, tests in wrong.items() if tests}
    assert not wrong, f"add pytestmark = pytest.mark.cpu (or gpu, trt, embed): {wrong}"


# The checks themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "text", "imported"),
    [
        ("cfengine.memory.policies", "import cfengine.model.dit", "model"),
        ("cfengine.memory.policies", "from cfengine.model import dit", "model"),
        ("cfengine.memory.policies", "from cfengine import session", "session"),
        ("cfengine.memory.policies", "from ..model.dit import CausalDiT", "model"),
        ("cfengine.memory.policies", "from cfengine import Engine", "__init__"),
        ("cfengine.ops", "def f():\n    from cfengine.model import dit", "model"),
        ("cfengine.config", "from cfengine.types import Frame", "types"),
        ("cfengine.kernels.rope", "from cfengine.errors import KernelError", None),
        ("cfengine.kernels.op.reference", "from ..rope import rotate", None),
        ("cfengine.kernels.op.cpu", "from cfengine import _C", None),
        ("cfengine.session", "from cfengine import _C", "_C"),
        ("cfengine.session", "if TYPE_CHECKING:\n    from cfengine.engine import Engine", None),
        ("cfengine.session", "from .engine import Engine", "engine"),
        ("cfengine.session", "import os, torch", None),
        ("cfengine.newcomer", "import os", "?"),
    ],
)
def test_arrows_are_found(module, text, imported):
    assert [found for _, found, _ in arrows(module, text)] == ([imported] if imported else [])


def test_late_imports_are_told_from_early_ones():
    text = "import av\ntry:\n    import onnx\nexcept ImportError:\n    pass\ndef f():\n    import typer"
    assert [(i.name, i.at_load) for i in imports(ast.parse(text), "cfengine.x")] == [
        ("av", True),
        ("onnx", True),
        ("typer", False),
    ]


@pytest.mark.parametrize(
    "text",
    ["os.environ['A']", "import os\nos.getenv('A')", "from os import environ as e", "x = __import__('os').environ"],
)
def test_environment_reads_are_found(text):
    assert environment_reads(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def test_a(): pass", ["test_a"]),
        ("pytestmark = pytest.mark.cpu\ndef test_a(): pass", []),
        ("pytestmark = [pytest.mark.slow]\ndef test_a(): pass", ["test_a"]),
        ("pytestmark = [pytest.mark.slow, pytest.mark.gpu]\ndef test_a(): pass", []),
        ("@pytest.mark.trt\ndef test_a(): pass\ndef test_b(): pass", ["test_b"]),
        ("class TestA:\n    def test_a(self): pass", ["test_a"]),
        ("@pytest.mark.parametrize('x', [1])\ndef test_a(x): pass", ["test_a"]),
    ],
)
def test_missing_markers_are_found(text, names):
    assert marked(text) == names
