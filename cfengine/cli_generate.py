"""The generate command: checks first, then a stream into a file, with progress and a clean stop at any moment."""

from __future__ import annotations

import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cfengine.config import POLICIES, VideoConfig, precision, preset
from cfengine.errors import CFEngineError, ConfigError, OutputError, PromptError
from cfengine.provenance import Record
from cfengine.video import VideoWriter, check_output

if TYPE_CHECKING:
    from cfengine.cli_display import PlainDisplay
    from cfengine.config import EngineConfig
    from cfengine.engine import Engine
    from cfengine.types import Frame

DEFAULT_SECONDS = 4.0
DTYPES = ("float32", "bfloat16")
SMALL = 128  # videos up to this width are written larger by default, since players show them at their own size
SMALL_SCALE = 4


@dataclass(frozen=True)
class Request:
    """What the user asked for; `check` raises before anything is loaded or written."""

    prompt: str
    output: Path
    model: str = "tiny-world"
    seconds: float | None = None
    frames: int | None = None
    seed: int = 0
    policy: str | None = None
    size: str | None = None  # WIDTHxHEIGHT
    taehv: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    precision: str | None = None
    threads: int | None = None
    scale: int | None = None
    provenance: bool = True
    record_prompt: bool = False
    backend: str = "torch"
    exported: Path | None = None
    image: Path | None = None
    video: Path | None = None

    def check(self) -> None:
        """Refuse what cannot work: ConfigError, PromptError or OutputError with the remedy."""
        if not self.prompt.strip():
            raise PromptError('the prompt is empty; say what to show, such as "pan right over green hills"')
        if self.seconds is not None and self.frames is not None:
            raise ConfigError(
                f"--seconds {self.seconds:g} and --frames {self.frames} both give a length; give one of them"
            )
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"--seconds is {self.seconds:g}; give a length above 0")
        for option, value in (("--frames", self.frames), ("--threads", self.threads), ("--scale", self.scale)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} is {value}; give a whole number of at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; give a whole number of at least 0")
        if self.policy is not None and self.policy not in POLICIES:
            raise ConfigError(f"unknown policy {self.policy!r}; choose one of {', '.join(POLICIES)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"unknown device {self.device!r}; give cpu, cuda or cuda:N")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.precision is not None:
            precision(self.precision)
        if self.record_prompt and not self.provenance:
            raise ConfigError("--record-prompt and --no-provenance exclude each other; give one of them")
        if self.backend != "torch" or self.exported is not None:
            self._check_backend()
        if self.pixels is not None:
            VideoConfig(*self.pixels)
        if self.image is not None and self.video is not None:
            raise ConfigError("--image and --video are both given; a video goes on from one of them")
        for option, path in (("--image", self.image), ("--video", self.video)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{option} {path} is no file; give the path of a picture or a video")
        if "/" not in self.model and not Path(self.model).exists():
            preset(self.model)  # neither a path nor owner/name: only a preset's name is left
        check_output(self.output)

    def _check_backend(self) -> None:
        from cfengine.choices import check_backend

        check_backend(self.backend, self.exported)
        wanted = {"onnxruntime": "cpu", "tensorrt": "cuda"}.get(self.backend)
        if wanted and not self.device.startswith(wanted):
            raise ConfigError(
                f"backend {self.backend!r} does not run on device {self.device!r}; give --device {wanted}"
            )

    @property
    def past(self) -> dict[str, Path]:
        """What the video goes on from, as `Engine.stream` takes it."""
        return {name: path for name, path in (("image", self.image), ("video", self.video)) if path is not None}

    @property
    def pixels(self) -> tuple[int, int] | None:
        """See `pixels_of`."""
        return pixels_of(self.size)

    def frame_count(self, fps: float) -> int:
        """Video frames to make: at least --seconds of them."""
        return self.frames or math.ceil((self.seconds or DEFAULT_SECONDS) * fps - 1e-6)

    def scale_for(self, width: int) -> int:
        return self.scale or (SMALL_SCALE if width <= SMALL else 1)


def pixels_of(size: str | None) -> tuple[int, int] | None:
    """(width, height) of --size, or None where it was not given; ConfigError for anything but WIDTHxHEIGHT."""
    if size is None:
        return None
    width, found, height = size.lower().partition("x")
    if not (found and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size is {size!r}; give WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)


class Stopped(KeyboardInterrupt):
    """A request to stop; `signum` tells which signal brought it."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class StopRequests:
    """Ctrl-C and SIGTERM, raised at once while the engine works and held back while a file is being written."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._held = 0
        self._pending = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, _frame: object) -> None:
        if self._held:
            self._pending = signum
        else:
            self._held += 1  # one request is enough: the way out is not interrupted again
            raise Stopped(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish the block first; a request that came meanwhile is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            self._held += 1
            raise Stopped(self._pending)


@dataclass
class Tally:
    """Running totals of a stream, for the display and the last line."""

    wanted: int
    began: float = field(default_factory=time.perf_counter)
    frames: int = 0
    first: float = 0.0  # seconds until the first frame
    last: float = 0.0  # seconds until the latest frame
    chunks: dict[int, float] = field(default_factory=dict)
    promotions: int = 0
    evictions: int = 0

    def add(self, frame: Frame) -> bool:
        """Count a frame; return whether it begins a chunk."""
        self.last = time.perf_counter() - self.began
        if not self.frames:
            self.first = self.last
        self.frames += 1
        timings = frame.timings
        if timings.chunk in self.chunks:
            return False
        self.chunks[timings.chunk] = timings.total
        self.promotions += timings.memory.promotions
        self.evictions += timings.memory.evictions
        return True

    @property
    def rate(self) -> float:
        """Frames a second since generation began, the prompt's encoding included."""
        return self.frames / self.last if self.last else 0.0

    def words(self, chunk_seconds: float) -> str:
        return (
            f"{self.rate:.1f} frames/s, chunk {chunk_seconds * 1e3:.0f} ms, "
            f"{self.promotions} promotions, {self.evictions} evictions"
        )

    @property
    def now(self) -> str:
        return self.words(list(self.chunks.values())[-1]) if self.chunks else "first chunk"

    @property
    def summary(self) -> str:
        return self.words(median(self.chunks.values())) if self.chunks else ""


def run(request: Request) -> int:
    """Carry out a request; return the exit code. Mistakes are raised before the model loads."""
    from cfengine.cli_display import display

    request.check()
    with StopRequests() as stops, display() as show:
        try:
            show.loading(request.model)
            engine = load(request, show.preparing)
        except KeyboardInterrupt as stop:
            show.stopped(f"stopped before the first frame; nothing was written to {request.output}")
            return exit_code(stop)
        with engine:
            video = engine.config.video
            tally = Tally(request.frame_count(video.fps))
            scale, record = request.scale_for(video.width), record_of(request, engine.config)
            with VideoWriter(request.output, fps=video.fps, scale=scale, record=record) as writer:
                return stream(request, engine, tally, writer, stops, show)


def record_of(request: Request, config: EngineConfig) -> Record | None:
    """What the file is to say of its making. A model of a local path is told by its name, not by where it lies."""
    from cfengine.sources import sources_of

    if not request.provenance:
        return None
    local = Path(request.model)
    weights = Path(sources_of(request.model, config).dit)
    return Record(
        model=local.resolve().name if local.exists() else request.model,
        weights=weights if weights.is_file() else None,
        seed=request.seed,
        prompt=request.prompt if request.record_prompt else "",
    )


def load(request: Request, progress: Callable[[str, int, int], None]) -> Engine:
    """Build the engine; the heavy imports happen here.  progress: see `Engine.from_pretrained`"""
    from cfengine import Engine

    return Engine.from_pretrained(
        request.model,
        device=request.device,
        dtype=request.dtype,
        precision=request.precision,
        policy=request.policy,
        size=request.pixels,
        taehv=request.taehv,
        threads=request.threads,
        backend=request.backend,
        exported=request.exported,
        progress=progress,
    )


def stream(
    request: Request, engine: Engine, tally: Tally, writer: VideoWriter, stops: StopRequests, show: PlainDisplay
) -> int:
    """Stream into the writer until done, stopped or failed; the file is closed and named in every case."""
    trouble: BaseException | None = None
    try:
        show.begin(tally)
        asked = {"seed": request.seed, "num_frames": tally.wanted, **request.past}
        with closing(engine.stream(request.prompt, **asked)) as frames:
            for frame in frames:
                with stops.held():
                    writer.write(frame.pixels)
                    show.update(tally, tally.add(frame))
    except (KeyboardInterrupt, Exception) as error:
        trouble = error
    try:
        with stops.held():
            writer.close()
    except OutputError as error:
        trouble = trouble or error
    except KeyboardInterrupt as stop:
        trouble = trouble or stop
    return finish(writer, tally, trouble, show)


def finish(writer: VideoWriter, tally: Tally, trouble: BaseException | None, show: PlainDisplay) -> int:
    """Say what is in the file and return the exit code; an error before the first frame is raised as it came."""
    if trouble is not None and not writer.frames and not isinstance(trouble, KeyboardInterrupt):
        raise trouble
    width, height = writer.size
    rate = float(writer.fps)
    content = f"{writer.path}: {writer.frames} frames, {writer.seconds:.1f} s at {rate:g} frames/s, {width}x{height}"
    if trouble is None:
        show.done(f"{content}\n{tally.summary}; first frame after {tally.first:.2f} s")
        return 0
    kept = content if writer.frames else f"nothing was written to {writer.path}"
    if isinstance(trouble, KeyboardInterrupt):
        show.stopped(f"stopped after {writer.frames} of {tally.wanted} frames; {kept}")
        return exit_code(trouble)
    what = str(trouble) if isinstance(trouble, CFEngineError) else f"{type(trouble).__name__}: {trouble}"
    show.failed(what)
    show.stopped(f"failed after {writer.frames} of {tally.wanted} frames; {kept}")
    if not isinstance(trouble, CFEngineError):
        sys.excepthook(type(trouble), trouble, trouble.__traceback__)
    return 1


def exit_code(stop: BaseException) -> int:
    """128 + signal number, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)
