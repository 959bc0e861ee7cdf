"""Build once (weights, operations, codec, text encoder), stream many."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfengine.backends import open_backend
from cfengine.batch import Batch
from cfengine.choices import check_backend, check_sessions, device_type, rounded
from cfengine.codec import Codec
from cfengine.config import POLICIES, EngineConfig, with_policy
from cfengine.device import check_device, check_fits, device_errors
from cfengine.errors import CFEngineError, ConfigError, PromptError
from cfengine.events import Prompt, check_seed
from cfengine.lanes import Lanes
from cfengine.loading import configured, load
from cfengine.memory.budget import PageCount
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.model.text import TextEncoder
from cfengine.ops import HINTS, OPERATIONS, Ops, not_built, row, select
from cfengine.pictures import Past, Pictures
from cfengine.ranges import spanned
from cfengine.scheduler.batch import per_session
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.director import first_text
from cfengine.scheduler.graphs import CudaRuntime, open_runtime
from cfengine.scheduler.lane import Lane
from cfengine.scheduler.prompts import PromptCache, pure
from cfengine.scheduler.sampler import Schedule, near_share
from cfengine.scheduler.scenes import timeline
from cfengine.session import Session, check_num_frames
from cfengine.snapshot import Snapshot, fingerprint, made_for
from cfengine.stream import Stream

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
        max_sessions: int | None = None,
        efforts: bool = False,
    ) -> None:
        """Take ready parts; `from_pretrained` loads them. model is moved to device and dtype and laid out here.

        graphs: on a GPU, replay captured passes; without, every kernel is launched anew, as a profile by name needs
        backend, exported, progress, max_sessions, efforts: see `from_pretrained`
        """
        check_sessions(max_sessions)
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
        if device_type(device) == "cuda":
            check_device(device)
            self.ops = dataclasses.replace(self.ops, **{op: spanned(op, getattr(self.ops, op)) for op in OPERATIONS})
            missing_bytes = sum(p.nbytes for p in model.parameters() if p.device.type != "cuda")
            check_fits(f"the model of {config.name!r}", missing_bytes, config, device, dtype.itemsize)
        with device_errors(config, device, dtype.itemsize):
            model = model.to(device=device, dtype=dtype)
            self._fingerprint = fingerprint(model.named_parameters())  # before anything is rounded or let go
            self.model = model.prepare(rounded(config, backend))
        self._runtime = open_runtime(device, graphs)
        reduced = efforts or self._runtime is None
        self._schedule = Schedule(config.sampler, reduced=reduced, near=near_share(config))
        queue = self._runtime.on(self._runtime.compute) if self._runtime else nullcontext()
        self._segments = open_backend(
            backend, config, self.model, self.ops, text, queue, exported=exported, progress=progress
        )
        self._scheduler = self._make_scheduler(self.ops)
        check = getattr(text, "check", lambda prompt: None)  # not every encoder can tell before it encodes
        run = _beside(config, device, dtype, self._runtime)
        self._prompts = PromptCache(text.encode, _projection(self.model, device), run, check)
        self._lanes = Lanes(config, self.ops, self._scheduler, codec, dtype, device, self._runtime, max_sessions)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
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
        max_sessions: int | None = None,
        efforts: bool = False,
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
        max_sessions: pages for so many sessions at once are allocated here, and none later; one more is refused with
        CapacityError. None allocates for each session when it opens
        efforts: on a GPU, capture the passes of every level of `Session.efforts`, one graph more for each level and
        number of sessions of a lane; without, chunks there have full effort alone. A CPU has all levels as it is
        Raises ConfigError, CheckpointError, KernelError, ExportError or DeviceError.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1")
        if device_type(device) != "cpu":
            check_device(device)
        check_backend(backend, exported)
        check_sessions(max_sessions)
        name = str(source)
        config = configured(name, config, policy=policy, size=size, precision_name=precision, taehv=taehv is not None)
        # a choice that is not built fails before any weights load
        select(device_type(device), dict(config.kernels), fp8=config.precision.fp8)
        if threads is not None:
            torch.set_num_threads(threads)
        parts = load(name, config, device, dtype, taehv)
        return cls(
            config,
            parts.model,
            parts.codec,
            parts.text,
            device=device,
            dtype=parts.dtype,
            graphs=graphs,
            backend=backend,
            exported=exported,
            progress=progress,
            max_sessions=max_sessions,
            efforts=efforts,
        )

    def implementations(self) -> dict[str, str]:
        """Which implementation serves each operation."""
        return dict(self.ops.names)

    @property
    def pages(self) -> PageCount | None:
        """Pages of all sessions, where there is a budget (`max_sessions`); waits for what is queued on a GPU."""
        self._check_open()
        return self._lanes.pages()

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

    def _make_scheduler(self, ops: Ops) -> ChunkScheduler:
        ops = dataclasses.replace(ops, cross_attention=per_session(ops))
        return ChunkScheduler(self.model, self._segments(ops), self._schedule)

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        latents: Tensor | None = None,
        image: Pictures | None = None,
        video: Pictures | None = None,
        policy: str | None = None,
        frames: str = "host",
    ) -> Session:
        """Open a live video, which may have a past; frames of that are not given again, and indices go on after them.

        latents: (frames, channels, height, width), whole chunks      image: (H, W, 3) uint8 RGB, or a file
        video: (n, H, W, 3) uint8 RGB of any length, or a file      see `Past` for how pictures are fitted to chunks
        policy: another memory rule over the same number of slots
        frames: "host", or on a GPU "device": `Frame.pixels` is then a tensor there, and nothing is copied to the host
        On a GPU, pages and captured graphs of a session that was closed or dropped serve the next one; they are let go
        where memory is short, and when the engine is closed.
        Raises PromptError, ConfigError for a bad seed, past or place of frames, CapacityError for one more than
        `max_sessions`, OutputError for a file that cannot be read.
        """
        self._check_open()
        check_seed(seed)
        on_device = self._stay(frames)
        given = [name for name, past in (("latents", latents), ("image", image), ("video", video)) if past is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; a session goes on from one of them")
        pictures = Past(self.config, image=image, video=video) if given and latents is None else None
        session = self._alone(prompt, seed, self._ruled(policy), on_device)
        with _closed_on_error(session):
            if latents is not None:
                session.prime(latents)
            if pictures is not None:
                self._prime(session, pictures)
        return session

    def _prime(self, session: Session, pictures: Past) -> None:
        """Encode pictures and give them to a session as its past, chunk by chunk."""
        encoder = self.codec.encoder()
        for frames in pictures.chunks():
            with device_errors(self.config, self.device, self.dtype.itemsize):
                latents = encoder.encode(frames)
            session.prime(latents)

    def _stay(self, frames: str) -> bool:
        """Whether frames stay on the device.  Raises ConfigError for what cannot be."""
        if frames not in ("host", "device"):
            raise ConfigError(f"frames is {frames!r}; choose 'host' or 'device'")
        if frames == "device" and self._runtime is None:
            raise ConfigError(
                f"frames can stay on a GPU alone, and this engine runs on {self.device}; load it with device='cuda', "
                "or ask for frames in host memory"
            )
        return frames == "device"

    def resume(self, snapshot: Snapshot, *, frames: str = "host") -> Session:
        """Open a session at a snapshot; it goes on bit for bit as the one that was taken would have.

        frames: see `session`
        Raises SnapshotError for a snapshot of another model or configuration, else as `session`.
        """
        self._check_open()
        policy, config = snapshot.made_for.get("memory.policy"), self.config
        if policy in POLICIES:
            with suppress(ConfigError):  # where it cannot be, the snapshot is not of this engine
                config = self._ruled(policy)
        snapshot.check_made_for(self._fits(config))
        prompt, seed = first_text(snapshot.about["director"]), snapshot.about["seed"]
        session = self._alone(prompt, seed, config, self._stay(frames))
        with _closed_on_error(session):
            session.rewind(snapshot)
        return session

    def batch(self, prompts: Sequence[str] = (), *, seeds: Sequence[int] | None = None) -> Batch:
        """Open live videos that move in lock-step, one a prompt; others may join, and each may leave (`Batch`).

        seeds: one each, 0, 1, 2, ... where not given
        On a GPU the graphs of every number of sessions are captured here, up to `max_sessions`, else as many as there
        are prompts; closed, they serve the next batch.
        """
        self._check_open()
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds; give a seed each")
        lane = self._lanes.shared(len(prompts))
        batch = Batch(lane, partial(self._join, lane), self._lanes.keep)
        self._lanes.lend(lane, batch)
        with _closed_on_error(batch):
            for prompt, seed in zip(prompts, seeds, strict=True):
                batch.join(prompt, seed=seed)
        return batch

    def _join(self, lane: Lane, prompt: str, seed: int, policy: str | None, left: Callable[[Session], None]) -> Session:
        """A session of a batch; left: told when it closes."""
        self._check_open()
        check_seed(seed)
        config = self._ruled(policy)
        place = self._lanes.join(lane, config)

        def gone(session: Session) -> None:
            self._sessions.discard(session)
            left(session)

        try:
            return self._session(lane, prompt, seed, config, gone, place)
        except BaseException:
            lane.leave(place)
            raise

    def _alone(self, prompt: str, seed: int, config: EngineConfig, on_device: bool) -> Session:
        """A session with a lane of its own."""
        lane = self._lanes.alone(seed, config)
        try:
            session = self._session(lane, prompt, seed, config, partial(self._left, lane), on_device=on_device)
        except BaseException as error:
            if not isinstance(error, PromptError):  # which leaves the lane as it was
                lane.close()
            self._lanes.keep(lane)
            raise
        self._lanes.lend(lane, session)
        return session

    def _left(self, lane: Lane, session: Session) -> None:
        self._sessions.discard(session)
        self._lanes.keep(lane, session)

    def _session(
        self, lane: Lane, prompt: str, seed: int, config: EngineConfig, on_close, place=None, on_device: bool = False
    ) -> Session:
        session = Session(
            config, lane, self._prompts, prompt, seed, on_close, place=place, made_for=self._fits(config),
            resume=self.resume, on_device=on_device,
        )  # fmt: skip
        self._sessions.add(session)
        return session

    def _ruled(self, policy: str | None) -> EngineConfig:
        """The configuration of a session; policy: its own, None for the engine's."""
        if policy is None:
            return self.config
        return dataclasses.replace(self.config, memory=with_policy(self.config.memory, policy))

    def _fits(self, config: EngineConfig) -> dict:
        """What a snapshot of a session of such a configuration says of itself."""
        return made_for(config, self.dtype, self._fingerprint)

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        image: Pictures | None = None,
        video: Pictures | None = None,
    ) -> Stream:
        """Yield frames as soon as each chunk is decoded, before its clean pass.

        num_frames: video frames, any positive number (natural lengths are 9 + 12 k); None never ends
        image, video: what it goes on from, see `session`; not counted in num_frames
        The same seed gives the same frames whatever was streamed before. Closing the stream stops the work, as does the
        end of `with engine.stream(...) as frames`. Bad arguments raise at the call, not at the first frame.
        """
        check_num_frames(num_frames)
        return Stream(self.session(prompt, seed=seed, image=image, video=video), num_frames)

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
        memory: str = "host",
    ) -> Published:
        """Play a new session into a frame ring until `num_frames` are out or `stop()` says so; returns the counts.

        ring: its name, which programs open (docs/embed.md); it is made here and goes with the return
        format: "rgba8" or "nv12"      say: told one sentence for each event of a program that makes no sense
        memory: "host", or on a GPU "opaque_fd" or "cuda_ipc": frames never leave the card (see `Ring`)
        Raises RingError where the ring cannot be made, and as `session`.
        """
        from cfengine.serve import publish  # late: it needs the compiled extension

        about = {"seed": seed, "num_frames": num_frames, "format": format, "memory": memory}
        return publish(self, prompt, ring, stop=stop, say=say, **about)

    def _check_open(self) -> None:
        if self._closed:
            raise CFEngineError("this engine is closed; load it again with Engine.from_pretrained(...)")

    def close(self) -> None:
        """Close every session and let the weights go; harmless twice."""
        for user in self._lanes.users():
            user.close()
        self._lanes.drop()
        self._prompts.close()
        self._closed = True
        self.model = self.codec = self.text = self._scheduler = self._segments = self._runtime = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def _closed_on_error(opened: Session | Batch) -> Iterator[None]:
    """Close what was just opened if it cannot be made ready."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


def _projection(model: CausalDiT, device: torch.device | str) -> Callable[[Tensor], list[CrossCache]]:
    """Rows of a prompt to keys and values. It holds the model and not the engine, which is free to be let go."""
    return lambda rows: model.project_text(rows.to(device))


def _beside(config: EngineConfig, device: torch.device | str, dtype: torch.dtype, runtime: CudaRuntime | None):
    """What runs the encoding of a prompt, in any thread, beside the passes of sessions."""

    def run(work: Callable[[], list[CrossCache]]) -> list[CrossCache]:
        with device_errors(config, device, dtype.itemsize), torch.inference_mode():
            return runtime.aside(work) if runtime else work()

    return run
