"""Engine and benches load from a checkout: nothing installed but torch, triton, numpy, safetensors and pytest."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
MISSING = (
    "typer rich av diffusers huggingface_hub transformers sentencepiece tokenizers ftfy hypothesis matplotlib nvtx "
    "onnx onnxruntime pybind11"
).split()
# -S leaves out site-packages' .pth files, and with them the editable installation of this package
BARE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
sys.path.append({sysconfig.get_path("purelib")!r})

MISSING = {MISSING!r}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
COLLECT = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def bare(text: str, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run Python without the packages of MISSING and without an installation."""
    command = [sys.executable, "-S", "-c", BARE + text, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_engine_and_benches_load():
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__")
    done = bare(
        f"import importlib, cfengine; cfengine.Engine; cfengine.Session\n"
        f"for name in {names!r}: importlib.import_module('cfengine.bench.' + name)\n"
        "import cfengine.testing.replay; print('loaded')"
    )
    assert done.stdout.strip() == "loaded", done.stderr


def test_a_bench_runs(tmp_path):
    path = tmp_path / "records.json"
    words = ["--device", "cpu", "--precision", "fp32", "--op", "modulated_norm", "--seconds", "0", "--json", str(path)]
    done = bare("import runpy; runpy.run_module('cfengine.bench.kernels', run_name='__main__')", *words)
    assert done.returncode == 0 and "modulated_norm" in path.read_text(), done.stderr


def test_gpu_tests_load():
    from cfengine.bench.gpu_suite import gpu_tests

    # hypothesis leaves a plugin of pytest behind, which would look for it
    words = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *gpu_tests()]
    done = bare(COLLECT, *words)
    assert done.returncode == 0 and "error" not in done.stdout.lower(), done.stdout[-2000:] + done.stderr[-2000:]
