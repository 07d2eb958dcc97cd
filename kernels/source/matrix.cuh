// The record of a compressed matrix for the kernels of product.cuh, and its preparation, which computes once where the
// levels of each row begin. The mask of such a matrix is a plain bitmap, and a level has four bits.
#pragma once
#include "index.cuh"

enum : u32 {
    UNIT = 1024,  // columns per element of `Matrix::places`
    LEVEL_BITS = 4,
    MAGNITUDES = 8
};

// A prepared matrix. All addresses are on the device.
struct Matrix {
    u64 data;    // address of the first chunk, a multiple of 16
    u64 bytes;   // size of all chunks, a multiple of 16
    u64 masks;   // address of u32 [chunks]: where the mask of each chunk begins, in bytes from `data`
    u64 places;  // address of u32 [rows, units]: where the levels of each unit begin, in levels from `data`
    u64 scale;   // address of float [factors], or 0
    u32 rows, columns;
    u32 chunk_rows;  // rows per chunk
    u32 masked;
    u32 scale_runs;  // runs of 128 positions per factor
    float magnitudes[MAGNITUDES];  // of the levels; the kernels multiply them by the scale
    u32 patterns[3][4];  // without a scale: the bytes of each part of the magnitudes, as in `Patterns`
};

// Fills the masks and places of a chunk, with one block. Returns each lane's error word: whether the number of survivors
// in the mask differs from the index (R-MSK-005). This is the only check that such a tensor still needs.
__device__ inline u32 place_rows(const Job &job, const Matrix &matrix, u32 *index, u32 warp, u32 lane) {
    const Recipe &recipe = *(const Recipe *)job.recipe;
    u64 before = job.data - matrix.data, mask = 0;
    u32 first = (u32)(job.start / matrix.columns), rows = job.total / matrix.columns;
    u32 words = matrix.columns / 32, units = (matrix.columns + UNIT - 1) / UNIT, wrong = 0;
    if (matrix.masked) mask = stream_row(index, recipe, job, MASK, RESIDUAL_ROW)[0] / 8;
    if (warp == 0 && lane == 0) ((u32 *)matrix.masks)[first / matrix.chunk_rows] = (u32)(before + mask);
    const u32 *levels = stream_row(index, recipe, job, FINGERPRINTS, RESIDUAL_ROW);
    for (u32 row = warp; row < rows; row += WARPS) {
        const u32 *of_row = levels + row * (matrix.columns / recipe.segment);
        u32 level = (u32)(before * 2) + of_row[0] / LEVEL_BITS;
        for (u32 round = 0; round < words; round += WARP) {
            u32 word = round + lane, bits = 0;
            if (word < words) bits = matrix.masked ? word_at(chunk_of(job), mask + 4 * (row * words + word)) : 0xFFFFFFFF;
            u32 end = level + sum_up_to((u32)__popc(bits), lane), column = 32 * (word + 1);
            if (word < words && column % recipe.segment == 0) {
                u32 said = (u32)(before * 2) + of_row[column / recipe.segment] / LEVEL_BITS;
                if (said != end) wrong = WRONG_MASK;
            }
            if (lane == 0) ((u32 *)matrix.places)[(u64)(first + row) * units + round / WARP] = level;
            level = (u32)__shfl_sync(ALL_LANES, end, WARP - 1);
        }
    }
    return wrong;
}
