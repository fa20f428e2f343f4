// Row-wise int8 -> fp32, fp16 or bf16: the whole matrix, all its parts, in one launch.
//
//     out[n, k] = round(codes[n, k] * scale[n] * (1 / 127))          each operation rounded, as in kernels/int8.py
//
// 1 byte a weight is read once and leaves L2 first; 2 (4 for fp32) are written and stay there for the product that
// reads them next. A warp takes 1,024 columns of one row in 4 steps; a lane reads 8 bytes and writes 16 at a step.
// Where rows do not start on such boundaries, it reads and writes weight by weight.
#include "device.cuh"
#include "unpacked.cuh"

namespace nibble {
namespace {

constexpr int WARPS = 4;            // of a block of threads, each with a row
constexpr int STEPS = 4;
constexpr int STEP = 8 * WARP;      // columns of a warp's step
constexpr int TILE = STEPS * STEP;  // columns of a warp

struct Part {
    nibble_int8 weight;
    void* out;
    int64_t first_row;  // of all parts' rows
    bool aligned;       // codes of all rows to 8 bytes, out of all rows to 16
};

struct Parts {
    Part part[NIBBLE_MAX_PARTS];
    int count;
    int64_t rows, columns;
    uint32_t tiles;  // of a row
};

// Byte `byte` of four codes. 0x4B0000bb is the float 2^23 + bb, so an unsigned byte needs no conversion.
__device__ __forceinline__ float unpack(uint32_t codes, int byte, float scale) {
    const float above = bits_float(byte_permute(codes ^ 0x80808080u, 0x4B000000u, 0x7540u | byte));
    return mul_rn(mul_rn(above - (8388608.0f + 128.0f), scale), static_cast<float>(1.0 / 127.0));
}

// A lane's share of a tile of which `left` columns exist; WHOLE: all of them do.
template <class T, bool WHOLE>
__device__ __forceinline__ void unpack_tile(const int8_t* codes, const float* scale, typename T::word* out, int left) {
    uint2 words[STEPS] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        if (WHOLE || step * STEP < left) words[step] = load_once(reinterpret_cast<const uint2*>(codes + step * STEP));
    const float row_scale = load(scale);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = unpack(i < 4 ? words[step].x : words[step].y, i % 4, row_scale);
        if (WHOLE || step * STEP < left) store_8<T>(out + step * STEP, values);
    }
}

template <class T>
__global__ void __launch_bounds__(WARPS* WARP) dequantize_int8(const Parts parts) {
    const int lane = threadIdx.x % WARP;
    const uint32_t group = blockIdx.x / parts.tiles;
    const int64_t first = int64_t(blockIdx.x - group * parts.tiles) * TILE;
    int64_t row = int64_t(group) * WARPS + threadIdx.x / WARP;
    if (row >= parts.rows) return;
    int index = 0;
    while (index + 1 < parts.count && row >= parts.part[index + 1].first_row) ++index;
    const Part& part = parts.part[index];
    row -= part.first_row;

    const int64_t start = row * parts.columns + first;
    const int8_t* codes = part.weight.codes + start;
    const float* scale = part.weight.scale + row;
    auto out = static_cast<typename T::word*>(part.out) + start;
    const int64_t rest = parts.columns - first;
    const int left = rest < TILE ? int(rest) : TILE;  // columns of this tile
    if (part.aligned && left == TILE) {
        unpack_tile<T, true>(codes + 8 * lane, scale, out + 8 * lane, TILE);
    } else if (part.aligned) {
        unpack_tile<T, false>(codes + 8 * lane, scale, out + 8 * lane, left - 8 * lane);
    } else {
        const float row_scale = load(scale);
#pragma unroll 4
        for (int column = lane; column < left; column += WARP)
            store(out + column, round_to<T>(unpack(static_cast<uint8_t>(load_once(codes + column)), 0, row_scale)));
    }
}

template <class T>
int run(const nibble_int8* weights, int count, int64_t columns, void* out, void* stream) {
    Parts parts = {};
    parts.count = count;
    parts.columns = columns;
    auto next = static_cast<typename T::word*>(out);
    if (reinterpret_cast<uintptr_t>(out) % sizeof(*next)) return NIBBLE_BAD_POINTER;
    for (int i = 0; i < count; ++i) {
        const nibble_int8& weight = weights[i];
        if (weight.rows < 0) return NIBBLE_BAD_SHAPE;
        if (reinterpret_cast<uintptr_t>(weight.scale) % 4) return NIBBLE_BAD_POINTER;
        Part& part = parts.part[i];
        part.weight = weight;
        part.out = next;
        part.first_row = parts.rows;
        part.aligned =
            columns % 8 == 0 && reinterpret_cast<uintptr_t>(weight.codes) % 8 == 0 && fits_store_8<T>(next);
        next += weight.rows * columns;
        parts.rows += weight.rows;
    }
    const int64_t tiles = (columns + TILE - 1) / TILE, groups = (parts.rows + WARPS - 1) / WARPS;
    if (tiles == 0 || groups == 0) return 0;
    if (tiles > 0x7fffffff / groups) return NIBBLE_BAD_SHAPE;
    parts.tiles = static_cast<uint32_t>(tiles);
    return LAUNCH(dequantize_int8<T>, dim3(static_cast<uint32_t>(tiles * groups)), dim3(WARPS * WARP), stream, parts);
}

}  // namespace
}  // namespace nibble

extern "C" int nibble_dequantize_int8(const nibble_int8* parts, int count, int64_t columns, void* out, int dtype,
                                      void* stream) {
    return nibble::in_dtype(count, columns, dtype, [&](auto tag) {
        return nibble::run<decltype(tag)>(parts, count, columns, out, stream);
    });
}
