// Attention of a chunk over the pages of a table, on the CPU.
//
//   out[q] = sum_k softmax_k(R_{t_q} q . R_{t_k} k / sqrt(head_dim)) v[k],   keys of the first `count` slots
//
// Pages hold keys rotated by row and column; only the temporal rotation is left, and only differences of positions
// enter, so positions count from that of the first query (angles in float64: millions are as exact as small numbers).
//
// Tiling. Lanes of a vector are queries, so the softmax runs down columns without a horizontal step, and neither keys
// nor values need transposing: both enter as broadcast scalars. A task is one head and up to N vectors of queries.
//   1. pack: the keys of a head are turned and copied once for all queries, across page borders, in tiles of kTile keys
//      (so pages of any size cost the same); values likewise, M channels side by side.
//   2. attend, per tile: S = K Q (M keys x N vectors in registers), running maximum folded into its epilogue,
//      P = 2^(S c - m c) with the scale in one multiply-add, O = O keep + V P (M channels x N vectors in registers).
// With AVX-512 bf16 the same tiles hold pairs along the reduced axis and feed vdpbf16ps; P is rounded to bf16, sums
// stay in float32. Lesser machines convert bf16 to float32 while packing.
//
// Tried and lost: pairing bf16 values element by element while packing (8 % of a call at 504 keys of 32 channels, in
// one thread; whole vectors now).
#include <cmath>

#include "isa.h"
#include "pack.h"
#include "threads.h"

namespace cf {
namespace CF_NS {
namespace {

// acc[i][x] = sum_j left(i, j) right[j][x]; left is [i][j] with `stride` for rows, or [j][i] with M side by side.
template <class A, int n, bool rows_first>
CF_INLINE void product(const float* left, int64_t stride, const float* right, int depth, vf (&acc)[M][n]) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) acc[i][x] = vf{};
    for (int j = 0; j < depth; ++j) {
        vf row[n];
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) row[x] = load(right + x * W);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const vf one = splat(rows_first ? left[i * stride] : left[i]);
#pragma GCC unroll 4
            for (int x = 0; x < n; ++x) acc[i][x] = A::multiply_add(one, row[x], acc[i][x]);
        }
        right += n * W;
        left += rows_first ? 1 : M;
    }
}

// S = K Q of one tile, and the maximum over its keys.
template <class A, int n>
void scores(const float* keys, int words, const float* query, float* out, int rows, vf (&top)[n]) {
    int first = 0;
    for (; first + M <= rows; first += M) {
        vf acc[M][n];
        product<A, n, true>(keys + int64_t(first) * words, words, query, words, acc);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int x = 0; x < n; ++x) {
                store(out + (int64_t(first + i) * n + x) * W, acc[i][x]);
                top[x] = vmax(top[x], acc[i][x]);
            }
    }
    if (first == rows) return;
    vf acc[M][n];
    product<A, n, true>(keys + int64_t(first) * words, words, query, words, acc);
    float rest[M * n * W];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) store(rest + (i * n + x) * W, acc[i][x]);
    for (int i = 0; first + i < rows; ++i)
        for (int x = 0; x < n; ++x) {
            const vf value = load(rest + (i * n + x) * W);
            store(out + (int64_t(first + i) * n + x) * W, value);
            top[x] = vmax(top[x], value);
        }
}

// O = O keep + V P of one tile.
template <class A, int n>
void add_values(const float* values, int64_t block, const float* weights, int depth, float* out, int channels, const vf (&keep)[n]) {
    for (int first = 0; first < channels; first += M, values += block) {
        vf acc[M][n];
        product<A, n, false>(values, 0, weights, depth, acc);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int x = 0; x < n; ++x) {
                float* place = out + (int64_t(first + i) * n + x) * W;
                store(place, load(place) * keep[x] + acc[i][x]);
            }
    }
}

// P = 2^(S scale - top), in place for floats; their sum.
template <int n>
void exponentials(F32, float* score, int rows, float scale, const vf (&top)[n], vf (&total)[n]) {
    for (int k = 0; k < rows; ++k)
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x, score += W) {
            const vf p = exp2_negative(load(score) * scale - top[x]);
            store(score, p);
            total[x] += p;
        }
}
#if CF_LEVEL == 3
// The same as pairs of bf16 of two keys, in place: row k / 2 is written after rows k and k + 1 are read.
template <int n>
void exponentials(Dot, float* score, int rows, float scale, const vf (&top)[n], vf (&total)[n]) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_loadu_si512(order);
    float* out = score;
    for (int k = 0; k < rows; k += 2, score += 2 * n * W)
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x, out += W) {
            const vf even = exp2_negative(load(score + x * W) * scale - top[x]);
            const vf odd = k + 1 < rows ? exp2_negative(load(score + (n + x) * W) * scale - top[x]) : vf{};
            total[x] += even + odd;
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            store(out, (vf)_mm512_permutexvar_epi16(interleave, (__m512i)both));
        }
}
#endif

template <class T, int n>
void write_out(const PagedAttentionArgs& a, int head, int first, const float* sums, const vf (&total)[n], T* row) {
    vf inverse[n];
    for (int x = 0; x < n; ++x) inverse[x] = 1.0f / total[x];
    for (int c = 0; c < a.head_dim; ++c)
        for (int x = 0; x < n; ++x) store(row + (c * n + x) * W, load(sums + (c * n + x) * W) * inverse[x]);
    const int lanes = a.tokens - first < n * W ? a.tokens - first : n * W;
    for (int lane = 0; lane < lanes; ++lane) {
        T* to = static_cast<T*>(a.out) + (first + lane) * a.out_stride[0] + head * a.out_stride[1];
        for (int c = 0; c < a.head_dim; ++c) to[c] = row[c * n * W + lane];
    }
}

// One head, n vectors of queries from `first`, over all tiles of packed keys and values.
template <class A, class T, int n>
void attend(const PagedAttentionArgs& a, const Plan& p, int head, int first, const float* packed, float* work) {
    float* query = work;
    float* score = query + int64_t(p.words) * n * W;
    float* sums = score + int64_t(kTile) * n * W;
    float* spare = sums + int64_t(p.channels) * n * W;
    pack_query<A, T, n>(a, p, head, first, spare, query);
    for (int j = 0; j < p.channels * n; ++j) store(sums + int64_t(j) * W, vf{});
    const float scale = float(1.4426950408889634 / std::sqrt(double(a.head_dim)));
    vf top[n], total[n], keep[n], offset[n];
    for (int x = 0; x < n; ++x) top[x] = splat(-INFINITY), total[x] = vf{};
    for (int tile = 0; tile < p.tiles; ++tile) {
        const int rows = p.keys - tile * kTile < kTile ? p.keys - tile * kTile : kTile;
        vf before[n];
        for (int x = 0; x < n; ++x) before[x] = top[x];
        scores<A, n>(packed + tile * p.key_tile, p.words, query, score, rows, top);
        for (int x = 0; x < n; ++x) {
            keep[x] = exp2_negative((before[x] - top[x]) * scale);
            total[x] *= keep[x];
            offset[x] = top[x] * scale;
        }
        exponentials(A(), score, rows, scale, offset, total);
        add_values<A, n>(packed + p.tiles * p.key_tile + tile * p.value_tile, p.value_block, score, (rows + A::kPair - 1) / A::kPair,
                         sums, p.channels, keep);
    }
    write_out<T, n>(a, head, first, sums, total, reinterpret_cast<T*>(spare));
}

template <class A, class T>
void attend_block(const PagedAttentionArgs& a, const Plan& p, int head, int block, const float* packed, float* work) {
    const int each = p.vectors / p.blocks, more = p.vectors % p.blocks;
    const int first = (block * each + (block < more ? block : more)) * W;
    switch (each + (block < more)) {
        case 1: return attend<A, T, 1>(a, p, head, first, packed, work);
        case 2: return attend<A, T, 2>(a, p, head, first, packed, work);
        default: return attend<A, T, N>(a, p, head, first, packed, work);
    }
}

// ---- the whole ---------------------------------------------------------------------------------------------------

void fill_turns(const int32_t* positions, int count, int64_t origin, const PagedAttentionArgs& a, int span, float* turns) {
    const int pairs = a.head_dim / 2 - 2 * (a.head_dim / 6);
    for (int s = 0; s < count; ++s, turns += 2 * span)
        for (int i = 0; i < span / 2; ++i) {
            const double angle = i < pairs ? double(positions[s] - origin) * std::pow(a.theta, -double(i) / pairs) : 0.0;
            turns[2 * i] = turns[2 * i + 1] = float(std::cos(angle));
            turns[span + 2 * i + 1] = float(std::sin(angle));
            turns[span + 2 * i] = -turns[span + 2 * i + 1];
        }
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class A, class T>
void run(const PagedAttentionArgs& a) {
    static thread_local Scratch scratch;
    Plan p;
    p.keys = a.slots * a.page_tokens;
    p.words = a.head_dim / A::kPair;
    p.channels = int(round_up(a.head_dim, M));
    p.vectors = (a.tokens + W - 1) / W;
    p.blocks = (p.vectors + N - 1) / N;
    p.tiles = (p.keys + kTile - 1) / kTile;
    p.span = int(round_up(2 * (a.head_dim / 2 - 2 * (a.head_dim / 6)), W));
    p.key_tile = int64_t(kTile) * p.words;
    p.value_block = kTile / A::kPair * M + 16;  // off a power of two: blocks must not share cache sets
    p.value_tile = p.channels / M * p.value_block;
    p.head = round_up(p.tiles * (p.key_tile + p.value_tile), 16);
    p.work = round_up(int64_t(p.words + kTile + 2 * p.channels) * N * W, 16) + 16;
    const int64_t turns = round_up(int64_t(a.slots + a.frames) * 2 * p.span, 16);
    int group = int(kGroupBytes / 4 / p.head);
    group = group < 1 ? 1 : group > a.heads ? a.heads : group;
    const double work = double(a.tokens) * p.keys * a.heads * a.head_dim;
    const int threads = work < 1e6 ? 1 : a.threads;  // a million products: about 30 microseconds

    p.packed = static_cast<float*>(scratch.reserve((group * p.head + threads * p.work + turns) * 4));
    p.works = p.packed + group * p.head;
    float* table = p.works + threads * p.work;
    fill_turns(a.positions, a.slots, a.q_positions[0], a, p.span, table);
    fill_turns(a.q_positions, a.frames, a.q_positions[0], a, p.span, table + int64_t(a.slots) * 2 * p.span);
    p.key_turns = table;
    p.query_turns = table + int64_t(a.slots) * 2 * p.span;

#pragma omp parallel num_threads(threads)
    {
        float* mine = p.works + thread_index() * p.work;
        for (int head = 0; head < a.heads; head += group) {
            const int heads = a.heads - head < group ? a.heads - head : group;
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < heads * p.tiles; ++task)
                pack<A, T>(a, p, head + task / p.tiles, task % p.tiles, p.packed + task / p.tiles * p.head);
#pragma omp for schedule(dynamic, 1)
            for (int task = 0; task < heads * p.blocks; ++task)
                attend_block<A, T>(a, p, head + task / p.blocks, task % p.blocks, p.packed + task / p.blocks * p.head, mine);
        }
    }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& a) {
    if (!a.is_bf16) return run<F32, float>(a);
#if CF_LEVEL == 3
    run<Dot, bf16>(a);
#else
    run<F32, bf16>(a);
#endif
}

}  // namespace CF_NS
}  // namespace cf

#if CF_LEVEL == 0
#include <pybind11/pybind11.h>

#include "bind.h"

CF_DISPATCH(paged_attention, PagedAttentionArgs)

namespace cf {

void register_paged_attention(pybind11::module_& m) {
    m.def("paged_attention",
          [](Pointer q, Pair q_stride, Pointer k_pages, Triple k_stride, Pointer v_pages, Triple v_stride, Pointer page_ids,
             Pointer positions, Pointer count, Pointer q_positions, Pointer out, Pair out_stride, int tokens, int frames, int heads,
             int head_dim, int pages, int page_tokens, int slots, double theta, bool is_bf16, int threads) {
              const auto* ids = at<const int32_t>(page_ids);
              const int valid = *at<const int32_t>(count);
              check_range("count", 0, valid, 1, slots + 1, "the table and its page ids must have been made for the same memory");
              for (int slot = 0; slot < valid; ++slot)
                  check_range("page_ids", slot, ids[slot], 0, pages, "make the page pool as large as the table expects");
              check_divides("tokens", tokens, "chunk_frames", frames);
              PagedAttentionArgs a{at<void>(q), at<void>(k_pages), at<void>(v_pages), ids, at<const int32_t>(positions),
                                   at<const int32_t>(q_positions), at<void>(out), {q_stride[0], q_stride[1]},
                                   {k_stride[0], k_stride[1], k_stride[2]}, {v_stride[0], v_stride[1], v_stride[2]},
                                   {out_stride[0], out_stride[1]}, tokens, frames, heads, head_dim, page_tokens, valid, theta,
                                   is_bf16, threads};
              pybind11::gil_scoped_release release;
              paged_attention(a);
          });
}

}  // namespace cf
#endif
