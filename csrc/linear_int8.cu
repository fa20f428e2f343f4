// y = x w^T + bias for a few rows of x and row-wise int8 weights that are converted on the way to the tensor cores.
//
//     y[m, n] = scale[n] / 127 * sum_k x[m, k] code[n, k]   + bias[n]
//
// Codes are exact in fp16 and bf16, products and sums are fp32, and the row's scale multiplies its sum: no weight is
// rounded. 1 byte a weight is read, once.
//
// A code becomes a float by its place in the mantissa of 2^23 (a byte permutation and one subtraction), two floats
// become a word: 2.5 instructions a weight. The whole loop has 3.3 up to 4 tokens (counted in sm_90's code); at its
// full bandwidth an H200 has time for 7.
#include "linear_launch.cuh"

namespace nibble {

template <class T>
struct Int8Codes {
    using Part = nibble_int8;
    using Word = uint4;
    struct Scale {};
    struct Tables {};
    struct PlainTables {};
    struct Scales {
        __device__ __forceinline__ Scales(const Part&, int64_t) {}
        __device__ __forceinline__ Scale load(uint32_t) const { return {}; }
    };
    static constexpr bool SCALED = false;

    static __device__ __forceinline__ void fill(Tables&, int) {}
    static __device__ __forceinline__ void fill_plain(PlainTables&, int) {}

    static __device__ __forceinline__ float row_scale(const Part& part, int64_t row) {
        return mul_rn(load(part.scale + row), 1.0f / 127.0f);
    }

    static __device__ __forceinline__ void unpack(const Tables&, const Word& word, int, uint32_t (&pairs)[8]) {
        const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t four = words[i] ^ 0x80808080;  // code + 128
            float values[4];
#pragma unroll
            for (int b = 0; b < 4; ++b)
                values[b] = bits_float(byte_permute(four, 0x4b000000, 0x7540 + b)) - (8388608.0f + 128.0f);
            pairs[2 * i] = pack<T>(values[0], values[1]);
            pairs[2 * i + 1] = pack<T>(values[2], values[3]);
        }
    }

    static __device__ __forceinline__ void pair(const PlainTables&, const Part& part, int64_t, int64_t i, int64_t stop,
                                                float (&weights)[2]) {
        weights[0] = load_once(part.codes + i);
        if (i + 1 < stop) weights[1] = load_once(part.codes + i + 1);
    }

    static int check(const Part& part) {
        if (part.rows < 0) return NIBBLE_BAD_SHAPE;
        return aligned(part.scale, 4) ? 0 : NIBBLE_BAD_POINTER;
    }
};

}  // namespace nibble

extern "C" int nibble_linear_int8(const nibble_int8* parts, const nibble_output* outputs, int count, int64_t columns,
                                  const void* x, int64_t x_stride, int64_t tokens, int dtype, int splits,
                                  float* workspace, int64_t workspace_bytes, void* stream) {
    return nibble::linear<nibble::Int8Codes>(parts, outputs, count, columns, x, x_stride, tokens, dtype, splits,
                                             workspace, workspace_bytes, stream);
}
