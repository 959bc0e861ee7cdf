/* Shared memory, processes, clock and waiting on POSIX systems; futex, /proc and passed descriptors on Linux. */
#if !defined(_WIN32)
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#endif

#include "error.h"
#include "os.h"

#define PATH_BYTES (CF_NAME_BYTES + sizeof "/cfengine.")

static void path_of(const char* name, char path[PATH_BYTES]) { snprintf(path, PATH_BYTES, "/cfengine.%s", name); }

static bool describe(int handle, cf_os_object* object) {
    struct stat status;
    if (fstat(handle, &status) != 0) return false;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    object->handle = handle;
    object->size = status.st_size < 0 ? 0 : (uint64_t)status.st_size;
    object->identity[0] = (uint64_t)status.st_dev;
    object->identity[1] = (uint64_t)status.st_ino;
    object->age_ns = (int64_t)(now.tv_sec - status.st_ctime) * 1000000000;
    return true;
}

static cf_result refused(const char* name, const char* what) {
    const cf_result result = errno == ENOENT                     ? CF_ERROR_NOT_FOUND
                             : errno == EACCES || errno == EPERM ? CF_ERROR_ACCESS
                             : errno == EEXIST                   ? CF_ERROR_BUSY
                             : errno == ENOMEM                   ? CF_ERROR_OUT_OF_MEMORY
                                                                 : CF_ERROR_SYSTEM;
    if (result == CF_ERROR_NOT_FOUND)
        return cf_fail(result,
                       "there is no ring %s; start its writer (cfengine serve --ring %s) or give the name of another",
                       name, name);
    if (result == CF_ERROR_ACCESS)
        return cf_fail(result, "ring %s belongs to another user; run both programs as one user", name);
    return cf_fail(result, "ring %s: %s failed: %s", name, what, strerror(errno));
}

/* Memory for every page now: a full /dev/shm would otherwise kill the writer at its first touch. */
static int reserve(int handle, uint64_t size) {
#if defined(__linux__)
    int error;
    do error = posix_fallocate(handle, 0, (off_t)size);
    while (error == EINTR);
    return error;
#else
    return ftruncate(handle, (off_t)size) == 0 ? 0 : errno;
#endif
}

cf_result cf_os_create(const char* name, uint64_t size, cf_os_object* object) {
    char path[PATH_BYTES];
    path_of(name, path);
    const int handle = shm_open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (handle < 0) return refused(name, "shm_open");
    const int error = reserve(handle, size);
    if (error == 0 && describe(handle, object)) return CF_SUCCESS;
    shm_unlink(path);
    close(handle);
    if (error == ENOSPC || error == ENOMEM)
        return cf_fail(
            CF_ERROR_OUT_OF_MEMORY,
            "ring %s needs %llu bytes of shared memory and there are fewer; ask for fewer slots or smaller frames, or "
            "make /dev/shm larger (docker run --shm-size)",
            name, (unsigned long long)size);
    errno = error != 0 ? error : errno;
    return refused(name, "reserving shared memory");
}

cf_result cf_os_open(const char* name, cf_os_object* object) {
    char path[PATH_BYTES];
    path_of(name, path);
    const int handle = shm_open(path, O_RDWR | O_CLOEXEC, 0);
    if (handle < 0) return refused(name, "shm_open");
    if (describe(handle, object)) return CF_SUCCESS;
    close(handle);
    return refused(name, "fstat");
}

cf_result cf_os_map(const cf_os_object* object, uint64_t offset, uint64_t size, bool writable, void** address) {
    int flags = MAP_SHARED;
#if defined(MAP_POPULATE)
    flags |= MAP_POPULATE;
#endif
    void* at = mmap(NULL, (size_t)size, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, (int)object->handle,
                    (off_t)offset);
    if (at == MAP_FAILED)
        return cf_fail(CF_ERROR_OUT_OF_MEMORY, "mapping %llu bytes of shared memory failed: %s",
                       (unsigned long long)size, strerror(errno));
    *address = at;
    return CF_SUCCESS;
}

void cf_os_unmap(void* address, uint64_t size) {
    if (address != NULL) munmap(address, (size_t)size);
}

void cf_os_close(cf_os_object* object) {
    if (object->handle >= 0) close((int)object->handle);
    object->handle = -1;
}

void cf_os_remove(const char* name, const cf_os_object* object) {
    char path[PATH_BYTES];
    path_of(name, path);
    /* the lock is on the object that goes: who waited for it finds the name gone, or given to another object */
    while (flock((int)object->handle, LOCK_EX) != 0 && errno == EINTR) continue;
    cf_os_object now;
    const int handle = shm_open(path, O_RDWR | O_CLOEXEC, 0);
    if (handle >= 0) {
        if (describe(handle, &now) && memcmp(now.identity, object->identity, sizeof now.identity) == 0)
            shm_unlink(path);
        close(handle);
    }
    flock((int)object->handle, LOCK_UN);
}

/* Field 22 of /proc/PID/stat, in clock ticks since boot; -1: no such process (or a zombie), 0: the system does not say.
 */
static int64_t start_of(uint32_t pid) {
#if defined(__linux__)
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    const int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0) return errno == ENOENT ? -1 : 0;
    const ssize_t length = read(handle, text, sizeof text - 1);
    close(handle);
    if (length <= 0) return -1;
    text[length] = 0;
    const char* at = strrchr(text, ')'); /* the name before it may hold anything */
    if (at == NULL || at[1] == 0) return 0;
    const char state = at[2];
    if (state == 'Z' || state == 'X') return -1;
    for (int field = 2; field < 22 && at != NULL; ++field) at = strchr(at + 1, ' ');
    return at == NULL ? 0 : (int64_t)strtoull(at + 1, NULL, 10);
#else
    (void)pid;
    return 0;
#endif
}

cf_os_process cf_os_self(void) {
    cf_os_process self = {(uint32_t)getpid(), 0, 0};
    const int64_t start = start_of(self.pid);
    self.start = start > 0 ? (uint64_t)start : 0;
#if defined(__linux__)
    struct stat status;
    if (stat("/proc/self/ns/pid", &status) == 0) self.space = (uint64_t)status.st_ino;
#endif
    return self;
}

bool cf_os_alive(uint32_t pid, uint64_t start, uint64_t mask) {
    if (pid == 0 || pid > INT32_MAX) return false;
    if (kill((pid_t)pid, 0) != 0 && errno == ESRCH) return false;
    const int64_t now = start_of(pid);
    if (now < 0) return false;
    return now == 0 || start == 0 || ((uint64_t)now & mask) == (start & mask);
}

int64_t cf_os_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

uint64_t cf_os_time_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void nap(int64_t ns) {
    const struct timespec time = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    nanosleep(&time, NULL);
}

void cf_os_wait(const _Atomic uint32_t* word, uint32_t seen, int64_t ns) {
    if (ns <= 0) return;
#if defined(__linux__)
    const struct timespec time = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &time, NULL, 0) != 0 && errno != EAGAIN && errno != EINTR &&
        errno != ETIMEDOUT)
        nap(ns < 1000000 ? ns : 1000000); /* a system that forbids futex */
#else
    if (atomic_load_explicit(word, memory_order_relaxed) == seen) nap(ns < 500000 ? ns : 500000);
#endif
}

void cf_os_wake(const _Atomic uint32_t* word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

/* Passed descriptors ----------------------------------------------------------------------------------------------- */

void cf_os_close_fd(int fd) {
    if (fd >= 0) close(fd);
}

#if defined(__linux__)
#define MOST_FDS 4 /* that are taken, to be closed again where there is more than one */

static cf_result ended(const char* name) {
    return cf_fail(CF_ERROR_NOT_FOUND, "ring %s: nobody listens on its socket; its writer has ended", name);
}

static cf_result too_late(const char* name) {
    return cf_fail(CF_ERROR_TIMEOUT, "ring %s: its writer did not answer on its socket in time; try again", name);
}

static cf_result connect_to(const char* name, const char* path, int64_t until, int line) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return cf_fail(CF_ERROR_BAD_RING, "ring %s: the path of its socket is too long; start its writer again", name);
    strcpy(address.sun_path, path);
    for (;;) {
        const int64_t left = until - cf_os_now_ns();
        if (left <= 0) return too_late(name);
        /* a full queue of connections is waited for, this long: rounded up, for 0 would be for ever */
        const int64_t us = left / 1000 + 1;
        const struct timeval most = {(time_t)(us / 1000000), (suseconds_t)(us % 1000000)};
        if (setsockopt(line, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most) != 0)
            return refused(name, "setting a time limit for its socket");
        if (connect(line, (const struct sockaddr*)&address, sizeof address) == 0) return CF_SUCCESS;
        if (errno == EAGAIN) return too_late(name);
        if (errno == ECONNREFUSED || errno == ENOENT)
            return ended(name);
        if (errno != EINTR) return refused(name, "connecting to its socket");
    }
}

/* Descriptors of a message; all that came, for the caller to close. */
static size_t descriptors(struct msghdr* message, int fds[MOST_FDS]) {
    size_t count = 0;
    for (struct cmsghdr* part = CMSG_FIRSTHDR(message); part != NULL; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        const size_t here = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < here && count < MOST_FDS; ++i)
            memcpy(&fds[count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
    }
    return count;
}

static cf_result take_packet(const char* name, int64_t until, int line, void* packet, size_t most, size_t* size,
                             int* fd) {
    union {
        char bytes[CMSG_SPACE(MOST_FDS * sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct iovec place = {packet, most};
    struct msghdr message = {
        .msg_iov = &place, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t length;
    for (;;) {
        length = recvmsg(line, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (length >= 0) break;
        if (errno == ECONNRESET) return ended(name);
        if (errno != EAGAIN && errno != EINTR) return refused(name, "reading from its socket");
        const int64_t left = until - cf_os_now_ns();
        if (left <= 0) return too_late(name);
        struct pollfd ready = {line, POLLIN, 0};
        poll(&ready, 1, (int)(left / 1000000 + 1));
    }
    int fds[MOST_FDS];
    const size_t count = descriptors(&message, fds);
    *size = (size_t)length;
    if (count == 1 && !(message.msg_flags & MSG_CTRUNC)) *fd = fds[0];
    if (count <= 1 && !(message.msg_flags & MSG_CTRUNC)) return CF_SUCCESS;
    for (size_t i = 0; i < count; ++i) close(fds[i]);
    return cf_fail(CF_ERROR_BAD_RING,
                   "ring %s: its socket passed several descriptors, or this process has no room "
                   "for one",
                   name);
}

static cf_result check_peer(const char* name, int line) {
    struct ucred peer;
    socklen_t bytes = sizeof peer;
    if (getsockopt(line, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.uid == geteuid()) return CF_SUCCESS;
    return cf_fail(CF_ERROR_ACCESS, "ring %s: another user listens on its socket; run both programs as one user", name);
}

cf_result cf_os_receive(const char* name, const char* path, int64_t until_ns, void* packet, size_t most, size_t* size,
                        int* fd) {
    *size = 0;
    *fd = -1;
    const int line = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (line < 0) return refused(name, "opening a socket");
    cf_result result = connect_to(name, path, until_ns, line);
    if (result == CF_SUCCESS) result = check_peer(name, line);
    if (result == CF_SUCCESS) result = take_packet(name, until_ns, line, packet, most, size, fd);
    close(line);
    return result;
}
#else
cf_result cf_os_receive(const char* name, const char* path, int64_t until_ns, void* packet, size_t most, size_t* size,
                        int* fd) {
    (void)path, (void)until_ns, (void)packet, (void)most;
    *size = 0;
    *fd = -1;
    return cf_fail(CF_ERROR_UNSUPPORTED, "ring %s: handles of device memory are passed on Linux alone", name);
}
#endif
#else
typedef int cf_shm_posix_is_for_other_systems;
#endif
