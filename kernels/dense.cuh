// Weights of tensors that are dense and exact: the class is the exponent, the residual mantissa and sign. No level
// is ever made: code, residual and weight stay in 32-bit registers.
//
// The first look-up of a code takes 8 bits. With one code its table is copied for every bank of shared memory, so
// that the look-ups of a warp never wait for one another; longer codewords take a second look-up in `entries`.
#pragma once
#include "decode.cuh"

static const u32 SHORT = 8;  // bits of the first look-up
static const u32 SHORT_ENTRIES = 1u << SHORT;

// An entry of the first look-up: slot << 8 | bits, or 0 for a longer codeword.
__device__ inline u16 short_entry(u32 entry) {
    u32 bits = entry >> 16 & 15;
    return bits > SHORT ? 0 : (u16)((entry & 255) << 8 | bits);
}

// Which first look-up a kernel takes. A short table holds all codewords of its code.
enum Tables { ONE_SHORT, ONE_LONG, SEVERAL };

// Words of shared memory that the first look-ups of a block take.
__device__ constexpr u32 table_words(Tables tables) { return tables == SEVERAL ? 16 * SHORT_ENTRIES / 2 : SHORT_ENTRIES * WARP / 2; }

// Fills a block's first look-ups. All threads take part, and wait for one another after it.
template <Tables TABLES>
__device__ inline void fill_short(const Warp &warp, u16 *table, u32 thread) {
    const u8 *bytes = (const u8 *)warp.recipe;
    const Stream &stream = warp.recipe->streams[FINGERPRINTS];
    const u32 *entries = (const u32 *)(bytes + stream.entries);
    u32 window = (1u << stream.bits) - 1;
    if (TABLES == SEVERAL) {
        for (u32 i = thread; i < stream.codes * SHORT_ENTRIES; i += THREADS) {
            u32 code = i >> SHORT, bits = i & (SHORT_ENTRIES - 1) & window;
            table[i] = short_entry(entries[(code << stream.bits) + bits]);
        }
    } else {
        for (u32 i = thread; i < SHORT_ENTRIES * WARP; i += THREADS) table[i] = short_entry(entries[i / WARP & window]);
    }
}

struct DenseLane {
    Reader prefix, residual;
    const u32 *entries;  // of the segment's code
    const u16 *table;    // the first look-up of the segment's code, this lane's copy
    u32 window, width, trim, base;
    u32 shift;           // residual bits of a class, trimmed ones too
};

// The slot of the next level; 33 bits less those taken since the last `refill` must do.
template <Tables TABLES> __device__ inline u32 dense_slot(DenseLane &lane) {
    u32 first = (u32)lane.prefix.buffer & (SHORT_ENTRIES - 1);
    u32 entry = lane.table[TABLES == SEVERAL ? first : first * WARP];
    if (TABLES != ONE_SHORT && entry == 0) {
        u32 whole = lane.entries[(u32)lane.prefix.buffer & lane.window];
        entry = (whole & 255) << 8 | (whole >> 16 & 15);
    }
    skip(lane.prefix, entry & 255);
    return entry >> 8;
}

// The bit pattern of a weight from its slot and residual.
template <u32 ITEM> __device__ inline u32 dense_pattern(u32 base, u32 slot, u32 shift, u32 residual) {
    u32 level = base + (slot << shift) + residual;
    u32 pattern = level >> 1 | level << (8 * ITEM - 1);
    return ITEM == 4 ? pattern : pattern & ((1u << (8 * ITEM % 32)) - 1);
}

template <u32 WIDTH> __device__ inline u32 dense_residual(DenseLane &lane) {
    if (WIDTH) return take_word(lane.residual, WIDTH);
    u32 residual = take_word(lane.residual, lane.width);
    return lane.trim ? (residual & 1) | residual >> 1 << (lane.trim + 1) : residual;
}

// Fills a lane's row with the next `count` weights. WIDTH: residual bits, or 0 where the lane says.
template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline void fill_dense(DenseLane &lane, u32 count, u32 *row) {
    const u32 per_word = 4 / ITEM;
    u32 position = 0;
    for (; position + 4 <= count; position += 4) {
        u32 patterns[4];
        refill(lane.prefix);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (TABLES != ONE_SHORT && i == 2) refill(lane.prefix);
            patterns[i] = dense_slot<TABLES>(lane);
        }
        u32 four = WIDTH == 8 ? take_word(lane.residual, 32) : 0;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 residual = WIDTH == 8 ? four >> 8 * i & 255 : dense_residual<WIDTH>(lane);
            patterns[i] = dense_pattern<ITEM>(lane.base, patterns[i], lane.shift, residual);
        }
#pragma unroll
        for (u32 i = 0; i < ITEM; i++) {
            u32 word = 0;
#pragma unroll
            for (u32 j = 0; j < per_word; j++) word |= patterns[i * per_word + j] << 8 * ITEM * j % 32;
            row[position / per_word + i] = word;
        }
    }
    for (; position < count; position++) {
        refill(lane.prefix);
        u32 slot = dense_slot<TABLES>(lane);
        put<ITEM>(row, position, dense_pattern<ITEM>(lane.base, slot, lane.shift, dense_residual<WIDTH>(lane)));
    }
}

template <u32 WIDTH, Tables TABLES>
__device__ inline DenseLane open_dense(
    const Warp &warp, u32 *index, const u16 *table, u32 s, u32 lane_number
) {
    const u8 *bytes = (const u8 *)warp.recipe;
    const Stream &stream = warp.recipe->streams[FINGERPRINTS];
    u32 code_and_trim = stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, CODE_ROW)[s];
    u32 code = code_and_trim & 0xFFFF;
    DenseLane lane;
    lane.prefix = reader_at(chunk_of(*warp.job), stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, PREFIX_ROW)[s]);
    lane.residual = reader_at(chunk_of(*warp.job), stream_row(index, *warp.recipe, *warp.job, FINGERPRINTS, RESIDUAL_ROW)[s]);
    lane.entries = (const u32 *)(bytes + stream.entries) + (code << stream.bits);
    lane.table = table + (TABLES == SEVERAL ? code * SHORT_ENTRIES : lane_number);
    lane.window = (1u << stream.bits) - 1;
    lane.trim = code_and_trim >> 16;
    lane.shift = WIDTH ? WIDTH : stream.constant;
    lane.width = lane.shift - lane.trim;
    lane.base = (u32) * (const u64 *)(bytes + stream.first);
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
    if (there) lane = open_dense<WIDTH, TABLES>(warp, index, table, s, lane_number);
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
    return there && place_of(lane.prefix) != end ? WRONG_END : 0;
}
