/* The calls of the CUDA driver API that samples/cuda makes, played on files in memory: a descriptor is one, a device
 * pointer an address, and every rule of order is checked. */
#define _GNU_SOURCE
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int current, imported = -1, mapped, readable;
static size_t reserved;

#define RULE(condition)                                        \
    do {                                                       \
        if (!(condition)) {                                    \
            fprintf(stderr, "%s: %s\n", __func__, #condition); \
            abort();                                           \
        }                                                      \
    } while (0)

CUresult cuInit(unsigned int flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuDeviceGetCount(int* count) {
    *count = 2;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    memcpy(uuid, device == 1 ? "stand-in device!" : "another device!!", 16);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    RULE(device == 1);
    *context = (CUcontext)&current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    current = context == (CUcontext)&current;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    (void)error;
    *text = "played";
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* fd,
                                        CUmemAllocationHandleType type) {
    RULE(current && imported < 0 && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    imported = dup((int)(intptr_t)fd);
    RULE(imported >= 0);
    *handle = (CUmemGenericAllocationHandle)imported;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t size, size_t alignment, CUdeviceptr at,
                             unsigned long long flags) {
    RULE(size % (2 << 20) == 0 && alignment == 0 && at == 0 && flags == 0 && reserved == 0);
    void* place = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    RULE(place != MAP_FAILED);
    reserved = size;
    *pointer = (CUdeviceptr)(uintptr_t)place;
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    RULE(size == reserved && offset == 0 && (int)handle == imported && flags == 0 && !mapped);
    RULE(mmap((void*)(uintptr_t)pointer, size, PROT_NONE, MAP_SHARED | MAP_FIXED, imported, 0) != MAP_FAILED);
    mapped = 1;
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc* access, size_t count) {
    RULE(mapped && size == reserved && count == 1 && access->location.type == CU_MEM_LOCATION_TYPE_DEVICE);
    RULE(access->location.id == 1 && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    RULE(mprotect((void*)(uintptr_t)pointer, size, PROT_READ | PROT_WRITE) == 0);
    readable = 1;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    RULE((int)handle == imported && close(imported) == 0);
    imported = -1;
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t size) {
    RULE(readable);
    memcpy(to, (const void*)(uintptr_t)from, size);
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    RULE(mapped && size == reserved && mprotect((void*)(uintptr_t)pointer, size, PROT_NONE) == 0);
    mapped = readable = 0;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    RULE(!mapped && size == reserved && munmap((void*)(uintptr_t)pointer, size) == 0);
    reserved = 0;
    return CUDA_SUCCESS;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned int flags) {
    (void)pointer, (void)handle, (void)flags;
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    (void)pointer;
    return CUDA_ERROR_NOT_SUPPORTED;
}
