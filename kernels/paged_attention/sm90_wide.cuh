// The consumers for pages of 16-bit numbers.
//
// In a step the scores of the next tile and the values of the one before run on the tensor cores; then the softmax of
// the next tile runs while the values are still being summed.
//
// Registers a thread at a head size of 128: 64 sums of values, 64 scores, 32 words of weights, 32 words of queries.
#pragma once

#include "sm90_consumer.cuh"

namespace cf::sm90 {

template <class S>
struct WideQuery {
    uint32_t a[S::kSteps][4];
    int frame[2];

    // Channels 16 i + 2 t, + 1 and + 8, + 9: the pairs that a thread holds are pairs that turn together.
    __device__ __forceinline__ void load(const Job& job, const Place& place, int tile, Shared<S>& shared) {
        const QueryRows rows(job, place, tile);
        for (int r = 0; r < 2; ++r) frame[r] = rows.frame[r];
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) a[i][e] = rows.word(e % 2, 16 * i + 2 * place.quad + 8 * (e / 2));
#pragma unroll
        for (int i = 0; i < S::kGroups; ++i)
            shared.raw[i][place.thread] = make_uint4(a[i][0], a[i][1], a[i][2], a[i][3]);
    }
    // Only the first kPairs pairs turn; the other words stay what they are.
    __device__ __forceinline__ void turn(const Place& place, const Shared<S>& shared, int stage) {
#pragma unroll
        for (int i = 0; i < S::kGroups; ++i) {
            const uint4 raw = shared.raw[i][place.thread];
            const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 turn = shared.turns[stage][frame[e % 2] * S::kPairs + 8 * i + place.quad + e / 2 * 4];
                const float2 pair = turned(unpack<typename S::Q>(words[e]), turn);
                a[i][e] = pack<typename S::Q>(pair.x, pair.y);
            }
        }
    }
};

template <class S>
struct WideConsumer : Consumer<S> {
    using Base = Consumer<S>;
    using Base::job, Base::shared, Base::place, Base::keys, Base::values, Base::softmax, Base::o, Base::s;
    WideQuery<S> query;
    uint32_t weights[kKeys / 16][4];

    __device__ __forceinline__ WideConsumer(const Job& job_, Shared<S>& shared_) : Base(job_, shared_) {}

    __device__ __forceinline__ void clear(const Segment& segment) {
        query.load(job, place, segment.tile, shared);
        Base::clear();
    }

    // Start s = queries . keys of a tile N wide.
    template <int N>
    __device__ __forceinline__ void start_scores() {
        const uint64_t k = matrix_place(shared.k[keys.stage], 128, 1024, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i)
            wgmma<typename S::Q, N, false>(s, query.a[i], matrix_step(k, i / 4 * kKeys * 128 + i % 4 * 32), i > 0);
        wgmma_commit();
    }
    // Start o += weights . values of a tile N wide.
    template <int N>
    __device__ __forceinline__ void start_values() {
        mbarrier_wait(&shared.v_full[values.stage], values.phase);
        const uint64_t v = matrix_place(shared.v[values.stage], 128, 1024, kKeys * 128);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 16; ++i)
            wgmma<typename S::Q, S::kHead, true>(o, weights[i], matrix_step(v, i * 16 * 128), 1);
        wgmma_commit();
    }

    template <int Before, int Next>
    __device__ __forceinline__ void step(bool first_of_page, bool, int used) {
        mbarrier_wait(&shared.k_full[keys.stage], keys.phase);
        if (first_of_page) query.turn(place, shared, keys.stage);
        this->take_turn();
        wgmma_hold(s);
        wgmma_hold(o);
        start_scores<Next>();
        if (Before) start_values<Before>();
        this->pass_turn();
        wgmma_wait<Before ? 1 : 0>();
        wgmma_hold(s);
        this->release_keys();
        if (used < Next) mask(used);
        const float low = softmax.template step<Next / 2>(s, 0, job.log2_scale, 0.0f);
        const float high = softmax.template step<Next / 2>(s, 1, job.log2_scale, 0.0f);
        if (Before) {
            compute_before(softmax.sum[0] + softmax.sum[1]);
            wgmma_wait<0>();
            wgmma_hold(o);
            this->release_values();
        }
        multiply_rows(o, low, high);
        // Weights are an operand of the products just waited for: not before here may they change.
#pragma unroll
        for (int i = 0; i < Next / 16; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                weights[i][e] = pack<typename S::Q>(s[8 * i + 2 * e], s[8 * i + 2 * e + 1]);
    }
    __device__ __forceinline__ void mask(int used) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i)
            if (i / 4 * 8 + 2 * place.quad + i % 2 >= used) s[i] = -INFINITY;
    }
    // Values of the last tile of a segment.
    template <int Before>
    __device__ __forceinline__ void flush() {
        wgmma_hold(o);
        start_values<Before>();
        wgmma_wait<0>();
        wgmma_hold(o);
        this->release_values();
    }
};

}  // namespace cf::sm90
