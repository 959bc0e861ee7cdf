// Description of a tensor in device memory for the copy engine of Hopper GPUs. Host side.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"

namespace cf {

// A tensor of `rank` axes, the innermost first and adjacent, and the box of it that one copy brings to shared memory.
// What of a box lies outside of the tensor arrives as zeros.
struct TensorShape {
    const void* base;     // a multiple of 16
    int number_bytes;     // 1 or 2
    int rank;             // at most 5
    int64_t extent[5];    // in numbers
    int64_t stride[5];    // in numbers, of axes 1 ... rank - 1; each a multiple of 16 bytes
    int32_t box[5];       // in numbers; the innermost is `swizzle` bytes at most
    int swizzle;          // 128 or 64: rows of that many bytes, their 16-byte pieces permuted
};

#if defined(CF_EMULATE)

inline TensorMap make_tensor_map(const TensorShape& shape, const char*) {
    TensorMap map = {};
    map.base = static_cast<const unsigned char*>(shape.base);
    map.rank = shape.rank, map.number_bytes = shape.number_bytes, map.swizzle = shape.swizzle;
    for (int i = 0; i < shape.rank; ++i) {
        map.extent[i] = shape.extent[i];
        map.stride[i] = shape.stride[i] * shape.number_bytes;
        map.box[i] = shape.box[i];
    }
    return map;
}

#else

// cuTensorMapEncodeTiled lives in the driver's library; asking the runtime for it spares us to link that.
inline TensorMap make_tensor_map(const TensorShape& shape, const char* what) {
    typedef decltype(&cuTensorMapEncodeTiled) Encode;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               what);
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), what);
#endif
    if (!found) fail(what, " needs cuTensorMapEncodeTiled, which this driver lacks; install driver 525 or newer");
    cuuint64_t extent[5], stride[5];
    cuuint32_t box[5], step[5];
    for (int i = 0; i < shape.rank; ++i) {
        extent[i] = shape.extent[i];
        box[i] = shape.box[i];
        step[i] = 1;
        if (i) stride[i - 1] = shape.stride[i] * shape.number_bytes;
    }
    TensorMap map;
    const CUresult status = reinterpret_cast<Encode>(found)(
        &map, shape.number_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, shape.rank,
        const_cast<void*>(shape.base), extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        shape.swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        fail(what, ": the driver refuses a tensor map of rank ", shape.rank, " (code ", int(status),
             "); strides must be multiples of 16 bytes and addresses too");
    return map;
}

#endif

}  // namespace cf
