// Binding of the CUDA kernels of paged attention: device addresses, strides and sizes as Python integers.
#include <pybind11/pybind11.h>

#include <string>

#include "bind.h"
#include "checks.h"
#include "launch.h"

namespace cf {
namespace {

typedef std::array<int64_t, 4> Four;

AttentionType type_of(const std::string& query, const std::string& pages) {
    if (query != "float16" && query != "bfloat16")
        fail("paged_attention has no CUDA kernel for ", query, " queries; cast them to bfloat16");
    const bool half = query == "float16";
    if (pages == query) return half ? AttentionType::f16 : AttentionType::bf16;
    if (pages == "float8_e4m3fn") return half ? AttentionType::f16_e4m3 : AttentionType::bf16_e4m3;
    fail("paged_attention has no CUDA kernel for ", pages, " pages with ", query,
         " queries; give both one type, or the pages float8_e4m3fn");
}

void serve(int kernel, const AttentionLaunch& a) {
    check_operands(a);
    fill_turns(a);
    if (kernel == 80) return attention_sm80(a);
#if defined(CF_HAS_SM90)
    if (kernel == 90) return attention_sm90(a);
#endif
    fail("paged_attention: the kernel for compute capability ", kernel, " is not built");
}

int64_t scratch(int kernel, const AttentionLaunch& a) {
#if defined(CF_HAS_SM90)
    if (kernel == 90) return attention_sm90_scratch(a);
#endif
    return attention_sm80_scratch(a);
}

}  // namespace

void register_paged_attention_cuda(pybind11::module_& m) {
    m.def("paged_attention_cuda_scratch", [](int kernel, const std::string& query, const std::string& pages, int tokens,
                                             int heads, int head_dim, int multiprocessors) {
        AttentionLaunch a = {};
        a.type = type_of(query, pages);
        a.tokens = tokens, a.heads = heads, a.head_dim = head_dim, a.multiprocessors = multiprocessors;
        return scratch(kernel, a);
    });
    m.def("paged_attention_cuda",
          [](int kernel, const std::string& query, const std::string& pages, Pointer q, Pair q_stride, Pointer k_pages,
             Four k_stride, Pointer v_pages, Four v_stride, Pointer k_scale, Pointer v_scale, Pointer page_ids,
             Pointer positions, Pointer count, Pointer q_positions, Pointer phases, Pointer turns, Pointer scratch,
             int64_t scratch_floats, Pointer out, Pair out_stride, int tokens, int frames, int heads, int head_dim,
             int page_tokens, int slots, int pairs, float scale, int multiprocessors, Pointer stream) {
              AttentionLaunch a = {};
              a.type = type_of(query, pages);
              a.q = at<void>(q), a.k_pages = at<void>(k_pages), a.v_pages = at<void>(v_pages), a.out = at<void>(out);
              a.k_scale = at<const float>(k_scale), a.v_scale = at<const float>(v_scale);
              a.page_ids = at<const int32_t>(page_ids), a.count = at<const int32_t>(count);
              a.turns = at<float>(turns), a.phases = at<const uint64_t>(phases);
              a.positions = at<const int32_t>(positions), a.q_positions = at<const int32_t>(q_positions);
              a.scratch = at<float>(scratch), a.scratch_floats = scratch_floats;
              a.tokens = tokens, a.frames = frames, a.heads = heads, a.head_dim = head_dim;
              a.page_tokens = page_tokens, a.slots = slots, a.pairs = pairs;
              a.q_token = q_stride[0], a.q_head = q_stride[1];
              a.k_page = k_stride[0], a.k_token = k_stride[1], a.k_head = k_stride[2];
              a.v_page = v_stride[0], a.v_token = v_stride[1], a.v_head = v_stride[2], a.v_channel = v_stride[3];
              a.out_token = out_stride[0], a.out_head = out_stride[1];
              a.scale = scale, a.multiprocessors = multiprocessors, a.stream = at<void>(stream);
              if (k_stride[3] != 1)
                  fail("paged_attention: channels of k_pages are ", k_stride[3],
                       " elements apart; call .contiguous() on it");
              pybind11::gil_scoped_release release;
              serve(kernel, a);
          });
}

}  // namespace cf
