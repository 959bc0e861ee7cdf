// The consumers for pages of e4m3.
//
// Queries. A turn keeps the length of a pair of channels, so the largest length of a row's turned pairs and the largest
// of its other channels bound every turn of that row: one scale a row serves all pages, and a page quantises the turned
// channels again. Score = number * query scale * key scale * job.log2_scale, one factor a row and page.
//
// Weights are 2^(score - top), times 2^8 so that they use e4m3's range (448 is its largest number); the sum of weights
// carries that factor too and takes it out again. The scale of values changes with the page: sums of values are kept in
// units of the present page's scale, so entering a page multiplies what was summed before by old scale / new scale.
//
// A thread holds scores of keys 16 G + 4 t + 2 j + e (load_keys says why), and for one product of weights and values it
// must hold bytes 4 t ... 4 t + 3 and 16 + 4 t ... of 32 keys: just those. Nothing moves between lanes.
//
// Hopper's tensor cores keep about 14 bits of a running sum of e4m3 products (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
// So a tile's values are summed from zero, 128 keys, and added to the float32 sums outside, which costs no
// instruction more: old sums must be multiplied anyhow. They come in two halves of the channels, as there are no
// registers for both: 64 sums, 64 scores, 32 of a half, 16 words of weights and 16 of queries at a head size of 128.
#pragma once

#include "sm90_consumer.cuh"

namespace cf::sm90 {

constexpr float kLift = 8.0f;
constexpr float kLargest = 448.0f;
constexpr float kLeastScale = 1e-20f;  // what is all zeros may have the scale 0

template <class S>
struct NarrowQuery {
    uint32_t a[S::kSteps][4];
    float scale[2], inverse[2];  // of the thread's rows
    int frame[2];

    __device__ __forceinline__ static uint32_t quantise(float2 low, float2 high, float factor) {
        return pack_e4m3(low.x * factor, low.y * factor, high.x * factor, high.y * factor);
    }
    // Channels 16 i + 4 t ... + 3 of both rows; half i % 2 of product i / 2.
    __device__ __forceinline__ void load(const Job& job, const Place& place, int tile, Shared<S>& shared) {
        const QueryRows rows(job, place, tile);
        uint32_t words[S::kHead / 16][4];
#pragma unroll
        for (int i = 0; i < S::kHead / 16; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) words[i][e] = rows.word(e / 2, 16 * i + 4 * place.quad + 2 * (e % 2));
#pragma unroll
        for (int i = 0; i < S::kGroups; ++i)
            shared.raw[i][place.thread] = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float square = 0.0f;
#pragma unroll
            for (int i = 0; i < S::kHead / 16; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float2 pair = unpack<typename S::Q>(words[i][2 * r + e]);
                    const float x = pair.x * pair.x, y = pair.y * pair.y;
                    square = fmaxf(square, i < S::kGroups ? x + y : fmaxf(x, y));
                }
            const float bound = fmaxf(sqrtf(quad_max(square)), kLeastScale);
            scale[r] = bound * (1.0f / kLargest);
            inverse[r] = kLargest / bound;
            frame[r] = rows.frame[r];
#pragma unroll
            for (int i = S::kGroups; i < S::kHead / 16; ++i)
                a[i / 2][i % 2 * 2 + r] = quantise(unpack<typename S::Q>(words[i][2 * r]),
                                                   unpack<typename S::Q>(words[i][2 * r + 1]), inverse[r]);
        }
    }
    __device__ __forceinline__ void turn(const Place& place, const Shared<S>& shared, int stage) {
#pragma unroll
        for (int i = 0; i < S::kGroups; ++i) {
            const uint4 raw = shared.raw[i][place.thread];
            const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2* turns = &shared.turns[stage][frame[r] * S::kPairs + 8 * i + 2 * place.quad];
                a[i / 2][i % 2 * 2 + r] = quantise(turned(unpack<typename S::Q>(words[2 * r]), turns[0]),
                                                   turned(unpack<typename S::Q>(words[2 * r + 1]), turns[1]),
                                                   inverse[r]);
            }
        }
    }
};

template <class S>
struct NarrowConsumer : Consumer<S> {
    using Base = Consumer<S>;
    using Base::job, Base::shared, Base::place, Base::keys, Base::values, Base::softmax, Base::o, Base::s;
    NarrowQuery<S> query;
    float sums[S::kHead / 4];  // values of one tile, half of the channels
    uint32_t weights[kKeys / 32][4];
    float scale[2], v_scale;  // scale: of a score of the present page
    float factor[2];          // of what was summed before the tile whose values come next

    __device__ __forceinline__ NarrowConsumer(const Job& job_, Shared<S>& shared_) : Base(job_, shared_) {}

    __device__ __forceinline__ void clear(const Segment& segment) {
        query.load(job, place, segment.tile, shared);
        Base::clear();
    }

    // Start s = queries . keys.
    template <int N>
    __device__ __forceinline__ void start_scores() {
        const uint64_t k = matrix_place(shared.k[keys.stage], S::kKeySwizzle, 8 * S::kKeySwizzle, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i) wgmma<E4M3, N, false>(s, query.a[i], matrix_step(k, 32 * i), i > 0);
        wgmma_commit();
    }
    // Start sums = weights . values, of one half of the channels, from zero.
    template <int N>
    __device__ __forceinline__ void start_values(int half) {
        const uint64_t v = matrix_place(shared.v[values.stage] + half * S::kTileBytes / 2, 128, 1024, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 32; ++i)
            wgmma<E4M3, S::kHead / 2, false>(sums, weights[i], matrix_step(v, 32 * i), i > 0);
        wgmma_commit();
    }
    // Wait for them and add them.
    __device__ __forceinline__ void add_values(int half) {
        wgmma_wait<0>();
        wgmma_hold(sums);
#pragma unroll
        for (int i = 0; i < S::kHead / 4; ++i) {
            float& to = o[half * (S::kHead / 4) + i];
            to = fmaf(to, factor[i / 2 % 2], sums[i]);
        }
    }

    template <int Before, int Next>
    __device__ __forceinline__ void step(bool first_of_page, bool fresh, int used) {
        mbarrier_wait(&shared.k_full[keys.stage], keys.phase);
        float growth = 1.0f;  // of the numbers that stand for what was summed before
        if (first_of_page) growth = enter_page(fresh);
        if (Before) mbarrier_wait(&shared.v_full[values.stage], values.phase);
        this->take_turn();
        wgmma_hold(s);
        wgmma_hold(sums);
        start_scores<Next>();
        if (Before) start_values<Before>(0);
        this->pass_turn();
        wgmma_wait<Before ? 1 : 0>();
        wgmma_hold(s);
        this->release_keys();
        if (used < Next) mask<Next>(used);
        // One half of the values beside one row of the softmax, the other half beside the other row.
        float fade[2];
        fade[0] = softmax.template step<Next / 2>(s, 0, scale[0], kLift);
        if (Before) {
            compute_before(softmax.sum[0]);
            add_values(0);
            start_values<Before>(1);
        }
        fade[1] = softmax.template step<Next / 2>(s, 1, scale[1], kLift);
        if (Before) {
            compute_before(softmax.sum[1]);
            add_values(1);
            this->release_values();
        }
        for (int r = 0; r < 2; ++r) factor[r] = fade[r] * growth;
        pack_weights<Next>();  // an operand of the products just waited for: not before here may it change
    }
    // Turn the queries and take the scales of a page; fresh: no page came before. Returns old over new scale of values.
    __device__ __forceinline__ float enter_page(bool fresh) {
        query.turn(place, shared, keys.stage);
        const float2 scales = shared.scales[keys.stage];
        for (int r = 0; r < 2; ++r) scale[r] = job.log2_scale * query.scale[r] * scales.x;
        const float next = fmaxf(scales.y, kLeastScale), growth = fresh ? 1.0f : __fdividef(v_scale, next);
        v_scale = next;
        return growth;
    }
    // Block b of eight columns of scores is j = b / (N / 16), G = b % (N / 16).
    template <int N>
    __device__ __forceinline__ void mask(int used) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const int block = i / 4, j = block / (N / 16), key = block % (N / 16) * 16 + 4 * place.quad + 2 * j + i % 2;
            if (key >= used) s[i] = -INFINITY;
        }
    }
    template <int N>
    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int i = 0; i < N / 32; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int low = 4 * (2 * i + e / 2) + 2 * (e % 2), high = low + N / 4;
                weights[i][e] = pack_e4m3(s[low], s[low + 1], s[high], s[high + 1]);
            }
    }
    // Values of the last tile of a segment, and out of the units of its page.
    template <int Before>
    __device__ __forceinline__ void flush() {
        mbarrier_wait(&shared.v_full[values.stage], values.phase);
        wgmma_hold(sums);
        start_values<Before>(0);
        add_values(0);
        start_values<Before>(1);
        add_values(1);
        this->release_values();
        multiply_rows(o, v_scale, v_scale);
    }
};

}  // namespace cf::sm90
