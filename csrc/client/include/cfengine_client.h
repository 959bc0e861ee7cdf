/* cfengine_client.h: live video frames and control events, for programs without Python, CUDA or C++.
 *
 * A cfengine process (the writer) puts frames into shared memory under a name; this library finds the ring, pins a
 * frame, and hands out pointers to its pixels where they lie. Nothing is copied. Events go the other way: prompts,
 * actions, poses, pause, resume, reset.
 *
 *     cf_session_info info = CF_SESSION_INFO_INIT;
 *     info.name = "demo";
 *     cf_session* session = NULL;
 *     if (cf_session_open(&info, &session) < 0) return fail(cf_last_error());
 *     uint64_t shown = 0, writer = 0;                                       // what is on the screen
 *     for (;;) {                                                            // once per displayed frame
 *         cf_acquire_info when = CF_ACQUIRE_INFO_INIT;                      // newest frame, no waiting
 *         cf_frame frame = CF_FRAME_INIT;
 *         if (cf_frame_acquire(session, &when, &frame) == CF_SUCCESS) {
 *             if (frame.id != shown || frame.generation != writer)          // REPEATED may be new to this program
 *                 upload(frame.planes[0].data, frame.planes[0].stride);
 *             cf_frame_release(session, frame.id);
 *             shown = frame.id, writer = frame.generation;
 *         }
 *     }
 *     cf_session_close(session);
 *
 * Results.  CF_SUCCESS is 0, other outcomes that are no failure are positive, failures are negative. After a failure
 * cf_last_error() is a sentence that says what was found, what was expected, and what to do.
 *
 * Time.  Every time is in nanoseconds of one clock, that of cf_now_ns(): CLOCK_MONOTONIC on Linux. An OpenXR program
 * converts its XrTime with XR_KHR_convert_timespec_time.
 *
 * Threads.  One session, three groups of calls:
 *   - cf_frame_acquire, cf_frame_release, cf_session_device_memory: by one thread at a time (the consumer; it may
 *     change if the program orders it);
 *   - cf_session_push, cf_session_poll_state, cf_stats_get: by any threads, at any time, beside the consumer;
 *   - cf_session_close: when no other call on this session runs or comes later.
 * Different sessions are independent. cf_last_error() belongs to the calling thread. The library starts no thread,
 * calls nothing back, takes no lock that another thread or process could hold, and installs no signal handler. A
 * session does not survive fork(): the child opens its own.
 *
 * Blocking.  Only cf_frame_acquire with a timeout_ns waits, and cf_session_device_memory, for a second at most.
 * Everything else returns after a bounded number of steps. Once after each restart of the writer, and in
 * cf_session_open, the library maps shared memory, which takes up to a few milliseconds for a large ring.
 *
 * Growth.  Structures begin with cf_header; the *_INIT macros fill it in. A library of the same major version takes the
 * structures of every older minor version, and leaves alone what a newer one has added. There is no extension in
 * version 1: `next` must be NULL. What is marked 1.1 came with that version.
 */
#ifndef CFENGINE_CLIENT_H
#define CFENGINE_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(CF_BUILD_SHARED)
#define CF_API __declspec(dllexport)
#elif defined(_WIN32) && !defined(CF_STATIC)
#define CF_API __declspec(dllimport)
#elif defined(__GNUC__)
#define CF_API __attribute__((visibility("default")))
#else
#define CF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define CF_VERSION_MAJOR 1u
#define CF_VERSION_MINOR 1u

/* Results -------------------------------------------------------------------------------------------------------- */

typedef int32_t cf_result;
enum {
    CF_SUCCESS = 0,
    CF_NOT_READY = 1,               /* nothing to give yet: no frame, or none that this session has not had */
    CF_ERROR_INVALID_ARGUMENT = -1, /* a null pointer, a structure without its header, a value out of range */
    CF_ERROR_VERSION = -2,          /* library or ring of another major version */
    CF_ERROR_NOT_FOUND = -3,        /* no ring of that name: the writer has not started, or has ended */
    CF_ERROR_ACCESS = -4,           /* the ring belongs to another user */
    CF_ERROR_BAD_RING = -5,         /* what lies under that name is no ring, or is damaged */
    CF_ERROR_TOO_MANY_READERS = -6, /* every reader's lease is taken */
    CF_ERROR_FRAME_HELD = -7,       /* acquire before the last frame was released */
    CF_ERROR_NOT_HELD = -8,         /* release of a frame that this session does not hold */
    CF_ERROR_LEASE_LOST = -9,     /* the frame was held beyond its lease and taken back: its pixels may have changed */
    CF_ERROR_QUEUE_FULL = -10,    /* the writer has not taken the events of before */
    CF_ERROR_TOO_LONG = -11,      /* a prompt of more than CF_PROMPT_BYTES */
    CF_ERROR_BUSY = -12,          /* a living process writes a ring of that name */
    CF_ERROR_OUT_OF_MEMORY = -13, /* no memory, or too little shared memory */
    CF_ERROR_SYSTEM = -14,        /* the operating system refused; cf_last_error() has its words */
    CF_ERROR_MEMORY_KIND = -15,   /* 1.1: frames in device memory and a session not opened for that, or the reverse */
    CF_ERROR_TIMEOUT = -16,       /* 1.1: the writer did not answer */
    CF_ERROR_UNSUPPORTED = -17    /* 1.1: not on this system */
};

/* The sentence about the calling thread's last failure; "" before the first. Valid until its next failure. */
CF_API const char* cf_last_error(void);

/* "CF_ERROR_BAD_RING" and so on; "CF_UNKNOWN" for other numbers. Never NULL. */
CF_API const char* cf_result_name(cf_result result);

/* Structures ----------------------------------------------------------------------------------------------------- */

enum {
    CF_STRUCT_VERSION = 1,
    CF_STRUCT_SESSION_INFO = 2,
    CF_STRUCT_SESSION_STATE = 3,
    CF_STRUCT_ACQUIRE_INFO = 4,
    CF_STRUCT_FRAME = 5,
    CF_STRUCT_EVENT = 6,
    CF_STRUCT_STATS = 7,
    CF_STRUCT_DEVICE_MEMORY = 8 /* 1.1 */
};

typedef struct cf_header {
    uint32_t struct_size; /* sizeof of the whole structure, as the caller was compiled */
    uint32_t struct_type; /* CF_STRUCT_* */
    const void* next;     /* NULL */
} cf_header;

#ifdef __cplusplus
#define CF_INIT(type, tag)          \
    {                               \
        {                           \
            sizeof(type), tag, NULL \
        }                           \
    }
#else
#define CF_INIT(type, tag)                  \
    {                                       \
        .header = {sizeof(type), tag, NULL} \
    }
#endif
#define CF_VERSION_INIT CF_INIT(cf_version, CF_STRUCT_VERSION)
#define CF_SESSION_INFO_INIT CF_INIT(cf_session_info, CF_STRUCT_SESSION_INFO)
#define CF_SESSION_STATE_INIT CF_INIT(cf_session_state, CF_STRUCT_SESSION_STATE)
#define CF_ACQUIRE_INFO_INIT CF_INIT(cf_acquire_info, CF_STRUCT_ACQUIRE_INFO)
#define CF_FRAME_INIT CF_INIT(cf_frame, CF_STRUCT_FRAME)
#define CF_EVENT_INIT CF_INIT(cf_event, CF_STRUCT_EVENT)
#define CF_STATS_INIT CF_INIT(cf_stats, CF_STRUCT_STATS)
#define CF_DEVICE_MEMORY_INIT CF_INIT(cf_device_memory, CF_STRUCT_DEVICE_MEMORY)

/* Version and clock ---------------------------------------------------------------------------------------------- */

typedef struct cf_version {
    cf_header header;
    uint32_t major, minor;           /* of the library that runs */
    uint32_t ring_major, ring_minor; /* of the layout in shared memory that it reads */
} cf_version;

/* Fill `version`. Pass CF_VERSION_MAJOR: CF_ERROR_VERSION if the library that runs has another major version. */
CF_API cf_result cf_get_version(uint32_t major, cf_version* version);

/* The clock of every time in this interface, in nanoseconds. */
CF_API int64_t cf_now_ns(void);

/* Sessions ------------------------------------------------------------------------------------------------------- */

typedef struct cf_session cf_session;

#define CF_NAME_BYTES 64u               /* longest name of a ring; letters, digits, '-', '_' and '.' */
#define CF_DEFAULT_LEASE_NS 1000000000  /* 1 s */
#define CF_LONGEST_LEASE_NS 60000000000 /* 60 s */

enum {
    CF_SESSION_DEVICE_MEMORY = 1u /* 1.1: frames may be in device memory, where planes[].data is NULL */
};

typedef struct cf_session_info {
    cf_header header;
    const char* name;  /* of the ring, as in `cfengine serve --ring NAME` */
    int64_t lease_ns;  /* how long a frame may be held at least; 0: CF_DEFAULT_LEASE_NS */
    uint32_t flags;    /* 1.1: CF_SESSION_*, or 0 */
    uint32_t reserved; /* 1.1: 0 */
} cf_session_info;

/* Find the ring and take a reader's lease on it. Errors: INVALID_ARGUMENT, NOT_FOUND (try again later), ACCESS,
 * VERSION, BAD_RING, TOO_MANY_READERS, OUT_OF_MEMORY, SYSTEM, MEMORY_KIND (the frames are in device memory, and flags
 * lack CF_SESSION_DEVICE_MEMORY); *session is then NULL.
 *
 * When the writer restarts, the session goes over to its new ring by itself, in cf_frame_acquire or
 * cf_session_poll_state; its first frame carries CF_FRAME_DISCONTINUITY, and sizes may have changed, and where the
 * flags allow it the kind of memory. A new ring that this call would refuse is not gone over to. */
CF_API cf_result cf_session_open(const cf_session_info* info, cf_session** session);

/* Release the frame that is held, the lease and the memory. NULL is allowed. */
CF_API cf_result cf_session_close(cf_session* session);

enum {
    CF_STATE_LOADING = 1, /* weights are read, kernels compiled: no frame yet */
    CF_STATE_READY = 2,   /* waits for a prompt or a start */
    CF_STATE_RUNNING = 3,
    CF_STATE_PAUSED = 4,
    CF_STATE_STALLED = 5, /* said by the library: RUNNING, but no sign of life for longer than the ring's limit */
    CF_STATE_ERROR = 6,   /* said by the writer, or by the library when the writer's process is gone */
    CF_STATE_ENDED = 7    /* closed in order; a session waits for the next writer */
};

enum {
    CF_FORMAT_RGBA8 = 1, /* one plane: R, G, B, A bytes, sRGB, opaque, top row first */
    CF_FORMAT_NV12 = 2   /* two planes: Y, and U V in turn at half size; BT.709, 16..235; chroma in the middle of 2x2 */
};

enum {
    CF_MEMORY_HOST = 1,     /* planes are pointers of this process */
    CF_MEMORY_CUDA_IPC = 2, /* 1.1: device memory for CUDA alone; see cf_session_device_memory */
    CF_MEMORY_OPAQUE_FD = 3 /* 1.1: device memory for Vulkan and CUDA */
};

typedef struct cf_session_state {
    cf_header header;
    uint32_t state;        /* CF_STATE_* */
    uint32_t writer_alive; /* 1 or 0 */
    uint64_t generation;   /* another number after each restart of the writer */
    int64_t heartbeat_ns;  /* the writer's last sign of life */
    uint64_t newest_id;    /* id of the newest frame; 0: none yet */
    uint32_t format;       /* CF_FORMAT_* */
    uint32_t memory;       /* CF_MEMORY_* */
    uint32_t width, height;
    uint32_t fps_numerator, fps_denominator;
    uint32_t slots;   /* frames that the ring has room for */
    uint32_t readers; /* readers that it has room for */
} cf_session_state;

/* Say how the writer does. */
CF_API cf_result cf_session_poll_state(cf_session* session, cf_session_state* state);

/* Frames --------------------------------------------------------------------------------------------------------- */

enum {
    CF_POLICY_LATEST = 0, /* the newest frame */
    CF_POLICY_NEXT = 1,   /* the oldest frame that this session has not had: every frame, if it is fast enough */
    CF_POLICY_NEAREST = 2 /* the frame whose pts_ns is nearest to display_time_ns, never an older one than before */
};

typedef struct cf_acquire_info {
    cf_header header;
    int64_t display_time_ns; /* when the picture will be seen; 0: now. For NEAREST, and for CF_FRAME_LATE */
    int64_t timeout_ns;      /* 0: return at once. Else wait for what the policy wants, at most this long */
    uint32_t policy;         /* CF_POLICY_* */
    uint32_t reserved;       /* 0 */
} cf_acquire_info;

enum {
    CF_FRAME_REPEATED = 1u,      /* this session's last frame again, or one that the writer shows once more */
    CF_FRAME_DISCONTINUITY = 2u, /* does not follow the frame before: reset, rewind, or another writer */
    CF_FRAME_LATE = 4u           /* was ready after its pts_ns, or lies more than a frame before display_time_ns */
};

typedef struct cf_plane {
    const void* data; /* NULL in device memory: see cf_frame.offsets */
    uint64_t stride;  /* bytes from one row to the next */
    uint64_t size;    /* bytes that may be read from there on */
} cf_plane;

typedef struct cf_frame {
    cf_header header;
    uint64_t id;               /* 1, 2, 3, ... in one generation */
    uint64_t generation;       /* as in cf_session_state */
    int64_t pts_ns;            /* when it should be seen */
    int64_t ready_ns;          /* when its pixels were complete */
    uint64_t chunk_index;      /* of the chunk that it was made in */
    uint64_t last_event_id;    /* newest event that it knows of; 0: none */
    uint64_t applied_at_chunk; /* first chunk that knew of that event */
    uint32_t flags;            /* CF_FRAME_* */
    uint32_t format;           /* CF_FORMAT_* */
    uint32_t memory;           /* CF_MEMORY_* */
    uint32_t width, height;    /* pixels */
    uint32_t plane_count;
    cf_plane planes[2];  /* read-only memory: writing to it is an access violation */
    uint64_t offsets[2]; /* 1.1: where each plane begins in the allocation of cf_device_memory; 0 in host memory */
} cf_frame;

/* Pin a frame. CF_SUCCESS: the pixels stay as they are until cf_frame_release, or for the lease at least. In device
 * memory too they are complete: no semaphore is to be waited for.
 *
 * Without a timeout, or when it is over: LATEST and NEAREST give the frame of before again, flagged REPEATED, if there
 * is no better one; NEXT gives CF_NOT_READY. CF_NOT_READY too where the ring has no frame yet. With a timeout, LATEST
 * waits for a frame that this session has not had, NEXT for the next, NEAREST until the ring reaches display_time_ns.
 * On Linux waiting is a futex; elsewhere short sleeps.
 *
 * A session holds one frame at a time: CF_ERROR_FRAME_HELD. CF_ERROR_BAD_RING: the ring was damaged while it was read.
 */
CF_API cf_result cf_frame_acquire(cf_session* session, const cf_acquire_info* info, cf_frame* frame);

/* Let go of the frame; in device memory when the program's own work on the device has read it (its fence has signalled,
 * its event is over): the writer may write there from now on. CF_ERROR_LEASE_LOST: it was held for too long and the
 * writer took it back; what was read of it may be of two frames and should not be shown. The session goes on either
 * way. */
CF_API cf_result cf_frame_release(cf_session* session, uint64_t frame_id);

/* Device memory (1.1) -------------------------------------------------------------------------------------------- */

typedef struct cf_device_memory {
    cf_header header;
    uint64_t generation;   /* of the ring, as in cf_frame: a frame of another one is in other memory */
    uint64_t size;         /* bytes of the whole allocation */
    uint64_t frame_stride; /* bytes from one slot's frame to the next; slots times this is `size` at most */
    uint32_t slots;
    uint32_t memory;         /* CF_MEMORY_OPAQUE_FD or CF_MEMORY_CUDA_IPC */
    uint8_t device_uuid[16]; /* of the GPU: VkPhysicalDeviceIDProperties.deviceUUID, cuDeviceGetUuid_v2 */
    int32_t fd;              /* OPAQUE_FD: a file descriptor, the caller's to close or to give away; else -1 */
    uint32_t reserved;
    uint8_t ipc_handle[64]; /* CUDA_IPC: a CUipcMemHandle; else zeros */
} cf_device_memory;

/* Ask the writer for the memory that holds the frames: of the ring of the frame that is held, or else of the newest
 * ring. By the consumer's thread; waits for a second at most. To be called once for each generation:
 *
 *     if (frame.memory != CF_MEMORY_HOST && frame.generation != imported) {
 *         cf_device_memory memory = CF_DEVICE_MEMORY_INIT;
 *         const cf_result found = cf_session_device_memory(session, &memory);
 *         if (found == CF_SUCCESS && import(&memory)) imported = memory.generation;
 *     }
 *
 * A writer that restarts has other memory, even where all sizes are equal, so frames say their generation. Memory that
 * is imported as OPAQUE_FD lives until the last importer lets go; that of CUDA_IPC ends with its writer.
 *
 * Vulkan: VkImportMemoryFdInfoKHR with VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT and allocationSize = size, which
 * takes the descriptor over; a VkBuffer over all of it, and vkCmdCopyBufferToImage from frame.offsets. CUDA:
 * cuMemImportFromShareableHandle, cuMemAddressReserve, cuMemMap, cuMemSetAccess, then close the descriptor; or
 * cuIpcOpenMemHandle. Both need the device of device_uuid.
 *
 * Errors, with fd -1 unless the structure itself is refused: INVALID_ARGUMENT; MEMORY_KIND, the frames are in host
 * memory; NOT_FOUND, the writer has ended; ACCESS, another user listens; TIMEOUT, it does not answer; BAD_RING, the
 * answer is not of this ring, or is damaged or none; UNSUPPORTED, not on this system; SYSTEM. */
CF_API cf_result cf_session_device_memory(cf_session* session, cf_device_memory* memory);

/* Events --------------------------------------------------------------------------------------------------------- */

#define CF_PROMPT_BYTES 4000u /* longest prompt, in bytes of UTF-8 */

enum {
    CF_EVENT_PROMPT = 1,
    CF_EVENT_ACTION = 2,
    CF_EVENT_POSE = 3,
    CF_EVENT_PAUSE = 4,
    CF_EVENT_RESUME = 5,
    CF_EVENT_RESET = 6
};

typedef struct cf_prompt {
    const char* utf8; /* need not end with a zero */
    uint32_t bytes;
} cf_prompt;

typedef struct cf_action {
    uint32_t code; /* what the model calls an action: a key, an axis */
    double value;  /* 1 pressed, 0 released, or a position */
} cf_action;

typedef struct cf_pose {
    float position[3];    /* metres: right, up, back, as in OpenXR */
    float orientation[4]; /* unit quaternion x, y, z, w */
    int64_t time_ns;      /* when the pose holds */
} cf_pose;

typedef struct cf_event {
    cf_header header;
    uint32_t kind; /* CF_EVENT_*; PAUSE, RESUME and RESET use no member of `as` */
    union {
        cf_prompt prompt;
        cf_action action;
        cf_pose pose;
    } as;
} cf_event;

/* Queue an event. *event_id (NULL is allowed) counts 1, 2, 3, ... over all programs in one generation; a frame whose
 * last_event_id has reached it was made with the event applied. Never waits: CF_ERROR_QUEUE_FULL. Also TOO_LONG,
 * INVALID_ARGUMENT for text that is not UTF-8 and for numbers that are not finite, and LEASE_LOST where the writer took
 * this process for dead in the middle of the push. */
CF_API cf_result cf_session_push(cf_session* session, const cf_event* event, uint64_t* event_id);

/* Statistics ----------------------------------------------------------------------------------------------------- */

typedef struct cf_stats {
    cf_header header;
    uint64_t frames_new;      /* frames that this session had for the first time */
    uint64_t frames_repeated; /* acquires that gave the same frame again */
    uint64_t frames_skipped;  /* frames between two new ones that it never had */
    uint64_t frames_late;     /* new frames flagged LATE */
    uint64_t not_ready;       /* acquires that gave none */
    uint64_t leases_lost;
    uint64_t events_pushed, events_refused;
    uint64_t generations; /* writers seen */
    uint64_t acquires;    /* calls that the three times below are of; waiting is left out */
    int64_t acquire_last_ns, acquire_longest_ns, acquire_total_ns;
} cf_stats;

/* Numbers since cf_session_open. Each is exact; together they are of about one moment. */
CF_API cf_result cf_stats_get(cf_session* session, cf_stats* stats);

#ifdef __cplusplus
}
#endif

#endif
