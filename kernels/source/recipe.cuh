// The records that describe a tensor, a chunk and a code to the kernels; sfpformat/engines/cuda/layout.py has the same.
//
// A recipe is at the beginning of a block of memory, which also has all arrays that it refers to; its offsets are
// relative to this beginning. The host makes recipes from a checked directory, so the kernels trust them. They do not
// trust offsets that follow from a chunk.
#pragma once
#include "base.cuh"

enum : u32 { MASK, FINGERPRINTS, IMPORTANCE, STREAMS };

// Rules for the number of levels of a segment.
enum : u32 { COUNT_POSITIONS, COUNT_SURVIVORS, COUNT_PRUNED, COUNT_OCTETS };
enum : u32 { NO_MASK, OCTETS, RUNS_OF_PRUNED, RUNS_OF_SURVIVORS };
enum : u32 { EXACT, UNIFORM, TABLE };
enum : u32 { F64, F32, F16, BF16, F8_E4M3, F8_E5M2 };
// The index of a position's scale factor: 0, position div unit, position mod unit.
enum : u32 { NO_SCALE, SCALE_TENSOR, SCALE_QUOTIENT, SCALE_REMAINDER };
enum : u32 { NO_MULTIPLIER, OF_SURVIVORS, OF_POSITIONS, OF_FACTORS };

// A stream. A *slot* is a byte that identifies a class: the class number if there are at most 256 classes, else its
// index among the used classes.
struct Stream {
    u64 first;      // offset of u64 [slots]: first level of the slot's class
    u64 extra;      // offset of u8 [slots]: its residual bits
    u64 lengths;    // offset of u16 [codes, 16]: number of codewords of each length
    u64 symbols;    // offset of u16 [codes, 256]: slots of the symbols in canonical order; high byte: a pair's second
    u64 entries;    // offset of u32 [codes << bits]; see `fill_entry`
    u32 present;    // whether the tensor has the stream
    u32 rule;       // one of COUNT_
    u32 codes;      // of codes or windows; 0 for a table of one class
    u32 trimmed;    // whether segments have trims
    u32 differing;  // whether used classes differ in their residual bits
    u32 constant;   // if they do not: their residual bits
    u32 least;      // the least number of residual bits of a used class
    u32 bits;       // length of the longest codeword
    u32 group;      // levels per symbol
    u32 slots;
    u32 window;     // bits of a symbol in a window; 0 if the stream has prefix codes
    u32 escape;     // bits of the class of an escaped level
};

struct Recipe {
    Stream streams[3];
    u64 centroids;             // offset of float [count]
    u64 scale;                 // offset of float [factors]
    u64 importance_centroids;  // offset of float [count]
    u64 row_factors;           // offset of float [rows]
    u64 column_factors;        // offset of float [columns]
    u64 patterns;              // offset of u32 [top]: the bit pattern of each level
    u64 columns;               // positions per row, at least 1
    u64 scale_unit;
    float step;
    float importance_step;
    u32 segment;               // S
    u32 mask;                  // NO_MASK …
    u32 quantiser;
    u32 coded;                 // the dtype of an exact quantiser
    u32 dtype;                 // the dtype of the tensor
    u32 scale_by;
    u32 multiplier;
    u32 importance_quantiser;
    u32 importance_coded;
    u32 looked_up;             // number of `patterns`; 0 if the kernels do not use them
    u32 padding[2];            // to a multiple of 16 bytes
};

// A run of neighbouring segments of a chunk.
struct Job {
    u64 data;    // address of the chunk, a multiple of 16
    u64 out;     // address for the run's weights, a multiple of 4
    u64 start;   // position in the tensor of the chunk's first position
    u64 recipe;  // address of the tensor's recipe
    u64 index;   // where its part of `index` begins: (1 + 3 × streams) rows of segments + 1 words
    u64 errors;  // where its part of `errors` begins: one word per segment of the run
    u32 length;  // bytes of the chunk
    u32 total;   // positions of the chunk
    u32 first, stop;  // the run, numbered within the chunk
};

__device__ inline u32 segments_of(const Recipe &recipe, const Job &job) {
    return (job.total + recipe.segment - 1) / recipe.segment;
}

// Returns the number of positions of segment `s` of a chunk.
__device__ inline u32 positions_of(const Recipe &recipe, const Job &job, u32 s) {
    return least(recipe.segment, job.total - s * recipe.segment);
}

__device__ inline Chunk chunk_of(const Job &job) {
    Chunk chunk = {(const u8 *)job.data, job.length};
    return chunk;
}

// Rows of a job's part of `index`: survivors; then for each stream of the tensor a row for each of the two planes, with
// the bit offset in the chunk of each segment and, last, of the plane's end; and a row with codes (low half) and trims
// (high half).
enum : u32 { PREFIX_ROW, RESIDUAL_ROW, CODE_ROW, ROWS_A_STREAM };

__device__ inline u32 *survivors_row(u32 *index, const Job &job) { return index + job.index; }

__device__ inline u32 *stream_row(u32 *index, const Recipe &recipe, const Job &job, u32 stream, u32 row) {
    u32 before = 0;
    for (u32 i = 0; i < stream; i++) before += recipe.streams[i].present;
    return index + job.index + (u64)(1 + ROWS_A_STREAM * before + row) * (segments_of(recipe, job) + 1);
}

// Returns the entry of a look-up table for a window of bits, the first one lowest:
//
//   bits  0 to  7   the slot
//   bits  8 to 15   with g = 2 the slot of the second level
//   bits 16 to 19   length of the codeword
//
// A codeword's first bit is its most significant (R-COD-002), so the window is read from its lowest bit on. A code is
// complete (R-TAB-007): every window begins with a codeword of at most `bits` bits.
__device__ inline u32 fill_entry(const u16 *lengths, const u16 *symbols, u32 bits, u32 window) {
    u32 codeword = 0, first = 0, rank = 0;
    for (u32 length = 1; length <= bits; length++) {
        codeword = codeword << 1 | (window & 1);
        window >>= 1;
        u32 count = lengths[length];
        if (codeword - first < count) return symbols[rank + codeword - first] | length << 16;
        rank += count;
        first = (first + count) << 1;
    }
    return (u32)symbols[0] | bits << 16;  // not reached
}
