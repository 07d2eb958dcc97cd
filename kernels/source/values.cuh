// Converts levels to numbers (SPEC.md chapters 11 to 14) with single IEEE operations on binary32 and binary64, which are
// never fused. Integer operations widen and round the narrower dtypes, so that every compiler gives the same bits.
#pragma once
#include "recipe.cuh"

// A float dtype narrower than 32 bits.
struct Narrow {
    u32 exponent, mantissa;  // bits
    u32 infinity;            // the pattern of a number that is too great
};

__device__ inline Narrow narrow_of(u32 dtype) {
    Narrow f16 = {5, 10, 0x7C00}, bf16 = {8, 7, 0x7F80}, e4m3 = {4, 3, 0x7F}, e5m2 = {5, 2, 0x7C};
    return dtype == F16 ? f16 : dtype == BF16 ? bf16 : dtype == F8_E4M3 ? e4m3 : e5m2;
}

// Returns the bits of a dtype.
__device__ inline u32 bits_of(u32 dtype) { return dtype == F64 ? 64 : dtype == F32 ? 32 : dtype <= BF16 ? 16 : 8; }

// Returns the least pattern of a dtype, without its sign, that is not finite (SPEC.md 25.1).
__device__ inline u64 first_not_finite(u32 dtype) {
    if (dtype == F64) return 0x7FF0000000000000ull;
    return dtype == F32 ? 0x7F800000u : narrow_of(dtype).infinity;
}

// Returns the bit pattern of a level: moves the sign from the lowest bit to the highest (SPEC.md chapter 11).
__device__ inline u64 pattern_of_level(u64 level, u32 dtype) {
    return level >> 1 | (level & 1) << (bits_of(dtype) - 1);
}

// Converts a finite number of a dtype of at most 32 bits to binary32.
__device__ inline float widened(u32 pattern, u32 dtype) {
    if (dtype == F32) return __uint_as_float(pattern);
    Narrow narrow = narrow_of(dtype);
    u32 width = narrow.exponent + narrow.mantissa, bias = (1u << (narrow.exponent - 1)) - 1;
    u32 sign = pattern >> width << 31, rest = pattern & ((1u << width) - 1);
    if (rest >> narrow.mantissa) {
        return __uint_as_float(sign | ((rest << (23 - narrow.mantissa)) + ((127 - bias) << 23)));
    }
    if (narrow.exponent == 8) return __uint_as_float(sign | rest << (23 - narrow.mantissa));
    // Subnormal: an integer times the least number, which is a power of two.
    float least_number = __uint_as_float((128 - bias - narrow.mantissa) << 23);
    return __uint_as_float(sign | __float_as_uint(__fmul_rn((float)rest, least_number)));
}

// Rounds a number, which must not be a NaN, to a narrower dtype: to nearest, ties to even (R-REC-002, R-REC-003).
__device__ inline u32 rounded(float number, u32 dtype) {
    Narrow narrow = narrow_of(dtype);
    u32 bits = __float_as_uint(number), size = bits & 0x7FFFFFFF;
    u32 bias = (1u << (narrow.exponent - 1)) - 1, drop = 23 - narrow.mantissa;
    u32 exponent = size >> 23, least_normal = 128 - bias;
    u32 whole = size, offset = (127 - bias) << narrow.mantissa;
    if (exponent < least_normal) {  // subnormal in that dtype: drops more bits, and the exponent field is 0
        u32 real = exponent ? exponent : 1;
        whole = (size & 0x7FFFFF) | (exponent ? 0x800000 : 0);
        drop += least_normal - real;
        offset = 0;
    }
    u32 pattern = 0;
    if (drop < 26) pattern = (whole + ((1u << (drop - 1)) - 1) + (whole >> drop & 1)) >> drop;
    pattern -= offset;
    if (pattern > narrow.infinity) pattern = narrow.infinity;
    return pattern | bits >> 31 << (narrow.exponent + narrow.mantissa);
}

// Converts a binary32 to the bit pattern of a dtype.
__device__ inline u64 pattern_of_number(float number, u32 dtype) {
    if (dtype == F32) return __float_as_uint(number);
    if (dtype == F64) return (u64)__double_as_longlong((double)number);
    return rounded(number, dtype);
}

__device__ inline const float *floats(const u8 *bytes, u64 offset) { return (const float *)(bytes + offset); }

// Returns the magnitude of a number of a `uniform` or `table` quantiser.
__device__ inline float magnitude(u32 quantiser, u32 number, float step, const float *centroids) {
    return quantiser == UNIFORM ? __fmul_rn(__uint2float_rn(number), step) : centroids[number];
}

// Returns the importance of a level of the importance stream (SPEC.md chapter 13).
__device__ inline float importance_of_level(const u8 *bytes, const Recipe &recipe, u64 level) {
    if (recipe.importance_quantiser == EXACT) {
        return widened((u32)pattern_of_level(level, recipe.importance_coded), recipe.importance_coded);
    }
    const float *centroids = floats(bytes, recipe.importance_centroids);
    return magnitude(recipe.importance_quantiser, (u32)level, recipe.importance_step, centroids);
}

// Quotient and remainder of a position that only increases: one division per segment, then subtractions.
struct Place {
    u64 quotient, remainder, unit;
};

__device__ inline Place place_at(u64 position, u64 unit) {
    Place place = {position / unit, position % unit, unit};
    return place;
}

__device__ inline void advance(Place &place, u32 by) {
    place.remainder += by;
    while (place.remainder >= place.unit) {
        place.remainder -= place.unit;
        place.quotient++;
    }
}

__device__ inline float scale_of(const u8 *bytes, const Recipe &recipe, const Place &place) {
    const float *scale = floats(bytes, recipe.scale);
    if (recipe.scale_by == SCALE_TENSOR) return scale[0];
    return scale[recipe.scale_by == SCALE_QUOTIENT ? place.quotient : place.remainder];
}

__device__ inline float factor_of(const u8 *bytes, const Recipe &recipe, const Place &place) {
    float row = floats(bytes, recipe.row_factors)[place.quotient];
    return __fmul_rn(row, floats(bytes, recipe.column_factors)[place.remainder]);
}

// Returns the weight of an exact level, as a bit pattern (SPEC.md chapter 14).
__device__ inline u64 exact_weight(const Recipe &recipe, u64 level, float importance) {
    u32 dtype = recipe.dtype, coded = recipe.coded;
    u64 pattern = pattern_of_level(level, coded);
    if (coded == dtype) {
        u64 size = pattern & (((u64)1 << (bits_of(dtype) - 1)) - 1);
        if (recipe.multiplier == NO_MULTIPLIER || size >= first_not_finite(dtype)) return pattern;
        if (dtype == F64) {
            double product = __dmul_rn(__longlong_as_double((long long)pattern), (double)importance);
            return (u64)__double_as_longlong(product);
        }
        return pattern_of_number(__fmul_rn(widened((u32)pattern, coded), importance), dtype);
    }
    // A narrower dtype, without infinities and NaNs: binary32 represents all of its numbers.
    float number = widened((u32)pattern, coded);
    if (recipe.multiplier == NO_MULTIPLIER) return pattern_of_number(number, dtype);
    if (dtype == F64) return (u64)__double_as_longlong(__dmul_rn((double)number, (double)importance));
    return pattern_of_number(__fmul_rn(number, importance), dtype);
}

// Returns the weight of a level of a `uniform` or `table` quantiser, as a bit pattern.
__device__ inline u64 quantised_weight(
    const u8 *bytes, const Recipe &recipe, u64 level, const Place &scale, float importance
) {
    const float *centroids = floats(bytes, recipe.centroids);
    float number = magnitude(recipe.quantiser, (u32)(level >> 1), recipe.step, centroids);
    if (level & 1) number = -number;
    if (recipe.scale_by != NO_SCALE) number = __fmul_rn(number, scale_of(bytes, recipe, scale));
    if (recipe.multiplier != NO_MULTIPLIER) number = __fmul_rn(number, importance);
    return pattern_of_number(number, recipe.dtype);
}
