"""Segments that run exported graphs, with whatever backend runs them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cfengine import checkpoint
from cfengine.errors import CheckpointError, ExportError
from cfengine.model.dit import CrossCache, Modulation
from cfengine.ops import Ops
from cfengine.segments.binding import Binding, Runner
from cfengine.segments.manifest import NORMS, Manifest
from cfengine.segments.torch import Projected

SEGMENTS = ("first", "middle", "last")


class GraphSegments:
    """`TorchSegments`, from a folder: the same methods, and the same `walk` runs them.

    Nothing is updated in place: x of one segment is a new tensor in the next. A graph has no inner results to show, so
    `observe` sees what is an output, `patch_embedding` and `blockN`, and not `blockN.self_attn` or `blockN.cross_attn`.
    A graph always projects queries too; keys_only drops them.
    """

    def __init__(self, manifest: Manifest, runner: Runner, ops: Ops, fixed: Mapping[str, int] | None = None) -> None:
        """ops: for what lies between the passes      fixed: see `Binding`"""
        self.manifest, self.ops, self.grid, self.layers = manifest, ops, manifest.grid, manifest.layers
        self.runner = runner
        self._bindings = {n: Binding(manifest.graph(n), runner.device, fixed) for n in SEGMENTS if n in manifest.graphs}
        self._norms = _norms(manifest, runner.device)

    def with_ops(self, ops: Ops) -> GraphSegments:
        """The same graphs beside other operations."""
        other = copy.copy(self)
        other.ops = ops
        return other

    def norms(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `TorchSegments.norms`."""
        return self._norms[layer]

    def first(
        self, latents: Tensor, modulation: Modulation, *, keys_only: bool = False, observe=None
    ) -> tuple[Tensor, Projected]:
        """See `TorchSegments.first`."""
        out = self._run("first", 0, {"latents": latents, "modulation": modulation.blocks[0]})
        if observe:
            observe("patch_embedding", out["x"])
        return out["x"], _projected(out, keys_only)

    def middle(
        self,
        layer: int,
        x: Tensor,
        attended: Tensor,
        modulation: Modulation,
        cross: CrossCache | Sequence[CrossCache],
        *,
        keys_only: bool = False,
        observe=None,
    ) -> tuple[Tensor, Projected]:
        """See `TorchSegments.middle`; cross: one a session where there are several."""
        after = {"modulation_next": modulation.blocks[layer + 1]}
        out = self._run("middle", layer, self._second_half(layer, x, attended, modulation, cross) | after)
        if observe:
            observe(f"block{layer}", out["x_out"])
        return out["x_out"], _projected(out, keys_only)

    def last(self, x: Tensor, attended: Tensor, modulation: Modulation, cross, *, observe=None) -> Tensor:
        """See `TorchSegments.last`; the last block's own result stays inside the graph."""
        operands = self._second_half(self.layers - 1, x, attended, modulation, cross)
        return self._run("last", 0, operands | {"modulation_head": modulation.head})["flow"]

    def _second_half(self, layer: int, x: Tensor, attended: Tensor, modulation: Modulation, cross) -> dict[str, Tensor]:
        k, v, bias = joined_prompts((cross,) if isinstance(cross, CrossCache) else cross)
        return {
            "x": x,
            "attended": attended,
            "modulation": modulation.blocks[layer],
            "cross_k": k,
            "cross_v": v,
            "cross_bias": bias,
        }

    def _run(self, graph: str, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bound = self._bindings[graph].bind(tensors)
        self.runner.run(graph, index, bound)
        return bound.outputs


def _projected(out: Mapping[str, Tensor], keys_only: bool) -> Projected:
    return None if keys_only else out["q"], out["k"], out["v"]


def joined_prompts(caches: Sequence[CrossCache]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (sessions, keys, heads, head_dim) and bias (sessions, keys); one session's are not copied.

    Shorter prompts are padded with keys of bias -inf, which get no weight.
    """
    if len(caches) == 1:
        return caches[0].k[None], caches[0].v[None], caches[0].bias[None]
    longest = max(cache.bias.shape[0] for cache in caches)
    k, v = (caches[0].k.new_zeros(len(caches), longest, *caches[0].k.shape[1:]) for _ in "kv")
    bias = caches[0].bias.new_full((len(caches), longest), float("-inf"))
    for place, cache in enumerate(caches):
        keys = cache.bias.shape[0]
        k[place, :keys], v[place, :keys], bias[place, :keys] = cache.k, cache.v, cache.bias
    return k, v, bias


def _norms(manifest: Manifest, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Weights of the query and key norm of every layer, (dim,) each."""
    try:
        found = checkpoint.read_tensors(manifest.folder / NORMS)
        names = [[f"blocks.{layer}.norm_{part}" for part in "qk"] for layer in range(manifest.layers)]
        return [(found[q].to(device), found[k].to(device)) for q, k in names]
    except (CheckpointError, KeyError) as error:
        raise ExportError(f"{manifest.folder / NORMS} is damaged ({error}); run {manifest.command}") from error
