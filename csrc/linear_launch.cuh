// How a linear's arguments become launches, for both weight formats.
//
// K a multiple of 64 and x and codes aligned for vector loads: few_rows.cuh, in tiles by the number of tokens. Anything
// else, odd K too: any_columns.cuh, which knows no splits.
#pragma once

#include "any_columns.cuh"
#include "few_rows.cuh"

namespace nibble {

constexpr int64_t MOST_BLOCKS = 0x7fffffff;  // of a grid's x
constexpr int MOST_SPLITS = 65535;           // of its y
constexpr int64_t MOST_COLUMNS = 1 << 23;    // offsets within a tile of 128 rows are 32 bits
constexpr int64_t MOST_STRIDE = 1 << 28;     // and so are those of 64 tokens

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T, class Codes, class Shape>
int launch_tiles(Problem<typename Codes::Part>& problem, int splits, void* stream) {
    problem.groups = (problem.tokens + 8 * Shape::NT - 1) / (8 * Shape::NT);
    const int64_t units = (problem.columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    problem.split_units = static_cast<int>((units + splits - 1) / splits);
    int64_t tiles = 0;
    for (int i = 0; i < NIBBLE_MAX_PARTS; ++i) {
        problem.first_tile[i] = i < problem.count ? static_cast<int>(tiles) : static_cast<int>(MOST_BLOCKS);
        tiles += (problem.parts[i].rows + Shape::ROWS - 1) / Shape::ROWS;
        if (tiles * problem.groups >= MOST_BLOCKS) return NIBBLE_BAD_SHAPE;
    }
    const dim3 grid(tiles * problem.groups, splits);
    return LAUNCH(few_rows<T, Codes, Shape>, grid, dim3(THREADS), stream, problem);
}

template <class T, class Codes>
int launch_linear(Problem<typename Codes::Part>& problem, int splits, void* stream) {
    const int64_t rows = problem.first_row[problem.count];
    bool vectors = problem.columns % BLOCK_COLUMNS == 0 && problem.columns <= MOST_COLUMNS &&
                   aligned(problem.x, 16) && problem.x_stride % 8 == 0 && problem.x_stride >= 0 &&
                   problem.x_stride <= MOST_STRIDE;
    for (int i = 0; i < problem.count; ++i)
        vectors = vectors && aligned(problem.parts[i].codes, sizeof(typename Codes::Word));
    if (!vectors) {
        const int64_t blocks = (rows + WARPS - 1) / WARPS;
        if (blocks > MOST_BLOCKS) return NIBBLE_BAD_SHAPE;
        problem.workspace = nullptr;
        const dim3 grid(blocks, (problem.tokens + PLAIN_TOKENS - 1) / PLAIN_TOKENS);
        return LAUNCH(any_columns<T, Codes>, grid, dim3(THREADS), stream, problem);
    }
    if (splits == 1) problem.workspace = nullptr;
    const int status = problem.tokens <= 4    ? launch_tiles<T, Codes, Tile<1, 1, 1, 128, 3>>(problem, splits, stream)
                       : problem.tokens <= 8  ? launch_tiles<T, Codes, Tile<1, 2, 1, 128, 2>>(problem, splits, stream)
                       : problem.tokens <= 16 ? launch_tiles<T, Codes, Tile<2, 2, 1, 64, 2>>(problem, splits, stream)
                                              : launch_tiles<T, Codes, Tile<4, 2, 4, 128, 1>>(problem, splits, stream);
    if (status || splits == 1) return status;
    const dim3 grid((rows + THREADS - 1) / THREADS, problem.tokens);
    return LAUNCH(add_splits<T, typename Codes::Part>, grid, dim3(THREADS), stream, problem, splits);
}

template <template <class> class Codes, class Part>
int linear(const Part* parts, const nibble_output* outputs, int count, int64_t columns, const void* x,
           int64_t x_stride, int64_t tokens, int dtype, int splits, float* workspace, int64_t workspace_bytes,
           void* stream) {
    if (count < 1 || count > NIBBLE_MAX_PARTS) return NIBBLE_BAD_COUNT;
    if (dtype != NIBBLE_FP16 && dtype != NIBBLE_BF16) return NIBBLE_BAD_DTYPE;
    if (tokens < 1 || tokens > NIBBLE_MAX_TOKENS) return NIBBLE_BAD_TOKENS;
    if (splits < 1 || splits > MOST_SPLITS) return NIBBLE_BAD_SPLITS;
    if (columns < 1) return NIBBLE_BAD_SHAPE;
    if (!aligned(x, 2)) return NIBBLE_BAD_POINTER;
    Problem<Part> problem = {};
    for (int i = 0; i < count; ++i) {
        if (const int status = Codes<fp16>::check(parts[i])) return status;
        if (!aligned(outputs[i].y, 2) || !aligned(outputs[i].bias, 2)) return NIBBLE_BAD_POINTER;
        problem.parts[i] = parts[i];
        problem.outputs[i] = outputs[i];
        problem.first_row[i + 1] = problem.first_row[i] + parts[i].rows;
    }
    const int64_t rows = problem.first_row[count];
    if (rows == 0) return 0;
    if (splits > 1 && (!workspace || !aligned(workspace, 4) ||
                       workspace_bytes / static_cast<int64_t>(sizeof(float)) / splits / tokens < rows))
        return NIBBLE_BAD_WORKSPACE;
    problem.count = count;
    problem.tokens = static_cast<int>(tokens);
    problem.columns = columns;
    problem.x = static_cast<const uint16_t*>(x);
    problem.x_stride = x_stride;
    problem.workspace = workspace;
    return dtype == NIBBLE_FP16 ? launch_linear<fp16, Codes<fp16>>(problem, splits, stream)
                                : launch_linear<bf16, Codes<bf16>>(problem, splits, stream);
}

}  // namespace nibble
