// What every CUDA kernel of paged attention asks of its operands.
#pragma once

#include "check.h"
#include "launch.h"

namespace cf {

inline bool has_e4m3_pages(const AttentionLaunch& a) {
    return a.type == AttentionType::f16_e4m3 || a.type == AttentionType::bf16_e4m3;
}

// Copies move 16 bytes at a time: strides of rows must be whole units of that.
inline void check_unit(const char* name, int64_t stride, int number_bytes) {
    if (stride * number_bytes % 16)
        fail("paged_attention: a stride of ", name, " is ", stride, " elements, ", stride * number_bytes,
             " bytes, but must be a multiple of 16 bytes; make the tensor contiguous, or pad its rows");
}

inline void check_pointer(const char* name, const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16)
        fail("paged_attention: ", name, " starts at address ", address,
             " but must start at a multiple of 16; copy it into a tensor of its own");
}

inline void check_operands(const AttentionLaunch& a) {
    const int number = has_e4m3_pages(a) ? 1 : 2;
    if (a.head_dim != 64 && a.head_dim != 128)
        fail("paged_attention: head_dim is ", a.head_dim,
             " but the CUDA kernels have 64 and 128; choose implementation 'triton'");
    if (a.tokens < 1 || a.frames < 1 || a.tokens % a.frames)
        fail("paged_attention: ", a.tokens, " queries do not divide into ", a.frames,
             " latent frames; pass whole frames");
    if (a.heads < 1 || a.page_tokens < 1 || a.slots < 1)
        fail("paged_attention: ", a.heads, " heads, ", a.page_tokens, " tokens in a page and ", a.slots,
             " slots; there must be one of each at least");
    if (a.multiprocessors < 1)
        fail("paged_attention: the GPU has ", a.multiprocessors, " multiprocessors; there must be one at least");
    check_pointer("q", a.q);
    check_pointer("k_pages", a.k_pages);
    check_pointer("v_pages", a.v_pages);
    check_pointer("out", a.out);
    for (int64_t stride : {a.q_token, a.q_head}) check_unit("q", stride, 2);
    for (int64_t stride : {a.k_page, a.k_token, a.k_head}) check_unit("k_pages", stride, number);
    for (int64_t stride : {a.v_page, a.v_head}) check_unit("v_pages", stride, number);
    check_unit("v_pages", number == 1 ? a.v_channel : a.v_token, number);
    for (int64_t stride : {a.out_token, a.out_head}) check_unit("out", stride, 2);
    const int64_t adjacent = number == 1 ? a.v_token : a.v_channel;
    if (adjacent != 1)
        fail("paged_attention: ", number == 1 ? "tokens" : "channels", " of v_pages are ", adjacent,
             " elements apart but must be adjacent; ",
             number == 1 ? "e4m3 values are stored transposed, (pages, heads, head_dim, page_tokens)"
                         : "call .contiguous() on it");
    if (number == 1 && (!a.k_scale || !a.v_scale))
        fail("paged_attention: e4m3 pages come with k_scale and v_scale, (pages, heads) float32; pass both");
}

inline void check_scratch(const AttentionLaunch& a, int64_t needed) {
    if (a.scratch_floats < needed)
        fail("paged_attention: the scratch memory has ", a.scratch_floats, " floats but ", needed,
             " are needed; allocate what the kernel asks for");
}

}  // namespace cf
