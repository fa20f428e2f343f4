// y [M, N] = x [M, K] w [N, K]^T for at most 64 tokens and K a multiple of 64: limited by the bytes of w's codes.
//
// The weights are the A operand of mma.m16n8k16 (16 weight rows, 8 tokens): one token costs the same loads as eight.
// A warp owns 16 MT rows and 8 NT tokens. Of each row it reads 64 columns at a time, one block of codes:
//
//     lane 4g + t holds 16 weights of rows g and g + 8, columns 16t..16t+15 of the block, one load each (NF4: 8 bytes,
//     four lanes read one 32-byte sector; int8: 16 bytes), and x[token g, the same columns]
//     mma step s = 0..3 multiplies columns 16t + 4s .. 16t + 4s + 3 of all t: k may have any order that x has too
//
// A block of threads has 8 warps: WR of them under each other, which read the same x while it is in L1, and WK
// beside each other, which take turns at `units` of 256 columns (128 bytes of NF4 codes a row: whole lines). The WK
// sums are added in shared memory in a fixed order. `splits` (grid.y) cuts the columns further; then the sums go to
// the workspace. Nothing depends on the order in which blocks run: the same call gives the same bits.
//
// In flight: a warp loads AHEAD bytes of each row early, 2 KiB in all (4 KiB for 5 to 8 and over 16 tokens). With
// the blocks that fit its registers and shared memory a multiprocessor has 32 to 64 KiB in flight: up to 4 tokens 48
// KiB on an A100 or H200, 32 on an RTX 3090. Bandwidth times latency is about 13, 25 and 7 KiB there.
//
// Bytes: codes and their scales once from memory, x from L2 once for every 16 MT WR rows of w (or from L1, where it
// fits). More than 32 tokens are two groups in neighbouring blocks, one of which finds the codes in L2. Rows and
// tokens beyond the last are read as the last one again, which touches no other line, and not stored.
//
// Given up: x goes from L1 into every warp's registers, not through shared memory, which the tables have. Over 16
// tokens that limits a multiprocessor to about 700 products a clock (mma.sync with fp32 sums: 256 on a 3090, 1024 on an
// A100). No atomics: splits cost a second kernel.
//
// What a format must say (Codes<T>, see linear_nf4.cu, linear_int8.cu):
//     Part, Word                 the C struct; what a lane holds of a row's block
//     Tables, fill               shared memory for unpack and scale, filled by all threads
//     unpack(tables, word, lane, pairs)      its 16 weights in T, two a word
//     SCALED                     blocks have a scale of their own, which multiplies their fp32 sum:
//     Scales(part, block)        those from a block on; load(i) -> Scale as stored, scale(tables, Scale) -> float
//     row_scale(part, row)       of a whole row's sum
#pragma once

#include "linear.cuh"

namespace nibble {

constexpr int BLOCK_COLUMNS = 64;
constexpr int UNIT = 4;  // blocks: a lane of each four looks up the scale of one of them
constexpr int UNIT_COLUMNS = UNIT * BLOCK_COLUMNS;
constexpr int MOST_TOKEN_TILES = 4;  // of a warp; more tokens are several `groups`

// Token tiles (of 8) and row tiles (of 16) of a warp, warps along the rows, bytes of each row that are loaded ahead,
// blocks that a multiprocessor is to hold.
template <int NT_, int MT_, int WR_, int AHEAD_, int RESIDENT_>
struct Tile {
    static constexpr int NT = NT_, MT = MT_, WR = WR_, AHEAD = AHEAD_, RESIDENT = RESIDENT_;
    static constexpr int WK = WARPS / WR, ROWS = 16 * MT * WR;
};

template <class T, class Codes, class Shape>
__global__ void __launch_bounds__(THREADS, Shape::RESIDENT)
    few_rows(const __grid_constant__ Problem<typename Codes::Part> problem) {
    constexpr int NT = Shape::NT, MT = Shape::MT, WR = Shape::WR, WK = Shape::WK, ROWS = Shape::ROWS;
    constexpr int PITCH = ROWS + 4;  // no bank conflicts where a warp writes its sums
    using Word = typename Codes::Word;
    constexpr int WORDS = BLOCK_COLUMNS / 16;  // of a row's block
    constexpr int DEPTH = Shape::AHEAD / (WORDS * sizeof(Word)) < 2 ? 2 : Shape::AHEAD / (WORDS * sizeof(Word));
    constexpr int X_VECTORS = BLOCK_COLUMNS / 8;  // the same of x
    constexpr int TURN = WK * UNIT;               // blocks from a warp's unit to its next

    union Shared {
        typename Codes::Tables tables;
        float sums[WK][8 * NT][PITCH];
    };
    __shared__ Shared shared;

    const int thread = threadIdx.x, lane = thread % WARP;
    const int warp = shuffle(thread / WARP, 0);  // so that the compiler knows it is the warp's
    const int g = lane / 4, t = lane % 4;
    const int warp_row = warp % WR, warp_k = warp / WR;

    // Blocks that read the same codes for other tokens are neighbours: one of them takes the codes from L2.
    const int tile = NT < MOST_TOKEN_TILES ? blockIdx.x : blockIdx.x / problem.groups;
    const int token_0 = NT < MOST_TOKEN_TILES ? 0 : (blockIdx.x % problem.groups) * 8 * NT;
    const int tokens_left = problem.tokens - token_0;
    const int index =
        (tile >= problem.first_tile[1]) + (tile >= problem.first_tile[2]) + (tile >= problem.first_tile[3]);
    const typename Codes::Part& part = problem.parts[index];
    const int64_t tile_row = static_cast<int64_t>(tile - problem.first_tile[index]) * ROWS;

    const int blocks = static_cast<int>(problem.columns / BLOCK_COLUMNS);  // of a row
    const int units = (blocks + UNIT - 1) / UNIT, first_unit = blockIdx.y * problem.split_units;
    const int stop = first_unit + problem.split_units < units ? first_unit + problem.split_units : units;
    int unit = first_unit + warp_k;

    // First block of each of the lane's rows, from the tile's first row on (launch_linear sees that it fits 32 bits).
    const int rows_left = part.rows - tile_row < ROWS ? static_cast<int>(part.rows - tile_row) : ROWS;
    uint32_t row_block[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = (warp_row * MT + m) * 16 + h * 8 + g;
            row_block[m][h] = (row < rows_left ? row : rows_left - 1) * blocks;
        }
    const Word* codes_at[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            codes_at[m][h] = reinterpret_cast<const Word*>(part.codes) + tile_row * blocks * WORDS +
                             (row_block[m][h] + unit * UNIT) * WORDS + t;

    // All loads of the first blocks are under way, codes first, before the tables are filled (sync_warp sees to it). A
    // whole unit, the usual case, has no branches between them.
    Word codes[DEPTH][MT][2] = {};
    const bool any = unit < stop, whole = any && (unit + 1) * UNIT <= blocks;
#pragma unroll
    for (int j = 0; j < DEPTH; ++j)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (whole) codes[j][m][h] = load_once(codes_at[m][h] + j * WORDS);
    if (any && !whole) {
#pragma unroll
        for (int j = 0; j < DEPTH; ++j)
            if (unit * UNIT + j < blocks) {
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) codes[j][m][h] = load_once(codes_at[m][h] + j * WORDS);
            }
    }

    const int first_token = g < tokens_left ? g : tokens_left - 1;
    const uint4* x_at = reinterpret_cast<const uint4*>(problem.x + (token_0 + first_token) * problem.x_stride) +
                        unit * UNIT * X_VECTORS + 2 * t;
    uint32_t token_step[NT] = {};  // from there to the other token tiles
#pragma unroll
    for (int n = 1; n < NT; ++n) {
        const int token = n * 8 + g < tokens_left ? n * 8 + g : tokens_left - 1;
        token_step[n] = (token - first_token) * static_cast<uint32_t>(problem.x_stride / 8);
    }
    const typename Codes::Scales scales_at(part, tile_row * blocks);
    typename Codes::Scale stored[MT][2] = {};
    uint4 x_ahead[2][2] = {};  // of this block and the next
    if (any) {
        const int block = unit * UNIT + t < blocks ? unit * UNIT + t : blocks - 1;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) stored[m][h] = scales_at.load(row_block[m][h] + block);
        if constexpr (NT == 1) {
            x_ahead[0][0] = load(x_at);
            x_ahead[0][1] = load(x_at + 1);
        }
    }
    sync_warp();
    Codes::fill(shared.tables, thread);
    sync_threads();

    float sums[MT][NT][4] = {};
    for (; unit < stop; unit += WK) {
        const bool more = unit + WK < stop;
        float scales[MT][2];
        if constexpr (Codes::SCALED) {
            const int block = unit * UNIT + TURN + t;
            const int next = block < blocks ? block : blocks - 1;
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    scales[m][h] = scales_at.scale(shared.tables, stored[m][h]);
                    if (more) stored[m][h] = scales_at.load(row_block[m][h] + next);
                }
        }
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
            if (j > 0 && unit * UNIT + j >= blocks) break;

            // Few tokens: x waits for the weights of one row tile after the other. Many: the other way round.
            constexpr int TOGETHER = NT <= 2 ? 1 : MT;  // row tiles whose weights are in registers at a time
            uint4 x[NT <= 2 ? NT : 1][2];
            if constexpr (NT == 1) {
                const int next = j + 1 < UNIT ? j + 1 : TURN;
                const bool any_x = (j + 1 < UNIT || more) && unit * UNIT + next < blocks;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    x[0][i] = x_ahead[j % 2][i];
                    if (any_x) x_ahead[(j + 1) % 2][i] = load(x_at + next * X_VECTORS + i);
                }
            } else if constexpr (NT == 2) {
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) x[n][i] = load(x_at + token_step[n] + j * X_VECTORS + i);
            }
            // The block whose codes are loaded now, in this unit or the warp's next.
            const int later = j + DEPTH < UNIT ? j + DEPTH : TURN + j + DEPTH - UNIT;
            const bool any_codes = (j + DEPTH < UNIT || more) && unit * UNIT + later < blocks;

#pragma unroll
            for (int first = 0; first < MT; first += TOGETHER) {
                uint32_t pairs[TOGETHER][2][8];
                float row_scales[TOGETHER][2];
#pragma unroll
                for (int m = 0; m < TOGETHER; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        Word& word = codes[j % DEPTH][first + m][h];
                        Codes::unpack(shared.tables, word, lane, pairs[m][h]);
                        if (any_codes) word = load_once(codes_at[first + m][h] + later * WORDS);
                        if constexpr (Codes::SCALED) row_scales[m][h] = shuffle(scales[first + m][h], (lane & ~3) + j);
                    }
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4 low = NT <= 2 ? x[n][0] : load(x_at + token_step[n] + j * X_VECTORS);
                    const uint4 high = NT <= 2 ? x[n][1] : load(x_at + token_step[n] + j * X_VECTORS + 1);
                    const uint32_t tokens[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
                    for (int m = 0; m < TOGETHER; ++m) {
                        float block_sum[4] = {};
                        float(&sum)[4] = Codes::SCALED ? block_sum : sums[first + m][n];
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            const uint32_t weights[4] = {pairs[m][0][2 * s], pairs[m][1][2 * s],
                                                         pairs[m][0][2 * s + 1], pairs[m][1][2 * s + 1]};
                            mma_16x8x16<T>(sum, weights, tokens[s]);
                        }
                        if constexpr (Codes::SCALED) {
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                sums[first + m][n][i] =
                                    fmaf(row_scales[m][i / 2], block_sum[i], sums[first + m][n][i]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) codes_at[m][h] += TURN * WORDS;
        x_at += TURN * X_VECTORS;
    }

    sync_threads();  // nobody reads the tables any more
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                shared.sums[warp_k][n * 8 + 2 * t + i % 2][(warp_row * MT + m) * 16 + i / 2 * 8 + g] = sums[m][n][i];
    sync_threads();
    for (int i = thread; i < ROWS * 8 * NT; i += THREADS) {
        const int64_t row = tile_row + i % ROWS;
        const int token = token_0 + i / ROWS;
        if (token >= problem.tokens || row >= part.rows) continue;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < WK; ++k) sum += shared.sums[k][i / ROWS][i % ROWS];
        sum *= Codes::row_scale(part, row);
        if (problem.workspace) {
            const int64_t all = problem.first_row[problem.count];
            const int64_t line = static_cast<int64_t>(blockIdx.y) * problem.tokens + token;
            store(problem.workspace + line * all + problem.first_row[index] + row, sum);
        } else {
            finish<T>(problem.outputs[index], token, row, sum);
        }
    }
}

}  // namespace nibble
