// Implements the functions of tensor.cuh for the host compiler.
#pragma once
#include "tensor.cuh"

enum : u32 { HAS_TENSORS = 1 };

inline u32 permuted(u32 low, u32 high, u32 chosen) {
    u32 bytes = __byte_perm(low, high, chosen), out = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 byte = bytes >> 8 * i & 255;
        if (chosen >> 4 * i & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}

template <u32 BITS> inline u32 shifted_right(u32 word) { return word >> BITS; }

// A copy runs at once, or when the lane waits for it. CUDA allows both, and a kernel must work with both.
void copy_words(u32 *to, const u32 *from, u32 words);
void close_copies();
void wait_for_groups(u32 but);
void wait_for_copies();

inline void copy_ahead(Words *to, const Words *from) { copy_words((u32 *)to, (const u32 *)from, 4); }

template <u32 WORDS> inline void copy_if(u32 *to, const u32 *from, bool there) {
    static const u32 zeros[WORDS] = {};
    copy_words(to, there ? from : zeros, WORDS);
}

template <u32 GROUPS> inline void wait_for_all_but() { wait_for_groups(GROUPS); }

inline u32 dtype_of(Kind kind) { return kind == OF_BF16 ? BF16 : F16; }

inline u32 rounded_or_nan(float number, u32 dtype) {
    return number == number ? rounded(number, dtype) : narrow_of(dtype).infinity + 1;
}

template <Kind KIND> inline u32 two_rounded(float low, float high) {
    return rounded_or_nan(low, dtype_of(KIND)) | rounded_or_nan(high, dtype_of(KIND)) << 16;
}

inline double number_of(u32 pattern, u32 dtype) {
    u32 size = pattern & 0x7FFF, infinity = narrow_of(dtype).infinity;
    if (size < infinity) return widened(pattern, dtype);
    return size == infinity ? (pattern == size ? 1 : -1) * (double)__builtin_inff() : (double)__builtin_nanf("");
}

// Adds the products of a step in double precision and rounds once: at least as precise as any device.
template <Kind KIND> inline void multiply_add(float *sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Mail *all = exchange({{a0, a1, a2, a3, b0, b1}});
    u32 lane = threadIdx.x % WARP, row = lane / 4, two = lane % 4 * 2, dtype = dtype_of(KIND);
    for (u32 i = 0; i < 4; i++) {
        double total = sum[i];
        for (u32 k = 0; k < 16; k++) {
            u32 quad = k % 8 / 2, upper = k / 8, shift = k % 2 * 16;
            u32 a = all[row * 4 + quad].words[2 * upper + i / 2], b = all[(two + i % 2) * 4 + quad].words[4 + upper];
            total += number_of(a >> shift & 0xFFFF, dtype) * number_of(b >> shift & 0xFFFF, dtype);
        }
        sum[i] = (float)total;
    }
}
