// NF4 -> fp32, fp16 or bf16: the whole matrix, all its parts, in one launch.
//
//     out[i] = round(level[code_i] * absmax(i / 64))     absmax(b) = map8[absmax_codes[b]] * absmax2[b / 256] + offset
//
// 0.5159 bytes a weight are read, the codes once and leaving L2 first; 2 (4 for fp32) are written and stay there for
// the product that reads them next. Every operation is rounded as in kernels/dequantize_nf4.py: the same bits.
//
// A warp takes 2,048 weights = 32 blocks. Each lane unpacks the absmax of one block, from one sector of absmax codes.
// Then come 8 steps of 256 weights: a lane has 4 bytes = 8 weights, gets their absmax from the lane that has it and
// their levels from lanes 0..15 (or 16..31, which hold them again, so that an index needs no mask), and writes 16
// bytes. All loads of a warp come before its first store.
#include "device.cuh"
#include "nf4.cuh"
#include "unpacked.cuh"

namespace nibble {
namespace {

constexpr int WARPS = 4;            // of a block of threads
constexpr int STEPS = 8;
constexpr int STEP = 8 * WARP;      // weights of a warp's step
constexpr int TILE = STEPS * STEP;  // weights of a warp
static_assert(TILE == WARP * BLOCK, "a lane for each block's absmax");

struct Part {
    nibble_nf4 weight;
    void* out;
    int64_t size;        // weights
    int64_t first_tile;  // of all parts' tiles
    bool aligned;        // codes to 4 bytes, out to 16
};

struct Parts {
    Part part[NIBBLE_MAX_PARTS];
    int count;
};

// The 8 codes of a lane, of which `left` exist.
__device__ __forceinline__ uint32_t load_codes(const uint8_t* codes, bool whole, int64_t left) {
    if (whole) return load_once(reinterpret_cast<const uint32_t*>(codes));
    uint32_t word = 0;
    for (int byte = 0; byte < 4 && 2 * byte < left; ++byte) word |= uint32_t(load_once(codes + byte)) << 8 * byte;
    return word;
}

template <class T>
__device__ __forceinline__ void store_some(typename T::word* out, const float (&values)[8], int64_t left) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < left) store(out + i, round_to<T>(values[i]));
}

// 8 weights from their codes and the absmax of their block. Every lane of the warp takes part.
__device__ __forceinline__ void unpack(uint32_t codes, float level, float absmax, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // the first weight of a byte is its high nibble
        const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);
        values[i] = mul_rn(shuffle(level, codes >> shift), absmax);
    }
}

template <class T>
__global__ void __launch_bounds__(WARPS* WARP, 12) dequantize_nf4(const Parts parts) {
    const int lane = threadIdx.x % WARP;
    const int64_t tile = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    int index = 0;
    while (index + 1 < parts.count && tile >= parts.part[index + 1].first_tile) ++index;
    const Part& part = parts.part[index];
    const int64_t start = (tile - part.first_tile) * TILE;
    if (start >= part.size) return;  // the last warps of the grid

    const uint8_t* codes = part.weight.codes + start / 2 + 4 * lane;
    auto out = static_cast<typename T::word*>(part.out) + start + 8 * lane;
    const int64_t block = start / BLOCK + lane;  // whose absmax this lane unpacks
    const float level = LEVELS[lane % 16];

    if (part.aligned && start + TILE <= part.size) {
        uint32_t words[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            words[step] = load_once(reinterpret_cast<const uint32_t*>(codes + step * STEP / 2));
        sync_warp();  // MAP8 waits for the absmax code; the loads above do not
        const float own = absmax(MAP8, load_absmax(part.weight, block), load(part.weight.offset));
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            float values[8];
            unpack(words[step], level, shuffle(own, 4 * step + lane / 8), values);
            store_8<T>(out + step * STEP, values);
        }
        return;
    }

    // The last tile of a part, or pointers that vectors do not fit: each lane looks at how many weights are left.
    float own = 0.0f;
    if (block * BLOCK < part.size) own = absmax(MAP8, load_absmax(part.weight, block), load(part.weight.offset));
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const int64_t left = part.size - (start + step * STEP + 8 * lane);
        const bool whole = part.aligned && left >= 8;
        float values[8];
        unpack(load_codes(codes + step * STEP / 2, whole, left), level, shuffle(own, 4 * step + lane / 8), values);
        if (whole)
            store_8<T>(out + step * STEP, values);
        else
            store_some<T>(out + step * STEP, values, left);
    }
}

template <class T>
int run(const nibble_nf4* weights, int count, int64_t columns, void* out, void* stream) {
    Parts parts = {};
    parts.count = count;
    auto next = static_cast<typename T::word*>(out);
    if (reinterpret_cast<uintptr_t>(out) % sizeof(*next)) return NIBBLE_BAD_POINTER;
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
        const nibble_nf4& weight = weights[i];
        if (weight.rows < 0 || weight.first_block < 0) return NIBBLE_BAD_SHAPE;
        if ((reinterpret_cast<uintptr_t>(weight.absmax2) | reinterpret_cast<uintptr_t>(weight.offset)) % 4)
            return NIBBLE_BAD_POINTER;
        Part& part = parts.part[i];
        part.weight = weight;
        part.out = next;
        part.size = weight.rows * columns;
        part.first_tile = tiles;
        part.aligned = reinterpret_cast<uintptr_t>(weight.codes) % 4 == 0 && fits_store_8<T>(next);
        next += part.size;
        tiles += (part.size + TILE - 1) / TILE;
    }
    const int64_t blocks = (tiles + WARPS - 1) / WARPS;
    if (blocks == 0) return 0;
    if (blocks > 0x7fffffff) return NIBBLE_BAD_SHAPE;
    return LAUNCH(dequantize_nf4<T>, dim3(blocks), dim3(WARPS * WARP), stream, parts);
}

}  // namespace
}  // namespace nibble

extern "C" int nibble_dequantize_nf4(const nibble_nf4* parts, int count, int64_t columns, void* out, int dtype,
                                     void* stream) {
    return nibble::in_dtype(count, columns, dtype, [&](auto tag) {
        return nibble::run<decltype(tag)>(parts, count, columns, out, stream);
    });
}
