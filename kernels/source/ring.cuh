// A plane of one segment, read through shared memory: copied there ahead of its need.
//
// A lane that loads for itself into registers makes its warp wait: a register counts as not yet there for all lanes
// once a load into it is on its way for one. What is copied to shared memory nobody waits for before it is asked to.
//
//   chunk    4 pieces that the ring has  | the next ones
//            ^ the one that `place` is in
//
// `top_up` begins to copy the next piece where the oldest was read, and keeps the ring full as long as not more than a
// piece is read between two of them. The last one copied may still be on its way; so of what is there 2 pieces and a
// bit are certain.
#pragma once
#include "tensor.cuh"

enum : u32 { PIECES = 4 };

// WORDS: of a piece, 1, 2 or 4.
template <u32 WORDS> struct Ring {
    const u32 *data;
    u32 count;   // of pieces in the chunk
    u32 next;    // the piece to copy next
    u32 place;   // the next bit of the chunk
    u32 *words;  // the lane's part of shared memory
};

// Words of shared memory a lane, and a warp. The pieces of a lane lie side by side; between lanes there is a piece more,
// so that they begin in different banks.
template <u32 WORDS> __device__ constexpr u32 ring_stride() { return (PIECES + 1) * WORDS; }
template <u32 WORDS> __device__ constexpr u32 ring_words() { return WARP * ring_stride<WORDS>(); }

// Bits of a piece.
template <u32 WORDS> __device__ constexpr u32 piece_bits() { return 32 * WORDS; }

// Begins to copy the next piece, if there is room for it.
template <u32 WORDS> __device__ inline void top_up(Ring<WORDS> &r) {
    if (r.next - r.place / piece_bits<WORDS>() >= PIECES) return;
    copy_if<WORDS>(r.words + r.next % PIECES * WORDS, r.data + (u64)r.next * WORDS, r.next < r.count);
    r.next++;
}

// A ring that is filled; the copies are in no group yet. Args: shared: the warp's, `ring_words`.
template <u32 WORDS> __device__ inline Ring<WORDS> ring_at(Chunk chunk, u32 bit, u32 *shared, u32 lane) {
    Ring<WORDS> r;
    r.data = (const u32 *)chunk.data;
    r.count = chunk.length / (4 * WORDS);
    r.next = bit / piece_bits<WORDS>();
    r.place = bit;
    r.words = shared + lane * ring_stride<WORDS>();
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) top_up(r);
    return r;
}

// The next 32 bits, which stay.
template <u32 WORDS> __device__ inline u32 peek(const Ring<WORDS> &r) {
    u32 word = r.place / 32, size = PIECES * WORDS;
    return __funnelshift_r(r.words[word % size], r.words[(word + 1) % size], r.place);
}

// Goes on.
template <u32 WORDS> __device__ inline void skip(Ring<WORDS> &r, u32 bits) { r.place += bits; }
