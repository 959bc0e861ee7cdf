"""What a replay found: the largest error of every tensor, and whatever had to be equal and is not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cfengine.testing.traces import TraceError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}
# Largest error over the largest value of a tensor. float32: traces and engine sum in different orders; a float64 replay
# of the traces differs by less than 1e-6 and wrong rules by more than 1e-2, so 1e-4 separates rounding from mistakes.
# 16 bits: weights, activations and pages are rounded, each by at most u (roundoff) of itself, u / sqrt(3) on average.
# The residual of a recorded model's last block comes after at most 3 blocks of some 14 roundings, which add up as
# independent ones do: sqrt(3 * 14 / 3) u = 3.7 u. Measured: 3.1 u in bfloat16, 4.3 u in float16; 10 u leaves a factor
# of two. Wrong rules are off by 0.33 and more in any type, eight times 10 u of bfloat16.
TOLERANCE = {torch.float32: 1e-4} | {dtype: 10 * u for dtype, u in ROUNDOFF.items()}
# A similarity is a cosine of means of keys; their roundings average out in a mean. Measured: 0.5 u.
SIMILARITY_TOLERANCE = {torch.float32: 1e-4, **ROUNDOFF}


class Report:
    """Largest relative error per tensor, and every mismatch of a table, action or counter, of a replay in a type."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.tolerance, self.similarity_tolerance = TOLERANCE[dtype], SIMILARITY_TOLERANCE[dtype]
        self.dtype = str(dtype).removeprefix("torch.")
        self.errors: dict[str, float] = {}
        self.mismatches: list[str] = []
        self.ignored: list[str] = []  # results in the file that nothing was compared with

    def tensor(self, name: str, got: Tensor, expected: Tensor, scale: float | None = None) -> None:
        """Record max|got - expected| / max|expected|; `scale` replaces the denominator (for parts of a tensor)."""
        if got.shape != expected.shape:
            self.mismatches.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
            return
        difference = (got.double() - expected.double()).abs().max().item()
        scale = scale if scale is not None else expected.double().abs().max().item()
        error = difference / scale if scale else difference
        self.errors[name] = max(self.errors.get(name, 0.0), error if math.isfinite(error) else math.inf)

    def equal(self, where: str, got: object, expected: object) -> None:
        if got != expected:
            self.mismatches.append(f"{where}: {got}, expected {expected}")

    def similarity(self, where: str, got: float, expected: float | None, threshold: float) -> None:
        """Compare a similarity; TraceError where it lies too close to `threshold` for its type to decide."""
        if expected is None or math.isnan(got):
            self.equal(f"{where} sim", None if math.isnan(got) else got, expected)
            return
        if abs(expected - threshold) <= self.similarity_tolerance:
            raise TraceError(
                f"{where}: similarity {expected:.6f} is within {self.similarity_tolerance:.2g} of the threshold "
                f"{threshold:g}, and {self.dtype} does not settle such a decision; replay this trace in a finer type"
            )
        error = abs(got - expected)
        self.errors["sim"] = max(self.errors.get("sim", 0.0), error)
        if error > self.similarity_tolerance:
            self.mismatches.append(f"{where} sim: {got:.6f}, expected {expected:.6f}")

    @property
    def worst(self) -> tuple[float, str]:
        return max(((error, name) for name, error in self.errors.items()), default=(0.0, "-"))

    @property
    def failed(self) -> bool:
        return bool(self.mismatches) or self.worst[0] > self.tolerance
