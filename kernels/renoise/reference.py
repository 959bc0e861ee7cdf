"""Clean latents brought back to a noise level."""

from __future__ import annotations


def renoise(x0, noise, sigma: float):
    """(1 - sigma) x0 + sigma noise

    x0, noise: same shape and type      sigma: noise level of the result  ->  x in x0's shape and type
    """
    return (1 - sigma) * x0 + sigma * noise
