/* A command-line program for the reader.
 *
 *     sfp_driver [LIMIT=NUMBER ...] validate FILE
 *     sfp_driver [LIMIT=NUMBER ...] decode FILE FOLDER
 *     sfp_driver [LIMIT=NUMBER ...] apply FILE BASE FOLDER
 *     sfp_driver [LIMIT=NUMBER ...] look-up FILE KEYS FOLDER
 *     sfp_driver [LIMIT=NUMBER ...] time FILE ROUNDS
 *     sfp_driver [LIMIT=NUMBER ...] serve
 *     sfp_driver hello
 *
 * `validate` makes all checks of a reader. `decode` also writes each tensor into FOLDER, which must exist:
 * NUMBER.bin, its elements; NUMBER.mask.bin, a byte for each position, if it has a mask; NUMBER.importance.bin,
 * an F32 for each position, if it has an importance. `apply` writes the result of a delta and its base. `look-up`
 * looks up the keys of the file KEYS, one per line in hexadecimal, in all keyed tables, and writes the answers. Each
 * command prints one line of JSON on standard output: the contents of the file, or the first fault. `serve` reads commands from standard input, one per line with tabs
 * between words, and answers each with one line, until the input ends. `hello` prints name and version. `time`
 * decodes all weights of a file in memory ROUNDS times, and prints the least processor time.
 *
 * Exit status: 0 for a valid file, 1 for an invalid one, 2 for wrong usage or a failure of the system.
 */
#include "sfp.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { VALID = 0, INVALID = 1, FAILED = 2 };

/* ---------------------------------------------------------------------------------------------------- JSON */

static void print_string(const uint8_t *bytes, size_t length)
{
    putchar('"');
    for (size_t i = 0; i < length; i++) {
        if (bytes[i] < 0x20 || bytes[i] == 0x7F) {
            printf("\\u%04x", (unsigned)bytes[i]);
        } else {
            if (bytes[i] == '"' || bytes[i] == '\\') {
                putchar('\\');
            }
            putchar(bytes[i]);
        }
    }
    putchar('"');
}

static void print_span(sfp_span span)
{
    if (span.bytes == NULL) {
        fputs("null", stdout);
    } else {
        print_string(span.bytes, span.length);
    }
}

static void print_text(const char *text)
{
    print_string((const uint8_t *)text, strlen(text));
}

/* Prints a line of JSON that describes a failure. Returns FAILED. */
static int print_failure(const char *what)
{
    fputs("{\"ok\":false,\"error\":null,\"detail\":", stdout);
    print_text(what);
    puts("}");
    return FAILED;
}

static int print_fault(const sfp_fault *fault)
{
    printf("{\"ok\":false,\"error\":\"%s\",\"clause\":\"%s\",\"tensor\":", sfp_error_name(fault->error),
           fault->clause);
    print_span(fault->tensor);
    printf(",\"offset\":%" PRIu64 ",\"detail\":", fault->offset);
    print_text(fault->detail);
    if (fault->feature.bytes != NULL) {
        fputs(",\"feature\":", stdout);
        print_span(fault->feature);
    }
    puts("}");
    return INVALID;
}

static int print_outcome(sfp_status status, const sfp_fault *fault)
{
    return status == SFP_REFUSED ? print_fault(fault) : print_failure("out of memory");
}

static void print_metadata(const sfp_file *file)
{
    size_t cursor = 0;
    sfp_span key, text;
    const char *before = "";
    fputs("\"metadata\":{", stdout);
    while (sfp_next_metadata(file, &cursor, &key, &text)) {
        fputs(before, stdout);
        print_span(key);
        putchar(':');
        print_span(text);
        before = ",";
    }
    putchar('}');
}

static void print_tensor(const sfp_tensor *t)
{
    static const char *const forms[] = {"null", "\"survivors\"", "\"all\"", "\"factors\""};
    fputs("{\"name\":", stdout);
    print_span(t->name);
    printf(",\"dtype\":\"%s\",\"shape\":[", t->dtype);
    for (size_t i = 0; i < t->rank; i++) {
        printf("%s%" PRIu64, i > 0 ? "," : "", t->shape[i]);
    }
    printf("],\"coding\":\"%s\",\"mask\":%s,\"importance\":%s,\"multiplier\":%s}",
           t->fingerprint ? "fingerprint" : "raw", t->pruned ? "true" : "false", forms[t->importance],
           t->multiplier ? "true" : "false");
}

static int print_manifest(const sfp_file *file)
{
    fputs("{\"ok\":true,", stdout);
    print_metadata(file);
    fputs(",\"tensors\":[", stdout);
    for (size_t i = 0; i < sfp_tensor_count(file); i++) {
        sfp_tensor tensor;
        if (sfp_describe(file, i, &tensor) == SFP_OK) {
            fputs(i > 0 ? "," : "", stdout);
            print_tensor(&tensor);
        }
    }
    puts("]}");
    return VALID;
}

/* --------------------------------------------------------------------------------------------------- files */

/* Reads a file. Returns its bytes, or NULL on failure. */
static uint8_t *read_file(const char *path, size_t *length)
{
    size_t room = 1 << 16;
    uint8_t *bytes = malloc(room);
    FILE *stream = fopen(path, "rb");
    *length = 0;
    while (bytes != NULL && stream != NULL) {
        *length += fread(bytes + *length, 1, room - *length, stream);
        if (*length < room) {
            break;
        }
        uint8_t *more = room <= SIZE_MAX / 2 ? realloc(bytes, room * 2) : NULL;
        if (more == NULL) {
            free(bytes);
        }
        bytes = more;
        room *= 2;
    }
    if (stream == NULL || ferror(stream)) {
        free(bytes);
        bytes = NULL;
    }
    if (stream != NULL) {
        fclose(stream);
    }
    return bytes;
}

/* Writes FOLDER/NUMBERsuffix; does nothing if `bytes` is NULL. Returns false on failure. */
static bool write_file(const char *folder, size_t number, const char *suffix, const uint8_t *bytes, size_t length)
{
    if (bytes == NULL) {
        return true;
    }
    size_t room = strlen(folder) + strlen(suffix) + 32;
    char *path = malloc(room);
    if (path == NULL) {
        return false;
    }
    snprintf(path, room, "%s/%zu%s", folder, number, suffix);
    FILE *stream = fopen(path, "wb");
    free(path);
    if (stream == NULL) {
        return false;
    }
    bool written = fwrite(bytes, 1, length, stream) == length;
    return fclose(stream) == 0 && written;
}

/* ------------------------------------------------------------------------------------------------ commands */

static bool write_tensor(const char *folder, size_t number, const sfp_tensor *t, const sfp_decoded *got)
{
    size_t n = (size_t)t->positions; /* fits, because the tensor is in memory */
    return write_file(folder, number, ".bin", got->values, n * t->element_bytes) &&
           write_file(folder, number, ".mask.bin", got->mask, n) &&
           write_file(folder, number, ".importance.bin", got->importance, n * 4);
}

/* Decodes a tensor into a folder. Returns VALID; on failure, prints a line and returns its status. */
static int decode_tensor(const sfp_file *file, size_t number, const char *folder)
{
    sfp_tensor tensor;
    sfp_decoded got;
    sfp_fault fault;
    if (sfp_describe(file, number, &tensor) != SFP_OK) {
        return print_failure("there is no tensor with this number");
    }
    unsigned wanted = SFP_VALUES | SFP_IMPORTANCE | (tensor.pruned ? (unsigned)SFP_MASK : 0);
    sfp_status status = sfp_decode(file, number, wanted, &got, &fault);
    if (status != SFP_OK) {
        return print_outcome(status, &fault);
    }
    bool written = write_tensor(folder, number, &tensor, &got);
    sfp_release(file, &got);
    return written ? VALID : print_failure("a file cannot be written");
}

static int check_tensor(const sfp_file *file, size_t number)
{
    sfp_fault fault;
    sfp_status status = sfp_check(file, number, &fault);
    return status == SFP_OK ? VALID : print_outcome(status, &fault);
}

/* Checks all tensors; decodes them into `folder` if it is not NULL. */
static int treat_bytes(const uint8_t *bytes, size_t length, const sfp_limits *limits, const char *folder)
{
    sfp_file *file;
    sfp_fault fault;
    sfp_status status = sfp_open(bytes, length, limits, NULL, &file, &fault);
    if (status != SFP_OK) {
        return print_outcome(status, &fault);
    }
    int outcome = VALID;
    for (size_t i = 0; outcome == VALID && i < sfp_tensor_count(file); i++) {
        outcome = folder != NULL ? decode_tensor(file, i, folder) : check_tensor(file, i);
    }
    if (outcome == VALID) {
        outcome = print_manifest(file);
    }
    sfp_close(file);
    return outcome;
}

static int treat_file(const char *path, const sfp_limits *limits, const char *folder)
{
    size_t length;
    uint8_t *bytes = read_file(path, &length);
    if (bytes == NULL) {
        return print_failure("the file cannot be read");
    }
    int outcome = treat_bytes(bytes, length, limits, folder);
    free(bytes);
    return outcome;
}

static int print_result(const sfp_file *file, const sfp_result *result)
{
    fputs("{\"ok\":true,", stdout);
    print_metadata(file);
    fputs(",\"tensors\":[", stdout);
    for (size_t i = 0; i < result->count; i++) {
        const sfp_result_tensor *t = &result->tensors[i];
        fputs(i > 0 ? ",{\"name\":" : "{\"name\":", stdout);
        print_span(t->name);
        printf(",\"dtype\":\"%s\",\"shape\":[", t->dtype);
        for (size_t k = 0; k < t->rank; k++) {
            printf("%s%" PRIu64, k > 0 ? "," : "", t->shape[k]);
        }
        fputs("]}", stdout);
    }
    puts("]}");
    return VALID;
}

/* Applies an open delta to an open base, and writes the result into a folder. */
static int apply_open(const sfp_file *file, const sfp_file *base, const char *folder)
{
    sfp_result result;
    sfp_fault fault;
    sfp_status status = sfp_apply(file, base, &result, &fault);
    if (status != SFP_OK) {
        return status == SFP_MISUSE ? print_failure("the file is not a delta") : print_outcome(status, &fault);
    }
    bool written = true;
    for (size_t i = 0; written && i < result.count; i++) {
        const sfp_result_tensor *t = &result.tensors[i];
        size_t positions = 1;
        for (size_t k = 0; k < t->rank; k++) {
            positions *= (size_t)t->shape[k];
        }
        written = write_file(folder, i, ".bin", t->values, (size_t)t->bytes) &&
                  (t->mask == NULL || write_file(folder, i, ".mask.bin", t->mask, positions)) &&
                  (t->importance == NULL || write_file(folder, i, ".importance.bin", t->importance, 4 * positions));
    }
    int outcome = written ? print_result(file, &result) : print_failure("a file cannot be written");
    sfp_release_result(file, &result);
    return outcome;
}

static int apply_file(const char *path, const char *base_path, const sfp_limits *limits, const char *folder)
{
    size_t length, base_length;
    sfp_file *file = NULL, *base = NULL;
    sfp_fault fault;
    uint8_t *bytes = read_file(path, &length), *base_bytes = read_file(base_path, &base_length);
    int outcome = FAILED;
    if (bytes == NULL || base_bytes == NULL) {
        outcome = print_failure("a file cannot be read");
    } else {
        sfp_status status = sfp_open(bytes, length, limits, NULL, &file, &fault);
        if (status == SFP_OK) {
            status = sfp_open(base_bytes, base_length, limits, NULL, &base, &fault);
        }
        outcome = status == SFP_OK ? apply_open(file, base, folder) : print_outcome(status, &fault);
    }
    sfp_close(file);
    sfp_close(base);
    free(bytes);
    free(base_bytes);
    return outcome;
}

static unsigned digit_of(uint8_t c)
{
    return c <= '9' ? (unsigned)(c - '0') : (unsigned)(c - 'a' + 10);
}

/* The answers of a keyed table. */
typedef struct answers {
    float *weights, *importance;
    uint8_t *known;
} answers;

/* Looks up all keys of a text with one key per line, in hexadecimal. `key` has room for the longest. Returns their
 * number. With NULL as answers, only counts them. */
static size_t look_up_lines(const sfp_keyed *table, size_t outputs, const uint8_t *text, size_t length, uint8_t *key,
                            answers *out)
{
    size_t count = 0, size = 0;
    for (size_t at = 0; at < length;) {
        if (text[at] != '\n') {
            key[size++] = (uint8_t)(digit_of(text[at]) << 4 | digit_of(text[at + 1]));
            at += 2;
            continue;
        }
        if (out != NULL) {
            out->known[count] = sfp_look_up(table, key, size, out->weights + count * outputs, out->importance + count);
        }
        count++;
        size = 0;
        at++;
    }
    return count;
}

/* Prints the description of an array of answers. */
static void print_answer(const char *before, sfp_span name, const char *suffix, const char *dtype, size_t count,
                         size_t outputs)
{
    printf("%s{\"name\":\"%.*s%s\",\"dtype\":\"%s\",\"shape\":[%zu", before, (int)name.length,
           (const char *)name.bytes, suffix, dtype, count);
    printf(outputs > 0 ? ",%zu]}" : "]}", outputs);
}

/* Stores numbers as little-endian F32, in place. Returns their bytes. */
static const uint8_t *stored_floats(float *numbers, size_t count)
{
    uint8_t *bytes = (uint8_t *)numbers;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, bytes + 4 * i, 4);
        for (size_t k = 0; k < 4; k++) {
            bytes[4 * i + k] = (uint8_t)(bits >> 8 * k);
        }
    }
    return bytes;
}

/* Writes the answers of a keyed table as files from `*number` on, and prints their descriptions. */
static bool write_answers(const sfp_table *told, const answers *found, size_t count, const char *folder, size_t *number)
{
    bool written = write_file(folder, *number, ".bin", stored_floats(found->weights, count * told->outputs),
                              4 * count * told->outputs);
    print_answer(*number > 0 ? "," : "", told->name, "", "F32", count, told->outputs);
    ++*number;
    written = written && write_file(folder, *number, ".bin", found->known, count);
    print_answer(",", told->name, ".known", "BOOL", count, 0);
    ++*number;
    if (told->importance) {
        written = written && write_file(folder, *number, ".bin", stored_floats(found->importance, count), 4 * count);
        print_answer(",", told->name, ".importance", "F32", count, 0);
        ++*number;
    }
    return written;
}

/* Looks up keys in a keyed table. Sets the status of the file. Returns false on a failure of the system. */
static bool look_up_table(const sfp_file *file, size_t table, const uint8_t *text, size_t length, const char *folder,
                          size_t *number)
{
    sfp_table told;
    sfp_keyed *opened;
    sfp_fault fault;
    if (sfp_describe_table(file, table, &told) != SFP_OK ||
        sfp_open_table(file, table, &opened, &fault) != SFP_OK) {
        return false;
    }
    uint8_t *key = malloc(length / 2 + 1);
    size_t count = key != NULL ? look_up_lines(opened, told.outputs, text, length, key, NULL) : 0;
    answers found = {malloc((count * told.outputs + 1) * sizeof(float)), malloc((count + 1) * sizeof(float)),
                     malloc(count + 1)};
    bool good = key != NULL && found.weights != NULL && found.importance != NULL && found.known != NULL;
    if (good) {
        look_up_lines(opened, told.outputs, text, length, key, &found);
        good = write_answers(&told, &found, count, folder, number);
    }
    sfp_close_table(opened);
    free(key);
    free(found.weights);
    free(found.importance);
    free(found.known);
    return good;
}

static int look_up_file(const char *path, const char *keys_path, const sfp_limits *limits, const char *folder)
{
    size_t length, text_length, number = 0;
    sfp_file *file = NULL;
    sfp_fault fault;
    uint8_t *bytes = read_file(path, &length), *text = read_file(keys_path, &text_length);
    int outcome = VALID;
    if (bytes == NULL || text == NULL) {
        outcome = print_failure("a file cannot be read");
    } else {
        sfp_status status = sfp_open(bytes, length, limits, NULL, &file, &fault);
        for (size_t i = 0; status == SFP_OK && i < sfp_table_count(file); i++) {
            sfp_keyed *table; /* a first time, so that nothing has been printed if a bit array is damaged */
            status = sfp_open_table(file, i, &table, &fault);
            sfp_close_table(table);
        }
        if (status != SFP_OK) {
            outcome = print_outcome(status, &fault);
        } else {
            bool good = true;
            fputs("{\"ok\":true,", stdout);
            print_metadata(file);
            fputs(",\"tensors\":[", stdout);
            for (size_t i = 0; good && i < sfp_table_count(file); i++) {
                good = look_up_table(file, i, text, text_length, folder, &number);
            }
            puts(good ? "]}" : "]} out of memory, or a file cannot be written");
            outcome = good ? VALID : FAILED;
        }
    }
    sfp_close(file);
    free(bytes);
    free(text);
    return outcome;
}

/* Opens a file in memory and decodes the weights of all tensors. Sets their number of bytes. */
static sfp_status decode_weights(const uint8_t *bytes, size_t length, const sfp_limits *limits, sfp_fault *fault,
                                 uint64_t *decoded)
{
    sfp_file *file;
    sfp_status status = sfp_open(bytes, length, limits, NULL, &file, fault);
    *decoded = 0;
    for (size_t i = 0; status == SFP_OK && i < sfp_tensor_count(file); i++) {
        sfp_tensor tensor;
        sfp_decoded got;
        sfp_describe(file, i, &tensor);
        status = sfp_decode(file, i, SFP_VALUES, &got, fault);
        sfp_release(file, &got);
        *decoded += tensor.positions * tensor.element_bytes;
    }
    sfp_close(file);
    return status;
}

static int time_file(const char *path, long rounds, const sfp_limits *limits)
{
    size_t length;
    uint64_t decoded = 0;
    double least = 0;
    sfp_fault fault;
    sfp_status status = SFP_OK;
    uint8_t *bytes = read_file(path, &length);
    if (bytes == NULL) {
        return print_failure("the file cannot be read");
    }
    for (long round = 0; status == SFP_OK && round < rounds; round++) {
        clock_t start = clock();
        status = decode_weights(bytes, length, limits, &fault, &decoded);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        least = round == 0 || seconds < least ? seconds : least;
    }
    free(bytes);
    if (status != SFP_OK) {
        return print_outcome(status, &fault);
    }
    printf("{\"ok\":true,\"bytes\":%" PRIu64 ",\"seconds\":%.6f}\n", decoded, least);
    return VALID;
}

/* Runs a command other than `serve`. Returns its exit status. */
static int obey(char **words, int count, const sfp_limits *limits)
{
    if (count == 1 && strcmp(words[0], "hello") == 0) {
        puts("{\"ok\":true,\"name\":\"sfp.c\",\"version\":\"1.0\",\"profile\":\"full\"}");
        return VALID;
    }
    if (count == 2 && strcmp(words[0], "validate") == 0) {
        return treat_file(words[1], limits, NULL);
    }
    if (count == 3 && strcmp(words[0], "decode") == 0) {
        return treat_file(words[1], limits, words[2]);
    }
    if (count == 3 && strcmp(words[0], "time") == 0) {
        return time_file(words[1], strtol(words[2], NULL, 10), limits);
    }
    if (count == 4 && strcmp(words[0], "apply") == 0) {
        return apply_file(words[1], words[2], limits, words[3]);
    }
    if (count == 4 && strcmp(words[0], "look-up") == 0) {
        return look_up_file(words[1], words[2], limits, words[3]);
    }
    return print_failure("usage: [LIMIT=NUMBER ...] validate FILE | decode FILE FOLDER | apply FILE BASE FOLDER | "
                         "look-up FILE KEYS FOLDER | time FILE ROUNDS | serve | hello");
}

/* Splits a line at its tabs. Returns the number of words, 5 for more than 4. */
static int split(char *line, char *words[4])
{
    int count = 0;
    line[strcspn(line, "\n")] = '\0';
    for (char *word = line; word != NULL;) {
        char *tab = strchr(word, '\t');
        if (count == 4) {
            return 5;
        }
        words[count++] = word;
        if (tab != NULL) {
            *tab++ = '\0';
        }
        word = tab;
    }
    return count;
}

static int serve(const sfp_limits *limits)
{
    char line[8192];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char *words[4];
        int count = split(line, words);
        obey(words, count, limits);
        if (fflush(stdout) != 0) {
            return FAILED;
        }
    }
    return ferror(stdin) ? FAILED : VALID;
}

/* Sets a limit from LIMIT=NUMBER: a limit of SPEC.md chapter 19 with underscores for spaces. Returns false if the
 * word is not a limit. */
static bool set_limit(sfp_limits *limits, const char *word)
{
    const struct {
        const char *name;
        uint64_t *limit;
    } known[] = {
        {"directory_bytes=", &limits->directory_bytes},
        {"depth=", &limits->depth},
        {"name_bytes=", &limits->name_bytes},
        {"tensors=", &limits->tensors},
        {"rank=", &limits->rank},
        {"tensor_bytes=", &limits->tensor_bytes},
        {"expansion=", &limits->expansion},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        size_t length = strlen(known[i].name);
        if (strncmp(word, known[i].name, length) == 0) {
            char *end;
            *known[i].limit = strtoull(word + length, &end, 10);
            return end > word + length && *end == '\0';
        }
    }
    return false;
}

int main(int count, char **words)
{
    sfp_limits limits = sfp_default_limits();
    int next = 1;
    while (next < count && set_limit(&limits, words[next])) {
        next++;
    }
    if (count - next == 1 && strcmp(words[next], "serve") == 0) {
        return serve(&limits);
    }
    int outcome = obey(words + next, count - next, &limits);
    return fflush(stdout) == 0 ? outcome : FAILED;
}
