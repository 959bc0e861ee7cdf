/* Pixels into a slot: RGB or RGBA rows of bytes to RGBA8 or NV12, each in one pass over the source. */
#ifndef CF_CONVERT_H
#define CF_CONVERT_H

#include <stddef.h>
#include <stdint.h>

typedef struct cf_pixels {
    const uint8_t* data;
    size_t stride;     /* bytes from one row to the next */
    uint32_t channels; /* 3: RGB, 4: RGBA */
    uint32_t width, height;
} cf_pixels;

/* R, G, B, A; alpha is 255 where there was none. */
void cf_convert_rgba8(cf_pixels from, uint8_t* to, size_t stride);

/* BT.709, limited range, from full-range RGB; alpha is ignored. Width and height are even. With r, g, b in 0..255:
 *
 *     Y  =  16 + 0.18259 r + 0.61423 g + 0.06201 b          Cb = 128 - 0.10064 r - 0.33857 g + 0.43922 b
 *                                                           Cr = 128 + 0.43922 r - 0.39894 g - 0.04027 b
 *
 * in 16-bit fixed point, rounded to nearest; chroma is of the sum of four pixels. */
void cf_convert_nv12(cf_pixels from, uint8_t* luma, size_t luma_stride, uint8_t* chroma, size_t chroma_stride);

#endif
