// Decodes dense exact tensors with windows (SPEC.md chapter 9) whose residuals are whole bytes.
//
// The place of each bit is known in advance, so a warp decodes one segment after the other, 1,024 levels at a time. Each
// lane reads 32 bits of each bit plane of symbols: neighbouring lanes read neighbouring words. It computes the classes
// of four levels at once, one per byte, and stores them in a tile in shared memory. Lanes count their escaped levels,
// sum the counts over the warp, and replace the classes of these levels in the tile; about one level in 70 is escaped.
// Then the warp joins the tile with the residuals, which were loaded before, and neighbouring lanes write neighbouring
// weights.
#pragma once
#include "dense.cuh"

enum : u32 {
    LANE_LEVELS = 32,                            // levels per lane of a tile
    TILE_LEVELS = LANE_LEVELS * WARP,
    QUADS = TILE_LEVELS / (4 * WARP),            // four weights that a lane writes, per tile
    WARP_LEVELS = 4096                           // about as many levels per warp
};

struct WindowMemory {
    Words tiles[WARPS][TILE_LEVELS / sizeof(Words)];
};

// Returns the number of segments per warp; sfpformat/engines/cuda/recipe.py does the same.
__device__ inline u32 segments_a_warp(u32 segment) {
    return segment < WARP_LEVELS ? least(WARP_LEVELS / segment, WARP) : 1;
}

// Transposes 4 × 4 bytes: byte j of word i becomes byte i of word j.
__device__ inline void transpose(u32 &a, u32 &b, u32 &c, u32 &d) {
    u32 low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
    u32 next = __byte_perm(c, d, 0x5140), last = __byte_perm(c, d, 0x7362);
    a = __byte_perm(low, next, 0x5410);
    b = __byte_perm(low, next, 0x7632);
    c = __byte_perm(high, last, 0x5410);
    d = __byte_perm(high, last, 0x7632);
}

// Returns bits `i`, `i` + 8, `i` + 16 and `i` + 24 of a plane as bit `k` of four bytes. The compiler joins it with the
// union of planes, so that it takes two instructions.
__device__ inline u32 spread(u32 plane, u32 i, u32 k) {
    return (i < k ? plane << (k - i) : plane >> (i - k)) & 0x01010101u << k;
}

// The stream of a segment.
struct Symbols {
    Chunk chunk;
    u32 bits;       // of a symbol
    u32 start;      // bit offset of the symbols
    u32 count;      // of levels
    u32 lowest;     // first class of the window
    u32 escaped;    // bit offset of the class of the next escaped level
    u32 escape;     // bits of such a class
    u32 classes;
};

// Stores the slots of the levels from `done` on in a tile, one byte each. Returns the error word. All lanes must call
// it, and synchronise afterwards. BITS: bits of a symbol; 0: `symbols` has them.
template <u32 BITS> __device__ inline u32 fill_window_tile(Symbols &symbols, u32 done, u32 lane, Words *tile) {
    const u32 most = BITS ? BITS : 4, bits = BITS ? BITS : symbols.bits;
    u32 own = done + LANE_LEVELS * lane, left = symbols.count > own ? symbols.count - own : 0;
    u32 there = left < LANE_LEVELS ? (1u << left) - 1 : ~0u, planes[most], escapes = there;
#pragma unroll
    for (u32 k = 0; k < most; k++) {
        planes[k] = k < bits ? bits_at(symbols.chunk, symbols.start + k * symbols.count + own) : 0;
        if (k < bits) escapes &= planes[k];
    }
    // The symbol of an escaped level counts as 0, because the sum with `lowest` might not fit into its byte.
#pragma unroll
    for (u32 k = 0; k < most; k++) planes[k] &= ~escapes;
    // Word i has levels i, i + 8, i + 16 and i + 24.
    u32 slots[LANE_LEVELS / 4];
#pragma unroll
    for (u32 i = 0; i < LANE_LEVELS / 4; i++) {
        slots[i] = 0;
#pragma unroll
        for (u32 k = 0; k < most; k++) slots[i] |= spread(planes[k], i, k);
        slots[i] += symbols.lowest * 0x01010101;
    }
    transpose(slots[0], slots[1], slots[2], slots[3]);
    transpose(slots[4], slots[5], slots[6], slots[7]);
    tile += lane * (LANE_LEVELS / sizeof(Words));
    tile[0] = {slots[0], slots[4], slots[1], slots[5]};
    tile[1] = {slots[2], slots[6], slots[3], slots[7]};
    u32 number = (u32)__popc(escapes), up_to = sum_up_to(number, lane), wrong = 0;
    u32 place = symbols.escaped + (up_to - number) * symbols.escape;
    symbols.escaped += (u32)__shfl_sync(ALL_LANES, up_to, WARP - 1) * symbols.escape;
    for (; escapes; escapes &= escapes - 1) {
        u32 slot = bits_at(symbols.chunk, place) & ((1u << symbols.escape) - 1);
        place += symbols.escape;
        if (slot >= symbols.classes) slot = 0, wrong = WRONG_END;
        ((u8 *)tile)[__ffsll((long long)escapes) - 1] = (u8)slot;
    }
    return wrong;
}

// The residuals and the weights of a segment.
struct WindowRow {
    Chunk chunk;
    u32 residuals;  // offset in the chunk
    u32 base;       // as in `DenseLane`
    u32 count;      // of levels
    u8 *to;         // address for the weights
    bool is_whole;  // whether the address allows stores of four weights
};

// Loads residuals of `count` times four weights: those that a lane writes.
template <u32 ITEM, u32 COUNT>
__device__ inline void load_residuals(const WindowRow &row, u32 done, u32 first, u32 lane, u32 *loaded) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        u32 at = row.residuals + (done + ((first + i) * WARP + lane) * 4) * (ITEM - 1);
#pragma unroll
        for (u32 k = 0; k < ITEM - 1; k++) loaded[i * (ITEM - 1) + k] = some_word(row.chunk, at + 4 * k);
    }
}

// Joins slots with residuals, and writes `COUNT` times four weights.
template <u32 ITEM, u32 COUNT>
__device__ inline void join_quads(
    const WindowRow &row, const u32 *tile, u32 done, u32 first, u32 lane, const u32 *loaded
) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        u32 quad = (first + i) * WARP + lane;
        write_four<ITEM>(row.base, tile[quad], loaded + i * (ITEM - 1), row.to + (done + 4 * quad) * ITEM);
    }
}

// Does the same for a tile that is not full, one weight after the other.
template <u32 ITEM> __device__ inline void join_some(const WindowRow &row, const u32 *tile, u32 done, u32 lane) {
    for (u32 i = lane; i < least(row.count - done, TILE_LEVELS); i += WARP) {
        u32 at = row.residuals + (done + i) * (ITEM - 1);
        write_one<ITEM>(row.chunk, row.base, ((const u8 *)tile)[i], at, row.to + (done + i) * ITEM);
    }
}

// Decodes a segment. Returns each lane's error word.
template <u32 ITEM, u32 BITS>
__device__ inline u32 decode_window(Symbols &symbols, const WindowRow &row, u32 end, u32 lane, Words *tile) {
    const u32 at_once = ITEM == 2 ? (u32)QUADS : QUADS / 2;
    u32 wrong = 0;
    for (u32 done = 0; done < row.count; done += TILE_LEVELS) {
        bool full = row.is_whole && row.count - done >= TILE_LEVELS;
        u32 loaded[at_once * (ITEM - 1)];
        if (full) load_residuals<ITEM, at_once>(row, done, 0, lane, loaded);  // before they are needed
        wrong |= fill_window_tile<BITS>(symbols, done, lane, tile);
        __syncwarp();
        if (full) {
            join_quads<ITEM, at_once>(row, (const u32 *)tile, done, 0, lane, loaded);
            if constexpr (at_once < QUADS) {
                load_residuals<ITEM, at_once>(row, done, at_once, lane, loaded);
                join_quads<ITEM, at_once>(row, (const u32 *)tile, done, at_once, lane, loaded);
            }
        } else {
            join_some<ITEM>(row, (const u32 *)tile, done, lane);
        }
        __syncwarp();
    }
    // The end of the residuals needs no check: the index computed it from their number and width.
    return wrong | (symbols.escaped != end ? (u32)WRONG_END : 0);
}

// Decodes the warp's segments. Returns the error words, each in the lane with the segment's number in the warp.
template <u32 ITEM> __device__ inline u32 decode_windows(const Warp &warp, u32 *index, u32 lane, Words *tile) {
    const Recipe &recipe = *warp.recipe;
    const Stream &stream = recipe.streams[FINGERPRINTS];
    const u32 *prefixes = stream_row(index, recipe, *warp.job, FINGERPRINTS, PREFIX_ROW);
    const u32 *residuals = stream_row(index, recipe, *warp.job, FINGERPRINTS, RESIDUAL_ROW);
    const u32 *windows = stream_row(index, recipe, *warp.job, FINGERPRINTS, CODE_ROW);
    u32 count = least(segments_a_warp(recipe.segment), warp.job->stop - warp.first), words = 0;
    WindowRow row;
    row.chunk = chunk_of(*warp.job);
    row.base = (u32) * (const u64 *)((const u8 *)warp.recipe + stream.first);
    if (ITEM == 2) row.base |= row.base << 16;
    for (u32 i = 0; i < count; i++) {
        u32 s = warp.first + i;
        row.count = positions_of(recipe, *warp.job, s);
        row.residuals = residuals[s] / 8;
        row.to = place_of_row<ITEM>(warp, 0, i);
        row.is_whole = (u64)row.to % (4 * ITEM) == 0 && row.residuals % 4 == 0;
        Symbols symbols = {row.chunk, stream.window, prefixes[s], row.count, windows[s] & 0xFFFF, 0, stream.escape,
                           stream.slots};
        symbols.escaped = symbols.start + row.count * symbols.bits;
        u32 wrong;
        if (symbols.bits == 3) wrong = decode_window<ITEM, 3>(symbols, row, prefixes[s + 1], lane, tile);
        else wrong = decode_window<ITEM, 0>(symbols, row, prefixes[s + 1], lane, tile);
        bool any = __any_sync(ALL_LANES, wrong != 0);
        if (lane == i && any) words = WRONG_END;
    }
    return words;
}
