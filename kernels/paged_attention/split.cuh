// Division of attention among the blocks of a persistent grid, and the sum over keys that were split.
//
// The work is `tiles` query tiles (of all heads, tiles of a head adjacent) of `units` key tiles each; the units of a
// tile are known on the device alone, as the number of valid slots is. As many query tiles as fill whole waves are
// dealt out whole: the blocks that share a head then read the same keys at about the same time, from the L2 cache. The
// tiles that are left, fewer than blocks, are laid end to end and cut into equal ranges of units, one for each block.
// 444 tiles on 132 multiprocessors: three waves of whole tiles and 48 tiles cut into 132 parts.
//
// A part of a tile leaves its sums in float32 in the scratch memory, and combine_parts adds the parts of each tile in
// the order of their keys: results do not depend on who finishes first. Considered and rejected: cutting all the work
// into equal ranges (blocks then read keys at places of their own, several times what the cache holds), adding parts
// with a counter in the block that comes last (its counters would have to be zero before every launch, also after a
// failed one).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cf {

// Slots that are attended. A memory counts the chunk in flight, so there is one at least; a table that nothing was
// written to has the count 0 and page 0, of zeros, in its first slot. Attending to that slot gives zeros, as the
// reference does, where no work at all would leave warps waiting for keys that nobody loads.
__device__ __forceinline__ int slots_attended(const int32_t* count) { return max(__ldg(count), 1); }

struct Split {
    int tiles, blocks;  // of queries; of the grid
    int units;          // key tiles of a query tile

    __host__ __device__ int whole() const { return tiles / blocks; }  // waves of whole tiles
    __host__ __device__ int cut() const { return tiles % blocks; }    // tiles that are cut, the last ones
    __host__ __device__ int64_t begin(int block) const { return int64_t(cut()) * units * block / blocks; }
};

// Units from ... to - 1 of a query tile; `part` is the place of its sums in the scratch memory, -1 for a whole tile.
struct Segment {
    int tile, from, to, part;
};

// The n-th segment of a block; false where it has no more. At most two are parts: a range is shorter than a tile.
__device__ __forceinline__ bool find_segment(const Split& split, int block, int n, Segment& segment) {
    if (n < split.whole()) {
        segment = {n * split.blocks + block, 0, split.units, -1};
        return true;
    }
    const int64_t begin = split.begin(block), end = split.begin(block + 1);
    const int tile = static_cast<int>(begin / split.units) + n - split.whole();
    const int64_t start = int64_t(tile) * split.units;
    segment.tile = split.whole() * split.blocks + tile;
    segment.from = begin > start ? static_cast<int>(begin - start) : 0;
    segment.to = end - start < split.units ? static_cast<int>(end - start) : split.units;
    segment.part = block + tile;  // along the ranges block or tile grows: no two parts share a place
    return segment.from < segment.to;
}

__host__ __device__ inline int64_t part_floats(int rows, int head_dim) { return int64_t(rows) * (head_dim + 2); }

// Floats of scratch that the parts need, whatever the number of slots turns out to be.
inline int64_t scratch_floats(const Split& split, int rows, int head_dim) {
    return split.cut() ? (split.blocks + split.cut()) * part_floats(rows, head_dim) : 0;
}

// Where row `row` of a part leaves its sums (head_dim floats), and its maximum and total (2 floats, log2 scale).
__device__ __forceinline__ float* part_sums(float* scratch, int part, int row, int rows, int head_dim) {
    return scratch + part * part_floats(rows, head_dim) + int64_t(row) * head_dim;
}
__device__ __forceinline__ float2* part_totals(float* scratch, int part, int row, int rows, int head_dim) {
    return reinterpret_cast<float2*>(scratch + part * part_floats(rows, head_dim) + int64_t(rows) * head_dim) + row;
}

}  // namespace cf
