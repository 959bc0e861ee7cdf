// Cosines and sines by which the queries of a latent frame turn before they meet the keys of a slot.
//
//   turns[slot, frame, pair] = cos, sin of 2 pi x,   x = fraction((q_position - position) * phase / 2^64)
//
// A phase is the turn per position as a 64-bit fraction, so the product wraps around exactly where a turn is full:
// integers alone keep positions in the millions exact, and no float64 is needed, which consumer GPUs compute slowly.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "launch.h"

namespace cf {
namespace {

__global__ void turn_table(AttentionLaunch a) {
    const int place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= a.slots * a.frames * a.pairs) return;
    const int pair = place % a.pairs, frame = place / a.pairs % a.frames, slot = place / a.pairs / a.frames;
    const int64_t step = int64_t(a.q_positions[frame]) - a.positions[slot];
    const int64_t turn =
        static_cast<int64_t>(static_cast<uint64_t>(step) * a.phases[pair]);  // of 2^64, in -1/2 ... 1/2
    float cosine, sine;
    sincospif(static_cast<float>(turn) * 0x1p-63f, &sine, &cosine);
    reinterpret_cast<float2*>(a.turns)[place] = make_float2(cosine, sine);
}

}  // namespace

void fill_turns(const AttentionLaunch& a) {
    if (a.pairs % 8 || 2 * a.pairs > a.head_dim)
        fail("paged_attention turns ", a.pairs, " pairs of channels; pass a multiple of 8, at most half of head_dim ",
             a.head_dim);
    constexpr int threads = 128;
    launch(turn_table, "turn_table", {(a.slots * a.frames * a.pairs + threads - 1) / threads, threads}, a.stream, a);
}

}  // namespace cf
