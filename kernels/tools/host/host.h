// Defines what CUDA has and C++17 lacks, for the host compiler, which compiles the kernels' source unchanged.
//
// The threads of a block are fibers, of which one runs at a time; a fiber that waits for its warp or block lets the next
// one run. So barriers, shuffles and shared memory work as on a GPU, and a lane that does not reach a barrier causes an
// error instead of a hang.
#pragma once
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

struct Dim {
    unsigned int x;
};
extern Dim threadIdx, blockIdx, blockDim;

// The values that a lane gives to the other lanes in one exchange.
struct Mail {
    unsigned words[6];
};

// Called by fibers. `exchange` stores a lane's mail, waits for all lanes of the warp, and returns the mail of each.
void wait_for_warp();
void wait_for_block();
const Mail *exchange(const Mail &mail);

inline unsigned long long value_of(const Mail &mail) { return mail.words[0] | (unsigned long long)mail.words[1] << 32; }
inline const Mail *exchange(unsigned long long value) { return exchange({{(unsigned)value, (unsigned)(value >> 32)}}); }

inline void __syncwarp() { wait_for_warp(); }
inline void __syncthreads() { wait_for_block(); }

inline unsigned long long __shfl_sync(unsigned, unsigned long long value, unsigned lane) {
    return value_of(exchange(value)[lane]);
}

inline unsigned long long __shfl_up_sync(unsigned, unsigned long long value, unsigned step) {
    unsigned lane = threadIdx.x % 32;
    return value_of(exchange(value)[lane < step ? lane : lane - step]);
}

inline bool __any_sync(unsigned, bool value) {
    const Mail *all = exchange(value);
    bool any = false;
    for (int lane = 0; lane < 32; lane++) any |= value_of(all[lane]) != 0;
    return any;
}

inline unsigned __ballot_sync(unsigned, bool value) {
    const Mail *all = exchange(value);
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < 32; lane++) lanes |= (unsigned)(value_of(all[lane]) != 0) << lane;
    return lanes;
}

inline void atomicOr(unsigned *word, unsigned bits) { *word |= bits; }

inline unsigned atomicAdd(unsigned *word, unsigned more) {
    unsigned before = *word;
    *word += more;
    return before;
}

inline void __threadfence() {}
inline float __ldcg(const float *number) { return *number; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

inline unsigned __brev(unsigned x) {
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (x >> i & 1) << (31 - i);
    return out;
}

inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((low | (unsigned long long)high << 32) >> (shift & 31));
}

// Also shifts by 32 bits.
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
    unsigned long long both = low | (unsigned long long)high << 32;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (chosen >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

template <class To, class From> inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Compiled with -ffp-contract=off: the compiler fuses nothing, so that every operation is a single one of IEEE 754.
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float number) { return same_bits<unsigned>(number); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
inline long long __double_as_longlong(double number) { return same_bits<long long>(number); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint2float_rn(unsigned number) { return (float)number; }
