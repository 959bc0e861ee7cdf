// Operands of paged attention and their packing: keys turned and copied once per head, values M channels side by side.
#pragma once

#include "rotary.h"
#include "simd.h"

namespace cf {

struct PagedAttentionArgs {
    const void* q;        // (tokens, heads, head_dim)
    const void* k_pages;  // (pages, page_tokens, heads, head_dim)
    const void* v_pages;
    const int32_t* page_ids;     // (slots,)
    const int32_t* positions;    // (slots,)
    const int32_t* q_positions;  // (frames,)
    void* out;                   // (tokens, heads, head_dim)
    int64_t q_stride[2], k_stride[3], v_stride[3], out_stride[2];
    int tokens, frames, heads, head_dim, page_tokens, slots;  // slots: those attended to
    double theta;
    bool is_bf16;
    int threads;
};

namespace CF_NS {
namespace {

constexpr int M = CF_LEVEL >= 2 ? 8 : 4;  // keys, or channels of values, of a register tile
constexpr int N = 3;                      // vectors of queries of a register tile
constexpr int kTile = 128;                // keys of a packed tile
constexpr int64_t kGroupBytes = 4 << 20;  // packed heads that are worked on together

// What one lane consumes at a time: a float (F32), or two bf16 in its place (Dot).
struct F32 {
    typedef float Element;
    static constexpr int kPair = 1;
    static CF_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};
#if CF_LEVEL == 3
struct Dot {
    typedef bf16 Element;
    static constexpr int kPair = 2;
    static CF_INLINE vf multiply_add(vf a, vf b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

struct Plan {
    int keys, words, channels;  // keys in all; words of a key; channels of a value, rounded up to M
    int vectors, blocks, tiles, span;
    int64_t key_tile, value_block, value_tile, head, work;  // sizes in floats
    float *packed, *works;
    const float *key_turns, *query_turns;  // (slots or frames, 2, span): cosines twice, sines with sign
};

// Values of one or two keys, M channels side by side.
template <class T>
CF_INLINE void place_values(F32, const T* row, const T*, float* to, int64_t block, int head_dim) {
    int c = 0;
    for (; c + M <= head_dim; c += M, to += block)
        for (int i = 0; i < M; ++i) to[i] = load1(row + c + i);
    if (c < head_dim)
        for (int i = 0; i < M; ++i) to[i] = c + i < head_dim ? load1(row + c + i) : 0.0f;
}
#if CF_LEVEL == 3
CF_INLINE void place_values(Dot, const bf16* even, const bf16* odd, float* to, int64_t block, int head_dim) {
    int c = 0;
    for (; odd && c + 2 * M <= head_dim; c += 2 * M, to += 2 * block) {
        const vu low = __builtin_convertvector(*reinterpret_cast<const vh_mem*>(even + c), vu);
        const vu both = low | __builtin_convertvector(*reinterpret_cast<const vh_mem*>(odd + c), vu) << 16;
        std::memcpy(to, &both, 4 * M);
        std::memcpy(to + block, reinterpret_cast<const char*>(&both) + 4 * M, 4 * M);
    }
    for (; c < head_dim; c += M, to += block)
        for (int i = 0; i < M; ++i) {
            const uint32_t low = c + i < head_dim ? even[c + i] : 0;
            const uint32_t high = odd && c + i < head_dim ? odd[c + i] : 0;
            const uint32_t word = low | high << 16;
            std::memcpy(to + i, &word, 4);
        }
}
#endif

template <class A, class T>
void pack(const PagedAttentionArgs& a, const Plan& p, int head, int tile, float* packed) {
    const int first = tile * kTile, rows = p.keys - first < kTile ? p.keys - first : kTile;
    float* keys = packed + tile * p.key_tile;
    float* values = packed + p.tiles * p.key_tile + tile * p.value_tile;
    const T* last = nullptr;
    int slot = first / a.page_tokens, row = first % a.page_tokens;
    for (int k = 0; k < rows; ++k, ++row) {
        if (row == a.page_tokens) row = 0, ++slot;
        const int64_t page = a.page_ids[slot];
        const T* key = static_cast<const T*>(a.k_pages) + page * a.k_stride[0] + row * a.k_stride[1] + head * a.k_stride[2];
        const T* value = static_cast<const T*>(a.v_pages) + page * a.v_stride[0] + row * a.v_stride[1] + head * a.v_stride[2];
        turn_row(key, reinterpret_cast<typename A::Element*>(keys + int64_t(k) * p.words), p.key_turns + int64_t(slot) * 2 * p.span,
                 p.span, a.head_dim);
        if (A::kPair == 1)
            place_values(A(), value, value, values + int64_t(k) * M, p.value_block, a.head_dim);
        else if (k % 2 || k + 1 == rows)
            place_values(A(), k % 2 ? last : value, k % 2 ? value : nullptr, values + int64_t(k / 2) * M, p.value_block, a.head_dim);
        last = value;
    }
    for (int k = rows; k % M; ++k)
        for (int j = 0; j < p.words; ++j) keys[int64_t(k) * p.words + j] = 0.0f;
}

template <class A, class T, int n>
void pack_query(const PagedAttentionArgs& a, const Plan& p, int head, int first, float* row, float* out) {
    const int per_frame = a.tokens / a.frames;
    for (int lane = 0; lane < n * W; ++lane) {
        const int token = first + lane;
        if (token < a.tokens) {
            const T* from = static_cast<const T*>(a.q) + token * a.q_stride[0] + head * a.q_stride[1];
            turn_row(from, reinterpret_cast<typename A::Element*>(row), p.query_turns + int64_t(token / per_frame) * 2 * p.span, p.span,
                     a.head_dim);
            for (int j = 0; j < p.words; ++j) out[int64_t(j) * n * W + lane] = row[j];
        } else {
            for (int j = 0; j < p.words; ++j) out[int64_t(j) * n * W + lane] = 0.0f;
        }
    }
}

}  // namespace
}  // namespace CF_NS
}  // namespace cf
