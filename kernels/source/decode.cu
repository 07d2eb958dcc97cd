// The kernels. Each determines its part of the work and calls the functions of the other files.
//
// A block has `WARPS` warps. `parts` has the job of each warp and which segments of the job the warp decodes (32, or
// with windows `segments_a_warp`), or IDLE. If a kernel has tables in shared memory, all warps of a block decode the
// same tensor, that of the first warp.
#include "changes.cuh"
#include "parts.cuh"
#include "product.cuh"
#include "sparse.cuh"
#include "windows.cuh"

enum : u32 { IDLE = 0xFFFFFFFF };

struct Part {
    u32 job;
    u32 group;  // index of the warp's segments in the job's run
};

// A code whose look-up table must be filled.
struct Code {
    u64 recipe;  // address
    u32 stream, code;
};

// Fills the look-up tables of codes, one block per code.
extern "C" __global__ void fill_tables(const Code *codes) {
    const Code &own = codes[blockIdx.x];
    u8 *bytes = (u8 *)own.recipe;
    const Stream &stream = ((const Recipe *)bytes)->streams[own.stream];
    const u16 *lengths = (const u16 *)(bytes + stream.lengths) + 16 * own.code;
    const u16 *symbols = (const u16 *)(bytes + stream.symbols) + 256 * own.code;
    u32 *entries = (u32 *)(bytes + stream.entries) + ((u64)own.code << stream.bits);
    for (u32 window = threadIdx.x; window < 1u << stream.bits; window += blockDim.x) {
        entries[window] = fill_entry(lengths, symbols, stream.bits, window);
    }
}

// Fills the index of chunks, one block per job. `status`: one word per job, initially 0; kernels add the error bits of
// all segments of the job.
extern "C" __global__ void index_chunks(const Job *jobs, u32 *index, u32 *status) {
    __shared__ IndexMemory memory;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 wrong = index_chunk(jobs[blockIdx.x], warp, lane, index, memory);
    if (wrong) atomicOr(&status[blockIdx.x], wrong);
}

// Stores the error word of each segment of a warp, and adds its bits to the status word of the job.
__device__ inline void report(const Job &job, u32 s, u32 wrong, u32 *errors, u32 *status) {
    if (s < job.stop) errors[job.errors + (s - job.first)] = wrong;
    if (wrong) atomicOr(status, wrong);
}

__device__ inline Warp warp_of(const Job *jobs, Part part, u64 out) {
    const Job &job = jobs[part.job];
    Warp warp = {(const Recipe *)job.recipe, &job, job.first + WARP * part.group, out + job.out};
    return warp;
}

// Returns whether a job has failed already. All lanes get the same result, even while other warps write the word.
__device__ inline bool is_lost(u32 status) { return __any_sync(ALL_LANES, status != 0); }

// Decodes 32 segments per warp by a function that writes tiles of elements of ITEM bytes.
template <u32 ITEM, u32 (*DECODE)(const Warp &, u32 *, u32 *, u32)>
__device__ inline void run_tiles(
    const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out
) {
    __shared__ u32 tiles[WARPS][WARP * row_words(ITEM)];
    u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Part part = parts[blockIdx.x * WARPS + own];
    if (part.job == IDLE || is_lost(status[part.job])) return;
    Warp warp = warp_of(jobs, part, out);
    u32 wrong = DECODE(warp, index, tiles[own], lane);
    report(*warp.job, warp.first + lane, wrong, errors, status + part.job);
}

template <u32 ITEM, u32 WIDTH, Tables TABLES>
__device__ inline void run_dense(
    const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out
) {
    __shared__ DenseMemory<ITEM, WIDTH, TABLES> memory;
    u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    fill_dense_tables<TABLES>(*warp_of(jobs, parts[blockIdx.x * WARPS], out).recipe, memory.tables, threadIdx.x);
    __syncthreads();
    Part part = parts[blockIdx.x * WARPS + own];
    if (part.job == IDLE || is_lost(status[part.job])) return;
    Warp warp = warp_of(jobs, part, out);
    u32 wrong = decode_dense<ITEM, WIDTH, TABLES>(warp, index, memory, own, lane);
    report(*warp.job, warp.first + lane, wrong, errors, status + part.job);
}

template <u32 ITEM>
__device__ inline void run_short(
    const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out
) {
    __shared__ u32 tiles[WARPS][WARP * row_words(ITEM)];
    __shared__ ShortMemory memory;
    u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    fill_memory(*warp_of(jobs, parts[blockIdx.x * WARPS], out).recipe, memory, threadIdx.x);
    __syncthreads();
    Part part = parts[blockIdx.x * WARPS + own];
    if (part.job == IDLE || is_lost(status[part.job])) return;
    Warp warp = warp_of(jobs, part, out);
    u32 wrong = decode_short<ITEM>(warp, index, tiles[own], memory, lane);
    report(*warp.job, warp.first + lane, wrong, errors, status + part.job);
}

template <bool LONG, u32 WIDTH, u32 CODES>
__device__ inline void run_sparse(
    const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out
) {
    __shared__ SparseMemory<LONG, WIDTH, CODES> memory;
    u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    fill_sparse<WIDTH, CODES>(*warp_of(jobs, parts[blockIdx.x * WARPS], out).recipe, memory.tables, threadIdx.x);
    __syncthreads();
    Part part = parts[blockIdx.x * WARPS + own];
    if (part.job == IDLE || is_lost(status[part.job])) return;
    Warp warp = warp_of(jobs, part, out);
    u32 wrong = decode_sparse<LONG, WIDTH, CODES>(warp, index, memory, own, lane);
    report(*warp.job, warp.first + lane, wrong, errors, status + part.job);
}

template <u32 ITEM>
__device__ inline void run_windows(
    const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out
) {
    __shared__ WindowMemory memory;
    u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Part part = parts[blockIdx.x * WARPS + own];
    if (part.job == IDLE || is_lost(status[part.job])) return;
    Warp warp = warp_of(jobs, part, out);
    u32 segments = segments_a_warp(warp.recipe->segment);
    warp.first = warp.job->first + segments * part.group;
    u32 wrong = decode_windows<ITEM>(warp, index, lane, memory.tiles[own]);
    if (lane < segments) report(*warp.job, warp.first + lane, wrong, errors, status + part.job);
}

// On compute capability 10.0, the same code needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define AT_LEAST(BLOCKS) ((BLOCKS) < 7 ? (BLOCKS) : 7)
#else
#define AT_LEAST(BLOCKS) (BLOCKS)
#endif

// `out`: a base that is added to the output addresses of the jobs.
#define KERNEL(NAME, BLOCKS, BODY)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, AT_LEAST(BLOCKS)) NAME(                                       \
        const Job *jobs, const Part *parts, u32 *index, u32 *status, u32 *errors, u64 out                     \
    ) {                                                                                                       \
        BODY(jobs, parts, index, status, errors, out);                                                        \
    }

// Any tensor, by bytes per weight. The second argument is the minimum number of blocks per multiprocessor.
KERNEL(any_1, 2, (run_tiles<1, decode_any<1, false>>))
KERNEL(any_2, 2, (run_tiles<2, decode_any<2, false>>))
KERNEL(any_4, 2, (run_tiles<4, decode_any<4, false>>))
KERNEL(any_8, 2, (run_tiles<8, decode_any<8, false>>))
// The mask of any tensor that has one, and the importance of any tensor that has importances.
KERNEL(masks, 4, (run_tiles<1, decode_masks>))
KERNEL(importances, 3, (run_tiles<4, decode_importances>))
// Tensors whose levels are bit patterns, or indices in a table of bit patterns.
KERNEL(plain_2, 3, (run_tiles<2, decode_any<2, true>>))
KERNEL(plain_4, 3, (run_tiles<4, decode_any<4, true>>))
KERNEL(plain_8, 3, (run_tiles<8, decode_any<8, true>>))
// The same, for levels of at most 16 bits and at most 8 codes per stream.
KERNEL(short_1, 4, (run_short<1>))
KERNEL(short_2, 4, (run_short<2>))
KERNEL(short_4, 4, (run_short<4>))
// Tensors of 2 bytes per weight. 2_1: quantised; levels are a codeword and a sign each, or have one width; the mask has
// octets, or there is no mask. 2_8: exact; levels are a codeword and a byte each; the mask has octets. Streams of one
// code or of many; short: codewords of at most 8 bits.
KERNEL(sparse_2_1_one_short, 8, (run_sparse<false, 1, 1>))
KERNEL(sparse_2_1_many_short, 6, (run_sparse<false, 1, SHORT_CODES>))
KERNEL(sparse_2_1_many_long, 5, (run_sparse<true, 1, SHORT_CODES>))
KERNEL(sparse_2_8_one_short, 6, (run_sparse<false, 8, 1>))
KERNEL(sparse_2_8_many_short, 5, (run_sparse<false, 8, SHORT_CODES>))
KERNEL(sparse_2_8_many_long, 4, (run_sparse<true, 8, SHORT_CODES>))
// Dense exact tensors, by bytes per weight and residual bits (0: any). One code or many; short: codewords of at most 8
// bits.
KERNEL(dense_2_8_one_short, 8, (run_dense<2, 8, ONE_SHORT>))
KERNEL(dense_2_8_one_long, 6, (run_dense<2, 8, ONE_LONG>))
KERNEL(dense_2_8_many_short, 7, (run_dense<2, 8, MANY_SHORT>))
KERNEL(dense_2_8_many_long, 6, (run_dense<2, 8, MANY_LONG>))
KERNEL(dense_4_24_one_short, 8, (run_dense<4, 24, ONE_SHORT>))
KERNEL(dense_4_24_one_long, 6, (run_dense<4, 24, ONE_LONG>))
KERNEL(dense_4_24_many_short, 8, (run_dense<4, 24, MANY_SHORT>))
KERNEL(dense_4_24_many_long, 6, (run_dense<4, 24, MANY_LONG>))
KERNEL(dense_2_0, 5, (run_dense<2, 0, MANY_LONG>))
KERNEL(dense_4_0, 5, (run_dense<4, 0, MANY_LONG>))
// The same with windows, by bytes per weight and residual bits.
KERNEL(windows_2_8, 8, (run_windows<2>))
KERNEL(windows_4_24, 6, (run_windows<4>))

// ------------------------------------------------------------------------------------------------- products

// Prepares a matrix for products, one block per job. Each job is a whole chunk whose index was filled. `status`: as for
// `index_chunks`.
extern "C" __global__ void place_matrix(const Job *jobs, const Matrix *matrix, u32 *index, u32 *status) {
    if (is_lost(status[blockIdx.x])) return;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 wrong = place_rows(jobs[blockIdx.x], *matrix, index, warp, lane);
    if (wrong) atomicOr(&status[blockIdx.x], wrong);
}

// Computes y = x @ matrix.T + bias; see `Call` for the arguments. Consecutive blocks have the slices of the same rows.
#define MULTIPLY(NAME, BLOCKS, KIND, PARTS)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                       \
        const Matrix *matrix, const Words *x, const void *bias, void *y, float *sums, u32 *done, u32 batch,   \
        u32 units                                                                                             \
    ) {                                                                                                       \
        __shared__ ProductMemory<PARTS> memory;                                                               \
        Call call = {x, bias, y, sums, done, batch, units};                                                   \
        if (HAS_TENSORS) multiply<KIND, PARTS>(*matrix, memory, call);                                        \
    }

MULTIPLY(multiply_bf16, 4, OF_BF16, 1)
MULTIPLY(multiply_f16, 4, OF_F16, 1)
// Each number of 24 significant bits is split into three of 8.
MULTIPLY(multiply_f32, 3, OF_BF16, 3)

// ------------------------------------------------------------------------------------------------- changes

// Counts the keys of each tile, and stores the sum of its elements; see changes.cuh. By bytes per element.
#define COUNT(NAME, BLOCKS, ELEMENT)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                       \
        const ChangeTile *tiles, u32 count, const KeyRange *ranges, u32 *sums, const SumTables *tables        \
    ) {                                                                                                       \
        __shared__ CountMemory memory;                                                                        \
        u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP, index;                                       \
        if (!start_tiles(count, tables, memory.tables, index)) return;                                        \
        ChangeTile tile = tiles[index];                                                                       \
        KeyRange range = {};                                                                                  \
        if (tile.range != NO_RANGE) range = ranges[tile.range];                                               \
        u32 sum = count_tile<ELEMENT>(tile, index, range, memory.tables, memory.counts[own], lane);           \
        if (lane == 0) sums[index] = sum;                                                                     \
    }

// Finds the changes of each tile, and stores the sum of their bits.
#define PLACE(NAME, BLOCKS, ELEMENT)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                       \
        const ChangeTile *tiles, u32 count, const KeyRange *ranges, const u32 *ranks, u8 *patterns,           \
        u32 *places, u32 *sums, const SumTables *tables                                                       \
    ) {                                                                                                       \
        __shared__ PlaceMemory memory;                                                                        \
        u32 own = threadIdx.x / WARP, lane = threadIdx.x % WARP, index;                                       \
        if (!start_tiles(count, tables, memory.tables, index)) return;                                        \
        ChangeTile tile = tiles[index];                                                                       \
        ChangeList list = {ranks, patterns, places};                                                          \
        u32 sum = 0;                                                                                          \
        if (tile.range != NO_RANGE) {                                                                         \
            sum = place_tile<ELEMENT>(tile, index, ranges[tile.range], list, memory.tables, memory.ranks[own], lane); \
        }                                                                                                     \
        if (lane == 0) sums[index] = sum;                                                                     \
    }

COUNT(count_keys_1, 8, u8)
COUNT(count_keys_2, 8, u16)
COUNT(count_keys_4, 8, u32)
COUNT(count_keys_8, 8, u64)
PLACE(place_changes_1, 7, u8)
PLACE(place_changes_2, 7, u16)
PLACE(place_changes_4, 7, u32)
PLACE(place_changes_8, 7, u64)

// Sums the counts of the tiles of each range, with `KEY_GROUPS` blocks per range.
extern "C" __global__ void sum_keys(const KeyRange *ranges) {
    __shared__ u32 sums[WARPS][WARP];
    KeyRange range = ranges[blockIdx.x / KEY_GROUPS];
    u32 lane = threadIdx.x % WARP, key = blockIdx.x % KEY_GROUPS * WARP + lane;
    if (key - lane < range.keys) sum_counts(range, key, threadIdx.x / WARP, lane, sums);
}

// Flips the bits of changed elements, one change per thread. `bytes`: of an element.
extern "C" __global__ void flip_elements(
    const ChangeTile *tiles, const u32 *places, const void *patterns, u32 count, u32 bytes
) {
    u32 change = blockIdx.x * THREADS + threadIdx.x;
    if (change >= count || places[change] == NO_CHANGE) return;
    u32 place = places[change];
    if (bytes == 1) flip<u8>(tiles, place, patterns, change);
    else if (bytes == 2) flip<u16>(tiles, place, patterns, change);
    else if (bytes == 4) flip<u32>(tiles, place, patterns, change);
    else flip<u64>(tiles, place, patterns, change);
}
