/* A reader of .sfp files, version 1.0 of the format, profile `full` (SPEC.md chapter 23).
 *
 * It needs only the C99 standard library, and IEEE 754 arithmetic in the default rounding mode. The caller gives
 * the file as bytes in memory (read or mapped), which must not move or change while the file is open. Results
 * are little-endian on every machine. There is no global state. An sfp_file does not change after sfp_open, so
 * that several threads can decode its tensors at the same time if the allocator allows it.
 *
 *     sfp_fault fault;
 *     sfp_file *file;
 *     if (sfp_open(bytes, length, NULL, NULL, &file, &fault) == SFP_OK) {
 *         sfp_decoded got;
 *         if (sfp_decode(file, 0, SFP_VALUES | SFP_MASK, &got, &fault) == SFP_OK) {
 *             ... got.values, got.mask ...
 *             sfp_release(file, &got);
 *         }
 *         sfp_close(file);
 *     }
 */
#ifndef SFP_H
#define SFP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SFP_MAX_DEPTH 64 /* greatest limit of depth that a caller can set */
#define SFP_MAX_RANK 64  /* greatest limit of rank */

typedef enum sfp_status {
    SFP_OK = 0,
    SFP_REFUSED,   /* the file breaks a requirement, which the fault names */
    SFP_NO_MEMORY, /* the allocator returned NULL */
    SFP_MISUSE     /* there is no tensor with this number, or the file is not a delta */
} sfp_status;

/* The codes of SPEC.md chapter 20. */
typedef enum sfp_error {
    SFP_E_MAGIC,
    SFP_E_VERSION,
    SFP_E_TRUNCATED,
    SFP_E_TRAILING,
    SFP_E_CRC,
    SFP_E_RESERVED,
    SFP_E_ENCODING,
    SFP_E_RANGE,
    SFP_E_LAYOUT,
    SFP_E_FEATURE,
    SFP_E_LIMIT,
    SFP_E_BASE
} sfp_error;

/* Bytes in the file. Strings are well-formed UTF-8 without a terminating zero. */
typedef struct sfp_span {
    const uint8_t *bytes; /* NULL for none */
    size_t length;
} sfp_span;

/* The reason for a refusal, set if a call returns SFP_REFUSED. `clause` and `detail` are string constants. `tensor` can
 * point into the fault itself, so a copy of a fault must not outlive it. */
typedef struct sfp_fault {
    sfp_error error;
    const char *clause; /* the requirement, such as "R-LAY-004" */
    const char *detail; /* a description of the fault */
    sfp_span tensor;    /* the tensor's name, or none */
    sfp_span feature;   /* with "R-FEA-001", a feature that the reader does not know, or none */
    uint64_t offset;    /* the byte offset in the file */
    uint8_t joined[1024];
} sfp_fault;

/* The limits of SPEC.md chapter 19. */
typedef struct sfp_limits {
    uint64_t directory_bytes;
    uint64_t depth; /* greater values act as SFP_MAX_DEPTH */
    uint64_t name_bytes;
    uint64_t tensors;
    uint64_t rank; /* greater values act as SFP_MAX_RANK */
    uint64_t tensor_bytes;
    uint64_t expansion;
} sfp_limits;

/* Allocates and releases memory. Like malloc, `allocate` returns memory that is aligned for any type. */
typedef struct sfp_allocator {
    void *(*allocate)(void *user, size_t size);
    void (*release)(void *user, void *memory);
    void *user;
} sfp_allocator;

typedef enum sfp_importance {
    SFP_NO_IMPORTANCE,
    SFP_OVER_SURVIVORS,
    SFP_OVER_ALL,
    SFP_FACTORS
} sfp_importance;

/* The description of a tensor in the directory. */
typedef struct sfp_tensor {
    sfp_span name;
    const char *dtype; /* a name of SPEC.md chapter 25.1 */
    size_t element_bytes;
    size_t rank;
    uint64_t shape[SFP_MAX_RANK];
    uint64_t positions;    /* number of elements */
    uint64_t stored_bytes; /* size of all its chunks */
    bool fingerprint;      /* whether the coding is `fingerprint`, not `raw` */
    bool pruned;           /* whether it has a mask */
    sfp_importance importance;
    bool multiplier; /* whether the values are multiplied by the importance */
    sfp_span entry;  /* its map in MessagePack, with all keys, also those that this reader does not know */
} sfp_tensor;

/* The results that sfp_decode can return. */
enum { SFP_VALUES = 1, SFP_MASK = 2, SFP_IMPORTANCE = 4 };

/* A decoded tensor. Results that were not requested, and an importance that does not exist, are NULL. The
 * pointers of an empty tensor are not NULL. */
typedef struct sfp_decoded {
    uint8_t *values;     /* positions * element_bytes bytes */
    uint8_t *mask;       /* a byte for each position: 1 for a survivor, 0 for a pruned position */
    uint8_t *importance; /* an F32 for each position */
} sfp_decoded;

typedef struct sfp_file sfp_file;

/* Returns the default limits. */
sfp_limits sfp_default_limits(void);

/* Opens a file: reads and checks the preamble and the directory. NULL as limits means the default limits; NULL as
 * allocator means malloc and free. */
sfp_status sfp_open(const uint8_t *bytes, size_t length, const sfp_limits *limits, const sfp_allocator *allocator,
                    sfp_file **file, sfp_fault *fault);

void sfp_close(sfp_file *file);

size_t sfp_tensor_count(const sfp_file *file);

/* Describes tensor `number`, counted from 0. */
sfp_status sfp_describe(const sfp_file *file, size_t number, sfp_tensor *tensor);

/* Decodes a tensor. `wanted` combines SFP_VALUES, SFP_MASK and SFP_IMPORTANCE. Returns either all requested
 * results or none. */
sfp_status sfp_decode(const sfp_file *file, size_t number, unsigned wanted, sfp_decoded *decoded,
                      sfp_fault *fault);

/* Releases the memory of a decoded tensor. */
void sfp_release(const sfp_file *file, sfp_decoded *decoded);

/* Checks all chunks of a tensor. The memory does not depend on the size of the tensor. */
sfp_status sfp_check(const sfp_file *file, size_t number, sfp_fault *fault);

/* Returns the metadata pair by pair. Set *cursor to 0 before the first call; returns false after the last pair. */
bool sfp_next_metadata(const sfp_file *file, size_t *cursor, sfp_span *key, sfp_span *value);

/* Returns the directory in MessagePack, with all keys, also those that this reader does not know. */
sfp_span sfp_directory(const sfp_file *file);

/* Returns whether a file is a delta (SPEC.md chapter 28). Its tensors are then those that it stores, not a model's. */
bool sfp_is_delta(const sfp_file *file);

/* A tensor of the result of a delta and its base. */
typedef struct sfp_result_tensor {
    sfp_span name;
    const char *dtype;
    size_t rank;
    uint64_t shape[SFP_MAX_RANK];
    uint64_t bytes;
    uint8_t *values;
    uint8_t *mask;       /* a byte for each position; NULL for a tensor without a mask */
    uint8_t *importance; /* an F32 for each position; NULL for a tensor without an importance */
} sfp_result_tensor;

typedef struct sfp_result {
    size_t count;
    sfp_result_tensor *tensors;
} sfp_result;

/* Applies a delta to its base. Returns all tensors of the result or none. */
sfp_status sfp_apply(const sfp_file *delta, const sfp_file *base, sfp_result *result, sfp_fault *fault);

/* Releases the memory of a result. */
void sfp_release_result(const sfp_file *delta, sfp_result *result);

/* A keyed table of a file (SPEC.md chapter 17). */
typedef struct sfp_table {
    sfp_span name;
    uint64_t keys;   /* the number of keys, as the writer says */
    size_t outputs;  /* the number of weights of a key */
    bool importance; /* whether the table stores the importance of keys */
} sfp_table;

typedef struct sfp_keyed sfp_keyed;

size_t sfp_table_count(const sfp_file *file);

/* Describes keyed table `number`, counted from 0. */
sfp_status sfp_describe_table(const sfp_file *file, size_t number, sfp_table *table);

/* Opens a keyed table: decodes and checks its bit array. The file must stay open. */
sfp_status sfp_open_table(const sfp_file *file, size_t number, sfp_keyed **table, sfp_fault *fault);

void sfp_close_table(sfp_keyed *table);

/* Looks a key up: sets its weights, one for each output, and its importance. Returns false, and sets zeros, if the key
 * is unknown. Allocates nothing. */
bool sfp_look_up(const sfp_keyed *table, const uint8_t *key, size_t length, float *weights, float *importance);

/* Returns the name of an error code, such as "E_CRC". */
const char *sfp_error_name(sfp_error error);

#ifdef __cplusplus
}
#endif

#endif
