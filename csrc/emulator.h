// CUDA on a CPU: with this header g++ compiles the .cu files into a library with nibble's C interface on host pointers.
//
//     g++ -O2 -std=c++17 -shared -fPIC -x c++ -include csrc/emulator.h csrc/*.cu -o libnibble_emulated.so
//
// For a build script: the sources are csrc/*.cu, the same as nvcc's; what they include are csrc/*.h and csrc/*.cuh; no
// CUDA header and no library beyond libc and libstdc++ is needed (Linux with glibc).
//
// Blocks run one after another. The threads of a block are fibers on one CPU thread; a fiber runs until it ends or
// waits in a collective (sync_threads, sync_warp, shuffle, mma). What a kernel does wrong ends its launch with
// NIBBLE_EMULATOR, and nibble_emulator_failure says it:
//     an access to global memory that is not aligned to its size, or not inside of one tracked range
//     a collective that not all threads of the warp or block reach, or that they reach on different lines
//     a grid or block beyond CUDA's limits
// Shared memory is full of NaNs when a block starts, and the order of threads and blocks can be reversed: what was
// never written, or depends on the order, shows as other bits. Not checked: bounds of shared arrays. Not as on a card:
// time, and the order in which a tensor core adds.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp does not change stacks
#define NIBBLE_EMULATED 1

#include <stdint.h>

#include "nibble.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __restrict__ __restrict
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __thread  // the library's thread-local memory is the shared memory of its kernels

struct __align__(8) uint2 { uint32_t x, y; };
struct __align__(16) uint4 { uint32_t x, y, z, w; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
struct dim3 {
    uint32_t x, y, z;
    constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#pragma GCC visibility push(hidden)
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
#pragma GCC visibility pop

#include "emulator_fibers.h"
#include "emulator_memory.h"

// The emulator's own C interface. `used`: nothing here calls them.
#define NIBBLE_CONTROL extern "C" inline __attribute__((used))

// Ranges count from 0 in the order of these calls. While there is none, accesses are not checked.
NIBBLE_CONTROL void nibble_emulator_track(const void* start, int64_t bytes) { nibble::emulator::track(start, bytes); }

// counts: bytes loaded, distinct bytes loaded, bytes stored, distinct bytes stored. NIBBLE_EMULATOR: no such range.
NIBBLE_CONTROL int nibble_emulator_counts(int range, int64_t counts[4]) {
    return nibble::emulator::counts(range, counts) ? 0 : NIBBLE_EMULATOR;
}

// Forgets ranges, counts and the failure.
NIBBLE_CONTROL void nibble_emulator_reset() {
    nibble::emulator::ranges.clear();
    nibble::emulator::failure.clear();
}

// Threads and blocks run in falling order.
NIBBLE_CONTROL void nibble_emulator_reverse(int on) { nibble::emulator::reversed = on != 0; }

// The first failure since reset, or "".
NIBBLE_CONTROL const char* nibble_emulator_failure() { return nibble::emulator::failure.c_str(); }
