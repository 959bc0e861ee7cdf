// The producer: one thread that keeps the stages of keys and of values full.
//
// Phases. Every full and empty barrier moves through phases 0, 1, 0, ... The producer fills a stage in its round r
// after the consumers have emptied it in round r - 1: it waits for parity (r - 1) & 1 of `empty`, which a fresh
// barrier passes. A consumer waits for parity r & 1 of `full`. `full` counts one arrival (the producer's, which names
// the bytes) and the bytes of the copies; `empty` counts eight, one per consumer warp, each after all lanes of that
// warp are done reading. Tiles are written and read by the asynchronous proxy only, so no proxy fence is needed for
// them. Turns are written by that proxy and read by threads that waited on the same barrier; they are overwritten
// only after `k_empty`. Scales are written by the producer's own stores before its arrival on `k_full`, which
// releases them.
#pragma once

#include "sm90_shape.cuh"

namespace cf::sm90 {

// Keys of zeros may have the scale 0, by which a masked score, -inf, must not be multiplied. Times the least scale of a
// query, 2e-23 (sm90_e4m3.cuh), this is still a number.
constexpr float kLeastKeyScale = 1e-15f;

// Bytes of a tile of keys.
template <class S>
__device__ __forceinline__ int key_bytes(bool rest) {
    return S::kNarrow && rest ? S::kRest * S::kHead : S::kTileBytes;
}

// The keys from `key` on: of 16-bit numbers kKeys of them, [64 channels][key][128 bytes]. Of e4m3 as many as the tile
// is wide, N, [key][channels], in another order: key 16 G + 4 t + 2 j + e in row N / 2 j + 8 G + 2 t + e (t < 4, j <
// 2, e < 2). Then the scores that a thread gets are those of the keys whose weights it must hold for the second
// product (sm90_e4m3.cuh). A copy of one j takes 2 keys of every 4.
template <class S>
__device__ __forceinline__ void load_keys(const Maps& maps, unsigned char* to, uint64_t* full, int key, int head,
                                          int page, bool rest) {
    if constexpr (S::kNarrow) {
        const TensorMap& map = rest ? maps.k_rest : maps.k;
        for (int j = 0; j < 2; ++j)
            copy_tile(to + j * key_bytes<S>(rest) / 2, map, full, 0, 2 * j, key / 4, head, page);
    } else {
        for (int c = 0; c < S::kHead / 64; ++c) copy_tile(to + c * kKeys * 128, maps.k, full, 64 * c, key, head, page);
    }
}

// Their values: of 16-bit numbers as the keys, of e4m3 [channel][128 keys].
template <class S>
__device__ __forceinline__ void load_values(const Maps& maps, unsigned char* to, uint64_t* full, int key, int head,
                                            int page) {
    if constexpr (S::kNarrow) {
        copy_tile(to, maps.v, full, key, 0, head, page);
    } else {
        for (int c = 0; c < S::kHead / 64; ++c) copy_tile(to + c * kKeys * 128, maps.v, full, 64 * c, key, head, page);
    }
}

template <class S>
__device__ __forceinline__ void produce(const Maps& maps, const Job& job, Shared<S>& shared) {
    const int turn_bytes = job.frames * S::kPairs * int(sizeof(float2));
    prefetch_map(maps.k);
    prefetch_map(maps.v);
    Ring<S::kStages> ring;
    const Split split = device_split(job);
    Segment segment;
    for (int n = 0; find_segment(split, blockIdx.x, n, segment); ++n) {
        const int head = segment.tile / job.row_tiles;
        for (int slot = segment.from; slot < segment.to; ++slot) {
            const int page = __ldg(job.page_ids + slot);
            float2 scales = make_float2(1.0f, 1.0f);
            if constexpr (S::kNarrow) {
                const int64_t place = int64_t(page) * job.heads + head;
                scales = make_float2(fmaxf(__ldg(job.k_scale + place), kLeastKeyScale), __ldg(job.v_scale + place));
            }
            for (int key = 0; key < job.page_tokens; key += kKeys) {
                const int s = ring.stage;
                mbarrier_wait(&shared.k_empty[s], ring.phase ^ 1);
                if (S::kNarrow && key == 0) shared.scales[s] = scales;
                const bool rest = key + kKeys >= job.page_tokens;
                mbarrier_expect(&shared.k_full[s], key_bytes<S>(rest) + (key == 0 ? turn_bytes : 0));
                load_keys<S>(maps, shared.k[s], &shared.k_full[s], key, head, page, rest);
                if (key == 0) {
                    const float* row = job.turns + int64_t(slot) * job.frames * S::kPairs * 2;
                    copy_bytes(shared.turns[s], row, turn_bytes, &shared.k_full[s]);
                }
                mbarrier_wait(&shared.v_empty[s], ring.phase ^ 1);
                mbarrier_expect(&shared.v_full[s], S::kTileBytes);
                load_values<S>(maps, shared.v[s], &shared.v_full[s], key, head, page);
                ring.advance();
            }
        }
    }
}

// Say that this warp is done with a stage.
__device__ __forceinline__ void release(uint64_t* empty) {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

}  // namespace cf::sm90
