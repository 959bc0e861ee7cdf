/* The same as shm_posix.c for Windows. CI builds it with mingw-w64 and runs it under Wine; no Windows has run it. Needs
 * C11 atomics (mingw, clang-cl, or cl /std:c11 /experimental:c11atomics) and Windows 8 or later.
 *
 * A named section lives as long as anybody has it open, so its name cannot pass to the successor of a dead writer while
 * a reader maps it. Therefore a ring is a section over a file, %LOCALAPPDATA%\cfengine\NAME.ring: a file that is mapped
 * cannot be deleted but can be renamed, which is what cf_os_remove does; the file goes with its last handle. The file
 * is marked temporary, so its pages are written to disk only under memory pressure.
 */
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "os.h"

static bool path_of(const char* name, const char* suffix, char path[MAX_PATH]) {
    char folder[MAX_PATH];
    const DWORD length = GetEnvironmentVariableA("LOCALAPPDATA", folder, sizeof folder);
    if (length == 0 || length >= sizeof folder) return false;
    if (snprintf(path, MAX_PATH, "%s\\cfengine", folder) >= MAX_PATH) return false;
    CreateDirectoryA(path, NULL); /* there already, mostly */
    return snprintf(path, MAX_PATH, "%s\\cfengine\\%s.ring%s", folder, name, suffix) < MAX_PATH;
}

static cf_result refused(const char* name, const char* what) {
    const DWORD error = GetLastError();
    if (error == ERROR_FILE_NOT_FOUND || error == ERROR_PATH_NOT_FOUND)
        return cf_fail(CF_ERROR_NOT_FOUND, "there is no ring %s; start its writer, or give the name of another", name);
    const cf_result result = error == ERROR_FILE_EXISTS || error == ERROR_ALREADY_EXISTS ? CF_ERROR_BUSY
                             : error == ERROR_ACCESS_DENIED                              ? CF_ERROR_ACCESS
                             : error == ERROR_DISK_FULL                                  ? CF_ERROR_OUT_OF_MEMORY
                                                                                         : CF_ERROR_SYSTEM;
    return cf_fail(result, "ring %s: %s failed with error %lu", name, what, (unsigned long)error);
}

static bool describe(HANDLE file, cf_os_object* object) {
    BY_HANDLE_FILE_INFORMATION status;
    FILETIME now;
    if (!GetFileInformationByHandle(file, &status)) return false;
    GetSystemTimeAsFileTime(&now);
    const uint64_t made = (uint64_t)status.ftLastWriteTime.dwHighDateTime << 32 | status.ftLastWriteTime.dwLowDateTime;
    object->handle = (intptr_t)file;
    object->size = (uint64_t)status.nFileSizeHigh << 32 | status.nFileSizeLow;
    object->identity[0] = status.dwVolumeSerialNumber;
    object->identity[1] = (uint64_t)status.nFileIndexHigh << 32 | status.nFileIndexLow;
    object->age_ns = (int64_t)(((uint64_t)now.dwHighDateTime << 32 | now.dwLowDateTime) - made) * 100;
    return true;
}

static HANDLE open_file(const char* path, DWORD how) {
    return CreateFileA(path, GENERIC_READ | GENERIC_WRITE | DELETE,
                       FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, NULL, how, FILE_ATTRIBUTE_TEMPORARY,
                       NULL);
}

/* Delete the renamed files of earlier rings, as far as nobody maps them. */
static void sweep(const char* name) {
    char pattern[MAX_PATH], path[MAX_PATH];
    WIN32_FIND_DATAA found;
    if (!path_of(name, ".*", pattern)) return;
    const HANDLE search = FindFirstFileA(pattern, &found);
    if (search == INVALID_HANDLE_VALUE) return;
    do {
        const char* suffix = strstr(found.cFileName, ".ring.");
        if (suffix != NULL && path_of(name, suffix + 5, path)) DeleteFileA(path);
    } while (FindNextFileA(search, &found));
    FindClose(search);
}

cf_result cf_os_create(const char* name, uint64_t size, cf_os_object* object) {
    char path[MAX_PATH];
    if (!path_of(name, "", path)) return cf_fail(CF_ERROR_SYSTEM, "ring %s: LOCALAPPDATA is not set or too long", name);
    sweep(name);
    const HANDLE file = open_file(path, CREATE_NEW);
    if (file == INVALID_HANDLE_VALUE) return refused(name, "CreateFile");
    LARGE_INTEGER end;
    end.QuadPart = (LONGLONG)size;
    if (SetFilePointerEx(file, end, NULL, FILE_BEGIN) && SetEndOfFile(file) && describe(file, object))
        return CF_SUCCESS;
    const cf_result result = refused(name, "SetEndOfFile");
    CloseHandle(file);
    return result;
}

cf_result cf_os_open(const char* name, cf_os_object* object) {
    char path[MAX_PATH];
    if (!path_of(name, "", path)) return cf_fail(CF_ERROR_SYSTEM, "ring %s: LOCALAPPDATA is not set or too long", name);
    const HANDLE file = open_file(path, OPEN_EXISTING);
    if (file == INVALID_HANDLE_VALUE) return refused(name, "CreateFile");
    if (describe(file, object)) return CF_SUCCESS;
    const cf_result result = refused(name, "GetFileInformationByHandle");
    CloseHandle(file);
    return result;
}

cf_result cf_os_map(const cf_os_object* object, uint64_t offset, uint64_t size, bool writable, void** address) {
    const HANDLE section =
        CreateFileMappingA((HANDLE)object->handle, NULL, writable ? PAGE_READWRITE : PAGE_READONLY, 0, 0, NULL);
    if (section == NULL)
        return cf_fail(CF_ERROR_OUT_OF_MEMORY, "CreateFileMapping failed with error %lu",
                       (unsigned long)GetLastError());
    void* at = MapViewOfFile(section, writable ? FILE_MAP_READ | FILE_MAP_WRITE : FILE_MAP_READ, (DWORD)(offset >> 32),
                             (DWORD)offset, (SIZE_T)size);
    CloseHandle(section); /* the view keeps it */
    if (at == NULL)
        return cf_fail(CF_ERROR_OUT_OF_MEMORY, "mapping %llu bytes failed with error %lu", (unsigned long long)size,
                       (unsigned long)GetLastError());
    *address = at;
    return CF_SUCCESS;
}

void cf_os_unmap(void* address, uint64_t size) {
    (void)size;
    if (address != NULL) UnmapViewOfFile(address);
}

void cf_os_close(cf_os_object* object) {
    if (object->handle != -1) CloseHandle((HANDLE)object->handle);
    object->handle = -1;
}

void cf_os_remove(const char* name, const cf_os_object* object) {
    char suffix[32], path[MAX_PATH];
    wchar_t wide[MAX_PATH];
    struct {
        FILE_RENAME_INFO info;
        wchar_t room[MAX_PATH];
    } rename;
    /* by handle, so it is this object that loses the name, whoever has the name now */
    snprintf(suffix, sizeof suffix, ".%lu.%llu", (unsigned long)GetCurrentProcessId(),
             (unsigned long long)object->identity[1]);
    if (!path_of(name, suffix, path)) return;
    const int length = MultiByteToWideChar(CP_ACP, 0, path, -1, wide, MAX_PATH);
    if (length <= 0) return;
    memset(&rename, 0, sizeof rename);
    rename.info.ReplaceIfExists = TRUE;
    rename.info.FileNameLength = (DWORD)(length - 1) * sizeof(wchar_t);
    memcpy(rename.info.FileName, wide, (size_t)length * sizeof(wchar_t));
    SetFileInformationByHandle((HANDLE)object->handle, FileRenameInfo, &rename, sizeof rename);
}

/* Creation time of a process in 100 ns; 0: no such process, or not ours to ask. */
static uint64_t start_of(DWORD pid) {
    FILETIME made, ended, kernel, user;
    uint64_t start = 0;
    const HANDLE process = OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION | SYNCHRONIZE, FALSE, pid);
    if (process == NULL) return 0;
    const bool lives =
        WaitForSingleObject(process, 0) == WAIT_TIMEOUT; /* a handle of somebody keeps the pid of the dead */
    if (lives && GetProcessTimes(process, &made, &ended, &kernel, &user))
        start = (uint64_t)made.dwHighDateTime << 32 | made.dwLowDateTime;
    CloseHandle(process);
    return start;
}

cf_os_process cf_os_self(void) {
    const DWORD pid = GetCurrentProcessId();
    return (cf_os_process){(uint32_t)pid, start_of(pid), 0};
}

bool cf_os_alive(uint32_t pid, uint64_t start, uint64_t mask) {
    const uint64_t now = start_of(pid);
    return now != 0 && (start == 0 || (now & mask) == (start & mask));
}

int64_t cf_os_now_ns(void) {
    LARGE_INTEGER ticks, rate;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&rate);
    return ticks.QuadPart / rate.QuadPart * 1000000000 + ticks.QuadPart % rate.QuadPart * 1000000000 / rate.QuadPart;
}

uint64_t cf_os_time_ns(void) {
    FILETIME now;
    GetSystemTimePreciseAsFileTime(&now);
    return ((uint64_t)now.dwHighDateTime << 32 | now.dwLowDateTime) * 100;
}

void cf_os_wait(const _Atomic uint32_t* word, uint32_t seen, int64_t ns) {
    /* WaitOnAddress does not reach across processes */
    if (atomic_load_explicit(word, memory_order_relaxed) == seen && ns > 0) Sleep(1);
}

void cf_os_wake(const _Atomic uint32_t* word) { (void)word; }

cf_result cf_os_receive(const char* name, const char* path, int64_t until_ns, void* packet, size_t most, size_t* size,
                        int* fd) {
    (void)path, (void)until_ns, (void)packet, (void)most;
    *size = 0;
    *fd = -1;
    return cf_fail(CF_ERROR_UNSUPPORTED, "ring %s: handles of device memory are not passed on Windows yet", name);
}

void cf_os_close_fd(int fd) { (void)fd; }
#else
typedef int cf_shm_windows_is_for_windows;
#endif
