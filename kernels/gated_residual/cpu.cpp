// Residual add with a gate per latent frame, fused with the norm that follows it, on the CPU.
//
//   x <- x + y * gate[frame];   normed = layer_norm(x) * (1 + scale[frame]) + shift[frame]
//
// The norm reads the row just written while it is in the first-level cache: one pass over memory in place of two.
#include "isa.h"
#include "norm.h"
#include "threads.h"

namespace cf {

struct GatedResidualArgs {
    void* x;        // (tokens, dim), updated in place
    const void* y;  // (tokens, dim)
    void* out;      // (tokens, dim), null: no norm
    const float *gate, *shift, *scale;  // (frames, dim); gate null: 1
    int64_t x_stride, y_stride, out_stride, gate_stride, shift_stride, scale_stride;
    int tokens, gate_frames, norm_frames, dim;
    float eps;
    bool is_bf16;
    int threads;
};

namespace CF_NS {
namespace {

template <class T>
CF_INLINE void add_row(T* x, const T* y, const float* gate, int dim) {
    int j = 0;
    for (; j + W <= dim; j += W) store(x + j, gate ? load(x + j) + load(y + j) * load(gate + j) : load(x + j) + load(y + j));
    for (; j < dim; ++j) store1(x + j, load1(x + j) + load1(y + j) * (gate ? gate[j] : 1.0f));
}

template <class T>
void run(const GatedResidualArgs& a) {
    const int gate_rows = a.tokens / a.gate_frames, norm_rows = a.tokens / a.norm_frames;
    const int threads = threads_for(int64_t(a.tokens) * a.dim, a.threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int token = 0; token < a.tokens; ++token) {
        T* x = static_cast<T*>(a.x) + token * a.x_stride;
        const int64_t gate = token / gate_rows, frame = token / norm_rows;
        add_row(x, static_cast<const T*>(a.y) + token * a.y_stride, a.gate ? a.gate + gate * a.gate_stride : nullptr, a.dim);
        if (a.out)
            norm_row(static_cast<const T*>(x), static_cast<T*>(a.out) + token * a.out_stride, a.shift + frame * a.shift_stride,
                     a.scale + frame * a.scale_stride, a.dim, a.eps);
    }
}

}  // namespace

void gated_residual(const GatedResidualArgs& a) { a.is_bf16 ? run<bf16>(a) : run<float>(a); }

}  // namespace CF_NS
}  // namespace cf

#if CF_LEVEL == 0
#include "bind.h"

CF_DISPATCH(gated_residual, GatedResidualArgs)

namespace cf {

void register_gated_residual(pybind11::module_& m) {
    m.def("gated_residual",
          [](Pointer x, int64_t x_stride, Pointer y, int64_t y_stride, Pointer gate, int64_t gate_stride, int gate_frames, Pointer shift,
             int64_t shift_stride, Pointer scale, int64_t scale_stride, int norm_frames, Pointer out, int64_t out_stride, int tokens,
             int dim, float eps, bool is_bf16, int threads) {
              check_divides("tokens", tokens, "frames of gate", gate_frames);
              check_divides("tokens", tokens, "frames of shift", norm_frames);
              const GatedResidualArgs a{at<void>(x), at<void>(y), at<void>(out), at<float>(gate), at<float>(shift), at<float>(scale),
                                        x_stride, y_stride, out_stride, gate_stride, shift_stride, scale_stride, tokens, gate_frames,
                                        norm_frames, dim, eps, is_bf16, threads};
              pybind11::gil_scoped_release release;
              gated_residual(a);
          });
}

}  // namespace cf
#endif
