// y = x w^T + bias for a few rows of x and NF4 weights that are unpacked on the way to the tensor cores.
//
//     y[m, n] = sum over blocks b of  absmax[n, b] * sum_{k in b} x[m, k] level[code[n, k]]   + bias[n]
//
// Levels are rounded to x's dtype (their products are exact in fp32), a block's absmax multiplies its fp32 sum: no
// weight is rounded to 16 bits. 0.5159 bytes a weight are read, once.
//
// A byte is two weights and one lookup: pairs[byte] holds both levels as the tensor core takes them. The table stands
// 32 times in shared memory (32 KiB), once for each bank: no lookup waits for another one. Per lane and two weights: a
// shift, an and-or, a load. The whole loop has 2.6 instructions a weight up to 4 tokens, 2.4 at 8, 3.4 at 32 (counted
// in sm_90's code); at its full bandwidth an H200 has time for 3.6, an A100 for 5.0, a 3090 for 9.8.
#include "linear_launch.cuh"
#include "nf4.cuh"

namespace nibble {

template <class T>
struct NF4Codes {
    using Part = nibble_nf4;
    using Word = uint2;
    using Scale = Absmax;
    static constexpr bool SCALED = true;

    struct Tables {
        uint4 pairs[256][8];  // of a byte: the high nibble's level in the low half, 32 times
        float map8[256];
    };

    // A thread fills a byte's row; the order of its eight stores keeps eight neighbours in different banks.
    static __device__ __forceinline__ void fill(Tables& tables, int thread) {
        static_assert(THREADS == 256, "a thread a byte");
        const uint32_t pair = pack<T>(LEVELS[thread >> 4], LEVELS[thread & 15]);
        const uint4 four = make_uint4(pair, pair, pair, pair);
#pragma unroll
        for (int i = 0; i < 8; ++i) tables.pairs[thread][(i + thread) & 7] = four;
        tables.map8[thread] = MAP8[thread];
    }

    static __device__ __forceinline__ void unpack(const Tables& tables, const Word& word, int lane,
                                                  uint32_t (&pairs)[8]) {
        const char* mine = reinterpret_cast<const char*>(tables.pairs);  // the lane's column
        const uint32_t column = lane * 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t four = i < 4 ? word.x : word.y;
            const int bit = i % 4 * 8;  // where the byte stands; it is to stand at bit 7
            const uint32_t row = (bit < 7 ? four << (7 - bit) : four >> (bit - 7)) & 0x7f80;
            pairs[i] = *reinterpret_cast<const uint32_t*>(mine + (row | column));
        }
    }

    struct Scales {
        const uint8_t* codes;
        const float* absmax2;
        uint32_t before;  // blocks of absmax2's group that lie before
        float offset;

        __device__ __forceinline__ Scales(const Part& part, int64_t block)
            : codes(part.absmax_codes + block),
              absmax2(part.absmax2 + ((block + part.first_block) >> 8)),
              before((block + part.first_block) & 255),
              offset(nibble::load(part.offset)) {}

        __device__ __forceinline__ Scale load(uint32_t i) const {
            return {nibble::load(codes + i), nibble::load(absmax2 + ((i + before) >> 8))};
        }

        __device__ __forceinline__ float scale(const Tables& tables, const Scale& stored) const {
            return absmax(tables.map8, stored, offset);
        }
    };

    static __device__ __forceinline__ float row_scale(const Part&, int64_t) { return 1.0f; }

    struct PlainTables {
        float levels[16];
        float map8[256];
    };

    static __device__ __forceinline__ void fill_plain(PlainTables& tables, int thread) {
        if (thread < 16) tables.levels[thread] = LEVELS[thread];
        tables.map8[thread] = MAP8[thread];
    }

    static __device__ __forceinline__ void pair(const PlainTables& tables, const Part& part, int64_t block, int64_t i,
                                                int64_t, float (&weights)[2]) {
        const uint8_t both = load_once(part.codes + i / 2);
        const float largest = absmax(tables.map8, load_absmax(part, block), load(part.offset));
        weights[0] = tables.levels[both >> 4] * largest;
        weights[1] = tables.levels[both & 15] * largest;
    }

    static int check(const Part& part) {
        if (part.rows < 0 || part.first_block < 0 || part.first_block > 255) return NIBBLE_BAD_SHAPE;
        return aligned(part.absmax2, 4) && aligned(part.offset, 4) ? 0 : NIBBLE_BAD_POINTER;
    }
};

}  // namespace nibble

extern "C" int nibble_linear_nf4(const nibble_nf4* parts, const nibble_output* outputs, int count, int64_t columns,
                                 const void* x, int64_t x_stride, int64_t tokens, int dtype, int splits,
                                 float* workspace, int64_t workspace_bytes, void* stream) {
    return nibble::linear<nibble::NF4Codes>(parts, outputs, count, columns, x, x_stride, tokens, dtype, splits,
                                            workspace, workspace_bytes, stream);
}
