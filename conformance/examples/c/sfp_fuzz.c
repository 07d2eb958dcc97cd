/* A harness for libFuzzer of clang, which generates files guided by the reader's code coverage.
 *
 *     make fuzzer
 *     build/sfp_fuzz -runs=1000000 -max_len=4096 FOLDER ../../cases/PRE ../../cases/DIR ...
 *
 * libFuzzer saves files that reach new code in the first folder. A reader refuses a file with a wrong checksum before
 * it checks anything else. The harness therefore repairs the checksums after three out of four changes: those of the
 * preamble, of the directory and of the chunks, whose records it searches in the directory.
 */
#include "sfp.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t length, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t length, size_t room, unsigned seed);

enum { PREAMBLE = 64, ALIGNMENT = 64, MOST_RECORDS = 64 };

static sfp_limits small_limits(void)
{
    sfp_limits limits = sfp_default_limits();
    limits.directory_bytes = 1 << 16;
    limits.tensors = 256;
    limits.tensor_bytes = 1 << 20;
    return limits;
}

/* Looks up parts of the file as keys, of 0 to 63 bytes, in all keyed tables. */
static void look_up(const sfp_file *file, const uint8_t *bytes, size_t length)
{
    for (size_t i = 0; i < sfp_table_count(file); i++) {
        sfp_table told;
        sfp_keyed *table;
        sfp_fault fault;
        if (sfp_describe_table(file, i, &told) != SFP_OK || sfp_open_table(file, i, &table, &fault) != SFP_OK) {
            continue;
        }
        float importance, *weights = malloc(told.outputs * sizeof(float));
        for (size_t size = 0; weights != NULL && size < 64 && size <= length; size++) {
            sfp_look_up(table, bytes + length - size, size, weights, &importance);
        }
        free(weights);
        sfp_close_table(table);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length)
{
    sfp_limits limits = small_limits();
    sfp_file *file;
    sfp_fault fault;
    if (sfp_open(bytes, length, &limits, NULL, &file, &fault) != SFP_OK) {
        return 0;
    }
    sfp_status status = SFP_OK;
    for (size_t i = 0; status == SFP_OK && i < sfp_tensor_count(file); i++) {
        sfp_decoded got;
        status = sfp_decode(file, i, SFP_VALUES | SFP_MASK | SFP_IMPORTANCE, &got, &fault);
        sfp_release(file, &got);
        if (status == SFP_OK) {
            status = sfp_check(file, i, &fault);
        }
    }
    if (status == SFP_OK) {
        look_up(file, bytes, length);
    }
    sfp_close(file);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- checksums */

static uint32_t crc32(const uint8_t *bytes, size_t length)
{
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < length; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
        }
    }
    return ~crc;
}

static uint64_t load(const uint8_t *bytes, size_t size)
{
    uint64_t value = 0;
    while (size-- > 0) {
        value = value << 8 | bytes[size];
    }
    return value;
}

static void store(uint8_t *bytes, size_t size, uint64_t value)
{
    for (size_t i = 0; i < size; i++) {
        bytes[i] = (uint8_t)(value >> 8 * i);
    }
}

/* Repairs the records of the key "chunks" or "vectors", whose chunks start at an offset. Returns the offset of the
 * next chunk. */
static size_t mend_records(uint8_t *bytes, size_t directory, uint8_t *records, size_t size, size_t offset)
{
    for (size_t i = 0; i + 8 <= size && i < 8 * MOST_RECORDS; i += 8) {
        uint64_t chunk = load(records + i, 4);
        if (chunk == 0 || chunk % ALIGNMENT != 0 || chunk > directory - offset) {
            break;
        }
        store(records + i + 4, 4, crc32(bytes + offset, (size_t)chunk));
        offset += (size_t)chunk;
    }
    return offset;
}

/* Returns the length byte of the `bin 8` value that follows a MessagePack string, or NULL. */
static uint8_t *find(uint8_t *from, const uint8_t *end, const char *key)
{
    size_t length = strlen(key);
    for (; from + length + 2 <= end; from++) {
        if (memcmp(from, key, length) == 0 && from[length] == 0xC4) {
            return from + length + 1;
        }
    }
    return NULL;
}

/* Repairs the records of all chunks. In a tensor's map "chunks" precedes "vectors", but in the file the vector chunk
 * precedes the other chunks. */
static void mend_chunks(uint8_t *bytes, size_t directory, size_t length)
{
    const uint8_t *end = bytes + length;
    size_t offset = PREAMBLE;
    uint8_t *place = find(bytes + directory, end, "\xA6" "chunks");
    while (place != NULL) {
        uint8_t *next = find(place, end, "\xA6" "chunks");
        uint8_t *vectors = find(place, next != NULL ? next : end, "\xA7" "vectors");
        if (vectors != NULL && vectors + 1 + vectors[0] <= end) {
            offset = mend_records(bytes, directory, vectors + 1, vectors[0], offset);
        }
        if (place + 1 + place[0] <= end) {
            offset = mend_records(bytes, directory, place + 1, place[0], offset);
        }
        place = next;
    }
}

static void mend(uint8_t *bytes, size_t length)
{
    if (length < PREAMBLE) {
        return;
    }
    uint64_t directory = load(bytes + 16, 8);
    if (directory >= PREAMBLE && directory <= length) {
        mend_chunks(bytes, (size_t)directory, length);
        store(bytes + 24, 8, length - directory);
        store(bytes + 32, 8, length);
        store(bytes + 40, 4, crc32(bytes + directory, (size_t)(length - directory)));
    }
    store(bytes + 60, 4, crc32(bytes, 60));
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t length, size_t room, unsigned seed)
{
    length = LLVMFuzzerMutate(bytes, length, room);
    if (seed % 4 != 0) {
        mend(bytes, length);
    }
    return length;
}
