"""What a row of the op table is: operands on the device at the sizes of a model, their work, and a library's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfengine.config import EngineConfig, precision
from cfengine.kernels.qk_norm_rope_store.reference import put
from cfengine.memory.pages import PagePool

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of activations
# Largest error over largest value. bf16: the output is rounded to 8 bits (2^-9), its input or a sum on the way once
# more; attention rounds queries, keys and weights too. fp8: a value beside a tie is one step, 2^-3, of itself away, and
# attention in e4m3 rounds four times.
TOLERANCE = {"fp32": 2e-5, "bf16": 1.5e-2, "fp8": 0.13}


class Library(NamedTuple):
    """What a user of torch would call; prepare(operands) does what is not timed and returns the call."""

    name: str
    prepare: Callable[[tuple], Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One operation at one size in one precision.

    size: tells rows of one operation apart      label: the shape in words
    operands(seed): positional arguments on the device      options: keyword arguments
    traffic: bytes, each input once and each output once
    look(result, operands): what is compared      expect(operands): the same in float64, where it is not the reference's
    """

    op: str
    size: str
    label: str
    kind: str
    operands: Callable[[int], tuple]
    traffic: float
    flops: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    library: Library | None = None
    look: Callable[[Any, tuple], list[Tensor]] = lambda result, operands: values(result)
    expect: Callable[[tuple], list[Tensor]] | None = None


def values(result) -> list[Tensor]:
    """Every tensor of a result, e4m3 rows multiplied out."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "scale") and hasattr(result, "values"):
        return [result.values.double() * result.scale.double()[:, None]]
    return [tensor for part in result for tensor in values(part)]


class Maker:
    """Sizes, types and random tensors that the rows of a configuration share."""

    def __init__(self, config: EngineConfig, device: torch.device | str, kind: str) -> None:
        self.config, self.device, self.kind, self.dtype = config, device, kind, TYPES[kind]
        self.fp8 = {"fp8": True} if kind == "fp8" else {}
        self.tokens = config.memory.chunk_frames * config.page_tokens
        self.element = self.dtype.itemsize

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def pool(self, seed: int) -> PagePool:
        """Pages of one layer full of random keys and values."""
        config = self.config
        one = replace(
            config,
            model=replace(config.model, layers=1),
            precision=precision("fp8" if self.kind == "fp8" else "bf16"),
        )
        pool = PagePool(one, self.dtype, self.device)
        for number, (pages, scale) in enumerate(((pool.k, pool.k_scale), (pool.v, pool.v_scale))):
            filled = self.normal(*pages.shape[1:], seed=2 * seed + number)
            put(pages[0], None if scale is None else scale[0], torch.arange(len(filled), device=self.device), filled)
        return pool

    def integers(self, *numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)
