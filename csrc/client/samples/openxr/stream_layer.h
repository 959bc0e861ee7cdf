/* A live stream as a quad layer of an OpenXR program: sample code, for whatever graphics API the program has.
 *
 * The program creates instance, session, spaces and a swapchain; each frame of its loop goes through
 * stream_layer_frame, or does by itself what that does. Nothing here waits for the model: xrWaitFrame alone paces.
 */
#ifndef STREAM_LAYER_H
#define STREAM_LAYER_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#define XR_USE_TIMESPEC
#include <openxr/openxr.h>
#include <openxr/openxr_platform.h>

#include "cfengine_client.h"

/* What the graphics API does. */
typedef struct stream_graphics {
    void* user;
    /* Make a swapchain for pictures of this size, with an sRGB format; whatever the last one had is not needed. */
    XrResult (*make_swapchain)(void* user, uint32_t width, uint32_t height, XrSwapchain* swapchain);
    /* Copy the frame into that image of the swapchain. The planes may be read until this returns. */
    void (*upload)(void* user, uint32_t image, const cf_frame* frame);
} stream_graphics;

typedef struct stream_layer {
    XrSession session;
    XrSpace space; /* that the quad stands in: LOCAL or STAGE */
    XrSpace head;  /* VIEW, whose pose the model is told; XR_NULL_HANDLE: it is told none */
    XrPosef pose;  /* of the quad's centre */
    float width_m; /* its height follows from the frames */
    stream_graphics graphics;
    cf_session* stream;

    /* private */
    XrInstance instance;
    PFN_xrConvertTimeToTimespecTimeKHR to_timespec;
    XrSwapchain swapchain;
    uint32_t width, height;
    uint64_t generation, id; /* of the picture in the swapchain; 0: none */
    bool taken;              /* an image was acquired, and is not released yet */
    uint32_t image;
} stream_layer;

/* Find xrConvertTimeToTimespecTimeKHR. The instance was created with XR_KHR_convert_timespec_time; else
 * XR_ERROR_FUNCTION_UNSUPPORTED. */
XrResult stream_layer_open(stream_layer* layer, XrInstance instance);

/* XrTime in nanoseconds of cf_now_ns(). 0, which acquire takes for "now", where the runtime cannot say. */
int64_t stream_layer_time_ns(const stream_layer* layer, XrTime time);

/* Bring the swapchain up to the frame for `time`, if that is another one, and tell the model where the head will be.
 * False: there is nothing to show yet. */
bool stream_layer_update(stream_layer* layer, XrTime time);

/* The layer that shows it, for xrEndFrame. After stream_layer_update was true. */
XrCompositionLayerQuad stream_layer_quad(const stream_layer* layer);

/* One turn of a loop that shows nothing else: xrWaitFrame, xrBeginFrame, update, xrEndFrame. */
XrResult stream_layer_frame(stream_layer* layer);

/* Before the session is destroyed. The stream stays open. */
void stream_layer_close(stream_layer* layer);

#endif
