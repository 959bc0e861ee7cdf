// The rows of a consumer thread: its queries, the running softmax, and where results go.
//
// A thread holds parts of two rows of its tile, 64 group + 16 warp + lane / 4 and eight further. Four lanes share a
// row.
#pragma once

#include "sm90_shape.cuh"

namespace cf::sm90 {

struct Place {
    int thread;  // of the consumers
    int group, lane, quad, row;

    __device__ __forceinline__ explicit Place(int thread_) {
        thread = thread_;
        group = thread / 128;
        lane = thread % 32;
        quad = lane % 4;
        row = 64 * group + thread % 128 / 32 * 16 + lane / 4;
    }
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// One turned pair of channels, as two floats.
__device__ __forceinline__ float2 turned(float2 pair, float2 turn) {
    return make_float2(pair.x * turn.x - pair.y * turn.y, pair.x * turn.y + pair.y * turn.x);
}

// A head's channels of the thread's two rows; rows beyond the last query are zero and written nowhere.
struct QueryRows {
    const unsigned char* row[2];
    int frame[2];
    bool exists[2];

    __device__ __forceinline__ QueryRows(const Job& job, const Place& place, int tile) {
        const int head = tile / job.row_tiles, frame_tokens = job.tokens / job.frames;
        for (int r = 0; r < 2; ++r) {
            const int token = (tile - head * job.row_tiles) * kRows + place.row + 8 * r;
            exists[r] = token < job.tokens;
            const int near = min(token, job.tokens - 1);
            row[r] = static_cast<const unsigned char*>(job.q) + 2 * (near * job.q_token + head * job.q_head);
            frame[r] = near / frame_tokens;
        }
    }
    __device__ __forceinline__ uint32_t word(int r, int channel) const {  // channels `channel` and the next
        return exists[r] ? __ldg(reinterpret_cast<const uint32_t*>(row[r] + 2 * channel)) : 0u;
    }
};

// Softmax so far of two rows. Scores are in powers of two: weights are 2^(score * scale - top).
struct Softmax {
    float top[2], sum[2];  // sum: of the columns that this thread sees

    __device__ __forceinline__ void clear() {
        for (int r = 0; r < 2; ++r) top[r] = -INFINITY, sum[r] = 0.0f;
    }
    // Turn the first `used` scores of row r into weights times 2^lift. Returns what all earlier sums are to be
    // multiplied by.
    template <int used, int n>
    __device__ __forceinline__ float step(float (&s)[n], int r, float scale, float lift) {
        float peak = s[2 * r];
#pragma unroll
        for (int i = 0; i < used; i += 4) peak = fmaxf(peak, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        peak = fmaxf(top[r], quad_max(peak) * scale);
        const float fade = exp2_fast(top[r] - peak), shift = lift - peak;
        top[r] = peak;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < used; i += 4) {
            s[i + 2 * r] = exp2_fast(fmaf(s[i + 2 * r], scale, shift));
            s[i + 2 * r + 1] = exp2_fast(fmaf(s[i + 2 * r + 1], scale, shift));
            total += s[i + 2 * r] + s[i + 2 * r + 1];
        }
        sum[r] = sum[r] * fade + total;
        return fade;
    }
};

template <int n>
__device__ __forceinline__ void multiply_rows(float (&o)[n], float low, float high) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
        o[i] *= low;
        o[i + 1] *= low;
        o[i + 2] *= high;
        o[i + 3] *= high;
    }
}

// The thread's rows to `out`, rounded.
template <class S>
__device__ __forceinline__ void write_rows(const Job& job, const Place& place, int tile,
                                           const float (&o)[S::kHead / 2]) {
    const int head = tile / job.row_tiles;
    for (int r = 0; r < 2; ++r) {
        const int token = (tile - head * job.row_tiles) * kRows + place.row + 8 * r;
        if (token >= job.tokens) continue;
        uint16_t* row = static_cast<uint16_t*>(job.out) + token * job.out_token + head * job.out_head + 2 * place.quad;
#pragma unroll
        for (int j = 0; j < S::kHead / 8; ++j)
            *reinterpret_cast<uint32_t*>(row + 8 * j) = pack<typename S::Q>(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
    }
}

// A finished segment: the whole of a tile is divided by its sum and written, a part goes to the scratch (combine.cuh).
template <class S>
__device__ __forceinline__ void finish(const Job& job, const Place& place, const Segment& segment,
                                       float (&o)[S::kHead / 2], Softmax& softmax) {
    for (int r = 0; r < 2; ++r) softmax.sum[r] = quad_sum(softmax.sum[r]);
    if (segment.part < 0) {
        multiply_rows(o, 1.0f / softmax.sum[0], 1.0f / softmax.sum[1]);
        write_rows<S>(job, place, segment.tile, o);
        return;
    }
    for (int r = 0; r < 2; ++r) {
        const int row = place.row + 8 * r;
        float* to = part_sums(job.scratch, segment.part, row, kRows, S::kHead) + 2 * place.quad;
#pragma unroll
        for (int j = 0; j < S::kHead / 8; ++j)
            *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
        if (place.quad == 0)
            *part_totals(job.scratch, segment.part, row, kRows, S::kHead) = make_float2(softmax.top[r], softmax.sum[r]);
    }
}

}  // namespace cf::sm90
