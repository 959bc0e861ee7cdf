"""Device memory by the CUDA driver API: order, arguments, what is given back, on a driver played here; then a GPU."""

from __future__ import annotations

import ctypes
import enum
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cfengine.embed import Format, Memory, Reader, Ring
from cfengine.embed import cuda_memory as cuda_memory_module
from cfengine.embed.cuda_memory import CudaMemory, DeviceHandle
from cfengine.errors import RingError
from tests.embed.standin import picture

try:
    from cuda.bindings import driver as real_driver
except ImportError:
    real_driver = None

SIZE = 5_000_000
UUIDS = [b"first GPU's UUID", b"other GPU's UUID"]
# what a call brings into the world, what takes it out again
PAIRS = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease",
    "cuMemCreate": "cuMemRelease",
    "cuMemImportFromShareableHandle": "cuMemRelease",
    "cuMemAddressReserve": "cuMemAddressFree",
    "cuMemMap": "cuMemUnmap",
    "cuMemAlloc": "cuMemFree",
    "cuIpcOpenMemHandle": "cuIpcCloseMemHandle",
}
CALLS = {
    Memory.OPAQUE_FD: [
        "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDeviceGetUuid", "cuCtxPushCurrent",
        "cuMemGetAllocationGranularity", "cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve",
        "cuMemMap", "cuMemSetAccess", "cuCtxPopCurrent",
    ],
    Memory.CUDA_IPC: [
        "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDeviceGetUuid", "cuCtxPushCurrent", "cuMemAlloc",
        "cuIpcGetMemHandle", "cuCtxPopCurrent",
    ],
}  # fmt: skip


class Bytes:
    """A structure of the API that is a few bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(data, len(data))

    def getPtr(self) -> int:
        return ctypes.addressof(self.buffer)


class PlayedTypes:
    """Names of the API that are no functions."""

    CUresult = enum.IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2})
    CUmemAllocationHandleType = enum.IntEnum("T", {"CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": 1})
    CUmemAllocationType = enum.IntEnum("T", {"CU_MEM_ALLOCATION_TYPE_PINNED": 1})
    CUmemLocationType = enum.IntEnum("T", {"CU_MEM_LOCATION_TYPE_DEVICE": 1})
    CUmemAccess_flags = enum.IntEnum("T", {"CU_MEM_ACCESS_FLAGS_PROT_READWRITE": 3})
    CUipcMem_flags = enum.IntEnum("T", {"CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS": 1})
    CUmemAllocationGranularity_flags = enum.IntEnum("T", {"CU_MEM_ALLOC_GRANULARITY_RECOMMENDED": 1})

    @staticmethod
    def CUmemAllocationProp():
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    @staticmethod
    def CUipcMemHandle():
        return Bytes(bytes(64))


class PlayedDriver:
    """`cuda.bindings.driver` without a GPU: `calls` in order, `alive` what was not given back; `fail` names a call."""

    def __init__(self, types) -> None:
        self.types, self.fail = types, ""
        self.calls: list[tuple] = []
        self.alive: list[str] = []
        self.contexts = 0

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            return getattr(self.types, name)
        if name == "cuDeviceGetUuid_v2":
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == self.fail:
                return (self.types.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
            self.account(name)
            given = getattr(self, f"give_{name}", lambda *_: ())(*arguments)
            return (self.types.CUresult.CUDA_SUCCESS, *given)

        return call

    def account(self, name: str) -> None:
        self.contexts += (name == "cuCtxPushCurrent") - (name == "cuCtxPopCurrent")
        assert self.contexts in (0, 1)
        assert self.contexts or not name.startswith(("cuMem", "cuIpc")), f"{name} outside of the context"
        if name in PAIRS:
            self.alive.append(name)
        elif name in PAIRS.values():
            assert self.alive and PAIRS[self.alive[-1]] == name, f"{name} while {self.alive} are there"
            self.alive.pop()

    def give_cuDeviceGet(self, ordinal):
        return (ordinal,)

    def give_cuDeviceGetCount(self):
        return (2,)

    def give_cuDeviceGetUuid(self, device):
        return (Bytes(UUIDS[device]),)

    def give_cuDevicePrimaryCtxRetain(self, device):
        return ("context",)

    def give_cuCtxPopCurrent(self):
        return ("context",)

    def give_cuMemGetAllocationGranularity(self, about, option):
        assert int(about.type) == int(about.location.type) == int(about.requestedHandleTypes) == int(option) == 1
        assert about.location.id == 1
        return (1 << 21,)

    def give_cuMemCreate(self, size, about, flags):
        return ("memory",)

    def give_cuMemExportToShareableHandle(self, memory, kind, flags):
        return (os.memfd_create("played"),)

    def give_cuMemImportFromShareableHandle(self, fd, kind):
        return ("memory",)

    def give_cuMemAddressReserve(self, *arguments):
        return (0x1000,)

    def give_cuMemSetAccess(self, pointer, size, access, count):
        assert len(access) == count == 1 and access[0].location.id == 1 and int(access[0].flags) == 3
        return ()

    def give_cuMemAlloc(self, size):
        return (0x2000,)

    def give_cuIpcGetMemHandle(self, pointer):
        return (Bytes(bytes(range(64))),)

    def give_cuIpcOpenMemHandle(self, handle, flags):
        assert ctypes.string_at(int(handle.getPtr()), 64) == bytes(range(64)) and flags == 1
        return (0x3000,)

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture(params=["played"] + ["cuda-bindings"] * (real_driver is not None))
def driver(request, monkeypatch):
    """A played driver; with the types of the package too, where it is installed."""
    made = PlayedDriver(PlayedTypes if request.param == "played" else real_driver)
    monkeypatch.setattr(cuda_memory_module, "load_driver", lambda: made)
    return made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.embed
def test_memory_for_vulkan_and_cuda(driver):
    before = descriptors()
    memory = CudaMemory(Memory.OPAQUE_FD, SIZE, "cuda:1")
    size = 3 << 21
    assert driver.names() == CALLS[Memory.OPAQUE_FD] and memory.size == size and memory.uuid == UUIDS[1]
    assert driver.calls[6][1] == size and driver.calls[9][1:4] == (0x1000, size, 0)
    assert descriptors() == before + 1 and not os.get_inheritable(memory.fd) and memory.ipc_handle == bytes(64)
    assert driver.alive == ["cuDevicePrimaryCtxRetain", "cuMemCreate", "cuMemAddressReserve", "cuMemMap"]
    memory.close()
    memory.close()
    assert driver.alive == [] and descriptors() == before


@pytest.mark.embed
def test_memory_for_cuda_alone(driver):
    memory = CudaMemory(Memory.CUDA_IPC, SIZE, "cuda:1")
    assert driver.names() == CALLS[Memory.CUDA_IPC] and driver.calls[5][1] == memory.size == 3 << 21
    assert memory.fd is None and memory.ipc_handle == bytes(range(64))
    memory.close()
    assert driver.alive == []


@pytest.mark.embed
@pytest.mark.parametrize(("kind", "call"), [(kind, call) for kind, calls in CALLS.items() for call in calls[:-1]])
def test_a_step_that_fails_gives_everything_back(driver, kind, call):
    driver.fail, before = call, descriptors()
    with pytest.raises(RingError, match=f"{call} failed with CUDA_ERROR_OUT_OF_MEMORY"):
        CudaMemory(kind, SIZE, "cuda:1")
    assert driver.alive == [] and driver.contexts == 0 and descriptors() == before
    assert call in driver.names()


@pytest.mark.embed
def test_a_lost_gpu_does_not_stop_the_giving_back(driver):
    before = descriptors()
    memory = CudaMemory(Memory.OPAQUE_FD, SIZE, "cuda:1")
    driver.fail, driver.calls = "cuCtxPushCurrent", []
    memory.close()
    assert descriptors() == before
    assert driver.names() == ["cuCtxPushCurrent"] * 3 + ["cuDevicePrimaryCtxRelease"]


def handle_of(memory: CudaMemory, uuid: bytes = UUIDS[1]) -> DeviceHandle:
    fd = -1 if memory.fd is None else os.dup(memory.fd)
    return DeviceHandle(memory.kind, 1, memory.size, 4096, 1, uuid, fd, memory.ipc_handle)


@pytest.mark.embed
@pytest.mark.parametrize("kind", list(CALLS))
def test_a_reader_maps_it_on_the_same_gpu(driver, kind):
    with CudaMemory(kind, SIZE, "cuda:1") as memory, handle_of(memory) as handle:
        kept, driver.calls = list(driver.alive), []
        with handle.map() as mapped:
            assert mapped.device == torch.device("cuda:1") and mapped.size == memory.size
            told = {name: arguments for name, *arguments in driver.calls}
            if kind is Memory.OPAQUE_FD:
                assert told["cuMemImportFromShareableHandle"][0] == handle.fd != memory.fd
                assert "cuMemSetAccess" in told
            else:
                assert "cuIpcOpenMemHandle" in told
        assert driver.alive == kept
        for call in dict.fromkeys(driver.names()):
            if call not in (*PAIRS.values(), "cuCtxPopCurrent"):
                driver.fail = call
                with pytest.raises(RingError, match=call):
                    handle.map()
                assert driver.alive == kept
        driver.fail = ""
        handle.uuid = b"of another world"
        with pytest.raises(RingError, match="no GPU of this process has the UUID"):
            handle.map()
        assert driver.alive == kept


@pytest.mark.embed
def test_a_ring_on_a_cpu_is_refused(driver, ring_name):
    with pytest.raises(RingError, match="not on cpu; give device='cuda'"):
        Ring(ring_name, 32, 32, memory="opaque_fd", device="cpu")
    assert driver.alive == []


@pytest.mark.embed
def test_without_the_package_it_says_what_to_install(monkeypatch, ring_name):
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RingError, match="pip install cuda-bindings"):
        Ring(ring_name, 32, 32, memory="opaque_fd", device="cuda:0")


@pytest.mark.embed
def test_nothing_of_cuda_is_loaded_before_it_is_asked_for():
    code = "import sys, torch; before = set(sys.modules); import cfengine.embed; new = set(sys.modules) - before; "
    code += "sys.exit(any(name.split('.')[0] == 'cuda' for name in new))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# On a GPU -------------------------------------------------------------------------------------------------------------

READ = """
import sys, time, torch
from cfengine.embed import Policy, Reader
from tests.embed.standin import picture

with Reader(sys.argv[1], lease=60) as reader, reader.device_memory() as handle, handle.map() as mapped:
    for id in range(1, 41):
        with reader.acquire(Policy.NEXT, timeout=60) as frame:
            planes = frame.planes_in(mapped.bytes())
            assert frame.id == id and planes[0].device.type == "cuda"
            if len(planes) == 1:
                assert torch.equal(planes[0][..., :3].cpu(), picture(id, frame.width, frame.height))
            sums = [int(plane.cpu().to(torch.int64).sum()) for plane in planes]
            print(id, *sums, flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or real_driver is None, reason="needs a GPU and cuda-bindings")
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("memory", ["opaque_fd", "cuda_ipc"])
def test_another_process_reads_what_the_gpu_wrote(ring_name, memory, format):
    """Every frame of the ring as the CPU converts it, read by CUDA in another process."""
    from cfengine.embed.device import convert, planes_in

    width, height = 96, 64
    with Ring(ring_name, width, height, format=format, slots=64, memory=memory, device="cuda") as ring:
        command = [sys.executable, "-c", READ, ring_name]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        expected = []
        for id in range(1, 41):
            pixels = picture(id, width, height)
            ring.publish(pixels.cuda())
            planes = planes_in(
                torch.zeros(8 * width * height, dtype=torch.uint8), format, width, height, (0, 4 * width * height),
                (4 * width, width),
            )  # fmt: skip
            convert(pixels, planes)
            expected.append([id, *(int(plane.to(torch.int64).sum()) for plane in planes)])
        said, _ = reader.communicate(timeout=120)
    assert [[int(word) for word in line.split()] for line in said.splitlines()] == expected
    assert reader.returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or real_driver is None, reason="needs a GPU and cuda-bindings")
def test_memory_on_a_gpu_is_given_back(ring_name):
    """Rings come and go without the card filling up; a descriptor that a reader has keeps the memory."""
    with Ring(ring_name, 1024, 1024, memory="opaque_fd", device="cuda"):
        pass
    free, before = torch.cuda.mem_get_info()[0], descriptors()
    for _ in range(8):
        with Ring(ring_name, 1024, 1024, memory="opaque_fd", device="cuda") as ring, Reader(ring_name) as reader:
            ring.publish(torch.zeros(1024, 1024, 3, dtype=torch.uint8, device="cuda"))
            reader.device_memory().close()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > free - (32 << 20) and descriptors() == before
