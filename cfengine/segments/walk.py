"""The walk through the transformer: segment, attention over pages, segment, ... head. One walk serves every backend."""

from __future__ import annotations

from torch import Tensor

from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.model.dit import CrossCache, Modulation
from cfengine.ranges import span
from cfengine.segments.torch import TorchSegments


def walk(
    segments: TorchSegments,
    memory: Memory,
    latents: Tensor,
    step: Pass,
    modulation: Modulation,
    cross: list[CrossCache],
    *,
    full: bool = True,
    observe=None,
) -> Tensor | None:
    """One pass over a chunk: latents (frames, channels, height, width) -> flow of the same shape.

    full=False stops once the last block's keys and values are in their pages (what a clean pass is for) and gives None.
    observe(name, tensor), if given, sees intermediate results; `layerN.attended` says that layer N's table is final.
    """
    final = segments.layers - 1
    x, qkv = segments.first(latents, modulation, keys_only=not full and final == 0, observe=observe)
    for layer in range(segments.layers):
        with span(f"layer {layer}"):
            attended = memory.attend(layer, *qkv, segments.norms(layer), step)
            if observe:
                observe(f"layer{layer}.attended", attended)
            if attended is None:
                return None
            if layer == final:
                return segments.last(x, attended, modulation, cross[layer], observe=observe)
            keys_only = not full and layer + 1 == final
            x, qkv = segments.middle(layer, x, attended, modulation, cross[layer], keys_only=keys_only, observe=observe)
    return None
