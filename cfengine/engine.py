"""Build once (weights, operations, codec, text encoder), stream many."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfengine.choices import check_backend, device_type, dtype_of, rounded, text_encoder, used_operations
from cfengine.codec import Codec, load_codec
from cfengine.config import EngineConfig, with_policy
from cfengine.config import precision as config_precision
from cfengine.device import check_device, check_fits, device_errors, page_bytes
from cfengine.errors import CFEngineError, ConfigError, DeviceError, PromptError
from cfengine.events import Prompt
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.model.text import TextEncoder
from cfengine.model.weights import load_dit
from cfengine.ops import HINTS, OPERATIONS, Ops, not_built, row, select
from cfengine.pictures import Past, Pictures
from cfengine.ranges import spanned
from cfengine.scheduler.batch import per_session
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.device_lane import DeviceLane
from cfengine.scheduler.director import first_text
from cfengine.scheduler.graphs import CudaRuntime, check_captured
from cfengine.scheduler.idle import IdleLanes
from cfengine.scheduler.lane import HostLane, Lane
from cfengine.scheduler.prompts import PromptCache, pure
from cfengine.scheduler.sampler import Schedule
from cfengine.scheduler.scenes import timeline
from cfengine.segments.exported import GraphSegments
from cfengine.segments.torch import TorchSegments
from cfengine.session import Batch, Session, check_num_frames, check_seed
from cfengine.snapshot import Snapshot, made_for
from cfengine.sources import config_of, sources_of
from cfengine.types import Frame

if TYPE_CHECKING:
    from cfengine.serve import Published


class Engine:
    """A causal video diffusion model, ready to stream.

    with Engine.from_pretrained("tiny-world") as engine:
        for frame in engine.stream("pan right over a desert at sunset", seed=1, num_frames=81):
            show(frame.pixels)
    """

    def __init__(
        self,
        config: EngineConfig,
        model: CausalDiT,
        codec: Codec,
        text: TextEncoder,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        graphs: bool = True,
        backend: str = "torch",
        exported: str | Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Take ready parts; `from_pretrained` loads them. model is moved to device and dtype and laid out here.

        graphs: on a GPU, replay captured passes; without, every kernel is launched anew, as a profile by name needs
        backend, exported, progress: see `from_pretrained`
        """
        self.config, self.codec, self.text = config, codec, text
        self.device, self.dtype = device, dtype
        self.ops = select(device_type(device), dict(config.kernels), fp8=config.precision.fp8)
        missing = [op for op in not_built(device_type(device), self.ops.names) if op not in dict(config.kernels)]
        if missing:
            hint = HINTS[row(missing[0], device_type(device))[0].name]
            warnings.warn(
                f"compiled kernels are missing, so plain torch serves {', '.join(missing)}, slower; {hint}",
                stacklevel=2,
            )
        self._runtime: CudaRuntime | None = None
        if device_type(device) == "cuda":
            check_device(device)
            self.ops = dataclasses.replace(self.ops, **{op: spanned(op, getattr(self.ops, op)) for op in OPERATIONS})
            missing_bytes = sum(p.nbytes for p in model.parameters() if p.device.type != "cuda")
            check_fits(f"the model of {config.name!r}", missing_bytes, config, device, dtype.itemsize)
        with device_errors(config, device, dtype.itemsize):
            self.model = model.to(device=device, dtype=dtype).prepare(rounded(config, backend))
        if device_type(device) == "cuda":
            self._runtime = CudaRuntime(device, graphs=graphs)
        self._segments = self._open_segments(backend, exported, progress)
        self._scheduler = self._make_scheduler(self.ops)
        check = getattr(text, "check", lambda prompt: None)  # not every encoder can tell before it encodes
        run = _beside(config, device, dtype, self._runtime)
        self._prompts = PromptCache(text.encode, _projection(self.model, device), run, check)
        self._made_for = made_for(config, dtype, [self.model.head.modulation, self.model.patch_embedding.bias])
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._idle = IdleLanes()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "tiny-world",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        config: EngineConfig | None = None,
        policy: str | None = None,
        size: tuple[int, int] | None = None,
        taehv: str | Path | None = None,
        precision: str | None = None,
        threads: int | None = None,
        graphs: bool = True,
        backend: str = "torch",
        exported: str | Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load a preset, a local checkpoint (file or folder, also one that `cfengine.training` made) or a hub id.

        dtype: "float32" or "bfloat16" (default: float32 for small-world models, bfloat16 for the others)
        config: overrides the preset's configuration; a checkpoint without one is taken as Context Forcing at the sizes
        its tensors show      policy: another memory rule over the same number of slots
        size: (width, height) in pixels      taehv: `taew2_1` weights (file, folder or hub id) to decode with, not the
        Wan VAE      precision: "bf16" (products and pages in dtype) or "fp8" (e4m3, see `PrecisionConfig`)
        threads: for torch and the compiled kernels, process-wide      graphs: see `Engine`
        backend: what runs the segments between the attentions: "torch", "onnxruntime" (CPU, float32), "tensorrt" (GPU,
        bfloat16; engines are built on first use) or "auto" (torch, or TensorRT where it measured faster on this GPU)
        exported: folder of `cfengine export`; without one the backend exports into the cache on first use, and calls
        progress(what, done, total) before each step
        Raises ConfigError, CheckpointError, KernelError, ExportError or DeviceError.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1")
        if device_type(device) != "cpu":
            check_device(device)
        check_backend(backend, exported)
        name = str(source)
        if config is None:
            config = config_of(name)
        if policy is not None:
            config = dataclasses.replace(config, memory=with_policy(config.memory, policy))
        if size is not None:
            config = dataclasses.replace(config, video=dataclasses.replace(config.video, width=size[0], height=size[1]))
        if precision is not None:
            config = dataclasses.replace(config, precision=config_precision(precision))
        if taehv is not None:
            config = dataclasses.replace(config, codec="taehv")
        sources = sources_of(name, config)
        # a choice that is not built fails before any weights load
        select(device_type(device), dict(config.kernels), fp8=config.precision.fp8)
        if threads is not None:
            torch.set_num_threads(threads)
        kind = dtype_of(dtype) or (torch.float32 if sources.small else torch.bfloat16)
        with torch.device("meta"):
            model = CausalDiT(config.model)
        if device_type(device) == "cuda":
            needed = sum(p.numel() for p in model.parameters()) * kind.itemsize
            check_fits(f"the model of {config.name!r}", needed, config, device, kind.itemsize)
        with device_errors(config, device, kind.itemsize):
            model.load_state_dict(load_dit(sources.dit, config.model, dtype=kind, device=device), assign=True)
            encoder = text_encoder(config, sources.text, device)
            exact = torch.float32 if device_type(device) == "cpu" else kind
            pixels = load_codec(config, str(taehv or sources.codec), device, exact)
        return cls(
            config,
            model,
            pixels,
            encoder,
            device=device,
            dtype=kind,
            graphs=graphs,
            backend=backend,
            exported=exported,
            progress=progress,
        )

    def implementations(self) -> dict[str, str]:
        """Which implementation serves each operation."""
        return dict(self.ops.names)

    def encode_prompt(self, prompt: str) -> list[CrossCache]:
        """Cross-attention keys and values of a prompt, per layer; PromptError for an empty or too long one."""
        self._check_open()
        return self._prompts.now(pure(Prompt(prompt).text))

    def prefetch(self, prompt: str) -> None:
        """Encode a prompt, all its scenes, beside what runs, so that a session can switch to it without delay.

        Prompts lately used are kept, up to 256 MiB of keys and values. Raises PromptError for what is known to be wrong
        with it; whatever else fails is told when the prompt is used.
        """
        self._check_open()
        for scene in timeline(Prompt(prompt).text, self.config).scenes:
            self._prompts.check(scene.prompt)
            self._prompts.ask(pure(scene.prompt))

    def _queue(self) -> AbstractContextManager:
        """Where a GPU's work is queued, so that no two streams touch the same tensors unawares."""
        return self._runtime.on(self._runtime.compute) if self._runtime else nullcontext()

    def _make_scheduler(self, ops: Ops) -> ChunkScheduler:
        return ChunkScheduler(self.model, self._segments(ops), Schedule(self.config.sampler))

    def _open_segments(self, backend: str, exported, progress) -> Callable[[Ops], TorchSegments | GraphSegments]:
        """What makes segments around given operations."""
        check_backend(backend, exported)
        if backend == "torch":
            return partial(TorchSegments, self.model, grid=self.config.grid)
        if backend in ("tensorrt", "auto"):
            from cfengine.export.tensorrt_backend import open_fastest, open_tensorrt

            opener = open_tensorrt if backend == "tensorrt" else open_fastest
            with self._queue():
                found = opener(self.config, self.model, self.ops, self.text.encode, folder=exported, progress=progress)
            return found.with_ops if found else partial(TorchSegments, self.model, grid=self.config.grid)
        from cfengine.export.backend import open_onnx  # late: it may need the packages of the extra `export`

        return open_onnx(self.config, self.model, self.ops, folder=exported, progress=progress).with_ops

    def _open_lane(self, seeds: list[int]) -> Lane:
        """A lane for new sessions, one a seed: one that was left, or a new one, which idle ones make room for."""
        lane = self._idle.take(seeds)
        if lane is not None:
            return lane
        try:
            return self._new_lane(seeds)
        except DeviceError:
            if not self._idle.drop():
                raise
        return self._new_lane(seeds)

    def _new_lane(self, seeds: list[int]) -> Lane:
        """Pages, tables and decoders of new sessions, one a seed, and what runs them."""
        config, runtime, scheduler, sessions = self.config, self._runtime, self._scheduler, len(seeds)
        if sessions > 1:
            scheduler = self._make_scheduler(dataclasses.replace(self.ops, cross_attention=per_session(self.ops)))
        if runtime:
            needed = sessions * page_bytes(config, self.dtype.itemsize)
            check_fits(f"the memory of {sessions} new session(s)", needed, config, self.device, self.dtype.itemsize)
        with device_errors(config, self.device, self.dtype.itemsize), self._queue():
            memories = [Memory(config, self.ops, self.dtype, self.device) for _ in range(sessions)]
            decoders = [self.codec.decoder() for _ in range(sessions)]
            if runtime is None:
                return HostLane(scheduler, config, memories, decoders)
            if runtime.graphs:
                check_captured(self.ops, used_operations(memories[0].policy.op))
            return DeviceLane(scheduler, config, memories, decoders, seeds, runtime)

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        latents: Tensor | None = None,
        image: Pictures | None = None,
        video: Pictures | None = None,
    ) -> Session:
        """Open a live video, which may have a past; frames of that are not given again, and indices go on after them.

        latents: (frames, channels, height, width), whole chunks      image: (H, W, 3) uint8 RGB, or a file
        video: (n, H, W, 3) uint8 RGB of any length, or a file      see `Past` for how pictures are fitted to chunks
        On a GPU, pages and captured graphs of a closed session serve the next one; they are let go where memory is
        short, and when the engine is closed.
        Raises PromptError, ConfigError for a bad seed or past, OutputError for a file that cannot be read.
        """
        self._check_open()
        check_seed(seed)
        given = [name for name, past in (("latents", latents), ("image", image), ("video", video)) if past is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; a session goes on from one of them")
        pictures = Past(self.config, image=image, video=video) if given and latents is None else None
        (session,), _ = self._open([prompt], [seed])
        try:
            if latents is not None:
                session.prime(latents)
            if pictures is not None:
                self._prime(session, pictures)
        except BaseException:
            session.close()
            raise
        return session

    def _prime(self, session: Session, pictures: Past) -> None:
        """Encode pictures and give them to a session as its past, chunk by chunk."""
        encoder = self.codec.encoder()
        for frames in pictures.chunks():
            with device_errors(self.config, self.device, self.dtype.itemsize):
                latents = encoder.encode(frames)
            session.prime(latents)

    def resume(self, snapshot: Snapshot) -> Session:
        """Open a session at a snapshot; it goes on bit for bit as the one that was taken would have.

        Raises SnapshotError for a snapshot of another model or configuration, else as `session`.
        """
        self._check_open()
        snapshot.check_made_for(self._made_for)
        (session,), _ = self._open([first_text(snapshot.about["director"])], [snapshot.about["seed"]])
        try:
            session.rewind(snapshot)
        except BaseException:
            session.close()
            raise
        return session

    def batch(self, prompts: Sequence[str], *, seeds: Sequence[int] | None = None) -> Batch:
        """Open live videos that move in lock-step, one a prompt; seeds: one each, 0, 1, 2, ... where not given."""
        self._check_open()
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if not prompts or len(seeds) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one, and a seed each")
        for seed in seeds:
            check_seed(seed)
        return Batch(*self._open(prompts, seeds))

    def _open(self, prompts: Sequence[str], seeds: list[int]) -> tuple[list[Session], Lane]:
        """Sessions of one lane, which close together, and the lane."""
        lane = self._open_lane(seeds)
        sessions: list[Session] = []
        members: weakref.WeakSet[Session] = weakref.WeakSet()  # a session that is dropped takes its lane along
        on_close = partial(self._on_close, lane, members)
        try:
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                made = Session(
                    self.config, lane, self._prompts, prompt, seed, on_close, place=place,
                    made_for=self._made_for, resume=self.resume,
                )  # fmt: skip
                sessions.append(made)
                members.add(sessions[-1])
                self._sessions.add(sessions[-1])
        except BaseException as error:
            if not isinstance(error, PromptError):  # which leaves the lane as it was
                lane.close()
            for session in sessions:
                session.close()
            self._keep(lane)
            raise
        return sessions, lane

    def _on_close(self, lane: Lane, members: weakref.WeakSet[Session], session: Session) -> None:
        """Close the other sessions of a lane, which is free when the last is closed."""
        self._sessions.discard(session)
        for other in list(members):
            other.close()
        self._keep(lane)

    def _keep(self, lane: Lane) -> None:
        """Keep what was captured for the next sessions; harmless twice."""
        if isinstance(lane, DeviceLane):
            self._idle.keep(lane)
        else:
            lane.close()  # nothing in it took time to make

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        image: Pictures | None = None,
        video: Pictures | None = None,
    ) -> Iterator[Frame]:
        """Yield frames as soon as each chunk is decoded, before its clean pass.

        num_frames: video frames, any positive number (natural lengths are 9 + 12 k); None never ends
        image, video: what it goes on from, see `session`; not counted in num_frames
        The same seed gives the same frames whatever was streamed before. Closing the generator stops the work.
        Bad arguments raise at the call, not at the first frame.
        """
        check_num_frames(num_frames)
        session = self.session(prompt, seed=seed, image=image, video=video)

        def run() -> Iterator[Frame]:
            with session:
                yield from session.frames(num_frames)

        return run()

    def publish(
        self,
        prompt: str,
        ring: str,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
        format: str = "rgba8",
    ) -> Published:
        """Play a new session into a frame ring until `num_frames` are out or `stop()` says so; returns the counts.

        ring: its name, which programs open (docs/embed.md); it is made here and goes with the return
        format: "rgba8" or "nv12"      say: told one sentence for each event of a program that makes no sense
        Raises RingError where the ring cannot be made, and as `session`.
        """
        from cfengine.embed import Format, Ring
        from cfengine.serve import Publisher

        check_num_frames(num_frames)
        names = {made.name.lower(): made for made in Format}
        if format not in names:
            raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(names)}")
        video = self.config.video
        with self.session(prompt, seed=seed) as session:
            chunk = self.config.memory.chunk_frames * video.temporal_stride
            with Ring(
                ring, video.width, video.height, fps=video.fps, format=names[format], slots=max(24, 2 * chunk)
            ) as made:
                return Publisher(session, made, say=say).run(num_frames=num_frames, stop=stop)

    def _check_open(self) -> None:
        if self._closed:
            raise CFEngineError("this engine is closed; load it again with Engine.from_pretrained(...)")

    def close(self) -> None:
        """Close every session and let the weights go; harmless twice."""
        for session in list(self._sessions):
            session.close()
        self._idle.drop()
        self._prompts.close()
        self._closed = True
        self.model = self.codec = self.text = self._scheduler = self._segments = self._runtime = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _projection(model: CausalDiT, device: torch.device | str) -> Callable[[Tensor], list[CrossCache]]:
    """Rows of a prompt to keys and values. It holds the model and not the engine, which is free to be let go."""
    return lambda rows: model.project_text(rows.to(device))


def _beside(config: EngineConfig, device: torch.device | str, dtype: torch.dtype, runtime: CudaRuntime | None):
    """What runs the encoding of a prompt, in any thread, beside the passes of sessions."""

    def run(work: Callable[[], list[CrossCache]]) -> list[CrossCache]:
        with device_errors(config, device, dtype.itemsize), torch.inference_mode():
            return runtime.aside(work) if runtime else work()

    return run
