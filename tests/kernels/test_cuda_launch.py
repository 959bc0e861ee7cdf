"""What the compiled extension says when CUDA refuses a launch, with a stand-in for the CUDA runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = """
#pragma once
enum cudaError_t {
    cudaSuccess, cudaErrorInvalidDeviceFunction, cudaErrorNoKernelImageForDevice, cudaErrorIllegalAddress
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeClusterDimension };
typedef void* cudaStream_t;
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct cudaLaunchAttribute { int id; struct { dim3 clusterDim; } val; };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim; int dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; int numAttrs;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    *value = what == cudaDevAttrComputeCapabilityMajor ? 12 : 1;
    return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorIllegalAddress"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an illegal memory access"; }
template <class... T> cudaError_t cudaFuncSetAttribute(T...) { return cudaSuccess; }
template <class... T> cudaError_t cudaLaunchKernelEx(T...) { return cudaSuccess; }
template <class... T> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(T...) { return cudaSuccess; }
"""
PROGRAM = """
#include <iostream>
#include "cuda/launch.cuh"
int main() {
    for (auto status : {cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorIllegalAddress})
        try {
            cf::check_cuda(status, "paged_attention");
        } catch (const cf::Error& error) {
            std::cout << error.what() << "\\n";
        }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_refused_launches_are_sentences(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", '-DCF_CUDA_ARCHITECTURES="80 89 90a"']
    made = tmp_path / "program"
    done = subprocess.run(["g++", *flags, str(made) + ".cpp", "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = subprocess.run([str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "paged_attention is built for compute capability 80 89 90a but the GPU has 12.1; rebuild with the CUDA toolkit "
        "of this machine: pip install -e . --no-build-isolation",
        "paged_attention: CUDA says cudaErrorIllegalAddress, an illegal memory access",
    ]
