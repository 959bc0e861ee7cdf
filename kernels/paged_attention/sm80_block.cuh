// What a block of sm80.cu does with a query tile of a head: queries, copies, products, the online softmax.
#pragma once

#include "cuda/ptx.cuh"
#include "launch.h"
#include "sm80_shape.cuh"
#include "split.cuh"

namespace cf {
namespace {

// T: type of q and out, P: type of the pages, HEAD: channels.
template <class T, class P, int HEAD>
struct Attention {
    using Size = Bytes<P, HEAD>;
    static constexpr int kChunks = Size::row / 16;    // of a row of queries or keys
    static constexpr int kEach = 16 / Size::number;   // channels of a chunk
    static constexpr int kDepth = 32 / Size::number;  // channels or keys that a product sums over

    const AttentionLaunch& a;
    const uint32_t memory;                 // address of shared memory
    const int head, first, tiles_of_page;  // first: token of row 0
    float row_scale = 1.0f;                // e4m3: of this lane's row of queries

    float top[2][2], total[2][2], factor[2][2], sums[2][HEAD / 8][4];
    float value_scale = 1.0f;  // e4m3: the sums are in units of it
    float fade_values = 1.0f;  // e4m3: what a new page multiplies the sums by

    __device__ __forceinline__ Attention(const AttentionLaunch& a, int head, int first, int tiles_of_page)
        : a(a), memory(shared_address(shared_memory())), head(head), first(first), tiles_of_page(tiles_of_page) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) top[m][h] = -INFINITY, total[m][h] = 0.0f, factor[m][h] = a.scale * kLog2e;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
    }

    __device__ __forceinline__ uint32_t stage(int index) const {
        return memory + Size::queries + index * 2 * Size::half;
    }

    // ---- queries ---------------------------------------------------------------------------------------------------

    __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

    // The token whose query is in this lane's row; the last one in rows beyond.
    __device__ __forceinline__ int token() const { return min(first + int(threadIdx.x), a.tokens - 1); }

    // 8 channels from `channel` on, turned by `turns` (4 pairs) unless that is null.
    __device__ __forceinline__ void read_query(int channel, const float* turns, float (&x)[8]) const {
        const auto* row = static_cast<const uint16_t*>(a.q) + token() * a.q_token + head * a.q_head;
        const uint4 bits = *reinterpret_cast<const uint4*>(row + channel);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
        if (!turns) return;
        for (int i = 0; i < 2; ++i) {
            const float4 two = reinterpret_cast<const float4*>(turns)[i];
            const float x0 = x[4 * i], x1 = x[4 * i + 1], x2 = x[4 * i + 2], x3 = x[4 * i + 3];
            x[4 * i] = x0 * two.x - x1 * two.y, x[4 * i + 1] = x0 * two.y + x1 * two.x;
            x[4 * i + 2] = x2 * two.z - x3 * two.w, x[4 * i + 3] = x2 * two.w + x3 * two.z;
        }
    }

    // Write chunk `chunk` of this lane's row of queries.
    __device__ __forceinline__ void put_query(int chunk, const float* turns) const {
        uint4 bits;
        float x[8];
        read_query(chunk * kEach, turns, x);
        if constexpr (kNarrow<P>) {
            const float by = 1.0f / row_scale;
            bits.x = pack_e4m3(x[0] * by, x[1] * by, x[2] * by, x[3] * by);
            bits.y = pack_e4m3(x[4] * by, x[5] * by, x[6] * by, x[7] * by);
            read_query(chunk * kEach + 8, turns ? turns + 8 : nullptr, x);
            bits.z = pack_e4m3(x[0] * by, x[1] * by, x[2] * by, x[3] * by);
            bits.w = pack_e4m3(x[4] * by, x[5] * by, x[6] * by, x[7] * by);
        } else {
            bits = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
        }
        store_shared(memory + place<Size::row>(threadIdx.x, chunk), bits);
    }

    // Write the channels that no page turns, and find the scale of the row.
    __device__ __forceinline__ void start_queries() {
        if constexpr (kNarrow<P>) {
            float largest = kSmallest;
            for (int channel = 0; channel < HEAD; channel += 8) {
                float x[8];
                read_query(channel, nullptr, x);
                for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
            }
            row_scale = largest * 1.41421357f / kLargest;
        }
        for (int chunk = 2 * a.pairs / kEach; chunk < kChunks; ++chunk) put_query(chunk, nullptr);
    }

    // Turn the queries for the page in `slot`, and take its scales.
    __device__ __forceinline__ void start_page(int slot) {
        const int frame = token() / (a.tokens / a.frames);
        const float* turns = a.turns + int64_t(slot * a.frames + frame) * 2 * a.pairs;
        for (int chunk = 0; chunk < 2 * a.pairs / kEach; ++chunk) put_query(chunk, turns + chunk * kEach);
        __syncwarp();  // rows are read by the warp that wrote them, and by no other
        if constexpr (kNarrow<P>) {
            const int64_t place = int64_t(a.page_ids[slot]) * a.heads + head;
            const float scale = fmaxf(a.k_scale[place], kSmallest) * a.scale * kLog2e;
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    factor[m][h] = scale * __shfl_sync(0xffffffffu, row_scale, m * 16 + h * 8 + lane() / 4);
            const float next = fmaxf(a.v_scale[place], kSmallest);
            fade_values = value_scale / next;
            value_scale = next;
        }
    }

    // ---- copies ----------------------------------------------------------------------------------------------------

    __device__ __forceinline__ int keys_of_tile(int tile) const {
        const int rest = a.page_tokens - tile * kKeys;
        return rest < kKeys ? rest : kKeys;
    }

    // Start the copy of a tile of rows; rows beyond the page are zeros.
    __device__ __forceinline__ void load_rows(bool keys, Cursor at, uint32_t to) const {
        const void* pages = keys ? a.k_pages : a.v_pages;
        const int64_t page = keys ? a.k_page : a.v_page, token = keys ? a.k_token : a.v_token,
                      of_head = keys ? a.k_head : a.v_head;
        constexpr int step = kThreads / kChunks;
        const int chunk = threadIdx.x % kChunks, valid = keys_of_tile(at.tile);
        int row = threadIdx.x / kChunks;
        const auto* from =
            static_cast<const unsigned char*>(pages) + chunk * 16 +
            Size::number * (a.page_ids[at.slot] * page + head * of_head + int64_t(at.tile * kKeys + row) * token);
#pragma unroll
        for (int i = 0; i < kKeys / step; ++i, row += step, from += step * token * Size::number)
            copy_async(to + place<Size::row>(keys ? row_of_key<P>(row) : row, chunk), row < valid ? from : pages,
                       row < valid ? 16 : 0);
    }

    // Start the copy of a tile of e4m3 values: rows are channels, tokens beyond the page zeros.
    __device__ __forceinline__ void load_channels(Cursor at, uint32_t to) const {
        constexpr int chunks = kKeys / 16, step = kThreads / chunks;
        const int chunk = threadIdx.x % chunks, left = keys_of_tile(at.tile) - chunk * 16;
        const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
        const auto* from = static_cast<const unsigned char*>(a.v_pages) + a.page_ids[at.slot] * a.v_page +
                           head * a.v_head + at.tile * kKeys + chunk * 16;
#pragma unroll
        for (int channel = threadIdx.x / chunks; channel < HEAD; channel += step)
            copy_async(to + place<Size::value_row>(channel, chunk), bytes ? from + channel * a.v_channel : a.v_pages,
                       bytes);
    }

    __device__ __forceinline__ void load_tile(Cursor at, uint32_t to) const {
        load_rows(true, at, to);
        if constexpr (kNarrow<P>)
            load_channels(at, to + Size::half);
        else
            load_rows(false, at, to + Size::half);
    }

    // ---- products --------------------------------------------------------------------------------------------------

    // Scores of a tile, and from them the weights, as left operands; sums and totals fade to the new maximum.
    __device__ __forceinline__ void weigh(uint32_t keys, int valid, uint32_t (&weight)[kKeys / kDepth][2][4]) {
        const Blocks<Size::row, true> rows(memory + warp() * 32 * Size::row, lane());
        const Blocks<Size::row, false> columns(keys, lane());
        float score[2][kKeys / 8][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) score[m][n][e] = 0.0f;
#pragma unroll
        for (int k = 0; k < Size::row / 32; ++k) {
            uint32_t left[2][4];
            load_matrices(left[0], rows.at(0, k));
            load_matrices(left[1], rows.at(1, k));
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t right[4];
                load_matrices(right, columns.at(n, k));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    multiply<P>(score[m][2 * n], left[m], right[0], right[1]);
                    multiply<P>(score[m][2 * n + 1], left[m], right[2], right[3]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (valid < kKeys) mask(valid, score[m]);
#pragma unroll
            for (int h = 0; h < 2; ++h) soften(score[m], h, factor[m][h], top[m][h], total[m][h], sums[m]);
#pragma unroll
            for (int k = 0; k < kKeys / kDepth; ++k) to_operand(&score[m][k * kDepth / 8], weight[k][m]);
        }
        fade_values = 1.0f;
    }

    __device__ __forceinline__ void mask(int valid, float (&score)[kKeys / 8][4]) const {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (key_of_column<P>(n, lane() % 4, e % 2) >= valid) score[n][e] = -INFINITY;
    }

    // Weights of kDepth keys, as products leave them (blocks of 8 columns), to a left operand.
    __device__ __forceinline__ void to_operand(const float (*w)[4], uint32_t (&operand)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = i / 2 * (kDepth / 16), e = 2 * (i % 2);
            if constexpr (kNarrow<P>)
                operand[i] = pack_e4m3(w[n][e], w[n][e + 1], w[n + 1][e], w[n + 1][e + 1]);
            else
                operand[i] = pack<T>(w[n][e], w[n][e + 1]);
        }
    }

    // The online softmax of one of the two rows (h) that a thread shares with three others.
    __device__ __forceinline__ void soften(float (&score)[kKeys / 8][4], int h, float by, float& top, float& total,
                                           float (&sums)[HEAD / 8][4]) const {
        float peak = fmaxf(score[0][2 * h], score[0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        peak = fmaxf(peak * by, top);
        const float fade = exp2_fast(top - peak), offset = kNarrow<P> ? peak - kWeightBits : peak;
        top = peak;
        total *= fade;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) {
                score[n][e] = exp2_fast(score[n][e] * by - offset);
                total += score[n][e];
            }
        const float keep = kNarrow<P> ? fade * fade_values : fade;
#pragma unroll
        for (int n = 0; n < HEAD / 8; ++n) sums[n][2 * h] *= keep, sums[n][2 * h + 1] *= keep;
    }

    // sums += weights * values.
    __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&weight)[kKeys / kDepth][2][4]) {
        const Blocks<Size::value_row, !kNarrow<P>> blocks(values, lane());
#pragma unroll
        for (int k = 0; k < kKeys / kDepth; ++k)
#pragma unroll
            for (int c = 0; c < HEAD / 16; ++c) {
                uint32_t right[4];
                if constexpr (kNarrow<P>)
                    load_matrices(right, blocks.at(c, k));
                else
                    load_matrices_transposed(right, blocks.at(k, c));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    multiply<P>(sums[m][2 * c], weight[k][m], right[0], right[1]);
                    multiply<P>(sums[m][2 * c + 1], weight[k][m], right[2], right[3]);
                }
            }
    }

    // ---- the whole -------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void run(int from, int to) {
        Cursor next{from / tiles_of_page, from % tiles_of_page};  // the tile whose copy starts next
        const int ahead = min(to - from, kStages - 1);
        Cursor here = next;
        for (int i = 0; i < kStages - 1; ++i) {
            if (i < ahead) load_tile(next, stage(i)), next.advance(tiles_of_page);
            copy_commit();
        }
        start_queries();
        int at = 0;
        for (int left = to - from; left > 0; --left) {
            if (left == to - from || here.tile == 0) start_page(here.slot);
            const int valid = keys_of_tile(here.tile);
            here.advance(tiles_of_page);
            copy_wait<kStages - 2>();
            __syncthreads();  // this tile is there, and the one before it was read by all: its place is free
            if (left > ahead) load_tile(next, stage(at == 0 ? kStages - 1 : at - 1)), next.advance(tiles_of_page);
            copy_commit();
            uint32_t weight[kKeys / kDepth][2][4];
            weigh(stage(at), valid, weight);
            add_values(stage(at) + Size::half, weight);
            at = at == kStages - 1 ? 0 : at + 1;
        }
        copy_wait<0>();
        __syncthreads();  // before another query tile fills the ring
    }

    // Write the rows of this block: to `out`, or the sums as they are as a part of a split tile.
    __device__ __forceinline__ void finish(int part) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float all = total[m][h];
                all += __shfl_xor_sync(0xffffffffu, all, 1);
                all += __shfl_xor_sync(0xffffffffu, all, 2);
                const int row = warp() * 32 + m * 16 + h * 8 + lane() / 4, channel = 2 * (lane() % 4);
                if (first + row >= a.tokens) continue;
                if (part < 0) {
                    const float by = value_scale / all;
                    uint16_t* to =
                        static_cast<uint16_t*>(a.out) + (first + row) * a.out_token + head * a.out_head + channel;
#pragma unroll
                    for (int n = 0; n < HEAD / 8; ++n)
                        *reinterpret_cast<uint32_t*>(to + 8 * n) =
                            pack<T>(sums[m][n][2 * h] * by, sums[m][n][2 * h + 1] * by);
                } else {
                    float* to = part_sums(a.scratch, part, row, kRows, HEAD) + channel;
#pragma unroll
                    for (int n = 0; n < HEAD / 8; ++n)
                        *reinterpret_cast<float2*>(to + 8 * n) =
                            make_float2(sums[m][n][2 * h] * value_scale, sums[m][n][2 * h + 1] * value_scale);
                    if (channel == 0) *part_totals(a.scratch, part, row, kRows, HEAD) = make_float2(top[m][h], all);
                }
            }
    }
};

}  // namespace
}  // namespace cf
