// What the consumers of both kinds of pages share: their state, their turns, and the walk over the tiles of a segment.
//
// A step takes two tiles at a time: it starts the scores of the next one and the values of the one before, and computes
// the softmax of the next one beside them. The two warpgroups take turns in starting products, so that one computes
// exponentials while the other's products run.
#pragma once

#include "sm90_load.cuh"
#include "sm90_rows.cuh"

namespace cf::sm90 {

template <class S>
struct Consumer {
    const Job& job;
    Shared<S>& shared;
    Place place;
    Ring<S::kStages> keys, values;  // the tiles whose scores, and whose values, come next
    Softmax softmax;
    float o[S::kHead / 2], s[kKeys / 2];  // sums of values; scores, then weights

    __device__ __forceinline__ Consumer(const Job& job_, Shared<S>& shared_)
        : job(job_), shared(shared_), place(int(threadIdx.x) - 128) {}

    __device__ __forceinline__ void clear() {
        softmax.clear();
#pragma unroll
        for (int i = 0; i < S::kHead / 2; ++i) o[i] = 0.0f;
    }

    // Barrier 1 + g lets warpgroup g pass once the other one has started its products. The second group lets the first
    // begin, and the first takes up the second's last arrival, so that no barrier is left half full: both groups make
    // the same steps.
    __device__ __forceinline__ void begin() {
        if (place.group == 1) barrier_arrive(1, kConsumers);
    }
    __device__ __forceinline__ void take_turn() { barrier_sync(1 + place.group, kConsumers); }
    __device__ __forceinline__ void pass_turn() { barrier_arrive(2 - place.group, kConsumers); }
    __device__ __forceinline__ void end() {
        if (place.group == 0) barrier_sync(1, kConsumers);
    }

    __device__ __forceinline__ void release_keys() {
        release(&shared.k_empty[keys.stage]);
        keys.advance();
    }
    __device__ __forceinline__ void release_values() {
        release(&shared.v_empty[values.stage]);
        values.advance();
    }
};

// Steps over the tiles of a segment. step<Before, Next>(first of its page, first of the segment, keys that exist) goes
// from a tile Before wide (0: there is none) to one Next wide.
template <class S, class C>
__device__ __forceinline__ void attend_segment(C& consumer, const Job& job, const Segment& segment) {
    constexpr int F = kKeys, R = S::kRest;
    const int before_last = (job.page_tokens - 1) / F, rest = job.page_tokens - before_last * F;
    const int full = R == F ? before_last + 1 : before_last;
    consumer.clear(segment);
    for (int slot = segment.from; slot < segment.to; ++slot) {
        for (int i = 0; i < full; ++i) {
            const int used = i < before_last ? F : rest;
            if (slot == segment.from && i == 0)
                consumer.template step<0, F>(true, true, used);
            else if (R < F && i == 0)
                consumer.template step<R, F>(true, false, used);
            else
                consumer.template step<F, F>(i == 0, false, used);
        }
        if constexpr (R < F) consumer.template step<F, R>(false, false, rest);
    }
    consumer.template flush<R>();
    finish<S>(job, consumer.place, segment, consumer.o, consumer.softmax);
}

}  // namespace cf::sm90
