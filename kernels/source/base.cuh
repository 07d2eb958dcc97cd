// Words, memory and bits: what everything else stands on.
//
// Rules: no header is included, so that the source is one string, which NVRTC compiles without a path and a cache
// can name by its bytes. What CUDA has and C++17 has not is given by host.h, which only the host compiler sees.
// Bytes of a file are read by `Chunk`, `Reader` and `Ring` alone, which compare every offset with the chunk's length.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL_LANES 0xFFFFFFFFu
enum : u32 { WARP = 32, WARPS = 4, THREADS = WARPS * WARP };  // lanes a warp, warps and threads a block

// What is wrong with a segment, or with the chunk that it is in; 0 where nothing is. An error word says that the
// weights mean nothing and that the reference has to judge; it does not say which clause is broken.
enum : u32 {
    WRONG_HEADER = 1,   // header or index fields (SPEC.md 15.2)
    WRONG_LAYOUT = 2,   // parts that do not fit the chunk (SPEC.md 15.1)
    WRONG_PADDING = 4,  // bits that must be zero
    WRONG_END = 8,      // a segment that ends elsewhere than the index says (R-PLN-003)
    WRONG_MASK = 16,    // R-MSK-004 to R-MSK-006
    WRONG_PAIR = 32,    // the second class of a last symbol (R-PLN-002)
    NOT_FOR_THIS = 64   // a chunk whose bits cannot be counted in 32 bits
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

// The byte at an offset, 0 outside of the chunk.
__device__ inline u32 byte_at(Chunk chunk, u64 offset) {
    return offset < chunk.length ? chunk.data[offset] : 0;
}

// The 4 bytes from an offset on that is a multiple of 4, 0 outside of the chunk.
__device__ inline u32 word_at(Chunk chunk, u64 offset) {
    return offset + 4 <= chunk.length ? *(const u32 *)(chunk.data + offset) : 0;
}

// The 16 bytes from an offset on that is a multiple of 16, 0 outside of the chunk.
__device__ inline Words words_at(Chunk chunk, u32 offset) {
    Words words = {0, 0, 0, 0};
    if (offset < chunk.length && chunk.length - offset >= sizeof(Words)) words = *(const Words *)(chunk.data + offset);
    return words;
}

// A plane of one segment, read from its first bit on: LSB-first (R-CNV-002). A lane has one of its own.
//
//   memory   16 bytes, 16 bytes, …     a lane loads them for itself, ahead of its need
//   coming   `left` words, the next one in `a`
//   a b c d  the words that come before; `place` is the next bit of the chunk, and in `a`
//
// So 32 bits are always at hand. What lies past the chunk's end reads as zero. Reading past a segment's end is
// harmless, and shows in `place`.
struct Reader {
    const Words *data;
    u32 count;  // of 16 bytes in the chunk
    u32 next;   // the 16 bytes to load next
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

// Goes on by a word.
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

// The next 32 bits, which stay.
__device__ inline u32 peek(const Reader &r) { return __funnelshift_r(r.a, r.b, r.place); }

// Goes on by at most 32 bits.
__device__ inline void skip(Reader &r, u32 bits) {
    u32 offset = (r.place & 31) + bits;
    r.place += bits;
    if (offset & 32) advance(r);
}

// The next `width` bits, at most 32.
__device__ inline u32 take_word(Reader &r, u32 width) {
    u32 value = peek(r) & (width < 32 ? (1u << width) - 1 : ~0u);
    skip(r, width);
    return value;
}

// The next `width` bits, at most 64.
__device__ inline u64 take(Reader &r, u32 width) {
    if (width <= 32) return take_word(r, width);
    u64 low = take_word(r, 32);
    return low | (u64)take_word(r, width - 32) << 32;
}
