// Decodes the mask of one segment (SPEC.md chapter 10), up to 64 positions at a time. Each lane has its own state.
#pragma once
#include "levels.cuh"

enum : u32 { NEVER = 0xFFFFFFFF };

// L: `Levels`, or another type that `next_short_level` accepts.
template <class L> struct Mask {
    L levels;
    u32 kind;
    u32 left;   // runs: number of levels that were not read yet
    u32 next;   // runs: the next minority position of the segment, or NEVER
    u32 found;  // survivors so far
    u32 wrong;
};

// Reads the next minority position. Args: before: the previous one; -1 for the first.
template <class L> __device__ inline void next_run(Mask<L> &mask, u32 before) {
    mask.next = NEVER;
    if (mask.left == 0) return;
    mask.left--;
    mask.next = before + 1 + next_short_level(mask.levels);
}

// Begins to decode a mask. Args: count: number of levels; for runs this is the number of minority positions.
template <class L> __device__ inline Mask<L> mask_of(u32 kind, const L &levels, u32 count) {
    Mask<L> mask;
    mask.levels = levels;
    mask.kind = kind;
    mask.left = count;
    mask.found = 0;
    mask.wrong = 0;
    mask.next = NEVER;
    if (kind != OCTETS) next_run(mask, 0u - 1);
    return mask;
}

// Decodes the mask bits of `count` positions, 1 to 64, from position `done` of the segment on; the first one lowest.
template <class L> __device__ inline u64 next_bits(Mask<L> &mask, u32 done, u32 count) {
    u64 all = ~(u64)0 >> (64 - count), bits = 0;
    if (mask.kind == OCTETS) {
        for (u32 i = 0; i < count; i += 8) bits |= (u64)next_short_level(mask.levels) << i;
        if (bits & ~all) mask.wrong = WRONG_MASK;  // bits after the last position (R-MSK-006)
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

// Returns the error word for a mask, after all its bits were decoded.
template <class L> __device__ inline u32 wrong_mask(const Mask<L> &mask, u32 survivors) {
    return mask.found != survivors || mask.next != NEVER ? (u32)WRONG_MASK : mask.wrong;
}
