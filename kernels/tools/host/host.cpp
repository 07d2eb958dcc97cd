// The kernels on the host: a library with a C interface. kernels/tools/shim.py builds and calls it.
#include <cstdlib>
#include <ucontext.h>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "host.h"
#include "host_tensor.h"
#include "decode.cu"

Dim threadIdx, blockIdx, blockDim;

namespace {

enum State { NEW, READY, AT_WARP, AT_BLOCK, DONE };
const size_t STACK = 1 << 16;  // bytes; all functions of a kernel take a tenth of it with sanitisers

struct Copy {
    u32 *to;
    const u32 *from;
    u32 words, group;
};

// Where a fiber, or the scheduler, resumes. Not `swapcontext`, which calls the system to save the signal mask, and makes
// the address sanitiser clear its information about a stack.
typedef void *Place[5];

struct Fiber {
    ucontext_t start;
    Place place;
    std::vector<char> stack;
    State state;
    unsigned parity;  // of the mailbox that the next exchange uses
    std::vector<Copy> copies;  // pending
    u32 group;                 // number of the current group of copies
};

Place scheduler;
std::vector<Fiber> fibers;
unsigned current, threads;
bool copies_wait;  // whether a copy runs only when its thread waits for it
Mail mailboxes[2][1024];
void (*body)(void *const *);
void *const *arguments;

// Other fibers run before such a function returns. Therefore its caller must not assume which registers it preserves
// (noipa). The stack stays valid for the return, which the sanitiser would not expect after a jump.
#define JUMPING __attribute__((noipa, no_sanitize_address))

// A separate function: `__builtin_longjmp` must not be in the same function as its `__builtin_setjmp`.
[[noreturn]] JUMPING void go_to(Place &place) { __builtin_longjmp(place, 1); }

JUMPING void wait_as(State state) {
    fibers[current].state = state;
    if (!__builtin_setjmp(fibers[current].place)) go_to(scheduler);
}

void run_body() {
    body(arguments);
    wait_as(DONE);
}

// Runs a thread until it waits or is done.
JUMPING void run_thread(unsigned thread) {
    current = threadIdx.x = thread;
    bool begins = fibers[thread].state == NEW;
    if (__builtin_setjmp(scheduler)) return;
    if (begins) setcontext(&fibers[thread].start);
    go_to(fibers[thread].place);
}

// Resumes the lanes of a warp if all of them wait for the warp.
void release_warp(unsigned warp) {
    for (unsigned t = warp; t < warp + 32; t++) {
        if (fibers[t].state != AT_WARP) return;
    }
    for (unsigned t = warp; t < warp + 32; t++) fibers[t].state = READY;
}

// Resumes the threads of a block if all of them wait for the block or are done.
void release_block() {
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state != AT_BLOCK && fibers[t].state != DONE) return;
    }
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state == AT_BLOCK) fibers[t].state = READY;
    }
}

// Runs a warp until it waits for the block or is done. Returns whether a thread ran.
bool run_warp(unsigned warp, bool backwards) {
    bool any = false;
    for (bool moved = true; moved; any |= moved) {
        moved = false;
        for (unsigned i = 0; i < 32; i++) {
            unsigned thread = warp + (backwards ? 31 - i : i);
            if (fibers[thread].state > READY) continue;
            run_thread(thread);
            moved = true;
        }
        release_warp(warp);
    }
    return any;
}

// Tells the sanitiser that a stack is unused: the last thread on it never returned from its functions.
void forget_frames(const std::vector<char> &stack) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.data(), stack.size());
#else
    (void)stack;
#endif
}

// Runs one block. Returns false if some threads wait for others that never reach the barrier. Backwards: runs the last
// thread first.
bool run_block(bool backwards) {
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = fibers[t];
        fiber.state = NEW;
        fiber.parity = 0;
        fiber.copies.clear();
        forget_frames(fiber.stack);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_body, 0);
    }
    // A warp runs as far as it can before the next one begins, which detects code that lacks a barrier.
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned warp = 0; warp < threads; warp += 32) {
            moved |= run_warp(backwards ? threads - 32 - warp : warp, backwards);
        }
        release_block();
    }
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state != DONE) return false;
    }
    return true;
}

template <class T> T argument(void *const *arguments, int i) { return *(T *)arguments[i]; }

struct Kernel {
    const char *name;
    void (*body)(void *const *);
};

#define DECODING(NAME)                                                                                        \
    {#NAME, [](void *const *a) {                                                                              \
         NAME(argument<const Job *>(a, 0), argument<const Part *>(a, 1), argument<u32 *>(a, 2),               \
              argument<u32 *>(a, 3), argument<u32 *>(a, 4), argument<u64>(a, 5));                             \
     }}

#define MULTIPLYING(NAME)                                                                                     \
    {#NAME, [](void *const *a) {                                                                              \
         NAME(argument<const Matrix *>(a, 0), argument<const Words *>(a, 1), argument<const void *>(a, 2),    \
              argument<void *>(a, 3), argument<float *>(a, 4), argument<u32 *>(a, 5), argument<u32>(a, 6),    \
              argument<u32>(a, 7));                                                                           \
     }}

#define COUNTING(NAME)                                                                                        \
    {#NAME, [](void *const *a) {                                                                              \
         NAME(argument<const ChangeTile *>(a, 0), argument<u32>(a, 1), argument<const KeyRange *>(a, 2),      \
              argument<u32 *>(a, 3), argument<const SumTables *>(a, 4));                                      \
     }}

#define PLACING(NAME)                                                                                         \
    {#NAME, [](void *const *a) {                                                                              \
         NAME(argument<const ChangeTile *>(a, 0), argument<u32>(a, 1), argument<const KeyRange *>(a, 2),      \
              argument<const u32 *>(a, 3), argument<u8 *>(a, 4), argument<u32 *>(a, 5), argument<u32 *>(a, 6), \
              argument<const SumTables *>(a, 7));                                                             \
     }}

const Kernel KERNELS[] = {
    {"fill_tables",
     [](void *const *a) { fill_tables(argument<const Code *>(a, 0)); }},
    {"index_chunks",
     [](void *const *a) {
         index_chunks(argument<const Job *>(a, 0), argument<u32 *>(a, 1), argument<u32 *>(a, 2));
     }},
    DECODING(any_1),
    DECODING(any_2),
    DECODING(any_4),
    DECODING(any_8),
    DECODING(masks),
    DECODING(importances),
    DECODING(plain_2),
    DECODING(plain_4),
    DECODING(plain_8),
    DECODING(short_1),
    DECODING(short_2),
    DECODING(short_4),
    DECODING(sparse_2_1_one_short),
    DECODING(sparse_2_1_many_short),
    DECODING(sparse_2_1_many_long),
    DECODING(sparse_2_8_one_short),
    DECODING(sparse_2_8_many_short),
    DECODING(sparse_2_8_many_long),
    DECODING(dense_2_8_one_short),
    DECODING(dense_2_8_one_long),
    DECODING(dense_2_8_many_short),
    DECODING(dense_2_8_many_long),
    DECODING(dense_4_24_one_short),
    DECODING(dense_4_24_one_long),
    DECODING(dense_4_24_many_short),
    DECODING(dense_4_24_many_long),
    DECODING(dense_2_0),
    DECODING(dense_4_0),
    DECODING(windows_2_8),
    DECODING(windows_4_24),
    {"place_matrix",
     [](void *const *a) {
         place_matrix(
             argument<const Job *>(a, 0), argument<const Matrix *>(a, 1), argument<u32 *>(a, 2), argument<u32 *>(a, 3)
         );
     }},
    MULTIPLYING(multiply_bf16),
    MULTIPLYING(multiply_f16),
    MULTIPLYING(multiply_f32),
    COUNTING(count_keys_1),
    COUNTING(count_keys_2),
    COUNTING(count_keys_4),
    COUNTING(count_keys_8),
    PLACING(place_changes_1),
    PLACING(place_changes_2),
    PLACING(place_changes_4),
    PLACING(place_changes_8),
    {"sum_keys",
     [](void *const *a) { sum_keys(argument<const KeyRange *>(a, 0)); }},
    {"flip_elements",
     [](void *const *a) {
         flip_elements(
             argument<const ChangeTile *>(a, 0), argument<const u32 *>(a, 1), argument<const void *>(a, 2),
             argument<u32>(a, 3), argument<u32>(a, 4)
         );
     }},
};

}  // namespace

void wait_for_warp() { wait_as(AT_WARP); }
void wait_for_block() { wait_as(AT_BLOCK); }

void copy_words(u32 *to, const u32 *from, u32 words) {
    Fiber &own = fibers[current];
    if (copies_wait) own.copies.push_back({to, from, words, own.group});
    else memcpy(to, from, 4 * words);
}

void close_copies() { fibers[current].group++; }

void wait_for_groups(u32 but) {
    Fiber &own = fibers[current];
    size_t done = 0;
    for (; done < own.copies.size() && own.copies[done].group + but < own.group; done++) {
        const Copy &copy = own.copies[done];
        memcpy(copy.to, copy.from, 4 * copy.words);
    }
    own.copies.erase(own.copies.begin(), own.copies.begin() + (long)done);
}

void wait_for_copies() {
    close_copies();
    wait_for_groups(0);
}

const Mail *exchange(const Mail &mail) {
    Mail *box = mailboxes[fibers[current].parity ^= 1];
    box[current] = mail;
    unsigned warp = current / 32 * 32;
    wait_as(AT_WARP);
    return box + warp;
}

// Runs a kernel. Returns 0; or 1 if there is no kernel of that name, 2 if not all threads reach a barrier. Not
// thread-safe.
//
// Args: block: threads per block, a multiple of 32; args: the address of each argument.
extern "C" int launch(const char *name, unsigned blocks, unsigned block, int backwards, void *const *args) {
    for (const Kernel &kernel : KERNELS) {
        if (strcmp(kernel.name, name) != 0) continue;
        body = kernel.body;
        arguments = args;
        threads = block;
        copies_wait = backwards;
        blockDim.x = block;
        while (fibers.size() < block) {
            fibers.emplace_back();
            fibers.back().stack.resize(STACK);
        }
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
            if (!run_block(backwards)) return 2;
        }
        return 0;
    }
    return 1;
}

// Returns the sizes of the records in bytes, which a test compares with sfpformat/engines/cuda/layout.py.
extern "C" void record_sizes(unsigned *sizes) {
    sizes[0] = sizeof(Stream);
    sizes[1] = sizeof(Recipe);
    sizes[2] = sizeof(Job);
    sizes[3] = sizeof(Part);
    sizes[4] = sizeof(Code);
    sizes[5] = sizeof(Matrix);
    sizes[6] = sizeof(ChangeTile);
    sizes[7] = sizeof(KeyRange);
    sizes[8] = sizeof(SumTables);
}

// Call `rounded` and `widened` of values.cuh, for tests of all patterns.
extern "C" unsigned round_number(float number, unsigned dtype) { return rounded(number, dtype); }
extern "C" float widen_pattern(unsigned pattern, unsigned dtype) { return widened(pattern, dtype); }
