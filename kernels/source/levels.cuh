// Decodes the levels of one stream of one segment (SPEC.md chapters 8 and 9), one by one. Each lane has its own state.
#pragma once
#include "recipe.cuh"

struct Levels {
    const u32 *entries;  // of the segment's code; unused for one class
    const u64 *first;
    const u8 *extra;
    Reader prefix, residual;
    u32 window;    // the mask of the bits of a look-up, 0 for one class and for windows
    u32 pairs;     // whether a symbol has two levels
    u32 pending;   // the slot of a pair's second level, or NO_SLOT
    u32 differing, constant, trim;
    // With windows; `prefix` reads the classes of escaped levels.
    u32 symbol;    // bits of a symbol; 0 without windows
    u32 place;     // bit offset in the chunk of the next level's symbol in the first bit plane
    u32 stride;    // bits from a plane to the next: the number of levels of the segment
    u32 lowest;    // the first class of the segment's window
    u32 escape, classes;
    u32 wrong;     // whether an escaped level has no class (R-PLN-005)
};

enum : u32 { NO_SLOT = 0xFFFFFFFF };

// Args: count: number of levels; unused without windows.
__device__ inline Levels levels_at(
    const u8 *bytes, const Stream &stream, Chunk chunk, u32 prefix, u32 residual, u32 code_and_trim, u32 count
) {
    Levels levels;
    levels.symbol = stream.window;
    levels.place = prefix;
    levels.stride = count;
    levels.lowest = code_and_trim & 0xFFFF;
    levels.escape = stream.escape;
    levels.classes = stream.slots;
    levels.wrong = 0;
    if (stream.window) prefix += count * stream.window;
    levels.first = (const u64 *)(bytes + stream.first);
    levels.extra = bytes + stream.extra;
    levels.entries = (const u32 *)(bytes + stream.entries) + ((u64)(code_and_trim & 0xFFFF) << stream.bits);
    levels.window = stream.codes ? (1u << stream.bits) - 1 : 0;
    levels.pairs = stream.group == 2;
    levels.pending = NO_SLOT;
    levels.differing = stream.differing;
    levels.constant = stream.constant;
    levels.trim = code_and_trim >> 16;
    levels.prefix = reader_at(chunk, prefix);
    levels.residual = reader_at(chunk, residual);
    return levels;
}

// Returns a bit of the chunk that a reader reads; 0 outside it.
__device__ inline u32 bit_at(const Reader &r, u32 bit) {
    return bit >> 7 < r.count ? ((const u32 *)r.data)[bit >> 5] >> (bit & 31) & 1 : 0;
}

// Decodes the slot of the next level of a stream with windows.
__device__ inline u32 slot_in_window(Levels &levels) {
    u32 symbol = 0;
    for (u32 k = 0; k < levels.symbol; k++) symbol |= bit_at(levels.prefix, levels.place + k * levels.stride) << k;
    levels.place++;
    if (symbol + 1 < 1u << levels.symbol) return levels.lowest + symbol;
    u32 slot = take_word(levels.prefix, levels.escape);
    if (slot < levels.classes) return slot;
    levels.wrong = WRONG_END;
    return 0;
}

// Decodes the slot of the next level.
__device__ inline u32 next_slot(Levels &levels) {
    if (levels.symbol) return slot_in_window(levels);
    if (levels.window == 0) return 0;
    if (levels.pending != NO_SLOT) {
        u32 slot = levels.pending;
        levels.pending = NO_SLOT;
        return slot;
    }
    u32 entry = levels.entries[peek(levels.prefix) & levels.window];
    skip(levels.prefix, entry >> 16 & 15);
    if (levels.pairs) levels.pending = entry >> 8 & 255;
    return entry & 255;
}

// Decodes the next level. For any bits, the result is below the `top` of the table (R-TAB-008).
__device__ inline u64 next_level(Levels &levels) {
    u32 slot = next_slot(levels);
    u32 width = (levels.differing ? levels.extra[slot] : levels.constant) - levels.trim;
    u64 residual = take(levels.residual, width);
    if (levels.trim) residual = (residual & 1) | residual >> 1 << (levels.trim + 1);
    return levels.first[slot] + residual;
}

// Does the work of `next_level` for tables whose levels are below 2^32.
__device__ inline u32 next_short_level(Levels &levels) {
    u32 slot = next_slot(levels);
    u32 width = (levels.differing ? levels.extra[slot] : levels.constant) - levels.trim;
    u32 residual = take_word(levels.residual, width);
    if (levels.trim) residual = (residual & 1) | residual >> 1 << (levels.trim + 1);
    return ((const u32 *)levels.first)[2 * slot] + residual;
}

// Returns the error word for the end of a segment's levels. Args: prefix_end, residual_end: bit offsets in the chunk
// where the segment must end in the two planes.
template <class L> __device__ inline u32 wrong_end(const L &levels, u32 prefix_end, u32 residual_end) {
    u32 wrong = 0;
    if (levels.window && levels.prefix.place != prefix_end) wrong |= WRONG_END;
    if (levels.residual.place != residual_end) wrong |= WRONG_END;
    if (levels.pending != NO_SLOT && levels.pending != 0) wrong |= WRONG_PAIR;
    return wrong;
}

__device__ inline u32 wrong_end(const Levels &levels, u32 prefix_end, u32 residual_end) {
    u32 wrong = wrong_end<Levels>(levels, prefix_end, residual_end) | levels.wrong;
    if (levels.symbol && levels.prefix.place != prefix_end) wrong |= WRONG_END;
    return wrong;
}
