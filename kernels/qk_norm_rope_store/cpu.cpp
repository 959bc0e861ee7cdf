// RMS norm of queries and keys, spatial rotation and the write into pages, on the CPU.
//
//   q' = R_s (q / rms(q) * norm_q);   page[ids[frame]] = R_s (k / rms(k) * norm_k), v;   mean of the unrotated keys
//
// A task is kBlock tokens. Each writes its own sum of keys, in float64, and the blocks are added in order at the end, so
// the mean does not depend on the number of threads. The normed row is rounded to the type of its input before it is
// rotated or summed, as the reference does.
#include <cmath>

#include "isa.h"
#include "rotary.h"
#include "threads.h"

namespace cf {

struct QkNormRopeStoreArgs {
    const void *q, *k, *v;  // (tokens, dim); q null: pages and mean only
    const float *norm_q, *norm_k;  // (dim,)
    void *k_pages, *v_pages;       // (pages, page_tokens, heads, head_dim)
    const int32_t* page_ids;       // (frames,)
    const float* turns;            // (page_tokens, 2, head_dim)
    void* out;                     // (tokens, heads, head_dim), dense
    float* mean;                   // (dim,)
    int64_t q_stride, k_stride, v_stride, k_page_stride[3], v_page_stride[3];
    int tokens, page_tokens, heads, head_dim;
    float eps;
    bool is_bf16;
    int threads;
};

namespace CF_NS {
namespace {

constexpr int kBlock = 16;

template <class T>
CF_INLINE void rms_row(const T* x, T* to, const float* weight, int dim, float eps) {
    vf wide = {};
    float square = 0;
    int j = 0;
    for (; j + W <= dim; j += W) wide += load(x + j) * load(x + j);
    for (square = sum(wide); j < dim; ++j) square += load1(x + j) * load1(x + j);
    const float factor = 1.0f / std::sqrt(square / dim + eps);
    for (j = 0; j + W <= dim; j += W) store(to + j, load(x + j) * factor * load(weight + j));
    for (; j < dim; ++j) store1(to + j, load1(x + j) * factor * weight[j]);
}

template <class T>
void block(const QkNormRopeStoreArgs& a, int first, int last, T* row, double* sums) {
    const int dim = a.heads * a.head_dim;
    for (int j = 0; j < dim; ++j) sums[j] = 0;
    for (int token = first; token < last; ++token) {
        const int place = token % a.page_tokens;
        const int64_t page = a.page_ids[token / a.page_tokens];
        const float* turns = a.turns + int64_t(place) * 2 * a.head_dim;
        T* key = static_cast<T*>(a.k_pages) + page * a.k_page_stride[0] + place * a.k_page_stride[1];
        T* value = static_cast<T*>(a.v_pages) + page * a.v_page_stride[0] + place * a.v_page_stride[1];
        rms_row(static_cast<const T*>(a.k) + token * a.k_stride, row, a.norm_k, dim, a.eps);
        for (int j = 0; j < dim; ++j) sums[j] += load1(row + j);
        const T* from = static_cast<const T*>(a.v) + token * a.v_stride;
        for (int head = 0; head < a.heads; ++head) {
            turn_row(row + head * a.head_dim, key + head * a.k_page_stride[2], turns, a.head_dim, a.head_dim);
            std::memcpy(value + head * a.v_page_stride[2], from + head * a.head_dim, a.head_dim * sizeof(T));
        }
        if (!a.q) continue;
        rms_row(static_cast<const T*>(a.q) + token * a.q_stride, row, a.norm_q, dim, a.eps);
        T* to = static_cast<T*>(a.out) + int64_t(token) * dim;
        for (int head = 0; head < a.heads; ++head)
            turn_row(row + head * a.head_dim, to + head * a.head_dim, turns, a.head_dim, a.head_dim);
    }
}

template <class T>
void run(const QkNormRopeStoreArgs& a) {
    static thread_local Scratch scratch;
    const int dim = a.heads * a.head_dim, blocks = (a.tokens + kBlock - 1) / kBlock;
    const int threads = threads_for(int64_t(a.tokens) * dim * 3, a.threads);
    double* sums = static_cast<double*>(scratch.reserve(int64_t(blocks) * dim * 8 + int64_t(threads) * (dim + 16) * 4));
    float* rows = reinterpret_cast<float*>(sums + int64_t(blocks) * dim);
#pragma omp parallel num_threads(threads)
    {
        T* row = reinterpret_cast<T*>(rows + thread_index() * int64_t(dim + 16));
#pragma omp for schedule(static)
        for (int i = 0; i < blocks; ++i) {
            const int first = i * kBlock, last = first + kBlock < a.tokens ? first + kBlock : a.tokens;
            block<T>(a, first, last, row, sums + int64_t(i) * dim);
        }
    }
    for (int i = 1; i < blocks; ++i)
        for (int j = 0; j < dim; ++j) sums[j] += sums[int64_t(i) * dim + j];
    for (int j = 0; j < dim; ++j) a.mean[j] = float(sums[j] / a.tokens);
}

}  // namespace

void qk_norm_rope_store(const QkNormRopeStoreArgs& a) { a.is_bf16 ? run<bf16>(a) : run<float>(a); }

}  // namespace CF_NS
}  // namespace cf

#if CF_LEVEL == 0
#include "bind.h"

CF_DISPATCH(qk_norm_rope_store, QkNormRopeStoreArgs)

namespace cf {

void register_qk_norm_rope_store(pybind11::module_& m) {
    m.def("qk_norm_rope_store",
          [](Pointer q, int64_t q_stride, Pointer k, int64_t k_stride, Pointer v, int64_t v_stride, Pointer norm_q, Pointer norm_k,
             Pointer k_pages, Triple k_page_stride, Pointer v_pages, Triple v_page_stride, Pointer page_ids, Pointer turns, Pointer out,
             Pointer mean, int tokens, int frames, int pages, int page_tokens, int heads, int head_dim, float eps, bool is_bf16,
             int threads) {
              const auto* ids = at<const int32_t>(page_ids);
              for (int frame = 0; frame < frames; ++frame)
                  check_range("page_ids", frame, ids[frame], 0, pages, "make the page pool as large as the table expects");
              if (int64_t(frames) * page_tokens != tokens)
                  fail("k has ", tokens, " tokens but ", frames, " pages of ", page_tokens, " tokens were named; pass whole frames");
              const QkNormRopeStoreArgs a{at<void>(q), at<void>(k), at<void>(v), at<float>(norm_q), at<float>(norm_k), at<void>(k_pages),
                                          at<void>(v_pages), ids, at<float>(turns), at<void>(out), at<float>(mean), q_stride, k_stride,
                                          v_stride, {k_page_stride[0], k_page_stride[1], k_page_stride[2]},
                                          {v_page_stride[0], v_page_stride[1], v_page_stride[2]}, tokens, page_tokens, heads, head_dim,
                                          eps, is_bf16, threads};
              pybind11::gil_scoped_release release;
              qk_norm_rope_store(a);
          });
}

}  // namespace cf
#endif
