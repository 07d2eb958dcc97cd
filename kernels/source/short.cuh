// Decodes tensors whose levels have at most 16 bits, with or without a mask: levels are bit patterns, or indices in a
// table of bit patterns.
//
// All tables are in shared memory: for each code, a first look-up of 8 bits that returns the length of the codeword and
// the class with its residual bits together; and the patterns of the levels. The look-ups of a warp can have bank
// conflicts, but they load no lines of memory.
#pragma once
#include "dense.cuh"

// The greatest number of codes of a stream, and of patterns.
enum : u32 { SHORT_CODES = 8, SHORT_PATTERNS = 1024 };

// Entries: of a class, or of the codeword with which the next 8 bits begin:
//
//   bits  0 to  3   length of the codeword; 0 if it has more than 8 bits
//   bits  4 to  8   residual bits of its class
//   bits  9 to 14   with g = 2 the slot of the second level
//   bits 16 to 31   the class's first level
struct ShortTables {
    u32 look_ups[SHORT_CODES * SHORT_ENTRIES];
    u32 classes[SHORT_ENTRIES];
};

__device__ inline u32 class_entry(const u8 *bytes, const Stream &stream, u32 slot) {
    u32 first = ((const u32 *)(bytes + stream.first))[2 * slot];
    return first << 16 | (u32)(bytes + stream.extra)[slot] << 4;
}

// Joins an entry of `fill_entry` with the entry of its first class.
__device__ inline u32 joined_entry(u32 entry, u32 of_class) {
    return of_class | (entry >> 16 & 15) | (entry >> 8 & 63) << 9;
}

// Fills a stream's tables. All threads must call it, and synchronise afterwards.
__device__ inline void fill_tables_of(const u8 *bytes, const Stream &stream, ShortTables &tables, u32 thread) {
    const u32 *entries = (const u32 *)(bytes + stream.entries);
    u32 window = (1u << stream.bits) - 1;
    for (u32 slot = thread; slot < stream.slots; slot += THREADS) {
        tables.classes[slot] = class_entry(bytes, stream, slot);
    }
    for (u32 i = thread; i < stream.codes * SHORT_ENTRIES; i += THREADS) {
        u32 entry = entries[(i >> SHORT << stream.bits) + (i & (SHORT_ENTRIES - 1) & window)];
        bool is_short = (entry >> 16 & 15) <= SHORT;
        tables.look_ups[i] = is_short ? joined_entry(entry, class_entry(bytes, stream, entry & 255)) : 0;
    }
}

// Decodes the levels of one stream of one segment, like `Levels`.
struct ShortLevels {
    Reader prefix, residual;
    const u32 *table;    // first look-up of the segment's code
    const u32 *classes;
    const u32 *entries;  // of the segment's code, for longer codewords
    u32 window, pairs, pending, trim;
};

__device__ inline ShortLevels short_levels_at(
    const Warp &warp, u32 *index, const ShortTables &tables, u32 number, u32 s
) {
    const Stream &stream = warp.recipe->streams[number];
    Chunk chunk = chunk_of(*warp.job);
    u32 code_and_trim = stream_row(index, *warp.recipe, *warp.job, number, CODE_ROW)[s];
    u32 code = code_and_trim & 0xFFFF;
    ShortLevels levels;
    levels.prefix = reader_at(chunk, stream_row(index, *warp.recipe, *warp.job, number, PREFIX_ROW)[s]);
    levels.residual = reader_at(chunk, stream_row(index, *warp.recipe, *warp.job, number, RESIDUAL_ROW)[s]);
    levels.table = tables.look_ups + code * SHORT_ENTRIES;
    levels.classes = tables.classes;
    levels.entries = (const u32 *)((const u8 *)warp.recipe + stream.entries) + (code << stream.bits);
    levels.window = stream.codes ? (1u << stream.bits) - 1 : 0;
    levels.pairs = stream.group == 2;
    levels.pending = NO_SLOT;
    levels.trim = code_and_trim >> 16;
    return levels;
}

// Returns the entry of the next level.
__device__ inline u32 next_entry(ShortLevels &levels) {
    if (levels.window == 0) return levels.classes[0];
    if (levels.pending != NO_SLOT) {
        u32 entry = levels.classes[levels.pending];
        levels.pending = NO_SLOT;
        return entry;
    }
    u32 bits = peek(levels.prefix), entry = levels.table[bits & (SHORT_ENTRIES - 1)];
    if ((entry & 15) == 0) {
        u32 whole = levels.entries[bits & levels.window];
        entry = joined_entry(whole, levels.classes[whole & 255]);
    }
    skip(levels.prefix, entry & 15);
    if (levels.pairs) levels.pending = entry >> 9 & 63;
    return entry;
}

__device__ inline u32 next_short_level(ShortLevels &levels) {
    u32 entry = next_entry(levels);
    u32 residual = take_word(levels.residual, (entry >> 4 & 31) - levels.trim);
    if (levels.trim) residual = (residual & 1) | residual >> 1 << (levels.trim + 1);
    return (entry >> 16) + residual;
}

// The shared memory of a block, except the tiles.
struct ShortMemory {
    ShortTables mask, fingerprints;
    u32 patterns[SHORT_PATTERNS];
};

// Fills the shared memory. All threads must call it, and synchronise afterwards.
__device__ inline void fill_memory(const Recipe &recipe, ShortMemory &memory, u32 thread) {
    const u8 *bytes = (const u8 *)&recipe;
    if (recipe.mask != NO_MASK) fill_tables_of(bytes, recipe.streams[MASK], memory.mask, thread);
    fill_tables_of(bytes, recipe.streams[FINGERPRINTS], memory.fingerprints, thread);
    const u32 *patterns = (const u32 *)(bytes + recipe.patterns);
    for (u32 i = thread; i < recipe.looked_up; i += THREADS) memory.patterns[i] = patterns[i];
}

struct ShortLane {
    ShortLevels fingerprints;
    Mask<ShortLevels> mask;
    u32 positions, survivors;
    u32 masked, looked_up;
};

// Fills a lane's row with the weights of `count` positions, from position `done` of the segment on.
template <u32 ITEM>
__device__ inline void fill_short_row(const ShortMemory &memory, ShortLane &lane, u32 done, u32 count, u32 *row) {
    u64 bits = ~(u64)0 >> (64 - count);
    if (lane.masked) {
        bits = next_bits(lane.mask, done, count);
        for (u32 word = 0; word < tile_words(ITEM); word++) row[word] = 0;
    }
    for (; bits; bits &= bits - 1) {
        u32 level = next_short_level(lane.fingerprints);
        // `put` drops the bits that are too high.
        u32 pattern = lane.looked_up ? memory.patterns[level] : level >> 1 | level << (8 * ITEM - 1);
        put<ITEM>(row, (u32)__ffsll((long long)bits) - 1, pattern);
    }
}

// Decodes the warp's segments. Returns each lane's error word. `tile`: 32 rows.
template <u32 ITEM>
__device__ inline u32 decode_short(
    const Warp &warp, u32 *index, u32 *tile, const ShortMemory &memory, u32 lane_number
) {
    const Recipe &recipe = *warp.recipe;
    u32 s = warp.first + lane_number, rows = positions_of(recipe, *warp.job, warp.first);
    bool there = s < warp.job->stop;
    ShortLane lane = {};
    lane.masked = recipe.mask != NO_MASK;
    lane.looked_up = recipe.looked_up;
    if (there) {
        lane.positions = positions_of(recipe, *warp.job, s);
        lane.survivors = survivors_row(index, *warp.job)[s];
        lane.fingerprints = short_levels_at(warp, index, memory.fingerprints, FINGERPRINTS, s);
    }
    if (there && lane.masked) {
        u32 count = levels_of(recipe.streams[MASK].rule, lane.positions, lane.survivors);
        lane.mask = mask_of(recipe.mask, short_levels_at(warp, index, memory.mask, MASK, s), count);
    }
    for (u32 done = 0; done < rows; done += tile_positions(ITEM)) {
        if (lane.positions > done) {
            u32 count = least(tile_positions(ITEM), lane.positions - done);
            fill_short_row<ITEM>(memory, lane, done, count, tile + lane_number * row_words(ITEM));
        }
        __syncwarp();
        write_tile<ITEM>(warp, tile, done, lane_number);
        __syncwarp();
    }
    if (!there) return 0;
    u32 wrong = wrong_end_of(lane.fingerprints, warp, index, FINGERPRINTS, s);
    if (!lane.masked) return wrong;
    return wrong | wrong_end_of(lane.mask.levels, warp, index, MASK, s) | wrong_mask(lane.mask, lane.survivors);
}
