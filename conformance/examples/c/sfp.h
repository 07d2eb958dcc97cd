/* A reader of .sfp files, version 1.0 of the format, profile `full` (SPEC.md chapter 23).
 *
 * It needs the C99 standard library and IEEE 754 arithmetic in the default rounding mode, nothing else. The
 * file is given as bytes in memory (read, or mapped), which must stay in place and unchanged while it is
 * open; every result is little-endian, whatever the machine is. There is no global state: after sfp_open a
 * file is not changed any more, so that several threads may decode its tensors at once where the allocator
 * allows it.
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
    SFP_REFUSED,   /* the file breaks a requirement; the fault says which */
    SFP_NO_MEMORY, /* the allocator gave nothing */
    SFP_MISUSE     /* there is no tensor of that number */
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
    SFP_E_LIMIT
} sfp_error;

/* Bytes inside the file; of strings well-formed UTF-8, without a zero at the end. */
typedef struct sfp_span {
    const uint8_t *bytes; /* NULL for none */
    size_t length;
} sfp_span;

/* Why a file was refused; filled in where a call returns SFP_REFUSED. `clause` and `detail` are constants. */
typedef struct sfp_fault {
    sfp_error error;
    const char *clause; /* the requirement, such as "R-LAY-004" */
    const char *detail; /* what is wrong, in words */
    sfp_span tensor;    /* the tensor's name, or none */
    sfp_span feature;   /* with "R-FEA-001" a feature that the reader does not know, or none */
    uint64_t offset;    /* where in the file */
} sfp_fault;

/* The limits of SPEC.md chapter 19. */
typedef struct sfp_limits {
    uint64_t directory_bytes;
    uint64_t depth; /* above SFP_MAX_DEPTH it counts as that */
    uint64_t name_bytes;
    uint64_t tensors;
    uint64_t rank; /* above SFP_MAX_RANK it counts as that */
    uint64_t tensor_bytes;
    uint64_t expansion;
} sfp_limits;

/* Where memory comes from; what `allocate` gives is aligned for any type, as from malloc. */
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

/* What the directory says of a tensor. */
typedef struct sfp_tensor {
    sfp_span name;
    const char *dtype; /* as in SPEC.md chapter 25.1 */
    size_t element_bytes;
    size_t rank;
    uint64_t shape[SFP_MAX_RANK];
    uint64_t positions;    /* the elements it has */
    uint64_t stored_bytes; /* of all its chunks */
    bool fingerprint;      /* its coding: fingerprint, or else raw */
    bool pruned;           /* it has a mask */
    sfp_importance importance;
    bool multiplier; /* the importance enters the values */
    sfp_span entry;  /* its map in MessagePack, with the keys that this reader does not know */
} sfp_tensor;

/* What sfp_decode is asked for. */
enum { SFP_VALUES = 1, SFP_MASK = 2, SFP_IMPORTANCE = 4 };

/* A tensor decoded; what was not asked for, and an importance that does not exist, is NULL. An empty tensor
 * has pointers that are not NULL. */
typedef struct sfp_decoded {
    uint8_t *values;     /* positions * element_bytes */
    uint8_t *mask;       /* a byte for each position: 1 for a survivor, 0 for a pruned one */
    uint8_t *importance; /* an F32 for each position */
} sfp_decoded;

typedef struct sfp_file sfp_file;

/* The limits that hold where none are given. */
sfp_limits sfp_default_limits(void);

/* Reads preamble and directory. Limits and allocator may be NULL: the defaults, and malloc and free. */
sfp_status sfp_open(const uint8_t *bytes, size_t length, const sfp_limits *limits, const sfp_allocator *allocator,
                    sfp_file **file, sfp_fault *fault);

void sfp_close(sfp_file *file);

size_t sfp_tensor_count(const sfp_file *file);

/* What the directory says of tensor `number`, from 0. */
sfp_status sfp_describe(const sfp_file *file, size_t number, sfp_tensor *tensor);

/* Decodes a tensor; gives all that `wanted` asks for, or nothing. */
sfp_status sfp_decode(const sfp_file *file, size_t number, unsigned wanted, sfp_decoded *decoded,
                      sfp_fault *fault);

/* Gives the memory of a decoded tensor back. */
void sfp_release(const sfp_file *file, sfp_decoded *decoded);

/* Checks everything that a tensor has, in memory that does not grow with it. */
sfp_status sfp_check(const sfp_file *file, size_t number, sfp_fault *fault);

/* The user's metadata, pair by pair: begin with *cursor = 0; false after the last. */
bool sfp_next_metadata(const sfp_file *file, size_t *cursor, sfp_span *key, sfp_span *value);

/* The directory in MessagePack, with the keys that this reader does not know. */
sfp_span sfp_directory(const sfp_file *file);

/* Such as "E_CRC". */
const char *sfp_error_name(sfp_error error);

#ifdef __cplusplus
}
#endif

#endif
