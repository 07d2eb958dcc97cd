// From bits to tensor-core operands, in registers: the weights of levels of four bits, put where the mask has
// survivors, and numbers taken apart into parts of 8 bits.
//
//   4 columns     four levels; `permuted` looks up the upper bytes of their patterns, and the lower ones; puts each
//                 where the mask has a survivor, and zeros between; and joins them to two words of two weights
//
// Integer instructions but for multiplications are what a multiprocessor has too few of: half a warp a turn. So signs
// are added by multiplying.
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

// The weights of a row, whose magnitudes have one sign, that of their factor: `flip` times 1 added to the upper byte of
// a pattern gives the pattern of a level that is not marked as negative.
template <u32 PARTS> struct Looks {
    Patterns parts[PARTS];
    u32 flip;
    u32 ones;  // 1 in each byte, see `kept`
};

// A value that stays in its register: of what comes from another lane, be it the same, the compiler does not know how
// to compute it anew whenever it is needed. What all lanes have it would see through.
__device__ inline u32 kept(u32 value) {
    u32 lane = threadIdx.x % WARP;
    return (u32)__shfl_sync(ALL_LANES, value + lane, lane) - lane;
}

// Gives all patterns the sign that a level marked as negative has.
template <u32 PARTS> __device__ inline void mark_negative(Looks<PARTS> &looks) {
    // Whatever is zero may have either sign; the greatest magnitude is the last to be.
    u32 sign = looks.parts[0].upper[1] >> 31 ? 0 : 0x80808080;
    looks.flip = sign ? 0u - 0x80 : 0x80;
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) looks.parts[part].upper[i] = (looks.parts[part].upper[i] & 0x7F7F7F7F) | sign;
    }
}

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

// The weights of a run of 128 positions: those of the matrix, or with the factor of that run.
template <Kind KIND, u32 PARTS>
__device__ inline void load_looks(const Matrix &matrix, u32 run, Looks<PARTS> &looks) {
    if (matrix.scale == 0) {
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            const u32 *bytes = matrix.patterns[part];
            looks.parts[part] = {{bytes[0], bytes[1]}, {bytes[2], bytes[3]}};
        }
        mark_negative(looks);
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
        looks.parts[part] = patterns_of<KIND>(PARTS > 1 ? uppers : numbers);
    }
    mark_negative(looks);
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

// The weights of four positions, two a word. Args: numbers: of the survivors' levels and what comes after, the first
// lowest; flips: what to add to the upper byte of each; selectors: the lower half counts.
__device__ inline void expand_four(const Patterns &patterns, u32 numbers, u32 flips, u32 selectors, u32 *words) {
    u32 upper = permuted(patterns.upper[0], patterns.upper[1], numbers) + flips;
    u32 lower = permuted(patterns.lower[0], patterns.lower[1], numbers);
    upper = permuted(upper, 0, selectors);
    lower = permuted(lower, 0, selectors);
    words[0] = permuted(lower, upper, 0x5140);
    words[1] = permuted(lower, upper, 0x7362);
}

// The weights of eight positions, of each part.
template <u32 PARTS>
__device__ inline void expand_octet(
    const Looks<PARTS> &looks, u32 levels, u32 octet, u32 selectors, u32 words[PARTS][4]
) {
    u32 numbers = shifted_right<1>(levels) & 0x77777777, signs = levels << 3, past = LEVEL_BITS * __popc(octet & 15);
    // A level's lowest bit is its sign; here the highest of a nibble, which makes `permuted` give 0 instead of 1.
    u32 of_others = shifted_right<16>(selectors);
    u32 flips = permuted(looks.ones, looks.ones, signs) * looks.flip;
    u32 others = permuted(looks.ones, looks.ones, signs >> past) * looks.flip;
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        expand_four(looks.parts[part], numbers, flips, selectors, words[part]);
        expand_four(looks.parts[part], numbers >> past, others, of_others, words[part] + 2);
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
