// Decodes dense exact tensors: the class is the exponent, the residual is mantissa and sign. No 64-bit level is
// computed: slot, residual and weight are in 32-bit registers.
//
// If residuals are whole bytes, lanes decode only the codewords: a tile has one byte per weight, the slot. When the warp
// writes the weights, it joins each row with the row's residuals, which are contiguous in the file.
//
// The first look-up of a code has an index of 8 bits. If there is one code, shared memory has a copy of its table for
// every two banks, so that the look-ups of a warp rarely have bank conflicts. Longer codewords need a second look-up: in
// a table of the windows that do not begin with a short codeword, if there is room for it, else in `entries`.
//
// A lane decodes four weights at a time: four codewords of at most 8 bits are in the 32 bits that one read of a ring
// returns. Codewords of up to 12 bits are decoded two at a time.
#pragma once
#include "decode.cuh"
#include "ring.cuh"

// Index bits and entries of the first look-up; copies of its table if there is one code; entries of the second look-up.
enum : u32 { SHORT = 8, SHORT_ENTRIES = 1u << SHORT, COPIES = 16, LONG_ENTRIES = 2048 };

// Returns an entry of the first look-up: codeword length | slot << 8, or 0 for a longer codeword.
__device__ inline u16 short_entry(u32 entry) {
    u32 bits = entry >> 16 & 15;
    return bits > SHORT ? 0 : (u16)(bits | (entry & 255) << 8);
}

__device__ inline u32 long_entry_of(u32 entry) { return (entry >> 16 & 15) | (entry & 255) << 8; }

// The tables of a kernel: of one code or of many; SHORT: all codewords have at most 8 bits.
enum Tables { ONE_SHORT, ONE_LONG, MANY_SHORT, MANY_LONG };

__device__ constexpr bool is_many(Tables tables) { return tables == MANY_SHORT || tables == MANY_LONG; }
__device__ constexpr bool is_long(Tables tables) { return tables == ONE_LONG || tables == MANY_LONG; }

// The tables of a block, in shared memory.
template <Tables TABLES> struct DenseTables {
    u16 first[16 * SHORT_ENTRIES];  // one code: for each window its copies; many codes: one table after the other
    // Entries by window of all bits, its first bit highest: for each code the windows that do not begin with a short
    // codeword. `starts`: the index that window 0 of a code would have, or NOT_HELD if its windows are not in `second`.
    u16 second[is_long(TABLES) ? (u32)LONG_ENTRIES : 2];
    u32 starts[is_long(TABLES) ? 16 : 1];
};
enum : u32 { NOT_HELD = 0x80000000 };

// Returns how many windows of 8 bits, the first bit highest, begin with a codeword of at most 8 bits. The other windows
// are greater numbers.
__device__ inline u32 short_windows(const u16 *lengths) {
    u32 windows = 0;
#pragma unroll
    for (u32 bits = 1; bits <= SHORT; bits++) windows += (u32)lengths[bits] << (SHORT - bits);
    return windows;
}

// Fills the tables of a block's second look-ups; part of `fill_dense_tables`.
template <Tables TABLES>
__device__ inline void fill_second(const u8 *bytes, const Stream &stream, DenseTables<TABLES> &tables, u32 thread) {
    const u32 *entries = (const u32 *)(bytes + stream.entries);
    u32 spare = stream.bits > SHORT ? stream.bits - SHORT : 0, held = 0;
    for (u32 code = 0; code < stream.codes; code++) {
        u32 first = short_windows((const u16 *)(bytes + stream.lengths) + 16 * code) << spare;
        u32 size = (SHORT_ENTRIES << spare) - first;
        bool fits = spare && held + size <= LONG_ENTRIES;
        if (thread == 0) tables.starts[code] = fits ? held - first : (u32)NOT_HELD;
        for (u32 i = fits ? thread : size; i < size; i += THREADS) {
            u32 window = __brev(first + i) >> (WARP - stream.bits);
            tables.second[held + i] = (u16)long_entry_of(entries[(code << stream.bits) + window]);
        }
        if (fits) held += size;
    }
}

// Fills the look-up tables of a block. All threads must call it, and synchronise afterwards.
template <Tables TABLES>
__device__ inline void fill_dense_tables(const Recipe &recipe, DenseTables<TABLES> &tables, u32 thread) {
    const u8 *bytes = (const u8 *)&recipe;
    const Stream &stream = recipe.streams[FINGERPRINTS];
    const u32 *entries = (const u32 *)(bytes + stream.entries);
    u32 window = (1u << stream.bits) - 1, count = (is_many(TABLES) ? stream.codes : 1) * SHORT_ENTRIES;
    for (u32 i = thread; i < count; i += THREADS) {
        u32 entry = short_entry(entries[(i >> SHORT << stream.bits) + (i & (SHORT_ENTRIES - 1) & window)]);
        if (is_many(TABLES)) {
            tables.first[i] = (u16)entry;
            continue;
        }
        u32 *copies = (u32 *)tables.first + i * (COPIES / 2);
#pragma unroll
        for (u32 two = 0; two < COPIES / 2; two++) copies[two] = entry | entry << 16;
    }
    if constexpr (is_long(TABLES)) fill_second<TABLES>(bytes, stream, tables, thread);
}

struct DenseLane {
    Ring<4> prefix;
    Reader residual;     // if residuals are not whole bytes
    const u32 *entries;  // of the segment's code
    const u16 *first;    // this lane's copy of the first table of the segment's code
    const u16 *second;
    u32 start;           // the code's element of `starts`
    u32 bits;            // of a window
    u32 width, trim;
    u32 base;            // the first level; for weights of 2 bytes, in both halves
    u32 shift;           // residual bits of a class, including trimmed ones
    u32 residuals;       // offset of the residuals in the chunk, if they are whole bytes
};

// Returns the entry of the next codeword. `bits`: the next bits, the first one lowest.
template <Tables TABLES> __device__ inline u32 look_up(const DenseLane &lane, u32 bits) {
    u32 window = bits & (SHORT_ENTRIES - 1);
    u32 entry = lane.first[is_many(TABLES) ? window : window * COPIES];
    if (is_long(TABLES) && entry == 0) {
        if (lane.start != NOT_HELD) return lane.second[lane.start + (__brev(bits) >> (WARP - lane.bits))];
        return long_entry_of(lane.entries[bits & ((1u << lane.bits) - 1)]);
    }
    return entry;
}

// Looks up the next four codewords. The lowest byte of a sum of entries is the sum of the codeword lengths. A funnel
// shift uses only its lowest 5 bits; the sum is at most 24 when it is a shift.
template <Tables TABLES> __device__ inline void four_entries(DenseLane &lane, u32 *entries) {
    const u32 at_once = is_long(TABLES) ? 2 : 4;
#pragma unroll
    for (u32 begin = 0; begin < 4; begin += at_once) {
        u32 bits = peek(lane.prefix), taken = 0;
#pragma unroll
        for (u32 i = begin; i < begin + at_once; i++) {
            entries[i] = look_up<TABLES>(lane, __funnelshift_r(bits, 0, taken));
            taken += entries[i];
        }
        skip(lane.prefix, taken & 63);
    }
}

// The number of codewords in a round: they have at most the bits of one piece of the ring.
template <Tables TABLES> __device__ constexpr u32 round_of() { return is_long(TABLES) ? 8 : 16; }

// Called before each round: begins to copy the next piece, and waits for all earlier copies.
__device__ inline void begin_round(DenseLane &lane) {
    top_up(lane.prefix);
    close_copies();
    wait_for_all_but<1>();
}

__device__ inline u32 dense_residual(DenseLane &lane) {
    u32 residual = take_word(lane.residual, lane.width);
    return lane.trim ? (residual & 1) | residual >> 1 << (lane.trim + 1) : residual;
}

// Returns the bit pattern of a weight. Args: base: the first level; of_class: offset of the class from it; residual.
template <u32 ITEM> __device__ inline u32 pattern_of(u32 base, u32 of_class, u32 residual) {
    u32 level = base + of_class + residual;
    return ITEM == 4 ? __funnelshift_r(level, level, 1) : (level & 0xFFFF) >> 1 | (level & 1) << 15;
}

template <u32 ITEM> __device__ inline u32 dense_pattern(const DenseLane &lane, u32 entry, u32 residual) {
    return pattern_of<ITEM>(lane.base, entry >> 8 << lane.shift, residual);
}

// Returns two weights of 2 bytes whose residuals are bytes. `pick`: selectors of a residual and of its slot, twice.
__device__ inline u32 two_patterns(u32 base, u32 slots, u32 residuals, u32 pick) {
    u32 levels = base + __byte_perm(residuals, slots, pick);  // two halves; neither overflows
    return (levels >> 1 & 0x7FFF7FFF) | (levels << 15 & 0x80008000);
}

// Returns a weight of 4 bytes. Args: slot_and_residual: the residual, of three bytes, with the slot above it.
__device__ inline u32 one_pattern(u32 base, u32 slot_and_residual) {
    u32 level = base + slot_and_residual;
    return __funnelshift_r(level, level, 1);
}

// Fills a lane's row with the next `count` weights, of any residual width.
template <u32 ITEM, Tables TABLES> __device__ inline void fill_dense(DenseLane &lane, u32 count, u32 *row) {
    for (u32 position = 0; position < count; position++) {
        if (position % round_of<TABLES>() == 0) begin_round(lane);
        u32 entry = look_up<TABLES>(lane, peek(lane.prefix));
        skip(lane.prefix, entry & 255);
        put<ITEM>(row, position, dense_pattern<ITEM>(lane, entry, dense_residual(lane)));
    }
}

// ------------------------------------------------------------------------------------------------- whole bytes

// A tile of slots, one byte each. Its rows begin in different banks.
enum : u32 { SLOTS = 64, SLOT_WORDS = SLOTS / 4, SLOT_ROW = SLOT_WORDS + 1 };

// Fills a lane's row with the slots of the next `count` weights.
template <Tables TABLES> __device__ inline void fill_slots(DenseLane &lane, u32 count, u32 *row) {
    if (count == SLOTS) {
#pragma unroll 1
        for (u32 round = 0; round < SLOTS; round += round_of<TABLES>()) {
            begin_round(lane);
#pragma unroll
            for (u32 i = 0; i < round_of<TABLES>() / 4; i++) {
                u32 entries[4];
                four_entries<TABLES>(lane, entries);
                u32 low = __byte_perm(entries[0], entries[1], 0x0051), high = __byte_perm(entries[2], entries[3], 0x0051);
                *row++ = __byte_perm(low, high, 0x5410);
            }
        }
        return;
    }
    for (u32 position = 0; position < count; position++) {
        if (position % round_of<TABLES>() == 0) begin_round(lane);
        u32 entry = look_up<TABLES>(lane, peek(lane.prefix));
        skip(lane.prefix, entry & 255);
        ((u8 *)row)[position] = (u8)(entry >> 8);
    }
}

// Joins four slots and residuals to four weights of 2 bytes, in two words.
__device__ inline void join_2(u32 base, u32 slots, u32 residuals, u32 *words) {
    words[0] = two_patterns(base, slots, residuals, 0x5140);
    words[1] = two_patterns(base, slots, residuals, 0x7362);
}

// Joins four slots and residuals to four weights of 4 bytes. The residuals, of three bytes each, fill three words.
__device__ inline void join_4(u32 base, u32 slots, const u32 *residuals, u32 *words) {
    u32 second = __funnelshift_r(residuals[0], residuals[1], 24);
    u32 third = __funnelshift_r(residuals[1], residuals[2], 16);
    words[0] = one_pattern(base, __byte_perm(residuals[0], slots, 0x4210));
    words[1] = one_pattern(base, __byte_perm(second, slots, 0x5210));
    words[2] = one_pattern(base, __byte_perm(third, slots, 0x6210));
    words[3] = one_pattern(base, __byte_perm(residuals[2], slots, 0x7321));
}

// Two words, stored by one instruction.
struct alignas(8) Two {
    u32 a, b;
};

// Joins four slots and residuals, and stores the weights. Args: residuals: one word, or with ITEM 4 three.
template <u32 ITEM> __device__ inline void write_four(u32 base, u32 slots, const u32 *residuals, u8 *to) {
    u32 out[ITEM];
    if constexpr (ITEM == 2) {
        join_2(base, slots, residuals[0], out);
        *(Two *)to = {out[0], out[1]};
    } else {
        join_4(base, slots, residuals, out);
        *(Words *)to = {out[0], out[1], out[2], out[3]};
    }
}

// Joins a slot with the residual at an offset of the chunk, and stores the weight.
template <u32 ITEM> __device__ inline void write_one(Chunk chunk, u32 base, u32 slot, u32 at, u8 *to) {
    u32 residual = 0;
    for (u32 k = 0; k < ITEM - 1; k++) residual |= byte_at(chunk, at + k) << 8 * k;
    put<ITEM>((u32 *)to, 0, pattern_of<ITEM>(base, slot << 8 * (ITEM - 1), residual));
}

// The locations of the weights and residuals of the warp's rows, which are the same for all tiles. A warp writes two
// rows at a time, four weights per lane.
struct DenseRows {
    Chunk chunk;
    u32 residuals;  // offset in the chunk of the residuals of this lane's segment
    u32 base;       // as in `DenseLane`
    u8 *to;         // address for this lane's first four weights
    u32 step;       // bytes from two rows to the next two
    u32 segment;    // positions of a full row
    bool are_full;  // whether there are 32 full rows, at addresses that allow stores of four weights
};

template <u32 ITEM> __device__ inline DenseRows rows_of(const Warp &warp, const DenseLane &lane, u32 lane_number) {
    u32 rows = least(WARP, warp.job->stop - warp.first);
    u32 last = positions_of(*warp.recipe, *warp.job, warp.first + rows - 1);
    DenseRows out;
    out.chunk = chunk_of(*warp.job);
    out.residuals = lane.residuals;
    out.base = (u32)__shfl_sync(ALL_LANES, lane.base, 0);  // lanes without a segment write too
    out.to = place_of_row<ITEM>(warp, lane_number % SLOT_WORDS * 4, lane_number / SLOT_WORDS);
    out.segment = warp.recipe->segment;
    out.step = 2 * out.segment * ITEM;
    out.are_full = rows == WARP && last == out.segment && warp.out % (4 * ITEM) == 0;
    return out;
}

// Returns four bytes at an offset; past the chunk's end, its last four. The load has no branch, so it does not wait.
__device__ inline u32 some_word(Chunk chunk, u32 offset) {
    return *(const u32 *)(chunk.data + least(offset, chunk.length - 4));
}

// Joins a tile of 32 full rows of slots with the residuals, and writes the weights. All lanes must call it.
template <u32 ITEM>
__device__ inline void write_full_slots(const DenseRows &rows, const u32 *tile, u32 done, u32 lane) {
    const u32 words = ITEM == 2 ? 1 : 3, at_once = ITEM == 2 ? 16 : 4;  // words of four weights' residuals
    u32 column = lane % SLOT_WORDS, second = lane / SLOT_WORDS, from = (done + 4 * column) * (ITEM - 1);
    u8 *to = rows.to + done * ITEM;
    tile += second * SLOT_ROW + column;
#pragma unroll
    for (u32 begin = 0; begin < WARP; begin += 2 * at_once) {
        u32 loaded[at_once * words];
#pragma unroll
        for (u32 i = 0; i < at_once; i++) {  // issues all loads before the first result is needed
            u32 at = (u32)__shfl_sync(ALL_LANES, rows.residuals, begin + 2 * i + second) + from;
#pragma unroll
            for (u32 k = 0; k < words; k++) loaded[i * words + k] = some_word(rows.chunk, at + 4 * k);
        }
#pragma unroll
        for (u32 i = 0; i < at_once; i++) {
            write_four<ITEM>(rows.base, tile[(begin + 2 * i) * SLOT_ROW], loaded + i * words, to);
            to += rows.step;
        }
    }
}

// Joins the slots from `done` on of the warp's segments with the residuals, and writes the weights. All lanes must call
// it.
template <u32 ITEM>
__device__ inline void write_slots(const Warp &warp, const DenseRows &rows, const u32 *tile, u32 done, u32 lane) {
    if (rows.are_full && done + SLOTS <= rows.segment) {
        write_full_slots<ITEM>(rows, tile, done, lane);
        return;
    }
    for (u32 row = 0; row < least(WARP, warp.job->stop - warp.first); row++) {
        u32 positions = positions_of(*warp.recipe, *warp.job, warp.first + row);
        u32 at = (u32)__shfl_sync(ALL_LANES, rows.residuals, row);
        if (positions <= done) continue;
        u8 *to = place_of_row<ITEM>(warp, done, row);
        for (u32 i = lane; i < least(positions - done, SLOTS); i += WARP) {
            u32 slot = ((const u8 *)(tile + row * SLOT_ROW))[i];
            write_one<ITEM>(rows.chunk, rows.base, slot, at + (done + i) * (ITEM - 1), to + i * ITEM);
        }
    }
}

// ------------------------------------------------------------------------------------------------- segments

// Returns the state at the beginning of segment `s`. WIDTH: residual bits; 0: the recipe has them.
template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline DenseLane open_dense(
    const Warp &warp, u32 *index, const DenseTables<TABLES> &tables, u32 *ring, u32 s, u32 lane_number
) {
    const u8 *bytes = (const u8 *)warp.recipe;
    const Stream &stream = warp.recipe->streams[FINGERPRINTS];
    Chunk chunk = chunk_of(*warp.job);
    u32 code_and_trim = stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, CODE_ROW)[s];
    u32 code = code_and_trim & 0xFFFF;
    u32 residuals = stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, RESIDUAL_ROW)[s];
    u32 prefix = stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s];
    DenseLane lane;
    lane.prefix = ring_at<4>(chunk, prefix, ring, lane_number);
    close_copies();
    if (WIDTH == 0) lane.residual = reader_at(chunk, residuals);
    lane.residuals = residuals / 8;
    lane.entries = (const u32 *)(bytes + stream.entries) + (code << stream.bits);
    lane.first = tables.first + (is_many(TABLES) ? code * SHORT_ENTRIES : lane_number % COPIES);
    lane.second = tables.second;
    lane.start = is_long(TABLES) ? tables.starts[code] : 0;
    lane.bits = stream.bits;
    lane.trim = code_and_trim >> 16;
    lane.shift = WIDTH ? WIDTH : stream.constant;
    lane.width = lane.shift - lane.trim;
    lane.base = (u32) * (const u64 *)(bytes + stream.first);
    if (ITEM == 2) lane.base |= lane.base << 16;
    return lane;
}

// The shared memory of a block.
template <u32 ITEM, u32 WIDTH, Tables TABLES> struct DenseMemory {
    alignas(16) u32 rings[WARPS][ring_words<4>()];
    DenseTables<TABLES> tables;
    u32 tiles[WARPS][WARP * (WIDTH ? (u32)SLOT_ROW : row_words(ITEM))];
};

// Decodes the warp's segments. Returns each lane's error word.
template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline u32 decode_dense(
    const Warp &warp, u32 *index, DenseMemory<ITEM, WIDTH, TABLES> &memory, u32 own, u32 lane_number
) {
    const u32 columns = WIDTH ? (u32)SLOTS : tile_positions(ITEM);
    u32 s = warp.first + lane_number, rows = positions_of(*warp.recipe, *warp.job, warp.first);
    bool there = s < warp.job->stop;
    u32 positions = there ? positions_of(*warp.recipe, *warp.job, s) : 0, *tile = memory.tiles[own];
    DenseLane lane = {};
    if (there) lane = open_dense<ITEM, WIDTH, TABLES>(warp, index, memory.tables, memory.rings[own], s, lane_number);
    DenseRows all = rows_of<ITEM>(warp, lane, lane_number);
    for (u32 done = 0; done < rows; done += columns) {
        u32 count = positions > done ? least(columns, positions - done) : 0;
        if constexpr (WIDTH) {
            if (count) fill_slots<TABLES>(lane, count, tile + lane_number * SLOT_ROW);
            __syncwarp();  // before a shuffle, which does not order memory
            write_slots<ITEM>(warp, all, tile, done, lane_number);
        } else {
            if (count) fill_dense<ITEM, TABLES>(lane, count, tile + lane_number * row_words(ITEM));
            __syncwarp();
            write_tile<ITEM>(warp, tile, done, lane_number);
        }
        __syncwarp();
    }
    wait_for_copies();  // for other blocks, which get this one's shared memory
    // The end of the residuals needs no check: the index computed it from their number and width.
    u32 end = there ? stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s + 1] : 0;
    return there && lane.prefix.place != end ? (u32)WRONG_END : 0;
}
