/* What the C tests share: a check that says where it failed, and frames whose every word says which frame it is. */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cfengine_client.h"
#include "writer.h"

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: %s is false; last error: %s\n", __FILE__, __LINE__, #condition, cf_last_error()); \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

static inline cf_session* open_session(const char* name, int64_t lease_ns) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    info.name = name;
    info.lease_ns = lease_ns;
    CHECK(cf_session_open(&info, &session) == CF_SUCCESS);
    return session;
}

static inline cf_result acquire(cf_session* session, uint32_t policy, int64_t timeout_ns, cf_frame* frame) {
    cf_acquire_info info = CF_ACQUIRE_INFO_INIT;
    info.policy = policy;
    info.timeout_ns = timeout_ns;
    *frame = (cf_frame)CF_FRAME_INIT;
    return cf_frame_acquire(session, &info, frame);
}

static inline cf_writer* make_ring(const char* name, uint32_t width, uint32_t height, uint32_t readers,
                                   uint32_t slots) {
    const cf_writer_info info = {name, CF_FORMAT_RGBA8, width,          height, 16, 1, readers, slots,
                                 64,   1000000000,      CF_MEMORY_HOST, NULL};
    cf_writer* writer = NULL;
    CHECK(cf_writer_create(&info, &writer) == CF_SUCCESS);
    return writer;
}

/* Every word of a frame is its id. Rows are as wide as their stride where the width is a multiple of 16. */
static inline void publish_id(cf_writer* writer, uint32_t height, const cf_publish_info* info) {
    cf_writable slot;
    CHECK(cf_writer_begin(writer, &slot) == CF_SUCCESS);
    uint64_t* words = (uint64_t*)(void*)slot.planes[0];
    for (uint64_t i = 0; i < slot.strides[0] * height / 8; ++i) words[i] = slot.id;
    CHECK(cf_writer_commit(writer, info) == CF_SUCCESS);
}

/* Number of words of a frame that are of another. */
static inline uint64_t torn_words(const cf_frame* frame) {
    const uint64_t* words = frame->planes[0].data;
    uint64_t torn = 0;
    for (uint64_t i = 0; i < frame->planes[0].size / 8; ++i) torn += words[i] != frame->id;
    return torn;
}

#endif
