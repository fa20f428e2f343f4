// The emulator's side of device.cuh: the same names, for g++. The call's own line is noted by default arguments.
#pragma once

#include "emulator_memory.h"

#define NIBBLE_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace nibble {

template <class T>
inline T load_once(const T* address, NIBBLE_SITE) {
    return emulator::load(address, {file, line});
}

template <class T>
inline T load(const T* address, NIBBLE_SITE) {
    return emulator::load(address, {file, line});
}

template <class T>
inline void store(T* address, T value, NIBBLE_SITE) {
    emulator::store(address, value, {file, line});
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// volatile: gcc may contract a product and a sum where the machine has an fma.
inline float add_rn(float a, float b) {
    volatile float sum = a + b;
    return sum;
}

inline float mul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}

namespace emulator {

inline uint32_t round_to(bf16, float value) {
    const uint32_t bits = float_bits(value);
    if (value != value) return 0x7fff;  // as the card's conversion
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t round_to(fp16, float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (value != value) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above: infinite
    if (magnitude < 0x38800000)  // below 2^-14: multiples of 2^-24, which the fp32 sum rounds to
        return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
    return sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

inline float widen(bf16, uint32_t bits) { return bits_float(bits << 16); }

inline float widen(fp16, uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | magnitude << 13);
    if (magnitude < 0x400) return bits_float(sign | float_bits(magnitude * 0x1p-24f));
    return bits_float(sign | ((magnitude << 13) + 0x38000000));
}

template <class T>
inline float half_of(uint32_t word, int upper) {
    return widen(T(), upper ? word >> 16 : word & 0xffff);
}

}  // namespace emulator

template <class T>
inline uint32_t pack(float low, float high) {
    return emulator::round_to(T(), low) | emulator::round_to(T(), high) << 16;
}

template <class T>
inline float widen(uint16_t bits) {
    return emulator::widen(T(), bits);
}

inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

template <class T>
inline T shuffle(T value, int lane, NIBBLE_SITE) {
    T result;
    emulator::warp_collective("shuffle", {file, line}, &value, &result, &lane, [](auto& brought) {
        for (auto& mine : brought)
            *static_cast<T*>(mine[1]) = *static_cast<T*>(brought[*static_cast<int*>(mine[2]) & 31][0]);
    });
    return result;
}

inline void sync_threads(NIBBLE_SITE) { emulator::block_barrier({file, line}); }

inline void sync_warp(NIBBLE_SITE) {
    emulator::warp_collective("sync_warp", {file, line}, nullptr, nullptr, nullptr, [](auto&) {});
}

// Products are exact, sums are fp32 in order of k.
template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], NIBBLE_SITE) {
    auto multiply = [](auto& brought) {
        float left[16][16], right[8][16];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const auto a = static_cast<const uint32_t*>(brought[lane][1]);
            const auto b = static_cast<const uint32_t*>(brought[lane][2]);
            for (int upper = 0; upper < 2; ++upper) {
                for (int i = 0; i < 4; ++i)
                    left[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + upper] = emulator::half_of<T>(a[i], upper);
                for (int i = 0; i < 2; ++i) right[g][2 * t + 8 * i + upper] = emulator::half_of<T>(b[i], upper);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const auto d = static_cast<float*>(brought[lane][0]);
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 16; ++k) d[i] += left[g + 8 * (i / 2)][k] * right[2 * t + i % 2][k];
        }
    };
    emulator::warp_collective("mma_16x8x16", {file, line}, d, const_cast<uint32_t*>(a), const_cast<uint32_t*>(b),
                              multiply);
}

}  // namespace nibble
