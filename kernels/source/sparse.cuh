// Decodes tensors of 2 bytes per weight with a mask of octets or without a mask. A level is a codeword and a residual of
// WIDTH bits: 1, the sign of a magnitude of a quantised tensor; or 8, mantissa and sign of an exact tensor. Quantised
// levels may also have one width and no codewords. The first look-up of a codeword returns what the codeword means: the
// octet, the pattern of the magnitude, or the class's first level.
//
// A lane decodes 32 positions at a time: first a word of the mask, with four look-ups; then four survivors per step,
// each of which it stores at the position of the next bit in that word. The signs of all survivors of a word are read
// together from the residual plane; of residual bytes, four are read per step. If a stream has one class, its levels,
// including signs, are in the residual plane, and the look-up uses this plane.
#pragma once
#include "short.cuh"

// A tile: 32 positions per row, and one word of padding between the rows.
enum : u32 { SPARSE_TILE = 32, SPARSE_ROW = SPARSE_TILE / 2 + 1 };

// Entries for the next 8 bits: codeword length, 0 for a longer codeword | pattern or first level << 16, or octet << 8.
template <u32 CODES> struct SparseTables {
    u32 levels[CODES * SHORT_ENTRIES];
    u16 octets[CODES * SHORT_ENTRIES];
};

// Return the entry of a codeword. Args: entry: from `fill_entry`.
template <u32 WIDTH> __device__ inline u32 level_entry(const u8 *bytes, const Recipe &recipe, u32 entry) {
    const u64 *first = (const u64 *)(bytes + recipe.streams[FINGERPRINTS].first);
    if (WIDTH == 8) return (entry >> 16 & 15) | (u32)first[entry & 255] << 16;
    const u32 *patterns = (const u32 *)(bytes + recipe.patterns);
    return (entry >> 16 & 15) | patterns[first[entry & 255]] << 16;
}

__device__ inline u32 octet_entry(const u8 *bytes, const Stream &stream, u32 entry) {
    const u64 *first = (const u64 *)(bytes + stream.first);
    return (entry >> 16 & 15) | (u32)first[entry & 255] << 8;
}

// Fills the tables. All threads must call it, and synchronise afterwards.
template <u32 WIDTH, u32 CODES>
__device__ inline void fill_sparse(const Recipe &recipe, SparseTables<CODES> &tables, u32 thread) {
    const u8 *bytes = (const u8 *)&recipe;
    const Stream &levels = recipe.streams[FINGERPRINTS], &mask = recipe.streams[MASK];
    const u32 *of_levels = (const u32 *)(bytes + levels.entries), *of_mask = (const u32 *)(bytes + mask.entries);
    u32 window = (1u << levels.bits) - 1, base = (u32) * (const u64 *)(bytes + levels.first);
    for (u32 i = thread; i < (levels.codes ? levels.codes : 1) * SHORT_ENTRIES; i += THREADS) {
        if (levels.codes == 0) {
            u32 level = base + (i & ((1u << levels.constant) - 1));
            tables.levels[i] = levels.constant | ((const u32 *)(bytes + recipe.patterns))[level] << 16;
            continue;
        }
        u32 entry = of_levels[(i >> SHORT << levels.bits) + (i & (SHORT_ENTRIES - 1) & window)];
        tables.levels[i] = (entry >> 16 & 15) > SHORT ? 0 : level_entry<WIDTH>(bytes, recipe, entry);
    }
    if (recipe.mask == NO_MASK) return;
    window = (1u << mask.bits) - 1;
    for (u32 i = thread; i < (mask.codes ? mask.codes : 1) * SHORT_ENTRIES; i += THREADS) {
        u32 entry = i << 8 | SHORT;
        if (mask.codes) {
            u32 whole = of_mask[(i >> SHORT << mask.bits) + (i & (SHORT_ENTRIES - 1) & window)];
            entry = (whole >> 16 & 15) > SHORT ? 0 : octet_entry(bytes, mask, whole);
        }
        tables.octets[i] = (u16)entry;
    }
}

// A stream that is decoded from one plane: the prefix plane, or the residual plane if it has no code.
template <class Entry, u32 WORDS> struct SparseStream {
    Ring<WORDS> reader;
    const Entry *table;  // first look-up of the segment's code
    u32 code;            // its number
};

// Args: ring: the warp's shared memory.
template <class Entry, u32 WORDS>
__device__ inline SparseStream<Entry, WORDS> sparse_stream_at(
    const Warp &warp, u32 *index, const Entry *tables, u32 *ring, u32 number, u32 s, u32 lane_number
) {
    const Recipe &recipe = *warp.recipe;
    u32 row = recipe.streams[number].codes ? (u32)PREFIX_ROW : (u32)RESIDUAL_ROW;
    u32 place = stream_row(index, recipe, *warp.job, number, row)[s];
    SparseStream<Entry, WORDS> out;
    out.code = stream_row(index, recipe, *warp.job, number, CODE_ROW)[s] & 0xFFFF;
    out.reader = ring_at<WORDS>(chunk_of(*warp.job), place, ring, lane_number);
    out.table = tables + out.code * SHORT_ENTRIES;
    return out;
}

template <class Entry, u32 WORDS>
__device__ inline u32 wrong_end_of(
    const SparseStream<Entry, WORDS> &stream, const Warp &warp, u32 *index, u32 number, u32 s
) {
    const Recipe &recipe = *warp.recipe;
    u32 row = recipe.streams[number].codes ? (u32)PREFIX_ROW : (u32)RESIDUAL_ROW;
    u32 end = stream_row(index, recipe, *warp.job, number, row)[s + 1];
    return stream.reader.place != end ? (u32)WRONG_END : 0;
}

// Words per piece of the rings. For 32 positions: levels, and residual bytes, usually have up to 256 bits; signs have 32
// bits; octets have 32 bits, or 48 if codewords can be longer than 8 bits.
enum : u32 { LEVEL_WORDS = 4 };
template <u32 WIDTH> __device__ constexpr u32 residual_words() { return WIDTH == 8 ? 4 : 1; }
template <bool LONG> __device__ constexpr u32 octet_words() { return LONG ? 2 : 1; }
typedef SparseStream<u32, LEVEL_WORDS> LevelStream;
template <bool LONG> using OctetStream = SparseStream<u16, octet_words<LONG>()>;

// The shared memory of a block.
template <bool LONG, u32 WIDTH, u32 CODES> struct SparseMemory {
    alignas(16) u32 levels[WARPS][ring_words<LEVEL_WORDS>()];
    alignas(16) u32 octets[WARPS][ring_words<octet_words<LONG>()>()];
    alignas(16) u32 residuals[WARPS][ring_words<residual_words<WIDTH>()>()];
    SparseTables<CODES> tables;
    u32 tiles[WARPS][WARP * SPARSE_ROW];
};

template <bool LONG, u32 WIDTH> struct SparseLane {
    LevelStream levels;
    OctetStream<LONG> mask;
    Ring<residual_words<WIDTH>()> residuals;
    u32 held, residuals_held;  // bit offsets in the chunk where the available levels and residuals end
    u32 positions, survivors, found, wrong;
    u32 masked, has_residuals;
};

// Returns the entry of the whole table, if the first look-up has none. `bits`: the next bits, the first one lowest.
__device__ inline u32 long_entry(const Stream &stream, const u8 *bytes, u32 code, u32 bits) {
    const u32 *entries = (const u32 *)(bytes + stream.entries) + (code << stream.bits);
    return entries[bits & ((1u << stream.bits) - 1)];
}

// Returns the entry for the next bits. LONG: whether codewords can have more than 8 bits.
template <bool LONG, u32 WIDTH>
__device__ inline u32 level_of(const Recipe &recipe, const LevelStream &levels, u32 bits) {
    u32 entry = levels.table[bits & (SHORT_ENTRIES - 1)];
    if (LONG && (entry & 15) == 0) {
        const u8 *bytes = (const u8 *)&recipe;
        entry = level_entry<WIDTH>(bytes, recipe, long_entry(recipe.streams[FINGERPRINTS], bytes, levels.code, bits));
    }
    return entry;
}

template <bool LONG>
__device__ inline u32 octet_of(const Recipe &recipe, const OctetStream<LONG> &mask, u32 bits) {
    u32 entry = mask.table[bits & (SHORT_ENTRIES - 1)];
    if (LONG && (entry & 15) == 0) {
        const u8 *bytes = (const u8 *)&recipe;
        const Stream &stream = recipe.streams[MASK];
        entry = octet_entry(bytes, stream, long_entry(stream, bytes, mask.code, bits));
    }
    return entry;
}

// The number of codewords that always fit into 32 bits: this many are looked up before the reader advances.
template <bool LONG> __device__ constexpr u32 at_once() { return LONG ? 2 : 4; }

// Notes where the levels and residual bytes end that were copied so far, and begins to copy the following ones.
template <bool LONG, u32 WIDTH> __device__ inline void go_on(SparseLane<LONG, WIDTH> &lane) {
    lane.held = lane.levels.reader.next * piece_bits<LEVEL_WORDS>();
    top_up(lane.levels.reader);
    top_up(lane.levels.reader);
    if (WIDTH == 8) {
        lane.residuals_held = lane.residuals.next * piece_bits<residual_words<WIDTH>()>();
        top_up(lane.residuals);
        top_up(lane.residuals);
    }
}

// Called before each word: begins new copies, and waits for all earlier ones.
template <bool LONG, u32 WIDTH> __device__ inline void begin_word(SparseLane<LONG, WIDTH> &lane) {
    go_on(lane);
    if (lane.masked) top_up(lane.mask.reader);
    if (WIDTH == 1 && lane.has_residuals) top_up(lane.residuals);
    close_copies();
    wait_for_all_but<1>();
}

// Returns whether the available bits may be too few for the next step, which then has to wait. This is rare.
template <bool LONG, u32 WIDTH> __device__ inline bool is_behind(const SparseLane<LONG, WIDTH> &lane) {
    bool levels = lane.held - lane.levels.reader.place < 2 * WARP;
    return levels || (WIDTH == 8 && lane.residuals_held - lane.residuals.place < 2 * WARP);
}

template <bool LONG, u32 WIDTH> __device__ inline void catch_up(SparseLane<LONG, WIDTH> &lane) {
    go_on(lane);
    wait_for_copies();
    go_on(lane);
    close_copies();
}

// Decodes the mask bits of `count` positions, at most 32, the first one lowest.
template <bool LONG, u32 WIDTH>
__device__ inline u32 next_word(const Recipe &recipe, SparseLane<LONG, WIDTH> &lane, u32 count) {
    u32 all = 0xFFFFFFFF >> (32 - count), word = 0;
    if (!lane.masked) return all;
#pragma unroll
    for (u32 begin = 0; begin < 4; begin += at_once<LONG>()) {
        u32 bits = peek(lane.mask.reader), taken = 0;
#pragma unroll
        for (u32 i = begin; i < begin + at_once<LONG>(); i++) {
            u32 entry = octet_of<LONG>(recipe, lane.mask, __funnelshift_r(bits, 0, taken));
            bool there = 8 * i < count;
            taken += there ? entry & 15 : 0;
            word |= there ? entry >> 8 << 8 * i : 0;
        }
        skip(lane.mask.reader, taken);
    }
    if (word & ~all) lane.wrong = WRONG_MASK;  // bits after the last position (R-MSK-006)
    word &= all;
    lane.found += __popc(word);
    return word;
}

// Writes the weights of 32 positions to a lane's row, with zeros at pruned positions. After the last survivor, a step
// writes its other weights to position 32, which is padding.
//
// Args: word: the mask bits of the positions.
template <bool LONG, u32 WIDTH>
__device__ inline void put_word(const Recipe &recipe, SparseLane<LONG, WIDTH> &lane, u32 word, u32 *row) {
    u32 residuals = 0, left = __brev(word);  // the first position, and the next sign, highest
    if (WIDTH == 1 && lane.has_residuals) {
        residuals = __brev(peek(lane.residuals));
        skip(lane.residuals, __popc(word));
    }
#pragma unroll
    for (u32 i = 0; i < 16; i++) row[i] = 0;
    while (left) {
        if (is_behind(lane)) catch_up(lane);
        u32 bits = peek(lane.levels.reader), survivors = __popc(left), taken = 0, sum = 0;
        if (WIDTH == 8) {
            residuals = peek(lane.residuals);
            skip(lane.residuals, 8 * least(survivors, at_once<LONG>()));
        }
#pragma unroll
        for (u32 i = 0; i < at_once<LONG>(); i++) {
            // A funnel shift uses only the lowest 5 bits of the sum, which are at most 24 when it is a shift.
            u32 entry = level_of<LONG, WIDTH>(recipe, lane.levels, __funnelshift_r(bits, 0, sum));
            u32 place = (u32)__clz((int)left), pattern = (entry ^ (residuals & 0x80000000)) >> 16;
            if (WIDTH == 8) {
                u32 level = (entry >> 16) + (residuals >> 8 * i & 255);
                pattern = level >> 1 | level << 15;
            }
            ((u16 *)row)[place] = (u16)pattern;
            left &= ~__funnelshift_r(0x80000000, 0x80000000, place);
            if (WIDTH == 1) residuals <<= 1;
            sum += entry;
            if (i < survivors) taken = sum;
        }
        skip(lane.levels.reader, taken & 63);
    }
}

// Decodes the warp's segments. Returns each lane's error word.
template <bool LONG, u32 WIDTH, u32 CODES>
__device__ inline u32 decode_sparse(
    const Warp &warp, u32 *index, SparseMemory<LONG, WIDTH, CODES> &memory, u32 own, u32 lane_number
) {
    const Recipe &recipe = *warp.recipe;
    u32 s = warp.first + lane_number, positions = positions_of(recipe, *warp.job, warp.first);
    u32 *tile = memory.tiles[own], *row = tile + lane_number * SPARSE_ROW;
    u32 rows = least(WARP, warp.job->stop - warp.first);
    u32 last = positions_of(recipe, *warp.job, warp.first + rows - 1);
    bool there = lane_number < rows;
    SparseLane<LONG, WIDTH> lane = {};
    lane.masked = recipe.mask != NO_MASK;
    lane.has_residuals = recipe.streams[FINGERPRINTS].codes != 0;
    if (there) {
        lane.positions = positions_of(recipe, *warp.job, s);
        lane.survivors = survivors_row(index, *warp.job)[s];
        lane.levels = sparse_stream_at<u32, LEVEL_WORDS>(
            warp, index, memory.tables.levels, memory.levels[own], FINGERPRINTS, s, lane_number
        );
        if (lane.masked) {
            lane.mask = sparse_stream_at<u16, octet_words<LONG>()>(
                warp, index, memory.tables.octets, memory.octets[own], MASK, s, lane_number
            );
        }
        u32 place = stream_row(index, recipe, *warp.job, FINGERPRINTS, RESIDUAL_ROW)[s];
        lane.residuals = ring_at<residual_words<WIDTH>()>(
            chunk_of(*warp.job), place, memory.residuals[own], lane_number
        );
        close_copies();
    }
    for (u32 done = 0; done < positions; done += SPARSE_TILE) {
        if (lane.positions > done) {
            begin_word(lane);
            u32 word = next_word<LONG, WIDTH>(recipe, lane, least(SPARSE_TILE, lane.positions - done));
            put_word<LONG, WIDTH>(recipe, lane, word, row);
        }
        __syncwarp();
        if (rows == WARP && last >= done + SPARSE_TILE) write_full_tile<2, SPARSE_TILE>(warp, tile, done, lane_number);
        else write_part<2, SPARSE_TILE>(warp, tile, done, rows, lane_number);
        __syncwarp();
    }
    wait_for_copies();  // for other blocks, which get this one's shared memory
    if (!there) return 0;
    u32 wrong = wrong_end_of(lane.levels, warp, index, FINGERPRINTS, s);
    if (!lane.masked) return wrong;
    wrong |= lane.wrong | wrong_end_of(lane.mask, warp, index, MASK, s);
    return lane.found != lane.survivors ? wrong | WRONG_MASK : wrong;
}
