// Weights of segments, 32 segments a warp, a segment a lane.
//
// Theory of operation. Each lane reads the planes of its own segment, bit after bit, with nothing to wait for from
// others. Weights leave by tiles: every lane writes its next positions into a row of shared memory, then the warp
// writes the rows out together, a row after another, neighbouring lanes to neighbouring words. A row has an odd
// number of words, so that neither way do two lanes meet in a bank.
//
// Bounds: a lane reads by `Reader`, which ends at the chunk's end; it writes as many positions as its segment has,
// whatever the planes say; every table has an entry for every index that it can be given.
#pragma once
#include "index.cuh"
#include "mask.cuh"
#include "values.cuh"

// Positions a tile for weights of `item` bytes, at most 64, and words a row.
__device__ constexpr u32 tile_positions(u32 item) { return item <= 2 ? 64 : 32; }
__device__ constexpr u32 tile_words(u32 item) { return tile_positions(item) * item / 4; }
__device__ constexpr u32 row_words(u32 item) { return tile_words(item) + 1; }

template <u32 ITEM> struct Pattern;
template <> struct Pattern<1> { typedef u8 type; };
template <> struct Pattern<2> { typedef u16 type; };
template <> struct Pattern<4> { typedef u32 type; };

// Puts a weight at a position of a lane's row. A row of 8-byte weights is a row of words, lower halves first.
template <u32 ITEM> __device__ inline void put(u32 *row, u32 position, u64 pattern) {
    if constexpr (ITEM == 8) {
        row[2 * position] = (u32)pattern;
        row[2 * position + 1] = (u32)(pattern >> 32);
    } else {
        ((typename Pattern<ITEM>::type *)row)[position] = (typename Pattern<ITEM>::type)pattern;
    }
}

// Where the warp is: segments `first` to `first` + 31 of a job, as far as the run goes; `out` is where the weights of
// the run go.
struct Warp {
    const Recipe *recipe;
    const Job *job;
    u32 first;
    u64 out;
};

// Where a row of a tile goes: the positions from `done` on of the warp's segment number `row`.
template <u32 ITEM> __device__ inline u8 *place_of_row(const Warp &warp, u32 done, u32 row) {
    u64 segment = warp.first - warp.job->first + row;
    return (u8 *)warp.out + (segment * warp.recipe->segment + done) * ITEM;
}

// Writes out a tile whose rows are all there and full: words of `columns` lanes side by side. POSITIONS: of a row, which
// is a word longer than they are.
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

// Writes out a tile some of whose rows are missing or short. All lanes take part.
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
            } else {  // the end of a tensor
#pragma unroll 1
                for (u32 at = 4 * word; at < bytes; at++) to[at] = (u8)(value >> 8 * (at & 3));
            }
        }
    }
}

// Writes out the rows of the warp's segments, which hold the positions from `done` on. All lanes take part.
template <u32 ITEM> __device__ inline void write_tile(const Warp &warp, const u32 *tile, u32 done, u32 lane) {
    u32 rows = least(WARP, warp.job->stop - warp.first);
    u32 last = positions_of(*warp.recipe, *warp.job, warp.first + rows - 1);
    if (rows == WARP && last >= done + tile_positions(ITEM)) write_full_tile<ITEM, tile_positions(ITEM)>(warp, tile, done, lane);
    else write_part<ITEM, tile_positions(ITEM)>(warp, tile, done, rows, lane);
}

// The state of one lane that can decode every kind of tensor.
struct Lane {
    u32 positions, survivors;
    Levels fingerprints, importance;
    Mask<Levels> mask;
    Place scale, factors;
    u32 streamed;  // whether a multiplier has levels
};

__device__ inline Levels open_stream(const u8 *bytes, const Warp &warp, u32 *index, u32 stream, u32 s) {
    const Recipe &recipe = *warp.recipe;
    u32 prefix = stream_row(index, recipe, *warp.job, stream, PREFIX_ROW)[s];
    u32 residual = stream_row(index, recipe, *warp.job, stream, RESIDUAL_ROW)[s];
    u32 code_and_trim = stream_row(index, recipe, *warp.job, stream, CODE_ROW)[s];
    return levels_at(bytes, recipe.streams[stream], chunk_of(*warp.job), prefix, residual, code_and_trim);
}

template <class L>
__device__ inline u32 wrong_end_of(const L &levels, const Warp &warp, u32 *index, u32 stream, u32 s) {
    u32 prefix = stream_row(index, *warp.recipe, *warp.job, stream, PREFIX_ROW)[s + 1];
    u32 residual = stream_row(index, *warp.recipe, *warp.job, stream, RESIDUAL_ROW)[s + 1];
    return wrong_end(levels, prefix, residual);
}

__device__ inline Lane open_segment(const u8 *bytes, const Warp &warp, u32 *index, u32 s) {
    const Recipe &recipe = *warp.recipe;
    Lane lane;
    lane.positions = positions_of(recipe, *warp.job, s);
    lane.survivors = survivors_row(index, *warp.job)[s];
    lane.streamed = recipe.multiplier == OF_SURVIVORS || recipe.multiplier == OF_POSITIONS;
    lane.fingerprints = open_stream(bytes, warp, index, FINGERPRINTS, s);
    if (lane.streamed) lane.importance = open_stream(bytes, warp, index, IMPORTANCE, s);
    if (recipe.mask != NO_MASK) {
        u32 rule = recipe.streams[MASK].rule;
        Levels levels = open_stream(bytes, warp, index, MASK, s);
        lane.mask = mask_of(recipe.mask, levels, levels_of(rule, lane.positions, lane.survivors));
    }
    u64 start = warp.job->start + (u64)s * recipe.segment;
    if (recipe.scale_by > SCALE_TENSOR) lane.scale = place_at(start, recipe.scale_unit);
    if (recipe.multiplier == OF_FACTORS) lane.factors = place_at(start, recipe.columns);
    return lane;
}

// The weight of a survivor; `importance` is that of its position where a multiplier has levels.
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

// The bit pattern of the next survivor of a tensor whose levels are patterns, or are looked up.
template <u32 ITEM> __device__ inline u64 next_pattern(const u8 *bytes, const Recipe &recipe, Levels &levels) {
    if constexpr (ITEM == 8) {
        return pattern_of_level(next_level(levels), F64);
    } else {
        u32 level = next_short_level(levels);
        if (recipe.looked_up) return ((const u32 *)(bytes + recipe.patterns))[level];
        return level >> 1 | level << (8 * ITEM - 1);  // what is too high does not fit where it is put
    }
}

// As `fill_row`, for tensors whose levels are patterns or are looked up: from survivor to survivor, so that a warp
// does as many steps as its lane with the most survivors has.
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

// Decodes the warp's segments, of any kind of tensor; PLAIN as in `fill_plain`. Returns each lane's error word.
//
// Args: tile, 32 rows.
template <u32 ITEM, bool PLAIN>
__device__ inline u32 decode_any(const Warp &warp, u32 *index, u32 *tile, u32 lane_number) {
    const u8 *bytes = (const u8 *)warp.recipe;
    Recipe recipe = *warp.recipe;
    if (PLAIN) recipe.multiplier = NO_MULTIPLIER;  // said to the compiler, which leaves out what it needs
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
