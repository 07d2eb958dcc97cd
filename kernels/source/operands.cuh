// Converts bits to tensor-core operands, in registers: looks up the weights of levels of four bits, moves them to the
// positions of the survivors, and splits numbers into parts of 8 significant bits.
//
//   4 columns     four levels: `permuted` looks up the upper bytes of their patterns, and the lower bytes; moves each to
//                 the position of its survivor, with zeros at pruned positions; and joins them to two words of two weights
//
// Integer instructions other than multiplications limit the speed: a multiprocessor executes half a warp of them per
// cycle. Therefore multiplications add the signs.
#pragma once
#include "matrix.cuh"
#include "tensor.cuh"

enum : u32 {
    RUN = 128,  // columns per lane at a time
    ALL_OCTETS = 256
};

// A look-up table of weights: the upper bytes and the lower bytes of 8 patterns of 16 bits.
struct Patterns {
    u32 upper[2], lower[2];
};

// The look-up tables of a row. All patterns have the sign of a level that is marked as negative; this sign depends on the
// factor. Adding `flip` to the upper byte of a pattern gives the pattern of a level that is not marked.
template <u32 PARTS> struct Looks {
    Patterns parts[PARTS];
    u32 flip;
    u32 ones;  // 1 in each byte; see `kept`
};

// Returns the value, in a register that the compiler keeps: it cannot recompute a value that comes from another lane,
// even if that is the same lane. The lane number makes the values differ; the compiler would recognise equal ones.
__device__ inline u32 kept(u32 value) {
    u32 lane = threadIdx.x % WARP;
    return (u32)__shfl_sync(ALL_LANES, value + lane, lane) - lane;
}

// Sets the sign of all patterns to that of a level that is marked as negative.
template <u32 PARTS> __device__ inline void mark_negative(Looks<PARTS> &looks) {
    // A zero may have either sign. The greatest magnitude, the last, is zero only if all are.
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

// Subtracts from each number its upper 16 bits, and stores these, a BF16, in `uppers`. Three calls split a number of 24
// significant bits into three BF16, whose sum it is.
template <u32 COUNT> __device__ inline void take_uppers(float *numbers, float *uppers) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        uppers[i] = __uint_as_float(__float_as_uint(numbers[i]) & 0xFFFF0000);
        numbers[i] -= uppers[i];
    }
}

// Loads the look-up tables for a run of 128 positions: those of the matrix, or the magnitudes times the run's factor.
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
    u32 last = (u32)((u64)matrix.rows * matrix.columns / RUN) - 1;  // no weight beyond the matrix is used
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

// Returns the selectors that move the bytes of survivors to their positions, for eight mask bits: one nibble per
// position, the first four positions in the lower half. The nibble of a survivor is its index among the survivors of its
// four positions; that of a pruned position is 4.
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

// Computes the weights of four positions, two per word. Args: numbers: the magnitude numbers of the next levels, one per
// nibble, the first lowest; flips: added to the upper byte of each; selectors: only the lower half is used.
__device__ inline void expand_four(const Patterns &patterns, u32 numbers, u32 flips, u32 selectors, u32 *words) {
    u32 upper = permuted(patterns.upper[0], patterns.upper[1], numbers) + flips;
    u32 lower = permuted(patterns.lower[0], patterns.lower[1], numbers);
    upper = permuted(upper, 0, selectors);
    lower = permuted(lower, 0, selectors);
    words[0] = permuted(lower, upper, 0x5140);
    words[1] = permuted(lower, upper, 0x7362);
}

// Computes the weights of eight positions, for each part.
template <u32 PARTS>
__device__ inline void expand_octet(
    const Looks<PARTS> &looks, u32 levels, u32 octet, u32 selectors, u32 words[PARTS][4]
) {
    u32 numbers = shifted_right<1>(levels) & 0x77777777, signs = levels << 3, past = LEVEL_BITS * __popc(octet & 15);
    // A level's lowest bit is its sign. Here it is the highest bit of a nibble, so that `permuted` returns 0 and not 1.
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

// Args: row: in shared memory; level: index in the row of the first level.
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

// Advances by the survivors of an octet. Afterwards the first `left` words are valid.
__device__ inline void skip_octet(Queue &queue, u32 octet, u32 left) {
    u32 bits = LEVEL_BITS * __popc(octet);
#pragma unroll
    for (u32 i = 0; i < left; i++) queue.words[i] = __funnelshift_rc(queue.words[i], queue.words[i + 1], bits);
}
