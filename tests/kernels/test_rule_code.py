"""The rules of the memory and cross-attention compile for the GPUs we name, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install triton")
pytestmark = [pytest.mark.cpu, pytest.mark.slow]

# In another process, since in this one Triton is interpreted: the interpreter takes what the compiler does not.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cfengine.kernels.cross_attention import triton as cross
from cfengine.kernels.slow_fast_paper_update import triton as paper
from cfengine.kernels.slow_fast_update import triton as slow_fast
from cfengine.kernels.window_update import triton as window

table = dict(SINK=3, SLOTS=21, FRAMES=3, TABLE=32, POOL=32)
rule = dict(table, SLOW=12, FAST=6, ROPE=21, WIDTH=1024)
wide = dict(last_key="*fp32", similarity_at="*fp32", key_mean="*fp32", dim="i32", threshold="fp32")
scenes = dict(table, WHOLE_SINK=False, SCENE=3, CUT=45)
heads = dict(HEAD=128, WIDTH=128, KEYS=512)
jobs = [
    *((window._update, dict(scenes, RELATIVE=r, SCENES=s), {}, 1, 1) for r, s in ((False, False), (True, True))),
    *((paper._update, dict(rule, CLEAN=clean), wide, 4, 1) for clean in (False, True)),
    (slow_fast._update, dict(rule, KEEP=1, INTERVAL=0), wide, 4, 1),
    (cross._attend, dict(heads, M=128, N=64, PRECISION="tf32"), "bf16", 8, 2),
    (cross._attend, dict(heads, M=64, N=32, PRECISION="ieee"), "fp32", 8, 1),
]
shared = []
for kernel, constants, types, warps, stages in jobs:
    if isinstance(types, str):
        pointers = dict.fromkeys(("q", "k", "v", "out"), "*" + types) | dict(bias="*fp32", scale="fp32")
        types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types.get(n, "*i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {})
    options = {"num_warps": warps, "num_stages": stages}
    shared.append(triton.compile(source, GPUTarget("cuda", int(sys.argv[1]), 32), options).metadata.shared)
print(json.dumps(shared))
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    shared = json.loads(run.stdout.splitlines()[-1])
    limit = {80: 163, 90: 227, 120: 99}[capability]  # KiB of shared memory a block may have (CUDA C++ guide, table 21)
    assert len(shared) == 7 and max(shared) <= limit * 1024
