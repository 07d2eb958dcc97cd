// Decodes the weights of segments: 32 segments per warp, one segment per lane.
//
// Theory of operation: each lane reads the planes of its own segment, independently of the other lanes. Weights are
// written in tiles: every lane writes its next positions to its row of a tile in shared memory; then the warp writes
// the rows to global memory, one row after the other, neighbouring lanes to neighbouring words. A row has an odd number
// of words, so that neither step has bank conflicts.
//
// Bounds: a lane reads through a `Reader`, which stops at the chunk's end. It writes as many positions as its segment
// has, for any contents of the planes. Every table has an entry for every possible index.
#pragma once
#include "index.cuh"
#include "mask.cuh"
#include "values.cuh"

// For weights of `item` bytes: positions per row of a tile, at most 64; words of these positions; words per row.
__device__ constexpr u32 tile_positions(u32 item) { return item <= 2 ? 64 : 32; }
__device__ constexpr u32 tile_words(u32 item) { return tile_positions(item) * item / 4; }
__device__ constexpr u32 row_words(u32 item) { return tile_words(item) + 1; }

template <u32 ITEM> struct Pattern;
template <> struct Pattern<1> { typedef u8 type; };
template <> struct Pattern<2> { typedef u16 type; };
template <> struct Pattern<4> { typedef u32 type; };

// Stores a weight at a position of a lane's row. A weight of 8 bytes is stored as two words, the lower half first.
template <u32 ITEM> __device__ inline void put(u32 *row, u32 position, u64 pattern) {
    if constexpr (ITEM == 8) {
        row[2 * position] = (u32)pattern;
        row[2 * position + 1] = (u32)(pattern >> 32);
    } else {
        ((typename Pattern<ITEM>::type *)row)[position] = (typename Pattern<ITEM>::type)pattern;
    }
}

// The work of a warp: the segments `first` to `first` + 31 of a job, or to the end of its run. `out`: the address for
// the weights of the run.
struct Warp {
    const Recipe *recipe;
    const Job *job;
    u32 first;
    u64 out;
};

// Returns the address for a row of a tile: the positions from `done` on of the warp's segment number `row`.
template <u32 ITEM> __device__ inline u8 *place_of_row(const Warp &warp, u32 done, u32 row) {
    u64 segment = warp.first - warp.job->first + row;
    return (u8 *)warp.out + (segment * warp.recipe->segment + done) * ITEM;
}

// Writes a tile of 32 full rows. `columns` lanes write neighbouring words of a row. POSITIONS: positions per row; a row
// has one more word of padding.
template <u32 ITEM, u32 POSITIONS>
__device__ inline void write_full_tile(const Warp &warp, const u32 *tile, u32 done, u32 lane) {
    const u32 words = POSITIONS * ITEM / 4, columns = words < WARP ? words : WARP, rows_at_once = WARP / columns;
    u32 row = lane / columns, column = lane % columns, step = rows_at_once * warp.recipe->segment * ITEM / 4;
    u32 *to = (u32 *)place_of_row<ITEM>(warp, done, row) + column;
    const u32 *from = tile + row * (words + 1) + column;
#pragma unroll 8
    for (u32 i = 0; i < columns; i++) {
#pragma unroll
        for (u32 word = 0; word < words; word += columns) to[word] = from[word];
        to += step;
        from += rows_at_once * (words + 1);
    }
}

// Writes a tile in which some rows are missing or short. All lanes must call it.
template <u32 ITEM, u32 POSITIONS>
__device__ inline void write_part(const Warp &warp, const u32 *tile, u32 done, u32 rows, u32 lane) {
    const u32 stride = POSITIONS * ITEM / 4 + 1;
    for (u32 row = 0; row < rows; row++) {
        u32 positions = positions_of(*warp.recipe, *warp.job, warp.first + row);
        if (positions <= done) continue;
        u32 bytes = least(positions - done, POSITIONS) * ITEM;
        u8 *to = place_of_row<ITEM>(warp, done, row);
        for (u32 word = lane; 4 * word < bytes; word += WARP) {
            u32 value = tile[row * stride + word];
            if (4 * word + 4 <= bytes) {
                *(u32 *)(to + 4 * word) = value;
            } else {  // the last bytes of a tensor
#pragma unroll 1
                for (u32 at = 4 * word; at < bytes; at++) to[at] = (u8)(value >> 8 * (at & 3));
            }
        }
    }
}

// Writes a tile, which has the positions from `done` on of the warp's segments. All lanes must call it.
template <u32 ITEM> __device__ inline void write_tile(const Warp &warp, const u32 *tile, u32 done, u32 lane) {
    u32 rows = least(WARP, warp.job->stop - warp.first);
    u32 last = positions_of(*warp.recipe, *warp.job, warp.first + rows - 1);
    if (rows == WARP && last >= done + tile_positions(ITEM)) write_full_tile<ITEM, tile_positions(ITEM)>(warp, tile, done, lane);
    else write_part<ITEM, tile_positions(ITEM)>(warp, tile, done, rows, lane);
}

// The state of a lane that can decode every kind of tensor.
struct Lane {
    u32 positions, survivors;
    Levels fingerprints, importance;
    Mask<Levels> mask;
    Place scale, factors;
    u32 streamed;  // whether the multiplier is a stream of levels
};

__device__ inline Levels open_stream(const u8 *bytes, const Warp &warp, u32 *index, u32 stream, u32 s) {
    const Recipe &recipe = *warp.recipe;
    u32 prefix = stream_row(index, recipe, *warp.job, stream, PREFIX_ROW)[s];
    u32 residual = stream_row(index, recipe, *warp.job, stream, RESIDUAL_ROW)[s];
    u32 code_and_trim = stream_row(index, recipe, *warp.job, stream, CODE_ROW)[s];
    const Stream &own = recipe.streams[stream];
    u32 survivors = survivors_row(index, *warp.job)[s];
    u32 count = levels_of(own.rule, positions_of(recipe, *warp.job, s), survivors);
    return levels_at(bytes, own, chunk_of(*warp.job), prefix, residual, code_and_trim, count);
}

template <class L>
__device__ inline u32 wrong_end_of(const L &levels, const Warp &warp, u32 *index, u32 stream, u32 s) {
    u32 prefix = stream_row(index, *warp.recipe, *warp.job, stream, PREFIX_ROW)[s + 1];
    u32 residual = stream_row(index, *warp.recipe, *warp.job, stream, RESIDUAL_ROW)[s + 1];
    return wrong_end(levels, prefix, residual);
}

// Args: positions, survivors: of segment `s`. The tensor has a mask.
__device__ inline Mask<Levels> open_mask(
    const u8 *bytes, const Warp &warp, u32 *index, u32 s, u32 positions, u32 survivors
) {
    const Recipe &recipe = *warp.recipe;
    Levels levels = open_stream(bytes, warp, index, MASK, s);
    return mask_of(recipe.mask, levels, levels_of(recipe.streams[MASK].rule, positions, survivors));
}

__device__ inline Lane open_segment(const u8 *bytes, const Warp &warp, u32 *index, u32 s) {
    const Recipe &recipe = *warp.recipe;
    Lane lane;
    lane.positions = positions_of(recipe, *warp.job, s);
    lane.survivors = survivors_row(index, *warp.job)[s];
    lane.streamed = recipe.multiplier == OF_SURVIVORS || recipe.multiplier == OF_POSITIONS;
    lane.fingerprints = open_stream(bytes, warp, index, FINGERPRINTS, s);
    if (lane.streamed) lane.importance = open_stream(bytes, warp, index, IMPORTANCE, s);
    if (recipe.mask != NO_MASK) lane.mask = open_mask(bytes, warp, index, s, lane.positions, lane.survivors);
    u64 start = warp.job->start + (u64)s * recipe.segment;
    if (recipe.scale_by > SCALE_TENSOR) lane.scale = place_at(start, recipe.scale_unit);
    if (recipe.multiplier == OF_FACTORS) lane.factors = place_at(start, recipe.columns);
    return lane;
}

// Decodes the weight of a survivor. `importance`: that of its position, if the multiplier is OF_POSITIONS.
__device__ inline u64 next_weight(const u8 *bytes, const Recipe &recipe, Lane &lane, float importance) {
    u64 level = next_level(lane.fingerprints);
    if (recipe.multiplier == OF_SURVIVORS) {
        importance = importance_of_level(bytes, recipe, next_level(lane.importance));
    } else if (recipe.multiplier == OF_FACTORS) {
        importance = factor_of(bytes, recipe, lane.factors);
    }
    if (recipe.quantiser == EXACT) return exact_weight(recipe, level, importance);
    return quantised_weight(bytes, recipe, level, lane.scale, importance);
}

// Fills a lane's row with the weights of `count` positions, from position `done` of the segment on.
template <u32 ITEM>
__device__ inline void fill_row(const u8 *bytes, const Recipe &recipe, Lane &lane, u32 done, u32 count, u32 *row) {
    u64 bits = recipe.mask == NO_MASK ? ~(u64)0 : next_bits(lane.mask, done, count);
    for (u32 position = 0; position < count; position++) {
        u64 pattern = 0;
        float importance = 0;
        if (recipe.multiplier == OF_POSITIONS) {
            importance = importance_of_level(bytes, recipe, next_level(lane.importance));
        }
        if (bits >> position & 1) pattern = next_weight(bytes, recipe, lane, importance);
        if (recipe.scale_by > SCALE_TENSOR) advance(lane.scale, 1);
        if (recipe.multiplier == OF_FACTORS) advance(lane.factors, 1);
        put<ITEM>(row, position, pattern);
    }
}

// Decodes the next survivor of a tensor whose levels are bit patterns, or indices in a table of bit patterns.
template <u32 ITEM> __device__ inline u64 next_pattern(const u8 *bytes, const Recipe &recipe, Levels &levels) {
    if constexpr (ITEM == 8) {
        return pattern_of_level(next_level(levels), F64);
    } else {
        u32 level = next_short_level(levels);
        if (recipe.looked_up) return ((const u32 *)(bytes + recipe.patterns))[level];
        return level >> 1 | level << (8 * ITEM - 1);  // `put` drops the bits that are too high
    }
}

// Does the work of `fill_row` for tensors whose levels are bit patterns, or indices in a table of bit patterns. Loops
// over the survivors, so that a warp takes as many steps as the most survivors that one of its lanes has.
template <u32 ITEM>
__device__ inline void fill_plain(const u8 *bytes, const Recipe &recipe, Lane &lane, u32 done, u32 count, u32 *row) {
    if (recipe.mask == NO_MASK) {
        for (u32 i = 0; i < count; i++) put<ITEM>(row, i, next_pattern<ITEM>(bytes, recipe, lane.fingerprints));
        return;
    }
    u64 bits = next_bits(lane.mask, done, count);
    for (u32 word = 0; word < tile_words(ITEM); word++) row[word] = 0;
    for (; bits; bits &= bits - 1) {
        u32 position = (u32)__ffsll((long long)bits) - 1;
        put<ITEM>(row, position, next_pattern<ITEM>(bytes, recipe, lane.fingerprints));
    }
}

__device__ inline u32 close_segment(const Lane &lane, const Warp &warp, u32 *index, u32 s) {
    u32 wrong = wrong_end_of(lane.fingerprints, warp, index, FINGERPRINTS, s);
    if (lane.streamed) wrong |= wrong_end_of(lane.importance, warp, index, IMPORTANCE, s);
    if (warp.recipe->mask != NO_MASK) {
        wrong |= wrong_end_of(lane.mask.levels, warp, index, MASK, s);
        wrong |= wrong_mask(lane.mask, lane.survivors);
    }
    return wrong;
}

// Decodes the warp's segments, of any kind of tensor. Returns each lane's error word. PLAIN: whether `fill_plain`
// supports the tensor.
//
// Args: tile: 32 rows.
template <u32 ITEM, bool PLAIN>
__device__ inline u32 decode_any(const Warp &warp, u32 *index, u32 *tile, u32 lane_number) {
    const u8 *bytes = (const u8 *)warp.recipe;
    Recipe recipe = *warp.recipe;
    if (PLAIN) recipe.multiplier = NO_MULTIPLIER;  // constants, so that the compiler removes the code for other values
    if (PLAIN) recipe.scale_by = NO_SCALE;
    Warp own = {&recipe, warp.job, warp.first, warp.out};
    u32 s = warp.first + lane_number, rows = positions_of(recipe, *warp.job, warp.first);
    u32 *row = tile + lane_number * row_words(ITEM);
    bool there = s < warp.job->stop;
    Lane lane = {};
    if (there) lane = open_segment(bytes, own, index, s);
    for (u32 done = 0; done < rows; done += tile_positions(ITEM)) {
        if (there && lane.positions > done) {
            u32 count = least(tile_positions(ITEM), lane.positions - done);
            if (PLAIN) fill_plain<ITEM>(bytes, recipe, lane, done, count, row);
            else fill_row<ITEM>(bytes, recipe, lane, done, count, row);
        }
        __syncwarp();
        write_tile<ITEM>(own, tile, done, lane_number);
        __syncwarp();
    }
    return there ? close_segment(lane, own, index, s) : 0;
}
