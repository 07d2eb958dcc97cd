// The mask of one segment (SPEC.md chapter 10), up to 64 positions at a time. A lane's own.
#pragma once
#include "levels.cuh"

enum : u32 { NEVER = 0xFFFFFFFF };

// L: `Levels`, or what else `next_short_level` takes.
template <class L> struct Mask {
    L levels;
    u32 kind;
    u32 left;   // runs: levels not read yet
    u32 next;   // runs: the next minority position of the segment, or NEVER
    u32 found;  // survivors so far
    u32 wrong;
};

// Reads the next minority position, which lies past `before` (one less than the segment's first, to begin with).
template <class L> __device__ inline void next_run(Mask<L> &mask, u32 before) {
    mask.next = NEVER;
    if (mask.left == 0) return;
    mask.left--;
    mask.next = before + 1 + next_short_level(mask.levels);
}

// Args: levels, that is the minority positions of runs.
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

// The mask bits of `count` positions, 1 to 64, the first one lowest; the first is position `done` of the segment.
template <class L> __device__ inline u64 next_bits(Mask<L> &mask, u32 done, u32 count) {
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
template <class L> __device__ inline u32 wrong_mask(const Mask<L> &mask, u32 survivors) {
    return mask.found != survivors || mask.next != NEVER ? (u32)WRONG_MASK : mask.wrong;
}
