// Weights of tensors that are dense and exact: the class is the exponent, the residual mantissa and sign. No level
// is ever made: code, residual and weight stay in 32-bit registers.
//
// The first look-up of a code takes 8 bits. With one code its table is copied for every bank of shared memory, so
// that the look-ups of a warp never wait for one another; longer codewords take a second look-up in `entries`.
//
// Four weights at a time. Their codewords, of at most 8 bits, all lie in the 32 bits that a `Reader` has at hand, so
// it goes on once for four; codewords of up to 12 bits go by twos.
#pragma once
#include "decode.cuh"

enum : u32 { SHORT = 8, SHORT_ENTRIES = 1u << SHORT };  // bits and entries of the first look-up

// An entry of the first look-up: bits taken | slot << 8, or 0 for a longer codeword.
__device__ inline u16 short_entry(u32 entry) {
    u32 bits = entry >> 16 & 15;
    return bits > SHORT ? 0 : (u16)(bits | (entry & 255) << 8);
}

// Which first look-ups a kernel has: of one code or of several; short ones hold all codewords.
enum Tables { ONE_SHORT, ONE_LONG, MANY_SHORT, MANY_LONG };

__device__ constexpr bool is_many(Tables tables) { return tables == MANY_SHORT || tables == MANY_LONG; }
__device__ constexpr bool is_long(Tables tables) { return tables == ONE_LONG || tables == MANY_LONG; }

// Words of shared memory that the first look-ups of a block take.
__device__ constexpr u32 table_words(Tables tables) {
    return (is_many(tables) ? 16 : (u32)WARP) * SHORT_ENTRIES / 2;
}

// Fills a block's first look-ups. All threads take part, and wait for one another after it.
template <Tables TABLES> __device__ inline void fill_short(const Warp &warp, u16 *table, u32 thread) {
    const Stream &stream = warp.recipe->streams[FINGERPRINTS];
    const u32 *entries = (const u32 *)((const u8 *)warp.recipe + stream.entries);
    u32 window = (1u << stream.bits) - 1, count = (is_many(TABLES) ? stream.codes : (u32)WARP) * SHORT_ENTRIES;
    for (u32 i = thread; i < count; i += THREADS) {
        if (is_many(TABLES)) {
            table[i] = short_entry(entries[(i >> SHORT << stream.bits) + (i & (SHORT_ENTRIES - 1) & window)]);
        } else {
            table[i] = short_entry(entries[i / WARP & window]);
        }
    }
}

struct DenseLane {
    Reader prefix, residual;
    const u32 *entries;  // of the segment's code
    const u16 *table;    // the first look-up of the segment's code, this lane's copy
    u32 window, width, trim;
    u32 base;            // the first level; for weights of 2 bytes twice, in either half
    u32 shift;           // residual bits of a class, trimmed ones too
};

// The first look-up's entry for some bits, the next one lowest.
template <Tables TABLES> __device__ inline u32 look_up(const DenseLane &lane, u32 bits) {
    u32 first = bits & (SHORT_ENTRIES - 1);
    u32 entry = lane.table[is_many(TABLES) ? first : first * WARP];
    if (is_long(TABLES) && entry == 0) {
        u32 whole = lane.entries[bits & lane.window];
        entry = (whole >> 16 & 15) | (whole & 255) << 8;
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

template <u32 WIDTH> __device__ inline u32 dense_residual(DenseLane &lane) {
    if (WIDTH) return take_word(lane.residual, WIDTH);
    u32 residual = take_word(lane.residual, lane.width);
    return lane.trim ? (residual & 1) | residual >> 1 << (lane.trim + 1) : residual;
}

// The bit pattern of a weight from its entry and residual.
template <u32 ITEM> __device__ inline u32 dense_pattern(const DenseLane &lane, u32 entry, u32 residual) {
    u32 level = lane.base + (entry >> 8 << lane.shift) + residual;
    return ITEM == 4 ? __funnelshift_r(level, level, 1) : (level & 0xFFFF) >> 1 | (level & 1) << 15;
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

// Writes four weights to a lane's row: `words`, at a multiple of four weights.
template <u32 ITEM, u32 WIDTH, Tables TABLES> __device__ inline void put_four(DenseLane &lane, u32 *words) {
    u32 entries[4];
    four_entries<TABLES>(lane, entries);
    if constexpr (ITEM == 2 && WIDTH == 8) {
        // A segment's residuals begin at a multiple of 32 bytes: a word has four, and nothing is to be shifted.
        u32 residuals = lane.residual.a;
        lane.residual.place += 32;
        advance(lane.residual);
        words[0] = two_patterns(lane.base, __byte_perm(entries[0], entries[1], 0x0051), residuals, 0x5140);
        words[1] = two_patterns(lane.base, __byte_perm(entries[2], entries[3], 0x0051), residuals, 0x5342);
    } else if constexpr (ITEM == 4 && WIDTH == 24) {
        // And three words have four of three bytes.
        u32 residuals[3];
#pragma unroll
        for (u32 i = 0; i < 3; i++) {
            residuals[i] = lane.residual.a;
            advance(lane.residual);
        }
        lane.residual.place += 96;
        u32 second = __funnelshift_r(residuals[0], residuals[1], 24);
        u32 third = __funnelshift_r(residuals[1], residuals[2], 16);
        words[0] = one_pattern(lane.base, __byte_perm(residuals[0], entries[0], 0x5210));
        words[1] = one_pattern(lane.base, __byte_perm(second, entries[1], 0x5210));
        words[2] = one_pattern(lane.base, __byte_perm(third, entries[2], 0x5210));
        words[3] = one_pattern(lane.base, __byte_perm(residuals[2], entries[3], 0x5321));
    } else if constexpr (ITEM == 4) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) words[i] = dense_pattern<4>(lane, entries[i], dense_residual<WIDTH>(lane));
    } else {
        for (u32 i = 0; i < 4; i += 2) {
            u32 low = dense_pattern<2>(lane, entries[i], dense_residual<WIDTH>(lane));
            words[i / 2] = low | dense_pattern<2>(lane, entries[i + 1], dense_residual<WIDTH>(lane)) << 16;
        }
    }
}

// Fills a lane's row with the next `count` weights. WIDTH: residual bits, or 0 where the lane says.
template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline void fill_dense(DenseLane &lane, u32 count, u32 *row) {
    u32 position = 0;
    if (count == tile_positions(ITEM)) {
#pragma unroll 2
        for (; position < tile_positions(ITEM); position += 4, row += ITEM) put_four<ITEM, WIDTH, TABLES>(lane, row);
        return;
    }
    for (; position < count; position++) {
        u32 entry = look_up<TABLES>(lane, peek(lane.prefix));
        skip(lane.prefix, entry & 255);
        put<ITEM>(row, position, dense_pattern<ITEM>(lane, entry, dense_residual<WIDTH>(lane)));
    }
}

template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline DenseLane open_dense(const Warp &warp, u32 *index, const u16 *table, u32 s, u32 lane_number) {
    const u8 *bytes = (const u8 *)warp.recipe;
    const Stream &stream = warp.recipe->streams[FINGERPRINTS];
    Chunk chunk = chunk_of(*warp.job);
    u32 code_and_trim = stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, CODE_ROW)[s];
    u32 code = code_and_trim & 0xFFFF;
    DenseLane lane;
    lane.prefix = reader_at(chunk, stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s]);
    lane.residual = reader_at(chunk, stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, RESIDUAL_ROW)[s]);
    lane.entries = (const u32 *)(bytes + stream.entries) + (code << stream.bits);
    lane.table = table + (is_many(TABLES) ? code * SHORT_ENTRIES : lane_number);
    lane.window = (1u << stream.bits) - 1;
    lane.trim = code_and_trim >> 16;
    lane.shift = WIDTH ? WIDTH : stream.constant;
    lane.width = lane.shift - lane.trim;
    lane.base = (u32) * (const u64 *)(bytes + stream.first);
    if (ITEM == 2) lane.base |= lane.base << 16;
    return lane;
}

// Decodes the warp's segments. Returns each lane's error word. `tile`: 32 rows; `table`: filled by `fill_short`.
template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline u32 decode_dense(
    const Warp &warp, u32 *index, u32 *tile, const u16 *table, u32 lane_number
) {
    u32 s = warp.first + lane_number, rows = positions_of(*warp.recipe, *warp.job, warp.first);
    bool there = s < warp.job->stop;
    u32 positions = there ? positions_of(*warp.recipe, *warp.job, s) : 0;
    DenseLane lane = {};
    if (there) lane = open_dense<ITEM, WIDTH, TABLES>(warp, index, table, s, lane_number);
    for (u32 done = 0; done < rows; done += tile_positions(ITEM)) {
        if (positions > done) {
            u32 count = least(tile_positions(ITEM), positions - done);
            fill_dense<ITEM, WIDTH, TABLES>(lane, count, tile + lane_number * row_words(ITEM));
        }
        __syncwarp();
        write_tile<ITEM>(warp, tile, done, lane_number);
        __syncwarp();
    }
    // Residuals end where the index has it by their number and width.
    u32 end = there ? stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s + 1] : 0;
    return there && lane.prefix.place != end ? (u32)WRONG_END : 0;
}
