"""Writers and readers of real video files: H.264 in mp4, through PyAV."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cfengine.errors import OutputError, ProvenanceError
from cfengine.provenance import SYNTHETIC, Record, sign

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4",)


def check_output(path: str | Path) -> Path:
    """Return `path` as a Path if a video can be written there; nothing is created and nothing is touched.

    OutputError: unsupported suffix, a folder, a parent folder that is missing or no folder, no permission to write.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it, such as {path / 'out.mp4'}")
    if path.suffix.lower() not in SUFFIXES:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise OutputError(
            f"{path} has {found}; a video is written as {', '.join(SUFFIXES)}, so name it {path.stem}.mp4"
        )
    parent = path.absolute().parent
    if not parent.exists():
        raise OutputError(
            f"the folder {parent} does not exist; create it first (mkdir -p '{parent}') or choose another"
        )
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, not a folder; choose another place for {path.name}")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise OutputError(f"{path} exists and cannot be overwritten; remove it or choose another name")
    try:
        # Permission bits do not tell about read-only mounts or quotas; a file that vanishes at once does.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"cannot write into the folder {parent} ({reason}); choose a folder you may write to"
        ) from None
    return path


class VideoWriter:
    """An H.264 mp4 file that grows frame by frame and can be played at whatever frame it ends.

    While it grows the file is a chain of self-contained fragments of one second, so even a killed process leaves a
    file that plays up to the last fragment. `close` rewrites it (packets are copied, not encoded again) with its index
    in front, as players that stream expect. The file is opened at the first frame: a run that produces none leaves an
    older file of that name alone. Colours are BT.709, limited range, and tagged so. What was closed is signed as
    synthetic (`cfengine.provenance`); where it cannot be signed, a warning says why, and the file stays.

    fps: frames a second      scale: whole factor that repeats each pixel      crf: x264 quality, lower is better
    record: what the file says of its making; None leaves it without a record
    """

    def __init__(
        self, path: str | Path, *, fps: float, scale: int = 1, crf: int = 18, record: Record | None = SYNTHETIC
    ) -> None:
        if scale < 1:
            raise OutputError(f"scale is {scale}; give a whole number of at least 1")
        if not fps > 0:
            raise OutputError(f"fps is {fps}; give a positive number of frames a second")
        self.path = check_output(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.scale = scale
        self.crf = crf
        self.record = record
        self.frames = 0
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        return float(self.frames / self.fps)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the file's picture; (0, 0) before the first frame."""
        if not self._shape:
            return 0, 0
        return self._shape[1] * self.scale, self._shape[0] * self.scale

    def write(self, pixels: np.ndarray) -> None:
        """Append one frame. pixels: (height, width, 3) uint8 RGB, every frame of one size, even after scaling."""
        import av
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        self._check(pixels)
        large = pixels.repeat(self.scale, axis=0).repeat(self.scale, axis=1) if self.scale > 1 else pixels
        try:
            if self._container is None:
                self._open()
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_trc=ColorTrc.BT709,
                dst_color_primaries=ColorPrimaries.BT709,
                threads=1,
            )
            frame.pts = self.frames
            frame.time_base = 1 / self.fps
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:
            raise self._failure(error) from error
        self.frames += 1

    def close(self) -> None:
        """Finish the file; a second call does nothing. OutputError when the last packets cannot be written."""
        if self._container is None:
            return
        import av

        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except av.FFmpegError as error:
            raise self._failure(error) from error
        self._container = None
        self._index_first()
        self._sign()

    def _check(self, pixels: np.ndarray) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise OutputError(
                f"a frame is {pixels.dtype} of shape {pixels.shape}; give uint8 of shape (height, width, 3)"
            )
        if self._shape and pixels.shape != self._shape:
            raise OutputError(
                f"frame {self.frames} is {pixels.shape[1]}x{pixels.shape[0]} but {self.path} was begun with "
                f"{self._shape[1]}x{self._shape[0]}; write frames of one size into one file"
            )
        height, width = pixels.shape[0] * self.scale, pixels.shape[1] * self.scale
        if height % 2 or width % 2 or not height or not width:
            raise OutputError(
                f"a frame of {width}x{height} cannot be yuv420p, which needs even sizes; pass an even scale"
            )
        self._shape = pixels.shape

    def _open(self) -> None:
        import av

        # An absolute path cannot be taken for a protocol, as "take:1.mp4" would.
        self._container = av.open(
            str(self.path.absolute()),
            "w",
            format="mp4",
            options={"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"},
        )
        width, height = self.size
        # One encoder thread keeps up with any stream this engine makes and leaves the cores to the model. No B-frames:
        # they delay packets, and in a fragmented file they shift the first frame away from time 0.
        options = {"preset": "veryfast", "crf": str(self.crf), "threads": "1", "bf": "0"}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.gop_size = max(1, round(self.fps))
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        self._stream = stream

    def _index_first(self) -> None:
        """Replace the finished file by one with its index in front; on failure the fragments stay, and they play."""
        import av

        handle, name = tempfile.mkstemp(prefix=f".{self.path.stem}-", suffix=".mp4", dir=self.path.absolute().parent)
        os.close(handle)
        try:
            with (
                av.open(str(self.path.absolute())) as source,
                av.open(name, "w", format="mp4", options={"movflags": "faststart"}) as target,
            ):
                copy = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:  # the demuxer ends with an empty packet
                        packet.stream = copy
                        target.mux(packet)
            os.chmod(name, self.path.stat().st_mode & 0o777)
            os.replace(name, self.path)
        except (av.FFmpegError, OSError):
            pass
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    def _sign(self) -> None:
        """Put the record into the finished file; nothing that goes wrong here may cost a frame."""
        if self.record is None:
            return
        try:
            sign(self.path, self.record)
        except ProvenanceError as error:
            warnings.warn(f"{self.path} carries no record that it is synthetic: {error}", stacklevel=3)

    def _failure(self, error: Exception) -> OutputError:
        """Close a file that could not be written to the end; what is left of it plays, and `frames` counts that."""
        import av

        container, self._container = self._container, None
        if container is not None:
            with suppress(av.FFmpegError):
                container.close()
        written = self.frames
        with suppress(OSError):
            _drop_unfinished_fragment(self.path)
        try:
            self.frames = sum(1 for _ in read_video(self.path))
        except OutputError:
            self.frames = 0
        if self.frames:
            self._sign()
        return OutputError(
            f"writing {self.path} failed at frame {written} ({_reason(error)}) and {self.frames} frames are in it; "
            "free space or choose another place"
        )


def _drop_unfinished_fragment(path: Path) -> None:
    """Cut a fragmented mp4 after its last whole box: each begins with its size, 4 bytes big-endian, and its name."""
    total = path.stat().st_size
    with path.open("r+b") as file:
        end = place = 0
        while place + 8 <= total:
            file.seek(place)
            size, name = int.from_bytes(file.read(4), "big"), file.read(4)
            place += max(size, 8)
            if place <= total and name != b"moof":  # a moof without its mdat describes pictures that are not there
                end = place
        file.truncate(end)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_video(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file in order, each (height, width, 3) uint8 RGB; OutputError as `decode_video`."""
    for frame in decode_video(path):
        yield frame.to_ndarray(format="rgb24")


def decode_video(path: str | Path) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video file in order, with their times and not yet as RGB.

    OutputError: the file is missing, holds no video, or cannot be decoded.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise OutputError(f"the video {path} does not exist; check its path")
    try:
        with av.open(str(path.absolute())) as container:
            if not container.streams.video:
                raise OutputError(f"{path} holds no video stream; give a video file")
            yield from container.decode(video=0)
    except av.FFmpegError as error:
        raise OutputError(
            f"{path} cannot be read as a video ({_reason(error)}); the file is damaged or of another kind"
        ) from error
