// What the parts of the Hopper attention share: sizes, and shared memory.
#pragma once

#include <type_traits>

#include "cuda/ptx_sm90.cuh"
#include "launch.h"
#include "split.cuh"

namespace cf::sm90 {

constexpr int kRows = 128;       // queries of a tile: two consumer warpgroups of 64
constexpr int kKeys = 128;       // keys of a tile
constexpr int kConsumers = 256;  // threads
constexpr int kThreads = 128 + kConsumers;
constexpr int kTurnBytes = 2048;  // cosines and sines of one slot

// Q: type of q and out; Page: of keys and values; kRest: width of the last tile of a page, 32 or kKeys.
template <class Q_, class Page_, int kHead_, int kRest_>
struct Shape {
    typedef Q_ Q;
    typedef Page_ Page;
    static constexpr int kHead = kHead_, kRest = kRest_;
    static constexpr bool kNarrow = std::is_same<Page_, E4M3>::value;
    static constexpr int kBytes = kNarrow ? 1 : 2;                  // of a number of a page
    static constexpr int kPairs = kHead == 128 ? 24 : 16;           // turned pairs of channels, a multiple of 8
    static constexpr int kGroups = kPairs / 8;                      // the same in groups of 16 channels
    static constexpr int kSteps = kHead * kBytes / 32;              // products along the channels
    static constexpr int kTileBytes = kKeys * kHead * kBytes;       // of keys, and of values
    static constexpr int kStages = kNarrow ? 4 : 3;                 // tiles of keys, and of values, in shared memory
    static constexpr int kKeySwizzle = kHead * kBytes < 128 ? 64 : 128;
};

// Stages and exchange of a block. The tiles come first: their swizzled patterns repeat every 1,024 bytes.
template <class S>
struct Shared {
    unsigned char k[S::kStages][S::kTileBytes];
    unsigned char v[S::kStages][S::kTileBytes];
    float2 turns[S::kStages][kTurnBytes / sizeof(float2)];  // [frame][pair], beside the first tile of keys of a page
    float2 scales[S::kStages];                              // of keys and values of that page, where pages are e4m3
    uint4 raw[S::kGroups][kConsumers];  // queries before their turn; a thread reads back what it wrote, so no barrier
    uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
};

struct Maps {
    TensorMap k, v;
    TensorMap k_rest;  // of e4m3 keys, for the last tile of a page
};

struct Job : AttentionLaunch {
    Split split;       // a unit is a page: a query tile is turned once for it
    int row_tiles;     // query tiles of a head
    float log2_scale;  // of a score, to the base 2
};

// Place in a ring of stages; a phase is one round.
template <int stages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// The parts of `job` that are known on the device alone.
__device__ __forceinline__ Split device_split(const Job& job) {
    Split split = job.split;
    split.units = slots_attended(job.count);
    return split;
}

}  // namespace cf::sm90
