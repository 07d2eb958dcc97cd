// Reads a plane of one segment through shared memory, to which it is copied before it is needed.
//
// If each lane loaded into its own registers, the warp would wait: while a load into a register is pending for one lane,
// the register is unavailable for all lanes. A copy to shared memory delays the warp only at an explicit wait.
//
//   chunk    4 pieces in the ring      | the next ones
//            ^ the piece with `place`
//
// `top_up` begins to copy the next piece over the oldest one, if all of this was read. The ring stays full if at most
// one piece is read between two calls. The last copy may be pending, so 2 pieces and one bit are always available.
#pragma once
#include "tensor.cuh"

enum : u32 { PIECES = 4 };

// WORDS: words per piece, 1, 2 or 4.
template <u32 WORDS> struct Ring {
    const u32 *data;
    u32 count;   // number of pieces in the chunk
    u32 next;    // the piece to copy next
    u32 place;   // the next bit of the chunk
    u32 *words;  // the lane's part of shared memory
};

// Words of shared memory per lane and per warp. The pieces of a lane are contiguous. One more piece separates two lanes,
// so that they begin in different banks.
template <u32 WORDS> __device__ constexpr u32 ring_stride() { return (PIECES + 1) * WORDS; }
template <u32 WORDS> __device__ constexpr u32 ring_words() { return WARP * ring_stride<WORDS>(); }

// Bits per piece.
template <u32 WORDS> __device__ constexpr u32 piece_bits() { return 32 * WORDS; }

// Begins to copy the next piece, if there is room.
template <u32 WORDS> __device__ inline void top_up(Ring<WORDS> &r) {
    if (r.next - r.place / piece_bits<WORDS>() >= PIECES) return;
    copy_if<WORDS>(r.words + r.next % PIECES * WORDS, r.data + (u64)r.next * WORDS, r.next < r.count);
    r.next++;
}

// Returns a ring, and begins to fill it; the copies are in no group yet. Args: shared: `ring_words` of the warp.
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

// Returns the next 32 bits. Does not advance.
template <u32 WORDS> __device__ inline u32 peek(const Ring<WORDS> &r) {
    u32 word = r.place / 32, size = PIECES * WORDS;
    return __funnelshift_r(r.words[word % size], r.words[(word + 1) % size], r.place);
}

// Advances.
template <u32 WORDS> __device__ inline void skip(Ring<WORDS> &r, u32 bits) { r.place += bits; }
