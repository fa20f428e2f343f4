/* nibble's C interface: frozen 4-bit (NF4) and 8-bit weights, unpacked or multiplied with a few rows of activations.

Every function launches on `stream` (a cudaStream_t), allocates nothing and never waits for the device. It returns 0, a
positive cudaError_t or one of the negative codes below; nibble_error says either in words. Pointers are device pointers
(host pointers in the emulated library), structs are read before the call returns. Matrices are row-major, sizes are in
elements. One build serves every torch and every Python: no C++ crosses this border. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { NIBBLE_FP32 = 0, NIBBLE_FP16 = 1, NIBBLE_BF16 = 2 }; /* dtypes */
enum { NIBBLE_MAX_PARTS = 4, NIBBLE_MAX_TOKENS = 64 };

enum {
    NIBBLE_BAD_COUNT = -1,     /* parts: 1..NIBBLE_MAX_PARTS */
    NIBBLE_BAD_DTYPE = -2,     /* not one of the three; a linear takes fp16 and bf16 */
    NIBBLE_BAD_SHAPE = -3,     /* negative rows, columns or first_block, or more than one launch can cover */
    NIBBLE_BAD_TOKENS = -4,    /* 1..NIBBLE_MAX_TOKENS */
    NIBBLE_BAD_SPLITS = -5,    /* below 1, or more than one launch can cover */
    NIBBLE_BAD_WORKSPACE = -6, /* splits > 1 and the workspace is missing or too small */
    NIBBLE_BAD_POINTER = -7,   /* not aligned to its own element */
    NIBBLE_EMULATOR = -8       /* the emulated library only: nibble_emulator_failure says what a kernel did wrong */
};

/* An NF4 matrix [rows, columns], or one part of a fused matrix whose parts lie under each other. The flattened matrix
   is cut into blocks of 64 (they cross rows); absmax(b) = map8[absmax_codes[b]] * absmax2[(b + first_block) >> 8] +
   offset in fp32, both operations rounded; weight = level[code] * absmax. kernels/nf4.py has the whole format. */
struct nibble_nf4 {
    const uint8_t* codes;        /* [ceil(rows * columns / 2)], the first weight in the high nibble */
    const uint8_t* absmax_codes; /* [ceil(rows * columns / 64)] */
    const float* absmax2;        /* one for each group of 256 blocks */
    const float* offset;         /* [1] */
    int64_t rows;
    int64_t first_block; /* 0..255: blocks of the first absmax2 group that lie before this part */
};

/* A row-wise int8 matrix [rows, columns] (bitsandbytes' CB and SCB): weight = codes * scale / 127. */
struct nibble_int8 {
    const int8_t* codes;
    const float* scale; /* [rows] */
    int64_t rows;
};

/* Where one part's product goes. */
struct nibble_output {
    const void* bias; /* [rows] in x's dtype, or NULL */
    void* y;          /* [tokens, rows] in x's dtype, unit last stride */
    int64_t stride;   /* of y's rows */
};

/* out [sum of rows, columns], contiguous, in any of the three dtypes: all parts in one launch, rounded once from fp32.
   The same bits as kernels/dequantize_nf4.py and kernels/int8.py, for every shape. */
int nibble_dequantize_nf4(const struct nibble_nf4* parts, int count, int64_t columns, void* out, int dtype,
                          void* stream);
int nibble_dequantize_int8(const struct nibble_int8* parts, int count, int64_t columns, void* out, int dtype,
                           void* stream);

/* outputs[i].y = x W_i^T + bias_i for x [tokens, columns], tokens 1..64, fp16 or bf16, unit last stride. `splits`
   blocks share the columns of a product; with splits > 1 their sums lie in the fp32 workspace [splits, tokens, sum of
   rows] and are added in order, so the same call gives the same bits. With columns no multiple of 64, or x, its row
   stride or codes not aligned to 16 (NF4 codes: 8) bytes, a plain kernel does the work and leaves splits aside.

   Which `splits`: a block takes 16 rows of a part (up to 4 tokens), 32 (up to 16) or 128 (more), and over 32 tokens two
   blocks take the same rows: blocks = sum of ceil(rows_i / tile), twice that over 32 tokens. Splitting costs a second
   kernel, so it pays where processors would stand idle for longer than that takes. To be minimised over 1..8:
       max(1, ceil(blocks * splits / processors)) / splits * T
           + (splits > 1) * (2 us + splits * tokens * rows * 2e-6 us)
   with T = 0.3, 0.6 or 4.0 us for each 1024 columns up to 4, 16, 64 tokens. These figures are predictions. */
int nibble_linear_nf4(const struct nibble_nf4* parts, const struct nibble_output* outputs, int count, int64_t columns,
                      const void* x, int64_t x_stride, int64_t tokens, int dtype, int splits, float* workspace,
                      int64_t workspace_bytes, void* stream);
int nibble_linear_int8(const struct nibble_int8* parts, const struct nibble_output* outputs, int count, int64_t columns,
                       const void* x, int64_t x_stride, int64_t tokens, int dtype, int splits, float* workspace,
                       int64_t workspace_bytes, void* stream);

const char* nibble_error(int status); /* a status in words; valid until the next call */
const char* nibble_sources(void);     /* sha256 (hex) of the sources this library was built from */

#ifdef __cplusplus
}
#endif
