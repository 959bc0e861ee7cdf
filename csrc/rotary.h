// Rotation of interleaved channel pairs by a table.
#pragma once

#include "simd.h"

namespace cf {
namespace CF_NS {

// Copy a row of channels, turning the first `span` by its table: (2, span), cosines twice, then sines as (-s, s).
template <class T, class E>
CF_INLINE void turn_row(const T* from, E* to, const float* turns, int span, int head_dim) {
    int j = 0;
    for (; j + W <= head_dim; j += W) {
        vf x = load(from + j);
        if (j < span) x = turn(x, load(turns + j), load(turns + span + j));
        store(to + j, x);
    }
    for (; j < head_dim; j += 2) {
        const float a = load1(from + j), b = load1(from + j + 1);
        const bool turned = j < span;
        const float c = turned ? turns[j] : 1.0f, s = turned ? turns[span + j + 1] : 0.0f;
        store1(to + j, a * c - b * s);
        store1(to + j + 1, a * s + b * c);
    }
}

}  // namespace CF_NS
}  // namespace cf
