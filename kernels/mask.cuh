// The mask of one segment (SPEC.md chapter 10), up to 64 positions at a time. A lane's own.
#pragma once
#include "levels.cuh"

enum : u32 { NEVER = 0xFFFFFFFF };

struct Mask {
    Levels levels;
    u32 kind;
    u32 left;   // runs: levels not read yet
    u32 next;   // runs: the next minority position of the segment, or NEVER
    u32 found;  // survivors so far
    u32 wrong;
};

// Reads the next minority position, which lies past `before` (one less than the segment's first, to begin with).
__device__ inline void next_run(Mask &mask, u32 before) {
    mask.next = NEVER;
    if (mask.left == 0) return;
    mask.left--;
    mask.next = before + 1 + next_short_level(mask.levels);
}

// Args: levels, that is the minority positions of runs.
__device__ inline Mask mask_of(u32 kind, Levels levels, u32 count) {
    Mask mask;
    mask.levels = levels;
    mask.kind = kind;
    mask.left = count;
    mask.found = 0;
    mask.wrong = 0;
    mask.next = NEVER;
    if (kind != OCTETS) next_run(mask, 0u - 1);
    return mask;
}

// The mask bits of `count` positions, 1 to 64, the first one lowest; the first is position `done` of the segment.
__device__ inline u64 next_bits(Mask &mask, u32 done, u32 count) {
    u64 all = ~(u64)0 >> (64 - count), bits = 0;
    if (mask.kind == OCTETS) {
        for (u32 i = 0; i < count; i += 8) bits |= (u64)next_short_level(mask.levels) << i;
        if (bits & ~all) mask.wrong = WRONG_MASK;  // past the last position (R-MSK-006)
        bits &= all;
    } else {
        while (mask.next < done + count) {
            bits |= (u64)1 << (mask.next - done);
            next_run(mask, mask.next);
        }
        if (mask.kind == RUNS_OF_PRUNED) bits = ~bits & all;
    }
    mask.found += __popcll(bits);
    return bits;
}

// What is wrong with a mask all of whose bits were read.
__device__ inline u32 wrong_mask(const Mask &mask, u32 survivors) {
    return mask.found != survivors || mask.next != NEVER ? WRONG_MASK : mask.wrong;
}
