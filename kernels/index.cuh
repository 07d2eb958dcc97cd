// The header and the segment index of a chunk (SPEC.md 15.1, 15.2), by one block: checked, and summed up to where
// each segment begins in each plane. Each warp has a part of the segments, one after another; it goes through them
// twice: for the sums of its part, and, when all parts are known, for the places.
#pragma once
#include "recipe.cuh"

enum : u32 { QUANTITY_BYTES = 8, MAX_INDEX_WIDTH = 32, PART = 16, TAIL = 16, CHUNK_UNIT = 64, MAX_QUANTITIES = 13 };
// Bit offsets of a chunk are u32.
enum : u32 { MAX_CHUNK = 1u << 29 };

__device__ inline u64 aligned(u64 x, u64 k) { return (x + k - 1) / k * k; }

// A quantity of the index: its fields begin at byte `at`.
struct Quantity {
    u64 at;
    u32 minimum, width;
};

__device__ inline u64 value_at(Chunk chunk, Quantity q, u32 s) {
    return (u64)q.minimum + field_at(chunk, q.at * 8 + (u64)s * q.width, q.width);
}

// Whether some bit from bit `start` up to byte `stop` is set, as far as this lane looks.
__device__ inline bool some_bit(Chunk chunk, u64 start, u64 stop, u32 lane) {
    u64 first = start >> 3;
    u32 seen = 0;
    for (u64 at = first + lane; at < stop; at += WARP) {
        u32 byte = byte_at(chunk, at);
        seen |= at == first ? byte >> (start & 7) : byte;
    }
    return seen != 0;
}

// The quantities of a tensor's index, those that it has, by what they say: the survivors; then for each stream
// code, trim, prefix bits and residual bits.
enum : u32 { ABSENT = 0xFFFFFFFF };
struct Places {
    u32 number[MAX_QUANTITIES];  // which of the quantities present, or ABSENT
    u32 count;
};

__device__ inline u32 number_if(bool there, Places &places) {
    if (!there) return ABSENT;
    return places.count++;
}

__device__ inline Places places_of(const Recipe &recipe) {
    Places places;
    places.count = 0;
    places.number[0] = number_if(recipe.streams[MASK].present, places);
    for (u32 i = 0; i < STREAMS; i++) {
        const Stream &stream = recipe.streams[i];
        places.number[1 + 4 * i] = number_if(stream.present && stream.codes > 1, places);
        places.number[2 + 4 * i] = number_if(stream.present && stream.trimmed, places);
        places.number[3 + 4 * i] = number_if(stream.present && stream.codes > 0, places);
        places.number[4 + 4 * i] = number_if(stream.present && stream.differing, places);
    }
    return places;
}

// Reads the header: all lanes alike, but for the zeros. Returns what is wrong, and in `end` where the planes begin.
__device__ inline u32 read_header(Chunk chunk, u32 count, u32 segments, u32 lane, Quantity *quantities, u64 &end) {
    u64 pos = aligned((u64)QUANTITY_BYTES * count, PART);
    if (pos + TAIL > chunk.length) return WRONG_LAYOUT;
    u32 wrong = some_bit(chunk, (u64)QUANTITY_BYTES * count * 8, pos, lane) ? (u32)WRONG_PADDING : 0;
    for (u32 i = 0; i < count; i++) {
        u64 at = (u64)QUANTITY_BYTES * i;
        u32 second = word_at(chunk, at + 4);
        u32 width = second & 255;
        if (second >> 8 || width > MAX_INDEX_WIDTH) return WRONG_HEADER;
        u64 bits = (u64)segments * width, size = (bits + 7) / 8;
        if (pos + size + TAIL > chunk.length) return WRONG_LAYOUT;
        quantities[i].at = pos;
        quantities[i].minimum = word_at(chunk, at);
        quantities[i].width = width;
        end = aligned(pos + size, PART);
        if (some_bit(chunk, pos * 8 + bits, end, lane)) wrong |= WRONG_PADDING;
        pos = end;
    }
    end = pos;
    return wrong;
}

// What the index says of one segment.
struct SegmentIndex {
    u32 survivors;
    u32 code[3], trim[3];
    u64 prefix[3], residual[3];  // bits
};

__device__ inline u64 quantity_of(Chunk chunk, const Places &places, const Quantity *quantities, u32 which, u32 s) {
    u32 number = places.number[which];
    return number == ABSENT ? 0 : value_at(chunk, quantities[number], s);
}

__device__ inline u32 levels_of(u32 rule, u32 positions, u32 survivors) {
    if (rule == COUNT_POSITIONS) return positions;
    if (rule == COUNT_SURVIVORS) return survivors;
    return rule == COUNT_PRUNED ? positions - survivors : (positions + 7) / 8;
}

// Reads what the index says of segment `s`; returns what is wrong.
__device__ inline u32 read_segment(
    Chunk chunk, const Recipe &recipe, const Places &places, const Quantity *quantities, u32 positions, u32 s,
    SegmentIndex &segment
) {
    segment.survivors = positions;
    if (places.number[0] != ABSENT) {
        u64 survivors = quantity_of(chunk, places, quantities, 0, s);
        if (survivors > positions) return WRONG_HEADER;
        segment.survivors = (u32)survivors;
    }
    u32 wrong = 0;
    for (u32 i = 0; i < STREAMS; i++) {
        const Stream &stream = recipe.streams[i];
        u64 code = quantity_of(chunk, places, quantities, 1 + 4 * i, s);
        u64 trim = quantity_of(chunk, places, quantities, 2 + 4 * i, s);
        if (stream.codes > 1 && code >= stream.codes) wrong = WRONG_HEADER, code = 0;
        if (stream.trimmed && trim > 0 && trim >= stream.least) wrong = WRONG_HEADER, trim = 0;
        segment.code[i] = (u32)code;
        segment.trim[i] = (u32)trim;
        segment.prefix[i] = quantity_of(chunk, places, quantities, 3 + 4 * i, s);
        segment.residual[i] = quantity_of(chunk, places, quantities, 4 + 4 * i, s);
        if (stream.present && !stream.differing) {
            u64 levels = levels_of(stream.rule, positions, segment.survivors);
            segment.residual[i] = levels * (stream.constant - segment.trim[i]);
        }
    }
    return wrong;
}

// The sum of the values of the lanes up to this one.
template <class Value> __device__ inline Value sum_up_to(Value value, u32 lane) {
    for (u32 step = 1; step < WARP; step *= 2) {
        Value below = (Value)__shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// What the warps of a block tell each other: bits of their segments in each plane, below 2^53 (2^19 segments of less
// than 2^34 bits), and what they found wrong.
enum : u32 { PLANES = 2 * STREAMS };
struct IndexSums {
    u64 bits[WARPS][PLANES];
    u32 wrong[WARPS];
};

// The sums of the segments from `first` up to `stop`, by one warp.
__device__ inline void sum_segments(
    const Recipe &recipe, const Job &job, const Places &places, const Quantity *quantities, u32 first, u32 stop,
    u32 warp, u32 lane, IndexSums &sums
) {
    u64 bits[PLANES] = {0, 0, 0, 0, 0, 0};
    u32 wrong = 0;
    for (u32 s = first + lane; s < stop; s += WARP) {
        SegmentIndex segment;
        u32 positions = positions_of(recipe, job, s);
        wrong |= read_segment(chunk_of(job), recipe, places, quantities, positions, s, segment);
        for (u32 i = 0; i < STREAMS; i++) {
            bits[2 * i] += segment.prefix[i];
            bits[2 * i + 1] += segment.residual[i];
        }
    }
    bool any = __any_sync(ALL_LANES, wrong != 0);
    for (u32 plane = 0; plane < PLANES; plane++) {
        u64 sum = recipe.streams[plane / 2].present ? sum_up_to(bits[plane], lane) : 0;
        if (lane == WARP - 1) sums.bits[warp][plane] = sum;
    }
    if (lane == 0) sums.wrong[warp] = any ? (u32)WRONG_HEADER : 0;
}

// The planes one after another, from byte `pos` on: where the part of a warp begins in each, as bits from the chunk's
// first. Returns what is wrong, as far as this lane looks; all of the chunk after the index is looked at.
__device__ inline u32 place_planes(
    const Recipe &recipe, Chunk chunk, u64 pos, const IndexSums &sums, u32 warp, u32 lane, u32 *starts
) {
    u32 wrong = 0;
    for (u32 plane = 0; plane < PLANES; plane++) {
        starts[plane] = 0;
        if (!recipe.streams[plane / 2].present) continue;
        u64 bits = 0, before = 0;
        for (u32 other = 0; other < WARPS; other++) {
            if (other < warp) before += sums.bits[other][plane];
            bits += sums.bits[other][plane];
        }
        u64 end = aligned(pos + (bits + 7) / 8, PART);
        if (end + TAIL > chunk.length) return wrong | WRONG_LAYOUT;
        if (some_bit(chunk, pos * 8 + bits, end, lane)) wrong |= WRONG_PADDING;
        starts[plane] = (u32)(pos * 8 + before);
        pos = end;
    }
    if (aligned(pos + TAIL, CHUNK_UNIT) != chunk.length) return wrong | WRONG_LAYOUT;
    if (some_bit(chunk, pos * 8, chunk.length, lane)) wrong |= WRONG_PADDING;
    return wrong;
}

// Writes the places of the segments from `first` up to `stop`, by one warp; `starts` is changed.
__device__ inline void place_segments(
    const Recipe &recipe, const Job &job, const Places &places, const Quantity *quantities, u32 first, u32 stop,
    u32 lane, u32 *starts, u32 *index
) {
    for (u32 round = first; round < stop; round += WARP) {
        u32 s = round + lane;
        bool there = s < stop;
        SegmentIndex segment = {};
        if (there) {
            u32 positions = positions_of(recipe, job, s);
            read_segment(chunk_of(job), recipe, places, quantities, positions, s, segment);
            survivors_row(index, job)[s] = segment.survivors;
        }
        for (u32 plane = 0; plane < PLANES; plane++) {
            u32 stream = plane / 2;
            if (!recipe.streams[stream].present) continue;
            u64 bits = plane % 2 ? segment.residual[stream] : segment.prefix[stream];
            u32 end = starts[plane] + sum_up_to((u32)bits, lane);
            u32 *row = stream_row(index, recipe, job, stream, plane % 2 ? (u32)RESIDUAL_ROW : (u32)PREFIX_ROW);
            if (s == 0) row[0] = starts[plane];
            if (there) row[s + 1] = end;
            starts[plane] = (u32)__shfl_sync(ALL_LANES, end, WARP - 1);
            if (there && plane % 2) {
                stream_row(index, recipe, job, stream, CODE_ROW)[s] = segment.code[stream] | segment.trim[stream] << 16;
            }
        }
    }
}

// Writes a job's part of `index`; returns, in each lane, what it found wrong. All threads of a block take part.
__device__ inline u32 index_chunk(
    const Recipe &recipe, const Job &job, u32 warp, u32 lane, u32 *index, IndexSums &sums
) {
    Chunk chunk = chunk_of(job);
    u32 segments = segments_of(recipe, job);
    Places places = places_of(recipe);
    Quantity quantities[MAX_QUANTITIES];
    u64 pos = 0;
    if (chunk.length > MAX_CHUNK) return NOT_FOR_THIS;
    u32 wrong = read_header(chunk, places.count, segments, lane, quantities, pos);
    if (__any_sync(ALL_LANES, wrong != 0)) return wrong;  // as the other warps find it
    u32 part = (segments + THREADS - 1) / THREADS * WARP;
    u32 first = least(warp * part, segments), stop = least(first + part, segments);
    sum_segments(recipe, job, places, quantities, first, stop, warp, lane, sums);
    __syncthreads();
    for (u32 other = 0; other < WARPS; other++) wrong |= sums.wrong[other];
    u32 starts[PLANES];
    wrong |= place_planes(recipe, chunk, pos, sums, warp, lane, starts);
    if (__any_sync(ALL_LANES, wrong != 0)) return wrong;
    place_segments(recipe, job, places, quantities, first, stop, lane, starts, index);
    return 0;
}
