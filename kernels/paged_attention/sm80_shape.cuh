// Sizes of sm80.cu's tiles and where their numbers lie in shared memory.
#pragma once

#include "cuda/ptx.cuh"

namespace cf {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 128;  // queries of a block, 32 a warp
constexpr int kKeys = 32;   // keys of a tile
constexpr int kStages = 3;  // tiles in the ring
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLargest = 448.0f;   // of e4m3
constexpr float kSmallest = 1e-20f;  // scales are at least this: a page of zeros has the scale 0
constexpr float kWeightBits = 8.0f;  // weights of e4m3 are up to 2^8

template <class P>
constexpr bool kNarrow = false;
template <>
constexpr bool kNarrow<E4M3> = true;

// Sizes in bytes. Value tiles of e4m3 are rows of channels.
template <class P, int HEAD>
struct Bytes {
    static constexpr int number = kNarrow<P> ? 1 : 2;
    static constexpr int row = HEAD * number;
    static constexpr int value_row = kNarrow<P> ? kKeys : row;
    static constexpr int half = kKeys * row;  // keys or values of a tile
    static constexpr int queries = kRows * row;
    static constexpr int shared = queries + kStages * 2 * half;
};

// Byte of a 16-byte chunk in a tile with rows of BYTES: chunks are exchanged so that 8 rows never meet in a bank.
template <int BYTES>
__device__ __forceinline__ int swizzle(int row) {
    constexpr int chunks = BYTES / 16, rows_in_line = chunks < 8 ? 8 / chunks : 1;
    return row / rows_in_line % (chunks < 8 ? chunks : 8);
}
template <int BYTES>
__device__ __forceinline__ int place(int row, int chunk) {
    return row * BYTES + (chunk ^ swizzle<BYTES>(row)) * 16;
}

// Addresses for matrix loads of 16 rows x 32 bytes. Left operands, and right ones that are transposed while loading,
// take their four matrices down the rows first; other right operands along the row first.
template <int BYTES, bool DOWN_FIRST>
struct Blocks {
    uint32_t base;
    int mask;

    __device__ __forceinline__ Blocks(uint32_t tile, int lane) {
        const int row = DOWN_FIRST ? lane & 15 : (lane & 7) + (lane >> 4 << 3);
        const int half = DOWN_FIRST ? lane >> 4 : lane >> 3 & 1;
        base = tile + row * BYTES;
        mask = swizzle<BYTES>(row) ^ half;
    }
    __device__ __forceinline__ uint32_t at(int block, int column) const {
        return base + block * 16 * BYTES + ((2 * column ^ mask) << 4);
    }
};

// Walks the key tiles of the table.
struct Cursor {
    int slot, tile;
    __device__ __forceinline__ void advance(int tiles) {
        if (++tile == tiles) tile = 0, ++slot;
    }
};

// e4m3: row of shared memory of a key. Column 2 t + e of the score product's block j of 8 columns, e and j in 0 ... 1,
// then is key 4 t + 2 j + e: the four numbers of a thread that the value product wants as one word.
template <class P>
__device__ __forceinline__ int row_of_key(int key) {
    if constexpr (!kNarrow<P>) return key;
    return (key & ~15) | (key & 2) << 2 | (key >> 1 & 6) | (key & 1);
}
template <class P>
__device__ __forceinline__ int key_of_column(int block, int t, int e) {
    return kNarrow<P> ? block / 2 * 16 + 4 * t + block % 2 * 2 + e : block * 8 + 2 * t + e;
}

}  // namespace
}  // namespace cf
