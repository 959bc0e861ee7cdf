// What a CUDA kernel of paged attention is given. Plain C++: no CUDA and no torch header.
//
// Sizes and strides count elements. Pointers are device addresses, aligned to 16 bytes; rows of channels of q, k and v
// start at multiples of 16 bytes too, and their channels are adjacent. The one exception are the values of e4m3 pages,
// which are stored transposed: there tokens are adjacent (v_token == 1) and v_channel is a multiple of 16.
//
// Page ids and the number of valid slots are read on the device: one captured launch serves every state of a memory.
#pragma once

#include <cstdint>

namespace cf {

enum class AttentionType {
    f16,
    bf16,
    f16_e4m3,
    bf16_e4m3
};  // type of q and out, then that of the pages where it differs

struct AttentionLaunch {
    AttentionType type;
    const void* q;         // (tokens, heads, head_dim), rotated by row and column
    const void* k_pages;   // (pages, page_tokens, heads, head_dim), rotated by row and column
    const void* v_pages;   // (pages, page_tokens, heads, head_dim)
    void* out;             // (tokens, heads, head_dim)
    const float* k_scale;  // (pages, heads), what a stored e4m3 number is multiplied by; null unless pages are e4m3
    const float* v_scale;
    const int32_t* page_ids;  // (slots,)
    const int32_t* count;     // (1,), slots attended; 0 counts as 1 (split.cuh)

    // (slots, frames, pairs, 2): cosine and sine of (q_position of a frame - position of a slot) * rate of a pair of
    // channels (2 i, 2 i + 1). `pairs` is a multiple of 8, at most head_dim / 2; the temporal pairs come first, what
    // fills up to `pairs` has cosine 1 and sine 0, and channels from 2 * pairs on are not turned at all.
    float* turns;                // written by fill_turns, which runs before the attention on the same stream
    const int32_t* positions;    // (slots,)
    const int32_t* q_positions;  // (frames,)
    const uint64_t* phases;      // (pairs,): rate / (2 pi) * 2^64, a turn per position as a fraction of 2^64

    float* scratch;          // partial results of split keys
    int64_t scratch_floats;  // its size: at least what attention_sm80_scratch or attention_sm90_scratch asks for

    int32_t tokens, frames, heads, head_dim, page_tokens, slots, pairs;  // tokens = frames * tokens of a latent frame
    int64_t q_token, q_head;
    int64_t k_page, k_token, k_head;
    int64_t v_page, v_token, v_head, v_channel;  // v_channel is 1 unless pages are e4m3
    int64_t out_token, out_head;
    float scale;  // of a score before the softmax, to the base e: 1 / sqrt(head_dim)

    int32_t multiprocessors;
    void* stream;  // cudaStream_t
};

// All throw cf::Error (csrc/check.h) where a shape, type or stride cannot be served or the launch is refused.
void fill_turns(const AttentionLaunch& launch);
void attention_sm80(const AttentionLaunch& launch);
void attention_sm90(const AttentionLaunch& launch);
int64_t attention_sm80_scratch(const AttentionLaunch& launch);  // floats of scratch; pointers and strides are not read
int64_t attention_sm90_scratch(const AttentionLaunch& launch);

}  // namespace cf
