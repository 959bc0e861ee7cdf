/* A live stream as a quad layer: which frame a display time gets, and when it is uploaded. */
#include "stream_layer.h"

XrResult stream_layer_open(stream_layer* layer, XrInstance instance) {
    layer->instance = instance;
    return xrGetInstanceProcAddr(instance, "xrConvertTimeToTimespecTimeKHR", (PFN_xrVoidFunction*)&layer->to_timespec);
}

int64_t stream_layer_time_ns(const stream_layer* layer, XrTime time) {
    struct timespec monotonic;
    if (XR_FAILED(layer->to_timespec(layer->instance, time, &monotonic))) return 0;
    return (int64_t)monotonic.tv_sec * 1000000000 + monotonic.tv_nsec;
}

/* The swapchain, for frames of this size. */
static bool fit(stream_layer* layer, const cf_frame* frame) {
    if (layer->swapchain != XR_NULL_HANDLE && frame->width == layer->width && frame->height == layer->height)
        return true;
    if (layer->swapchain != XR_NULL_HANDLE) xrDestroySwapchain(layer->swapchain);
    layer->swapchain = XR_NULL_HANDLE;
    layer->id = 0;
    layer->taken = false;
    layer->width = frame->width;
    layer->height = frame->height;
    const stream_graphics* graphics = &layer->graphics;
    if (XR_SUCCEEDED(graphics->make_swapchain(graphics->user, frame->width, frame->height, &layer->swapchain)))
        return true;
    layer->swapchain = XR_NULL_HANDLE;
    return false;
}

/* An image that may be written. It may be in use still: then the next turn asks again, instead of waiting. */
static bool take_image(stream_layer* layer) {
    const XrSwapchainImageWaitInfo at_once = {.type = XR_TYPE_SWAPCHAIN_IMAGE_WAIT_INFO, .timeout = 0};
    if (!layer->taken) layer->taken = XR_SUCCEEDED(xrAcquireSwapchainImage(layer->swapchain, NULL, &layer->image));
    return layer->taken && xrWaitSwapchainImage(layer->swapchain, &at_once) == XR_SUCCESS;
}

/* Copy a frame that is pinned. The compositor shows the image that was released last, so a frame of 16 a second is
 * uploaded once and shown four to eight times. */
static void show(stream_layer* layer, const cf_frame* frame) {
    if (frame->id == layer->id && frame->generation == layer->generation) return;
    if (!fit(layer, frame) || !take_image(layer)) return;
    layer->graphics.upload(layer->graphics.user, layer->image, frame);
    if (XR_FAILED(xrReleaseSwapchainImage(layer->swapchain, NULL))) return;
    layer->taken = false;
    layer->generation = frame->generation;
    layer->id = frame->id;
}

/* Where the head will be at `time`: once for every new picture, which is as often as the model can use it. */
static void tell_pose(stream_layer* layer, XrTime time, int64_t time_ns) {
    const XrSpaceLocationFlags whole = XR_SPACE_LOCATION_POSITION_VALID_BIT | XR_SPACE_LOCATION_ORIENTATION_VALID_BIT;
    XrSpaceLocation location = {.type = XR_TYPE_SPACE_LOCATION};
    if (layer->head == XR_NULL_HANDLE || XR_FAILED(xrLocateSpace(layer->head, layer->space, time, &location))) return;
    if ((location.locationFlags & whole) != whole) return;
    const XrVector3f* at = &location.pose.position;
    const XrQuaternionf* turned = &location.pose.orientation;
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_POSE;
    event.as.pose = (cf_pose){{at->x, at->y, at->z}, {turned->x, turned->y, turned->z, turned->w}, time_ns};
    cf_session_push(layer->stream, &event, NULL); /* a full queue: the next pose is newer anyway */
}

bool stream_layer_update(stream_layer* layer, XrTime time) {
    cf_acquire_info when = CF_ACQUIRE_INFO_INIT; /* timeout_ns is 0: this thread never waits for the model */
    cf_frame frame = CF_FRAME_INIT;
    const uint64_t id = layer->id, generation = layer->generation;
    when.display_time_ns = stream_layer_time_ns(layer, time);
    when.policy = CF_POLICY_NEAREST;
    if (cf_frame_acquire(layer->stream, &when, &frame) == CF_SUCCESS) {
        show(layer, &frame);
        /* taken back while it was copied: what was released may be of two frames, and the next turn replaces it */
        if (cf_frame_release(layer->stream, frame.id) == CF_ERROR_LEASE_LOST) layer->id = 0;
    }
    if (layer->id != 0 && (layer->id != id || layer->generation != generation))
        tell_pose(layer, time, when.display_time_ns);
    return layer->id != 0;
}

XrCompositionLayerQuad stream_layer_quad(const stream_layer* layer) {
    const float height_m = layer->width_m * (float)layer->height / (float)layer->width;
    return (XrCompositionLayerQuad){
        .type = XR_TYPE_COMPOSITION_LAYER_QUAD,
        .space = layer->space,
        .eyeVisibility = XR_EYE_VISIBILITY_BOTH,
        .subImage = {layer->swapchain, {{0, 0}, {(int32_t)layer->width, (int32_t)layer->height}}, 0},
        .pose = layer->pose,
        .size = {layer->width_m, height_m},
    };
}

XrResult stream_layer_frame(stream_layer* layer) {
    XrFrameState state = {.type = XR_TYPE_FRAME_STATE};
    XrResult result = xrWaitFrame(layer->session, NULL, &state);
    if (XR_SUCCEEDED(result)) result = xrBeginFrame(layer->session, NULL);
    if (XR_FAILED(result)) return result;
    const bool seen = stream_layer_update(layer, state.predictedDisplayTime) && state.shouldRender;
    XrCompositionLayerQuad quad = {0};
    if (seen) quad = stream_layer_quad(layer);
    const XrCompositionLayerBaseHeader* layers[] = {(const XrCompositionLayerBaseHeader*)&quad};
    const XrFrameEndInfo end = {
        .type = XR_TYPE_FRAME_END_INFO,
        .displayTime = state.predictedDisplayTime,
        .environmentBlendMode = XR_ENVIRONMENT_BLEND_MODE_OPAQUE,
        .layerCount = seen ? 1 : 0,
        .layers = layers,
    };
    return xrEndFrame(layer->session, &end);
}

void stream_layer_close(stream_layer* layer) {
    if (layer->swapchain != XR_NULL_HANDLE) xrDestroySwapchain(layer->swapchain);
    layer->swapchain = XR_NULL_HANDLE;
    layer->id = 0;
}
