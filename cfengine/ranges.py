"""Named ranges for Nsight Systems: chunk, pass, layers, operation.

Through the `nvtx` package where it is installed, else through torch where that is built for CUDA; without either a
range is one shared object that does nothing. Inside a captured graph the host runs once: to see passes, layers and
operations of every chunk, build the engine with graphs=False.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

_NOTHING = nullcontext()


@cache
def _opener() -> Callable[[str], AbstractContextManager] | None:
    """What opens a range by name; None where there is nothing to tell."""
    try:
        import nvtx

        return nvtx.annotate
    except ImportError:
        pass
    import torch

    return torch.cuda.nvtx.range if torch.version.cuda else None


def span(name: str) -> AbstractContextManager:
    """A context that is a range of that name in a profile."""
    opener = _opener()
    return opener(name) if opener else _NOTHING


def spanned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` inside a range; the function itself where there is nothing to tell."""
    if _opener() is None:
        return function

    @wraps(function)
    def call(*args, **kwargs):
        with span(name):
            return function(*args, **kwargs)

    return call
