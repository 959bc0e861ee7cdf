"""e4m3, the 8-bit type of rows, weights and pages, with the scale that brings it back.

e4m3 (OCP 8-bit floating point, `torch.float8_e4m3fn`): 4 bits of exponent, 3 of mantissa, no infinity. Its largest
value is 448, its smallest normal one 2^-6; a value is off by at most 2^-4 of itself after rounding.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 1e-12  # largest values below this count as this: a block of zeros has a scale too


def quantise(x, dims=-1):
    """values = e4m3(x * 448 / max|x|),  scale = max|x| / 448, with the maximum over `dims`; x = values * scale, nearly.

    -> values in x's shape, e4m3;  scale with 1 in place of `dims`, float32 (float64 for float64 input)
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(dims, keepdim=True).clamp_min(LEAST)
    factor = torch.full_like(largest, LARGEST) / largest  # rounded once; a number divided by a tensor is rounded twice
    values = (wide * factor).clamp(-LARGEST, LARGEST)  # a product may round up beyond 448
    return values.to(E4M3), largest / LARGEST
