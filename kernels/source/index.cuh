// Reads the header and the segment index of a chunk (SPEC.md 15.1, 15.2) with one block: checks them, and computes where
// each segment begins in each plane.
//
// There are few chunks, so the time depends on how often a block waits for memory. A block loads from global memory
// three times: the job; the recipe together with the chunk's first bytes, to shared memory; and the bytes around the
// planes, while it writes the index. One warp reads the header, one quantity per lane. Then each thread reads the fields
// of four segments and sums their bits in each plane; for each plane, one warp sums the sums of the threads.
//
// A round is the segments that a block processes at a time; most chunks have one round. If there are more, a first pass,
// from the first round to the last, only sums the bits. It determines where the planes begin. A second pass, from the
// last round to the first, writes the index.
#pragma once
#include "recipe.cuh"

enum : u32 { QUANTITY_BYTES = 8, MAX_INDEX_WIDTH = 32, PART = 16, TAIL = 16, CHUNK_UNIT = 64, MAX_QUANTITIES = 13 };
// Bit offsets of a chunk are u32.
enum : u32 { MAX_CHUNK = 1u << 29 };
enum : u32 {
    EACH = 4,                // segments per thread
    ROUND = EACH * THREADS,  // segments per block
    STAGED = 4096,           // bytes of a chunk that are copied to shared memory: most headers and indexes fit
    PLANES = 2 * STREAMS,
    PLANES_A_WARP = (PLANES + WARPS - 1) / WARPS,
    ROWS = 1 + ROWS_A_STREAM * STREAMS,
    TURNS = STAGED / (THREADS * sizeof(Words)),  // loads per thread to copy them
    RECIPE_WORDS = sizeof(Recipe) / sizeof(Words)
};

// One number for each of a thread's segments.
struct alignas(16) Four {
    u32 of[EACH];
};

// A quantity of the index.
struct alignas(16) Quantity {
    u32 bit;      // bit offset of its fields in the chunk
    u32 minimum;
    u32 width;
    u32 limit;    // its values must be below this
    u32 row;      // row of `IndexMemory` for its values
    u32 shift;    // left shift of its values there
    u32 staged;   // whether its fields are in shared memory
};

// The shared memory of a block. It has rows for all streams, including those that the tensor lacks.
struct IndexMemory {
    Words recipe[RECIPE_WORDS];
    Words staged[TURNS * THREADS];
    Quantity quantities[MAX_QUANTITIES];
    // The part of `index` of a round; bit offsets in planes are relative to the thread's first segment.
    Four rows[ROWS][THREADS];
    Four sums[PLANES][WARP];  // per thread: the bits of its segments in a plane, later of all segments before them
    u32 totals[PLANES];       // bits of all segments so far
    u32 count;                // of quantities
    u32 end;                  // byte where the planes begin
    u32 wrong;                // whether the header has an error
};
static_assert(RECIPE_WORDS * sizeof(Words) == sizeof(Recipe) && (u32)RECIPE_WORDS <= (u32)THREADS, "a word a thread");
static_assert((u32)WARP * (u32)EACH == (u32)THREADS, "a lane has the sums of four threads");

// Adds numbers of bits. A sum that does not fit into 32 bits becomes a number that no chunk can have, so that later
// checks detect it.
__device__ inline u32 sum_of(u32 bits, u32 more) {
    u32 sum = bits + more;
    return sum < bits ? ~0u : sum;
}

// Returns the sum of the values of this lane and of all lanes before it. Valid in the first `LANES` lanes.
template <u32 LANES = WARP> __device__ inline u32 sum_up_to(u32 value, u32 lane) {
    for (u32 step = 1; step < LANES; step *= 2) {
        u32 below = (u32)__shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// The same for numbers of bits, which `sum_of` adds.
__device__ inline u32 bits_up_to(u32 bits, u32 lane) {
    for (u32 step = 1; step < WARP; step *= 2) {
        u32 below = (u32)__shfl_up_sync(ALL_LANES, bits, step);
        bits = sum_of(bits, lane >= step ? below : 0);
    }
    return bits;
}

// Returns the bytes of a part with this number of bits, including its padding.
__device__ inline u32 part_bytes(u32 bits) { return ((bits >> 7) + ((bits & 127) != 0)) * PART; }

// Returns whether one of the bits from bit `from` on of 16 bytes is set.
__device__ inline bool is_set(Words words, u32 from) {
    u32 own = ~0u << (from & 31), seen = from < 128 ? words.d & (from < 96 ? ~0u : own) : 0;
    if (from < 96) seen |= words.c & (from < 64 ? ~0u : own);
    if (from < 64) seen |= words.b & (from < 32 ? ~0u : own);
    if (from < 32) seen |= words.a & own;
    return seen != 0;
}

// Returns the streams of a tensor, one bit each.
__device__ inline u32 streams_of(const Recipe &recipe) {
    u32 streams = 0;
    for (u32 i = 0; i < STREAMS; i++) streams |= (recipe.streams[i].present != 0) << i;
    return streams;
}

// Copies the recipe and the chunk's first bytes to shared memory, with zeros after the chunk's end.
__device__ inline void stage(const Job &job, u32 thread, IndexMemory &memory) {
    Words words[TURNS], of_recipe = {0, 0, 0, 0};
    // Issues all loads before it waits for the first result.
    for (u32 i = 0; i < TURNS; i++) words[i] = words_at(chunk_of(job), (i * THREADS + thread) * sizeof(Words));
    if (thread < RECIPE_WORDS) of_recipe = ((const Words *)job.recipe)[thread];
    for (u32 row = 0; row < ROWS; row++) memory.rows[row][thread] = Four{};
    for (u32 i = 0; i < TURNS; i++) memory.staged[i * THREADS + thread] = words[i];
    if (thread < RECIPE_WORDS) memory.recipe[thread] = of_recipe;
}

// Returns the 16 bytes of the chunk at an offset, a multiple of 16.
__device__ inline Words staged_words(Chunk chunk, u32 at, const IndexMemory &memory) {
    return at < STAGED ? memory.staged[at / sizeof(Words)] : words_at(chunk, at);
}

enum : u32 { ANY = 0xFFFFFFFF };  // a limit above every number of bits that a chunk can have

// Returns whether a tensor's index has the quantity with a number: 0 is the survivors; then each stream has code, trim,
// prefix bits and residual bits. Sets `own` as far as the recipe determines it. Has no branches, because the lanes call
// it with different numbers.
__device__ inline bool has_quantity(const Recipe &recipe, u32 number, Quantity &own) {
    enum : u32 { CODE, TRIM, PREFIX, RESIDUAL, OF_A_STREAM };
    u32 place = number ? (number - 1) / OF_A_STREAM : (u32)MASK, what = (number - 1) % OF_A_STREAM;
    const Stream &stream = recipe.streams[least(place, STREAMS - 1)];
    u32 codes = stream.codes, least_bits = stream.least;
    u32 those = (codes > 1) << CODE | (stream.trimmed != 0) << TRIM | (codes > 0) << PREFIX;
    those |= (stream.differing != 0) << RESIDUAL;
    u32 row = 1 + ROWS_A_STREAM * place + (what < PREFIX ? (u32)CODE_ROW : what - PREFIX + PREFIX_ROW);
    own.row = number ? row : 0;
    own.shift = what == TRIM ? 16 : 0;
    own.limit = what == CODE ? codes : what == TRIM ? least_bits + (least_bits == 0) : ANY;
    return (number < MAX_QUANTITIES) & (stream.present != 0) & ((number == 0) | (those >> what & 1));
}

// Reads the header, and checks all padding before the planes, with one warp. Returns each lane's error word.
__device__ inline u32 read_header(Chunk chunk, const Recipe &recipe, u32 segments, u32 lane, IndexMemory &memory) {
    Quantity own = {};
    bool there = has_quantity(recipe, lane, own);
    u32 present = __ballot_sync(ALL_LANES, there), count = (u32)__popc(present), wrong = 0, bits = 0;
    u32 number = (u32)__popc(present & ((1u << lane) - 1)), head = part_bytes(8 * QUANTITY_BYTES * count);
    if (there) {
        const u32 *header = (const u32 *)memory.staged + QUANTITY_BYTES / 4 * number;
        own.minimum = header[0];
        own.width = header[1] & 255;
        if (header[1] >> 8 || own.width > MAX_INDEX_WIDTH) wrong = WRONG_HEADER, own.width = 0;
        bits = segments * own.width;
    }
    u32 end = head + sum_up_to<MAX_QUANTITIES>(part_bytes(bits), lane), at = end - part_bytes(bits);
    if (chunk.length > MAX_CHUNK) wrong |= NOT_FOR_THIS;
    if ((there ? at + (bits + 7) / 8 : head) + TAIL > chunk.length) wrong |= WRONG_LAYOUT;
    // This lane has no quantity: it checks the padding after the header.
    if (lane == MAX_QUANTITIES) at = 0, bits = 8 * QUANTITY_BYTES * count;
    if (bits % 128 && is_set(staged_words(chunk, at + bits / 128 * PART, memory), bits % 128)) wrong |= WRONG_PADDING;
    own.bit = at * 8;
    own.staged = end + PART <= STAGED;  // the load of a field extends past its end
    if (there) memory.quantities[number] = own;
    bool any = __any_sync(ALL_LANES, wrong != 0);
    if (lane == MAX_QUANTITIES - 1) memory.count = count, memory.end = end, memory.wrong = any;
    return wrong;
}

// The chunk's first bytes in shared memory, with the interface of `Chunk`. The caller has checked the offsets.
struct Staged {
    const u32 *words;
};

__device__ inline u32 word_at(Staged staged, u32 offset) { return staged.words[offset / 4]; }

// Returns the values of a quantity for the segments from `first` on. After the chunk's last segment, repeats its value.
template <class Source> __device__ inline Four values_of(Source source, const Quantity &q, u32 first, u32 last) {
    Four out;
    for (u32 i = 0; i < EACH; i++) {
        u32 bit = q.bit + least(first + i, last) * q.width, at = bit / 32 * 4;
        u32 field = __funnelshift_r(word_at(source, at), word_at(source, at + 4), bit);
        out.of[i] = sum_of(q.minimum, q.width < 32 ? field & ((1u << q.width) - 1) : field);
    }
    return out;
}

// Reads the quantities of a thread's segments, from `first` on, into rows that must be zero. Returns the error word.
__device__ inline u32 read_quantities(Chunk chunk, u32 first, u32 segments, u32 thread, IndexMemory &memory) {
    bool wrong = false;
    u32 count = memory.count;
#pragma unroll 1
    for (u32 i = 0; i < count; i++) {
        Quantity q = memory.quantities[i];
        Staged staged = {(const u32 *)memory.staged};
        Four values = q.staged ? values_of(staged, q, first, segments - 1) : values_of(chunk, q, first, segments - 1);
        Four row = memory.rows[q.row][thread];
        for (u32 k = 0; k < EACH; k++) {
            wrong |= values.of[k] >= q.limit;
            row.of[k] |= values.of[k] << q.shift;
        }
        memory.rows[q.row][thread] = row;
    }
    return wrong ? (u32)WRONG_HEADER : 0;
}

__device__ inline u32 levels_of(u32 rule, u32 positions, u32 survivors) {
    if (rule == COUNT_POSITIONS) return positions;
    if (rule == COUNT_SURVIVORS) return survivors;
    return rule == COUNT_PRUNED ? positions - survivors : (positions + 7) / 8;
}

// Replaces the bits of each of a thread's segments by the sum up to it. Returns the sum of all.
__device__ inline u32 sum_up(Four &bits) {
    for (u32 i = 1; i < EACH; i++) bits.of[i] = sum_of(bits.of[i - 1], bits.of[i]);
    return bits.of[EACH - 1];
}

// Computes the values that the index does not contain, and sums the bits of a thread's segments. Returns the error word.
__device__ inline u32 sum_segments(
    const Recipe &recipe, const Job &job, u32 streams, u32 first, u32 segments, u32 thread, IndexMemory &memory
) {
    bool wrong = false, masked = streams >> MASK & 1;
    Four positions, survivors = memory.rows[0][thread];
    u32 left = first < segments ? job.total - first * recipe.segment : 0;
    for (u32 i = 0; i < EACH; i++) {
        positions.of[i] = least(recipe.segment, left);
        left -= positions.of[i];
        bool beyond = survivors.of[i] > positions.of[i];
        wrong |= positions.of[i] && beyond;  // without positions there is no segment
        if (beyond || !masked) survivors.of[i] = positions.of[i];
    }
    memory.rows[0][thread] = survivors;
#pragma unroll 1
    for (u32 number = 0; number < STREAMS; number++) {
        if (!(streams >> number & 1)) continue;
        const Stream &stream = recipe.streams[number];
        Four *rows = &memory.rows[1 + ROWS_A_STREAM * number][thread];
        Four prefix = rows[THREADS * PREFIX_ROW], residual = rows[THREADS * RESIDUAL_ROW];
        Four code = rows[THREADS * CODE_ROW];
        for (u32 i = 0; i < EACH; i++) {
            // At most 2^24 levels per chunk (R-TEN-007), 64 bits each.
            u32 levels = levels_of(stream.rule, positions.of[i], survivors.of[i]);
            if (!stream.differing) residual.of[i] = levels * (stream.constant - (code.of[i] >> 16));
            if (!positions.of[i]) prefix.of[i] = residual.of[i] = 0;
        }
        ((u32 *)memory.sums[2 * number])[thread] = sum_up(prefix);
        ((u32 *)memory.sums[2 * number + 1])[thread] = sum_up(residual);
        rows[THREADS * PREFIX_ROW] = prefix;
        rows[THREADS * RESIDUAL_ROW] = residual;
    }
    return wrong ? (u32)WRONG_HEADER : 0;
}

// Sums the sums of the threads in a plane, with one warp. `edge` is the number of bits of all segments before a round.
// Forwards: before this round on entry, before the next one on return, unchanged if this is the last. Backwards: before
// the next round on entry, before this one on return.
__device__ inline void sum_threads(u32 plane, u32 lane, bool backwards, bool last, u32 &edge, IndexMemory &memory) {
    Four own = memory.sums[plane][lane], before;
    u32 up_to = bits_up_to(sum_up(own), lane), round = (u32)__shfl_sync(ALL_LANES, up_to, WARP - 1);
    u32 below = (u32)__shfl_up_sync(ALL_LANES, up_to, 1);
    if (backwards) edge -= round;
    before.of[0] = sum_of(edge, lane ? below : 0);
    for (u32 i = 1; i < EACH; i++) before.of[i] = sum_of(before.of[0], own.of[i - 1]);
    memory.sums[plane][lane] = before;
    if (backwards) return;
    u32 total = sum_of(edge, round);
    if (lane == 0) memory.totals[plane] = total;
    if (!last) edge = total;
}

// Where the planes begin, one plane per lane; and 16 bytes in which all bits from bit `from` on must be zero.
struct PlanePlaces {
    u32 start;  // bit offset in the chunk
    u32 from;
    Words around;
};

// Computes where the planes begin. Returns the error word. Loads all padding after the index: at the end of each plane,
// and after the last plane.
__device__ inline u32 place_planes(
    Chunk chunk, u32 streams, u32 lane, const IndexMemory &memory, PlanePlaces &places
) {
    u32 bits = streams >> lane / 2 & 1 ? memory.totals[lane] : 0;
    u32 end = memory.end + sum_up_to<PLANES>(part_bytes(bits), lane);
    u32 planes_end = (u32)__shfl_sync(ALL_LANES, end, PLANES - 1);
    places.start = (end - part_bytes(bits)) * 8;
    if ((planes_end + TAIL + CHUNK_UNIT - 1) / CHUNK_UNIT * CHUNK_UNIT != chunk.length) return WRONG_LAYOUT;
    // The remaining lanes load more bytes than there can be after the planes.
    if (lane < PLANES) places.from = bits % 128 ? bits % 128 : 128;
    places.around = words_at(chunk, lane < PLANES ? end - PART : planes_end + (lane - PLANES) * PART);
    return 0;
}

// Writes a warp's part of a row of a round. `before`: a number to add for each thread, or null.
__device__ inline void write_row(
    u32 *out, const Four *row, const u32 *before, u32 start, u32 first, u32 segments, u32 lane
) {
    for (u32 i = 0; i < EACH; i++) {
        u32 own = i * WARP + lane;
        u32 value = ((const u32 *)row)[own] + start + (before ? before[own / EACH] : 0);
        if (first + own < segments) out[first + own] = value;
    }
}

// Writes the part of a round in the job's part of `index`. Each warp writes the segments of its threads, from `first`
// on, which are contiguous in memory.
__device__ inline void write_round(
    u32 streams, const PlanePlaces &places, u32 first, u32 segments, u32 warp, u32 lane, u32 *out,
    const IndexMemory &memory
) {
    u32 thread = warp * WARP;
    write_row(out, &memory.rows[0][thread], nullptr, 0, first, segments, lane);
    out += segments + 1;
#pragma unroll 1
    for (u32 number = 0; number < STREAMS; number++) {
        if (!(streams >> number & 1)) continue;
        const Four *rows = &memory.rows[1 + ROWS_A_STREAM * number][thread];
        for (u32 row = PREFIX_ROW; row <= RESIDUAL_ROW; row++) {
            u32 plane = 2 * number + row, start = (u32)__shfl_sync(ALL_LANES, places.start, plane);
            const u32 *before = (const u32 *)memory.sums[plane] + thread;
            if (first == 0 && lane == 0) out[0] = start;
            write_row(out + 1, rows + THREADS * row, before, start, first, segments, lane);
            out += segments + 1;
        }
        write_row(out, rows + THREADS * CODE_ROW, nullptr, 0, first, segments, lane);
        out += segments + 1;
    }
}

// Writes a job's part of `index`. Returns each lane's error word. All threads of a block must call it.
__device__ inline u32 index_chunk(Job job, u32 warp, u32 lane, u32 *index, IndexMemory &memory) {
    Chunk chunk = chunk_of(job);
    const Recipe &recipe = *(const Recipe *)memory.recipe;
    u32 thread = warp * WARP + lane, wrong = 0, round = 0;
    stage(job, thread, memory);
    __syncthreads();
    u32 streams = streams_of(recipe), segments = segments_of(recipe, job), rounds = (segments + ROUND - 1) / ROUND;
    if (warp == 0) wrong = read_header(chunk, recipe, segments, lane, memory);
    __syncthreads();
    if (memory.wrong) return wrong;
    u32 edges[PLANES_A_WARP] = {};
    PlanePlaces places = {};
    for (bool writing = false;;) {
        u32 first = round * ROUND + thread * EACH;
        wrong |= read_quantities(chunk, first, segments, thread, memory);
        wrong |= sum_segments(recipe, job, streams, first, segments, thread, memory);
        __syncthreads();
        for (u32 i = 0; i < PLANES_A_WARP; i++) {
            u32 plane = i * WARPS + warp;
            if (streams >> plane / 2 & 1) sum_threads(plane, lane, writing, round + 1 == rounds, edges[i], memory);
        }
        __syncthreads();
        if (round + 1 < rounds && !writing) {
            round++;
        } else {
            if (!writing) wrong |= place_planes(chunk, streams, lane, memory, places);
            writing = true;
            if (wrong & WRONG_LAYOUT) return wrong;
            write_round(streams, places, first - lane * EACH, segments, warp, lane, index + job.index, memory);
            if (round == 0) break;
            round--;
            __syncwarp();  // all lanes have read the rows of the others, which are overwritten now
        }
        for (u32 row = 0; row < ROWS; row++) memory.rows[row][thread] = Four{};
    }
    if (warp == 0 && is_set(places.around, places.from)) wrong |= WRONG_PADDING;
    return wrong;
}
