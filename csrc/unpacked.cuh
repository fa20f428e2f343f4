// What the kernels that unpack share: how weights are written, 8 of one lane at a time, rounded once from fp32 (nothing
// says that L2 should drop them: the product that follows reads them there), and the dtype that they are written in.
#pragma once

#include "device.cuh"

namespace nibble {

// `out` is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void store_8(typename T::word* out, const float (&values)[8]) {
    if constexpr (sizeof(typename T::word) == 4) {
        store(reinterpret_cast<float4*>(out), make_float4(values[0], values[1], values[2], values[3]));
        store(reinterpret_cast<float4*>(out) + 1, make_float4(values[4], values[5], values[6], values[7]));
    } else {
        store(reinterpret_cast<uint4*>(out), make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                                        pack<T>(values[4], values[5]), pack<T>(values[6], values[7])));
    }
}

template <class T>
bool fits_store_8(const typename T::word* out) {
    return reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

// run(T()) with the tag of a dtype code; first the arguments that both formats have are checked.
template <class Run>
int in_dtype(int count, int64_t columns, int dtype, Run run) {
    if (count < 1 || count > NIBBLE_MAX_PARTS) return NIBBLE_BAD_COUNT;
    if (columns < 0) return NIBBLE_BAD_SHAPE;
    switch (dtype) {
        case NIBBLE_FP32:
            return run(fp32());
        case NIBBLE_FP16:
            return run(fp16());
        case NIBBLE_BF16:
            return run(bf16());
    }
    return NIBBLE_BAD_DTYPE;
}

}  // namespace nibble
