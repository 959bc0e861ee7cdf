"""Triton kernels compile for the GPUs we name, without one, and the attention keeps its state in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install triton")
pytestmark = pytest.mark.cpu

# Compiles the attention of Wan 2.1's shape in another process (there Triton is not interpreted) and lets ptxas report.
PROGRAM = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from cfengine.kernels.paged_attention import triton as attention

capability, head, mode = (int(argument) for argument in sys.argv[1:])
m, n, warps = attention.tiles(head, False)
constants = dict(HEAD=head, WIDTH=head, M=m, N=n, REST=32, MODE=mode, HARDWARE=capability >= 89, PRECISION="tf32")
constants["v_token" if mode else "v_channel"] = 1  # a stride of one is compiled in
pages, scales = ("*bf16", "*u8", "*fp8e4nv")[mode], "*fp32" if mode else "*i32"
pointers = {"q": "*bf16", "out": "*bf16", "k_pages": pages, "v_pages": pages, "k_scale": scales, "v_scale": scales}
pointers |= {"page_ids": "*i32", "count": "*i32", "turns": "*fp32", "scale": "fp32"}
names = attention._attend.arg_names
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
# what a launch finds out by itself: addresses and strides are multiples of 16
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
           if name not in constants
           and (name in pointers and name != "scale" or "_" in name and name not in ("page_tokens", *pointers))}
source = ASTSource(attention._attend, signature, constants, aligned)
built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": 2})
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(built.asm["ptx"])
    file.flush()
    target = re.search(r"[.]target (sm_\\w+)", built.asm["ptx"]).group(1)
    ptxas = [get_ptxas(capability).path, "-v", "--gpu-name", target, file.name, "-o", "/dev/null"]
    report = subprocess.run(ptxas, capture_output=True, text=True)
assert report.returncode == 0, report.stdout + report.stderr
report = report.stderr
spills = [int(n) for n in re.findall(r"(\\d+) bytes spill", report)]
products = len(re.findall(r"wgmma|mma[.]sync", built.asm["ptx"]))
print(json.dumps({"spills": spills, "products": products, "shared": built.metadata.shared, "report": report}))
"""


# Bytes spilled, stores and loads, no more than now: where a page begins, not in the loop over its keys.
# Narrower tiles of keys spill no less.
SAME, HALF, FP8 = range(3)  # pages as q, e4m3 as float16, e4m3 as it is


@pytest.mark.parametrize(
    ("capability", "head", "mode", "allowed"),
    [
        (80, 64, SAME, 0),
        (90, 64, SAME, 0),
        (120, 64, SAME, 0),
        (80, 128, SAME, 24),
        (90, 128, SAME, 0),
        (120, 128, SAME, 88),
        (80, 128, HALF, 36),
        (90, 128, FP8, 0),
    ],
)
def test_attention_compiles_with_its_state_in_registers(capability: int, head: int, mode: int, allowed: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability), str(head), str(mode)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["products"] > 0  # the tensor cores are used
    assert found["spills"] and sum(found["spills"]) <= allowed, found["report"]
    limit = {80: 163, 90: 227, 120: 99}[capability]  # KiB of shared memory a block may have (CUDA C++ guide, table 21)
    assert found["shared"] <= limit * 1024
