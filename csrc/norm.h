// Layer norm of one row with scale and shift, in float32.
#pragma once

#include <cmath>

#include "simd.h"

namespace cf {
namespace CF_NS {

// to = (x - mean) / sqrt(var + eps) * (1 + scale) + shift; the variance from centred values, in a second run over the row
template <class T>
CF_INLINE void norm_row(const T* x, T* to, const float* shift, const float* scale, int dim, float eps) {
    vf wide = {};
    float total = 0, square = 0;
    int j = 0;
    for (; j + W <= dim; j += W) wide += load(x + j);
    for (total = sum(wide); j < dim; ++j) total += load1(x + j);
    const float mean = total / dim;
    wide = vf{};
    for (j = 0; j + W <= dim; j += W) {
        const vf centred = load(x + j) - mean;
        wide += centred * centred;
    }
    for (square = sum(wide); j < dim; ++j) square += (load1(x + j) - mean) * (load1(x + j) - mean);
    const float factor = 1.0f / std::sqrt(square / dim + eps);
    for (j = 0; j + W <= dim; j += W)
        store(to + j, (load(x + j) - mean) * factor * (1.0f + load(scale + j)) + load(shift + j));
    for (; j < dim; ++j) store1(to + j, (load1(x + j) - mean) * factor * (1.0f + scale[j]) + shift[j]);
}

}  // namespace CF_NS
}  // namespace cf
