/* CFEngineView: a node that keeps an ImageTexture up to date with a live stream. */
#include <stdlib.h>
#include <string.h>

#include "cfengine_actions.h"
#include "cfengine_client.h"
#include "engine.h"

#define LOOK_NS 250000000 /* between two looks for a writer */
#define FORMAT_RGBA8 5    /* Image.FORMAT_RGBA8 */

typedef struct view {
    char ring[CF_NAME_BYTES + 2]; /* one more, so that a name that is too long is refused by the library */
    cf_session* session;
    int64_t next_look_ns;
    cf_result said;
    gd_variant image, texture;
    GDExtensionObjectPtr image_object;
    uint32_t width, height;             /* of the image */
    uint32_t shown_width, shown_height; /* of the texture */
    uint64_t generation, id;            /* of the picture in the texture */
} view;

/* Of methods of Godot's classes. Written once, by initialize. */
static struct {
    gd_name resize, set_data, get_data_size, set_image, update;
} names;

/* Pictures --------------------------------------------------------------------------------------------------------- */

/* Say what failed, once. */
static void complain(view* view, cf_result result, const char* sentence) {
    if (result != view->said) gd_warn(sentence);
    view->said = result;
}

static bool look(view* view) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    const int64_t now_ns = cf_now_ns();
    if (view->session != NULL) return true;
    if (view->ring[0] == 0 || now_ns < view->next_look_ns) return false;
    view->next_look_ns = now_ns + LOOK_NS;
    info.name = view->ring;
    const cf_result result = cf_session_open(&info, &view->session);
    if (result < 0) complain(view, result, cf_last_error());
    return result == CF_SUCCESS;
}

/* Give the image the frame's size. False: it has not got it. */
static bool fit(view* view, const cf_frame* frame) {
    const int64_t bytes = (int64_t)frame->width * frame->height * 4;
    if (frame->width == view->width && frame->height == view->height) return true;
    gd_variant data = gd_empty(GDEXTENSION_VARIANT_TYPE_PACKED_BYTE_ARRAY), size = gd_int(bytes);
    gd_variant width = gd_int(frame->width), height = gd_int(frame->height);
    gd_variant mipmaps = gd_int(0), format = gd_int(FORMAT_RGBA8); /* numbers own nothing */
    gd_variant done = gd_call(&data, names.resize, (const gd_variant* const[]){&size}, 1);
    gd_end(&done);
    done = gd_call(&view->image, names.set_data, (const gd_variant* const[]){&width, &height, &mipmaps, &format, &data},
                   5);
    gd_end(&done);
    gd_end(&data);
    done = gd_call(&view->image, names.get_data_size, NULL, 0);
    const bool fits = gd_to_int(&done) == bytes; /* what Godot refuses it has said by itself */
    gd_end(&done);
    view->width = fits ? frame->width : 0;
    view->height = fits ? frame->height : 0;
    return fits;
}

static void copy(view* view, const cf_frame* frame) {
    const size_t row = (size_t)frame->width * 4;
    uint8_t* to = gd_image_bytes(view->image_object);
    const uint8_t* from = frame->planes[0].data;
    for (uint32_t y = 0; y < frame->height; ++y) memcpy(to + y * row, from + y * frame->planes[0].stride, row);
}

/* Bring the texture up to a frame that is pinned. False: there is nothing new to show. */
static bool take(view* view, const cf_frame* frame) {
    if (frame->id == view->id && frame->generation == view->generation) return false;
    if (frame->format != CF_FORMAT_RGBA8) {
        complain(view, CF_ERROR_INVALID_ARGUMENT,
                 "the ring is NV12, but CFEngineView shows RGBA8; start its writer so");
        return false;
    }
    if (!fit(view, frame)) return false;
    copy(view, frame);
    return true;
}

/* Hand the image on: `update` where the texture has its size. */
static void show(view* view, const cf_frame* frame) {
    const bool same = frame->width == view->shown_width && frame->height == view->shown_height;
    gd_variant done =
        gd_call(&view->texture, same ? names.update : names.set_image, (const gd_variant* const[]){&view->image}, 1);
    gd_end(&done);
    view->shown_width = frame->width;
    view->shown_height = frame->height;
    view->id = frame->id;
    view->generation = frame->generation;
}

static void process(void* instance, double delta) {
    view* view = instance;
    cf_acquire_info when = CF_ACQUIRE_INFO_INIT;
    cf_frame frame = CF_FRAME_INIT;
    if (!look(view)) return;
    /* Godot does not say when its picture will be seen; as long after this one as this one after the last */
    when.display_time_ns = cf_now_ns() + (int64_t)(delta * 1e9);
    when.policy = CF_POLICY_NEAREST;
    const cf_result result = cf_frame_acquire(view->session, &when, &frame);
    if (result < 0) complain(view, result, cf_last_error());
    if (result != CF_SUCCESS) return;
    const bool taken = take(view, &frame);
    const bool whole = cf_frame_release(view->session, frame.id) == CF_SUCCESS;
    if (taken && whole) show(view, &frame); /* else it was taken back while it was copied: the next turn tries again */
}

/* Methods ---------------------------------------------------------------------------------------------------------- */

static void set_ring(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    view* view = instance;
    (void)result;
    char name[sizeof view->ring];
    int64_t bytes = gd_to_text(arguments[0], name, sizeof name - 1);
    if (bytes > (int64_t)sizeof name - 1) bytes = sizeof name - 1;
    name[bytes] = 0;
    if (strcmp(name, view->ring) == 0) return;
    cf_session_close(view->session);
    view->session = NULL;
    view->said = CF_SUCCESS;
    view->next_look_ns = 0;
    memcpy(view->ring, name, sizeof name);
}

static void get_ring(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    (void)arguments;
    *result = gd_text(((view*)instance)->ring);
}

static void get_texture(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    (void)arguments;
    *result = gd_object(gd_to_object(&((view*)instance)->texture));
}

static void get_state(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    static const char* const states[] = {"awaited", "loading", "ready",  "running",
                                         "paused",  "stalled", "failed", "ended"};
    const view* view = instance;
    cf_session_state state = CF_SESSION_STATE_INIT;
    (void)arguments;
    if (view->session != NULL) cf_session_poll_state(view->session, &state);
    *result = gd_text(states[state.state <= CF_STATE_ENDED ? state.state : 0]);
}

/* The event's id; 0: not sent. */
static gd_variant push(view* view, const cf_event* event) {
    uint64_t id = 0;
    if (view->session == NULL || cf_session_push(view->session, event, &id) < 0) id = 0;
    return gd_int((int64_t)id);
}

static void push_prompt(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    char utf8[CF_PROMPT_BYTES + 1];
    cf_event event = CF_EVENT_INIT;
    const int64_t bytes = gd_to_text(arguments[0], utf8, sizeof utf8);
    event.kind = CF_EVENT_PROMPT;
    event.as.prompt = (cf_prompt){utf8, bytes <= (int64_t)sizeof utf8 ? (uint32_t)bytes : CF_PROMPT_BYTES + 1};
    *result = push(instance, &event); /* one that is too long is refused there */
}

static void push_action(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){(uint32_t)gd_to_int(arguments[0]), gd_to_float(arguments[1])};
    *result = push(instance, &event);
}

static void turn(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){CF_ACTION_TURN, gd_to_float(arguments[0])};
    *result = push(instance, &event);
}

static gd_variant push_plain(void* instance, uint32_t kind) {
    cf_event event = CF_EVENT_INIT;
    event.kind = kind;
    return push(instance, &event);
}

static void pause(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    (void)arguments;
    *result = push_plain(instance, CF_EVENT_PAUSE);
}

static void resume(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    (void)arguments;
    *result = push_plain(instance, CF_EVENT_RESUME);
}

static void reset(void* instance, const gd_variant* const* arguments, gd_variant* result) {
    (void)arguments;
    *result = push_plain(instance, CF_EVENT_RESET);
}

/* The extension ---------------------------------------------------------------------------------------------------- */

static void* make(void) {
    view* view = calloc(1, sizeof *view);
    if (view == NULL) abort(); /* as Godot does */
    view->image_object = gd_make("Image");
    view->image = gd_object(view->image_object);
    view->texture = gd_object(gd_make("ImageTexture"));
    return view;
}

static void end(void* instance) {
    view* view = instance;
    cf_session_close(view->session);
    gd_end(&view->texture);
    gd_end(&view->image);
    free(view);
}

#define TEXT GDEXTENSION_VARIANT_TYPE_STRING
#define INT GDEXTENSION_VARIANT_TYPE_INT
#define FLOAT GDEXTENSION_VARIANT_TYPE_FLOAT
#define OBJECT GDEXTENSION_VARIANT_TYPE_OBJECT
static const gd_method methods[] = {
    {"set_ring", set_ring, GDEXTENSION_VARIANT_TYPE_NIL, 1, {TEXT}, {"name"}},
    {"get_ring", get_ring, TEXT, 0, {0}, {0}},
    {"get_texture", get_texture, OBJECT, 0, {0}, {0}},
    {"get_state", get_state, TEXT, 0, {0}, {0}},
    {"push_prompt", push_prompt, INT, 1, {TEXT}, {"text"}},
    {"push_action", push_action, INT, 2, {INT, FLOAT}, {"code", "value"}},
    {"turn", turn, INT, 1, {FLOAT}, {"value"}},
    {"pause", pause, INT, 0, {0}, {0}},
    {"resume", resume, INT, 0, {0}, {0}},
    {"reset", reset, INT, 0, {0}, {0}},
};
static const gd_class view_class = {
    "CFEngineView", "Node", make, end, process, methods, sizeof methods / sizeof *methods};

static void initialize(void* userdata, GDExtensionInitializationLevel level) {
    (void)userdata;
    if (level != GDEXTENSION_INITIALIZATION_SCENE) return;
    names.resize = gd_name_of("resize");
    names.set_data = gd_name_of("set_data");
    names.get_data_size = gd_name_of("get_data_size");
    names.set_image = gd_name_of("set_image");
    names.update = gd_name_of("update");
    gd_register(&view_class);
    gd_property("ring", TEXT, "set_ring", "get_ring");
}

static void deinitialize(void* userdata, GDExtensionInitializationLevel level) {
    (void)userdata;
    if (level == GDEXTENSION_INITIALIZATION_SCENE) gd_unregister();
}

/* What cfengine.gdextension names. */
CF_API GDExtensionBool cfengine_view_init(GDExtensionInterfaceGetProcAddress find, GDExtensionClassLibraryPtr library,
                                          GDExtensionInitialization* initialization) {
    *initialization = (GDExtensionInitialization){GDEXTENSION_INITIALIZATION_SCENE, NULL, initialize, deinitialize};
    return gd_load(find, library);
}
