"""GPUs that refuse, played by stand-ins for torch.cuda: every refusal is one sentence with numbers and a remedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cfengine.choices import used_operations
from cfengine.config import PRECISIONS, MemoryConfig, preset
from cfengine.device import check_device, check_fits, device_errors, page_bytes, remedies, slot_bytes
from cfengine.engine import Engine
from cfengine.errors import ConfigError, DeviceError, KernelError
from cfengine.ops import select
from cfengine.scheduler.graphs import check_captured

pytestmark = pytest.mark.cpu

GIB = 2**30
WAN = preset("context-forcing")


@pytest.fixture
def gpu(monkeypatch):
    """set(name=value, ...) replaces functions of torch.cuda by constants."""

    def set_(**values):
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    set_(is_available=True, device_count=2, get_device_capability=(9, 0), get_device_name="NVIDIA H200")
    set_(mem_get_info=(8 * GIB, 140 * GIB), memory_allocated=100 * GIB, memory_reserved=101 * GIB)
    return set_


def test_a_good_gpu_is_taken(gpu):
    check_device("cuda")
    check_device("cuda:1")


@pytest.mark.parametrize(
    ("values", "device", "words"),
    [
        ({"get_device_capability": (7, 5), "get_device_name": "Tesla T4"}, "cuda:0", ["Tesla T4", "7.5", "8.0"]),
        ({}, "cuda:2", ["'cuda:2'", "2 GPUs"]),
    ],
)
def test_a_gpu_that_does_not_do(gpu, values, device, words):
    gpu(**values)
    with pytest.raises(DeviceError) as caught:
        check_device(device)
    for word in words:
        assert word in str(caught.value)


def test_a_driver_that_does_not_fit(gpu, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update\nmore")

    gpu(is_available=False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match="CUDA 13.0.*too old .found version 11040.*update the NVIDIA driver"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="device 'cuda' needs CUDA.*device='cpu'"):
        check_device("cuda")
    with pytest.raises(ConfigError, match="needs CUDA"):
        Engine.from_pretrained("tiny-world", device="cuda")


def test_two_engines_that_do_not_fit(gpu):
    """8 GiB are free, 1 more is torch's own: 9.5 do not fit, and what is missing is said."""
    check_fits("the model", 9 * GIB, WAN, "cuda:0")
    with pytest.raises(DeviceError) as caught:
        check_fits("the model", round(9.5 * GIB), WAN, "cuda:0")
    for words in ("the model needs 9.50 GiB", "9.00 GiB free of 140.00 GiB", "holds 100.00 GiB", "save 0.50 GiB"):
        assert words in str(caught.value)


def test_sizes_and_remedies():
    each = slot_bytes(WAN)
    assert each == 2 * 30 * 1560 * 1536 * 2 and page_bytes(WAN) == 25 * each
    words = remedies(WAN, 3 * each)
    assert "18 slots, not 21" in words and "fp8" in words and f"saves {page_bytes(WAN) / 2 / GIB:.2f} GiB" in words
    assert "a picture of 780x450" in words  # 22 of 25 pages: sides times sqrt(0.88)
    fp8 = dataclasses.replace(WAN, precision=PRECISIONS["fp8"])
    assert slot_bytes(fp8) == each // 2 and "fp8" not in remedies(fp8, each)
    assert "more memory" in remedies(dataclasses.replace(fp8, memory=MemoryConfig(slow=0, fast=3)), 100 * GIB)


def test_out_of_memory(gpu):
    gpu(mem_get_info=(GIB, 140 * GIB))
    with pytest.raises(DeviceError) as caught, device_errors(WAN, torch.device("cuda:0")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")
    for words in ("'cuda:0' is out of memory", "2.50 GiB were asked", "1.00 GiB are free", "save 1.50 GiB", "slots"):
        assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_lost_gpu_closes_the_session_and_keeps_the_frames(toy_engine, monkeypatch):
    engine = toy_engine()
    stream = engine.stream("a", num_frames=30)
    frames = [next(stream) for _ in range(9)]
    (session,) = engine._sessions

    def lost(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(session._lane._scheduler, "denoise", lost)
    with pytest.raises(DeviceError, match="failed .CUDA error: an illegal memory access was encountered.*new one"):
        next(stream)
    assert session.closed and not engine._sessions and next(stream, None) is None
    assert all(frame.pixels.shape == (32, 48, 3) for frame in frames)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ..."),
        RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
        KernelError("paged_attention: CUDA says cudaErrorUnsupportedPtxVersion, the provided PTX was compiled with an "
                    "unsupported toolchain."),
    ],
)  # fmt: skip
def test_kernels_for_other_gpus(gpu, error):
    gpu(get_device_capability=(12, 0))
    with pytest.raises(DeviceError) as caught, device_errors(WAN, torch.device("cuda:0")):
        raise error
    for words in ("'cuda:0'", "compute capability 12.0", str(error).split("\n")[0].rstrip("."), "pip install -e ."):
        assert words in str(caught.value)
    assert "new one" not in str(caught.value)  # the process goes on


def test_what_the_extension_reports_is_a_device_error_too(gpu):
    gpu(mem_get_info=(GIB, 140 * GIB))
    with pytest.raises(DeviceError, match="failed .paged_attention: CUDA says cudaErrorIllegalAddress.*new one"):
        with device_errors(WAN, "cuda:0"):
            raise KernelError("paged_attention: CUDA says cudaErrorIllegalAddress, an illegal memory access")
    with pytest.raises(DeviceError, match="out of memory.*slots"), device_errors(WAN, "cuda:0"):
        raise KernelError("paged_attention: CUDA says cudaErrorMemoryAllocation, out of memory")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), device_errors(WAN, None):
        raise RuntimeError("shapes do not match")
    with pytest.raises(KernelError, match="heads"), device_errors(WAN, None):
        raise KernelError("heads of k_pages are 2 but heads of q are 3")


def test_what_cannot_be_captured_is_refused():
    fast = {"paged_attention": "triton"}
    ops = select("cuda", dict.fromkeys(("paged_attention", "window_update"), "reference"))
    with pytest.raises(KernelError, match="paged_attention: implementation 'reference'.*triton.*graphs=False"):
        check_captured(ops, used_operations("slow_fast_update"))
    others = [op for op in used_operations("window_update") if op != "paged_attention"]
    with pytest.raises(KernelError, match="window_update: implementation 'reference'"):
        check_captured(ops, others)
    check_captured(select("cuda", fast), used_operations("slow_fast_paper_update"))
