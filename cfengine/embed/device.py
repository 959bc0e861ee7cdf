"""Frames of a ring in device memory: slots in one allocation, filled by the device, and their handle for readers."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from cfengine.embed.cuda_memory import CudaMemory, DeviceMemory
from cfengine.embed.handles import HandleServer, packet
from cfengine.embed.names import Format, Memory
from cfengine.errors import RingError

# csrc/client/convert.c: coefficients times 2^16
LUMA = 11966, 40254, 4064
CHROMA = (-6596, -22189, 28785), (28785, -26145, -2640)
HALF = 1 << 15


def allocate(kind: Memory, size: int, device: torch.device | str) -> DeviceMemory:
    """Memory for all slots of a ring.  Raises RingError."""
    return CudaMemory(kind, size, device)


def planes_in(
    memory: Tensor, format: Format, width: int, height: int, offsets: tuple[int, int], strides: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Planes of a slot as views of `memory`, (bytes,) uint8: RGBA8 (height, width, 4), or NV12 (height, width) and
    (height / 2, width / 2, 2).
    """
    if format is Format.RGBA8:
        return (memory.as_strided((height, width, 4), (strides[0], 4, 1), offsets[0]),)
    luma = memory.as_strided((height, width), (strides[0], 1), offsets[0])
    return luma, memory.as_strided((height // 2, width // 2, 2), (strides[1], 2, 1), offsets[1])


def convert(pixels: Tensor, planes: tuple[Tensor, ...]) -> None:
    """Pixels (height, width, 3 or 4) uint8 into planes, as csrc/client/convert.c does, bit for bit."""
    if len(planes) == 1:
        planes[0][..., : pixels.shape[2]].copy_(pixels)
        if pixels.shape[2] == 3:
            planes[0][..., 3].fill_(255)
        return
    luma, chroma = planes
    rgb = pixels[..., :3].to(torch.int32)
    luma.copy_((_weighted(rgb, LUMA) + (16 << 16) + HALF) >> 16)
    fours = rgb.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).sum((1, 3), dtype=torch.int32)
    for place, weights in zip(chroma.unbind(-1), CHROMA, strict=True):
        place.copy_((_weighted(fours, weights) + (128 << 18) + (HALF << 2)) >> 18)


def _weighted(rgb: Tensor, weights: tuple[int, int, int]) -> Tensor:
    red, green, blue = rgb.unbind(-1)
    return weights[0] * red + weights[1] * green + weights[2] * blue


class DeviceFrames:
    """The memory of a ring's slots, and the socket that passes its handle.

    socket: its path, which listens already      start: answers, once the ring is there
    """

    def __init__(self, kind: Memory, stride: int, slots: int, device: torch.device | str) -> None:
        self._stride, self._slots = stride, slots
        with ExitStack() as undo:
            self.memory = allocate(kind, stride * slots, device)
            undo.callback(self.memory.close)
            self._server = HandleServer()
            undo.callback(self._server.close)
            self._bytes = self.memory.bytes()
            undo.callback(self._settle)
            with torch.inference_mode():
                self._bytes.zero_()  # rows end in bytes that no frame writes
                self.memory.wait()
            self._undo = undo.pop_all()
        self.socket = self._server.path

    def start(self, generation: int) -> None:
        memory = self.memory
        told = packet(
            generation=generation,
            size=memory.size,
            stride=self._stride,
            slots=self._slots,
            kind=int(memory.kind),
            uuid=memory.uuid,
            ipc=memory.ipc_handle,
        )
        self._server.start(told, memory.fd)

    def publish(self, writer: Any, pixels: Tensor, format: Format, about: tuple[int, ...]) -> int:
        """Fill a slot of the ring on the device, wait for that, and show it; a slot that fails is shown to nobody.

        about: as `RingWriter.commit` takes it      -> id of the frame
        """
        height, width = pixels.shape[:2]
        offsets, strides = writer.begin()
        try:
            with torch.inference_mode():  # frames may be tensors of one
                convert(pixels, planes_in(self._bytes, format, width, height, offsets, strides))
                self.memory.wait()
            return writer.commit(*about)
        except BaseException:
            self._settle()
            writer.cancel()
            raise

    def _settle(self) -> None:
        """Wait for what is queued already: the slot is somebody else's next, or the memory goes."""
        with suppress(Exception):  # of a lost GPU nothing is to be waited for
            self.memory.wait()

    def check(self, name: str, pixels: Any, width: int, height: int) -> None:
        """Raise RingError unless the pixels are where the ring's frames are, and of their size."""
        if not isinstance(pixels, Tensor) or pixels.device != self.memory.device:
            where = pixels.device if isinstance(pixels, Tensor) else f"a {type(pixels).__name__} in host memory"
            raise RingError(
                f"ring {name} was given a frame on {where}, but its frames are on {self.memory.device}; give a tensor "
                "there, or make the ring with memory='host'"
            )
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) not in ((height, width, 3), (height, width, 4)):
            raise RingError(
                f"ring {name} was given a frame of shape {tuple(pixels.shape)}, {pixels.dtype}; "
                f"give ({height}, {width}, 3 or 4) uint8"
            )

    def close(self) -> None:
        """Answer nobody any more and let go of the memory; harmless twice."""
        self._bytes = None
        self._undo.close()
