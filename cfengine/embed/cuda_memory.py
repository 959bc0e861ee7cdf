"""Memory on an NVIDIA GPU that other processes can map, by the CUDA driver API."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cfengine.embed.names import Memory
from cfengine.errors import RingError

IPC_UNIT = 2 << 20  # below it an IPC handle would show what else lies in the same block (CUDA programming guide)
IPC_BYTES = 64  # CU_IPC_HANDLE_SIZE


class DeviceMemory(Protocol):
    """What a ring needs of the memory that its frames are in.

    size: bytes, as many as asked for at least      uuid: of the device, 16 bytes
    fd: of OPAQUE_FD, this object's own      ipc_handle: of CUDA_IPC, 64 bytes
    """

    kind: Memory
    device: torch.device
    size: int
    uuid: bytes
    fd: int | None
    ipc_handle: bytes

    def bytes(self) -> Tensor:
        """All of it, (size,) uint8; good until `close`."""
        ...

    def wait(self) -> None:
        """Return when the device has done what this thread's current stream was given."""
        ...

    def close(self) -> None:
        """Let go of it; harmless twice."""
        ...


def load_driver() -> Any:
    """Return `cuda.bindings.driver`; RingError where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RingError(
            f"frames in device memory need the package cuda-bindings ({error}); pip install cuda-bindings, in the "
            "major version of CUDA that the driver has, or choose memory='host'"
        ) from error
    return driver


class Driver:
    """The driver API, whose calls raise RingError and return what they give beside their result."""

    def __init__(self) -> None:
        self.api = load_driver()
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            result, *values = getattr(self.api, name)(*arguments)
        except Exception as error:  # the package is there, the driver's library is not
            raise RingError(f"{name} cannot be called ({error}); install NVIDIA's driver, or memory='host'") from error
        if result != self.api.CUresult.CUDA_SUCCESS:
            raise RingError(f"{name} failed with {getattr(result, 'name', result)}; see the CUDA driver API")
        return values[0] if values else None

    def quietly(self, name: str, *arguments: Any) -> None:
        """A call that gives something back; of a lost GPU there is nothing to give back."""
        with suppress(RingError):
            self(name, *arguments)

    def uuid(self, device: Any) -> bytes:
        # the second version names an instance of a partitioned GPU, which Vulkan does too
        second = hasattr(self.api, "cuDeviceGetUuid_v2")
        found = self("cuDeviceGetUuid_v2" if second else "cuDeviceGetUuid", device)
        return ctypes.string_at(int(found.getPtr()), 16)


class _OnDevice:
    """The primary context of a device, which torch uses too, and what is to be given back in it."""

    def __init__(self, driver: Driver, ordinal: int, undo: ExitStack) -> None:
        self.driver, self.undo = driver, undo
        self.device = torch.device("cuda", ordinal)
        self.handle = driver("cuDeviceGet", ordinal)
        self._context = driver("cuDevicePrimaryCtxRetain", self.handle)
        undo.callback(driver.quietly, "cuDevicePrimaryCtxRelease", self.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.driver("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.quietly("cuCtxPopCurrent")

    def later(self, name: str, *arguments: Any) -> None:
        """Call this when all is given back."""
        self.undo.callback(self._give_back, name, *arguments)

    def _give_back(self, name: str, *arguments: Any) -> None:
        with suppress(RingError), self.current():
            self.driver(name, *arguments)

    def map(self, memory: Any, size: int) -> int:
        """Addresses for memory that a handle names; returns the first."""
        api, driver = self.driver.api, self.driver
        pointer = driver("cuMemAddressReserve", size, 0, 0, 0)
        self.later("cuMemAddressFree", pointer, size)
        driver("cuMemMap", pointer, size, 0, memory, 0)
        self.later("cuMemUnmap", pointer, size)
        access = api.CUmemAccessDesc()
        access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = int(self.handle)
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        driver("cuMemSetAccess", pointer, size, [access], 1)
        return int(pointer)


class _Mapped:
    """Device memory that has addresses here, until `close`."""

    device: torch.device
    size: int
    _pointer: int
    _undo: ExitStack

    def bytes(self) -> Tensor:
        return tensor_at(self._pointer, self.size, self.device)

    def wait(self) -> None:
        event = torch.cuda.Event(blocking=True)  # a waiting core is free for others
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()

    def close(self) -> None:
        self._undo.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class CudaMemory(_Mapped):
    """New memory of a GPU; see `DeviceMemory`.

    OPAQUE_FD: cuMemCreate, one file descriptor, which Vulkan and CUDA import; it lives as long as anybody has it.
    CUDA_IPC: cuMemAlloc, a handle that only CUDA opens; it ends here.
    """

    def __init__(self, kind: Memory, size: int, device: torch.device | str) -> None:
        self.kind, self.fd, self.ipc_handle = kind, None, bytes(IPC_BYTES)
        driver, wanted = Driver(), torch.device(device)
        if wanted.type != "cuda":
            raise RingError(f"frames in device memory are on a GPU, and not on {wanted}; give device='cuda'")
        with ExitStack() as undo:
            place = _OnDevice(driver, torch.cuda.current_device() if wanted.index is None else wanted.index, undo)
            self.device, self.uuid = place.device, driver.uuid(place.handle)
            with place.current():
                make = self._make_for_all if kind is Memory.OPAQUE_FD else self._make_for_cuda
                self._pointer, self.size = make(place, size)
            self._undo = undo.pop_all()

    def _make_for_all(self, place: _OnDevice, size: int) -> tuple[int, int]:
        api, driver = place.driver.api, place.driver
        about, posix = api.CUmemAllocationProp(), api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        about.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        about.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        about.location.id = int(place.handle)
        about.requestedHandleTypes = posix
        best = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        size = _up(size, driver("cuMemGetAllocationGranularity", about, best))
        memory = driver("cuMemCreate", size, about, 0)
        place.later("cuMemRelease", memory)
        self.fd = int(driver("cuMemExportToShareableHandle", memory, posix, 0))
        place.undo.callback(os.close, self.fd)
        os.set_inheritable(self.fd, False)
        return place.map(memory, size), size

    def _make_for_cuda(self, place: _OnDevice, size: int) -> tuple[int, int]:
        size = _up(size, IPC_UNIT)
        pointer = place.driver("cuMemAlloc", size)
        place.later("cuMemFree", pointer)
        handle = place.driver("cuIpcGetMemHandle", pointer)
        self.ipc_handle = ctypes.string_at(int(handle.getPtr()), IPC_BYTES)
        return int(pointer), size


@dataclass(eq=False)
class DeviceHandle:
    """What a reader was given of a writer's device memory (cf_device_memory); it owns the descriptor until `close`.

    generation: of the ring; frames of another one are in other memory      fd: of OPAQUE_FD, else -1
    """

    memory: Memory
    generation: int
    size: int
    frame_stride: int
    slots: int
    uuid: bytes
    fd: int
    ipc_handle: bytes

    def map(self) -> MappedMemory:
        """Give it addresses in this process, on the GPU that it is on.  Raises RingError."""
        return MappedMemory(self)

    def close(self) -> None:
        """Close the descriptor; what was mapped stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> DeviceHandle:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class MappedMemory(_Mapped):
    """A writer's memory in this process: `bytes()`, and `RingFrame.planes_in` of those."""

    def __init__(self, handle: DeviceHandle) -> None:
        driver = Driver()
        self.size = handle.size
        with ExitStack() as undo:
            place = _OnDevice(driver, _ordinal(driver, handle.uuid), undo)
            self.device = place.device
            with place.current():
                self._pointer = self._open(place, handle)
            self._undo = undo.pop_all()

    def _open(self, place: _OnDevice, handle: DeviceHandle) -> int:
        api, driver = place.driver.api, place.driver
        if handle.memory is Memory.OPAQUE_FD:
            posix = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            memory = driver("cuMemImportFromShareableHandle", handle.fd, posix)
            place.later("cuMemRelease", memory)
            return place.map(memory, handle.size)
        given = api.CUipcMemHandle()
        ctypes.memmove(int(given.getPtr()), handle.ipc_handle, IPC_BYTES)
        lazily = api.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        pointer = driver("cuIpcOpenMemHandle", given, int(lazily))
        place.later("cuIpcCloseMemHandle", pointer)
        return int(pointer)


def _ordinal(driver: Driver, uuid: bytes) -> int:
    """Number of the GPU with this UUID."""
    for ordinal in range(driver("cuDeviceGetCount")):
        if driver.uuid(driver("cuDeviceGet", ordinal)) == uuid:
            return ordinal
    raise RingError(
        f"no GPU of this process has the UUID {uuid.hex()}, on which the frames are; see CUDA_VISIBLE_DEVICES"
    )


def tensor_at(pointer: int, size: int, device: torch.device) -> Tensor:
    """Device memory as a (size,) uint8 tensor that does not own it."""

    class Place:
        __cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}

    return torch.as_tensor(Place(), device=device)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
