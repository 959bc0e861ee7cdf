/* Everything that the ring asks of the operating system. shm_posix.c and shm_windows.c answer. */
#ifndef CF_OS_H
#define CF_OS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cfengine_client.h"

/* A named object of shared memory. Two objects that had one name in turn differ in `identity`. */
typedef struct cf_os_object {
    intptr_t handle; /* -1: none */
    uint64_t size;
    uint64_t identity[2];
    int64_t age_ns; /* since it was last changed by name or size, as it was opened */
} cf_os_object;

/* Make a new object of `size` zero bytes, all of them backed by memory. BUSY where the name is taken. */
cf_result cf_os_create(const char* name, uint64_t size, cf_os_object* object);

/* Open the object that has this name now. NOT_FOUND, ACCESS, SYSTEM. */
cf_result cf_os_open(const char* name, cf_os_object* object);

/* Map bytes of it; `offset` is a multiple of CF_RING_ALIGN. Pages are mapped at once, so that no first touch is slow.
 */
cf_result cf_os_map(const cf_os_object* object, uint64_t offset, uint64_t size, bool writable, void** address);
void cf_os_unmap(void* address, uint64_t size);

/* Forget the handle; maps stay. */
void cf_os_close(cf_os_object* object);

/* Take the name away from this object, if it still has it; whoever mapped it keeps it. Of several processes that
 * replace one object, none takes the name from the successor. */
void cf_os_remove(const char* name, const cf_os_object* object);

/* A process for as long as it lives: pids are used again, with another start time. */
typedef struct cf_os_process {
    uint32_t pid;
    uint64_t start; /* 0: the system does not say */
    uint64_t space; /* in which pids count (pid namespace); 0 where there is one */
} cf_os_process;

cf_os_process cf_os_self(void);

/* A process with this pid, and of this start time under the mask, lives. Only for pids of this process's own space. */
bool cf_os_alive(uint32_t pid, uint64_t start, uint64_t mask);

/* A clock that only goes on, and the time of day. */
int64_t cf_os_now_ns(void);
uint64_t cf_os_time_ns(void);

/* Sleep until cf_os_wake(word), at most `ns`, unless *word is no longer `seen`. May return early. */
void cf_os_wait(const _Atomic uint32_t* word, uint32_t seen, int64_t ns);
void cf_os_wake(const _Atomic uint32_t* word);

/* Connect to the Unix socket of the ring `name` at `path` and take one packet of at most `most` bytes, waiting until
 * `until_ns` at the latest; the rest of a longer one is dropped. *fd: the file descriptor that came with it, the
 * caller's from then on; -1 without one. NOT_FOUND: nobody listens. ACCESS: another user does. TIMEOUT. BAD_RING: more
 * than one descriptor. UNSUPPORTED: not on this system. SYSTEM. */
cf_result cf_os_receive(const char* name, const char* path, int64_t until_ns, void* packet, size_t most, size_t* size,
                        int* fd);
void cf_os_close_fd(int fd);

#endif
