"""A live video decoded by exported graphs, by whatever runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cfengine.codec import to_levels
from cfengine.segments.binding import Binding, Runner
from cfengine.segments.manifest import Manifest

Call = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]  # graph, operands by name -> results by name


class DecoderStream:
    """Decoder of one live video (interface `cfengine.codec.StreamDecoder`, but for its `state`).

    A codec that starts with another network has a graph for it, `decoder_start`. The others start with a past that is
    made up, and the frames that it gives to the first latent, all but the last, are dropped.
    """

    def __init__(self, manifest: Manifest, call: Call) -> None:
        self._call, self._starts, self._codec = call, "decoder_start" in manifest.graphs, manifest.codec
        latents, *past = manifest.graph("decoder").inputs
        self._step, self._dtype, self._past = latents.shape[0], latents.torch_dtype, past
        self._state: dict[str, Tensor] = {}

    def video(self, latents: Tensor) -> Tensor:
        """(n, C, h, w) -> (frames, 3, H, W) in 0..1, not clamped; n as many as a graph takes, or whole multiples."""
        groups = latents.to(self._dtype).split(self._step)
        return torch.cat([self._group(group.contiguous()) for group in groups])

    def draw(self, latents: Tensor) -> Tensor:
        """See `cfengine.codec.StreamDecoder.draw`."""
        return to_levels(self.video(latents))

    def _group(self, latents: Tensor) -> Tensor:
        first = not self._state
        if first and self._starts:
            found, past = self._call("decoder_start", {"latents": latents}), {}
        else:
            past = self._state or {operand.name: self._before(operand, latents) for operand in self._past}
            found, past = self._call("decoder", {"latents": latents, **past}), past
        video = found["video"]
        kept = {operand.name: found.get(operand.name.replace("past", "next")) for operand in self._past}
        self._state = {
            operand.name: self._zeros(operand, latents) if kept[operand.name] is None else kept[operand.name]
            for operand in self._past
        }
        made_up = video.shape[0] // latents.shape[0] - 1 if first and not self._starts else 0
        return video[made_up:]

    def _before(self, operand, latents: Tensor) -> Tensor:
        """The past of a stream that begins: the small world repeats its first latent, TAEHV sees black."""
        return latents[:1] if self._codec == "tiny_world" else self._zeros(operand, latents)

    def _zeros(self, operand, latents: Tensor) -> Tensor:
        return torch.zeros(operand.shape, dtype=operand.torch_dtype, device=latents.device)


def graph_call(manifest: Manifest, runner: Runner) -> Call:
    """Call graphs of a folder, with their first weight sets, through a backend."""

    def call(name: str, operands: dict[str, Tensor]) -> dict[str, Tensor]:
        bound = Binding(manifest.graph(name), runner.device).bind(operands)
        runner.run(name, 0, bound)
        return bound.outputs

    return call
