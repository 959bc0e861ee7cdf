/* Frames in device memory, read with the CUDA driver API: says the mean of every byte of each new frame's first plane.
 *
 *     cfengine serve --ring demo --device cuda --memory opaque_fd
 *     cfengine_cuda demo [FRAMES]
 *
 * A program of its own would give memory.at + frame.offsets[0] to a kernel, or to cuMemcpy2D into an array, and release
 * the frame when the event behind that is over.
 */
#include <cfengine_client.h>
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct imported {
    uint64_t generation; /* of the ring; 0: nothing is imported */
    uint32_t kind;
    CUdeviceptr at;
    size_t size;
} imported;

static void must(CUresult result, const char* what) {
    const char* why = "";
    if (result == CUDA_SUCCESS) return;
    cuGetErrorString(result, &why);
    fprintf(stderr, "%s failed: %s\n", what, why);
    exit(1);
}
#define MUST(call) must(call, #call)

/* Make the GPU with this UUID current; the memory can be opened there alone. */
static int use_device(const uint8_t uuid[16]) {
    int count = 0;
    MUST(cuInit(0));
    MUST(cuDeviceGetCount(&count));
    for (int device = 0; device < count; ++device) {
        CUuuid found;
        CUcontext context;
        MUST(cuDeviceGetUuid_v2(&found, device));
        if (memcmp(&found, uuid, 16) != 0) continue;
        MUST(cuDevicePrimaryCtxRetain(&context, device));
        MUST(cuCtxSetCurrent(context));
        return device;
    }
    fprintf(stderr, "the frames are on a GPU that this process does not see (CUDA_VISIBLE_DEVICES)\n");
    exit(1);
}

static void let_go(imported* memory) {
    if (memory->generation == 0) return;
    if (memory->kind == CF_MEMORY_CUDA_IPC) {
        MUST(cuIpcCloseMemHandle(memory->at));
    } else {
        MUST(cuMemUnmap(memory->at, memory->size));
        MUST(cuMemAddressFree(memory->at, memory->size));
    }
    memory->generation = 0;
}

/* Once for each generation: a writer that restarted has other memory. */
static int import_memory(cf_session* session, imported* memory) {
    cf_device_memory given = CF_DEVICE_MEMORY_INIT;
    if (cf_session_device_memory(session, &given) != CF_SUCCESS) return 0;
    let_go(memory);
    const int device = use_device(given.device_uuid);
    if (given.memory == CF_MEMORY_CUDA_IPC) {
        CUipcMemHandle handle;
        memcpy(&handle, given.ipc_handle, sizeof handle);
        MUST(cuIpcOpenMemHandle(&memory->at, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
    } else {
        CUmemGenericAllocationHandle handle;
        CUmemAccessDesc access = {.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
        access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        access.location.id = device;
        MUST(cuMemImportFromShareableHandle(&handle, (void*)(intptr_t)given.fd,
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
        close(given.fd);
        MUST(cuMemAddressReserve(&memory->at, given.size, 0, 0, 0));
        MUST(cuMemMap(memory->at, given.size, 0, handle, 0));
        MUST(cuMemSetAccess(memory->at, given.size, &access, 1));
        MUST(cuMemRelease(handle)); /* the map keeps it */
    }
    memory->generation = given.generation, memory->kind = given.memory, memory->size = given.size;
    return 1;
}

int main(int argc, char** argv) {
    cf_session_info info = CF_SESSION_INFO_INIT;
    cf_session* session = NULL;
    imported memory = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    info.name = argc > 1 ? argv[1] : "demo";
    info.flags = CF_SESSION_DEVICE_MEMORY;
    if (cf_session_open(&info, &session) < 0) return fprintf(stderr, "%s\n", cf_last_error()), 1;
    for (long left = argc > 2 ? atol(argv[2]) : 100; left > 0;) {
        cf_acquire_info when = CF_ACQUIRE_INFO_INIT;
        cf_frame frame = CF_FRAME_INIT;
        when.policy = CF_POLICY_NEXT;
        when.timeout_ns = 1000000000;
        if (cf_frame_acquire(session, &when, &frame) != CF_SUCCESS) continue;
        if (frame.memory == CF_MEMORY_HOST) return fprintf(stderr, "the frames are in host memory\n"), 1;
        if (frame.generation == memory.generation || import_memory(session, &memory)) {
            const uint64_t row = frame.width * (frame.format == CF_FORMAT_NV12 ? 1u : 4u);
            uint64_t sum = 0;
            uint8_t* bytes = malloc(frame.planes[0].size);
            if (bytes == NULL) return 1;
            MUST(cuMemcpyDtoH(bytes, memory.at + frame.offsets[0], frame.planes[0].size)); /* returns when it is read */
            for (uint32_t y = 0; y < frame.height; ++y)
                for (uint64_t x = 0; x < row; ++x) sum += bytes[y * frame.planes[0].stride + x];
            printf("frame %llu mean %.3f\n", (unsigned long long)frame.id, (double)sum / (double)(row * frame.height));
            free(bytes);
            --left;
        }
        cf_frame_release(session, frame.id);
    }
    let_go(&memory);
    return cf_session_close(session) != CF_SUCCESS;
}
