// y [M, N] = x [M, K] w [N, K]^T for any K and any alignment: the plain kernel beside few_rows.cuh.
//
// A warp has one row and up to 8 tokens. It walks over the row's blocks of 64 weights as they lie in the flattened
// weight (with K no multiple of 64 the first and the last reach into other rows); a lane takes two weights of each.
// Weights are fp32, as are all sums. The codes are read once for every 8 tokens, x once for every row, from L1 and
// L2: fast enough for a vision tower's odd widths (2730, 4304), which meet few rows only in tests and small batches.
//
// What a format must say beyond few_rows.cuh's list:
//     PlainTables, fill_plain    shared memory for pair
//     pair(...)                  weights 2 * lane and 2 * lane + 1 of a block, to be multiplied by row_scale
#pragma once

#include "linear.cuh"

namespace nibble {

constexpr int PLAIN_TOKENS = 8;

template <class T, class Codes>
__global__ void __launch_bounds__(THREADS)
    any_columns(const __grid_constant__ Problem<typename Codes::Part> problem) {
    __shared__ typename Codes::PlainTables tables;
    Codes::fill_plain(tables, threadIdx.x);
    sync_threads();

    const int lane = threadIdx.x % WARP;
    int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= problem.first_row[problem.count]) return;
    int index = 0;
    while (row >= problem.first_row[index + 1]) ++index;
    row -= problem.first_row[index];
    const typename Codes::Part& part = problem.parts[index];

    const int first_token = blockIdx.y * PLAIN_TOKENS;
    const int tokens = problem.tokens - first_token < PLAIN_TOKENS ? problem.tokens - first_token : PLAIN_TOKENS;
    const uint16_t* x = problem.x + first_token * problem.x_stride;
    const int64_t start = row * problem.columns, stop = start + problem.columns;  // in the flattened weight
    float sums[PLAIN_TOKENS] = {};
#pragma unroll 2
    for (int64_t block = start / 64; block * 64 < stop; ++block) {
        const int64_t i = block * 64 + 2 * lane;
        float weights[2] = {};
        if (i + 1 >= start && i < stop) Codes::pair(tables, part, block, i, stop, weights);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t column = i + h - start;
            if (column < 0 || column >= problem.columns) continue;
#pragma unroll
            for (int m = 0; m < PLAIN_TOKENS; ++m)
                if (m < tokens)
                    sums[m] = fmaf(widen<T>(load(x + m * problem.x_stride + column)), weights[h], sums[m]);
        }
    }
    const float scale = Codes::row_scale(part, row);
#pragma unroll
    for (int m = 0; m < PLAIN_TOKENS; ++m) {
#pragma unroll
        for (int distance = WARP / 2; distance > 0; distance /= 2) sums[m] += shuffle(sums[m], lane ^ distance);
        if (lane == m && m < tokens) finish<T>(problem.outputs[index], first_token + m, row, sums[m] * scale);
    }
}

}  // namespace nibble
