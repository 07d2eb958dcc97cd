// Weights of tensors that are dense and exact: the class is the exponent, the residual mantissa and sign. No level
// is ever made: code, residual and weight stay in 32-bit registers.
//
// Where residuals are whole bytes, lanes decode codewords alone: a tile has a byte a weight, the slot, and the warp joins
// a row with the row's residuals, which lie side by side in the file, when it writes the weights out.
//
// The first look-up of a code takes 8 bits. With one code its table is copied for every two banks of shared memory, so
// that the look-ups of a warp seldom wait for one another; longer codewords take a second look-up in tables of the
// windows that begin with no shorter one, as far as there is room, and in `entries` else.
//
// Four weights at a time. Their codewords, of at most 8 bits, all lie in the 32 bits that a ring gives, so it is read
// once for four; codewords of up to 12 bits go by twos.
#pragma once
#include "decode.cuh"
#include "ring.cuh"

// Bits and entries of the first look-up; its copies where there is one code; entries of the second.
enum : u32 { SHORT = 8, SHORT_ENTRIES = 1u << SHORT, COPIES = 16, LONG_ENTRIES = 2048 };

// An entry of the first look-up: bits taken | slot << 8, or 0 for a longer codeword.
__device__ inline u16 short_entry(u32 entry) {
    u32 bits = entry >> 16 & 15;
    return bits > SHORT ? 0 : (u16)(bits | (entry & 255) << 8);
}

__device__ inline u32 long_entry_of(u32 entry) { return (entry >> 16 & 15) | (entry & 255) << 8; }

// Which first look-ups a kernel has: of one code or of several; short ones hold all codewords.
enum Tables { ONE_SHORT, ONE_LONG, MANY_SHORT, MANY_LONG };

__device__ constexpr bool is_many(Tables tables) { return tables == MANY_SHORT || tables == MANY_LONG; }
__device__ constexpr bool is_long(Tables tables) { return tables == ONE_LONG || tables == MANY_LONG; }

// What a block has of its codes in shared memory.
template <Tables TABLES> struct DenseTables {
    u16 first[16 * SHORT_ENTRIES];  // of one code for each window its copies, of several one after another
    // Of windows of all bits, their first bit highest, those of a code from the least one on that begins with no short
    // codeword; in `starts` where window 0 would be, or NOT_HELD.
    u16 second[is_long(TABLES) ? (u32)LONG_ENTRIES : 2];
    u32 starts[is_long(TABLES) ? 16 : 1];
};
enum : u32 { NOT_HELD = 0x80000000 };

// How many windows of 8 bits, the first one highest, begin with a codeword of at most 8; the others lie above.
__device__ inline u32 short_windows(const u16 *lengths) {
    u32 windows = 0;
#pragma unroll
    for (u32 bits = 1; bits <= SHORT; bits++) windows += (u32)lengths[bits] << (SHORT - bits);
    return windows;
}

// Fills a block's second look-ups; see `fill_tables_of_block`.
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

// Fills a block's look-ups. All threads take part, and wait for one another after it.
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
    Reader residual;     // where residuals are no whole bytes
    const u32 *entries;  // of the segment's code
    const u16 *first;    // the first look-up of the segment's code, this lane's copy
    const u16 *second;
    u32 start;           // in `second`
    u32 bits;            // of a window
    u32 width, trim;
    u32 base;            // the first level; for weights of 2 bytes twice, in either half
    u32 shift;           // residual bits of a class, trimmed ones too
    u32 residuals;       // where whole bytes begin
};

// The first look-up's entry for some bits, the next one lowest.
template <Tables TABLES> __device__ inline u32 look_up(const DenseLane &lane, u32 bits) {
    u32 window = bits & (SHORT_ENTRIES - 1);
    u32 entry = lane.first[is_many(TABLES) ? window : window * COPIES];
    if (is_long(TABLES) && entry == 0) {
        if (lane.start != NOT_HELD) return lane.second[lane.start + (__brev(bits) >> (WARP - lane.bits))];
        return long_entry_of(lane.entries[bits & ((1u << lane.bits) - 1)]);
    }
    return entry;
}

// The entries of the next four codewords. The sum of some entries has the bits that they take in its lowest byte,
// at most 24 where it shifts: a funnel shift looks at the lowest 5 bits alone.
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

// Codewords that take a piece of the ring at most.
template <Tables TABLES> __device__ constexpr u32 round_of() { return is_long(TABLES) ? 8 : 16; }

// Once a round.
__device__ inline void begin_round(DenseLane &lane) {
    top_up(lane.prefix);
    close_copies();
    wait_for_all_but<1>();
}

__device__ inline u32 dense_residual(DenseLane &lane) {
    u32 residual = take_word(lane.residual, lane.width);
    return lane.trim ? (residual & 1) | residual >> 1 << (lane.trim + 1) : residual;
}

// The bit pattern of a weight from the first level, that of its class counted from there, and its residual.
template <u32 ITEM> __device__ inline u32 pattern_of(u32 base, u32 of_class, u32 residual) {
    u32 level = base + of_class + residual;
    return ITEM == 4 ? __funnelshift_r(level, level, 1) : (level & 0xFFFF) >> 1 | (level & 1) << 15;
}

template <u32 ITEM> __device__ inline u32 dense_pattern(const DenseLane &lane, u32 entry, u32 residual) {
    return pattern_of<ITEM>(lane.base, entry >> 8 << lane.shift, residual);
}

// Two weights of 2 bytes whose residuals are bytes: `pick` has the bytes' places, each followed by a slot's.
__device__ inline u32 two_patterns(u32 base, u32 slots, u32 residuals, u32 pick) {
    u32 levels = base + __byte_perm(residuals, slots, pick);  // of two halves, neither of which runs over
    return (levels >> 1 & 0x7FFF7FFF) | (levels << 15 & 0x80008000);
}

// A weight of 4 bytes whose residual is three, the slot above it.
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

// A tile of slots: a byte each. DenseRows begin in different banks.
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

// Four weights of 2 bytes, in two words, from their slots and residuals.
__device__ inline void join_2(u32 base, u32 slots, u32 residuals, u32 *words) {
    words[0] = two_patterns(base, slots, residuals, 0x5140);
    words[1] = two_patterns(base, slots, residuals, 0x7362);
}

// Four weights of 4 bytes; their residuals, of three bytes, fill three words.
__device__ inline void join_4(u32 base, u32 slots, const u32 *residuals, u32 *words) {
    u32 second = __funnelshift_r(residuals[0], residuals[1], 24);
    u32 third = __funnelshift_r(residuals[1], residuals[2], 16);
    words[0] = one_pattern(base, __byte_perm(residuals[0], slots, 0x4210));
    words[1] = one_pattern(base, __byte_perm(second, slots, 0x5210));
    words[2] = one_pattern(base, __byte_perm(third, slots, 0x6210));
    words[3] = one_pattern(base, __byte_perm(residuals[2], slots, 0x7321));
}

// Two words, or four, stored by one instruction.
struct alignas(8) Two {
    u32 a, b;
};

// Where the weights and residuals of the warp's rows are, two rows at a time, four weights a lane: what does not change
// from tile to tile.
struct DenseRows {
    Chunk chunk;
    u32 residuals;  // where this lane's segment's begin
    u32 base;       // as `DenseLane`
    u8 *to;         // where this lane's first four weights go
    u32 step;       // bytes from two rows to the next two
    u32 segment;    // positions of a full row
    bool are_full;  // whether all are there, as long as the first, and can be written by four weights
};

template <u32 ITEM> __device__ inline DenseRows rows_of(const Warp &warp, const DenseLane &lane, u32 lane_number) {
    u32 rows = least(WARP, warp.job->stop - warp.first);
    u32 last = positions_of(*warp.recipe, *warp.job, warp.first + rows - 1);
    DenseRows out;
    out.chunk = chunk_of(*warp.job);
    out.residuals = lane.residuals;
    out.base = (u32)__shfl_sync(ALL_LANES, lane.base, 0);  // lanes without a segment write, too
    out.to = place_of_row<ITEM>(warp, lane_number % SLOT_WORDS * 4, lane_number / SLOT_WORDS);
    out.segment = warp.recipe->segment;
    out.step = 2 * out.segment * ITEM;
    out.are_full = rows == WARP && last == out.segment && warp.out % (4 * ITEM) == 0;
    return out;
}

// Four bytes of a chunk, or some others of it where its end comes before: nothing waits for a comparison then.
__device__ inline u32 some_word(Chunk chunk, u32 offset) {
    return *(const u32 *)(chunk.data + least(offset, chunk.length - 4));
}

// Writes out a tile whose rows are all there and full, joined with their residuals. All lanes take part.
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
        for (u32 i = 0; i < at_once; i++) {  // all are on their way before the first is needed
            u32 at = (u32)__shfl_sync(ALL_LANES, rows.residuals, begin + 2 * i + second) + from;
#pragma unroll
            for (u32 k = 0; k < words; k++) loaded[i * words + k] = some_word(rows.chunk, at + 4 * k);
        }
#pragma unroll
        for (u32 i = 0; i < at_once; i++) {
            u32 slots = tile[(begin + 2 * i) * SLOT_ROW], out[ITEM];
            if constexpr (ITEM == 2) {
                join_2(rows.base, slots, loaded[i], out);
                *(Two *)to = {out[0], out[1]};
            } else {
                join_4(rows.base, slots, loaded + 3 * i, out);
                *(Words *)to = {out[0], out[1], out[2], out[3]};
            }
            to += rows.step;
        }
    }
}

// Writes out the rows of the warp's segments, which hold the slots from `done` on. All lanes take part.
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
            u32 slot = ((const u8 *)(tile + row * SLOT_ROW))[i], residual = 0;
            for (u32 k = 0; k < ITEM - 1; k++) residual |= byte_at(rows.chunk, at + (done + i) * (ITEM - 1) + k) << 8 * k;
            put<ITEM>((u32 *)to, i, pattern_of<ITEM>(rows.base, slot << 8 * (ITEM - 1), residual));
        }
    }
}

// ------------------------------------------------------------------------------------------------- segments

// WIDTH: residual bits, or 0 where the lane says.
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

// What a block has in shared memory.
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
    // Residuals end where the index has it by their number and width.
    u32 end = there ? stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s + 1] : 0;
    return there && lane.prefix.place != end ? (u32)WRONG_END : 0;
}
