"""What the machine gives at best, measured in this run: bandwidth of a large copy, rates of large matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfengine.bench.records import record
from cfengine.bench.timing import measure

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_COPY_BYTES, CPU_COPY_BYTES = 2**31, 2**26
GPU_GEMM, CPU_GEMM = 8192, 512
FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with fp8 products


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes read plus bytes written per second of a copy      gemm: operations per second by precision."""

    bandwidth: float
    gemm: dict[str, float]

    def rate(self, precision: str) -> float:
        """Rate of products in a precision; that of bfloat16 where the machine has no faster one."""
        return self.gemm.get(precision, self.gemm["bf16"])

    def records(self) -> list[dict]:
        """Ceilings as records, so that shares can be checked later."""
        found = [record("ceiling_copy", self.bandwidth / 1e9, "GB/s", config={"counts": "bytes read + bytes written"})]
        for kind, rate in self.gemm.items():
            found.append(record(f"ceiling_gemm_{kind}", rate / 1e12, "TFLOP/s", config={"dtype": kind}))
        return found


def copy_bandwidth(device: torch.device | str, seconds: float = 0.25) -> float:
    """Bytes read plus bytes written per second by a copy far larger than the cache."""
    nbytes = GPU_COPY_BYTES if torch.device(device).type == "cuda" else CPU_COPY_BYTES
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / measure([lambda: target.copy_(source)], device, seconds=seconds).median


def gemm_rate(kind: str, device: torch.device | str, seconds: float = 0.25) -> float:
    """Operations per second of a large square product of random numbers: "fp32", "bf16" or "fp8"."""
    size = GPU_GEMM if torch.device(device).type == "cuda" else CPU_GEMM
    left, right = (torch.randn(size, size, device=device).to(TYPES.get(kind, torch.bfloat16)) for _ in range(2))
    if kind == "fp8":
        one = torch.ones((), device=device)
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)

        def call():
            return torch._scaled_mm(
                left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
    else:

        def call():
            return torch.mm(left, right.t())

    return 2 * size**3 / measure([call], device, seconds=seconds).median


def has_fp8(device: torch.device | str) -> bool:
    """Whether the device multiplies fp8 matrices."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def measure_ceilings(device: torch.device | str, seconds: float = 0.25) -> Ceilings:
    """Copy bandwidth, and the rate of products in every precision that the device has."""
    kinds = [*TYPES, *(["fp8"] if has_fp8(device) else [])]
    gemm = {kind: gemm_rate(kind, device, seconds) for kind in kinds}
    return Ceilings(copy_bandwidth(device, seconds), gemm)
