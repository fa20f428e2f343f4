// What a kernel does beyond C++, once for nvcc and once for the emulator (emulator.h, which g++ includes first).
//
// All global memory traffic goes through load_once, load and store, so that the emulator can count and check it; a
// vector access is aligned to its own size. Shared memory is declared with __shared__, at most 48 KiB a kernel.
#pragma once

#include <stdint.h>

#include "nibble.h"

namespace nibble {

constexpr int WARP = 32;

struct fp32 {  // dtype tags: NIBBLE_FP32 ...
    using word = float;
};
struct fp16 {
    using word = uint16_t;  // raw bits
};
struct bf16 {
    using word = uint16_t;
};

}  // namespace nibble

#ifdef NIBBLE_EMULATED

#include "emulator_device.h"

#else

#include <cuda_runtime.h>

namespace nibble {

// L2 drops such lines first: they are read once, and what the kernel writes is read next.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Streamed: read once by the whole grid. T has 1, 2, 4, 8 or 16 bytes.
template <class T>
__device__ __forceinline__ T load_once(const T* address) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "size");
    union {
        T value;
        uint32_t words[sizeof(T) < 4 ? 1 : sizeof(T) / 4];
    } u;
    if constexpr (sizeof(T) == 1) {
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.u8 %0, [%1], %2;"
            : "=r"(u.words[0])
            : "l"(address), "l"(evict_first()));
    } else if constexpr (sizeof(T) == 2) {
        asm("{ .reg .u16 w; ld.global.nc.L1::no_allocate.L2::cache_hint.u16 w, [%1], %2; cvt.u32.u16 %0, w; }"
            : "=r"(u.words[0])
            : "l"(address), "l"(evict_first()));
    } else if constexpr (sizeof(T) == 4) {
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
            : "=r"(u.words[0])
            : "l"(address), "l"(evict_first()));
    } else if constexpr (sizeof(T) == 8) {
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
            : "=r"(u.words[0]), "=r"(u.words[1])
            : "l"(address), "l"(evict_first()));
    } else {
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
            : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
            : "l"(address), "l"(evict_first()));
    }
    return u.value;
}

// Read again, by this block or others: cached in L1 and L2. Vectors are PTX: a compiler may split a plain one.
template <class T>
__device__ __forceinline__ T load(const T* address) {
    if constexpr (sizeof(T) <= 4) {
        return *address;
    } else {
        static_assert(sizeof(T) == 8 || sizeof(T) == 16, "size");
        union {
            T value;
            uint32_t words[sizeof(T) / 4];
        } u;
        if constexpr (sizeof(T) == 8)
            asm("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(u.words[0]), "=r"(u.words[1]) : "l"(address) : "memory");
        else
            asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                : "l"(address)
                : "memory");
        return u.value;
    }
}

template <class T>
__device__ __forceinline__ void store(T* address, T value) {
    if constexpr (sizeof(T) <= 4) {
        *address = value;
    } else {
        static_assert(sizeof(T) == 8 || sizeof(T) == 16, "size");
        union {
            T value;
            uint32_t words[sizeof(T) / 4];
        } u = {value};
        if constexpr (sizeof(T) == 8)
            asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(u.words[0]), "r"(u.words[1])
                         : "memory");
        else
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(u.words[0]), "r"(u.words[1]),
                         "r"(u.words[2]), "r"(u.words[3])
                         : "memory");
    }
}

// Two 16-bit values, rounded to nearest even, in one word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The value of 16 bits.
template <class T>
__device__ __forceinline__ float widen(uint16_t bits);

template <>
__device__ __forceinline__ float widen<fp16>(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <>
__device__ __forceinline__ float widen<bf16>(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Both never contracted into an fma.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }

__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// prmt: byte i of the result is byte (selector >> 4i & 7) of the 8 bytes {high, low}.
__device__ __forceinline__ uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}

// The value of lane `lane` (mod 32). All 32 lanes of the warp take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// All 32 lanes of the warp meet. Stands between loads and what has to wait for others: without it ptxas may put the wait
// before loads that were written first (tests/csrc/test_machine_code.py looks at what it made of them).
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// d [16, 8] += a [16, 16] b [16, 8] over a warp: mma.m16n8k16.row.col with fp32 sums. With g = lane / 4, t = lane % 4:
//   a[0..3] = a[g][2t, 2t+1], a[g+8][2t..], a[g][2t+8, 2t+9], a[g+8][2t+8..]     b[0..1] = b[2t, 2t+1][g], b[2t+8..][g]
//   d[0..3] = d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1]                     the lower index in the lower half
// volatile: it stays where all lanes are.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The status of the launch, 0 or a cudaError_t.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, void* stream, const A&... arguments) {
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace nibble

#define LAUNCH(...) ::nibble::launch(__VA_ARGS__)  // LAUNCH(kernel, grid, block, stream, arguments...)

#endif

namespace nibble {

// One value in T's own bits, rounded to nearest even.
template <class T>
__device__ __forceinline__ typename T::word round_to(float value) {
    if constexpr (sizeof(typename T::word) == 4)
        return value;
    else
        return static_cast<typename T::word>(pack<T>(value, 0.0f));
}

}  // namespace nibble
