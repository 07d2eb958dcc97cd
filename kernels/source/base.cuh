// Words, memory and bits, which all other files use.
//
// Rules: no system header is included, so that the source is one string, which NVRTC compiles without a path and whose
// bytes are the key of a cache. host.h defines what CUDA has and C++17 lacks; only the host compiler reads it. Only
// `Chunk`, `Reader` and `Ring` read bytes of a file; they compare every offset with the chunk's length.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL_LANES 0xFFFFFFFFu
enum : u32 { WARP = 32, WARPS = 4, THREADS = WARPS * WARP };  // lanes per warp, warps and threads per block

// Bits of an error word: the problems of a segment or of its chunk; 0 if there are none. If the word is not 0, the
// weights are undefined, and the reference has to decode the segment. The word does not identify the violated clause.
enum : u32 {
    WRONG_HEADER = 1,   // header or index fields (SPEC.md 15.2)
    WRONG_LAYOUT = 2,   // parts that do not fit the chunk (SPEC.md 15.1)
    WRONG_PADDING = 4,  // bits that must be zero
    WRONG_END = 8,      // a segment does not end where the index says (R-PLN-003)
    WRONG_MASK = 16,    // R-MSK-004 to R-MSK-006
    WRONG_PAIR = 32,    // the second class of a last symbol (R-PLN-002)
    NOT_FOR_THIS = 64   // not supported: the bits of the chunk cannot be counted in 32 bits
};

// 16 bytes, loaded by one instruction.
struct alignas(16) Words {
    u32 a, b, c, d;
};

__device__ inline u32 least(u32 a, u32 b) { return a < b ? a : b; }

// The bytes of a chunk: `length` of them, a multiple of 64 (R-LAY-002), at an address that is a multiple of 16.
struct Chunk {
    const u8 *data;
    u32 length;
};

// Returns the byte at an offset; 0 outside the chunk.
__device__ inline u32 byte_at(Chunk chunk, u64 offset) {
    return offset < chunk.length ? chunk.data[offset] : 0;
}

// Returns the 4 bytes at an offset, a multiple of 4; 0 outside the chunk.
__device__ inline u32 word_at(Chunk chunk, u64 offset) {
    return offset + 4 <= chunk.length ? *(const u32 *)(chunk.data + offset) : 0;
}

// Returns the 16 bytes at an offset, a multiple of 16; 0 outside the chunk.
__device__ inline Words words_at(Chunk chunk, u32 offset) {
    Words words = {0, 0, 0, 0};
    if (offset < chunk.length && chunk.length - offset >= sizeof(Words)) words = *(const Words *)(chunk.data + offset);
    return words;
}

// Returns the 32 bits at a bit offset, the first one lowest; 0 outside the chunk.
__device__ inline u32 bits_at(Chunk chunk, u32 bit) {
    u32 at = bit / 32 * 4;
    return __funnelshift_r(word_at(chunk, at), word_at(chunk, (u64)at + 4), bit);
}

// Reads a plane of one segment, LSB-first (R-CNV-002). Each lane has its own reader.
//
//   memory   16 bytes, 16 bytes, …     the lane loads them before they are needed
//   coming   `left` words, the next one in `a`
//   a b c d  the words before them; `place`, the next bit of the chunk, is in `a`
//
// So the next 32 bits are always in registers. Bits past the chunk's end are zero. Reading past a segment's end is
// harmless, and `place` shows it.
struct Reader {
    const Words *data;
    u32 count;  // number of `Words` in the chunk
    u32 next;   // index of the `Words` to load next
    u32 a, b, c, d;
    Words coming;
    u32 left;
    u32 place;
};

__device__ inline Words load_words(Reader &r) {
    Words words = {0, 0, 0, 0};
    if (r.next < r.count) words = r.data[r.next];
    r.next++;
    return words;
}

// Advances by one word.
__device__ inline void advance(Reader &r) {
    r.a = r.b;
    r.b = r.c;
    r.c = r.d;
    r.d = r.coming.a;
    r.coming.a = r.coming.b;
    r.coming.b = r.coming.c;
    r.coming.c = r.coming.d;
    if (--r.left == 0) {
        r.coming = load_words(r);
        r.left = 4;
    }
}

__device__ inline Reader reader_at(Chunk chunk, u32 bit) {
    Reader r;
    r.data = (const Words *)chunk.data;
    r.count = chunk.length >> 4;
    r.next = bit >> 7;
    Words first = load_words(r);
    r.a = first.a;
    r.b = first.b;
    r.c = first.c;
    r.d = first.d;
    r.coming = load_words(r);
    r.left = 4;
    r.place = bit;
    for (u32 words = bit >> 5 & 3; words; words--) advance(r);
    return r;
}

// Returns the next 32 bits. Does not advance.
__device__ inline u32 peek(const Reader &r) { return __funnelshift_r(r.a, r.b, r.place); }

// Advances by at most 32 bits.
__device__ inline void skip(Reader &r, u32 bits) {
    u32 offset = (r.place & 31) + bits;
    r.place += bits;
    if (offset & 32) advance(r);
}

// Reads the next `width` bits, at most 32.
__device__ inline u32 take_word(Reader &r, u32 width) {
    u32 value = peek(r) & (width < 32 ? (1u << width) - 1 : ~0u);
    skip(r, width);
    return value;
}

// Reads the next `width` bits, at most 64.
__device__ inline u64 take(Reader &r, u32 width) {
    if (width <= 32) return take_word(r, width);
    u64 low = take_word(r, 32);
    return low | (u64)take_word(r, width - 32) << 32;
}
