/* A reader of .sfp files, written from SPEC.md. Chapter numbers below are those of that document.
 *
 * Order, from the bottom up: faults; bytes and bits; numbers; MessagePack; the maps of the directory; streams,
 * chunks and segments of a tensor; the functions of sfp.h.
 *
 * Safety against hostile files: check_encoding checks the whole directory as MessagePack before any other
 * function uses it, and later accesses check bounds again. The sizes of a chunk's parts are compared with its
 * length before any bit of them is read. At least 16 bytes follow each part, so that 8 bytes can be loaded at
 * every bit of a part and at its end. Every loop over a segment's bits in a plane compares with their end.
 */
#include "sfp.h"

#include <float.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* Reconstruction uses binary32 and binary64 operations, each rounded to its type (chapter 14). It contains no sum
 * of products that a compiler could fuse; the Makefile sets -ffp-contract=off nevertheless. */
#if CHAR_BIT != 8 || FLT_RADIX != 2 || FLT_MANT_DIG != 24 || FLT_MAX_EXP != 128 || DBL_MANT_DIG != 53
#error "binary32 as float and binary64 as double are needed"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 1
#error "float and double arithmetic must not be done in a wider type than double (gcc on x86: -mfpmath=sse)"
#endif

/* ------------------------------------------------------------------------------------------------ faults */

/* The requirements by which a reader refuses files, with their error codes. */
#define CLAUSES(X)                                                                                             \
    X(R_PRE_001, "R-PRE-001", SFP_E_MAGIC)                                                                     \
    X(R_PRE_002, "R-PRE-002", SFP_E_TRUNCATED)                                                                 \
    X(R_PRE_003, "R-PRE-003", SFP_E_CRC)                                                                       \
    X(R_PRE_004, "R-PRE-004", SFP_E_VERSION)                                                                   \
    X(R_PRE_006, "R-PRE-006", SFP_E_RESERVED)                                                                  \
    X(R_PRE_007, "R-PRE-007", SFP_E_TRUNCATED)                                                                 \
    X(R_PRE_008, "R-PRE-008", SFP_E_TRAILING)                                                                  \
    X(R_PRE_009, "R-PRE-009", SFP_E_LAYOUT)                                                                    \
    X(R_PRE_010, "R-PRE-010", SFP_E_CRC)                                                                       \
    X(R_PRE_011, "R-PRE-011", SFP_E_LAYOUT)                                                                    \
    X(R_LAY_002, "R-LAY-002", SFP_E_LAYOUT)                                                                    \
    X(R_LAY_003, "R-LAY-003", SFP_E_LAYOUT)                                                                    \
    X(R_LAY_004, "R-LAY-004", SFP_E_CRC)                                                                       \
    X(R_MSG_001, "R-MSG-001", SFP_E_ENCODING)                                                                  \
    X(R_MSG_002, "R-MSG-002", SFP_E_ENCODING)                                                                  \
    X(R_MSG_003, "R-MSG-003", SFP_E_ENCODING)                                                                  \
    X(R_MSG_004, "R-MSG-004", SFP_E_ENCODING)                                                                  \
    X(R_MSG_005, "R-MSG-005", SFP_E_ENCODING)                                                                  \
    X(R_MSG_006, "R-MSG-006", SFP_E_TRAILING)                                                                  \
    X(R_MSG_007, "R-MSG-007", SFP_E_TRUNCATED)                                                                 \
    X(R_DIR_001, "R-DIR-001", SFP_E_ENCODING)                                                                  \
    X(R_DIR_002, "R-DIR-002", SFP_E_ENCODING)                                                                  \
    X(R_DIR_003, "R-DIR-003", SFP_E_ENCODING)                                                                  \
    X(R_DIR_004, "R-DIR-004", SFP_E_ENCODING)                                                                  \
    X(R_DIR_007, "R-DIR-007", SFP_E_ENCODING)                                                                  \
    X(R_TEN_001, "R-TEN-001", SFP_E_ENCODING)                                                                  \
    X(R_TEN_002, "R-TEN-002", SFP_E_RANGE)                                                                     \
    X(R_TEN_003, "R-TEN-003", SFP_E_FEATURE)                                                                   \
    X(R_TEN_004, "R-TEN-004", SFP_E_FEATURE)                                                                   \
    X(R_TEN_005, "R-TEN-005", SFP_E_RANGE)                                                                     \
    X(R_TEN_006, "R-TEN-006", SFP_E_RANGE)                                                                     \
    X(R_TEN_007, "R-TEN-007", SFP_E_RANGE)                                                                     \
    X(R_TEN_008, "R-TEN-008", SFP_E_LAYOUT)                                                                    \
    X(R_TEN_010, "R-TEN-010", SFP_E_RANGE)                                                                     \
    X(R_TEN_012, "R-TEN-012", SFP_E_LAYOUT)                                                                    \
    X(R_TAB_001, "R-TAB-001", SFP_E_RANGE)                                                                     \
    X(R_TAB_002, "R-TAB-002", SFP_E_RANGE)                                                                     \
    X(R_TAB_003, "R-TAB-003", SFP_E_RANGE)                                                                     \
    X(R_TAB_004, "R-TAB-004", SFP_E_RANGE)                                                                     \
    X(R_TAB_005, "R-TAB-005", SFP_E_RANGE)                                                                     \
    X(R_TAB_006, "R-TAB-006", SFP_E_RANGE)                                                                     \
    X(R_TAB_007, "R-TAB-007", SFP_E_RANGE)                                                                     \
    X(R_TAB_008, "R-TAB-008", SFP_E_RANGE)                                                                     \
    X(R_TAB_009, "R-TAB-009", SFP_E_RANGE)                                                                     \
    X(R_TAB_010, "R-TAB-010", SFP_E_RESERVED)                                                                  \
    X(R_TAB_011, "R-TAB-011", SFP_E_RANGE)                                                                     \
    X(R_TAB_012, "R-TAB-012", SFP_E_RANGE)                                                                     \
    X(R_PLN_002, "R-PLN-002", SFP_E_RESERVED)                                                                  \
    X(R_PLN_003, "R-PLN-003", SFP_E_LAYOUT)                                                                    \
    X(R_PLN_004, "R-PLN-004", SFP_E_RESERVED)                                                                  \
    X(R_PLN_005, "R-PLN-005", SFP_E_RANGE)                                                                     \
    X(R_MSK_001, "R-MSK-001", SFP_E_FEATURE)                                                                   \
    X(R_MSK_002, "R-MSK-002", SFP_E_RANGE)                                                                     \
    X(R_MSK_004, "R-MSK-004", SFP_E_RANGE)                                                                     \
    X(R_MSK_005, "R-MSK-005", SFP_E_LAYOUT)                                                                    \
    X(R_MSK_006, "R-MSK-006", SFP_E_RESERVED)                                                                  \
    X(R_QNT_001, "R-QNT-001", SFP_E_FEATURE)                                                                   \
    X(R_QNT_002, "R-QNT-002", SFP_E_RANGE)                                                                     \
    X(R_QNT_003, "R-QNT-003", SFP_E_RANGE)                                                                     \
    X(R_QNT_004, "R-QNT-004", SFP_E_RANGE)                                                                     \
    X(R_QNT_005, "R-QNT-005", SFP_E_RANGE)                                                                     \
    X(R_QNT_006, "R-QNT-006", SFP_E_RANGE)                                                                     \
    X(R_QNT_007, "R-QNT-007", SFP_E_RANGE)                                                                     \
    X(R_QNT_008, "R-QNT-008", SFP_E_RANGE)                                                                     \
    X(R_SCL_001, "R-SCL-001", SFP_E_FEATURE)                                                                   \
    X(R_SCL_002, "R-SCL-002", SFP_E_RANGE)                                                                     \
    X(R_SCL_003, "R-SCL-003", SFP_E_RANGE)                                                                     \
    X(R_SCL_004, "R-SCL-004", SFP_E_RANGE)                                                                     \
    X(R_SCL_006, "R-SCL-006", SFP_E_RANGE)                                                                     \
    X(R_IMP_001, "R-IMP-001", SFP_E_FEATURE)                                                                   \
    X(R_IMP_002, "R-IMP-002", SFP_E_FEATURE)                                                                   \
    X(R_IMP_003, "R-IMP-003", SFP_E_RANGE)                                                                     \
    X(R_IMP_004, "R-IMP-004", SFP_E_RANGE)                                                                     \
    X(R_IMP_005, "R-IMP-005", SFP_E_RANGE)                                                                     \
    X(R_IMP_006, "R-IMP-006", SFP_E_RANGE)                                                                     \
    X(R_CHK_001, "R-CHK-001", SFP_E_LAYOUT)                                                                    \
    X(R_CHK_002, "R-CHK-002", SFP_E_RESERVED)                                                                  \
    X(R_CHK_003, "R-CHK-003", SFP_E_RESERVED)                                                                  \
    X(R_IDX_001, "R-IDX-001", SFP_E_RANGE)                                                                     \
    X(R_IDX_002, "R-IDX-002", SFP_E_RANGE)                                                                     \
    X(R_IDX_003, "R-IDX-003", SFP_E_LAYOUT)                                                                    \
    X(R_IDX_004, "R-IDX-004", SFP_E_RESERVED)                                                                  \
    X(R_IDX_005, "R-IDX-005", SFP_E_RANGE)                                                                     \
    X(R_IDX_006, "R-IDX-006", SFP_E_RANGE)                                                                     \
    X(R_VEC_001, "R-VEC-001", SFP_E_LAYOUT)                                                                    \
    X(R_VEC_002, "R-VEC-002", SFP_E_RESERVED)                                                                  \
    X(R_RAW_002, "R-RAW-002", SFP_E_LAYOUT)                                                                    \
    X(R_RAW_003, "R-RAW-003", SFP_E_RESERVED)                                                                  \
    X(R_RAW_004, "R-RAW-004", SFP_E_RANGE)                                                                     \
    X(R_KEY_002, "R-KEY-002", SFP_E_RANGE)                                                                     \
    X(R_KEY_003, "R-KEY-003", SFP_E_ENCODING)                                                                  \
    X(R_KEY_004, "R-KEY-004", SFP_E_RANGE)                                                                     \
    X(R_KEY_005, "R-KEY-005", SFP_E_RANGE)                                                                     \
    X(R_KEY_006, "R-KEY-006", SFP_E_RANGE)                                                                     \
    X(R_KEY_007, "R-KEY-007", SFP_E_RANGE)                                                                     \
    X(R_KEY_008, "R-KEY-008", SFP_E_FEATURE)                                                                   \
    X(R_KEY_009, "R-KEY-009", SFP_E_RANGE)                                                                     \
    X(R_KEY_010, "R-KEY-010", SFP_E_RANGE)                                                                     \
    X(R_KEY_011, "R-KEY-011", SFP_E_LAYOUT)                                                                    \
    X(R_KEY_012, "R-KEY-012", SFP_E_LAYOUT)                                                                    \
    X(R_KEY_013, "R-KEY-013", SFP_E_FEATURE)                                                                   \
    X(R_LIM_002, "R-LIM-002", SFP_E_LIMIT)                                                                     \
    X(R_FEA_001, "R-FEA-001", SFP_E_FEATURE)                                                                   \
    X(R_FEA_002, "R-FEA-002", SFP_E_ENCODING)                                                                  \
    X(R_DLT_001, "R-DLT-001", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_002, "R-DLT-002", SFP_E_ENCODING)                                                                  \
    X(R_DLT_003, "R-DLT-003", SFP_E_RANGE)                                                                     \
    X(R_DLT_004, "R-DLT-004", SFP_E_RANGE)                                                                     \
    X(R_DLT_005, "R-DLT-005", SFP_E_RANGE)                                                                     \
    X(R_DLT_006, "R-DLT-006", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_007, "R-DLT-007", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_008, "R-DLT-008", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_009, "R-DLT-009", SFP_E_BASE)                                                                      \
    X(R_DLT_010, "R-DLT-010", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_011, "R-DLT-011", SFP_E_RANGE)                                                                     \
    X(R_DLT_012, "R-DLT-012", SFP_E_CRC)                                                                       \
    X(R_DLT_016, "R-DLT-016", SFP_E_RANGE)                                                                     \
    X(R_DLT_017, "R-DLT-017", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_018, "R-DLT-018", SFP_E_LAYOUT)                                                                    \
    X(R_DLT_019, "R-DLT-019", SFP_E_RANGE)                                                                     \
    X(R_DLT_020, "R-DLT-020", SFP_E_RANGE)

#define AS_NAME(name, id, error) name,
#define AS_ROW(name, id, error) {id, error},

typedef enum clause { CLAUSES(AS_NAME) CLAUSE_COUNT } clause;

static const struct {
    const char *id;
    sfp_error error;
} CLAUSE_TABLE[CLAUSE_COUNT] = {CLAUSES(AS_ROW)};

static const sfp_span NO_SPAN = {NULL, 0};

/* Sets a fault. Always returns false, which the caller returns. */
static bool refuse(sfp_fault *fault, clause broken, uint64_t offset, const char *detail)
{
    fault->error = CLAUSE_TABLE[broken].error;
    fault->clause = CLAUSE_TABLE[broken].id;
    fault->detail = detail;
    fault->tensor = NO_SPAN;
    fault->feature = NO_SPAN;
    fault->offset = offset;
    return false;
}

/* Sets the tensor of a fault to a joined name of a delta, which is not in the bytes of the file. */
static void name_joined(sfp_fault *fault, sfp_span name)
{
    fault->tensor = NO_SPAN;
    if (name.length <= sizeof fault->joined) {
        memcpy(fault->joined, name.bytes, name.length);
        fault->tensor.bytes = fault->joined;
        fault->tensor.length = name.length;
    }
}

const char *sfp_error_name(sfp_error error)
{
    static const char *const names[] = {
        "E_MAGIC",    "E_VERSION", "E_TRUNCATED", "E_TRAILING", "E_CRC",   "E_RESERVED",
        "E_ENCODING", "E_RANGE",   "E_LAYOUT",    "E_FEATURE",  "E_LIMIT", "E_BASE",
    };
    return names[error];
}

/* ------------------------------------------------------------------------------------------ bytes and bits */

/* The functions that run for every bit and every value are inline. Compilers turn their loads and stores of single
 * bytes into one instruction. */

static inline uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t load64(const uint8_t *p)
{
    return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24 |
           (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

/* Returns the integer of 1, 2, 4 or 8 bytes at p. */
static uint64_t load(const uint8_t *p, size_t size)
{
    switch (size) {
    case 1: return p[0];
    case 2: return (uint64_t)p[0] | (uint64_t)p[1] << 8;
    case 4: return load32(p);
    default: return load64(p);
    }
}

static inline void store16(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)x;
    p[1] = (uint8_t)(x >> 8);
}

static inline void store32(uint8_t *p, uint32_t x)
{
    store16(p, x);
    store16(p + 2, x >> 16);
}

static inline void store64(uint8_t *p, uint64_t x)
{
    store32(p, (uint32_t)x);
    store32(p + 4, (uint32_t)(x >> 32));
}

/* Returns at least 57 bits of a bit sequence, from bit `at` on. */
static inline uint64_t peek(const uint8_t *bits, uint64_t at)
{
    return load64(bits + (at >> 3)) >> (at & 7);
}

/* Returns 2^width - 1, for widths below 64. */
static inline uint64_t ones(unsigned width)
{
    return ((uint64_t)1 << width) - 1;
}

/* Returns ceil(a / b), for b > 0. */
static uint64_t divide_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* Returns x rounded up to a multiple of k, a power of two. */
static uint64_t align(uint64_t x, uint64_t k)
{
    return (x + k - 1) & ~(k - 1);
}

/* Returns the index of the first byte in from..to-1 that is not zero, or `to`. */
static uint64_t first_nonzero(const uint8_t *bytes, uint64_t from, uint64_t to)
{
    while (from < to && bytes[from] == 0) {
        from++;
    }
    return from;
}

/* Tables for a CRC-32 of eight bytes at once: shares[i][b] is the contribution of byte b that i bytes follow. */
typedef struct crc_tables {
    uint32_t shares[8][256];
} crc_tables;

static void fill_crc_tables(crc_tables *t)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ ((crc & 1) != 0 ? UINT32_C(0xEDB88320) : 0);
        }
        t->shares[0][b] = crc;
    }
    for (size_t i = 1; i < 8; i++) {
        for (size_t b = 0; b < 256; b++) {
            uint32_t before = t->shares[i - 1][b];
            t->shares[i][b] = before >> 8 ^ t->shares[0][before & 255];
        }
    }
}

static uint32_t crc32(const crc_tables *t, const uint8_t *bytes, uint64_t length)
{
    const uint32_t(*share)[256] = t->shares;
    uint32_t crc = UINT32_C(0xFFFFFFFF);
    for (; length >= 8; length -= 8, bytes += 8) {
        uint32_t low = load32(bytes) ^ crc;
        uint32_t high = load32(bytes + 4);
        crc = share[7][low & 255] ^ share[6][low >> 8 & 255] ^ share[5][low >> 16 & 255] ^ share[4][low >> 24] ^
              share[3][high & 255] ^ share[2][high >> 8 & 255] ^ share[1][high >> 16 & 255] ^
              share[0][high >> 24];
    }
    for (; length > 0; length--, bytes++) {
        crc = crc >> 8 ^ share[0][(crc ^ *bytes) & 255];
    }
    return ~crc;
}

/* ------------------------------------------------------------------------------------------------- numbers */

typedef enum dtype_id {
    F64,
    F32,
    F16,
    BF16,
    F8_E4M3,
    F8_E5M2,
    BOOL,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    C64,
    C128,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    DTYPE_COUNT
} dtype_id;

typedef struct dtype {
    const char *name;
    unsigned bits;
    unsigned mantissa;  /* bits of the mantissa; this and the following fields are 0 except for floats */
    uint64_t nonfinite; /* the first pattern that is not finite; 0 if coding `fingerprint` excludes the dtype */
    unsigned widens_to; /* a bit for each dtype_id to which it widens */
} dtype;

#define WIDE (1u << F32 | 1u << F64)
#define WIDER (WIDE | 1u << F16 | 1u << BF16)

/* Chapter 25.1. */
static const dtype DTYPES[DTYPE_COUNT] = {
    [F64] = {"F64", 64, 52, UINT64_C(0x7FF0000000000000), 0},
    [F32] = {"F32", 32, 23, 0x7F800000, 1u << F64},
    [F16] = {"F16", 16, 10, 0x7C00, WIDE},
    [BF16] = {"BF16", 16, 7, 0x7F80, WIDE},
    [F8_E4M3] = {"F8_E4M3", 8, 3, 0x7F, WIDER},
    [F8_E5M2] = {"F8_E5M2", 8, 2, 0x7C, WIDER},
    [BOOL] = {"BOOL", 8, 0, 0, 0},
    [U8] = {"U8", 8, 0, 0, 0},
    [I8] = {"I8", 8, 0, 0, 0},
    [U16] = {"U16", 16, 0, 0, 0},
    [I16] = {"I16", 16, 0, 0, 0},
    [U32] = {"U32", 32, 0, 0, 0},
    [I32] = {"I32", 32, 0, 0, 0},
    [U64] = {"U64", 64, 0, 0, 0},
    [I64] = {"I64", 64, 0, 0, 0},
    [C64] = {"C64", 64, 0, 0, 0},
    [C128] = {"C128", 128, 0, 0, 0},
    [F8_E8M0] = {"F8_E8M0", 8, 0, 0, 0},
    [F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8, 0, 0, 0},
    [F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8, 0, 0, 0},
};

/* Returns whether scales, factors and exact importances can have the dtype. */
static bool is_factor_dtype(const dtype *t)
{
    return t == &DTYPES[F32] || t == &DTYPES[F16] || t == &DTYPES[BF16];
}

static uint64_t sign_bit(const dtype *t)
{
    return (uint64_t)1 << (t->bits - 1);
}

static bool is_finite_pattern(const dtype *t, uint64_t pattern)
{
    return (pattern & ~sign_bit(t)) < t->nonfinite;
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Returns the product rounded to binary32. If a compiler computes in binary64, the product there is exact, and the
 * cast is the only rounding. */
static float multiply(float a, float b)
{
    return (float)(a * b);
}

static double double_of(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint64_t bits_of_double(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static bool is_finite(float x)
{
    return is_finite_pattern(&DTYPES[F32], bits_of(x));
}

/* Converts a finite number of F32 or a narrower dtype to float. */
static float widen(const dtype *t, uint64_t pattern)
{
    if (t == &DTYPES[F32]) {
        return float_of((uint32_t)pattern);
    }
    if (t == &DTYPES[BF16]) {
        return float_of((uint32_t)pattern << 16);
    }
    uint32_t magnitude = (uint32_t)(pattern & ~sign_bit(t));
    uint32_t sign = (pattern & sign_bit(t)) != 0 ? UINT32_C(1) << 31 : 0;
    if (magnitude == 0) {
        return float_of(sign);
    }
    uint32_t bias = (UINT32_C(1) << (t->bits - 2 - t->mantissa)) - 1;
    uint32_t exponent = (magnitude >> t->mantissa) + 127 - bias;
    uint32_t fraction = magnitude & (uint32_t)ones(t->mantissa);
    if (magnitude >> t->mantissa == 0) { /* subnormal in the dtype, normal in F32: shift until the first bit is implied */
        for (exponent++; fraction >> t->mantissa == 0; exponent--) {
            fraction <<= 1;
        }
        fraction &= (uint32_t)ones(t->mantissa);
    }
    return float_of(sign | exponent << 23 | fraction << (23 - t->mantissa));
}

/* Returns x / 2^shift rounded to nearest, ties to even, for shifts from 1 to 31. */
static uint32_t shift_rounded(uint32_t x, unsigned shift)
{
    uint32_t half_less_one = (UINT32_C(1) << (shift - 1)) - 1;
    return (x + half_less_one + (x >> shift & 1)) >> shift;
}

/* Rounds a float that is not a NaN to F16, BF16 or an 8-bit dtype (R-REC-002, R-REC-003). */
static uint64_t round_to_narrow(const dtype *t, float x)
{
    uint32_t magnitude = bits_of(x) & UINT32_C(0x7FFFFFFF);
    uint64_t sign = bits_of(x) >> 31 != 0 ? sign_bit(t) : 0;
    unsigned shift = 23 - t->mantissa;
    uint32_t bias_less = 127 - ((UINT32_C(1) << (t->bits - 2 - t->mantissa)) - 1);
    uint32_t exponent = magnitude >> 23;
    uint32_t rounded;
    if (exponent > bias_less) { /* normal there too; rounding up can carry into the exponent, which is correct */
        rounded = shift_rounded(magnitude - (bias_less << 23), shift);
    } else {
        uint32_t significand = (magnitude & 0x7FFFFF) | (exponent > 0 ? UINT32_C(1) << 23 : 0);
        shift += bias_less + 1 - (exponent > 0 ? exponent : 1);
        rounded = shift_rounded(significand, shift < 31 ? shift : 31); /* shifts of 26 and more give zero */
    }
    /* The first pattern that is not finite is the infinity or, in E4M3, the only NaN. */
    return sign | (rounded < t->nonfinite ? rounded : t->nonfinite);
}

/* Returns the pattern of a float that is not a NaN in a float dtype: rounded if the dtype is narrower, else exact. */
static uint64_t pattern_of(const dtype *t, float x)
{
    if (t == &DTYPES[F32]) {
        return bits_of(x);
    }
    return t == &DTYPES[F64] ? bits_of_double((double)x) : round_to_narrow(t, x);
}

/* ---------------------------------------------------------------------------------------------- MessagePack */

/* The directory, with the data that the functions that read it need. */
typedef struct directory {
    const uint8_t *bytes;
    size_t length;
    uint64_t offset; /* in the file */
    const sfp_limits *limits;
    sfp_fault *fault;
} directory;

typedef enum kind { NOTHING, UNSIGNED, STRING, BINARY, ARRAY, MAP } kind;

/* A value of the directory. */
typedef struct value {
    kind kind;
    size_t at;       /* offset of its first byte in the directory */
    size_t content;  /* offset of its bytes, elements or pairs */
    uint64_t number; /* the integer, or the number of bytes, elements or pairs */
} value;

static bool refuse_at(const directory *d, clause broken, size_t at, const char *detail)
{
    return refuse(d->fault, broken, d->offset + at, detail);
}

static sfp_span span_of(const directory *d, const value *v)
{
    sfp_span span = {d->bytes + v->content, (size_t)v->number};
    return span;
}

static int compare_spans(sfp_span a, sfp_span b)
{
    int order = memcmp(a.bytes, b.bytes, a.length < b.length ? a.length : b.length);
    return order != 0 ? order : (a.length > b.length) - (a.length < b.length);
}

static bool span_is(sfp_span span, const char *word)
{
    return span.length == strlen(word) && memcmp(span.bytes, word, span.length) == 0;
}

/* The encodings with a number after the first byte. A number below `least` has a shorter encoding. */
static const struct {
    uint8_t byte;
    uint8_t width;
    kind kind;
    uint64_t least;
} HEADS[] = {
    {0xC4, 1, BINARY, 0},     {0xC5, 2, BINARY, 256},     {0xC6, 4, BINARY, 65536},
    {0xCC, 1, UNSIGNED, 128}, {0xCD, 2, UNSIGNED, 256},   {0xCE, 4, UNSIGNED, 65536},
    {0xD9, 1, STRING, 32},    {0xDA, 2, STRING, 256},     {0xDB, 4, STRING, 65536},
    {0xDC, 2, ARRAY, 16},     {0xDD, 4, ARRAY, 65536},    {0xDE, 2, MAP, 16},
    {0xDF, 4, MAP, 65536},    {0xCF, 8, UNSIGNED, UINT64_C(1) << 32},
};

/* Reads the kind and the number of the value at *at. Sets *at to the offset of its content. */
static bool read_head(const directory *d, size_t *at, value *v)
{
    if (*at >= d->length) {
        return refuse_at(d, R_MSG_007, d->length, "the directory ends within its value");
    }
    uint8_t byte = d->bytes[*at];
    v->at = *at;
    v->content = *at += 1;
    if (byte < 0xC0) {
        v->kind = byte < 0x80 ? UNSIGNED : byte < 0x90 ? MAP : byte < 0xA0 ? ARRAY : STRING;
        v->number = byte < 0x80 ? byte : byte < 0xA0 ? byte & 15u : byte & 31u;
        return true;
    }
    size_t i = 0;
    while (i < sizeof HEADS / sizeof HEADS[0] && HEADS[i].byte != byte) {
        i++;
    }
    if (i == sizeof HEADS / sizeof HEADS[0]) {
        return refuse_at(d, R_MSG_001, v->at, "a type that the directory does not use");
    }
    if (d->length - *at < HEADS[i].width) {
        return refuse_at(d, R_MSG_007, v->at, "a number does not end within the directory");
    }
    v->kind = HEADS[i].kind;
    v->number = 0;
    for (unsigned k = 0; k < HEADS[i].width; k++) { /* MessagePack stores the most significant byte of a number first */
        v->number = v->number << 8 | d->bytes[*at + k];
    }
    v->content = *at += HEADS[i].width;
    if (v->number < HEADS[i].least) {
        return refuse_at(d, R_MSG_002, v->at, "an encoding that is not the shortest");
    }
    return true;
}

/* Like read_head, but sets *at to the end of strings and binaries, and checks that enough bytes are left for the
 * content: at least one for each element, two for each pair (R-MSG-008). */
static bool read_value(const directory *d, size_t *at, value *v)
{
    if (!read_head(d, at, v)) {
        return false;
    }
    uint64_t left = v->kind == MAP ? (d->length - *at) / 2 : d->length - *at;
    if (v->kind != UNSIGNED && v->number > left) {
        return refuse_at(d, R_MSG_007, v->at, "a value does not end within the directory");
    }
    if (v->kind == STRING || v->kind == BINARY) {
        *at += (size_t)v->number;
    }
    return true;
}

/* Returns whether bytes are well-formed UTF-8 without U+0000. */
static bool is_text(const uint8_t *p, size_t length)
{
    const uint8_t *end = p + length;
    while (p < end) {
        uint8_t lead = *p++;
        if (lead >= 1 && lead < 0x80) {
            continue;
        }
        if (lead < 0xC2 || lead > 0xF4) {
            return false;
        }
        size_t more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        if ((size_t)(end - p) < more) {
            return false;
        }
        /* The second byte shows overlong forms, surrogates and code points above U+10FFFF. */
        uint8_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t greatest = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (p[0] < least || p[0] > greatest) {
            return false;
        }
        for (size_t k = 1; k < more; k++) {
            if (p[k] < 0x80 || p[k] > 0xBF) {
                return false;
            }
        }
        p += more;
    }
    return true;
}

static bool check_text(const directory *d, const value *v)
{
    if (!is_text(d->bytes + v->content, (size_t)v->number)) {
        return refuse_at(d, R_MSG_003, v->at, "a string is not well-formed UTF-8 without U+0000");
    }
    return true;
}

/* An array or map whose elements are being checked. */
typedef struct container {
    bool is_map;
    uint64_t left; /* remaining elements or pairs */
    sfp_span key;  /* the previous key */
} container;

static bool check_key(const directory *d, size_t *at, container *map)
{
    value key;
    if (!read_value(d, at, &key)) {
        return false;
    }
    if (key.kind != STRING) {
        return refuse_at(d, R_MSG_001, key.at, "a map's key is not a string");
    }
    if (!check_text(d, &key)) {
        return false;
    }
    sfp_span span = span_of(d, &key);
    int order = map->key.bytes == NULL ? 1 : compare_spans(span, map->key);
    if (order <= 0) {
        return order < 0 ? refuse_at(d, R_MSG_004, key.at, "a map's keys are not in ascending order")
                         : refuse_at(d, R_MSG_005, key.at, "a map contains a key twice");
    }
    map->key = span;
    return true;
}

/* Checks the encoding of the whole directory (chapter 6). */
static bool check_encoding(const directory *d)
{
    container open[SFP_MAX_DEPTH];
    size_t depth = 0;
    size_t at = 0;
    do {
        if (depth > 0) {
            open[depth - 1].left--;
            if (open[depth - 1].is_map && !check_key(d, &at, &open[depth - 1])) {
                return false;
            }
        }
        value v;
        if (!read_value(d, &at, &v) || (v.kind == STRING && !check_text(d, &v))) {
            return false;
        }
        if (v.kind == ARRAY || v.kind == MAP) {
            if (depth >= d->limits->depth) {
                return refuse_at(d, R_LIM_002, v.at, "the depth is above its limit");
            }
            container inner = {v.kind == MAP, v.number, NO_SPAN};
            open[depth++] = inner;
        }
        while (depth > 0 && open[depth - 1].left == 0) {
            depth--;
        }
    } while (depth > 0);
    if (at != d->length) {
        return refuse_at(d, R_MSG_006, at, "bytes follow the directory's value");
    }
    return true;
}

/* Reads a value and sets *at to its end, in a directory that check_encoding accepted. Returns false if there is no
 * value. */
static bool next_value(const directory *d, size_t *at, value *v)
{
    if (!read_value(d, at, v)) {
        return false;
    }
    uint64_t left = v->kind == ARRAY ? v->number : v->kind == MAP ? 2 * v->number : 0;
    for (; left > 0; left--) {
        value inner;
        if (!read_value(d, at, &inner)) {
            return false;
        }
        left += inner.kind == ARRAY ? inner.number : inner.kind == MAP ? 2 * inner.number : 0;
    }
    return true;
}

/* A key to find in a map, and the place for its value. */
typedef struct field {
    const char *key;
    value *into;
} field;

/* Reads the values of these keys; a key that the map lacks gets a value of kind NOTHING. */
static void read_fields(const directory *d, const value *map, const field *fields, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        fields[i].into->kind = NOTHING;
        fields[i].into->at = map->at;
    }
    size_t at = map->content;
    value key, item;
    for (uint64_t pair = 0; pair < map->number; pair++) {
        if (!next_value(d, &at, &key) || !next_value(d, &at, &item)) {
            return;
        }
        for (size_t i = 0; i < count; i++) {
            if (span_is(span_of(d, &key), fields[i].key)) {
                *fields[i].into = item;
            }
        }
    }
}

/* Checks that a value is present and has the kind. */
static bool require(const directory *d, const value *v, kind wanted)
{
    if (v->kind == NOTHING) {
        return refuse_at(d, R_DIR_002, v->at, "a key is missing");
    }
    if (v->kind != wanted) {
        return refuse_at(d, R_DIR_003, v->at, "a value of the wrong type");
    }
    return true;
}

static bool has(const value *v)
{
    return v->kind != NOTHING;
}

/* Checks that values are absent, because the conditions of their keys do not hold. */
static bool absent(const directory *d, const value *const *values, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (has(values[i])) {
            return refuse_at(d, R_DIR_007, values[i]->at, "a key whose condition does not hold");
        }
    }
    return true;
}

/* Returns the index of a string in a list of words, or `count` if it is not in the list. */
static size_t word_of(const directory *d, const value *v, const char *const *words, size_t count)
{
    size_t i = 0;
    while (i < count && !span_is(span_of(d, v), words[i])) {
        i++;
    }
    return i;
}

/* Returns the dtype that a string names, or NULL. */
static const dtype *dtype_of(const directory *d, const value *v)
{
    for (size_t i = 0; i < DTYPE_COUNT; i++) {
        if (span_is(span_of(d, v), DTYPES[i].name)) {
            return &DTYPES[i];
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------- tensor entries */

enum { MAX_CLASSES = 4096, MAX_PAIRED = 64, MAX_CODES = 16, MAX_EXTRA = 56, MAX_LENGTH = 12, MAX_USED = 256 };

/* A code table as the directory stores it (chapter 8). */
typedef struct code_table {
    uint64_t base;
    uint64_t last; /* the greatest level: top - 1, which fits into 64 bits */
    const uint8_t *extra;
    size_t classes;
    size_t codes;
    size_t code_bytes;
    size_t codes_at; /* offset of the first code in the directory */
    unsigned group;
    unsigned window; /* bits of a symbol in a window; 0: the stream has prefix codes */
} code_table;

typedef enum quantiser { EXACT, UNIFORM, TABLE, QUANTISER_COUNT } quantiser;

typedef enum stream_id { MASK_STREAM, FINGERPRINT_STREAM, IMPORTANCE_STREAM, STREAM_COUNT } stream_id;

typedef struct stream {
    bool present;
    code_table table;
    quantiser quantiser;
    const dtype *coded; /* with exact */
    bool trimmed;       /* with exact */
    float step;         /* with uniform */
    uint64_t centroids; /* with table */
} stream;

typedef enum scale_per { PER_TENSOR, PER_ROW, PER_COLUMN, PER_GROUP, PER_COUNT } scale_per;

typedef struct scale {
    bool present;
    scale_per per;
    uint64_t size;
    const dtype *dtype;
} scale;

enum { FP_CENTROIDS, SCALE_FACTORS, IMP_CENTROIDS, IMP_ROWS, IMP_COLUMNS, VECTOR_COUNT };

typedef struct vector {
    uint64_t elements;
    const dtype *dtype;
} vector;

/* A tensor entry (chapter 7) that passed all checks. */
typedef struct entry {
    sfp_tensor told;
    const dtype *dtype;
    uint64_t rows, columns;
    uint64_t segment;     /* S */
    uint64_t segments;    /* number of segments of the tensor */
    uint64_t chunk;       /* C */
    const uint8_t *chunk_records;
    uint64_t chunks;
    const uint8_t *vector_record; /* NULL without a vector chunk */
    vector vectors[VECTOR_COUNT];
    stream streams[STREAM_COUNT];
    bool octets;       /* whether the mask's kind is `octets`, not `runs` */
    unsigned polarity; /* with the kind `runs` */
    scale scale;
    const dtype *factor_dtype;
} entry;

enum { RECORD_BYTES = 8 };

static uint32_t record_length(const uint8_t *record)
{
    return load32(record);
}

static uint32_t record_crc(const uint8_t *record)
{
    return load32(record + 4);
}

/* The keys of the maps `mask`, `fingerprints` and `importance` together. */
typedef struct stream_map {
    value base, codes, count, dtype, extra, group, kind, over, polarity, quantiser, role, step, trim, window;
} stream_map;

static void read_stream_map(const directory *d, const value *map, stream_map *m)
{
    const field fields[] = {
        {"base", &m->base},         {"codes", &m->codes},         {"count", &m->count}, {"dtype", &m->dtype},
        {"extra", &m->extra},       {"group", &m->group},         {"kind", &m->kind},   {"over", &m->over},
        {"polarity", &m->polarity}, {"quantiser", &m->quantiser}, {"role", &m->role},   {"step", &m->step},
        {"trim", &m->trim},         {"window", &m->window},
    };
    read_fields(d, map, fields, sizeof fields / sizeof fields[0]);
}

/* Returns the code length of symbol s: field s of four bits. */
static unsigned code_length(const uint8_t *code, size_t s)
{
    return (unsigned)code[s / 2] >> (s % 2 * 4) & 15u;
}

static size_t symbols_of(const code_table *t)
{
    return t->group == 2 ? t->classes * t->classes : t->classes;
}

/* Checks an entry of `codes`. */
static bool check_code(const directory *d, const code_table *t, const value *v)
{
    if (v->kind != BINARY) {
        return refuse_at(d, R_DIR_003, v->at, "a code is not a binary");
    }
    if (v->number != t->code_bytes) {
        return refuse_at(d, R_TAB_004, v->at, "a code does not have four bits for each symbol");
    }
    const uint8_t *code = d->bytes + v->content;
    size_t symbols = symbols_of(t);
    if (symbols % 2 != 0 && code[symbols / 2] >> 4 != 0) {
        return refuse_at(d, R_TAB_010, v->at, "the last four bits of a code are not zero");
    }
    unsigned used = 0;
    uint32_t taken = 0; /* number of the 2^12 words of 12 bits that the codewords cover */
    for (size_t s = 0; s < symbols; s++) {
        unsigned length = code_length(code, s);
        if (length > MAX_LENGTH) {
            return refuse_at(d, R_TAB_005, v->at, "a code length above 12");
        }
        used += length > 0;
        taken += length > 0 ? UINT32_C(1) << (MAX_LENGTH - length) : 0;
    }
    if (used < 2 || used > MAX_USED) {
        return refuse_at(d, R_TAB_006, v->at, "a code does not use 2 to 256 symbols");
    }
    if (taken != UINT32_C(1) << MAX_LENGTH) {
        return refuse_at(d, R_TAB_007, v->at, "a code is not complete");
    }
    return true;
}

/* Computes and checks the table's last level. It is stored instead of top, which can be 2^64. */
static bool check_levels(const directory *d, const stream_map *m, uint64_t bound_less_one, code_table *t)
{
    uint64_t first = t->base;
    for (size_t c = 0; c < t->classes; c++) {
        if (t->extra[c] > MAX_EXTRA) {
            return refuse_at(d, R_TAB_002, m->extra.at, "a class has more than 56 residual bits");
        }
    }
    for (size_t c = 0;; c++) {
        uint64_t more = ones(t->extra[c]); /* levels of the class, without its first */
        if (first > bound_less_one || more > bound_less_one - first) {
            return refuse_at(d, R_TAB_008, m->extra.at, "the levels exceed the stream's bound");
        }
        t->last = first + more;
        if (c + 1 == t->classes) {
            return true;
        }
        if (t->last == UINT64_MAX) {
            return refuse_at(d, R_TAB_008, m->extra.at, "the levels exceed the stream's bound");
        }
        first = t->last + 1;
    }
}

enum { MAX_WINDOW = 4, MAX_WINDOWED = 256 };

/* Reads and checks the key `window` of a code table. */
static bool read_window(const directory *d, const stream_map *m, code_table *t)
{
    t->window = 0;
    if (m->window.kind == NOTHING) {
        return true;
    }
    if (!require(d, &m->window, UNSIGNED)) {
        return false;
    }
    if (m->window.number < 1 || m->window.number > MAX_WINDOW) {
        return refuse_at(d, R_TAB_011, m->window.at, "window is not from 1 to 4");
    }
    t->window = (unsigned)m->window.number;
    if (t->group != 1 || t->classes < 2 || t->classes + 1 < (size_t)1 << t->window || t->classes > MAX_WINDOWED) {
        return refuse_at(d, R_TAB_012, m->window.at, "windows do not fit the group or the number of classes");
    }
    return true;
}

/* Returns the number of codes, or of windows. */
static size_t code_count(const code_table *t)
{
    return t->window == 0 ? t->codes : t->classes + 2 - ((size_t)1 << t->window);
}

/* Reads and checks the keys of a code table. */
static bool read_code_table(const directory *d, const stream_map *m, uint64_t bound_less_one, code_table *t)
{
    if (!require(d, &m->base, UNSIGNED) || !require(d, &m->extra, BINARY) || !require(d, &m->codes, ARRAY) ||
        !require(d, &m->group, UNSIGNED)) {
        return false;
    }
    if (m->group.number != 1 && m->group.number != 2) {
        return refuse_at(d, R_TAB_003, m->group.at, "group is neither 1 nor 2");
    }
    t->group = (unsigned)m->group.number;
    if (m->extra.number < t->group || m->extra.number > (t->group == 1 ? MAX_CLASSES : MAX_PAIRED)) {
        return refuse_at(d, R_TAB_001, m->extra.at, "too few or too many classes");
    }
    t->base = m->base.number;
    t->extra = d->bytes + m->extra.content;
    t->classes = (size_t)m->extra.number;
    if (!check_levels(d, m, bound_less_one, t)) {
        return false;
    }
    if (!read_window(d, m, t)) {
        return false;
    }
    if (t->classes == 1 || t->window > 0 ? m->codes.number != 0 : m->codes.number < 1 || m->codes.number > MAX_CODES) {
        return refuse_at(d, R_TAB_009, m->codes.at, "the number of codes does not fit the number of classes");
    }
    t->codes = (size_t)m->codes.number;
    t->codes_at = m->codes.content;
    t->code_bytes = (symbols_of(t) + 1) / 2;
    size_t at = t->codes_at;
    for (size_t i = 0; i < t->codes; i++) {
        value code;
        if (!next_value(d, &at, &code) || !check_code(d, t, &code)) {
            return false;
        }
    }
    return true;
}

/* Reads the coded dtype and `trim` of an exact stream. Sets the stream's bound minus one. */
static bool read_exact(const directory *d, const stream_map *m, const dtype *tensor, stream *s, uint64_t *bound)
{
    if (!require(d, &m->dtype, STRING) || !require(d, &m->trim, UNSIGNED)) {
        return false;
    }
    s->coded = dtype_of(d, &m->dtype);
    if (s->coded == NULL) {
        return refuse_at(d, R_TEN_003, m->dtype.at, "an unknown coded dtype");
    }
    if (tensor == NULL && !is_factor_dtype(s->coded)) {
        return refuse_at(d, R_IMP_003, m->dtype.at, "the dtype of an exact importance is not F32, F16 or BF16");
    }
    if (tensor != NULL && s->coded != tensor && (s->coded->widens_to >> (tensor - DTYPES) & 1) == 0) {
        return refuse_at(d, R_QNT_002, m->dtype.at, "the coded dtype does not widen to the tensor's dtype");
    }
    if (m->trim.number > 1) {
        return refuse_at(d, R_QNT_008, m->trim.at, "trim is neither 0 nor 1");
    }
    s->trimmed = m->trim.number == 1;
    *bound = s->coded == tensor ? UINT64_MAX >> (64 - tensor->bits) : 2 * s->coded->nonfinite - 1;
    const value *others[] = {&m->step, &m->count};
    return absent(d, others, 2);
}

static bool read_uniform(const directory *d, const stream_map *m, stream *s)
{
    if (!require(d, &m->step, BINARY)) {
        return false;
    }
    if (m->step.number != 4) {
        return refuse_at(d, R_QNT_003, m->step.at, "the step does not have four bytes");
    }
    uint32_t bits = load32(d->bytes + m->step.content);
    if (bits == 0 || bits >= DTYPES[F32].nonfinite) { /* also true with the sign bit set */
        return refuse_at(d, R_QNT_003, m->step.at, "the step is not a finite number above 0");
    }
    s->step = float_of(bits);
    const value *others[] = {&m->dtype, &m->trim, &m->count};
    return absent(d, others, 3);
}

static bool read_table(const directory *d, const stream_map *m, stream *s)
{
    if (!require(d, &m->count, UNSIGNED)) {
        return false;
    }
    if (m->count.number < 1 || m->count.number > 65536) {
        return refuse_at(d, R_QNT_004, m->count.at, "count is not a number from 1 to 65,536");
    }
    s->centroids = m->count.number;
    const value *others[] = {&m->dtype, &m->trim, &m->step};
    return absent(d, others, 3);
}

/* Reads a quantiser (chapter 11). `tensor` is the tensor's dtype for fingerprints, and NULL for an importance. */
static bool read_quantised(const directory *d, const stream_map *m, const dtype *tensor, stream *s)
{
    static const char *const words[] = {"exact", "uniform", "table"};
    uint64_t bound = 0;
    bool read = false;
    if (!require(d, &m->quantiser, STRING)) {
        return false;
    }
    s->present = true;
    s->quantiser = (quantiser)word_of(d, &m->quantiser, words, QUANTISER_COUNT);
    switch (s->quantiser) {
    case EXACT:
        read = read_exact(d, m, tensor, s, &bound);
        break;
    case UNIFORM:
        read = read_uniform(d, m, s);
        bound = tensor != NULL ? UINT32_MAX : UINT32_MAX >> 1;
        break;
    case TABLE:
        read = read_table(d, m, s);
        bound = (tensor != NULL ? 2 * s->centroids : s->centroids) - 1;
        break;
    default:
        return refuse_at(d, R_QNT_001, m->quantiser.at, "an unknown quantiser");
    }
    if (!read || !read_code_table(d, m, bound, &s->table)) {
        return false;
    }
    uint64_t greatest = tensor != NULL ? s->table.last / 2 : s->table.last;
    if (s->quantiser == UNIFORM && !is_finite(multiply((float)(uint32_t)greatest, s->step))) {
        return refuse_at(d, tensor != NULL ? R_QNT_006 : R_IMP_006, m->step.at,
                         "the step times the greatest level or magnitude number is not finite");
    }
    return true;
}

/* Reads and checks the map `mask` (chapter 10). */
static bool read_mask(const directory *d, const value *map, entry *e)
{
    static const char *const words[] = {"runs", "octets"};
    stream_map m;
    read_stream_map(d, map, &m);
    if (!require(d, &m.kind, STRING)) {
        return false;
    }
    size_t word = word_of(d, &m.kind, words, 2);
    if (word == 2) {
        return refuse_at(d, R_MSK_001, m.kind.at, "an unknown mask kind");
    }
    e->octets = word == 1;
    const value *polarity[] = {&m.polarity};
    if (e->octets && !absent(d, polarity, 1)) {
        return false;
    }
    if (!e->octets && !require(d, &m.polarity, UNSIGNED)) {
        return false;
    }
    if (!e->octets && m.polarity.number > 1) {
        return refuse_at(d, R_MSK_002, m.polarity.at, "polarity is neither 0 nor 1");
    }
    e->polarity = e->octets ? 1 : (unsigned)m.polarity.number;
    e->told.pruned = true;
    e->streams[MASK_STREAM].present = true;
    return read_code_table(d, &m, e->octets ? 255 : 65535, &e->streams[MASK_STREAM].table);
}

/* Reads and checks the map `scale` (chapter 12). */
static bool read_scale(const directory *d, const value *map, entry *e)
{
    static const char *const words[] = {"tensor", "row", "column", "group"};
    value per, size, type;
    const field fields[] = {{"per", &per}, {"size", &size}, {"dtype", &type}};
    if (e->streams[FINGERPRINT_STREAM].quantiser == EXACT && !absent(d, &map, 1)) {
        return false;
    }
    read_fields(d, map, fields, sizeof fields / sizeof fields[0]);
    if (!require(d, &per, STRING) || !require(d, &type, STRING)) {
        return false;
    }
    scale *s = &e->scale;
    s->present = true;
    s->per = (scale_per)word_of(d, &per, words, PER_COUNT);
    if (s->per == PER_COUNT) {
        return refuse_at(d, R_SCL_001, per.at, "an unknown word for per");
    }
    const value *sizes[] = {&size};
    if (s->per != PER_GROUP && !absent(d, sizes, 1)) {
        return false;
    }
    if (s->per == PER_GROUP) {
        if (!require(d, &size, UNSIGNED)) {
            return false;
        }
        if (size.number < 1) {
            return refuse_at(d, R_SCL_002, size.at, "size is 0");
        }
        s->size = size.number;
    }
    s->dtype = dtype_of(d, &type);
    if (!is_factor_dtype(s->dtype)) {
        return refuse_at(d, R_SCL_003, type.at, "the dtype of scale factors is not F32, F16 or BF16");
    }
    return true;
}

/* Reads and checks the keys `over` and `role` of an importance (chapter 13). */
static bool read_over_and_role(const directory *d, const stream_map *m, entry *e)
{
    static const char *const forms[] = {"survivors", "all", "factors"};
    static const sfp_importance told[] = {SFP_OVER_SURVIVORS, SFP_OVER_ALL, SFP_FACTORS};
    static const char *const roles[] = {"multiplier", "metadata"};
    if (!require(d, &m->over, STRING) || !require(d, &m->role, STRING)) {
        return false;
    }
    size_t form = word_of(d, &m->over, forms, 3);
    size_t role = word_of(d, &m->role, roles, 2);
    if (form == 3) {
        return refuse_at(d, R_IMP_001, m->over.at, "an unknown word for over");
    }
    if (role == 2) {
        return refuse_at(d, R_IMP_002, m->role.at, "an unknown role");
    }
    e->told.importance = told[form];
    e->told.multiplier = role == 0;
    return true;
}

/* Reads and checks the map `importance` (chapter 13). */
static bool read_importance(const directory *d, const value *map, entry *e)
{
    stream_map m;
    read_stream_map(d, map, &m);
    if (!read_over_and_role(d, &m, e)) {
        return false;
    }
    if (e->told.importance != SFP_FACTORS) {
        return read_quantised(d, &m, NULL, &e->streams[IMPORTANCE_STREAM]);
    }
    if (!require(d, &m.dtype, STRING)) {
        return false;
    }
    e->factor_dtype = dtype_of(d, &m.dtype);
    if (!is_factor_dtype(e->factor_dtype)) {
        return refuse_at(d, R_IMP_003, m.dtype.at, "the dtype of importance factors is not F32, F16 or BF16");
    }
    const value *others[] = {&m.quantiser, &m.trim,  &m.step,  &m.count, &m.base,
                             &m.extra,     &m.codes, &m.group, &m.window};
    return absent(d, others, sizeof others / sizeof others[0]);
}

/* The keys of a tensor entry. */
typedef struct entry_map {
    value name, dtype, shape, coding, segment, chunk, chunks, vectors, mask, fingerprints, scale, importance;
} entry_map;

static bool read_name(const directory *d, const entry_map *m, entry *e)
{
    if (!require(d, &m->name, STRING)) {
        return false;
    }
    if (m->name.number == 0) {
        return refuse_at(d, R_TEN_002, m->name.at, "an empty name");
    }
    if (m->name.number > d->limits->name_bytes) {
        return refuse_at(d, R_LIM_002, m->name.at, "the name exceeds the limit of name bytes");
    }
    e->told.name = span_of(d, &m->name);
    return true;
}

static bool read_shape(const directory *d, const entry_map *m, entry *e)
{
    const uint64_t greatest = UINT64_C(1) << 48;
    if (!require(d, &m->shape, ARRAY)) {
        return false;
    }
    if (m->shape.number > d->limits->rank) {
        return refuse_at(d, R_LIM_002, m->shape.at, "the rank is above its limit");
    }
    uint64_t product = 1;
    bool empty = false;
    size_t at = m->shape.content;
    e->told.rank = (size_t)m->shape.number;
    for (size_t i = 0; i < e->told.rank; i++) {
        value size;
        if (!next_value(d, &at, &size)) {
            return false;
        }
        if (size.kind != UNSIGNED) {
            return refuse_at(d, R_DIR_003, size.at, "a shape has an element that is not an integer");
        }
        e->told.shape[i] = size.number;
        empty = empty || size.number == 0;
        if (size.number > 0 && product > greatest / size.number) {
            return refuse_at(d, R_TEN_005, m->shape.at, "the shape's product is above 2^48");
        }
        product *= size.number > 0 ? size.number : 1;
    }
    e->told.positions = empty ? 0 : product;
    e->rows = e->told.rank >= 2 && !empty ? e->told.shape[0] : 1;
    e->columns = e->told.positions / e->rows;
    return true;
}

static bool read_record(const directory *d, const value *v, const uint8_t *record, entry *e)
{
    uint32_t length = record_length(record);
    if (length < 64 || length % 64 != 0) {
        return refuse_at(d, R_LAY_002, v->at, "a chunk's length is not a positive multiple of 64");
    }
    bool fits = e->told.stored_bytes <= UINT64_MAX - length;
    e->told.stored_bytes = fits ? e->told.stored_bytes + length : UINT64_MAX;
    return true;
}

/* Reads and checks S, C and the chunk records. */
static bool read_chunks(const directory *d, const entry_map *m, entry *e)
{
    if (!require(d, &m->segment, UNSIGNED) || !require(d, &m->chunk, UNSIGNED) ||
        !require(d, &m->chunks, BINARY)) {
        return false;
    }
    e->segment = m->segment.number;
    e->chunk = m->chunk.number;
    if (e->segment < 32 || e->segment > 65536 || e->segment % 32 != 0) {
        return refuse_at(d, R_TEN_006, m->segment.at, "segment is not a multiple of 32 from 32 to 65,536");
    }
    if (e->chunk < 1 || e->chunk > (UINT64_C(1) << 24) / e->segment) {
        return refuse_at(d, R_TEN_007, m->chunk.at, "a chunk has no segments, or more than 2^24 positions");
    }
    e->segments = divide_up(e->told.positions, e->segment);
    e->chunks = divide_up(e->segments, e->chunk);
    if (m->chunks.number % RECORD_BYTES != 0 || m->chunks.number / RECORD_BYTES != e->chunks) {
        return refuse_at(d, R_TEN_008, m->chunks.at, "the number of chunk records is not the number of chunks");
    }
    e->chunk_records = d->bytes + m->chunks.content;
    for (uint64_t k = 0; k < e->chunks; k++) {
        if (!read_record(d, &m->chunks, e->chunk_records + k * RECORD_BYTES, e)) {
            return false;
        }
    }
    return true;
}

static uint64_t scale_factors(const entry *e)
{
    if (!e->scale.present || e->told.positions == 0) {
        return 0;
    }
    switch (e->scale.per) {
    case PER_ROW: return e->rows;
    case PER_COLUMN: return e->columns;
    case PER_GROUP: return divide_up(e->told.positions, e->scale.size);
    default: return 1;
    }
}

/* Lists the vectors of a tensor (chapter 15.3). Returns their number of elements together. */
static uint64_t list_vectors(entry *e)
{
    const dtype *f32 = &DTYPES[F32];
    bool factors = e->told.importance == SFP_FACTORS && e->told.positions > 0;
    const vector vectors[VECTOR_COUNT] = {
        [FP_CENTROIDS] = {e->streams[FINGERPRINT_STREAM].centroids, f32},
        [SCALE_FACTORS] = {scale_factors(e), e->scale.dtype},
        [IMP_CENTROIDS] = {e->streams[IMPORTANCE_STREAM].centroids, f32},
        [IMP_ROWS] = {factors ? e->rows : 0, e->factor_dtype},
        [IMP_COLUMNS] = {factors ? e->columns : 0, e->factor_dtype},
    };
    memcpy(e->vectors, vectors, sizeof vectors);
    uint64_t elements = 0; /* each vector has at most 2^48 */
    for (size_t i = 0; i < VECTOR_COUNT; i++) {
        elements += vectors[i].elements;
    }
    return elements;
}

/* Lists the vectors of a tensor, and reads the record of their chunk (chapter 15.3). */
static bool read_vectors(const directory *d, const entry_map *m, entry *e)
{
    if (list_vectors(e) == 0) {
        const value *record[] = {&m->vectors};
        return absent(d, record, 1);
    }
    if (!require(d, &m->vectors, BINARY)) {
        return false;
    }
    if (m->vectors.number != RECORD_BYTES) {
        return refuse_at(d, R_TEN_012, m->vectors.at, "vectors is not one record of 8 bytes");
    }
    e->vector_record = d->bytes + m->vectors.content;
    return read_record(d, &m->vectors, e->vector_record, e);
}

/* Reads the coding, and the maps that only coding `fingerprint` has. */
static bool read_coding(const directory *d, const entry_map *m, entry *e)
{
    static const char *const words[] = {"raw", "fingerprint"};
    const value *own[] = {&m->mask, &m->fingerprints, &m->scale, &m->importance, &m->vectors};
    if (!require(d, &m->coding, STRING)) {
        return false;
    }
    size_t coding = word_of(d, &m->coding, words, 2);
    if (coding == 2) {
        return refuse_at(d, R_TEN_004, m->coding.at, "an unknown coding");
    }
    e->told.fingerprint = coding == 1;
    if (!e->told.fingerprint) {
        return absent(d, own, 5);
    }
    if (e->dtype->nonfinite == 0) {
        return refuse_at(d, R_TEN_010, m->dtype.at, "coding fingerprint with a dtype that is not a float");
    }
    stream_map fingerprints;
    if (!require(d, &m->fingerprints, MAP)) {
        return false;
    }
    read_stream_map(d, &m->fingerprints, &fingerprints);
    if (!read_quantised(d, &fingerprints, e->dtype, &e->streams[FINGERPRINT_STREAM])) {
        return false;
    }
    return (!has(&m->mask) || (require(d, &m->mask, MAP) && read_mask(d, &m->mask, e))) &&
           (!has(&m->scale) || (require(d, &m->scale, MAP) && read_scale(d, &m->scale, e))) &&
           (!has(&m->importance) || (require(d, &m->importance, MAP) && read_importance(d, &m->importance, e)));
}

static bool read_dtype(const directory *d, const entry_map *m, entry *e)
{
    if (!require(d, &m->dtype, STRING)) {
        return false;
    }
    e->dtype = dtype_of(d, &m->dtype);
    if (e->dtype == NULL) {
        return refuse_at(d, R_TEN_003, m->dtype.at, "an unknown dtype");
    }
    e->told.dtype = e->dtype->name;
    e->told.element_bytes = e->dtype->bits / 8;
    return true;
}

/* Reads and checks the tensor entry at offset `at` of the directory. */
static bool read_entry(const directory *d, size_t at, entry *e)
{
    entry_map m;
    const field fields[] = {
        {"name", &m.name},       {"dtype", &m.dtype},   {"shape", &m.shape},   {"coding", &m.coding},
        {"segment", &m.segment}, {"chunk", &m.chunk},   {"chunks", &m.chunks}, {"vectors", &m.vectors},
        {"mask", &m.mask},       {"scale", &m.scale},   {"importance", &m.importance},
        {"fingerprints", &m.fingerprints},
    };
    value map;
    size_t end = at;
    memset(e, 0, sizeof *e);
    if (!next_value(d, &end, &map)) {
        return false;
    }
    if (map.kind != MAP) {
        return refuse_at(d, R_DIR_003, map.at, "a tensor entry is not a map");
    }
    e->told.entry.bytes = d->bytes + at;
    e->told.entry.length = end - at;
    read_fields(d, &map, fields, sizeof fields / sizeof fields[0]);
    bool read = read_name(d, &m, e) && read_dtype(d, &m, e) && read_shape(d, &m, e) && read_coding(d, &m, e) &&
                read_chunks(d, &m, e) && read_vectors(d, &m, e);
    if (!read && m.name.kind == STRING) {
        d->fault->tensor = span_of(d, &m.name);
    }
    return read;
}

/* ------------------------------------------------------------------------------------------------ the file */

enum { PREAMBLE_BYTES = 64 };

/* The offset of a tensor's entry in the directory, and that of its first chunk in the file. */
typedef struct place {
    size_t entry;
    uint64_t chunks;
} place;

/* A tensor of the list of a delta (chapter 28). */
typedef struct delta_tensor {
    sfp_span name;
    const dtype *dtype;
    value shape; /* an array of sizes */
    uint64_t positions;
    unsigned kind;
    uint32_t base, result; /* checksums */
    size_t stored;         /* number of the tensor of the file, for a replaced or added tensor */
    bool in_parts;         /* whether these are the weights of a tensor in parts (28.4) */
    size_t structure;      /* offset of its structure in the directory */
} delta_tensor;

/* A pool of a delta. */
typedef struct delta_pool {
    const dtype *dtype;
    uint64_t tensors;
    size_t stored[3]; /* numbers of the tensors of the file: counts, gaps, differences */
} delta_pool;

/* What a delta says of its base and result; without tensors and pools for other files. */
typedef struct delta {
    uint64_t block;
    delta_tensor *tensors;
    size_t count;
    delta_pool *pools;
    size_t pool_count;
    uint8_t *names; /* the joined names */
    sfp_span separator;
    bool present;
    bool parts; /* whether the file has the feature `delta-parts` */
} delta;

/* A keyed table (chapter 17). */
typedef struct keyed_table {
    sfp_span name;
    size_t bits; /* number of the tensor with the bit array */
    uint64_t keys, outputs, seed, segment, starts;
    stream gaps, levels, importance; /* without gaps if it has one output */
    const uint8_t *checks;
    const uint8_t *centroids; /* with the quantiser `table` */
    uint64_t array_bytes;
} keyed_table;

struct sfp_file {
    delta delta;
    keyed_table *tables;
    size_t table_count;
    bool keyed; /* whether the file has the feature `keyed` */
    const uint8_t *bytes;
    sfp_span directory;
    uint64_t directory_offset;
    value metadata; /* a map, or of kind NOTHING */
    size_t metadata_end;
    place *tensors;
    size_t tensor_count;
    sfp_limits limits;
    sfp_allocator allocator;
    crc_tables crc;
};

sfp_limits sfp_default_limits(void)
{
    const sfp_limits defaults = {
        .directory_bytes = UINT64_C(1) << 26,
        .depth = 16,
        .name_bytes = 1024,
        .tensors = UINT64_C(1) << 20,
        .rank = 32,
        .tensor_bytes = UINT64_C(1) << 37,
        .expansion = UINT64_C(1) << 16,
    };
    return defaults;
}

static void *allocate_by_malloc(void *user, size_t size)
{
    (void)user;
    return malloc(size);
}

static void release_by_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

/* Allocates memory for `count` items of a size, at least one. Returns NULL on failure. */
static void *allocate(const sfp_allocator *a, uint64_t count, size_t size)
{
    if (count > SIZE_MAX / size) {
        return NULL;
    }
    return a->allocate(a->user, (size_t)(count > 0 ? count : 1) * size);
}

static void release(const sfp_allocator *a, void *memory)
{
    if (memory != NULL) {
        a->release(a->user, memory);
    }
}

static directory directory_of(const sfp_file *file, sfp_fault *fault)
{
    directory d = {file->directory.bytes, file->directory.length, file->directory_offset, &file->limits, fault};
    return d;
}

/* Reads and checks the preamble (chapter 4). */
static bool read_preamble(sfp_file *file, size_t length, sfp_fault *fault)
{
    static const uint8_t magic[8] = {0x89, 'S', 'F', 'P', '\r', '\n', 0x1A, '\n'};
    const uint8_t *p = file->bytes;
    size_t known = length < sizeof magic ? length : sizeof magic;
    if (known > 0 && memcmp(p, magic, known) != 0) {
        return refuse(fault, R_PRE_001, 0, "the file does not begin with the magic");
    }
    if (length < PREAMBLE_BYTES) {
        return refuse(fault, R_PRE_002, length, "the file ends inside its preamble");
    }
    if (crc32(&file->crc, p, 60) != load32(p + 60)) {
        return refuse(fault, R_PRE_003, 60, "the preamble's checksum does not match");
    }
    if (load(p + 8, 2) != 1) {
        return refuse(fault, R_PRE_004, 8, "an unknown major version");
    }
    if (load32(p + 12) != 0) {
        return refuse(fault, R_PRE_006, 12, "a reserved field is not zero");
    }
    if (first_nonzero(p, 44, 60) != 60) {
        return refuse(fault, R_PRE_006, 44, "a reserved field is not zero");
    }
    uint64_t offset = load64(p + 16), bytes = load64(p + 24), end = load64(p + 32);
    if (length < end) {
        return refuse(fault, R_PRE_007, length, "the file is shorter than its file length");
    }
    if (length > end) {
        return refuse(fault, R_PRE_008, end, "bytes follow the directory");
    }
    if (bytes > end || offset != end - bytes) {
        return refuse(fault, R_PRE_009, 16, "the directory does not end at the end of the file");
    }
    if (offset < PREAMBLE_BYTES || offset % 64 != 0) {
        return refuse(fault, R_PRE_011, 16, "the directory's offset is not a positive multiple of 64");
    }
    if (bytes > file->limits.directory_bytes) {
        return refuse(fault, R_LIM_002, 24, "the directory exceeds the limit of directory bytes");
    }
    if (crc32(&file->crc, p + offset, bytes) != load32(p + 40)) {
        return refuse(fault, R_PRE_010, offset, "the directory's checksum does not match");
    }
    file->directory_offset = offset;
    file->directory.bytes = p + offset;
    file->directory.length = (size_t)bytes;
    return true;
}

/* Checks `features`: version 1.0 defines `delta`, `delta-parts` and `keyed` (chapter 21). */
static bool check_features(const directory *d, const value *features, bool *is_delta, bool *has_parts, bool *is_keyed)
{
    *is_delta = false;
    *has_parts = false;
    *is_keyed = false;
    if (!has(features)) {
        return true;
    }
    if (!require(d, features, ARRAY)) {
        return false;
    }
    size_t at = features->content;
    sfp_span before = NO_SPAN, unknown = NO_SPAN;
    value name;
    for (uint64_t i = 0; i < features->number && next_value(d, &at, &name); i++) {
        if (name.kind != STRING) {
            return refuse_at(d, R_DIR_003, name.at, "a feature is not a string");
        }
        if (before.bytes != NULL && compare_spans(before, span_of(d, &name)) >= 0) {
            return refuse_at(d, R_FEA_002, name.at, "the features are not in ascending order");
        }
        before = span_of(d, &name);
        if (span_is(before, "delta")) {
            *is_delta = true;
        } else if (span_is(before, "delta-parts")) {
            *has_parts = true;
        } else if (span_is(before, "keyed")) {
            *is_keyed = true;
        } else {
            unknown = before;
        }
    }
    if (before.bytes == NULL) {
        return refuse_at(d, R_DIR_004, features->at, "an empty list of features");
    }
    if (unknown.bytes == NULL) {
        return !(*is_delta && *is_keyed) ||
               refuse_at(d, R_KEY_013, features->at, "a file with keyed tables cannot be a delta");
    }
    refuse_at(d, R_FEA_001, features->at, "an unknown feature");
    d->fault->feature = unknown;
    return false;
}

/* Checks `metadata`, and sets the offset of its end in the directory. */
static bool check_metadata(const directory *d, const value *metadata, size_t *end)
{
    if (!has(metadata)) {
        return true;
    }
    if (!require(d, metadata, MAP)) {
        return false;
    }
    if (metadata->number == 0) {
        return refuse_at(d, R_DIR_004, metadata->at, "an empty map of metadata");
    }
    size_t at = metadata->content;
    value key, text;
    for (uint64_t i = 0; i < metadata->number && next_value(d, &at, &key) && next_value(d, &at, &text); i++) {
        if (text.kind != STRING) {
            return refuse_at(d, R_DIR_003, text.at, "a value of metadata is not a string");
        }
    }
    *end = at;
    return true;
}

/* A tensor's name and number. */
typedef struct numbered_name {
    sfp_span name;
    size_t number;
} numbered_name;

static int compare_names(const numbered_name *a, const numbered_name *b)
{
    int order = compare_spans(a->name, b->name);
    return order != 0 ? order : (a->number > b->number) - (a->number < b->number);
}

static void sift_down(numbered_name *heap, size_t root, size_t count)
{
    numbered_name moved = heap[root];
    for (size_t child; (child = 2 * root + 1) < count; root = child) {
        child += child + 1 < count && compare_names(&heap[child], &heap[child + 1]) < 0;
        if (compare_names(&moved, &heap[child]) >= 0) {
            break;
        }
        heap[root] = heap[child];
    }
    heap[root] = moved;
}

/* Heap sort, because its worst case is fast too and it needs no memory. */
static void sort_names(numbered_name *names, size_t count)
{
    for (size_t i = count / 2; i > 0; i--) {
        sift_down(names, i - 1, count);
    }
    for (size_t i = count; i > 1; i--) {
        numbered_name greatest = names[0];
        names[0] = names[i - 1];
        names[i - 1] = greatest;
        sift_down(names, 0, i - 1);
    }
}

/* Checks that no name occurs twice (R-TEN-001). */
static bool check_names(const directory *d, numbered_name *names, size_t count)
{
    sort_names(names, count);
    for (size_t i = 1; i < count; i++) {
        if (compare_spans(names[i - 1].name, names[i].name) == 0) {
            refuse_at(d, R_TEN_001, (size_t)(names[i].name.bytes - d->bytes), "two tensors have the same name");
            d->fault->tensor = names[i].name;
            return false;
        }
    }
    return true;
}

/* Checks all tensor entries, and computes the offsets of their chunks. */
static bool read_entries(sfp_file *file, const directory *d, const value *tensors, numbered_name *names)
{
    size_t at = tensors->content;
    uint64_t chunks = PREAMBLE_BYTES;
    for (size_t i = 0; i < file->tensor_count; i++) {
        entry e;
        if (!read_entry(d, at, &e)) {
            return false;
        }
        file->tensors[i].entry = at;
        file->tensors[i].chunks = chunks;
        names[i].name = e.told.name;
        names[i].number = i;
        at += e.told.entry.length;
        chunks = e.told.stored_bytes <= UINT64_MAX - chunks ? chunks + e.told.stored_bytes : UINT64_MAX;
    }
    if (!check_names(d, names, file->tensor_count)) {
        return false;
    }
    if (chunks != d->offset) {
        return refuse_at(d, R_LAY_003, 0, "the chunks do not end where the directory begins");
    }
    return true;
}

/* Reads and checks the root without the tensor entries, the map of a delta and the maps of keyed tables. Sets
 * `tensors` to the array of entries, `map` to the first map, and `keyed` to the array of the others. */
static bool read_root(sfp_file *file, const directory *d, value *tensors, value *map, value *keyed)
{
    value root, features;
    const value *own[] = {map}, *tables[] = {keyed};
    const field fields[] = {{"features", &features},
                            {"keyed", keyed},
                            {"metadata", &file->metadata},
                            {"tensors", tensors},
                            {"delta", map}};
    size_t at = 0;
    if (!check_encoding(d) || !next_value(d, &at, &root)) {
        return false;
    }
    if (root.kind != MAP) {
        return refuse_at(d, R_DIR_001, 0, "the directory is not a map");
    }
    read_fields(d, &root, fields, sizeof fields / sizeof fields[0]);
    if (!check_features(d, &features, &file->delta.present, &file->delta.parts, &file->keyed)) {
        return false;
    }
    if (!(file->delta.present ? require(d, map, MAP) : absent(d, own, 1))) {
        return false;
    }
    if (!(file->keyed ? require(d, keyed, ARRAY) : absent(d, tables, 1))) {
        return false;
    }
    if (!check_metadata(d, &file->metadata, &file->metadata_end) || !require(d, tensors, ARRAY)) {
        return false;
    }
    if (tensors->number > d->limits->tensors) {
        return refuse_at(d, R_LIM_002, tensors->at, "the number of tensors is above its limit");
    }
    return true;
}

/* ------------------------------------------------------------------------------------- the map of a delta */

enum { UNCHANGED, CHANGED, REPLACED, ADDED, REMOVED, DELTA_KINDS };

/* The values of the map `delta` (28.1). */
typedef struct delta_map {
    value base, block, checksums, dtypes, kinds, names, pools, separator, shapes, shared, structured, structures;
} delta_map;

/* Returns w, the bits of an element of a dtype (28.2); a complex number is two elements. */
static unsigned element_bits(const dtype *t)
{
    return t == &DTYPES[C64] ? 32 : t == &DTYPES[C128] ? 64 : t->bits;
}

/* Returns e, the bits of the exponent of an element; 0 for elements without one. */
static unsigned exponent_bits(const dtype *t)
{
    if (t == &DTYPES[C64] || t == &DTYPES[C128]) {
        return t == &DTYPES[C64] ? 8 : 11;
    }
    return t->nonfinite != 0 ? t->bits - 1 - t->mantissa : 0;
}

/* Returns the number of the tensor with a name in a sorted list, or SIZE_MAX. */
static size_t number_of_name(const numbered_name *names, size_t count, sfp_span name)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_spans(names[middle].name, name);
        if (order == 0) {
            return names[middle].number;
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return SIZE_MAX;
}

/* Checks that all elements of an array have the kind. */
static bool require_all(const directory *d, const value *array, kind wanted)
{
    size_t at = array->content;
    value item;
    if (!require(d, array, ARRAY)) {
        return false;
    }
    for (uint64_t i = 0; i < array->number && next_value(d, &at, &item); i++) {
        if (item.kind != wanted) {
            return refuse_at(d, R_DIR_003, item.at, "an element of the wrong type");
        }
    }
    return true;
}

/* Checks the types and the lengths of the lists. */
static bool check_delta_map(const directory *d, const value *map, bool parts, delta_map *m)
{
    const field fields[] = {
        {"base", &m->base},     {"block", &m->block},           {"checksums", &m->checksums},
        {"dtypes", &m->dtypes}, {"kinds", &m->kinds},           {"names", &m->names},
        {"pools", &m->pools},   {"separator", &m->separator},   {"shapes", &m->shapes},
        {"shared", &m->shared}, {"structured", &m->structured}, {"structures", &m->structures},
    };
    const value *of_parts[] = {&m->separator, &m->structured, &m->structures};
    read_fields(d, map, fields, sizeof fields / sizeof fields[0]);
    if ((has(&m->base) && !require(d, &m->base, STRING)) || !require(d, &m->block, UNSIGNED) ||
        !require(d, &m->checksums, BINARY) || !require_all(d, &m->dtypes, STRING) ||
        !require(d, &m->kinds, BINARY) || !require_all(d, &m->names, STRING) ||
        !require_all(d, &m->pools, MAP) || !require_all(d, &m->shapes, ARRAY) ||
        !require(d, &m->shared, BINARY)) {
        return false;
    }
    if (m->block.number < 1 || m->block.number > UINT64_C(1) << 24) {
        return refuse_at(d, R_DLT_005, m->block.at, "block is not from 1 to 2^24");
    }
    if (m->names.number > d->limits->tensors) {
        return refuse_at(d, R_LIM_002, m->names.at, "the number of tensors is above its limit");
    }
    uint64_t count = m->names.number;
    if (m->dtypes.number != count || m->shapes.number != count || m->kinds.number != count ||
        m->shared.number != count || m->checksums.number != 8 * count) {
        return refuse_at(d, R_DLT_001, map->at, "the lists of a delta differ in their lengths");
    }
    return parts ? require(d, &m->separator, STRING) && require_all(d, &m->structured, UNSIGNED) &&
                       require_all(d, &m->structures, MAP)
                 : absent(d, of_parts, 3);
}

/* Joins a name with the bytes that it shares with the one before, in place. */
static bool join_name(const directory *d, const delta_map *m, size_t i, const value *rest, sfp_span before,
                      uint8_t *to, delta_tensor *t)
{
    size_t shared = d->bytes[m->shared.content + i];
    if (shared > before.length) {
        return refuse_at(d, R_DLT_016, m->shared.at, "a name shares more bytes than the name before has");
    }
    if (shared > 0) {
        memcpy(to, before.bytes, shared);
    }
    memcpy(to + shared, d->bytes + rest->content, (size_t)rest->number);
    t->name.bytes = to;
    t->name.length = shared + (size_t)rest->number;
    d->fault->tensor = NO_SPAN;
    if (!is_text(to, t->name.length)) {
        return refuse_at(d, R_DLT_016, m->shared.at, "a joined name is not well-formed UTF-8");
    }
    return true;
}

/* Reads a shape of the list. */
static bool read_delta_shape(const directory *d, delta_tensor *t)
{
    size_t at = t->shape.content;
    uint64_t nonzero = 1;
    value size;
    if (t->shape.number > d->limits->rank) {
        return refuse_at(d, R_LIM_002, t->shape.at, "the rank is above its limit");
    }
    t->positions = 1;
    for (uint64_t i = 0; i < t->shape.number && next_value(d, &at, &size); i++) {
        if (size.kind != UNSIGNED) {
            return refuse_at(d, R_DIR_003, size.at, "a size is not an integer");
        }
        if (size.number != 0 && nonzero > (UINT64_C(1) << 48) / size.number) {
            return refuse_at(d, R_TEN_005, t->shape.at, "a shape has more than 2^48 positions");
        }
        nonzero *= size.number != 0 ? size.number : 1;
        t->positions = size.number != 0 ? t->positions : 0;
    }
    t->positions = t->positions != 0 ? nonzero : 0;
    return true;
}

/* Reads a tensor of the list. Its name and the positions of its shape and dtype in the lists are known. */
static bool read_delta_tensor(const directory *d, const delta_map *m, size_t i, const value *type, delta_tensor *t)
{
    const uint8_t *checksums = d->bytes + m->checksums.content + 8 * i;
    if (t->name.length == 0) {
        return refuse_at(d, R_TEN_002, m->names.at, "the name of a tensor is empty");
    }
    if (t->name.length > d->limits->name_bytes) {
        return refuse_at(d, R_LIM_002, m->names.at, "the bytes of a name are above their limit");
    }
    t->dtype = dtype_of(d, type);
    if (t->dtype == NULL) {
        return refuse_at(d, R_TEN_003, type->at, "an unknown dtype");
    }
    if (!read_delta_shape(d, t)) {
        return false;
    }
    t->kind = d->bytes[m->kinds.content + i];
    if (t->kind >= DELTA_KINDS) {
        return refuse_at(d, R_DLT_003, m->kinds.at, "an unknown kind");
    }
    t->base = load32(checksums);
    t->result = load32(checksums + 4);
    if ((t->kind == ADDED && t->base != 0) || (t->kind == REMOVED && t->result != 0) ||
        (t->kind == UNCHANGED && t->base != t->result)) {
        return refuse_at(d, R_DLT_004, m->checksums.at, "checksums that do not fit the kind");
    }
    return true;
}

/* Reads the tensors of the list, whose memory is allocated. `names` has room for all joined names. */
static bool read_delta_tensors(delta *out, const directory *d, const delta_map *m)
{
    size_t names_at = m->names.content, dtypes_at = m->dtypes.content, shapes_at = m->shapes.content;
    uint8_t *to = out->names;
    sfp_span before = NO_SPAN;
    for (size_t i = 0; i < out->count; i++) {
        delta_tensor *t = &out->tensors[i];
        t->in_parts = false;
        value rest, type;
        if (!next_value(d, &names_at, &rest) || !next_value(d, &dtypes_at, &type) ||
            !next_value(d, &shapes_at, &t->shape) || !join_name(d, m, i, &rest, before, to, t)) {
            return false;
        }
        if (!read_delta_tensor(d, m, i, &type, t)) {
            name_joined(d->fault, t->name);
            return false;
        }
        to += t->name.length;
        before = t->name;
    }
    return true;
}

/* Reads the pools, whose memory is allocated, and finds their tensors among those of the file. */
static bool read_delta_pools(sfp_file *file, const directory *d, const delta_map *m, const numbered_name *names)
{
    size_t at = m->pools.content;
    for (size_t i = 0; i < file->delta.pool_count; i++) {
        delta_pool *pool = &file->delta.pools[i];
        value map, type, tensors, stored[3];
        const field fields[] = {{"dtype", &type},
                                {"tensors", &tensors},
                                {"counts", &stored[0]},
                                {"gaps", &stored[1]},
                                {"differences", &stored[2]}};
        if (!next_value(d, &at, &map)) {
            return false;
        }
        read_fields(d, &map, fields, sizeof fields / sizeof fields[0]);
        if (!require(d, &type, STRING) || !require(d, &tensors, UNSIGNED) || !require(d, &stored[0], STRING) ||
            !require(d, &stored[1], STRING) || !require(d, &stored[2], STRING)) {
            return false;
        }
        pool->dtype = dtype_of(d, &type);
        pool->tensors = tensors.number;
        if (pool->dtype == NULL || pool->tensors < 1 || pool->tensors > file->delta.count) {
            return refuse_at(d, R_DLT_006, map.at, "a pool whose tensors are not changed tensors");
        }
        for (size_t k = 0; k < 3; k++) {
            pool->stored[k] = number_of_name(names, file->tensor_count, span_of(d, &stored[k]));
            if (pool->stored[k] == SIZE_MAX) {
                refuse_at(d, R_DLT_007, stored[k].at, "a tensor of a pool is missing");
                d->fault->tensor = span_of(d, &stored[k]);
                return false;
            }
        }
    }
    return true;
}

/* Checks that the pools of each dtype have as many tensors as are changed (R-DLT-006). */
static bool check_pool_sizes(const delta *o, const directory *d, const delta_map *m)
{
    uint64_t left[DTYPE_COUNT] = {0};
    for (size_t i = 0; i < o->count; i++) {
        left[o->tensors[i].dtype - DTYPES] += o->tensors[i].kind == CHANGED;
    }
    for (size_t i = 0; i < o->pool_count; i++) {
        uint64_t *own = &left[o->pools[i].dtype - DTYPES];
        if (*own < o->pools[i].tensors) {
            return refuse_at(d, R_DLT_006, m->pools.at, "the pools have more tensors than are changed");
        }
        *own -= o->pools[i].tensors;
    }
    for (size_t i = 0; i < DTYPE_COUNT; i++) {
        if (left[i] != 0) {
            return refuse_at(d, R_DLT_006, m->pools.at, "the pools have fewer tensors than are changed");
        }
    }
    return true;
}

/* Returns the index of the next changed tensor of a dtype from *next on, and moves *next after it. */
static size_t next_member(const delta *o, const dtype *t, size_t *next)
{
    while (o->tensors[*next].kind != CHANGED || o->tensors[*next].dtype != t) {
        ++*next;
    }
    return (*next)++;
}

/* Checks dtype and rank of a tensor of a pool, and the shape of `counts` (R-DLT-007). */
static bool check_pool_tensor(const sfp_file *file, const directory *d, size_t number, const dtype *wanted,
                              const uint64_t *shape)
{
    entry e;
    if (!read_entry(d, file->tensors[number].entry, &e)) {
        return false;
    }
    bool fits = shape == NULL ? e.told.rank == 1
                              : e.told.rank == 2 && e.told.shape[0] == shape[0] && e.told.shape[1] == shape[1];
    if (e.dtype != wanted || !fits) {
        refuse_at(d, R_DLT_007, file->tensors[number].entry, "a tensor of a pool has another dtype or shape");
        d->fault->tensor = e.told.name;
        return false;
    }
    return true;
}

static bool check_pools(const sfp_file *file, const directory *d)
{
    const delta *o = &file->delta;
    size_t next[DTYPE_COUNT] = {0};
    for (size_t i = 0; i < o->pool_count; i++) {
        const delta_pool *pool = &o->pools[i];
        unsigned w = element_bits(pool->dtype);
        const dtype *stored = &DTYPES[w == 8 ? F8_E4M3 : w == 16 ? BF16 : w == 32 ? F32 : F64];
        uint64_t elements = 0; /* each tensor has at most 2^48 positions */
        for (uint64_t k = 0; k < pool->tensors; k++) {
            size_t member = next_member(o, pool->dtype, &next[pool->dtype - DTYPES]);
            elements += o->tensors[member].positions * (pool->dtype->bits / w);
        }
        const uint64_t shape[2] = {divide_up(elements, o->block), UINT64_C(1) << exponent_bits(pool->dtype)};
        if (!check_pool_tensor(file, d, pool->stored[0], &DTYPES[F32], shape) ||
            !check_pool_tensor(file, d, pool->stored[1], &DTYPES[F32], NULL) ||
            !check_pool_tensor(file, d, pool->stored[2], stored, NULL)) {
            return false;
        }
    }
    return true;
}

/* Returns whether a tensor of the list has this shape. */
static bool has_shape(const directory *d, const delta_tensor *t, const sfp_tensor *other)
{
    size_t at = t->shape.content;
    value size;
    if (t->shape.number != other->rank) {
        return false;
    }
    for (size_t i = 0; i < other->rank && next_value(d, &at, &size); i++) {
        if (size.number != other->shape[i]) {
            return false;
        }
    }
    return true;
}

/* Checks that the file has the replaced and added tensors, and no others besides those of pools (R-DLT-008). `used`
 * has a zero for each tensor of the file. */
static bool check_used(sfp_file *file, const directory *d, const numbered_name *names, uint8_t *used)
{
    delta *o = &file->delta;
    size_t twice = 0;
    for (size_t i = 0; i < o->pool_count; i++) {
        for (size_t k = 0; k < 3; k++) {
            twice += used[o->pools[i].stored[k]];
            used[o->pools[i].stored[k]] = 1;
        }
    }
    for (size_t i = 0; i < o->count; i++) {
        delta_tensor *t = &o->tensors[i];
        entry e;
        if (t->kind != REPLACED && t->kind != ADDED) {
            continue;
        }
        t->stored = number_of_name(names, file->tensor_count, t->name);
        bool fits = t->stored != SIZE_MAX && read_entry(d, file->tensors[t->stored].entry, &e) &&
                    e.dtype == t->dtype && has_shape(d, t, &e.told);
        if (!fits) {
            refuse_at(d, R_DLT_008, 0, "a replaced or added tensor is missing, or has another dtype or shape");
            name_joined(d->fault, t->name);
            return false;
        }
        twice += used[t->stored];
        used[t->stored] = 1;
    }
    for (size_t i = 0; i < file->tensor_count; i++) {
        twice += used[i] == 0;
    }
    return twice == 0 || refuse_at(d, R_DLT_008, 0, "the delta does not use each tensor of the file once");
}

/* Checks that the list has no name twice (R-DLT-002). `sorted` has room for all names. */
static bool check_listed_names(const delta *o, const directory *d, const delta_map *m, numbered_name *sorted)
{
    for (size_t i = 0; i < o->count; i++) {
        sorted[i].name = o->tensors[i].name;
        sorted[i].number = i;
    }
    sort_names(sorted, o->count);
    for (size_t i = 1; i < o->count; i++) {
        if (compare_spans(sorted[i - 1].name, sorted[i].name) == 0) {
            refuse_at(d, R_DLT_002, m->names.at, "the delta lists a name twice");
            name_joined(d->fault, sorted[i].name);
            return false;
        }
    }
    return true;
}

enum { WEIGHTS, MASK_PART, IMPORTANCE_PART, VECTORS_PART, PART_COUNT };

static const char *const PART_WORDS[PART_COUNT] = {"", "mask", "importance", "vectors"};

/* Reads the quantiser of a structure, or of its importance (28.4). */
static bool read_part_quantiser(const directory *d, const stream_map *m, stream *s)
{
    static const char *const words[] = {"exact", "uniform", "table"};
    const value *count[] = {&m->count};
    if (!require(d, &m->quantiser, STRING)) {
        return false;
    }
    s->present = true;
    s->quantiser = (quantiser)word_of(d, &m->quantiser, words, QUANTISER_COUNT);
    if (s->quantiser == QUANTISER_COUNT) {
        return refuse_at(d, R_QNT_001, m->quantiser.at, "an unknown quantiser");
    }
    if (s->quantiser != TABLE) {
        return absent(d, count, 1);
    }
    if (!require(d, &m->count, UNSIGNED)) {
        return false;
    }
    if (m->count.number < 1 || m->count.number > 65536) {
        return refuse_at(d, R_QNT_004, m->count.at, "count is not a number from 1 to 65,536");
    }
    s->centroids = m->count.number;
    return true;
}

/* Reads the importance of a structure (28.4). */
static bool read_part_importance(const directory *d, const value *map, entry *e)
{
    stream_map m;
    read_stream_map(d, map, &m);
    if (!read_over_and_role(d, &m, e)) {
        return false;
    }
    stream *s = &e->streams[IMPORTANCE_STREAM];
    const value *others[] = {&m.quantiser, &m.count}, *type[] = {&m.dtype};
    bool factors = e->told.importance == SFP_FACTORS;
    if (factors ? !absent(d, others, 2) : !read_part_quantiser(d, &m, s)) {
        return false;
    }
    if (!factors && s->quantiser != EXACT) {
        return absent(d, type, 1);
    }
    if (!require(d, &m.dtype, STRING)) {
        return false;
    }
    const dtype *own = dtype_of(d, &m.dtype);
    if (own == NULL && !factors) {
        return refuse_at(d, R_TEN_003, m.dtype.at, "an unknown coded dtype");
    }
    if (!is_factor_dtype(own)) {
        return refuse_at(d, R_IMP_003, m.dtype.at, "the dtype of an importance is not F32, F16 or BF16");
    }
    s->coded = factors ? NULL : own;
    e->factor_dtype = factors ? own : NULL;
    return true;
}

/* Reads and checks the structure at offset `at` of the directory (28.4), as an entry without shape and tables. */
static bool read_structure(const directory *d, size_t at, entry *e)
{
    value map, type, mask, scale_map, importance;
    const field fields[] = {
        {"dtype", &type}, {"mask", &mask}, {"scale", &scale_map}, {"importance", &importance}};
    stream_map m;
    memset(e, 0, sizeof *e);
    if (!next_value(d, &at, &map)) {
        return false;
    }
    read_fields(d, &map, fields, sizeof fields / sizeof fields[0]);
    read_stream_map(d, &map, &m);
    if (!require(d, &type, STRING)) {
        return false;
    }
    e->dtype = dtype_of(d, &type);
    if (e->dtype == NULL) {
        return refuse_at(d, R_TEN_003, type.at, "an unknown dtype");
    }
    if (e->dtype->nonfinite == 0) {
        return refuse_at(d, R_TEN_010, type.at, "a structure with a dtype that is not a float");
    }
    if (!require(d, &mask, UNSIGNED)) {
        return false;
    }
    if (mask.number > 1) {
        return refuse_at(d, R_DLT_019, mask.at, "mask is neither 0 nor 1");
    }
    e->told.dtype = e->dtype->name;
    e->told.element_bytes = e->dtype->bits / 8;
    e->told.fingerprint = true;
    e->told.pruned = mask.number == 1;
    e->streams[FINGERPRINT_STREAM].coded = e->dtype;
    return read_part_quantiser(d, &m, &e->streams[FINGERPRINT_STREAM]) &&
           (!has(&scale_map) || (require(d, &scale_map, MAP) && read_scale(d, &scale_map, e))) &&
           (!has(&importance) || (require(d, &importance, MAP) && read_part_importance(d, &importance, e)));
}

/* Sets the shape of a structure's tensor to that of a tensor of the list. */
static void set_shape(const directory *d, const delta_tensor *t, entry *e)
{
    size_t at = t->shape.content;
    value size;
    e->told.rank = (size_t)t->shape.number;
    for (size_t i = 0; i < e->told.rank && next_value(d, &at, &size); i++) {
        e->told.shape[i] = size.number;
    }
    e->told.positions = t->positions;
    e->rows = e->told.rank >= 2 && t->positions > 0 ? e->told.shape[0] : 1;
    e->columns = t->positions / e->rows;
}

/* Returns the number of steps at the start of the part `vectors`. */
static uint64_t steps_of(const entry *e)
{
    const stream *own = &e->streams[FINGERPRINT_STREAM], *importance = &e->streams[IMPORTANCE_STREAM];
    return (uint64_t)(own->quantiser == UNIFORM) + (importance->present && importance->quantiser == UNIFORM);
}

/* Returns the dtype of a part of a structure's tensor, or NULL if the tensor has no such part. */
static const dtype *part_dtype(entry *e, size_t part)
{
    const stream *own = &e->streams[FINGERPRINT_STREAM], *importance = &e->streams[IMPORTANCE_STREAM];
    switch (part) {
    case WEIGHTS: return own->quantiser == EXACT ? e->dtype : &DTYPES[F32];
    case MASK_PART: return e->told.pruned && own->quantiser == EXACT ? &DTYPES[BOOL] : NULL;
    case IMPORTANCE_PART:
        return !importance->present ? NULL : importance->quantiser == EXACT ? importance->coded : &DTYPES[F32];
    default: return steps_of(e) + list_vectors(e) > 0 ? &DTYPES[F32] : NULL;
    }
}

/* Writes the name of a part into `to`, which has room for it. */
static sfp_span name_of_part(const delta *o, const delta_tensor *t, size_t part, uint8_t *to)
{
    sfp_span out = {to, t->name.length};
    memcpy(to, t->name.bytes, t->name.length);
    if (part != WEIGHTS) {
        memcpy(to + out.length, o->separator.bytes, o->separator.length);
        out.length += o->separator.length;
        memcpy(to + out.length, PART_WORDS[part], strlen(PART_WORDS[part]));
        out.length += strlen(PART_WORDS[part]);
    }
    return out;
}

/* Returns the bytes of the longest name of a part. */
static size_t longest_name(const delta *o)
{
    size_t longest = 0;
    for (size_t i = 0; i < o->count; i++) {
        longest = o->tensors[i].name.length > longest ? o->tensors[i].name.length : longest;
    }
    return longest + o->separator.length + strlen("importance");
}

/* Checks that a tensor of the list is the part of a structure's tensor with this number of elements. */
static bool fits_part(const directory *d, const delta_tensor *t, const entry *e, const dtype *wanted, size_t part)
{
    sfp_tensor shape = e->told;
    if (part == VECTORS_PART) {
        shape.rank = 1;
        shape.shape[0] = steps_of(e);
        for (size_t i = 0; i < VECTOR_COUNT; i++) {
            shape.shape[0] += e->vectors[i].elements;
        }
    }
    return !t->in_parts && t->dtype == wanted && has_shape(d, t, &shape);
}

/* Checks the parts of a tensor of the list (R-DLT-018). `sorted` are the names of the list, `room` has room for one. */
static bool check_parts(const delta *o, const directory *d, const delta_map *m, const delta_tensor *t,
                        const numbered_name *sorted, uint8_t *room)
{
    entry e;
    if (!read_structure(d, t->structure, &e)) {
        return false;
    }
    set_shape(d, t, &e);
    if (t->kind > CHANGED || t->dtype != part_dtype(&e, WEIGHTS)) {
        refuse_at(d, R_DLT_018, m->structured.at, "weights of a tensor in parts of another kind or dtype");
        name_joined(d->fault, t->name);
        return false;
    }
    for (size_t part = MASK_PART; part < PART_COUNT; part++) {
        sfp_span name = name_of_part(o, t, part, room);
        const dtype *wanted = part_dtype(&e, part);
        size_t number = number_of_name(sorted, o->count, name);
        bool listed = number != SIZE_MAX && o->tensors[number].kind != REMOVED;
        if (!listed && (wanted == NULL || part == MASK_PART)) {
            continue;
        }
        if (!listed || wanted == NULL || !fits_part(d, &o->tensors[number], &e, wanted, part)) {
            refuse_at(d, R_DLT_018, m->structured.at, "a part is missing, not needed, or has another dtype or shape");
            name_joined(d->fault, name);
            return false;
        }
    }
    return true;
}

/* Reads the structures, and that of each tensor of the list, and checks its parts (28.4). `places` has room for the
 * offsets of the structures, `room` for the longest name of a part. */
static bool read_structured(delta *o, const directory *d, const delta_map *m, const numbered_name *sorted,
                            size_t *places, uint8_t *room)
{
    size_t at = m->structures.content;
    value item;
    for (uint64_t i = 0; i < m->structures.number; i++) {
        entry e;
        places[i] = at;
        if (!read_structure(d, at, &e) || !next_value(d, &at, &item)) {
            return false;
        }
    }
    if (m->structured.number != o->count) {
        return refuse_at(d, R_DLT_017, m->structured.at, "structured does not have a number for each name");
    }
    at = m->structured.content;
    for (size_t i = 0; i < o->count && next_value(d, &at, &item); i++) {
        delta_tensor *t = &o->tensors[i];
        if (item.number > m->structures.number) {
            refuse_at(d, R_DLT_017, item.at, "the number of a structure that does not exist");
            name_joined(d->fault, t->name);
            return false;
        }
        t->in_parts = item.number > 0;
        t->structure = t->in_parts ? places[item.number - 1] : 0;
    }
    for (size_t i = 0; i < o->count; i++) {
        if (o->tensors[i].in_parts && !check_parts(o, d, m, &o->tensors[i], sorted, room)) {
            return false;
        }
    }
    return true;
}

/* Same as read_structured, with the memory that it needs. */
static sfp_status read_all_parts(delta *o, const directory *d, const delta_map *m, const numbered_name *sorted,
                                 const sfp_allocator *a)
{
    o->separator = span_of(d, &m->separator);
    size_t *places = allocate(a, m->structures.number, sizeof *places);
    uint8_t *room = allocate(a, longest_name(o), 1);
    sfp_status status = SFP_NO_MEMORY;
    if (places != NULL && room != NULL) {
        status = read_structured(o, d, m, sorted, places, room) ? SFP_OK : SFP_REFUSED;
    }
    release(a, places);
    release(a, room);
    return status;
}

/* Reads and checks the map of a delta (28.1). `names` are the sorted names of the file's tensors. */
static sfp_status read_delta(sfp_file *file, const directory *d, const value *map, const numbered_name *names)
{
    const sfp_allocator *a = &file->allocator;
    delta *o = &file->delta;
    delta_map m;
    if (!check_delta_map(d, map, o->parts, &m)) {
        return SFP_REFUSED;
    }
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < m.names.number; i++) {
        bytes += d->bytes[m.shared.content + i];
    }
    o->block = m.block.number;
    o->count = (size_t)m.names.number;
    o->pool_count = (size_t)m.pools.number;
    o->names = allocate(a, bytes + d->length, 1);
    o->tensors = allocate(a, m.names.number, sizeof *o->tensors);
    o->pools = allocate(a, m.pools.number, sizeof *o->pools);
    numbered_name *sorted = allocate(a, m.names.number, sizeof *sorted);
    uint8_t *used = allocate(a, file->tensor_count, 1);
    sfp_status status = SFP_NO_MEMORY;
    if (o->names != NULL && o->tensors != NULL && o->pools != NULL && sorted != NULL && used != NULL) {
        memset(used, 0, file->tensor_count);
        status = read_delta_tensors(o, d, &m) && check_listed_names(o, d, &m, sorted) ? SFP_OK : SFP_REFUSED;
        if (status == SFP_OK && o->parts) {
            status = read_all_parts(o, d, &m, sorted, a);
        }
    }
    if (status == SFP_OK) {
        status = read_delta_pools(file, d, &m, names) && check_pool_sizes(o, d, &m) &&
                         check_pools(file, d) && check_used(file, d, names, used)
                     ? SFP_OK
                     : SFP_REFUSED;
    }
    release(a, sorted);
    release(a, used);
    return status;
}

/* ---------------------------------------------------------------------------------- the maps of keyed tables */

enum { MAX_OUTPUTS = 4096, MAX_CHECK_BITS = 32, PLACES = 4 };

/* Reads a code table of a keyed table (17.1). */
static bool read_one_code(const directory *d, const stream_map *m, uint64_t bound_less_one, stream *s)
{
    if (!read_code_table(d, m, bound_less_one, &s->table)) {
        return false;
    }
    s->present = true;
    return (s->table.group == 1 && s->table.codes <= 1 && s->table.window == 0) ||
           refuse_at(d, R_KEY_007, m->group.at, "a keyed table has pairs, several codes, or windows");
}

/* Checks the centroids of a keyed table. */
static bool check_keyed_centroids(const directory *d, const value *centroids, uint64_t count)
{
    bool good = centroids->number == 4 * count;
    uint32_t before = 0;
    for (uint64_t i = 0; good && i < count; i++) {
        uint32_t bits = load32(d->bytes + centroids->content + 4 * i);
        good = bits < DTYPES[F32].nonfinite && (i == 0 || bits > before); /* false with the sign bit set */
        before = bits;
    }
    return good || refuse_at(d, R_KEY_009, centroids->at, "the centroids do not fit, or do not ascend");
}

/* Reads and checks the map `levels`. */
static bool read_keyed_levels(const directory *d, const value *map, keyed_table *t)
{
    stream_map m;
    value centroids;
    const field fields[] = {{"centroids", &centroids}};
    const value *others[] = {&centroids};
    read_stream_map(d, map, &m);
    read_fields(d, map, fields, 1);
    m.dtype.kind = m.trim.kind = NOTHING; /* keys that this map does not define */
    if (!require(d, &m.quantiser, STRING)) {
        return false;
    }
    if (span_is(span_of(d, &m.quantiser), "uniform")) {
        t->levels.quantiser = UNIFORM;
        if (!read_uniform(d, &m, &t->levels) || !absent(d, others, 1) ||
            !read_one_code(d, &m, UINT32_MAX, &t->levels)) {
            return false;
        }
        return is_finite(multiply((float)(uint32_t)(t->levels.table.last / 2), t->levels.step)) ||
               refuse_at(d, R_QNT_006, m.step.at, "the step times the greatest magnitude number is not finite");
    }
    if (!span_is(span_of(d, &m.quantiser), "table")) {
        return refuse_at(d, R_KEY_008, m.quantiser.at, "the quantiser is neither uniform nor table");
    }
    t->levels.quantiser = TABLE;
    if (!read_table(d, &m, &t->levels) || !require(d, &centroids, BINARY) ||
        !read_one_code(d, &m, 2 * t->levels.centroids - 1, &t->levels)) {
        return false;
    }
    t->centroids = d->bytes + centroids.content;
    return check_keyed_centroids(d, &centroids, t->levels.centroids);
}

/* Reads and checks the map `importance` of a keyed table. */
static bool read_keyed_importance(const directory *d, const value *map, keyed_table *t)
{
    stream_map m;
    if (!require(d, map, MAP)) {
        return false;
    }
    read_stream_map(d, map, &m);
    m.dtype.kind = m.trim.kind = m.count.kind = NOTHING;
    if (!read_uniform(d, &m, &t->importance) || !read_one_code(d, &m, UINT32_MAX >> 1, &t->importance)) {
        return false;
    }
    return is_finite(multiply((float)(uint32_t)t->importance.table.last, t->importance.step)) ||
           refuse_at(d, R_IMP_006, m.step.at, "the step times the greatest level is not finite");
}

/* Returns the greatest number of bits of a codeword and its residual. */
static uint64_t most_bits_of(const directory *d, const stream *s)
{
    size_t at = s->table.codes_at;
    uint64_t most = 0;
    value code;
    bool coded = s->present && s->table.codes == 1 && next_value(d, &at, &code);
    for (size_t c = 0; s->present && c < s->table.classes; c++) {
        uint64_t bits = s->table.extra[c] + (coded ? code_length(d->bytes + code.content, c) : 0);
        most = bits > most ? bits : most;
    }
    return most;
}

/* Reads and checks the numbers of a keyed table. */
static bool read_keyed_numbers(const directory *d, const value *map, keyed_table *t)
{
    value keys, outputs, seed, segment, starts;
    const field fields[] = {
        {"keys", &keys}, {"outputs", &outputs}, {"seed", &seed}, {"segment", &segment}, {"starts", &starts}};
    read_fields(d, map, fields, sizeof fields / sizeof fields[0]);
    if (!require(d, &keys, UNSIGNED) || !require(d, &outputs, UNSIGNED) || !require(d, &seed, UNSIGNED) ||
        !require(d, &segment, UNSIGNED) || !require(d, &starts, UNSIGNED)) {
        return false;
    }
    if (outputs.number < 1 || outputs.number > MAX_OUTPUTS) {
        return refuse_at(d, R_KEY_004, outputs.at, "outputs is not from 1 to 4,096");
    }
    if (seed.number > UINT32_MAX) {
        return refuse_at(d, R_KEY_005, seed.at, "the seed is not below 2^32");
    }
    uint64_t z = segment.number;
    if (z < 8 || z > UINT64_C(1) << 24 || (z & (z - 1)) != 0) {
        return refuse_at(d, R_KEY_006, segment.at, "segment is not a power of two from 8 to 2^24");
    }
    if (starts.number < z || starts.number > UINT64_C(1) << 32 || starts.number % z != 0) {
        return refuse_at(d, R_KEY_006, starts.at, "starts is not a multiple of segment up to 2^32");
    }
    t->keys = keys.number;
    t->outputs = outputs.number;
    t->seed = seed.number;
    t->segment = z;
    t->starts = starts.number;
    return true;
}

/* Reads and checks a map of `keyed` against itself. Sets `bits` to the name of the bit array. */
static bool read_keyed_map(const directory *d, const value *map, keyed_table *t, value *bits)
{
    value name, gaps, levels, checks, importance;
    const field fields[] = {{"name", &name},     {"bits", bits},     {"gaps", &gaps},
                            {"levels", &levels}, {"checks", &checks}, {"importance", &importance}};
    const value *one[] = {&gaps};
    read_fields(d, map, fields, sizeof fields / sizeof fields[0]);
    if (!require(d, &name, STRING) || !require(d, bits, STRING) || !read_keyed_numbers(d, map, t)) {
        return false;
    }
    t->name = span_of(d, &name);
    if (name.number == 0) {
        return refuse_at(d, R_TEN_002, name.at, "the name of a keyed table is empty");
    }
    if (t->outputs == 1 && !absent(d, one, 1)) {
        return false;
    }
    if (t->outputs > 1) {
        stream_map m;
        if (!require(d, &gaps, MAP)) {
            return false;
        }
        read_stream_map(d, &gaps, &m);
        if (!read_one_code(d, &m, t->outputs, &t->gaps)) {
            return false;
        }
    }
    if (!require(d, &levels, MAP) || !read_keyed_levels(d, &levels, t) || !require(d, &checks, BINARY) ||
        (has(&importance) && !read_keyed_importance(d, &importance, t))) {
        return false;
    }
    unsigned most = 0;
    t->checks = d->bytes + checks.content;
    for (uint64_t i = 0; i < checks.number; i++) {
        most = t->checks[i] > most ? t->checks[i] : most;
    }
    if (checks.number != t->levels.table.classes || most > MAX_CHECK_BITS) {
        return refuse_at(d, R_KEY_010, checks.at, "checks has not one byte of at most 32 for each class");
    }
    uint64_t each = most_bits_of(d, &t->gaps) + most_bits_of(d, &t->levels);
    uint64_t row = t->outputs * each + most_bits_of(d, &t->importance) + most;
    t->array_bytes = 8 * divide_up(t->starts + 3 * t->segment + row, 64) + 8;
    return true;
}

/* Finds and checks the bit array of a keyed table. */
static bool find_bits(const sfp_file *file, const directory *d, const value *bits, const numbered_name *names,
                      keyed_table *t)
{
    entry e;
    t->bits = number_of_name(names, file->tensor_count, span_of(d, bits));
    if (t->bits == SIZE_MAX) {
        return refuse_at(d, R_KEY_011, bits->at, "there is no such tensor for a bit array");
    }
    if (!read_entry(d, file->tensors[t->bits].entry, &e)) {
        return false;
    }
    bool fits = strcmp(e.told.dtype, "U8") == 0 && !e.told.fingerprint && e.told.rank == 1 &&
                e.told.shape[0] == t->array_bytes && e.segment * e.chunk % 64 == 0;
    if (!fits) {
        refuse_at(d, R_KEY_011, bits->at, "the bit array has another dtype, coding, shape, or size of chunks");
        d->fault->tensor = e.told.name;
    }
    return fits;
}

/* Reads and checks the array `keyed` (17.1). `names` are the sorted names of the file's tensors. */
static bool read_tables(sfp_file *file, const directory *d, const value *keyed, const numbered_name *names,
                        numbered_name *own, uint8_t *used)
{
    size_t at = keyed->content;
    for (size_t i = 0; i < file->table_count; i++) {
        keyed_table *t = &file->tables[i];
        value map, bits;
        if (!next_value(d, &at, &map)) {
            return false;
        }
        if (map.kind != MAP) {
            return refuse_at(d, R_DIR_003, map.at, "an element of keyed is not a map");
        }
        if (!read_keyed_map(d, &map, t, &bits)) {
            return false;
        }
        own[i].name = t->name;
        own[i].number = i;
        size_t number = number_of_name(names, file->tensor_count, span_of(d, &bits));
        if (number != SIZE_MAX && used[number]++ != 0) {
            return refuse_at(d, R_KEY_012, bits.at, "two keyed tables have one bit array");
        }
        if (!find_bits(file, d, &bits, names, t)) {
            return false;
        }
    }
    sort_names(own, file->table_count);
    for (size_t i = 1; i < file->table_count; i++) {
        if (compare_spans(own[i - 1].name, own[i].name) == 0) {
            return refuse_at(d, R_KEY_003, keyed->at, "two keyed tables have the same name");
        }
    }
    return true;
}

/* Allocates the keyed tables, reads and checks them. */
static sfp_status read_keyed(sfp_file *file, const directory *d, const value *keyed, const numbered_name *names)
{
    const sfp_allocator *a = &file->allocator;
    if (keyed->number == 0) {
        refuse_at(d, R_KEY_002, keyed->at, "keyed has no tables");
        return SFP_REFUSED;
    }
    file->tables = allocate(a, keyed->number, sizeof *file->tables);
    numbered_name *own = allocate(a, keyed->number, sizeof *own);
    uint8_t *used = allocate(a, file->tensor_count, 1);
    sfp_status status = SFP_NO_MEMORY;
    if (file->tables != NULL && own != NULL && used != NULL) {
        file->table_count = (size_t)keyed->number;
        memset(file->tables, 0, file->table_count * sizeof *file->tables);
        memset(used, 0, file->tensor_count);
        status = read_tables(file, d, keyed, names, own, used) ? SFP_OK : SFP_REFUSED;
    }
    release(a, own);
    release(a, used);
    return status;
}

/* Reads and checks the directory (chapters 6 and 7). The memory is proportional to the number of entries, whose
 * encoding has been checked before. */
static sfp_status read_directory(sfp_file *file, sfp_fault *fault)
{
    directory d = directory_of(file, fault);
    value tensors, map, keyed;
    if (!read_root(file, &d, &tensors, &map, &keyed)) {
        return SFP_REFUSED;
    }
    file->tensor_count = (size_t)tensors.number;
    file->tensors = allocate(&file->allocator, tensors.number, sizeof *file->tensors);
    numbered_name *names = allocate(&file->allocator, tensors.number, sizeof *names);
    sfp_status status = SFP_NO_MEMORY;
    if (file->tensors != NULL && names != NULL) {
        status = read_entries(file, &d, &tensors, names) ? SFP_OK : SFP_REFUSED;
        if (status == SFP_OK && file->delta.present) {
            status = read_delta(file, &d, &map, names);
        }
        if (status == SFP_OK && file->keyed) {
            status = read_keyed(file, &d, &keyed, names);
        }
    }
    release(&file->allocator, names);
    return status;
}

static uint64_t at_most(uint64_t x, uint64_t greatest)
{
    return x < greatest ? x : greatest;
}

sfp_status sfp_open(const uint8_t *bytes, size_t length, const sfp_limits *limits, const sfp_allocator *allocator,
                    sfp_file **opened, sfp_fault *fault)
{
    const sfp_allocator by_default = {allocate_by_malloc, release_by_free, NULL};
    const sfp_allocator *own = allocator != NULL ? allocator : &by_default;
    *opened = NULL;
    sfp_file *file = allocate(own, 1, sizeof *file);
    if (file == NULL) {
        return SFP_NO_MEMORY;
    }
    memset(file, 0, sizeof *file);
    file->bytes = bytes;
    file->allocator = *own;
    file->limits = limits != NULL ? *limits : sfp_default_limits();
    file->limits.depth = at_most(file->limits.depth, SFP_MAX_DEPTH);
    file->limits.rank = at_most(file->limits.rank, SFP_MAX_RANK);
    fill_crc_tables(&file->crc);
    sfp_status status = read_preamble(file, length, fault) ? read_directory(file, fault) : SFP_REFUSED;
    if (status != SFP_OK) {
        sfp_close(file);
        return status;
    }
    *opened = file;
    return SFP_OK;
}

void sfp_close(sfp_file *file)
{
    if (file != NULL) {
        sfp_allocator allocator = file->allocator;
        release(&allocator, file->delta.names);
        release(&allocator, file->delta.tensors);
        release(&allocator, file->delta.pools);
        release(&allocator, file->tables);
        release(&allocator, file->tensors);
        release(&allocator, file);
    }
}

size_t sfp_tensor_count(const sfp_file *file)
{
    return file->tensor_count;
}

sfp_span sfp_directory(const sfp_file *file)
{
    return file->directory;
}

sfp_status sfp_describe(const sfp_file *file, size_t number, sfp_tensor *tensor)
{
    sfp_fault fault;
    entry e;
    directory d = directory_of(file, &fault);
    if (number >= file->tensor_count || !read_entry(&d, file->tensors[number].entry, &e)) {
        return SFP_MISUSE;
    }
    *tensor = e.told;
    return SFP_OK;
}

bool sfp_next_metadata(const sfp_file *file, size_t *cursor, sfp_span *key, sfp_span *text)
{
    sfp_fault fault;
    directory d = directory_of(file, &fault);
    value k, v;
    size_t at = *cursor == 0 ? file->metadata.content : *cursor;
    if (at >= file->metadata_end || !next_value(&d, &at, &k) || !next_value(&d, &at, &v)) {
        return false;
    }
    *cursor = at;
    *key = span_of(&d, &k);
    *text = span_of(&d, &v);
    return true;
}

/* --------------------------------------------------------------------------------------- decoding: streams */

enum { LOOKUP_SIZE = 1 << MAX_LENGTH };

/* A stream that is ready to decode. `lookup` maps the next 12 bits of a prefix plane to the first symbol in them
 * and, if the second codeword fits too, the second symbol. The fields of an entry, from the lowest bit up, have 4,
 * 4, 12 and 12 bits: the length of both codewords (or of the first alone), the length of the first, the first
 * symbol and the second. A symbol is given as its class; with g = 2, as its first class plus 64 times its second. */
typedef struct stream_decoder {
    const stream *stream;
    uint64_t *first;      /* the first level of each class */
    const uint8_t *extra; /* the number of residual bits of each class */
    uint32_t *lookup;     /* LOOKUP_SIZE entries for each code */
    unsigned least_extra, greatest_extra; /* over the classes that a code uses */
} stream_decoder;

static uint32_t reversed(uint32_t word, unsigned bits)
{
    uint32_t out = 0;
    for (unsigned i = 0; i < bits; i++) {
        out = out << 1 | (word >> i & 1);
    }
    return out;
}

/* Returns the classes of a symbol, as the lookup table stores them. */
static uint32_t classes_of_symbol(const code_table *t, uint32_t symbol)
{
    uint32_t classes = (uint32_t)t->classes;
    return t->group == 1 ? symbol : symbol % classes | symbol / classes << 6;
}

/* Adds the second symbols to a table with the first symbols. The second symbol is the first symbol of the entry for
 * the remaining bits. The index of that entry is not greater. The loop runs from the last entry to the first, so
 * that it reads only entries without a second symbol. */
static void add_second_symbols(uint32_t *lookup)
{
    for (uint32_t at = LOOKUP_SIZE; at-- > 0;) {
        uint32_t first = lookup[at] >> 4 & 15;
        uint32_t next = lookup[at >> first];
        uint32_t both = first + (next >> 4 & 15);
        bool fits = both <= MAX_LENGTH;
        lookup[at] |= fits ? both | next >> 8 << 20 : first;
    }
}

/* Fills a lookup table with the canonical codewords of chapter 8. Their bits are reversed, because the plane stores
 * the most significant bit first. */
static void fill_lookup(const code_table *t, const uint8_t *code, uint32_t *lookup)
{
    uint32_t used[MAX_USED];
    size_t count = 0;
    for (uint32_t s = 0; s < symbols_of(t); s++) {
        if (code_length(code, s) > 0) {
            used[count++] = s;
        }
    }
    uint32_t word = 0;
    for (unsigned length = 1; length <= MAX_LENGTH; length++, word *= 2) {
        for (size_t i = 0; i < count; i++) {
            if (code_length(code, used[i]) != length) {
                continue;
            }
            uint32_t found = classes_of_symbol(t, used[i]) << 8 | length << 4;
            for (uint32_t at = reversed(word, length); at < LOOKUP_SIZE; at += UINT32_C(1) << length) {
                lookup[at] = found;
            }
            word++;
        }
    }
    add_second_symbols(lookup);
}

static void note_extra(stream_decoder *s, size_t class_number)
{
    unsigned extra = s->extra[class_number];
    s->least_extra = extra < s->least_extra ? extra : s->least_extra;
    s->greatest_extra = extra > s->greatest_extra ? extra : s->greatest_extra;
}

/* Updates the least and the greatest number of residual bits with the classes that a code uses. */
static void note_used_classes(stream_decoder *s, const uint8_t *code)
{
    const code_table *t = &s->stream->table;
    for (size_t symbol = 0; symbol < symbols_of(t); symbol++) {
        if (code_length(code, symbol) > 0) {
            note_extra(s, symbol % t->classes);
            note_extra(s, t->group == 1 ? symbol : symbol / t->classes);
        }
    }
}

static bool prepare_stream(const sfp_file *file, const stream *source, stream_decoder *s)
{
    const code_table *t = &source->table;
    s->stream = source;
    s->extra = t->extra;
    s->least_extra = MAX_EXTRA;
    s->greatest_extra = 0;
    s->first = allocate(&file->allocator, t->classes, sizeof *s->first);
    s->lookup = allocate(&file->allocator, t->codes * LOOKUP_SIZE, sizeof *s->lookup);
    if (s->first == NULL || s->lookup == NULL) {
        return false;
    }
    uint64_t first = t->base;
    for (size_t c = 0; c < t->classes; c++) {
        s->first[c] = first;
        first += (uint64_t)1 << t->extra[c];
    }
    for (size_t c = 0; c < t->classes && (t->classes == 1 || t->window > 0); c++) {
        note_extra(s, c);
    }
    sfp_fault unused;
    directory d = directory_of(file, &unused);
    size_t at = t->codes_at;
    value code;
    for (size_t i = 0; i < t->codes && next_value(&d, &at, &code); i++) {
        fill_lookup(t, d.bytes + code.content, s->lookup + i * LOOKUP_SIZE);
        note_used_classes(s, d.bytes + code.content);
    }
    return true;
}

/* Decodes `count` symbols from bit `from` of the prefix plane on. Returns whether they end at bit `to`. */
static bool look_up(const uint32_t *lookup, const uint8_t *plane, uint64_t from, uint64_t to, size_t count,
                    uint16_t *found)
{
    size_t i = 0;
    while (count - i >= 8 && from <= to) { /* four lookups use at most 48 of the 57 bits */
        uint64_t window = peek(plane, from);
        for (size_t k = 0; k < 4; k++) {
            uint32_t hit = lookup[window % LOOKUP_SIZE];
            uint32_t both = hit & 15, first = hit >> 4 & 15;
            window >>= both;
            from += both;
            found[i] = (uint16_t)(hit >> 8 & 4095);
            found[i + 1] = (uint16_t)(hit >> 20); /* overwritten if there is no second symbol */
            i += first == both ? 1 : 2;
        }
    }
    for (; i < count && from <= to; i++) {
        uint32_t hit = lookup[peek(plane, from) % LOOKUP_SIZE];
        found[i] = (uint16_t)(hit >> 8 & 4095);
        from += hit >> 4 & 15;
    }
    return i == count && from == to;
}

/* Returns bit `at` of a plane. */
static unsigned bit_of(const uint8_t *plane, uint64_t at)
{
    return (unsigned)plane[at / 8] >> (at % 8) & 1u;
}

/* Decodes the classes of `count` levels of a segment with a window, from bit `from` of the prefix plane to bit `to`
 * (`read_classes` of chapter 9). Returns the clause that
 * the segment breaks, or CLAUSE_COUNT. */
static clause read_window_classes(const code_table *t, const uint8_t *plane, uint64_t from, uint64_t to, size_t count,
                                  size_t window, uint16_t *found)
{
    unsigned escape = (1u << t->window) - 1, bits = 0;
    while ((size_t)1 << bits < t->classes) {
        bits++;
    }
    if ((uint64_t)count * t->window > to - from) {
        return R_PLN_003;
    }
    uint64_t escaped = 0;
    for (size_t i = 0; i < count; i++) {
        unsigned symbol = 0;
        for (unsigned k = 0; k < t->window; k++) {
            symbol |= bit_of(plane, from + (uint64_t)k * count + i) << k;
        }
        escaped += symbol == escape;
        found[i] = (uint16_t)(symbol == escape ? MAX_WINDOWED : window + symbol);
    }
    uint64_t at = from + (uint64_t)count * t->window;
    if (at + escaped * bits != to) {
        return R_PLN_003;
    }
    for (size_t i = 0; i < count; i++) {
        if (found[i] == MAX_WINDOWED) {
            found[i] = (uint16_t)(peek(plane, at) & ones(bits));
            at += bits;
            if (found[i] >= t->classes) {
                return R_PLN_005;
            }
        }
    }
    return CLAUSE_COUNT;
}

/* Splits `symbols` symbols into two classes each, in place, from the last to the first. */
static void split_pairs(uint16_t *classes, size_t symbols)
{
    for (size_t i = symbols; i > 0; i--) {
        unsigned pair = classes[i - 1];
        classes[2 * i - 1] = (uint16_t)(pair >> 6);
        classes[2 * i - 2] = (uint16_t)(pair & 63);
    }
}

static uint64_t residual_bits_of(const stream_decoder *s, const uint16_t *classes, size_t count, unsigned trim)
{
    uint64_t bits = 0;
    for (size_t i = 0; i < count; i++) {
        bits += s->extra[classes[i]];
    }
    return bits - (uint64_t)trim * count;
}

/* Computes levels from classes and their residuals, from bit `at` of the residual plane on. The plane omits the
 * bits 1 to `trim` of a residual. */
static void read_residuals(const stream_decoder *s, const uint8_t *plane, uint64_t at, const uint16_t *classes,
                           size_t count, unsigned trim, uint64_t *levels)
{
    for (size_t i = 0; i < count; i++) {
        unsigned width = s->extra[classes[i]] - trim;
        uint64_t r = peek(plane, at) & ones(width);
        levels[i] = s->first[classes[i]] + (r & 1) + (r >> 1 << (trim + 1));
        at += width;
    }
}

/* Same as read_residuals, if all classes have the same width. Faster, because no offset depends on the previous
 * level. */
static void read_even_residuals(const stream_decoder *s, const uint8_t *plane, uint64_t at, const uint16_t *classes,
                                size_t count, uint64_t *levels)
{
    unsigned width = s->least_extra;
    uint64_t mask = ones(width);
    for (size_t i = 0; i < count; i++) {
        levels[i] = s->first[classes[i]] + (peek(plane, at + i * width) & mask);
    }
}

/* ---------------------------------------------------------------------------------------- decoding: chunks */

enum { CODE, TRIM, PREFIX_BITS, RESIDUAL_BITS, STREAM_QUANTITIES };
enum { PREFIX, RESIDUAL, PLANES };

/* A quantity of the segment index (chapter 15.2). */
typedef struct quantity {
    uint32_t minimum;
    unsigned width;
    const uint8_t *fields;
    bool present;
} quantity;

typedef struct plane {
    const uint8_t *bits;
    uint64_t total; /* number of bits */
    uint64_t at;    /* the next bit */
} plane;

/* A chunk of a tensor with coding `fingerprint`. */
typedef struct chunk {
    const uint8_t *bytes;
    uint64_t length;
    uint64_t offset;   /* in the file */
    uint64_t first;    /* number of its first segment */
    uint64_t segments; /* number of its segments */
    quantity survivors;
    quantity quantities[STREAM_COUNT][STREAM_QUANTITIES];
    plane planes[STREAM_COUNT][PLANES];
} chunk;

/* The quantities of a segment for a stream. */
typedef struct share {
    size_t levels;
    size_t code;
    unsigned trim;
    uint64_t prefix_bits;
    uint64_t residual_bits;
} share;

typedef struct segment {
    uint64_t first; /* first position in the tensor */
    size_t positions;
    size_t survivors;
    share shares[STREAM_COUNT];
} segment;

/* The state of decoding a tensor: its streams, its vectors, and buffers for a segment. */
/* The parts of a tensor (28.4): NULL for one that it does not have. */
typedef struct parts {
    uint8_t *data[PART_COUNT];
    uint64_t elements[PART_COUNT];
    const dtype *dtypes[PART_COUNT];
    bool too_great; /* whether a magnitude number has no pattern */
} parts;

typedef struct decoder {
    const sfp_file *file;
    sfp_fault *fault;
    entry entry;
    sfp_decoded *out; /* NULL if the tensor is only checked */
    parts *parts;     /* receives the tensor in parts, or NULL */
    bool assembled;   /* whether the vectors are those of a part, not of the file */
    bool wants_mask, wants_fingerprints, wants_importance; /* whether to decode the stream */
    const uint8_t *vectors[VECTOR_COUNT];
    stream_decoder streams[STREAM_COUNT];
    void *room;          /* the memory block of the five buffers below */
    uint64_t *levels;    /* the levels of the current stream, then the patterns of the values */
    float *importance;   /* the importance of each position */
    uint16_t *classes;   /* the classes of the current stream; with g = 2 up to one more than levels */
    uint16_t *positions; /* the positions of the survivors */
    uint8_t *mask;       /* a byte for each position */
} decoder;

static uint64_t quantity_of(const quantity *q, uint64_t i)
{
    return q->width == 0 ? q->minimum : q->minimum + (peek(q->fields, i * q->width) & ones(q->width));
}

/* Lists the quantities of a tensor's chunks in order. Returns their number. */
static size_t list_quantities(const decoder *d, chunk *c, quantity *list[1 + STREAM_COUNT * STREAM_QUANTITIES])
{
    size_t count = 0;
    c->survivors.present = d->entry.told.pruned;
    if (c->survivors.present) {
        list[count++] = &c->survivors;
    }
    for (size_t id = 0; id < STREAM_COUNT; id++) {
        const stream *s = &d->entry.streams[id];
        const stream_decoder *ready = &d->streams[id];
        quantity *q = c->quantities[id];
        q[CODE].present = s->present && code_count(&s->table) > 1;
        q[TRIM].present = s->present && s->trimmed;
        q[PREFIX_BITS].present = s->present && s->table.classes > 1;
        q[RESIDUAL_BITS].present = s->present && ready->least_extra != ready->greatest_extra;
        for (size_t i = 0; i < STREAM_QUANTITIES; i++) {
            if (q[i].present) {
                list[count++] = &q[i];
            }
        }
    }
    return count;
}

static bool refuse_chunk(const decoder *d, const chunk *c, clause broken, uint64_t at, const char *detail)
{
    return refuse(d->fault, broken, c->offset + at, detail);
}

/* Checks that the bytes from..to-1 of a chunk are zero. */
static bool check_zero(const decoder *d, const chunk *c, clause rule, uint64_t from, uint64_t to)
{
    uint64_t at = first_nonzero(c->bytes, from, to);
    return at == to ? true : refuse_chunk(d, c, rule, at, "bytes that must be zero are not");
}

/* Checks the unused bits in the last byte of a sequence of `bits` bits that begins at byte `start`. */
static bool check_last_bits(const decoder *d, const chunk *c, clause rule, uint64_t start, uint64_t bits)
{
    uint64_t last = start + bits / 8;
    if (bits % 8 != 0 && c->bytes[last] >> (bits % 8) != 0) {
        return refuse_chunk(d, c, rule, last, "bits that must be zero are not");
    }
    return true;
}

/* Checks that a part that ends before `end` leaves room for the 16 bytes after the last part. */
static bool check_fits(const decoder *d, const chunk *c, uint64_t end)
{
    return end + 16 <= c->length ? true : refuse_chunk(d, c, R_IDX_003, 0, "the parts do not fit into the chunk");
}

/* Reads and checks the header and the index of a chunk. Sets the offset of the planes. */
static bool read_index(const decoder *d, chunk *c, uint64_t *planes_at)
{
    quantity *list[1 + STREAM_COUNT * STREAM_QUANTITIES];
    size_t count = list_quantities(d, c, list);
    uint64_t at = align(8 * count, 16);
    if (!check_fits(d, c, at)) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        const uint8_t *header = c->bytes + 8 * i;
        list[i]->minimum = load32(header);
        list[i]->width = header[4];
        if (list[i]->width > 32) {
            return refuse_chunk(d, c, R_IDX_001, 8 * i + 4, "an index field of more than 32 bits");
        }
        if (!check_zero(d, c, R_CHK_002, 8 * i + 5, 8 * i + 8)) {
            return false;
        }
    }
    if (!check_zero(d, c, R_CHK_003, 8 * count, at)) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        uint64_t bits = c->segments * list[i]->width;
        uint64_t end = align(at + divide_up(bits, 8), 16);
        if (!check_fits(d, c, end)) {
            return false;
        }
        list[i]->fields = c->bytes + at;
        if (!check_last_bits(d, c, R_IDX_004, at, bits) ||
            !check_zero(d, c, R_CHK_003, at + divide_up(bits, 8), end)) {
            return false;
        }
        at = end;
    }
    *planes_at = at;
    return true;
}

/* Returns the number of levels of a segment in a stream. */
static size_t level_count(const entry *e, stream_id id, const segment *s)
{
    switch (id) {
    case MASK_STREAM:
        if (e->octets) {
            return (s->positions + 7) / 8;
        }
        return e->polarity == 1 ? s->survivors : s->positions - s->survivors;
    case IMPORTANCE_STREAM: return e->told.importance == SFP_OVER_ALL ? s->positions : s->survivors;
    default: return s->survivors;
    }
}

static bool read_share(const decoder *d, const chunk *c, stream_id id, uint64_t i, segment *s)
{
    const stream_decoder *ready = &d->streams[id];
    const quantity *q = c->quantities[id];
    share *out = &s->shares[id];
    uint64_t code = q[CODE].present ? quantity_of(&q[CODE], i) : 0;
    uint64_t trim = q[TRIM].present ? quantity_of(&q[TRIM], i) : 0;
    if (q[CODE].present && code >= code_count(&ready->stream->table)) {
        return refuse_chunk(d, c, R_IDX_005, 0, "a segment's code number is too great");
    }
    if (trim > 0 && trim >= ready->least_extra) {
        return refuse_chunk(d, c, R_IDX_006, 0, "a trim is not less than the residual bits of each class");
    }
    out->levels = level_count(&d->entry, id, s);
    out->code = (size_t)code;
    out->trim = (unsigned)trim;
    out->prefix_bits = q[PREFIX_BITS].present ? quantity_of(&q[PREFIX_BITS], i) : 0;
    out->residual_bits = q[RESIDUAL_BITS].present ? quantity_of(&q[RESIDUAL_BITS], i)
                                                  : (uint64_t)out->levels * (ready->least_extra - out->trim);
    return true;
}

/* Reads and checks the quantities of segment i of a chunk. */
static bool read_segment(const decoder *d, const chunk *c, uint64_t i, segment *s)
{
    const entry *e = &d->entry;
    uint64_t left = 0;
    s->first = (c->first + i) * e->segment;
    left = e->told.positions - s->first;
    s->positions = (size_t)(left < e->segment ? left : e->segment);
    uint64_t survivors = c->survivors.present ? quantity_of(&c->survivors, i) : s->positions;
    if (survivors > s->positions) {
        return refuse_chunk(d, c, R_IDX_002, 0, "a segment has more survivors than positions");
    }
    s->survivors = (size_t)survivors;
    for (stream_id id = MASK_STREAM; id < STREAM_COUNT; id++) {
        if (e->streams[id].present && !read_share(d, c, id, i, s)) {
            return false;
        }
    }
    return true;
}

/* Sums the bits of all segments in each plane. There are at most 2^19 segments with less than 2^34 bits each. */
static bool measure_planes(const decoder *d, chunk *c)
{
    segment s;
    for (uint64_t i = 0; i < c->segments; i++) {
        if (!read_segment(d, c, i, &s)) {
            return false;
        }
        for (size_t id = 0; id < STREAM_COUNT; id++) {
            if (d->entry.streams[id].present) {
                c->planes[id][PREFIX].total += s.shares[id].prefix_bits;
                c->planes[id][RESIDUAL].total += s.shares[id].residual_bits;
            }
        }
    }
    return true;
}

/* Computes the offsets of the planes, from byte `at` on, and checks that they fill the chunk. */
static bool place_planes(const decoder *d, chunk *c, uint64_t at)
{
    for (size_t i = 0; i < STREAM_COUNT * PLANES; i++) {
        plane *p = &c->planes[i / PLANES][i % PLANES];
        uint64_t end = align(at + divide_up(p->total, 8), 16);
        if (!check_fits(d, c, end)) {
            return false;
        }
        p->bits = c->bytes + at;
        if (!check_last_bits(d, c, R_PLN_004, at, p->total) ||
            !check_zero(d, c, R_PLN_004, at + divide_up(p->total, 8), end)) {
            return false;
        }
        at = end;
    }
    if (align(at + 16, 64) != c->length) {
        return refuse_chunk(d, c, R_CHK_001, 0, "the chunk is longer than its parts need");
    }
    return check_zero(d, c, R_CHK_003, at, c->length);
}

/* Returns the bytes of the chunk of a record after a check of their checksum; NULL if it does not match. */
static const uint8_t *checked_bytes(const decoder *d, const uint8_t *record, uint64_t offset)
{
    const uint8_t *bytes = d->file->bytes + offset;
    if (crc32(&d->file->crc, bytes, record_length(record)) != record_crc(record)) {
        refuse(d->fault, R_LAY_004, offset, "a chunk's checksum does not match");
        return NULL;
    }
    return bytes;
}

/* --------------------------------------------------------------------------------------- decoding: vectors */

static uint64_t element(const decoder *d, size_t vector_id, uint64_t i)
{
    size_t size = d->entry.vectors[vector_id].dtype->bits / 8;
    return load(d->vectors[vector_id] + i * size, size);
}

static float number_at(const decoder *d, size_t vector_id, uint64_t i)
{
    return widen(d->entry.vectors[vector_id].dtype, element(d, vector_id, i));
}

static bool refuse_element(const decoder *d, clause broken, size_t vector_id, uint64_t i, const char *detail)
{
    uint64_t size = d->entry.vectors[vector_id].dtype->bits / 8;
    uint64_t start = d->assembled ? 0 : (uint64_t)(d->vectors[vector_id] - d->file->bytes);
    return refuse(d->fault, broken, start + i * size, detail);
}

static bool check_centroids(const decoder *d, size_t vector_id)
{
    uint64_t before = 0;
    for (uint64_t i = 0; i < d->entry.vectors[vector_id].elements; i++) {
        uint64_t bits = element(d, vector_id, i);
        if (bits >= DTYPES[F32].nonfinite) { /* also true with the sign bit set */
            return refuse_element(d, R_QNT_005, vector_id, i, "a centroid is not finite, or has a sign");
        }
        if (i > 0 && bits <= before) { /* the patterns of non-negative numbers have the same order as the numbers */
            return refuse_element(d, R_QNT_007, vector_id, i, "the centroids are not in ascending order");
        }
        before = bits;
    }
    return true;
}

/* Checks that all factors are finite. Sets their greatest magnitude. */
static bool check_factors(const decoder *d, size_t vector_id, clause rule, float *greatest)
{
    const vector *v = &d->entry.vectors[vector_id];
    *greatest = 0;
    for (uint64_t i = 0; i < v->elements; i++) {
        uint64_t pattern = element(d, vector_id, i);
        if (!is_finite_pattern(v->dtype, pattern)) {
            return refuse_element(d, rule, vector_id, i, "a factor is not finite");
        }
        float magnitude = widen(v->dtype, pattern & ~sign_bit(v->dtype));
        *greatest = magnitude > *greatest ? magnitude : *greatest;
    }
    return true;
}

/* Returns the greatest magnitude that a fingerprint can represent. */
static float greatest_magnitude(const decoder *d)
{
    const stream *s = &d->entry.streams[FINGERPRINT_STREAM];
    if (s->quantiser == TABLE) {
        return number_at(d, FP_CENTROIDS, s->centroids - 1);
    }
    return multiply((float)(uint32_t)(s->table.last / 2), s->step);
}

/* Checks the values of the vectors. Rounding is monotonic: if the greatest product is finite, all products are. */
static bool check_vectors(const decoder *d)
{
    float factor, row, column;
    if (!check_centroids(d, FP_CENTROIDS) || !check_factors(d, SCALE_FACTORS, R_SCL_004, &factor)) {
        return false;
    }
    if (d->entry.vectors[SCALE_FACTORS].elements > 0 && !is_finite(multiply(greatest_magnitude(d), factor))) {
        return refuse_element(d, R_SCL_006, SCALE_FACTORS, 0, "the greatest magnitude times a factor is not finite");
    }
    if (!check_centroids(d, IMP_CENTROIDS) || !check_factors(d, IMP_ROWS, R_IMP_004, &row) ||
        !check_factors(d, IMP_COLUMNS, R_IMP_004, &column)) {
        return false;
    }
    if (!is_finite(multiply(row, column))) {
        return refuse_element(d, R_IMP_005, IMP_ROWS, 0, "the greatest product of importance factors is not finite");
    }
    return true;
}

/* Reads and checks the vector chunk (chapter 15.3). */
static bool read_vector_chunk(decoder *d, uint64_t offset)
{
    const uint8_t *record = d->entry.vector_record;
    if (record == NULL) {
        return true;
    }
    const uint8_t *bytes = checked_bytes(d, record, offset);
    if (bytes == NULL) {
        return false;
    }
    uint64_t at = 0, ends[VECTOR_COUNT];
    for (size_t i = 0; i < VECTOR_COUNT; i++) {
        const vector *v = &d->entry.vectors[i];
        d->vectors[i] = bytes + (at < record_length(record) ? at : 0);
        ends[i] = at + (v->elements > 0 ? v->elements * (v->dtype->bits / 8) : 0);
        at = align(ends[i], 16);
    }
    if (align(at, 64) != record_length(record)) {
        return refuse(d->fault, R_VEC_001, offset, "the length of the vector chunk does not fit its vectors");
    }
    for (size_t i = 0; i < VECTOR_COUNT; i++) {
        uint64_t end = i + 1 < VECTOR_COUNT ? align(ends[i], 16) : record_length(record);
        uint64_t wrong = first_nonzero(bytes, ends[i], end);
        if (wrong != end) {
            return refuse(d->fault, R_VEC_002, offset + wrong, "padding of the vector chunk is not zero");
        }
    }
    return check_vectors(d);
}

/* -------------------------------------------------------------------------------------- decoding: segments */

/* Decodes the levels of a segment of a stream, and advances the positions in its planes. */
static bool read_levels(decoder *d, chunk *c, stream_id id, const segment *s)
{
    const stream_decoder *ready = &d->streams[id];
    const code_table *t = &ready->stream->table;
    const share *part = &s->shares[id];
    plane *prefix = &c->planes[id][PREFIX], *residual = &c->planes[id][RESIDUAL];
    uint64_t prefix_at = (uint64_t)(prefix->bits - c->bytes) + prefix->at / 8;
    if (t->classes == 1) {
        memset(d->classes, 0, part->levels * sizeof *d->classes);
    } else if (t->window > 0) {
        clause broken = read_window_classes(t, prefix->bits, prefix->at, prefix->at + part->prefix_bits, part->levels,
                                            part->code, d->classes);
        if (broken != CLAUSE_COUNT) {
            return refuse_chunk(d, c, broken, prefix_at, "the symbols of a segment with a window are not valid");
        }
    } else {
        size_t symbols = (part->levels + t->group - 1) / t->group;
        if (!look_up(ready->lookup + part->code * LOOKUP_SIZE, prefix->bits, prefix->at,
                     prefix->at + part->prefix_bits, symbols, d->classes)) {
            return refuse_chunk(d, c, R_PLN_003, prefix_at, "a segment's symbols do not end at the end of its bits");
        }
        if (t->group == 2) {
            split_pairs(d->classes, symbols);
            if (part->levels % 2 != 0 && d->classes[part->levels] != 0) {
                return refuse_chunk(d, c, R_PLN_002, prefix_at, "the class after a segment's last level is not 0");
            }
        }
    }
    if (residual_bits_of(ready, d->classes, part->levels, part->trim) != part->residual_bits) {
        return refuse_chunk(d, c, R_PLN_003, (uint64_t)(residual->bits - c->bytes) + residual->at / 8,
                            "a segment's residuals do not end at the end of its bits");
    }
    if (ready->least_extra == ready->greatest_extra && part->trim == 0) {
        read_even_residuals(ready, residual->bits, residual->at, d->classes, part->levels, d->levels);
    } else {
        read_residuals(ready, residual->bits, residual->at, d->classes, part->levels, part->trim, d->levels);
    }
    prefix->at += part->prefix_bits;
    residual->at += part->residual_bits;
    return true;
}

static bool refuse_mask(const decoder *d, const chunk *c, clause broken, const char *detail)
{
    return refuse_chunk(d, c, broken, (uint64_t)(c->planes[MASK_STREAM][PREFIX].bits - c->bytes), detail);
}

static bool mark_runs(const decoder *d, const chunk *c, const segment *s)
{
    memset(d->mask, (int)(1 - d->entry.polarity), s->positions);
    size_t next = 0;
    for (size_t i = 0; i < s->shares[MASK_STREAM].levels; i++) {
        if (d->levels[i] >= s->positions - next) {
            return refuse_mask(d, c, R_MSK_004, "a run ends outside its segment");
        }
        next += (size_t)d->levels[i];
        d->mask[next++] = (uint8_t)d->entry.polarity;
    }
    return true;
}

static bool mark_octets(const decoder *d, const chunk *c, const segment *s)
{
    size_t levels = s->shares[MASK_STREAM].levels;
    for (size_t i = 0; i < levels; i++) {
        for (size_t j = 0; j < 8; j++) {
            d->mask[8 * i + j] = (uint8_t)(d->levels[i] >> j & 1);
        }
    }
    if (first_nonzero(d->mask, s->positions, 8 * levels) != 8 * levels) {
        return refuse_mask(d, c, R_MSK_006, "a bit after the segment's last position is set");
    }
    return true;
}

/* Decodes the mask of a segment and the positions of its survivors (chapter 10). */
static bool read_mask_levels(decoder *d, chunk *c, const segment *s)
{
    if (!read_levels(d, c, MASK_STREAM, s)) {
        return false;
    }
    if (!(d->entry.octets ? mark_octets(d, c, s) : mark_runs(d, c, s))) {
        return false;
    }
    size_t count = 0;
    for (size_t p = 0; p < s->positions; p++) {
        d->positions[count] = (uint16_t)p; /* the next line keeps it only for a survivor */
        count += d->mask[p];
    }
    if (count != s->survivors) {
        return refuse_mask(d, c, R_MSK_005, "a mask does not have the number of survivors in the index");
    }
    return true;
}

/* Tracks ascending positions in runs of equal length: the run, and the offset within it. */
typedef struct ruler {
    uint64_t length;
    uint64_t run;
    uint64_t start; /* first position of the run */
} ruler;

static ruler ruler_at(uint64_t position, uint64_t length)
{
    ruler r = {length, position / length, position - position % length};
    return r;
}

static void move_to(ruler *r, uint64_t position)
{
    while (position - r->start >= r->length) {
        r->run++;
        r->start += r->length;
    }
}

static void multiply_factors(const decoder *d, const segment *s)
{
    ruler row = ruler_at(s->first, d->entry.columns);
    for (size_t p = 0; p < s->positions; p++) {
        uint64_t position = s->first + p;
        move_to(&row, position);
        d->importance[p] = multiply(number_at(d, IMP_ROWS, row.run), number_at(d, IMP_COLUMNS, position - row.start));
    }
}

/* Returns the importance that a level represents. */
static float importance_of(const decoder *d, uint64_t level)
{
    const stream *s = &d->entry.streams[IMPORTANCE_STREAM];
    switch (s->quantiser) {
    case EXACT: return widen(s->coded, level >> 1 | (level & 1) << (s->coded->bits - 1));
    case UNIFORM: return multiply((float)(uint32_t)level, s->step);
    default: return number_at(d, IMP_CENTROIDS, level);
    }
}

/* Computes the importance of each position of a segment (chapter 13). */
static bool read_importance_levels(decoder *d, chunk *c, const segment *s)
{
    if (d->entry.told.importance == SFP_FACTORS) {
        multiply_factors(d, s);
        return true;
    }
    if (!read_levels(d, c, IMPORTANCE_STREAM, s)) {
        return false;
    }
    bool everywhere = d->entry.told.importance == SFP_OVER_ALL;
    for (size_t p = 0; !everywhere && p < s->positions; p++) {
        d->importance[p] = 0;
    }
    for (size_t i = 0; i < s->shares[IMPORTANCE_STREAM].levels; i++) {
        d->importance[everywhere ? i : d->positions[i]] = importance_of(d, d->levels[i]);
    }
    return true;
}

/* Multiplies a finite number, given as its pattern in the tensor's dtype, by an importance. */
static uint64_t times_importance(const dtype *t, uint64_t pattern, float importance)
{
    if (t == &DTYPES[F64]) {
        return bits_of_double(double_of(pattern) * (double)importance);
    }
    return pattern_of(t, multiply(widen(t, pattern), importance));
}

/* Converts levels of the quantiser exact to patterns of the tensor's dtype, in place. */
static void restore_exact(const decoder *d, const segment *s)
{
    const dtype *own = d->entry.dtype, *coded = d->entry.streams[FINGERPRINT_STREAM].coded;
    unsigned top = coded->bits - 1;
    for (size_t i = 0; i < s->survivors; i++) {
        d->levels[i] = d->levels[i] >> 1 | (d->levels[i] & 1) << top;
    }
    for (size_t i = 0; coded != own && i < s->survivors; i++) {
        d->levels[i] = pattern_of(own, widen(coded, d->levels[i])); /* exact: the dtype is wider */
    }
    for (size_t i = 0; d->entry.told.multiplier && i < s->survivors; i++) {
        if (is_finite_pattern(own, d->levels[i])) {
            d->levels[i] = times_importance(own, d->levels[i], d->importance[d->positions[i]]);
        }
    }
}

/* Returns the number of consecutive positions that share a scale factor; for a factor per column, the period. */
static uint64_t scale_run(const entry *e)
{
    switch (e->scale.per) {
    case PER_TENSOR: return e->told.positions;
    case PER_GROUP: return e->scale.size;
    default: return e->columns;
    }
}

/* Converts levels of the quantisers uniform and table to patterns of the tensor's dtype, in place. */
static void restore_quantised(const decoder *d, const segment *s)
{
    const entry *e = &d->entry;
    const stream *source = &e->streams[FINGERPRINT_STREAM];
    ruler run = ruler_at(s->first, scale_run(e));
    for (size_t i = 0; i < s->survivors; i++) {
        uint64_t number = d->levels[i] >> 1;
        float x = source->quantiser == UNIFORM ? multiply((float)(uint32_t)number, source->step)
                                               : number_at(d, FP_CENTROIDS, number);
        x = (d->levels[i] & 1) != 0 ? -x : x;
        if (e->scale.present) {
            uint64_t position = s->first + d->positions[i];
            move_to(&run, position);
            uint64_t factor = e->scale.per == PER_COLUMN ? position - run.start : run.run;
            x = multiply(x, number_at(d, SCALE_FACTORS, factor));
        }
        if (e->told.multiplier) { /* x is finite, by R-QNT-006, R-QNT-005 and R-SCL-006 */
            x = multiply(x, d->importance[d->positions[i]]);
        }
        d->levels[i] = pattern_of(e->dtype, x);
    }
}

/* Stores the survivors' patterns at their positions. */
static void store_values(const decoder *d, const segment *s)
{
    size_t size = d->entry.told.element_bytes;
    uint8_t *out = d->out->values + s->first * size;
    const uint16_t *position = d->positions;
    const uint64_t *pattern = d->levels;
    switch (size) {
    case 1:
        for (size_t i = 0; i < s->survivors; i++) {
            out[position[i]] = (uint8_t)pattern[i];
        }
        break;
    case 2:
        for (size_t i = 0; i < s->survivors; i++) {
            store16(out + (size_t)2 * position[i], (uint32_t)pattern[i]);
        }
        break;
    case 4:
        for (size_t i = 0; i < s->survivors; i++) {
            store32(out + (size_t)4 * position[i], (uint32_t)pattern[i]);
        }
        break;
    default:
        for (size_t i = 0; i < s->survivors; i++) {
            store64(out + (size_t)8 * position[i], pattern[i]);
        }
    }
}

static void store_importance(const decoder *d, const segment *s)
{
    uint8_t *out = d->out->importance + 4 * s->first;
    for (size_t p = 0; p < s->positions; p++) {
        store32(out + 4 * p, bits_of(d->importance[p]));
    }
}

static void store(uint8_t *to, uint64_t pattern, size_t size)
{
    for (size_t k = 0; k < size; k++) {
        to[k] = (uint8_t)(pattern >> 8 * k);
    }
}

enum { MAX_PART_NUMBER = 0x7ffffffe };

/* Stores the elements of the part `importance` of a segment, whose levels are decoded. */
static void store_part_importance(const decoder *d, const segment *s)
{
    parts *out = d->parts;
    const stream *source = &d->entry.streams[IMPORTANCE_STREAM];
    bool everywhere = d->entry.told.importance == SFP_OVER_ALL;
    size_t size = out->dtypes[IMPORTANCE_PART]->bits / 8;
    for (size_t i = 0; i < s->shares[IMPORTANCE_STREAM].levels; i++) {
        uint64_t level = d->levels[i], p = s->first + (everywhere ? i : d->positions[i]);
        bool exact = source->quantiser == EXACT;
        out->too_great = out->too_great || (!exact && level > MAX_PART_NUMBER);
        uint64_t pattern = exact ? level >> 1 | (level & 1) << (source->coded->bits - 1) : level + 1;
        store(out->data[IMPORTANCE_PART] + p * size, pattern, size);
    }
}

/* Stores the elements of the parts `weights` and `mask` of a segment, whose levels are decoded. */
static void store_part_weights(const decoder *d, const segment *s)
{
    parts *out = d->parts;
    const stream *source = &d->entry.streams[FINGERPRINT_STREAM];
    const dtype *own = d->entry.dtype;
    size_t size = out->dtypes[WEIGHTS]->bits / 8;
    for (size_t i = 0; i < s->survivors; i++) {
        uint64_t level = d->levels[i], pattern = (level >> 1) + 1 + ((level & 1) << 31);
        if (source->quantiser == EXACT) {
            pattern = level >> 1 | (level & 1) << (source->coded->bits - 1);
            pattern = source->coded != own ? pattern_of(own, widen(source->coded, pattern)) : pattern;
        } else {
            out->too_great = out->too_great || level >> 1 > MAX_PART_NUMBER;
        }
        store(out->data[WEIGHTS] + (s->first + d->positions[i]) * size, pattern, size);
    }
    memcpy(out->data[MASK_PART] + s->first, d->mask, s->positions);
}

static bool decode_segment(decoder *d, chunk *c, const segment *s)
{
    if (d->wants_mask && !read_mask_levels(d, c, s)) {
        return false;
    }
    if (d->wants_importance && !read_importance_levels(d, c, s)) {
        return false;
    }
    if (d->parts != NULL && d->parts->data[IMPORTANCE_PART] != NULL) {
        store_part_importance(d, s);
    }
    if (d->wants_fingerprints && !read_levels(d, c, FINGERPRINT_STREAM, s)) {
        return false;
    }
    if (d->parts != NULL) {
        store_part_weights(d, s);
    }
    if (d->out == NULL) {
        return true;
    }
    if (d->out->mask != NULL) {
        memcpy(d->out->mask + s->first, d->mask, s->positions);
    }
    if (d->out->importance != NULL) {
        store_importance(d, s);
    }
    if (d->out->values != NULL) {
        if (d->entry.streams[FINGERPRINT_STREAM].quantiser == EXACT) {
            restore_exact(d, s);
        } else {
            restore_quantised(d, s);
        }
        store_values(d, s);
    }
    return true;
}

/* Decodes chunk k of a tensor with coding `fingerprint`; `offset` is that of the chunk in the file. */
static bool decode_chunk(decoder *d, uint64_t k, const uint8_t *bytes, uint64_t offset)
{
    const entry *e = &d->entry;
    chunk c;
    memset(&c, 0, sizeof c);
    c.bytes = bytes;
    c.length = record_length(e->chunk_records + k * RECORD_BYTES);
    c.offset = offset;
    c.first = k * e->chunk;
    c.segments = at_most(e->segments - c.first, e->chunk);
    uint64_t planes_at = 0;
    if (!read_index(d, &c, &planes_at) || !measure_planes(d, &c) || !place_planes(d, &c, planes_at)) {
        return false;
    }
    for (uint64_t i = 0; i < c.segments; i++) {
        segment s;
        if (!read_segment(d, &c, i, &s) || !decode_segment(d, &c, &s)) {
            return false;
        }
    }
    return true;
}

/* Copies chunk k of a tensor with coding `raw` (chapter 16). */
static bool copy_chunk(decoder *d, uint64_t k, const uint8_t *bytes, uint64_t offset)
{
    const entry *e = &d->entry;
    uint64_t length = record_length(e->chunk_records + k * RECORD_BYTES);
    uint64_t first = k * e->chunk * e->segment;
    uint64_t used = at_most(e->told.positions - first, e->chunk * e->segment) * e->told.element_bytes;
    if (length != align(used, 64)) {
        return refuse(d->fault, R_RAW_002, offset, "the length of a chunk does not fit its elements");
    }
    uint64_t wrong = first_nonzero(bytes, used, length);
    if (wrong != length) {
        return refuse(d->fault, R_RAW_003, offset + wrong, "bytes after the last element are not zero");
    }
    for (uint64_t i = 0; e->dtype == &DTYPES[BOOL] && i < used; i++) {
        if (bytes[i] > 1) {
            return refuse(d->fault, R_RAW_004, offset + i, "a BOOL is neither 0 nor 1");
        }
    }
    if (d->out != NULL && d->out->values != NULL) {
        memcpy(d->out->values + first * e->told.element_bytes, bytes, (size_t)used);
    }
    return true;
}

/* Decodes all chunks of a tensor, of which the first is at `offset` in the file. */
static bool decode_chunks(decoder *d, uint64_t offset)
{
    const entry *e = &d->entry;
    if (!read_vector_chunk(d, offset)) {
        return false;
    }
    offset += e->vector_record != NULL ? record_length(e->vector_record) : 0;
    for (uint64_t k = 0; k < e->chunks; k++) {
        const uint8_t *record = e->chunk_records + k * RECORD_BYTES;
        const uint8_t *bytes = checked_bytes(d, record, offset);
        if (bytes == NULL) {
            return false;
        }
        if (!(e->told.fingerprint ? decode_chunk(d, k, bytes, offset) : copy_chunk(d, k, bytes, offset))) {
            return false;
        }
        offset += record_length(record);
    }
    return true;
}

/* --------------------------------------------------------------------------------------- decoding: tensors */

/* Checks a tensor against the limits before memory is allocated for it (chapter 19). */
static bool check_size(const sfp_file *file, const entry *e, uint64_t offset, sfp_fault *fault)
{
    uint64_t bytes = e->told.positions * e->told.element_bytes; /* at most 2^52 */
    if (bytes > file->limits.tensor_bytes) {
        return refuse(fault, R_LIM_002, offset, "the tensor exceeds the limit of tensor bytes");
    }
    uint64_t expansion = file->limits.expansion;
    if (bytes > UINT64_C(1) << 28 &&
        (expansion == 0 || (bytes - 1) / expansion >= e->told.stored_bytes)) { /* bytes > expansion * stored */
        return refuse(fault, R_LIM_002, offset, "the expansion is above its limit");
    }
    return true;
}

/* Prepares the streams and the buffers for a segment. */
static bool prepare(decoder *d)
{
    const sfp_allocator *a = &d->file->allocator;
    size_t s = (size_t)d->entry.segment;
    for (size_t id = 0; id < STREAM_COUNT; id++) {
        const stream *source = &d->entry.streams[id];
        if (source->present && !prepare_stream(d->file, source, &d->streams[id])) {
            return false;
        }
    }
    size_t each = sizeof *d->levels + sizeof *d->importance + sizeof *d->classes + sizeof *d->positions + 1;
    d->room = allocate(a, s + 1, each);
    if (d->room == NULL) {
        return false;
    }
    d->levels = d->room;
    d->importance = (float *)(void *)(d->levels + s);
    d->classes = (uint16_t *)(void *)(d->importance + s);
    d->positions = d->classes + s + 1;
    d->mask = (uint8_t *)(d->positions + s);
    for (size_t p = 0; p < s; p++) { /* without a mask, this stays as it is */
        d->positions[p] = (uint16_t)p;
        d->mask[p] = 1;
    }
    return true;
}

static void clean_up(decoder *d)
{
    const sfp_allocator *a = &d->file->allocator;
    for (size_t id = 0; id < STREAM_COUNT; id++) {
        release(a, d->streams[id].first);
        release(a, d->streams[id].lookup);
    }
    release(a, d->room);
}

/* Decodes into d->out; only checks the tensor if d->out is NULL. */
static sfp_status run(decoder *d, uint64_t offset)
{
    bool ready = prepare(d);
    bool done = ready && decode_chunks(d, offset);
    clean_up(d);
    if (ready && !done) {
        d->fault->tensor = d->entry.told.name;
    }
    return done ? SFP_OK : ready ? SFP_REFUSED : SFP_NO_MEMORY;
}

/* Reads a tensor's entry, and checks that the limits allow decoding it. */
static sfp_status begin(const sfp_file *file, size_t number, decoder *d, sfp_fault *fault)
{
    directory source = directory_of(file, fault);
    memset(d, 0, sizeof *d);
    d->file = file;
    d->fault = fault;
    if (number >= file->tensor_count || !read_entry(&source, file->tensors[number].entry, &d->entry)) {
        return SFP_MISUSE;
    }
    if (!check_size(file, &d->entry, source.offset + file->tensors[number].entry, fault)) {
        fault->tensor = d->entry.told.name;
        return SFP_REFUSED;
    }
    return SFP_OK;
}

/* Allocates memory for the requested results, filled with zeros, the value of pruned positions. Returns false on
 * failure. */
static bool allocate_results(const sfp_file *file, const entry *e, unsigned wanted, sfp_decoded *out)
{
    uint64_t n = e->told.positions;
    bool importance = (wanted & SFP_IMPORTANCE) != 0 && e->told.importance != SFP_NO_IMPORTANCE;
    out->values = (wanted & SFP_VALUES) != 0 ? allocate(&file->allocator, n, e->told.element_bytes) : NULL;
    out->mask = (wanted & SFP_MASK) != 0 ? allocate(&file->allocator, n, 1) : NULL;
    out->importance = importance ? allocate(&file->allocator, n, 4) : NULL;
    if (((wanted & SFP_VALUES) != 0 && out->values == NULL) || ((wanted & SFP_MASK) != 0 && out->mask == NULL) ||
        (importance && out->importance == NULL)) {
        return false;
    }
    if (out->values != NULL && e->told.pruned) {
        memset(out->values, 0, (size_t)n * e->told.element_bytes);
    }
    if (out->mask != NULL && !e->told.fingerprint) {
        memset(out->mask, 1, (size_t)n);
    }
    return true;
}

sfp_status sfp_decode(const sfp_file *file, size_t number, unsigned wanted, sfp_decoded *out, sfp_fault *fault)
{
    decoder d;
    memset(out, 0, sizeof *out);
    sfp_status status = begin(file, number, &d, fault);
    if (status != SFP_OK) {
        return status;
    }
    if (!allocate_results(file, &d.entry, wanted, out)) {
        sfp_release(file, out);
        return SFP_NO_MEMORY;
    }
    d.out = out;
    d.wants_mask = d.entry.told.pruned;
    d.wants_fingerprints = out->values != NULL;
    d.wants_importance = out->importance != NULL || (out->values != NULL && d.entry.told.multiplier);
    status = run(&d, file->tensors[number].chunks);
    if (status != SFP_OK) {
        sfp_release(file, out);
    }
    return status;
}

sfp_status sfp_check(const sfp_file *file, size_t number, sfp_fault *fault)
{
    decoder d;
    sfp_status status = begin(file, number, &d, fault);
    if (status != SFP_OK) {
        return status;
    }
    d.wants_mask = d.entry.told.pruned;
    d.wants_fingerprints = true;
    d.wants_importance = d.entry.told.importance != SFP_NO_IMPORTANCE;
    return run(&d, file->tensors[number].chunks);
}

void sfp_release(const sfp_file *file, sfp_decoded *decoded)
{
    release(&file->allocator, decoded->values);
    release(&file->allocator, decoded->mask);
    release(&file->allocator, decoded->importance);
    memset(decoded, 0, sizeof *decoded);
}

/* -------------------------------------------------------------------------------------- deltas with a base */

bool sfp_is_delta(const sfp_file *file)
{
    return file->delta.present;
}

/* Sets a fault about a tensor. Returns SFP_REFUSED. */
static sfp_status refuse_tensor(sfp_fault *fault, clause broken, sfp_span tensor, const char *detail)
{
    refuse(fault, broken, 0, detail);
    fault->tensor = tensor;
    return SFP_REFUSED;
}

/* Returns the number of an element of a tensor of numbers (28.2). */
static uint64_t number_of_pattern(uint64_t pattern, unsigned bits)
{
    uint64_t sign = pattern >> (bits - 1);
    uint64_t doubled = pattern << 1;
    return (bits < 64 ? doubled & ones(bits) : doubled) | sign;
}

/* A decoded tensor of numbers. */
typedef struct numbers {
    sfp_decoded decoded;
    uint64_t count, next;
    unsigned bits;
    sfp_span name;
} numbers;

static uint64_t number_at_index(const numbers *n, uint64_t i)
{
    size_t size = n->bits / 8;
    return number_of_pattern(load(n->decoded.values + i * size, size), n->bits);
}

static sfp_status decode_numbers(const sfp_file *file, size_t number, numbers *out, sfp_fault *fault)
{
    sfp_tensor told;
    sfp_status status = sfp_describe(file, number, &told);
    if (status == SFP_OK) {
        out->count = told.positions;
        out->next = 0;
        out->bits = (unsigned)told.element_bytes * 8;
        out->name = told.name;
        status = sfp_decode(file, number, SFP_VALUES, &out->decoded, fault);
    }
    return status;
}

/* A bucket of a block: its levels left, the index of the next one, the elements before it, and its next gap. */
typedef struct bucket {
    uint64_t left, level, wait, gap;
    bool dense;
} bucket;

/* Returns `order` of 28.2, which is its own inverse. */
static uint64_t ordered(uint64_t pattern, unsigned w, unsigned e)
{
    return e == 0 || pattern >> (w - 1) == 0 ? pattern : pattern ^ ones(w - 1);
}

/* Opens the buckets of a block; `row` is the index of its first count. */
static void open_buckets(const numbers stored[3], uint64_t row, uint64_t keys, uint64_t *gap, uint64_t *level,
                         bucket *buckets)
{
    for (uint64_t k = 0; k < keys; k++) {
        uint64_t count = number_at_index(&stored[0], row + k);
        bucket *b = &buckets[k];
        b->left = count / 2;
        b->dense = count % 2 != 0;
        b->level = *level;
        b->gap = *gap;
        *level += b->left;
        *gap += b->dense ? 0 : b->left;
        b->wait = !b->dense && b->left > 0 ? number_at_index(&stored[1], b->gap) : 0;
    }
}

/* Returns the element of the result for an element of the base; clears *fits if a dense bucket has no level left. */
static uint64_t changed_element(const numbers stored[3], bucket *b, uint64_t old, unsigned w, unsigned e, bool *fits)
{
    if (b->left == 0) {
        *fits = *fits && !b->dense;
        return old;
    }
    if (!b->dense && b->wait > 0) {
        b->wait--;
        return old;
    }
    uint64_t level = number_at_index(&stored[2], b->level++);
    uint64_t all = w < 64 ? ones(w) : UINT64_MAX;
    uint64_t difference = level >> 1 ^ (level % 2 != 0 ? all : 0);
    b->left--;
    if (!b->dense) {
        b->gap++;
        b->wait = b->left > 0 ? number_at_index(&stored[1], b->gap) : 0;
    }
    return ordered((ordered(old, w, e) + difference) & all, w, e);
}

/* Checks that gaps and differences have as many numbers as the counts need (R-DLT-010). */
static sfp_status check_counts(const numbers stored[3], sfp_fault *fault)
{
    uint64_t levels = 0, gaps = 0;
    for (uint64_t i = 0; i < stored[0].count; i++) { /* below 2^48 counts of less than 2^31 */
        uint64_t count = number_at_index(&stored[0], i);
        levels = levels <= UINT64_MAX - count ? levels + count / 2 : UINT64_MAX;
        gaps += count % 2 != 0 ? 0 : count / 2;
    }
    if (levels != stored[2].count) {
        return refuse_tensor(fault, R_DLT_010, stored[2].name, "the counts need another number of differences");
    }
    if (gaps != stored[1].count) {
        return refuse_tensor(fault, R_DLT_010, stored[1].name, "the counts need another number of gaps");
    }
    return SFP_OK;
}

/* The changed tensors of a dtype in the base: those from `next` on are not in a pool yet. */
typedef struct walk {
    const delta *delta;
    sfp_result_tensor *tensors; /* those of the delta's list */
    const dtype *dtype;
    size_t next;
} walk;

/* Changes the elements of a pool in place (28.3). */
static sfp_status change_pool(walk *w, uint64_t tensors, const numbers stored[3], bucket *buckets, sfp_fault *fault)
{
    unsigned bits = element_bits(w->dtype), e = exponent_bits(w->dtype);
    size_t size = bits / 8;
    uint64_t keys = UINT64_C(1) << e, in_block = 0, row = 0, gap = 0, level = 0;
    bool fits = true;
    for (uint64_t t = 0; t < tensors; t++) {
        size_t member = next_member(w->delta, w->dtype, &w->next);
        uint8_t *values = w->tensors[member].values;
        uint64_t elements = w->delta->tensors[member].positions * (w->dtype->bits / bits);
        for (uint64_t i = 0; i < elements; i++) {
            if (in_block == 0) {
                open_buckets(stored, row, keys, &gap, &level, buckets);
                row += keys;
                in_block = w->delta->block;
            }
            uint64_t old = load(values + i * size, size);
            uint64_t key = e == 0 ? 0 : ((old - 1) & ones(bits - 1)) >> (bits - 1 - e);
            uint64_t new = changed_element(stored, &buckets[key], old, bits, e, &fits);
            for (size_t k = 0; k < size; k++) {
                values[i * size + k] = (uint8_t)(new >> 8 * k);
            }
            bool last = t + 1 == tensors && i + 1 == elements;
            if (--in_block == 0 || last) {
                for (uint64_t k = 0; k < keys; k++) {
                    fits = fits && buckets[k].left == 0;
                }
            }
        }
    }
    return fits ? SFP_OK : refuse_tensor(fault, R_DLT_011, stored[2].name, "the levels do not fit the base");
}

static sfp_status apply_pool(const sfp_file *file, const delta_pool *pool, walk *w, sfp_fault *fault)
{
    numbers stored[3];
    memset(stored, 0, sizeof stored);
    sfp_status status = SFP_OK;
    for (size_t i = 0; i < 3 && status == SFP_OK; i++) {
        status = decode_numbers(file, pool->stored[i], &stored[i], fault);
    }
    status = status == SFP_OK ? check_counts(stored, fault) : status;
    bucket *buckets = allocate(&file->allocator, UINT64_C(1) << exponent_bits(pool->dtype), sizeof *buckets);
    if (status == SFP_OK) {
        status = buckets == NULL ? SFP_NO_MEMORY : change_pool(w, pool->tensors, stored, buckets, fault);
    }
    for (size_t i = 0; i < 3; i++) {
        sfp_release(file, &stored[i].decoded);
    }
    release(&file->allocator, buckets);
    return status;
}

static sfp_status apply_pools(const sfp_file *file, sfp_result_tensor *tensors, sfp_fault *fault)
{
    size_t next[DTYPE_COUNT] = {0};
    for (size_t i = 0; i < file->delta.pool_count; i++) {
        const delta_pool *pool = &file->delta.pools[i];
        walk w = {&file->delta, tensors, pool->dtype, next[pool->dtype - DTYPES]};
        sfp_status status = apply_pool(file, pool, &w, fault);
        if (status != SFP_OK) {
            return status;
        }
        next[pool->dtype - DTYPES] = w.next;
    }
    return SFP_OK;
}

static void release_parts(const sfp_allocator *a, parts *p)
{
    for (size_t part = 0; part < PART_COUNT; part++) {
        release(a, p->data[part]);
    }
    memset(p, 0, sizeof *p);
}

/* Allocates the parts of a tensor, filled with zeros. Returns false on failure. */
static bool allocate_parts(const sfp_allocator *a, entry *e, parts *out)
{
    memset(out, 0, sizeof *out);
    for (size_t part = 0; part < PART_COUNT; part++) {
        out->dtypes[part] = part == MASK_PART ? &DTYPES[BOOL] : part_dtype(e, part);
        out->elements[part] = part == VECTORS_PART ? steps_of(e) + list_vectors(e) : e->told.positions;
        if (out->dtypes[part] == NULL) {
            continue;
        }
        size_t size = out->dtypes[part]->bits / 8;
        out->data[part] = allocate(a, out->elements[part], size);
        if (out->data[part] == NULL) {
            release_parts(a, out);
            return false;
        }
        memset(out->data[part], 0, (size_t)out->elements[part] * size);
    }
    return true;
}

/* Stores the steps and the vectors of a decoded tensor, widened to F32. */
static void store_part_vectors(const decoder *d, parts *out)
{
    uint8_t *to = out->data[VECTORS_PART];
    for (size_t id = FINGERPRINT_STREAM; id <= IMPORTANCE_STREAM; id++) {
        const stream *s = &d->entry.streams[id];
        if (s->present && s->quantiser == UNIFORM) {
            store(to, bits_of(s->step), 4);
            to += 4;
        }
    }
    for (size_t i = 0; i < VECTOR_COUNT; i++) {
        for (uint64_t k = 0; k < d->entry.vectors[i].elements; k++, to += 4) {
            store(to, bits_of(number_at(d, i, k)), 4);
        }
    }
}

/* Decodes a tensor into its parts (28.4). */
static sfp_status decode_parts(const sfp_file *file, size_t number, parts *out, sfp_fault *fault)
{
    decoder d;
    sfp_decoded whole;
    const sfp_allocator *a = &file->allocator;
    memset(out, 0, sizeof *out);
    sfp_status status = begin(file, number, &d, fault);
    if (status == SFP_OK && !d.entry.told.fingerprint) {
        status = sfp_decode(file, number, SFP_VALUES, &whole, fault);
        out->data[WEIGHTS] = whole.values;
        out->elements[WEIGHTS] = d.entry.told.positions;
        out->dtypes[WEIGHTS] = d.entry.dtype;
        return status;
    }
    if (status != SFP_OK) {
        return status;
    }
    if (!allocate_parts(a, &d.entry, out)) {
        return SFP_NO_MEMORY;
    }
    d.parts = out;
    d.wants_mask = d.entry.told.pruned;
    d.wants_fingerprints = true;
    d.wants_importance = d.entry.streams[IMPORTANCE_STREAM].present;
    status = run(&d, file->tensors[number].chunks);
    if (status != SFP_OK) {
        release_parts(a, out);
        return status;
    }
    if (out->data[VECTORS_PART] != NULL) {
        store_part_vectors(&d, out);
    }
    size_t size = out->dtypes[WEIGHTS]->bits / 8;
    bool zeros = false;
    for (uint64_t p = 0; p < d.entry.told.positions; p++) {
        zeros = zeros || (out->data[MASK_PART][p] != 0 && load(out->data[WEIGHTS] + p * size, size) == 0);
    }
    if (!zeros || !d.entry.told.pruned) {
        release(a, out->data[MASK_PART]);
        out->data[MASK_PART] = NULL;
    }
    return SFP_OK;
}

/* What taking the parts of a base needs. */
typedef struct base_parts {
    const sfp_file *file, *base;
    const numbered_name *names, *listed; /* sorted: those of the base, those of the list */
    uint8_t *room;                       /* for the name of a part */
    uint8_t *taken;                      /* for each tensor of the list, whether it is a part of the base */
} base_parts;

/* Checks a part of the base, and keeps it if it is that of an unchanged or changed part (R-DLT-009). */
static sfp_status take_part(const base_parts *b, const sfp_tensor *told, size_t number, parts *own, size_t part,
                            sfp_result_tensor *tensors, sfp_fault *fault)
{
    const delta_tensor *t = &b->file->delta.tensors[number];
    directory d = directory_of(b->file, fault);
    sfp_tensor shape = *told;
    if (part == VECTORS_PART) {
        shape.rank = 1;
        shape.shape[0] = own->elements[part];
    }
    size_t size = own->dtypes[part]->bits / 8;
    if (t->kind != REPLACED && (t->dtype != own->dtypes[part] || !has_shape(&d, t, &shape))) {
        return refuse_tensor(fault, R_DLT_009, t->name, "the base has the part with another dtype or shape");
    }
    if (crc32(&b->file->crc, own->data[part], own->elements[part] * size) != t->base) {
        return refuse_tensor(fault, R_DLT_009, t->name, "the part of the base has another checksum");
    }
    b->taken[number] = 1;
    if (t->kind == UNCHANGED || t->kind == CHANGED) {
        tensors[number].values = own->data[part];
        own->data[part] = NULL;
    }
    return SFP_OK;
}

/* Takes the parts of a tensor of the base, which the delta lists as parts. */
static sfp_status take_parts(const base_parts *b, size_t i, size_t number, sfp_result_tensor *tensors,
                             sfp_fault *fault)
{
    const delta *o = &b->file->delta;
    const delta_tensor *t = &o->tensors[i];
    sfp_tensor told;
    parts own;
    if (number == SIZE_MAX || sfp_describe(b->base, number, &told) != SFP_OK) {
        return refuse_tensor(fault, R_DLT_009, t->name, "the base has no such tensor");
    }
    sfp_status status = decode_parts(b->base, number, &own, fault);
    if (status == SFP_OK && own.too_great) {
        status = refuse_tensor(fault, R_DLT_009, t->name, "the tensor of the base has no parts");
    }
    for (size_t part = 0; part < PART_COUNT && status == SFP_OK; part++) {
        sfp_span name = name_of_part(o, t, part, b->room);
        size_t at = number_of_name(b->listed, o->count, name);
        bool listed = at != SIZE_MAX && o->tensors[at].kind != ADDED;
        bool taken = part != WEIGHTS && number_of_name(b->names, b->base->tensor_count, name) != SIZE_MAX;
        if (listed != (own.data[part] != NULL) || taken) {
            status = refuse_tensor(fault, R_DLT_009, at != SIZE_MAX ? o->tensors[at].name : t->name,
                                   "the base has other parts than the delta lists");
        } else if (listed) {
            status = take_part(b, &told, at, &own, part, tensors, fault);
        }
    }
    release_parts(&b->base->allocator, &own);
    return status;
}

/* Decodes a tensor of the base and checks it (R-DLT-009). Keeps its values if they are those of an unchanged or
 * changed tensor. */
static sfp_status take_base(const sfp_file *file, const delta_tensor *t, const sfp_file *base, size_t number,
                            sfp_result_tensor *out, sfp_fault *fault)
{
    directory d = directory_of(file, fault);
    sfp_tensor told;
    sfp_decoded got;
    if (number == SIZE_MAX || sfp_describe(base, number, &told) != SFP_OK) {
        return refuse_tensor(fault, R_DLT_009, t->name, "the base has no such tensor");
    }
    bool same = strcmp(told.dtype, t->dtype->name) == 0 && has_shape(&d, t, &told);
    if (t->kind != REPLACED && !same) {
        return refuse_tensor(fault, R_DLT_009, t->name, "the base has the tensor with another dtype or shape");
    }
    sfp_status status = sfp_decode(base, number, SFP_VALUES, &got, fault);
    if (status != SFP_OK) {
        return status;
    }
    if (crc32(&file->crc, got.values, told.positions * told.element_bytes) != t->base) {
        sfp_release(base, &got);
        return refuse_tensor(fault, R_DLT_009, t->name, "the tensor of the base has another checksum");
    }
    if (t->kind == UNCHANGED || t->kind == CHANGED) {
        size_t bytes = (size_t)(told.positions * told.element_bytes);
        out->values = allocate(&file->allocator, bytes, 1);
        if (out->values != NULL) {
            memcpy(out->values, got.values, bytes);
        }
    }
    bool kept = out->values != NULL || (t->kind != UNCHANGED && t->kind != CHANGED);
    sfp_release(base, &got);
    return kept ? SFP_OK : SFP_NO_MEMORY;
}

/* Describes a tensor of the list. */
static void describe_listed(const directory *d, const delta_tensor *t, sfp_result_tensor *out)
{
    size_t at = t->shape.content;
    value size;
    out->name = t->name;
    out->dtype = t->dtype->name;
    out->rank = (size_t)t->shape.number;
    for (size_t i = 0; i < out->rank && next_value(d, &at, &size); i++) {
        out->shape[i] = size.number;
    }
    out->bytes = t->positions * (t->dtype->bits / 8);
}

/* Takes all tensors of the base, then all tensors that the delta stores whole. */
static sfp_status take_tensors(const base_parts *b, sfp_result_tensor *tensors, sfp_fault *fault)
{
    const sfp_file *file = b->file, *base = b->base;
    const numbered_name *names = b->names;
    const delta *o = &file->delta;
    directory d = directory_of(file, fault);
    size_t found = 0;
    sfp_status status = SFP_OK;
    for (size_t i = 0; i < o->count; i++) {
        describe_listed(&d, &o->tensors[i], &tensors[i]);
    }
    for (size_t i = 0; i < o->count && status == SFP_OK; i++) {
        if (o->tensors[i].in_parts) {
            found++;
            size_t number = number_of_name(names, base->tensor_count, o->tensors[i].name);
            status = take_parts(b, i, number, tensors, fault);
        }
    }
    for (size_t i = 0; i < o->count && status == SFP_OK; i++) {
        const delta_tensor *t = &o->tensors[i];
        size_t number = number_of_name(names, base->tensor_count, t->name);
        if (b->taken[i] != 0) {
            continue;
        }
        if (t->kind != ADDED) {
            found++;
            status = take_base(file, t, base, number, &tensors[i], fault);
        } else if (number != SIZE_MAX) {
            status = refuse_tensor(fault, R_DLT_009, t->name, "the base has a tensor that the delta adds");
        }
    }
    for (size_t i = 0; i < base->tensor_count && status == SFP_OK && found != base->tensor_count; i++) {
        bool listed = false;
        for (size_t k = 0; k < o->count; k++) {
            listed = listed || compare_spans(o->tensors[k].name, names[i].name) == 0;
        }
        if (!listed) {
            status = refuse_tensor(fault, R_DLT_009, names[i].name, "the base has a tensor that the delta lacks");
        }
    }
    for (size_t i = 0; i < o->count && status == SFP_OK; i++) {
        if (o->tensors[i].kind == REPLACED || o->tensors[i].kind == ADDED) {
            sfp_decoded got;
            sfp_tensor told;
            sfp_describe(file, o->tensors[i].stored, &told);
            unsigned wanted = SFP_VALUES | SFP_IMPORTANCE | (told.pruned ? SFP_MASK : 0);
            status = sfp_decode(file, o->tensors[i].stored, wanted, &got, fault);
            tensors[i].values = got.values;
            tensors[i].mask = got.mask;
            tensors[i].importance = got.importance;
        }
    }
    return status;
}

static uint64_t part_element(const sfp_result_tensor *t, const dtype *type, uint64_t p)
{
    return load(t->values + p * (type->bits / 8), type->bits / 8);
}

/* A tensor that is made from its parts. */
typedef struct assembly {
    decoder d;
    const sfp_result_tensor *parts[PART_COUNT]; /* NULL for one that the tensor does not have */
    uint64_t number;                            /* its number of positions */
} assembly;

static bool survives(const assembly *m, uint64_t p)
{
    if (!m->d.entry.told.pruned) {
        return true;
    }
    if (m->parts[MASK_PART] != NULL) {
        return m->parts[MASK_PART]->values[p] != 0;
    }
    const dtype *type = m->d.entry.streams[FINGERPRINT_STREAM].quantiser == EXACT ? m->d.entry.dtype : &DTYPES[F32];
    return part_element(m->parts[WEIGHTS], type, p) != 0;
}

/* Returns the level of a survivor. */
static uint64_t assembled_level(const assembly *m, uint64_t p)
{
    const entry *e = &m->d.entry;
    if (e->streams[FINGERPRINT_STREAM].quantiser == EXACT) {
        return number_of_pattern(part_element(m->parts[WEIGHTS], e->dtype, p), e->dtype->bits);
    }
    uint64_t pattern = part_element(m->parts[WEIGHTS], &DTYPES[F32], p);
    return 2 * ((pattern & 0x7fffffff) - 1) + (pattern >> 31);
}

/* Returns whether a position has an importance of its own. */
static bool has_importance(const assembly *m, uint64_t p)
{
    return m->parts[IMPORTANCE_PART] != NULL && (m->d.entry.told.importance == SFP_OVER_ALL || survives(m, p));
}

static uint64_t assembled_importance(const assembly *m, uint64_t p)
{
    const stream *s = &m->d.entry.streams[IMPORTANCE_STREAM];
    if (s->quantiser == EXACT) {
        return number_of_pattern(part_element(m->parts[IMPORTANCE_PART], s->coded, p), s->coded->bits);
    }
    return part_element(m->parts[IMPORTANCE_PART], &DTYPES[F32], p) - 1;
}

/* Checks the elements of the parts `weights`, `mask` and `importance`, and sets the greatest levels. */
static bool check_elements(assembly *m)
{
    entry *e = &m->d.entry;
    stream *own = &e->streams[FINGERPRINT_STREAM], *importance = &e->streams[IMPORTANCE_STREAM];
    const dtype *type = own->quantiser == EXACT ? e->dtype : &DTYPES[F32];
    const dtype *marks = importance->quantiser == EXACT ? importance->coded : &DTYPES[F32];
    bool zeros = false;
    for (uint64_t p = 0; p < m->number; p++) {
        uint64_t pattern = part_element(m->parts[WEIGHTS], type, p);
        bool alive = survives(m, p);
        zeros = zeros || (alive && pattern == 0);
        if ((!alive && pattern != 0) || (alive && own->quantiser != EXACT && (pattern & 0x7fffffff) == 0)) {
            return false;
        }
        uint64_t level = alive ? assembled_level(m, p) : 0;
        own->table.last = level > own->table.last ? level : own->table.last;
        if (m->parts[IMPORTANCE_PART] == NULL) {
            continue;
        }
        pattern = part_element(m->parts[IMPORTANCE_PART], marks, p);
        if (!has_importance(m, p)) {
            if (pattern != 0) {
                return false;
            }
            continue;
        }
        if (importance->quantiser != EXACT && (pattern == 0 || pattern > 0x7fffffff)) {
            return false;
        }
        level = assembled_importance(m, p);
        importance->table.last = level > importance->table.last ? level : importance->table.last;
    }
    return m->parts[MASK_PART] == NULL || zeros;
}

/* Checks the steps, and that the levels are below the bounds of their quantisers. */
static bool check_quantisers(const entry *e)
{
    for (size_t id = FINGERPRINT_STREAM; id <= IMPORTANCE_STREAM; id++) {
        const stream *s = &e->streams[id];
        bool signs = id == FINGERPRINT_STREAM;
        uint64_t greatest = signs ? s->table.last / 2 : s->table.last;
        if (!s->present) {
            continue;
        }
        if (s->quantiser == EXACT && !signs && s->table.last >= 2 * s->coded->nonfinite) {
            return false;
        }
        if (s->quantiser == TABLE && greatest >= s->centroids) {
            return false;
        }
        if (s->quantiser == UNIFORM && (!is_finite(s->step) || !(s->step > 0) || bits_of(s->step) >> 31 != 0 ||
                                        !is_finite(multiply((float)(uint32_t)greatest, s->step)))) {
            return false;
        }
    }
    return true;
}

/* Reads steps and vectors, and checks them. */
static bool read_part_vectors(assembly *m)
{
    entry *e = &m->d.entry;
    list_vectors(e);
    const uint8_t *at = m->parts[VECTORS_PART] != NULL ? m->parts[VECTORS_PART]->values : NULL;
    for (size_t id = FINGERPRINT_STREAM; id <= IMPORTANCE_STREAM; id++) {
        stream *s = &e->streams[id];
        if (s->present && s->quantiser == UNIFORM) {
            s->step = float_of(load32(at));
            at += 4;
        }
    }
    for (size_t i = 0; i < VECTOR_COUNT; i++) {
        vector *v = &e->vectors[i];
        m->d.vectors[i] = at;
        for (uint64_t k = 0; k < v->elements; k++, at += 4) {
            float x = float_of(load32(at));
            if (!is_finite(x) || bits_of(widen(v->dtype, pattern_of(v->dtype, x))) != load32(at)) {
                return false;
            }
        }
        v->dtype = &DTYPES[F32];
    }
    return check_quantisers(e) && check_vectors(&m->d);
}

/* Computes the weights, the mask and the importance of a segment. */
static void assemble_segment(assembly *m, uint64_t first)
{
    decoder *d = &m->d;
    segment s;
    memset(&s, 0, sizeof s);
    s.first = first;
    s.positions = (size_t)at_most(m->number - first, d->entry.segment);
    if (d->entry.told.importance == SFP_FACTORS) {
        multiply_factors(d, &s);
    }
    for (size_t p = 0; p < s.positions; p++) {
        bool alive = survives(m, first + p);
        d->mask[p] = alive;
        if (d->entry.told.importance != SFP_FACTORS) {
            bool stored = has_importance(m, first + p);
            d->importance[p] = stored ? importance_of(d, assembled_importance(m, first + p)) : 0;
        }
        if (alive) {
            d->positions[s.survivors] = (uint16_t)p;
            d->levels[s.survivors++] = assembled_level(m, first + p);
        }
    }
    if (d->entry.streams[FINGERPRINT_STREAM].quantiser == EXACT) {
        restore_exact(d, &s);
    } else {
        restore_quantised(d, &s);
    }
    store_values(d, &s);
    if (d->out->mask != NULL) {
        memcpy(d->out->mask + first, d->mask, s.positions);
    }
    if (d->out->importance != NULL) {
        store_importance(d, &s);
    }
}

/* Makes a tensor from its parts, in place of the part `weights` (R-DLT-020, R-DLT-021). */
static sfp_status assemble(const sfp_file *file, const delta_tensor *t, assembly *m, sfp_result_tensor *out,
                           sfp_fault *fault)
{
    directory source = directory_of(file, fault);
    sfp_decoded made;
    memset(&m->d, 0, sizeof m->d);
    memset(&made, 0, sizeof made);
    m->d.file = file;
    m->d.fault = fault;
    m->d.assembled = true;
    if (!read_structure(&source, t->structure, &m->d.entry)) {
        return SFP_MISUSE;
    }
    entry *e = &m->d.entry;
    set_shape(&source, t, e);
    m->number = t->positions;
    if (!check_elements(m) || !read_part_vectors(m)) {
        return refuse_tensor(fault, R_DLT_020, t->name, "a tensor of the structure cannot have these parts");
    }
    unsigned wanted = SFP_VALUES | SFP_IMPORTANCE | (e->told.pruned ? SFP_MASK : 0);
    e->segment = 64;
    for (size_t id = 0; id < STREAM_COUNT; id++) {
        e->streams[id].present = false; /* nothing is decoded */
    }
    bool ready = allocate_results(file, e, wanted, &made) && prepare(&m->d);
    m->d.out = &made;
    for (uint64_t first = 0; ready && first < m->number; first += e->segment) {
        assemble_segment(m, first);
    }
    clean_up(&m->d);
    if (!ready) {
        sfp_release(file, &made);
        return SFP_NO_MEMORY;
    }
    release(&file->allocator, out->values);
    out->values = made.values;
    out->mask = made.mask;
    out->importance = made.importance;
    out->dtype = e->told.dtype;
    out->bytes = m->number * e->told.element_bytes;
    return SFP_OK;
}

/* Makes the tensors in parts. Marks in `gone` the parts, which are not tensors of the result. */
static sfp_status assemble_all(const base_parts *b, sfp_result *result, uint8_t *gone, sfp_fault *fault)
{
    const delta *o = &b->file->delta;
    sfp_status status = SFP_OK;
    for (size_t i = 0; i < o->count && status == SFP_OK; i++) {
        assembly m;
        if (!o->tensors[i].in_parts) {
            continue;
        }
        for (size_t part = 0; part < PART_COUNT; part++) {
            size_t at = number_of_name(b->listed, o->count, name_of_part(o, &o->tensors[i], part, b->room));
            bool listed = at != SIZE_MAX && o->tensors[at].kind != REMOVED;
            m.parts[part] = listed ? &result->tensors[at] : NULL;
            if (listed && part != WEIGHTS) {
                gone[at] = 1;
            }
        }
        status = assemble(b->file, &o->tensors[i], &m, &result->tensors[i], fault);
    }
    return status;
}

static void release_result_tensor(const sfp_file *file, sfp_result_tensor *t)
{
    release(&file->allocator, t->values);
    release(&file->allocator, t->mask);
    release(&file->allocator, t->importance);
    t->values = t->mask = t->importance = NULL;
}

/* Checks the checksums of the result, makes the tensors in parts, and removes the removed tensors and the parts. */
static sfp_status finish_result(const base_parts *b, sfp_result *result, sfp_fault *fault)
{
    const sfp_file *file = b->file;
    size_t kept = 0;
    for (size_t i = 0; i < file->delta.count; i++) {
        const delta_tensor *t = &file->delta.tensors[i];
        sfp_result_tensor *own = &result->tensors[i];
        if (t->kind != REMOVED && crc32(&file->crc, own->values, own->bytes) != t->result) {
            return refuse_tensor(fault, R_DLT_012, t->name, "a tensor of the result has another checksum");
        }
        b->taken[i] = t->kind == REMOVED;
    }
    sfp_status status = assemble_all(b, result, b->taken, fault);
    if (status != SFP_OK) {
        return status;
    }
    for (size_t i = 0; i < file->delta.count; i++) {
        if (b->taken[i] != 0) {
            release_result_tensor(file, &result->tensors[i]);
        } else {
            result->tensors[kept++] = result->tensors[i];
        }
    }
    result->count = kept;
    return SFP_OK;
}

sfp_status sfp_apply(const sfp_file *file, const sfp_file *base, sfp_result *result, sfp_fault *fault)
{
    const sfp_allocator *a = &file->allocator;
    memset(result, 0, sizeof *result);
    if (!file->delta.present) {
        return SFP_MISUSE;
    }
    const delta *o = &file->delta;
    numbered_name *names = allocate(a, base->tensor_count, sizeof *names);
    numbered_name *listed = allocate(a, o->count, sizeof *listed);
    base_parts b = {file, base, names, listed, allocate(a, longest_name(o), 1), allocate(a, o->count, 1)};
    result->tensors = allocate(a, o->count, sizeof *result->tensors);
    sfp_status status = SFP_NO_MEMORY;
    if (names != NULL && listed != NULL && b.room != NULL && b.taken != NULL && result->tensors != NULL) {
        memset(b.taken, 0, o->count);
        memset(result->tensors, 0, (o->count > 0 ? o->count : 1) * sizeof *result->tensors);
        result->count = o->count;
        for (size_t i = 0; i < base->tensor_count; i++) {
            sfp_tensor told;
            sfp_describe(base, i, &told);
            names[i].name = told.name;
            names[i].number = i;
        }
        for (size_t i = 0; i < o->count; i++) {
            listed[i].name = o->tensors[i].name;
            listed[i].number = i;
        }
        sort_names(names, base->tensor_count);
        sort_names(listed, o->count);
        status = take_tensors(&b, result->tensors, fault);
        status = status == SFP_OK ? apply_pools(file, result->tensors, fault) : status;
        status = status == SFP_OK ? finish_result(&b, result, fault) : status;
    }
    release(a, names);
    release(a, listed);
    release(a, b.room);
    release(a, b.taken);
    if (status != SFP_OK) {
        sfp_release_result(file, result);
    }
    return status;
}

void sfp_release_result(const sfp_file *file, sfp_result *result)
{
    for (size_t i = 0; i < result->count; i++) {
        release_result_tensor(file, &result->tensors[i]);
    }
    release(&file->allocator, result->tensors);
    memset(result, 0, sizeof *result);
}

/* --------------------------------------------------------------------------------- look-ups in keyed tables */

/* A keyed table whose bit array has been checked. */
struct sfp_keyed {
    const sfp_file *file;
    const keyed_table *table;
    stream_decoder gaps, levels, importance;
    sfp_decoded bits;
};

size_t sfp_table_count(const sfp_file *file)
{
    return file->table_count;
}

sfp_status sfp_describe_table(const sfp_file *file, size_t number, sfp_table *table)
{
    if (number >= file->table_count) {
        return SFP_MISUSE;
    }
    const keyed_table *t = &file->tables[number];
    table->name = t->name;
    table->keys = t->keys;
    table->outputs = (size_t)t->outputs;
    table->importance = t->importance.present;
    return SFP_OK;
}

sfp_status sfp_open_table(const sfp_file *file, size_t number, sfp_keyed **opened, sfp_fault *fault)
{
    *opened = NULL;
    if (number >= file->table_count) {
        return SFP_MISUSE;
    }
    sfp_keyed *k = allocate(&file->allocator, 1, sizeof *k);
    if (k == NULL) {
        return SFP_NO_MEMORY;
    }
    memset(k, 0, sizeof *k);
    k->file = file;
    k->table = &file->tables[number];
    const keyed_table *t = k->table;
    sfp_status status = SFP_NO_MEMORY;
    if ((!t->gaps.present || prepare_stream(file, &t->gaps, &k->gaps)) &&
        prepare_stream(file, &t->levels, &k->levels) &&
        (!t->importance.present || prepare_stream(file, &t->importance, &k->importance))) {
        status = sfp_decode(file, t->bits, SFP_VALUES, &k->bits, fault);
    }
    if (status != SFP_OK) {
        sfp_close_table(k);
        return status;
    }
    *opened = k;
    return SFP_OK;
}

void sfp_close_table(sfp_keyed *k)
{
    if (k != NULL) {
        sfp_allocator allocator = k->file->allocator;
        stream_decoder *const streams[] = {&k->gaps, &k->levels, &k->importance};
        for (size_t i = 0; i < 3; i++) {
            release(&allocator, streams[i]->first);
            release(&allocator, streams[i]->lookup);
        }
        sfp_release(k->file, &k->bits);
        release(&allocator, k);
    }
}

static uint64_t rotated(uint64_t x, unsigned bits)
{
    return x << bits | x >> (64 - bits);
}

static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 33) * UINT64_C(0xFF51AFD7ED558CCD);
    x = (x ^ x >> 33) * UINT64_C(0xC4CEB9FE1A85EC53);
    return x ^ x >> 33;
}

/* Returns up to eight bytes as a number, little-endian. */
static uint64_t number_of_bytes(const uint8_t *bytes, size_t count)
{
    uint64_t x = 0;
    for (size_t i = 0; i < count; i++) {
        x |= (uint64_t)bytes[i] << 8 * i;
    }
    return x;
}

/* Sets the four words of the hash of a key (17.2). */
static void hash_key(const uint8_t *key, size_t length, uint64_t seed, uint64_t words[PLACES])
{
    const uint64_t c1 = UINT64_C(0x87C37B91114253D5), c2 = UINT64_C(0x4CF5AD432745937F);
    uint64_t a = seed, b = seed;
    for (size_t at = 0; at < length; at += 16) {
        size_t left = length - at;
        uint64_t x = number_of_bytes(key + at, left < 8 ? left : 8);
        uint64_t y = left > 8 ? number_of_bytes(key + at + 8, left < 16 ? left - 8 : 8) : 0;
        a ^= rotated(x * c1, 31) * c2;
        if (left >= 16) {
            a = (rotated(a, 27) + b) * 5 + 0x52DCE729;
        }
        b ^= rotated(y * c2, 33) * c1;
        if (left >= 16) {
            b = (rotated(b, 31) + a) * 5 + 0x38495AB5;
        }
    }
    a ^= length;
    b ^= length;
    a += b;
    b += a;
    a = mixed(a);
    b = mixed(b);
    a += b;
    b += a;
    words[0] = a & UINT32_MAX;
    words[1] = a >> 32;
    words[2] = b & UINT32_MAX;
    words[3] = b >> 32;
}

/* The row of a key: the next bit of each of its four copies. */
typedef struct row {
    const uint8_t *bits;
    uint64_t at[PLACES];
} row;

/* Returns the next bits of a row, at least 57. A row has at most as many bits as `array_bytes` allows for. */
static uint64_t peek_row(const row *r)
{
    return peek(r->bits, r->at[0]) ^ peek(r->bits, r->at[1]) ^ peek(r->bits, r->at[2]) ^ peek(r->bits, r->at[3]);
}

static void skip_row(row *r, unsigned bits)
{
    for (size_t k = 0; k < PLACES; k++) {
        r->at[k] += bits;
    }
}

/* Reads the next level of a row, and sets its class. */
static uint64_t next_level(row *r, const stream_decoder *s, size_t *class_number)
{
    uint64_t window = peek_row(r);
    uint32_t hit = s->stream->table.codes > 0 ? s->lookup[window % LOOKUP_SIZE] : 0;
    unsigned length = hit >> 4 & 15;
    *class_number = hit >> 8 & 4095;
    unsigned extra = s->extra[*class_number];
    skip_row(r, length + extra);
    return s->first[*class_number] + (window >> length & ones(extra));
}

/* Returns the weight of a level. */
static float weight_of(const keyed_table *t, uint64_t level)
{
    uint64_t m = level / 2;
    float x = t->levels.quantiser == UNIFORM ? multiply((float)(uint32_t)m, t->levels.step)
                                              : float_of(load32(t->centroids + 4 * m));
    return level % 2 != 0 ? -x : x;
}

bool sfp_look_up(const sfp_keyed *k, const uint8_t *key, size_t length, float *weights, float *importance)
{
    const keyed_table *t = k->table;
    uint64_t words[PLACES];
    row r = {k->bits.values, {0}};
    hash_key(key, length, t->seed, words);
    r.at[0] = words[0] * t->starts >> 32;
    for (size_t i = 1; i < PLACES; i++) {
        r.at[i] = (r.at[0] + i * t->segment) ^ (words[i] & (t->segment - 1));
    }
    for (uint64_t o = 0; o < t->outputs; o++) {
        weights[o] = 0;
    }
    *importance = 0;
    size_t greatest = SIZE_MAX, found;
    for (uint64_t o = 0; o < t->outputs; o++) {
        o += t->gaps.present ? next_level(&r, &k->gaps, &found) : 0;
        if (o < t->outputs) {
            weights[o] = weight_of(t, next_level(&r, &k->levels, &found));
            greatest = greatest == SIZE_MAX || found > greatest ? found : greatest;
        }
    }
    float told = 0;
    if (t->importance.present) {
        told = multiply((float)(uint32_t)next_level(&r, &k->importance, &found), t->importance.step);
    }
    if (greatest == SIZE_MAX || (peek_row(&r) & ones(t->checks[greatest])) != 0) {
        for (uint64_t o = 0; o < t->outputs; o++) {
            weights[o] = 0;
        }
        return false;
    }
    *importance = told;
    return true;
}
