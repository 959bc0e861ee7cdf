"""Where the frames of the quality bench come from: a video file, or a model that makes them now."""

from __future__ import annotations

import math
import mimetypes
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from cfengine.bench.quality_windows import Timed
from cfengine.checkpoint import SUFFIXES
from cfengine.config import PRESETS
from cfengine.engine import Engine
from cfengine.errors import ConfigError, OutputError
from cfengine.video import decode_video


def is_model(source: str) -> bool:
    """Tell a model (preset, folder, weight file, hub id) from a video file; OutputError for a file that is not there.

    A file that is no weight file is taken for a video: whether it is one shows when it is opened.
    """
    path = Path(source).expanduser()
    if source in PRESETS or path.is_dir() or path.name.endswith(SUFFIXES):
        return True
    if path.is_file():
        return False
    kind = mimetypes.guess_type(path.name)[0] or ""
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and not kind.startswith("video/"):
        return True
    raise OutputError(
        f"{source!r} is neither a video file nor a model: there is no such file or folder, "
        f"and the presets are {', '.join(PRESETS)}; check the path"
    )


def video_frames(path: str | Path) -> Iterator[Timed]:
    """Frames of a file by their own times, so that a varying frame rate is no trouble.

    OutputError: no video, damaged, or a frame without a time.
    """
    begin = None
    for frame in decode_video(Path(path).expanduser()):
        if frame.pts is None or frame.time_base is None:
            raise OutputError(f"{path} has frames without times; put it into a container such as mp4 first")
        time = frame.pts * frame.time_base
        begin = time if begin is None else begin
        yield time - begin, partial(frame.to_ndarray, format="rgb24")


def model_frames(source: str, prompt: str, length: Fraction, seed: int, device: str) -> Iterator[Timed]:
    """Frames of a stream of `length` seconds; close the iterator to let the engine go."""
    with Engine.from_pretrained(source, device=device) as engine:
        fps = Fraction(engine.config.video.fps).limit_denominator(1001)
        for frame in engine.stream(prompt, seed=seed, num_frames=math.ceil(length * fps)):
            yield frame.index / fps, partial(np.asarray, frame.pixels)


def check_length(length: Fraction) -> None:
    """ConfigError for a stream of no length."""
    if length <= 0:
        raise ConfigError(f"--seconds is {float(length):g}; give a length above 0")
