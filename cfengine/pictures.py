"""Pictures that a live video goes on from: read, fitted to its size, in groups that an encoder takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cfengine.config import EngineConfig
from cfengine.errors import ConfigError
from cfengine.video import read_video

Pictures = np.ndarray | str | Path


class Past:
    """Frames of a given video, or a given picture, as chunks.

    What is given ends where a chunk does: frames too many are left out at its beginning, and where there are fewer
    than the first chunk shows the first frame is repeated before it. So one picture is a first chunk of standing still,
    which is how models that denoise several latent frames at once take one: they know no chunk that is half given.
    """

    def __init__(self, config: EngineConfig, *, image: Pictures | None = None, video: Pictures | None = None) -> None:
        """image: (height, width, 3)      video: (frames, height, width, 3)      uint8 RGB, or a file

        A video file is read twice, the first time to count its frames; of an image file that holds several the first
        counts. Every frame is one of this video's, whatever rate the file has.
        Raises ConfigError for both, neither or another type or shape, OutputError for a file that cannot be read.
        """
        if (image is None) == (video is None):
            raise ConfigError(f"{'neither' if image is None else 'both'} of image and video given; give one of them")
        self._source = video if image is None else image
        self._single = image is not None
        if not isinstance(self._source, Pictures):
            raise ConfigError(
                f"the {'image' if self._single else 'video'} to go on from is a {type(self._source).__name__}; give an "
                "array of uint8 or the path of a file"
            )
        if isinstance(self._source, np.ndarray):
            _check("image" if self._single else "video", self._source)
        self._config = config
        self._count = 1 if self._single else sum(1 for _ in self._frames())
        if not self._count:
            raise ConfigError("the video to go on from has no frames; give at least one")

    def _frames(self) -> Iterator[np.ndarray]:
        """Frames as they are given."""
        if not isinstance(self._source, np.ndarray):
            yield from islice(read_video(self._source), 1 if self._single else None)
        elif self._single:
            yield self._source
        else:
            yield from self._source

    def chunks(self) -> Iterator[np.ndarray]:
        """Frames of one chunk after the other, fitted: (frames, height, width, 3) uint8."""
        video, frames = self._config.video, self._config.memory.chunk_frames
        first, later = 1 + (frames - 1) * video.temporal_stride, frames * video.temporal_stride
        skipped = max(0, self._count - first) % later
        wanted, group = first, []
        for number, frame in enumerate(self._frames()):
            if number < skipped:
                continue
            frame = fitted(frame, video.width, video.height)
            group += [frame] * (1 + max(0, first - self._count) if number == skipped else 1)
            if len(group) == wanted:
                yield np.stack(group)
                wanted, group = later, []


def _check(name: str, given: np.ndarray) -> None:
    """Raise ConfigError unless an array is pictures."""
    shape = "(height, width, 3)" if name == "image" else "(frames, height, width, 3)"
    if given.dtype != np.uint8 or given.ndim != shape.count(",") + 1 or given.shape[-1] != 3 or not given.size:
        raise ConfigError(
            f"{name} is {given.dtype} {given.shape}; give uint8 RGB of shape {shape}, nothing of it empty, or the "
            "path of a file"
        )


def fitted(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture at a size, as it is where it has that size already.

    Of a picture of another shape the middle is taken, as large as it goes, and scaled (bicubic, with antialiasing).
    frame: (h, w, 3) uint8 -> (height, width, 3) uint8
    """
    if frame.shape[:2] == (height, width):
        return frame
    rows, columns = frame.shape[:2]
    tall, wide = min(rows, max(1, round(columns * height / width))), min(columns, max(1, round(rows * width / height)))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    middle = torch.from_numpy(np.ascontiguousarray(frame[top : top + tall, left : left + wide]))
    planes = middle.permute(2, 0, 1)[None].float()
    scaled = F.interpolate(planes, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
