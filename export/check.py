"""Every graph of a folder in ONNX Runtime on the CPU, against the torch that it was made from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfengine.codec import Codec
from cfengine.config import EngineConfig
from cfengine.errors import ExportError
from cfengine.export.backend import check_sizes
from cfengine.export.decoders import decoder_parts
from cfengine.export.folder import codec_hash
from cfengine.export.graphs import check_domains, onnx_package, with_weights
from cfengine.export.streams import DecoderStream, graph_call
from cfengine.memory.memory import Memory
from cfengine.memory.policies import Pass
from cfengine.model.dit import CausalDiT, CrossCache, Modulation, timestep_embedding
from cfengine.ops import select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule
from cfengine.segments.binding import Binding
from cfengine.segments.exported import GraphSegments
from cfengine.segments.manifest import Manifest
from cfengine.segments.onnx import OnnxRunner
from cfengine.segments.torch import TorchSegments
from cfengine.segments.walk import walk

# Largest difference over largest value. float32: both sides sum in float32, in another order; tiny-world shows 1e-6.
# float16 has 11 bits, so one rounding costs up to 5e-4; operands, and some ten results on the way through a segment,
# are rounded, which adds up to a few of these. A wrong operand or weight shows as 1e-1 or more.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3}
# A chunk is 5 passes through all segments, and each pass builds on the rounding of the last: tiny-world shows a hundred
# times the error of a segment in the worst pixel, so here the error is the root of the mean square, not the largest.
CHUNK_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}
PROMPT_TOKENS = 4  # live rows of the prompt that is made up
SEED = 0


class Row(NamedTuple):
    """One comparison: relative error and what is allowed; without numbers, a graph that was parsed and not run."""

    what: str
    error: float | None
    tolerance: float | None

    @property
    def passed(self) -> bool:
        return self.error is None or self.tolerance is None or self.error <= self.tolerance


def check(
    manifest: Manifest,
    config: EngineConfig,
    model: CausalDiT,
    codec: Codec | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Compare every graph, then a whole chunk: 4 denoise passes and the clean one.

    model: the weights that the folder was made from      codec: for its decoder's graphs
    Files are hashed first, and ExportError says what is not as it was written. ONNX Runtime's CPU provider has no
    bfloat16 product, so graphs in bf16 are parsed and not run.
    """
    manifest.verify()
    manifest.check_model(model, config.name)
    check_sizes(manifest, config)
    if codec is not None and "decoder" in manifest.graphs:
        check_codec(manifest, config, codec)
    if manifest.precision == "bf16":
        return [_parsed(manifest, name) for name in manifest.graphs]
    return _Check(manifest, config, model, codec, progress).run()


def check_codec(manifest: Manifest, config: EngineConfig, codec: Codec) -> None:
    """Raise ExportError unless a folder's decoder was made from this codec's weights."""
    got = ""
    if config.codec == manifest.codec:
        kind = manifest.graph("decoder").inputs[0].torch_dtype
        got = codec_hash(decoder_parts(config, codec, kind)) or ""
    if got != manifest.codec_hash:
        raise ExportError(
            f"{manifest.folder} decodes with {manifest.codec} of hash {(manifest.codec_hash or 'none')[:12]}, and "
            f"{config.name!r} with {config.codec}{got and f' of hash {got[:12]}'}; check it with the codec that was "
            f"exported, or run {manifest.command}"
        )


def _parsed(manifest: Manifest, name: str) -> Row:
    proto = with_weights(manifest, name)
    check_domains(name, proto)
    onnx_package().checker.check_model(str(manifest.folder / manifest.graph(name).file))
    return Row(name, None, None)


def relative(got: Tensor, want: Tensor, order: float = math.inf) -> float:
    """|got - want| / |want|, infinity where shapes differ or something is not finite.

    order: of the norm; inf is the largest value
    """
    if got.shape != want.shape:
        return math.inf
    norm = partial(torch.linalg.vector_norm, ord=order)
    error = (norm(got.double() - want.double()) / norm(want.double()).clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf


class _Check:
    """One folder; torch computes in float32 on the folder's rounded weights."""

    def __init__(self, manifest: Manifest, config: EngineConfig, model: CausalDiT, codec: Any, progress: Any) -> None:
        self.manifest, self.config, self.codec, self.say = manifest, config, codec, progress
        self.model = copy.deepcopy(model).to(manifest.dtype).float().prepare()
        self.ops = select("cpu", prefer="reference")
        self.runner = OnnxRunner(manifest)
        self.torch = TorchSegments(self.model, self.ops, config.grid)
        self.graphs = _LockStep(manifest, self.runner, self.ops)
        self.errors: dict[str, float] = {}
        self.random = torch.Generator().manual_seed(SEED)

    @torch.inference_mode()
    def run(self) -> list[Row]:
        for what, compare in (
            ("time", self.time),
            ("text and cross-attention keys", self.text),
            ("segments", self.segments),
            ("decoder", self.decoder),
        ):
            self.say(what)
            compare()
        rows = [Row(name, error, TOLERANCE[self.manifest.precision]) for name, error in self.errors.items()]
        self.errors = {}
        self.say("chunk")
        self.chunk()
        allowed = CHUNK_TOLERANCE[self.manifest.precision]
        return rows + [Row(name, error, allowed) for name, error in self.errors.items()]

    def note(self, what: str, got: Tensor, want: Tensor, order: float = math.inf) -> None:
        """Keep the worst error under a name."""
        self.errors[what] = max(self.errors.get(what, 0.0), relative(got, want, order))

    def call(self, name: str, index: int, operands: dict[str, Tensor]) -> dict[str, Tensor]:
        bound = Binding(self.manifest.graph(name)).bind(operands)
        self.runner.run(name, index, bound)
        return bound.outputs

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def time(self) -> None:
        schedule = Schedule(self.config.sampler)
        for timestep in (*schedule.warped, schedule.context_timestep):
            sinusoid = timestep_embedding(timestep, self.config.model.freq_dim)
            got, want = self.call("time", 0, {"sinusoid": sinusoid}), self.model.modulate(timestep)
            self.note("time", got["modulations"], torch.stack(want.blocks))
            self.note("time", got["modulation_head"], want.head)

    def text(self) -> None:
        """Embedding and, from torch's embedding, the keys and values of every layer."""
        self.cross = self.model.project_text(self._prompt())
        rows = torch.cat([self._prompt(), torch.zeros(1, self.config.model.text_dim)])
        context, dtype = self.model.text_embedding(rows), self.manifest.dtype
        self.note("text", self.call("text", 0, {"embeds": rows.to(dtype)})["context"], context)
        for layer, cache in enumerate(self.cross):
            got = self.call("cross", layer, {"context": context.to(dtype)})
            for name, want in (("cross_k", cache.k), ("cross_v", cache.v)):
                self.note(f"cross {layer}", got[name], want)

    def _prompt(self) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        tokens = min(PROMPT_TOKENS, self.config.model.text_len - 1)
        return torch.randn(tokens, self.config.model.text_dim, generator=generator)

    def _latents(self) -> Tensor:
        config, video = self.config, self.config.video
        return self.noise(config.memory.chunk_frames, config.model.in_channels, video.latent_height, video.latent_width)

    def segments(self) -> None:
        """Both backends on the operands of a pass through the model."""
        memory = Memory(self.config, self.ops, torch.float32)
        timestep = Schedule(self.config.sampler).warped[-1]
        walk(_Beside(self), memory, self._latents(), Pass(0), self.model.modulate(timestep), self.cross)

    def decoder(self) -> None:
        """Three chunks of a stream through the decoder's graphs and through what they were traced from."""
        if self.codec is None or "decoder" not in self.manifest.graphs:
            return
        parts = {part.name: part for part in decoder_parts(self.config, self.codec, torch.float32)}

        def call(name: str, operands: dict[str, Tensor]) -> dict[str, Tensor]:
            wide = [operand.float() for operand in operands.values()]
            found = torch.func.functional_call(parts[name].module, weights, tuple(wide))
            return dict(zip(parts[name].outputs, found, strict=True))

        kind = self.manifest.graph("decoder").inputs[0].torch_dtype
        weights = {name: tensor.to(kind).float() for name, tensor in parts["decoder"].weights[0]().items()}
        got = DecoderStream(self.manifest, graph_call(self.manifest, self.runner))
        want = DecoderStream(self.manifest, call)
        for _ in range(3):
            latents = self._latents().to(kind)
            self.note("decoder", got.video(latents), want.video(latents))

    def chunk(self) -> None:
        """A chunk from noise to clean keys, each backend on its own."""
        steps = [self._latents() for _ in self.config.sampler.steps]
        ran = []
        for segments, dtype in ((self.graphs, self.manifest.dtype), (self.torch, torch.float32)):
            scheduler = ChunkScheduler(self.model, segments, Schedule(self.config.sampler))
            memory = Memory(self.config, self.ops, dtype)
            cross = [narrowed(cache, dtype) for cache in self.cross]
            x0 = scheduler.denoise(memory, cross, 0, steps.__getitem__)
            flow, _ = scheduler.clean_pass(memory, cross, 0, x0, full=True)
            ran.append((x0, flow, memory.pool.k, memory.pool.v))
        for name, got, want in zip(("x0", "clean flow", "keys", "values"), *ran, strict=True):
            self.note(f"chunk: {name}", got, want, order=2)


class _LockStep(GraphSegments):
    """Graphs for a fixed number of sessions, all of them at the same place: the results are those of the last."""

    def _run(self, graph: str, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sessions = self.manifest.sessions
        if not isinstance(sessions, int) or sessions == 1:
            return super()._run(graph, index, tensors)
        shared = [name for name in tensors if name.startswith("modulation")]
        every = {n: t if n in shared else t.repeat(sessions, *[1] * (t.ndim - 1)) for n, t in tensors.items()}
        found = super()._run(graph, index, every)
        return {name: tensor[-(tensor.shape[0] // sessions) :] for name, tensor in found.items()}


class _Beside:
    """Segments of both backends side by side on the same operands; the walk goes on with torch's results."""

    def __init__(self, check: _Check) -> None:
        self._check, self.layers, self.norms = check, check.torch.layers, check.torch.norms
        self._dtype = check.manifest.dtype

    def first(self, latents: Tensor, modulation: Modulation, **_: object):
        return self._compare("first", "first", latents, modulation)

    def middle(self, layer: int, x: Tensor, attended: Tensor, modulation: Modulation, cross: CrossCache, **_: object):
        operands = self._rounded(x), self._rounded(attended), modulation, narrowed(cross, self._dtype)
        return self._compare(f"middle {layer}", "middle", layer, *operands)

    def last(self, x: Tensor, attended: Tensor, modulation: Modulation, cross: CrossCache, **_: object):
        operands = self._rounded(x), self._rounded(attended), modulation, narrowed(cross, self._dtype)
        return self._compare("last", "last", *operands)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype)

    def _compare(self, name: str, method: str, *operands: Any) -> Any:
        """Run the graph first: torch updates x in place."""
        got = getattr(self._check.graphs, method)(*operands)
        want = getattr(self._check.torch, method)(*(_wide(operand) for operand in operands))
        for each, other in zip(_flat(got), _flat(want), strict=True):
            self._check.note(name, each, other)
        return want


def _wide(operand: Any) -> Any:
    if isinstance(operand, CrossCache):
        return narrowed(operand, torch.float32)
    return operand.float() if torch.is_tensor(operand) else operand


def _flat(found: Any) -> list[Tensor]:
    return [found] if torch.is_tensor(found) else [found[0], *found[1]]


def narrowed(cache: CrossCache, dtype: torch.dtype) -> CrossCache:
    """A prompt's keys and values in another type; their bias stays in float32."""
    return CrossCache(cache.k.to(dtype), cache.v.to(dtype), cache.bias)
