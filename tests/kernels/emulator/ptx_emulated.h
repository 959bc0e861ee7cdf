// The wrappers of csrc/cuda/ptx.cuh on the host, written from the layouts of the PTX ISA, which that header tells.
#pragma once

#include "fibers.h"
#include "numbers.h"

namespace cf {

inline unsigned char* shared_memory() { return emulated::self().block->shared; }

constexpr uint32_t kSharedStart = 1024;  // an address is not an offset: on a GPU the first kilobyte is not the kernel's
inline uint32_t shared_address(const void* place) {
    return uint32_t(static_cast<const unsigned char*>(place) - shared_memory()) + kSharedStart;
}

namespace emulated {
inline unsigned char* at_shared(const char* name, uint32_t address, size_t bytes) {
    unsigned char* place = shared_memory() + (int64_t(address) - kSharedStart);
    check_shared(name, place, bytes, bytes);
    return place;
}
}  // namespace emulated

inline void store_shared(uint32_t at, const uint4& x) {
    std::memcpy(emulated::at_shared("store_shared", at, 16), &x, 16);
}

// ---- numbers -------------------------------------------------------------------------------------------------------

namespace emulated {
inline uint16_t narrow(F16, float x) { return to_f16(x); }
inline uint16_t narrow(BF16, float x) { return to_bf16(x); }
inline float wide(F16, uint32_t word, int i) { return from_f16(uint16_t(word >> 16 * i)); }  // number i of a word
inline float wide(BF16, uint32_t word, int i) { return from_bf16(uint16_t(word >> 16 * i)); }
inline float wide(E4M3, uint32_t word, int i) { return from_e4m3(uint8_t(word >> 8 * i)); }
template <class T>
constexpr int numbers_in_word = 2;
template <>
constexpr int numbers_in_word<E4M3> = 4;
}  // namespace emulated

template <class T>
uint32_t pack(float low, float high) {
    return emulated::narrow(T(), low) | uint32_t(emulated::narrow(T(), high)) << 16;
}
template <class T>
float2 unpack(uint32_t bits) {
    return {emulated::wide(T(), bits, 0), emulated::wide(T(), bits, 1)};
}
inline uint32_t pack_e4m3(float a, float b, float c, float d) {
    using emulated::to_e4m3;
    return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | uint32_t(to_e4m3(d)) << 24;
}
inline float exp2_fast(float x) { return std::exp2(x); }

// ---- matrices ------------------------------------------------------------------------------------------------------

namespace emulated {

struct Four {
    uint32_t r[4];
};

inline Four gather(const char* name, uint32_t address, bool transposed) {
    const unsigned char* row = at_shared(name, address, 16);
    return collective<Four>(name, row, [transposed](const unsigned char* const(&rows)[kWarp], Four(&out)[kWarp]) {
        for (int lane = 0; lane < kWarp; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int g = lane / 4, t = lane % 4;
                uint16_t pair[2];
                for (int e = 0; e < 2; ++e) {
                    const int r = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
                    std::memcpy(&pair[e], rows[8 * i + r] + 2 * column, 2);
                }
                out[lane].r[i] = pair[0] | uint32_t(pair[1]) << 16;
            }
    });
}

struct Fragments {
    float c[4];
    uint32_t a[4], b[2];
};
struct Sums {
    float c[4];
};

// One product of a warp: 16 x 8, 32 bytes along k. Sums in float64, rounded once.
template <class T>
void product(const Fragments (&in)[kWarp], Sums (&out)[kWarp]) {
    constexpr int n = numbers_in_word<T>;
    float a[16][8 * n], b[8][8 * n];
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int e = 0; e < n; ++e) {
                const int g = lane / 4, k = (i / 2 * 4 + lane % 4) * n + e;
                a[g + 8 * (i % 2)][k] = wide(T(), in[lane].a[i], e);
                if (i % 2 == 0) b[g][k] = wide(T(), in[lane].b[i / 2], e);
            }
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = in[lane].c[i];
            for (int k = 0; k < 8 * n; ++k) sum += double(a[row][k]) * b[column][k];
            out[lane].c[i] = float(sum);
        }
}

inline void land(Thread& thread, size_t left) {
    while (thread.groups.size() > left) {
        for (const AsyncCopy& copy : thread.groups.front()) {
            std::memset(copy.to, 0, copy.size);
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
        thread.groups.erase(thread.groups.begin());
    }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
    const emulated::Four found = emulated::gather("ldmatrix", row, false);
    std::memcpy(r, found.r, sizeof(r));
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
    const emulated::Four found = emulated::gather("ldmatrix.trans", row, true);
    std::memcpy(r, found.r, sizeof(r));
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const emulated::Fragments mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const emulated::Sums sums = emulated::collective<emulated::Sums>("mma", mine, emulated::product<T>);
    std::memcpy(c, sums.c, sizeof(c));
}

// ---- copies that run on their own: nothing but NaN at the destination until they are waited for --------------------

inline void copy_async(uint32_t to, const void* from, int bytes) {
    unsigned char* place = emulated::at_shared("copy_async", to, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16) emulated::stop("copy_async from an address that is no multiple of 16");
    emulated::poison(place, 16);
    emulated::self().open.push_back({place, static_cast<const unsigned char*>(from), 16, bytes});
}
inline void copy_commit() {
    emulated::Thread& thread = emulated::self();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}
template <int n>
void copy_wait() {
    emulated::land(emulated::self(), n);
}

// ---- barriers of some of a block's warps ---------------------------------------------------------------------------

inline void barrier_sync(int id, int threads) { emulated::barrier_sync(id, threads, "barrier_sync"); }
inline void barrier_arrive(int id, int threads) { emulated::barrier_arrive(id, threads); }

}  // namespace cf
