/* shm_posix.c with one map of an object for the whole process, for ThreadSanitizer: it knows memory by its address, so
 * a reader and a writer that map the same page at two places would be strangers to it, whatever they do to each other.
 */
#define _GNU_SOURCE
#include <pthread.h>
#define cf_os_map posix_map
#define cf_os_unmap posix_unmap
#include "shm_posix.c"
#undef cf_os_map
#undef cf_os_unmap

enum { MOST = 256 };

static struct {
    uint64_t identity[2];
    uint8_t* memory; /* all of the object, until the program ends */
    int kept;        /* a handle: the system may not give the identity to another object */
} maps[MOST];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int place_of(const cf_os_object* object) {
    int at = 0;
    while (at < MOST && maps[at].memory != NULL && memcmp(maps[at].identity, object->identity, 16) != 0) ++at;
    return at;
}

cf_result cf_os_map(const cf_os_object* object, uint64_t offset, uint64_t size, bool writable, void** address) {
    cf_result result = CF_SUCCESS;
    (void)size, (void)writable;
    pthread_mutex_lock(&mutex);
    const int at = place_of(object);
    if (at < MOST && maps[at].memory == NULL) {
        void* memory = NULL;
        result = posix_map(object, 0, object->size, true, &memory);
        memcpy(maps[at].identity, object->identity, 16);
        maps[at].memory = memory;
        maps[at].kept = dup((int)object->handle);
    }
    if (result == CF_SUCCESS && at < MOST) *address = maps[at].memory + offset;
    pthread_mutex_unlock(&mutex);
    return at < MOST ? result : cf_fail(CF_ERROR_SYSTEM, "more rings than one_map.c has room for");
}

void cf_os_unmap(void* address, uint64_t size) { (void)address, (void)size; }
