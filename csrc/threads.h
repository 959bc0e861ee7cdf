// Threads of a kernel: OpenMP's, so that torch's own pool (same library, same team) is used and none is started twice.
//
// An idle OpenMP worker spins for a while after every operation before it sleeps; a second pool would have to fight
// torch's for the cores. Where another build of torch brings its own runtime under another name, both pools exist.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace cf {
namespace CF_NS {  // inline functions too: a copy compiled for a wide instruction set must not serve the others

inline int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Threads worth waking for a number of elements: below about 30 microseconds of work, one.
inline int threads_for(int64_t elements, int threads) { return elements < 131072 ? 1 : threads; }

// Grow-only scratch memory of the calling thread, aligned to a cache line: a fresh allocation of megabytes per call
// would be paid in page faults.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    void* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(4096, size_);
            if (!data_) {
                size_ = 0;
                throw std::bad_alloc();  // MemoryError in Python; never called inside a parallel region
            }
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace CF_NS
}  // namespace cf
