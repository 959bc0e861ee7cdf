"""The clean latents that a flow prediction stands for."""

from __future__ import annotations


def flow_to_x0(x, flow, sigma: float):
    """x0 = x - sigma * flow, computed in float64, in x's type.

    x, flow: same shape, any types      sigma: noise level of x  ->  x0 in x's shape and type
    """
    return (x.double() - sigma * flow.double()).to(x.dtype)
