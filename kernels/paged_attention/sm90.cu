// Attention over pages on Hopper (H100, H200): wgmma, the copy engine, and warps with roles.
//
//   out = softmax(R(t_q - t_k) q . k / sqrt(head_dim)) v, over the pages that a table shows (reference.py)
//
// Tiling. A block takes 128 queries of one head, 64 to each of two consumer warpgroups, and walks the pages of its
// segment (split.cuh; a unit there is a page) in tiles of 128 keys. The last tile of a page is 32 wide where that is
// enough: 1,560 keys are 12 tiles of 128 and one of 32, of which 24 count. Scores, weights and sums stay in registers.
//
// Pipeline. One thread of a third warpgroup keeps three stages of keys and three of values full, four of e4m3
// (sm90_load.cuh); the tensor map covers the whole pool, so that a page id is a coordinate. Consumers overlap the
// softmax of a tile with the values of the tile before, and take turns (sm90_consumer.cuh). Softmax is online, to the
// base 2, with float32 sums.
//
// The turn. Queries are the operand that products take from registers: 32 words a thread at a head size of 128. Only
// the temporal pairs turn, 22 filled up to 24 of 64, and a thread's words are whole pairs. So a thread keeps 12 words
// as they were in shared memory, for itself alone, and once a page it turns them anew: no barrier, no fence, about
// 150 instructions beside 13 tiles of some 450. The row of cosines and sines comes with the page's first tile of
// keys.
//
// Considered and rejected:
//  - turned queries in shared memory (both operands from there): a fence and a barrier of the warpgroup each page,
//    and 96 instead of 64 of the 128 bytes a clock of shared memory. It would free 20 registers for tiles of 160 or
//    176 keys.
//  - cp.async instead of the copy engine: addresses and issue slots for a whole warpgroup, 17 to 24 % slower where
//    flash-attention compared them for pages (its issue 2468, on B200).
//  - 13 tiles of 120 keys, which divide 1,560: products along keys come in 16, so 3 % more of them than 12 * 128 + 32.
//  - 192 queries a block: three consumer warpgroups leave 160 registers a thread; 218 are in use, 227 with e4m3.
//  - e4m3 values summed inside the tensor cores over all keys: they keep some 14 bits (sm90_e4m3.cuh).
//
// What to expect (not measured). 4,680 queries, 12 heads, 21 pages: 0.942 TFLOP; 444 tiles on 132 multiprocessors are
// three waves of whole tiles and 8 pages of the rest: 71 pages to a block, where 70.6 would be even. A tile of 16-bit
// numbers is 2,048 clocks of tensor cores, 1,056 of exponentials and 900 of issue slots, so a page is 25,100 clocks
// and the launch 1.78 million: 1.11 ms at 1.6 GHz if the tensor cores never wait, 1.4 ms (670 TFLOP/s) at the 80 %
// that good kernels reach. A tile of e4m3 is 1,024 clocks of tensor cores, 1,056 of exponentials, about 1,000 of
// issue slots, all side by side: 0.57 ms if they overlapped perfectly, 0.9 ms (1,050 TFLOP/s) expected. Keys and
// values come from the L2 cache, 0.8 MB a page and block: 7.5 GB, 5.3 TB/s at 1.4 ms, which is near what that cache
// gives. Where it is the limit, pair the blocks of neighbouring tiles in a cluster and let each load one half for
// both. Partial results are 180 of 67 KB, some microseconds.
#include "checks.h"
#include "combine.cuh"
#include "cuda/tensor_map.h"
#include "sm90_e4m3.cuh"
#include "sm90_wide.cuh"

namespace cf {
namespace sm90 {

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ Maps maps, const __grid_constant__ Job job) {
    Shared<S>& shared = *reinterpret_cast<Shared<S>*>(shared_memory());
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            mbarrier_init(&shared.k_full[s], 1);
            mbarrier_init(&shared.v_full[s], 1);
            mbarrier_init(&shared.k_empty[s], kConsumers / 32);
            mbarrier_init(&shared.v_empty[s], kConsumers / 32);
        }
        mbarrier_publish();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0) produce<S>(maps, job, shared);
    } else {
        take_registers<232>();
        typename std::conditional<S::kNarrow, NarrowConsumer<S>, WideConsumer<S>>::type consumer(job, shared);
        consumer.begin();
        const Split split = device_split(job);
        Segment segment;
        for (int n = 0; find_segment(split, blockIdx.x, n, segment); ++n) attend_segment<S>(consumer, job, segment);
        consumer.end();
    }
}

// ---- host -----------------------------------------------------------------------------------------------------------

const char* const kName = "paged_attention (sm90)";

Split split(const AttentionLaunch& launch) {
    const int row_tiles = (launch.tokens + kRows - 1) / kRows;
    return {row_tiles * launch.heads, launch.multiprocessors, 0};
}

// The launch does not say how many pages there are; a page id is trusted as it is everywhere.
constexpr int64_t kAnyPages = int64_t(1) << 31;

template <class S>
Maps maps(const AttentionLaunch& l) {
    const int head = S::kHead;
    if (S::kNarrow) {
        // tokens as 4 i + u: a copy takes u = 0, 1 or u = 2, 3 of a tile
        const TensorShape k = {l.k_pages, 1, 5, {head, 4, l.page_tokens / 4, l.heads, kAnyPages},
                         {1, l.k_token, 4 * l.k_token, l.k_head, l.k_page}, {head, 2, kKeys / 4, 1, 1}, S::kKeySwizzle};
        TensorShape rest = k;
        rest.box[2] = S::kRest / 4;
        const TensorShape v = {l.v_pages, 1, 4, {l.page_tokens, head, l.heads, kAnyPages},
                               {1, l.v_channel, l.v_head, l.v_page}, {kKeys, head, 1, 1}, 128};
        return {make_tensor_map(k, kName), make_tensor_map(v, kName), make_tensor_map(rest, kName)};
    }
    const TensorShape k = {l.k_pages, 2, 4, {head, l.page_tokens, l.heads, kAnyPages},
                           {1, l.k_token, l.k_head, l.k_page}, {64, kKeys, 1, 1}, 128};
    const TensorShape v = {l.v_pages, 2, 4, {head, l.page_tokens, l.heads, kAnyPages},
                           {1, l.v_token, l.v_head, l.v_page}, {64, kKeys, 1, 1}, 128};
    const TensorMap keys = make_tensor_map(k, kName);
    return {keys, make_tensor_map(v, kName), keys};
}

template <class S>
void run(const AttentionLaunch& launch) {
    static_assert(sizeof(Shared<S>) <= 227 * 1024, "a block of Hopper may have 227 KiB of shared memory");
    if (launch.pairs != S::kPairs)
        fail(kName, ": the table of turns has ", launch.pairs, " pairs but a head of ", launch.head_dim, " needs ",
             S::kPairs, "; fill up to that with cosine 1 and sine 0");
    const int most = kTurnBytes / (S::kPairs * int(sizeof(float2)));
    if (launch.frames > most)
        fail(kName, ": a chunk has ", launch.frames, " frames but at most ", most,
             " are served; choose implementation 'triton'");
    Job job;
    static_cast<AttentionLaunch&>(job) = launch;
    job.split = split(launch);
    job.row_tiles = job.split.tiles / launch.heads;
    job.log2_scale = launch.scale * 1.4426950408889634f;
    const Grid grid{launch.multiprocessors, kThreads, int(sizeof(Shared<S>))};
    cf::launch(attend<S>, kName, grid, launch.stream, maps<S>(launch), job);
    combine<typename S::Q, S::kHead, kRows>(launch, job.split, 1, job.row_tiles);
}

template <class Q, class Page, int kHead>
void run_rest(const AttentionLaunch& launch) {
    const int rest = (launch.page_tokens - 1) % kKeys + 1;
    if (launch.page_tokens > kKeys && rest <= 32)
        run<Shape<Q, Page, kHead, 32>>(launch);
    else
        run<Shape<Q, Page, kHead, kKeys>>(launch);
}

template <class Q, class Page>
void run_head(const AttentionLaunch& launch) {
    if (launch.head_dim == 128)
        run_rest<Q, Page, 128>(launch);
    else
        run_rest<Q, Page, 64>(launch);
}

}  // namespace sm90

int64_t attention_sm90_scratch(const AttentionLaunch& launch) {
    return scratch_floats(sm90::split(launch), sm90::kRows, launch.head_dim);
}

void attention_sm90(const AttentionLaunch& launch) {
    check_operands(launch);
    check_scratch(launch, attention_sm90_scratch(launch));
    if (has_e4m3_pages(launch) && launch.page_tokens % 4)
        fail(sm90::kName, ": pages of e4m3 have ", launch.page_tokens,
             " tokens but a multiple of 4 is needed; choose implementation 'triton'");
    switch (launch.type) {
        case AttentionType::f16: return sm90::run_head<F16, F16>(launch);
        case AttentionType::bf16: return sm90::run_head<BF16, BF16>(launch);
        case AttentionType::f16_e4m3: return sm90::run_head<F16, E4M3>(launch);
        case AttentionType::bf16_e4m3: return sm90::run_head<BF16, E4M3>(launch);
    }
}

}  // namespace cf
