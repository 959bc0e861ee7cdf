/* An OpenXR runtime of a hundred lines under the sample loop, in a time of its own: nothing sleeps, all is the same
 * each run. It displays at HZ, predicts in another clock than the ring's, is strict about the order of calls, and has
 * no free image every now and then. The stream beside it is 16 frames a second with a lead of two.
 *
 *     sample_xr_runtime NAME HZ TURNS
 */
#include <stdbool.h>

#include "../../csrc/client/samples/openxr/stream_layer.h"
#include "check.h"

enum { WIDTH = 64, HEIGHT = 36, IMAGES = 3 };
#define START INT64_C(5000000000000) /* of the ring's clock, when the runtime's says 0 */
#define FRAME_NS (1000000000 / 16)

static cf_writer* writer;
static int64_t period_ns, turn;
static enum { IDLE, WAITED, BEGUN } phase;
static enum { FREE, ACQUIRED, WRITABLE } image_phase;
static uint32_t images;                       /* acquired so far */
static uint64_t held[IMAGES], shown, uploads; /* id in each image, in the one released last */
static uint64_t displayed[1 << 12], nothing, made, busy;

/* The runtime ------------------------------------------------------------------------------------------------------ */

static XrTime display_time(void) { return (turn + 3) * period_ns; }

static XRAPI_ATTR XrResult XRAPI_CALL to_timespec(XrInstance instance, XrTime time, struct timespec* out) {
    CHECK(instance == (XrInstance)1);
    const int64_t ns = time + START;
    *out = (struct timespec){ns / 1000000000, ns % 1000000000};
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrGetInstanceProcAddr(XrInstance instance, const char* name, PFN_xrVoidFunction* out) {
    const bool known = instance == (XrInstance)1 && strcmp(name, "xrConvertTimeToTimespecTimeKHR") == 0;
    *out = known ? (PFN_xrVoidFunction)to_timespec : NULL;
    return known ? XR_SUCCESS : XR_ERROR_FUNCTION_UNSUPPORTED;
}

/* A turn later the writer is a turn further too. */
XRAPI_ATTR XrResult XRAPI_CALL xrWaitFrame(XrSession session, const XrFrameWaitInfo* info, XrFrameState* state) {
    CHECK(session == (XrSession)2 && info == NULL && phase == IDLE);
    phase = WAITED;
    ++turn;
    static int64_t frames;
    for (; frames * FRAME_NS < turn * period_ns + 2 * FRAME_NS; ++frames)
        publish_id(writer, HEIGHT, &(cf_publish_info){START + frames * FRAME_NS, 0, 0, 0, 0});
    state->predictedDisplayTime = display_time();
    state->predictedDisplayPeriod = period_ns;
    state->shouldRender = turn % 50 != 0;
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrBeginFrame(XrSession session, const XrFrameBeginInfo* info) {
    CHECK(session == (XrSession)2 && info == NULL && phase == WAITED);
    phase = BEGUN;
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrAcquireSwapchainImage(XrSwapchain chain, const XrSwapchainImageAcquireInfo* info,
                                                       uint32_t* image) {
    CHECK(chain == (XrSwapchain)4 && info == NULL && image_phase == FREE && phase == BEGUN);
    image_phase = ACQUIRED;
    *image = images++ % IMAGES;
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrWaitSwapchainImage(XrSwapchain chain, const XrSwapchainImageWaitInfo* info) {
    static uint32_t asked;
    CHECK(chain == (XrSwapchain)4 && image_phase == ACQUIRED && info->timeout == 0);
    if (++asked % 7 == 0) {
        ++busy;
        return XR_TIMEOUT_EXPIRED;
    }
    image_phase = WRITABLE;
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrReleaseSwapchainImage(XrSwapchain chain, const XrSwapchainImageReleaseInfo* info) {
    CHECK(chain == (XrSwapchain)4 && info == NULL && image_phase == WRITABLE);
    image_phase = FREE;
    shown = held[(images - 1) % IMAGES];
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrDestroySwapchain(XrSwapchain chain) {
    CHECK(chain == (XrSwapchain)4);
    return XR_SUCCESS;
}

XRAPI_ATTR XrResult XRAPI_CALL xrLocateSpace(XrSpace space, XrSpace base, XrTime time, XrSpaceLocation* out) {
    CHECK(space == (XrSpace)5 && base == (XrSpace)3 && time == display_time());
    out->locationFlags = XR_SPACE_LOCATION_POSITION_VALID_BIT | XR_SPACE_LOCATION_ORIENTATION_VALID_BIT;
    out->pose = (XrPosef){{0, 0, 0, 1}, {1, 2, (float)turn}};
    return XR_SUCCESS;
}

/* What is seen: the frame whose time is nearest, or, where there was no free image, that of the turn before. */
XRAPI_ATTR XrResult XRAPI_CALL xrEndFrame(XrSession session, const XrFrameEndInfo* info) {
    CHECK(session == (XrSession)2 && phase == BEGUN && info->displayTime == display_time());
    phase = IDLE;
    CHECK(info->layerCount == (turn % 50 != 0 && shown != 0));
    if (info->layerCount == 0) {
        ++nothing;
        return XR_SUCCESS;
    }
    const XrCompositionLayerQuad* quad = (const XrCompositionLayerQuad*)(const void*)info->layers[0];
    CHECK(quad->type == XR_TYPE_COMPOSITION_LAYER_QUAD && quad->subImage.swapchain == (XrSwapchain)4);
    CHECK(quad->subImage.imageRect.extent.width == WIDTH && quad->size.width == 2 && quad->size.height == 1.125f);
    const int64_t off = (int64_t)(shown - 1) * FRAME_NS - display_time(), reach = FRAME_NS / 2;
    const int64_t slack = image_phase == ACQUIRED ? period_ns : 0;
    CHECK(off <= reach && -off <= reach + slack);
    ++displayed[shown];
    return XR_SUCCESS;
}

/* The graphics API, and the test ----------------------------------------------------------------------------------- */

static XrResult make_swapchain(void* user, uint32_t width, uint32_t height, XrSwapchain* swapchain) {
    CHECK(user == &writer && width == WIDTH && height == HEIGHT);
    ++made;
    *swapchain = (XrSwapchain)4;
    return XR_SUCCESS;
}

static void upload(void* user, uint32_t image, const cf_frame* frame) {
    CHECK(user == &writer && image_phase == WRITABLE && image == (images - 1) % IMAGES);
    CHECK(torn_words(frame) == 0 && frame->id > shown);
    held[image] = frame->id;
    ++uploads;
}

/* One pose a picture, for the time when it will be seen, in the ring's clock. */
static uint64_t take_poses(void) {
    cf_writer_event event;
    uint64_t poses = 0;
    for (; cf_writer_take_event(writer, &event) == CF_SUCCESS; ++poses) {
        CHECK(event.kind == CF_EVENT_POSE && event.pose.time_ns == display_time() + START);
        CHECK(event.pose.position[2] == (float)turn && event.pose.orientation[3] == 1);
    }
    return poses;
}

int main(int argc, char** argv) {
    CHECK(argc == 4);
    period_ns = 1000000000 / atoi(argv[2]);
    writer = make_ring(argv[1], WIDTH, HEIGHT, 1, 6);
    stream_layer layer = {.session = (XrSession)2,
                          .space = (XrSpace)3,
                          .head = (XrSpace)5,
                          .pose = {{0, 0, 0, 1}, {0, 0, -2}},
                          .width_m = 2,
                          .graphics = {&writer, make_swapchain, upload},
                          .stream = open_session(argv[1], 0)};
    CHECK(stream_layer_open(&layer, (XrInstance)9) == XR_ERROR_FUNCTION_UNSUPPORTED);
    CHECK(stream_layer_open(&layer, (XrInstance)1) == XR_SUCCESS);
    uint64_t poses = 0;
    for (int turns = atoi(argv[3]); turns > 0; --turns) {
        CHECK(stream_layer_frame(&layer) == XR_SUCCESS);
        poses += take_poses();
    }
    CHECK(poses == uploads && made == 1 && busy > 0);
    uint64_t least = UINT64_MAX, most = 0;
    for (uint64_t id = 3; id < shown; ++id) { /* all but the first and the last are whole */
        if (displayed[id] < least) least = displayed[id];
        if (displayed[id] > most) most = displayed[id];
    }
    printf("frames %" PRIu64 " uploads %" PRIu64 " displayed %" PRIu64 " to %" PRIu64 " times, nothing %" PRIu64 "\n",
           shown, uploads, least, most, nothing);
    stream_layer_close(&layer);
    cf_session_close(layer.stream);
    cf_writer_close(writer);
    return 0;
}
