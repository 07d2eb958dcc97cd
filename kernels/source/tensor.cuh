// GPU instructions for which CUDA C++ has no function: permutation of bytes by unmasked selectors, asynchronous copies,
// rounding of two numbers at once, products on tensor cores. The last three need compute capability 8.0. On older devices
// copies are synchronous, and the kernels of product.cuh do nothing. host_tensor.h implements the same functions for the
// host.
#pragma once
#include "values.cuh"

// The dtype of the factors of a product.
enum Kind { OF_BF16, OF_F16 };

#ifdef __CUDACC__

// Returns a byte for each of the lowest four nibbles of `chosen`: a byte of `low` (0 to 3) or of `high` (4 to 7); or, if
// the nibble's highest bit is set, eight times the highest bit of that byte. `__byte_perm` ignores this bit.
__device__ inline u32 permuted(u32 low, u32 high, u32 chosen) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(chosen));
    return bytes;
}

// Shifts a word by a constant number of bits, with a multiplication: multiplications have their own pipeline, which is
// less busy than that of other integer instructions.
template <u32 BITS> __device__ inline u32 shifted_right(u32 word) {
#ifdef SHIFT_BY_SHIFTING
    return word >> BITS;
#else
    u32 upper;
    asm("mul.hi.u32 %0, %1, %2;" : "=r"(upper) : "r"(word), "n"(1u << (32 - BITS)));
    return upper;
#endif
}

#if __CUDA_ARCH__ >= 800

enum : u32 { HAS_TENSORS = 1 };

// Begins to copy 16 bytes to shared memory.
__device__ inline void copy_ahead(Words *to, const Words *from) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// Begins to copy `WORDS` words, 1, 2 or 4, to shared memory. If not `there`, writes zeros and reads nothing.
template <u32 WORDS> __device__ inline void copy_if(u32 *to, const u32 *from, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(to), bytes = there ? 4 * WORDS : 0;
    if (WORDS == 4) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(bytes), "n"(4 * WORDS)
                     : "memory");
    }
}

// Makes a group of the copies that this lane began since its last call.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the copies that this lane began, except those of its last `GROUPS` groups.
template <u32 GROUPS> __device__ inline void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Waits for all copies that this lane began.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Returns two numbers in the halves of a word, rounded to nearest, ties to even.
template <Kind KIND> __device__ inline u32 two_rounded(float low, float high) {
    u32 both;
    if (KIND == OF_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Computes sum [16, 8] += a [16, 16] @ b [16, 8] with a warp. With row = lane / 4 and two = 2 × (lane % 4), a lane has
//
//   sum  [row, two], [row, two + 1], [row + 8, two], [row + 8, two + 1]
//   a    two numbers a word: [row, two …], [row + 8, two …], [row, two + 8 …], [row + 8, two + 8 …]
//   b    two numbers a word: [two …, row], [two + 8 …, row]
template <Kind KIND>
__device__ inline void multiply_add(float *sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (KIND == OF_BF16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

#else

enum : u32 { HAS_TENSORS = 0 };
__device__ inline void copy_ahead(Words *, const Words *) {}
template <u32 WORDS> __device__ inline void copy_if(u32 *to, const u32 *from, bool there) {
#pragma unroll
    for (u32 i = 0; i < WORDS; i++) to[i] = there ? from[i] : 0;
}
__device__ inline void close_copies() {}
template <u32 GROUPS> __device__ inline void wait_for_all_but() {}
__device__ inline void wait_for_copies() {}
template <Kind KIND> __device__ inline u32 two_rounded(float, float) { return 0; }
template <Kind KIND> __device__ inline void multiply_add(float *, u32, u32, u32, u32, u32, u32) {}

#endif
#endif
