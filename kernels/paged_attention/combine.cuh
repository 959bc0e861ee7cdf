// Sum of the parts of query tiles whose keys were split (split.cuh).
//
//   out = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i,   m = max m_i,   over the parts i of a tile, in the order of
//   keys
//
// A warp serves a row; its lanes share out the channels. Small: a few thousand rows, read from the L2 cache.
#pragma once

#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "launch.h"
#include "split.cuh"

namespace cf {
namespace {  // a copy for each source: sources are built for different GPUs, and their kernels must not be merged by
             // name

constexpr int kCombineWarps = 4;

// units_per_slot: key tiles of a page. T: type of out. ROWS: query rows of a tile.
template <class T, int HEAD, int ROWS>
__global__ void __launch_bounds__(kCombineWarps * 32)
    combine_parts(AttentionLaunch a, Split split, int units_per_slot, int tiles_per_head) {
    constexpr int kEach = HEAD / 32;  // channels of a lane
    const int lane = threadIdx.x % 32, place = blockIdx.x * kCombineWarps + threadIdx.x / 32;
    const int cut = place / ROWS, row = place % ROWS;
    const int tile = split.whole() * split.blocks + cut;
    const int head = tile / tiles_per_head, token = tile % tiles_per_head * ROWS + row;
    if (token >= a.tokens) return;
    split.units = slots_attended(a.count) * units_per_slot;

    float top = -INFINITY, total = 0.0f, sums[kEach] = {};
    for (int block = int(int64_t(cut) * split.blocks / split.cut()); block < split.blocks; ++block) {
        const int64_t begin = split.begin(block), end = split.begin(block + 1);
        if (begin >= int64_t(cut + 1) * split.units) break;
        if (begin == end || end <= int64_t(cut) * split.units) continue;
        const float2 part = *part_totals(a.scratch, block + cut, row, ROWS, HEAD);
        const float peak = fmaxf(top, part.x), keep = exp2_fast(top - peak), add = exp2_fast(part.x - peak);
        const float* from = part_sums(a.scratch, block + cut, row, ROWS, HEAD) + lane * kEach;
        for (int i = 0; i < kEach; ++i) sums[i] = sums[i] * keep + from[i] * add;
        total = total * keep + part.y * add;
        top = peak;
    }
    const float inverse = 1.0f / total;
    auto* to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.out) + token * a.out_token + head * a.out_head +
                                           lane * kEach);
    for (int i = 0; i < kEach; i += 2) to[i / 2] = pack<T>(sums[i] * inverse, sums[i + 1] * inverse);
}

template <class T, int HEAD, int ROWS>
void combine(const AttentionLaunch& a, const Split& split, int units_per_slot, int tiles_per_head) {
    const Grid grid{split.cut() * ROWS / kCombineWarps, kCombineWarps * 32};
    if (grid.blocks)
        launch(combine_parts<T, HEAD, ROWS>, "combine_parts", grid, a.stream, a, split, units_per_slot, tiles_per_head);
}

}  // namespace
}  // namespace cf
