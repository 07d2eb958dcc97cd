// From bits to tensor-core operands, in registers: the weights of levels of four bits, put where the mask has
// survivors, and numbers taken apart into parts of 8 bits.
//
//   4 columns     four levels; `permuted` looks up the upper bytes of their patterns, and the lower ones; puts each
//                 where the mask has a survivor, and zeros between; and joins them to two words of two weights
#pragma once
#include "matrix.cuh"
#include "tensor.cuh"

enum : u32 {
    RUN = 128,  // columns of a lane at a time
    ALL_OCTETS = 256
};

// What looks up the weights of levels: the bytes of 8 patterns of 16 bits, the upper ones and the lower ones.
struct Patterns {
    u32 upper[2], lower[2];
};

template <Kind KIND> __device__ inline Patterns patterns_of(const float *numbers) {
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) pairs[i] = two_rounded<KIND>(numbers[2 * i], numbers[2 * i + 1]);
    Patterns patterns;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        patterns.upper[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
        patterns.lower[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
    }
    return patterns;
}

// Takes the upper 16 bits out of some numbers. So three parts, the sum of which it is, are left of a number of 24
// bits, each a BF16.
template <u32 COUNT> __device__ inline void take_uppers(float *numbers, float *uppers) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        uppers[i] = __uint_as_float(__float_as_uint(numbers[i]) & 0xFFFF0000);
        numbers[i] -= uppers[i];
    }
}

// The patterns of a run of 128 positions: of the matrix, or with the factor of that run.
template <Kind KIND, u32 PARTS>
__device__ inline void load_patterns(const Matrix &matrix, u32 run, Patterns *patterns) {
    if (matrix.scale == 0) {
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            const u32 *bytes = matrix.patterns[part];
            patterns[part] = {{bytes[0], bytes[1]}, {bytes[2], bytes[3]}};
        }
        return;
    }
    u32 last = (u32)((u64)matrix.rows * matrix.columns / RUN) - 1;  // of what is not there no weight is used
    float factor = ((const float *)matrix.scale)[least(run, last) / matrix.scale_runs];
    float numbers[MAGNITUDES], uppers[MAGNITUDES];
#pragma unroll
    for (u32 i = 0; i < MAGNITUDES; i++) numbers[i] = __fmul_rn(matrix.magnitudes[i], factor);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        if (PARTS > 1) take_uppers<MAGNITUDES>(numbers, uppers);
        patterns[part] = patterns_of<KIND>(PARTS > 1 ? uppers : numbers);
    }
}

// What moves the bytes of four survivors to their positions, for eight mask bits: a nibble a position, of the lower
// four positions in the lower half. A survivor's is its number among those of its four; a pruned position's is 4.
__device__ inline u32 selectors_of(u32 octet) {
    u32 selectors = 0;
    for (u32 shift = 0; shift < 32; shift += 16, octet >>= 4) {
        for (u32 i = 0, rank = 0; i < 4; i++) {
            bool alive = octet >> i & 1;
            selectors |= (alive ? rank : 4) << (shift + 4 * i);
            rank += alive;
        }
    }
    return selectors;
}

// The weights of four positions, two a word. Args: levels: the survivors' and what comes after, the first lowest;
// numbers: the same without their signs; selectors: the lower half counts.
__device__ inline void expand_four(const Patterns &patterns, u32 levels, u32 numbers, u32 selectors, u32 *words) {
    u32 upper = permuted(patterns.upper[0], patterns.upper[1], numbers);
    u32 lower = permuted(patterns.lower[0], patterns.lower[1], numbers);
    // The sign, a level's lowest bit, goes to the highest of its byte.
    upper ^= permuted(levels << 7, levels << 3, 0x5140) & 0x80808080;
    upper = permuted(upper, 0, selectors);
    lower = permuted(lower, 0, selectors);
    words[0] = permuted(lower, upper, 0x5140);
    words[1] = permuted(lower, upper, 0x7362);
}

// The weights of eight positions, of each part.
template <u32 PARTS>
__device__ inline void expand_octet(
    const Patterns *patterns, u32 levels, u32 octet, u32 selectors, u32 words[PARTS][4]
) {
    u32 numbers = levels >> 1 & 0x77777777, past = LEVEL_BITS * __popc(octet & 15);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        expand_four(patterns[part], levels, numbers, selectors, words[part]);
        expand_four(patterns[part], levels >> past, numbers >> past, selectors >> 16, words[part] + 2);
    }
}

// The next 32 levels of a row.
struct Queue {
    u32 words[4];
};

// Args: row: in shared memory; level: which of its levels comes first.
__device__ inline Queue queue_at(const u32 *row, u32 level) {
    const u32 *from = row + level / 8;
    Queue queue;
    u32 word = from[0];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 next = from[i + 1];
        queue.words[i] = __funnelshift_r(word, next, LEVEL_BITS * level);
        word = next;
    }
    return queue;
}

// Goes on by the survivors of an octet; after it `left` words count.
__device__ inline void skip_octet(Queue &queue, u32 octet, u32 left) {
    u32 bits = LEVEL_BITS * __popc(octet);
#pragma unroll
    for (u32 i = 0; i < left; i++) queue.words[i] = __funnelshift_rc(queue.words[i], queue.words[i + 1], bits);
}
