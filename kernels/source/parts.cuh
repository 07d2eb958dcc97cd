// Decodes the mask or the importance of segments instead of their weights: 32 segments per warp, one per lane.
//
// Only the streams that the result needs are decoded. See decode.cuh for tiles and bounds.
#pragma once
#include "decode.cuh"

// Fills a lane's row with the mask of `count` positions, one byte each: 1 for a survivor, 0 for a pruned position.
__device__ inline void fill_mask(Mask<Levels> &mask, u32 done, u32 count, u32 *row) {
    u64 bits = next_bits(mask, done, count);
    for (u32 word = 0; word < tile_words(1); word++) {
        // Four bits to four bytes: no two of the shifted copies overlap in the bits that are kept.
        row[word] = ((u32)(bits >> 4 * word) & 15) * 0x00204081 & 0x01010101;
    }
}

// Decodes the masks of the warp's segments; the tensor has a mask. Returns each lane's error word. tile: 32 rows.
__device__ inline u32 decode_masks(const Warp &warp, u32 *index, u32 *tile, u32 lane) {
    const Recipe &recipe = *warp.recipe;
    u32 s = warp.first + lane, rows = positions_of(recipe, *warp.job, warp.first), positions = 0, survivors = 0;
    bool there = s < warp.job->stop;
    Mask<Levels> mask = {};
    if (there) {
        positions = positions_of(recipe, *warp.job, s);
        survivors = survivors_row(index, *warp.job)[s];
        mask = open_mask((const u8 *)warp.recipe, warp, index, s, positions, survivors);
    }
    for (u32 done = 0; done < rows; done += tile_positions(1)) {
        if (positions > done) fill_mask(mask, done, least(tile_positions(1), positions - done), tile + lane * row_words(1));
        __syncwarp();
        write_tile<1>(warp, tile, done, lane);
        __syncwarp();
    }
    if (!there) return 0;
    return wrong_end_of(mask.levels, warp, index, MASK, s) | wrong_mask(mask, survivors);
}

// Decodes the importances of the warp's segments, as binary32; 0 at pruned positions without one. The recipe's
// multiplier says which positions have one. Returns each lane's error word. tile: 32 rows.
__device__ inline u32 decode_importances(const Warp &warp, u32 *index, u32 *tile, u32 lane) {
    const u8 *bytes = (const u8 *)warp.recipe;
    const Recipe &recipe = *warp.recipe;
    bool by_factors = recipe.multiplier == OF_FACTORS;
    bool by_mask = recipe.multiplier == OF_SURVIVORS && recipe.mask != NO_MASK;
    u32 s = warp.first + lane, rows = positions_of(recipe, *warp.job, warp.first), positions = 0, survivors = 0;
    u32 *row = tile + lane * row_words(4);
    bool there = s < warp.job->stop;
    Levels levels = {};
    Mask<Levels> mask = {};
    Place factors = {};
    if (there) {
        positions = positions_of(recipe, *warp.job, s);
        survivors = survivors_row(index, *warp.job)[s];
        if (by_mask) mask = open_mask(bytes, warp, index, s, positions, survivors);
        if (by_factors) factors = place_at(warp.job->start + (u64)s * recipe.segment, recipe.columns);
        else levels = open_stream(bytes, warp, index, IMPORTANCE, s);
    }
    for (u32 done = 0; done < rows; done += tile_positions(4)) {
        if (positions > done) {
            u32 count = least(tile_positions(4), positions - done);
            u64 bits = by_mask ? next_bits(mask, done, count) : ~(u64)0;
            for (u32 position = 0; position < count; position++) {
                float importance = 0;
                if (by_factors) {
                    importance = factor_of(bytes, recipe, factors);
                    advance(factors, 1);
                } else if (bits >> position & 1) {
                    importance = importance_of_level(bytes, recipe, next_level(levels));
                }
                row[position] = __float_as_uint(importance);
            }
        }
        __syncwarp();
        write_tile<4>(warp, tile, done, lane);
        __syncwarp();
    }
    u32 wrong = 0;
    if (there && !by_factors) wrong |= wrong_end_of(levels, warp, index, IMPORTANCE, s);
    if (there && by_mask) wrong |= wrong_end_of(mask.levels, warp, index, MASK, s) | wrong_mask(mask, survivors);
    return wrong;
}
