// Kernels with a fault each, which the emulator must find.
#pragma once

#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace cf::faults {

constexpr int kFaultThreads = 64;

// Every thread copies four floats to shared memory and returns those of the thread at the other end of the block.
__global__ void reverse(const float* from, float* to, bool wait, bool barrier) {
    const int mine = int(threadIdx.x), other = kFaultThreads - 1 - mine;
    copy_async(shared_address(shared_memory()) + mine * 16, from + 4 * mine, 16);
    copy_commit();
    if (wait) copy_wait<0>();
    if (barrier) __syncthreads();
    std::memcpy(to + 4 * mine, shared_memory() + other * 16, 16);
}

__global__ void stray(const float* from, float* to) { to[threadIdx.x] = from[4 * kFaultThreads + threadIdx.x]; }

__global__ void stuck(const float*, float*) {
    if (threadIdx.x < 32) cf::barrier_sync(1, kFaultThreads);
}

__global__ void diverged(const float*, float* to) {
    if (threadIdx.x % 32 < 16)
        __syncwarp();
    else
        to[threadIdx.x] = __shfl_xor_sync(0xffffffffu, to[threadIdx.x], 1);
}

__global__ void beyond(const float* from, float*) { copy_async(shared_address(shared_memory()) + 1024, from, 16); }

inline void run_fault(const std::string& name, uintptr_t from_address, uintptr_t to_address) {
    const auto* from = reinterpret_cast<const float*>(from_address);
    auto* to = reinterpret_cast<float*>(to_address);
    const Grid grid{1, kFaultThreads, 16 * kFaultThreads};
    const auto plain = [&](void (*kernel)(const float*, float*)) { launch(kernel, "fault", grid, nullptr, from, to); };
    if (name == "stray") return plain(stray);
    if (name == "stuck") return plain(stuck);
    if (name == "diverged") return plain(diverged);
    if (name == "beyond") return plain(beyond);
    launch(reverse, "fault", grid, nullptr, from, to, name != "no wait", name != "no barrier");
}

}  // namespace cf::faults
