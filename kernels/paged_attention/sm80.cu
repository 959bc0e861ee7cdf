// Attention of a chunk over the pages of a table with the tensor cores of Ampere, Ada and consumer Blackwell.
//
//   out[q] = sum_k softmax_k(scale * R(q_position - position) q . k) v[k],   keys of the pages in the first `count`
//   slots
//
// Tiling. A block of 4 warps holds 128 queries of one head, a warp 32 of them: as two fragments of 16 rows, so that
// every fragment of keys or values read from shared memory serves two products (one alone would saturate shared memory
// on the A100). Keys come in tiles of 32. Sums (32 x head_dim a warp) and scores (32 x 32) live in registers; two
// blocks fit a multiprocessor of the A100, one those with 100 KB of shared memory.
//  - Queries lie in shared memory. When a page begins, every lane reads the temporal channels of its row again (from
//  the
//    L2 cache), turns them for that page and writes them over the old ones; all key tiles of the page share that turn.
//  - Tiles of keys and values go through a ring of three places, two copies ahead of the products. One barrier a tile
//    shows the tile that has arrived and frees the place of the one before it.
//  - The last tile of a page is filled up with zeros, whose scores are masked: 1,560 keys are 48 tiles and 24 keys.
//  - Rows of shared memory are swizzled in units of 16 bytes: neither copies nor matrix loads meet in a bank.
// Blocks persist; split.cuh divides the work and says where the sums of split keys go.
//
// e4m3 pages (from 8.9 on). The turned queries are rounded to e4m3 with one scale a row: a turn may grow a number by
// sqrt(2), so that headroom is left and the scale serves all pages. k_scale joins it in the factor of the scores.
// Weights are 2^(score - maximum + 8), which uses the range of e4m3 and cancels in the quotient; v_scale changes with a
// page, so the sums are kept in units of the current one. Two tricks of layout: values are stored with tokens adjacent
// (products need both operands adjacent along the sum), and keys enter shared memory in an order in which the weights,
// as the score product leaves them in registers, are the left operand of the value product.
//
// Considered and rejected, by the compiler's report and by counting instructions, not by a clock: tiles of 64 keys (24
// to 64 bytes of registers spilled), queries in registers (32 more than there are), 16 rows a warp (see above).
#include "checks.h"
#include "combine.cuh"
#include "cuda/launch.cuh"
#include "sm80_block.cuh"

namespace cf {
namespace {

constexpr char kName[] = "paged_attention";

template <class T, class P, int HEAD>
__global__ void __launch_bounds__(kThreads, 2) attend(AttentionLaunch a, Split split, int tiles_per_head) {
    const int tiles_of_page = (a.page_tokens + kKeys - 1) / kKeys;
    split.units = slots_attended(a.count) * tiles_of_page;
    Segment segment;
    for (int n = 0; find_segment(split, blockIdx.x, n, segment); ++n) {
        Attention<T, P, HEAD> attention(a, segment.tile / tiles_per_head, segment.tile % tiles_per_head * kRows,
                                        tiles_of_page);
        attention.run(segment.from, segment.to);
        attention.finish(segment.part);
    }
}

// ---- host ----------------------------------------------------------------------------------------------------------

template <class T, class P, int HEAD>
Split divide(const AttentionLaunch& a) {
    const int blocks = blocks_per_multiprocessor(attend<T, P, HEAD>, kName, kThreads, Bytes<P, HEAD>::shared);
    return {(a.tokens + kRows - 1) / kRows * a.heads, a.multiprocessors * blocks, 0};
}

// The floats of scratch that a launch needs; the launch itself unless only they are asked for.
template <class T, class P, int HEAD>
int64_t serve(const AttentionLaunch& a, bool ask) {
    const Split split = divide<T, P, HEAD>(a);
    const int64_t needed = scratch_floats(split, kRows, HEAD);
    if (ask) return needed;
    check_scratch(a, needed);
    const int tiles_per_head = (a.tokens + kRows - 1) / kRows;
    launch(attend<T, P, HEAD>, kName, {split.blocks, kThreads, Bytes<P, HEAD>::shared}, a.stream, a, split,
           tiles_per_head);
    combine<T, HEAD, kRows>(a, split, (a.page_tokens + kKeys - 1) / kKeys, tiles_per_head);
    return needed;
}

template <class T, class P>
int64_t serve_head(const AttentionLaunch& a, bool ask) {
    return a.head_dim == 64 ? serve<T, P, 64>(a, ask) : serve<T, P, 128>(a, ask);
}

int64_t serve_type(const AttentionLaunch& a, bool ask) {
    if (has_e4m3_pages(a) && compute_capability() < 89)
        fail(kName, ": e4m3 pages need compute capability 8.9 but the GPU has ", compute_capability() / 10, ".",
             compute_capability() % 10, "; choose 16-bit pages");
    switch (a.type) {
        case AttentionType::f16:
            return serve_head<F16, F16>(a, ask);
        case AttentionType::bf16:
            return serve_head<BF16, BF16>(a, ask);
        case AttentionType::f16_e4m3:
            return serve_head<F16, E4M3>(a, ask);
        default:
            return serve_head<BF16, E4M3>(a, ask);
    }
}

}  // namespace

void attention_sm80(const AttentionLaunch& a) {
    check_operands(a);
    serve_type(a, false);
}

int64_t attention_sm80_scratch(const AttentionLaunch& a) { return serve_type(a, true); }

}  // namespace cf
