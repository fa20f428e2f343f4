// What the product kernels of both weight formats share: their one argument, and the sum of the splits.
#pragma once

#include <math.h>

#include "device.cuh"

namespace nibble {

constexpr int THREADS = 256;  // of every block of a linear
constexpr int WARPS = THREADS / WARP;

// y_i = x w_i^T + bias_i for up to NIBBLE_MAX_PARTS weights that lie under each other.
template <class Part>
struct Problem {
    Part parts[NIBBLE_MAX_PARTS];
    nibble_output outputs[NIBBLE_MAX_PARTS];
    int64_t first_row[NIBBLE_MAX_PARTS + 1];  // rows of the parts before; the last of `count` + 1 is all rows
    int first_tile[NIBBLE_MAX_PARTS];         // row tiles of the parts before, out of reach where there is no part
    int split_units;                          // units of columns (few_rows.cuh) of a split
    int count;
    int tokens;
    int groups;  // of tokens: so many blocks have the same tile
    int64_t columns;
    const uint16_t* x;  // [tokens, columns], row stride x_stride
    int64_t x_stride;
    float* workspace;  // [splits, tokens, all rows], or null: the only split
};

// One value of the result: bias added in fp32, rounded once.
template <class T>
__device__ __forceinline__ void finish(const nibble_output& output, int token, int64_t row, float sum) {
    if (output.bias) sum += widen<T>(load(static_cast<const uint16_t*>(output.bias) + row));
    uint16_t* y = static_cast<uint16_t*>(output.y) + token * output.stride + row;
    store(y, static_cast<uint16_t>(pack<T>(sum, 0.0f)));
}

// The splits' sums in order, so that the same call gives the same bits. A thread a value; grid (rows, tokens).
template <class T, class Part>
__global__ void __launch_bounds__(THREADS) add_splits(const __grid_constant__ Problem<Part> problem, int splits) {
    const int64_t rows = problem.first_row[problem.count];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const int token = blockIdx.y;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split)
        sum += load(problem.workspace + (static_cast<int64_t>(split) * problem.tokens + token) * rows + row);
    int part = 0;
    while (row >= problem.first_row[part + 1]) ++part;
    finish<T>(problem.outputs[part], token, row - problem.first_row[part], sum);
}

}  // namespace nibble
