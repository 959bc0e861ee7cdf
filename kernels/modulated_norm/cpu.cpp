// Layer norm without affine, scaled and shifted per latent frame, on the CPU.
//
//   out = (x - mean) / sqrt(var + eps) * (1 + scale[frame]) + shift[frame]
//
// A row stays in the first-level cache over its three runs (mean, variance, result); rows are shared out evenly.
#include "isa.h"
#include "norm.h"
#include "threads.h"

namespace cf {

struct ModulatedNormArgs {
    const void* x;  // (tokens, dim)
    void* out;      // (tokens, dim)
    const float *shift, *scale;  // (frames, dim)
    int64_t x_stride, out_stride, shift_stride, scale_stride;
    int tokens, frames, dim;
    float eps;
    bool is_bf16;
    int threads;
};

namespace CF_NS {
namespace {

template <class T>
void run(const ModulatedNormArgs& a) {
    const int per_frame = a.tokens / a.frames;
    const int threads = threads_for(int64_t(a.tokens) * a.dim, a.threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int token = 0; token < a.tokens; ++token) {
        const int64_t frame = token / per_frame;
        norm_row(static_cast<const T*>(a.x) + token * a.x_stride, static_cast<T*>(a.out) + token * a.out_stride,
                 a.shift + frame * a.shift_stride, a.scale + frame * a.scale_stride, a.dim, a.eps);
    }
}

}  // namespace

void modulated_norm(const ModulatedNormArgs& a) { a.is_bf16 ? run<bf16>(a) : run<float>(a); }

}  // namespace CF_NS
}  // namespace cf

#if CF_LEVEL == 0
#include "bind.h"

CF_DISPATCH(modulated_norm, ModulatedNormArgs)

namespace cf {

void register_modulated_norm(pybind11::module_& m) {
    m.def("modulated_norm", [](Pointer x, int64_t x_stride, Pointer shift, int64_t shift_stride, Pointer scale, int64_t scale_stride,
                               Pointer out, int64_t out_stride, int tokens, int frames, int dim, float eps, bool is_bf16, int threads) {
        check_divides("tokens", tokens, "frames", frames);
        const ModulatedNormArgs a{at<void>(x), at<void>(out), at<float>(shift), at<float>(scale), x_stride, out_stride,
                                  shift_stride, scale_stride, tokens, frames, dim, eps, is_bf16, threads};
        pybind11::gil_scoped_release release;
        modulated_norm(a);
    });
}

}  // namespace cf
#endif
