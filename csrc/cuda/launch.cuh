// Launch of a kernel on a stream, with errors as sentences. Host side of CUDA sources.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "check.h"

namespace cf {

struct Grid {
    int blocks, threads, shared = 0, cluster = 1;  // shared: bytes of dynamic shared memory
};

#if defined(CF_EMULATE)  // tests/kernels/emulator: no GPU, every thread a fiber

template <class... P, class... A>
void launch(void (*kernel)(P...), const char*, const Grid& grid, void*, A... arguments) {
    emulated::run_grid({unsigned(grid.blocks), 1, 1}, {unsigned(grid.threads), 1, 1}, grid.shared, grid.cluster,
                       [=] { kernel(arguments...); });
}

// Blocks of a kernel that run on one multiprocessor at a time.
template <class... P>
int blocks_per_multiprocessor(void (*)(P...), const char*, int, int) {
    return 2;
}

inline int compute_capability() { return 90; }

#else

// Of the current device, 10 * major + minor.
inline int compute_capability() {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // leave no error behind for the next call to find
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
        fail(what, " is built for compute capability ", CF_CUDA_ARCHITECTURES, " but the GPU has ",
             compute_capability() / 10, ".", compute_capability() % 10,
             "; rebuild with the CUDA toolkit of this machine: pip install -e . --no-build-isolation");
    fail(what, ": CUDA says ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

template <class... P>
void allow_shared(void (*kernel)(P...), const char* what, int bytes) {
    if (bytes > 48 * 1024)  // more than this must be asked for
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const char* what, const Grid& grid, void* stream, A... arguments) {
    allow_shared(kernel, what, grid.shared);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.blocks);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    if (grid.cluster > 1) config.attrs = &cluster, config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, P(arguments)...), what);
}

// Blocks of a kernel that run on one multiprocessor at a time.
template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), const char* what, int threads, int shared) {
    allow_shared(kernel, what, shared);
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), what);
    if (blocks < 1)
        fail(what, " needs ", shared,
             " bytes of shared memory a block, more than this GPU has; choose implementation 'triton'");
    return blocks;
}

#endif

}  // namespace cf
