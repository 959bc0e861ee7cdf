/* One-pass conversions. */
#include "convert.h"

#include <string.h>

void cf_convert_rgba8(cf_pixels from, uint8_t* to, size_t stride) {
    for (uint32_t y = 0; y < from.height; ++y) {
        const uint8_t* restrict in = from.data + y * from.stride;
        uint8_t* restrict out = to + y * stride;
        if (from.channels == 4) {
            memcpy(out, in, (size_t)from.width * 4);
            continue;
        }
        for (uint32_t x = 0; x < from.width; ++x) {
            out[4 * x] = in[3 * x];
            out[4 * x + 1] = in[3 * x + 1];
            out[4 * x + 2] = in[3 * x + 2];
            out[4 * x + 3] = 255;
        }
    }
}

/* Coefficients times 2^16. Rows of chroma add up to 0, so that grey has chroma 128 exactly. */
enum { YR = 11966, YG = 40254, YB = 4064, UR = -6596, UG = -22189, UB = 28785, VR = 28785, VG = -26145, VB = -2640 };
enum { HALF = 1 << 15 };

static uint8_t luma_of(const uint8_t* p) {
    return (uint8_t)((YR * p[0] + YG * p[1] + YB * p[2] + (16 << 16) + HALF) >> 16);
}

void cf_convert_nv12(cf_pixels from, uint8_t* luma, size_t luma_stride, uint8_t* chroma, size_t chroma_stride) {
    const uint32_t step = from.channels;
    for (uint32_t y = 0; y < from.height; y += 2) {
        const uint8_t* restrict in = from.data + y * from.stride;
        const uint8_t* restrict below = in + from.stride;
        uint8_t* restrict out = luma + y * luma_stride;
        uint8_t* restrict out_below = out + luma_stride;
        uint8_t* restrict uv = chroma + y / 2 * chroma_stride;
        for (uint32_t x = 0; x < from.width; x += 2) {
            const uint8_t *a = in + (size_t)x * step, *b = a + step, *c = below + (size_t)x * step, *d = c + step;
            out[x] = luma_of(a);
            out[x + 1] = luma_of(b);
            out_below[x] = luma_of(c);
            out_below[x + 1] = luma_of(d);
            const int red = a[0] + b[0] + c[0] + d[0], green = a[1] + b[1] + c[1] + d[1],
                      blue = a[2] + b[2] + c[2] + d[2];
            /* the sum of four has two more bits; 128 makes it positive, so the shift rounds down as it does for luma */
            uv[x] = (uint8_t)((UR * red + UG * green + UB * blue + (128 << 18) + (HALF << 2)) >> 18);
            uv[x + 1] = (uint8_t)((VR * red + VG * green + VB * blue + (128 << 18) + (HALF << 2)) >> 18);
        }
    }
}
