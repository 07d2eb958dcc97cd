// Products with a matrix that stays compressed. Weights go from the bytes of the file to registers, and from there into
// tensor cores; they are never in memory.
//
// Theory of operation. A warp has 16 rows, and 512 columns of them at a time. Four lanes, a *quad*, share the rows g
// and g + 8, where each lane has 128 neighbouring columns, the same in both: 16 bytes of the mask, loaded at once. Its
// levels begin where those of the lanes before it end, which the bits of the mask tell. All levels of a row lie
// together; the quad copies them to shared memory, 16 bytes a copy, while the warp computes with those before.
//
//   32 columns    a word of the mask, and the 32 levels that begin with its first survivor's, in four words
//   4 columns     four levels, which operands.cuh turns into two words of two weights, zeros between
//   8 × 32 lanes  two steps of `multiply_add`: 16 rows, 16 columns a step. Which columns a step has does not matter,
//                 as long as those of x are the same: eight of each lane of a quad
//
// What is needed next is on its way meanwhile: the mask of the next tile of 512 columns in registers that nobody looks
// at before; its levels to shared memory, as soon as the last of this tile are in registers; those of the tile after it
// to the cache of all multiprocessors; and x, of which there is room for a few tiles, where a block has more.
//
// Bounds: beyond the matrix there are no mask bits; copies end with the file; of a row a quad never takes more than
// 512 levels, for which there is room, whatever the mask says.
#pragma once
#include "operands.cuh"

enum : u32 {
    TILE = 512,  // columns of a warp at a time
    WARP_ROWS = 16,
    BLOCK_ROWS = WARPS * WARP_ROWS,
    MAX_BATCH = 8,
    LEVELS_A_COPY = 32,
    // Words of the levels of a row: of 512, of up to 31 before them, four more that are read, and what it takes for
    // the rows to begin in different banks.
    ROW_WORDS = 76
};

// ------------------------------------------------------------------------------------------------- rows

// A lane's part of a row, as the warp goes along it.
struct Row {
    const Words *mask;  // of the next tile, had the chunk no other parts before its mask
    u32 before;         // bytes of these
    u32 runs;           // how many this lane has left; none in rows beyond the matrix
    Words words;        // of the mask of the tile that comes next
    u32 own;            // how many survivors they have
    u32 level;          // where the quad's levels of that tile begin, from the first of the file
    u32 all;            // how many it has
    u32 at;             // where this lane's begin in shared memory
    u32 *levels;        // the row in shared memory
};

// The levels of all rows, as they lie in the file.
struct StoredLevels {
    const Words *data;
    u32 count;  // of 32 each
};

// Where a part of a row begins. Args: unit: its first; columns: how many it has at most.
__device__ inline Row open_row(const Matrix &matrix, u32 number, u32 unit, u32 columns, u32 lane, u32 *levels) {
    Row row = {};
    row.levels = levels;
    if (number >= matrix.rows) return row;
    u32 column = unit * UNIT + lane % 4 * RUN, stop = least(unit * UNIT + columns, matrix.columns);
    u32 units = (matrix.columns + UNIT - 1) / UNIT;
    u64 bit = (u64)(number % matrix.chunk_rows) * matrix.columns + column;
    row.mask = (const Words *)(matrix.data + bit / 8);
    row.before = ((const u32 *)matrix.masks)[number / matrix.chunk_rows];
    row.level = ((const u32 *)matrix.places)[(u64)number * units + unit];
    if (column < stop) row.runs = (stop - column + TILE - 1) / TILE;
    return row;
}

// Loads the mask of the next tile.
__device__ inline void load_mask(Row &row, bool masked) {
    u32 all = masked || row.runs == 0 ? 0 : 0xFFFFFFFF;
    row.words = {all, all, all, all};
    if (row.runs && masked) row.words = *(const Words *)((const u8 *)row.mask + row.before);
    row.mask += TILE / RUN;
    if (row.runs) row.runs--;
}

// Counts the levels of the next tile, whose mask was loaded, and goes past those of the one before.
__device__ inline void count_levels(Row &row, u32 lane) {
    u32 quad = lane % 4;
    row.level += row.all;
    row.own = __popc(row.words.a) + __popc(row.words.b) + __popc(row.words.c) + __popc(row.words.d);
    u32 end = row.own;
#pragma unroll
    for (u32 step = 1; step < 4; step *= 2) {
        u32 below = (u32)__shfl_up_sync(ALL_LANES, end, step);
        if (quad >= step) end += below;
    }
    row.all = (u32)__shfl_sync(ALL_LANES, end, lane | 3);
    row.at = row.level % LEVELS_A_COPY + end - row.own;
}

// Begins to copy them to shared memory.
__device__ inline void copy_levels(const StoredLevels &levels, const Row &row, u32 lane) {
    u32 stop = least((row.level + row.all + LEVELS_A_COPY - 1) / LEVELS_A_COPY, levels.count);
    Words *to = (Words *)row.levels + lane % 4;
#pragma unroll 1
    for (u32 i = row.level / LEVELS_A_COPY + lane % 4; i < stop; i += 4, to += 4) copy_ahead(to, levels.data + i);
}

// What a warp has of a tile: both rows of each lane.
struct Rows {
    Row above, below;
};

__device__ inline void load_masks(Rows &rows, bool masked) {
    load_mask(rows.above, masked);
    load_mask(rows.below, masked);
}

__device__ inline void count_levels(Rows &rows, u32 lane) {
    count_levels(rows.above, lane);
    count_levels(rows.below, lane);
}

// Begins to copy the levels of the next tile.
__device__ inline void copy_levels(const StoredLevels &levels, const Rows &rows, u32 lane) {
    copy_levels(levels, rows.above, lane);
    copy_levels(levels, rows.below, lane);
}

// ------------------------------------------------------------------------------------------------- products

template <u32 PARTS> struct ProductMemory {
    // Octets of x: 8 columns of x, or 4 in three parts, as far as a unit goes.
    static const u32 OCTETS_OF_X = (PARTS == 1 ? MAX_BATCH : MAX_BATCH / 2 * PARTS) * UNIT / 8;
    Words x[OCTETS_OF_X + 1];  // the last one is zero
    Words levels[WARPS][WARP_ROWS * ROW_WORDS / 4];
    u32 selectors[ALL_OCTETS];
    u32 is_last;
};

// The columns of x that a block takes: a tile after the other, of which there is room for a few, two at least.
template <u32 PARTS> struct Activations {
    const Words *x;
    u32 columns, batch;
    u32 first;  // the first column of the block
    u32 tiles;
    u32 octets;  // of a tile in shared memory: of all rows and parts
    u32 room;    // for tiles
};

template <u32 PARTS>
__device__ inline Activations<PARTS> activations_of(
    const Matrix &matrix, const Words *x, u32 batch, u32 first, u32 columns
) {
    u32 octets = TILE / 8 * PARTS * batch;
    u32 room = ProductMemory<PARTS>::OCTETS_OF_X / octets;
    return {x, matrix.columns, batch, first, (columns + TILE - 1) / TILE, octets, room};
}

// Begins to put a tile of x into shared memory in the order in which lanes take it: of one octet after another of a
// lane's run the rows of x, and of each of these the four lanes of a quad. Beyond the matrix x is zero. Args: place:
// under `Activations::room`.
template <Kind KIND, u32 PARTS>
__device__ inline void fill_x(
    ProductMemory<PARTS> &memory, const Activations<PARTS> &own, u32 tile, u32 place, u32 thread
) {
    const Words zero = {0, 0, 0, 0};
    u32 of_part = TILE / 8 * own.batch;
    Words *tile_in_memory = memory.x + place * own.octets;
    for (u32 i = thread; i < of_part; i += THREADS) {
        // Two neighbours are 32 bytes of memory; those of a quad lie together in shared memory.
        u32 quad = i / 2 % 4, in_run = i / 8 % 8 * 2 + i % 2, row = i / (TILE / 8);
        u32 column = own.first + tile * TILE + quad * RUN + 8 * in_run;
        Words *to = tile_in_memory + (in_run * own.batch + row) * 4 + quad;
        bool there = column < own.columns;
        u64 from = ((u64)row * own.columns + column) / 8;
        if (PARTS == 1) {
            if (there) copy_ahead(to, own.x + from);
            else *to = zero;
            continue;
        }
        Words low = there ? own.x[2 * from] : zero, high = there ? own.x[2 * from + 1] : zero;
        u32 bits[8] = {low.a, low.b, low.c, low.d, high.a, high.b, high.c, high.d};
        float numbers[8], uppers[8];
#pragma unroll
        for (u32 k = 0; k < 8; k++) numbers[k] = __uint_as_float(bits[k]);
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            take_uppers<8>(numbers, uppers);
            to[part * of_part] = {
                two_rounded<KIND>(uppers[0], uppers[1]), two_rounded<KIND>(uppers[2], uppers[3]),
                two_rounded<KIND>(uppers[4], uppers[5]), two_rounded<KIND>(uppers[6], uppers[7])
            };
        }
    }
}

// Where a lane takes its octets of x.
struct Columns {
    const Words *next;
    u32 step;  // from octet to octet
    u32 part;  // from part to part
};

// Adds the products of an octet of each lane, in both rows. Of parts, those products count that are not below the last
// bit of the greatest.
template <Kind KIND, u32 PARTS>
__device__ inline void add_octet(float *sum, const u32 above[PARTS][4], const u32 below[PARTS][4], Columns &x) {
#pragma unroll
    for (u32 of_x = 0; of_x < PARTS; of_x++) {
        Words b = x.next[of_x * x.part];
#pragma unroll
        for (u32 part = 0; part + of_x < PARTS; part++) {
            multiply_add<KIND>(sum, above[part][0], below[part][0], above[part][1], below[part][1], b.a, b.b);
            multiply_add<KIND>(sum, above[part][2], below[part][2], above[part][3], below[part][3], b.c, b.d);
        }
    }
    x.next += x.step;
}

// Adds the products of 32 columns of each lane, in both rows. Args: above, below: words of the mask.
template <Kind KIND, u32 PARTS>
__device__ inline void add_word(
    float *sum, const u32 *selectors, const Looks<PARTS> looks[2], u32 above, u32 below, Queue of_above, Queue of_below,
    Columns &x
) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 octet = permuted(above, 0, 0x4440 + i), other = permuted(below, 0, 0x4440 + i);
        u32 weights[PARTS][4], others[PARTS][4];
        expand_octet(looks[0], of_above.words[0], octet, selectors[octet], weights);
        expand_octet(looks[1], of_below.words[0], other, selectors[other], others);
        add_octet<KIND, PARTS>(sum, weights, others, x);
        skip_octet(of_above, octet, 3 - i);
        skip_octet(of_below, other, 3 - i);
    }
}

// The sums of a warp's rows over the columns of its block: `sum` as `multiply_add` has it. Args: first: the first row;
// unit: the first of the columns.
template <Kind KIND, u32 PARTS>
__device__ inline void multiply_rows(
    const Matrix &matrix, ProductMemory<PARTS> &memory, const Activations<PARTS> &own, u32 first, u32 unit, u32 columns,
    u32 warp, u32 lane, float *sum
) {
    u32 g = lane / 4;
    u32 *in_memory = (u32 *)memory.levels + kept((warp * WARP_ROWS + g) * ROW_WORDS);
    StoredLevels levels = {(const Words *)matrix.data, (u32)(matrix.bytes / sizeof(Words))};
    bool masked = matrix.masked;
    Rows rows = {
        open_row(matrix, first + g, unit, columns, lane, in_memory),
        open_row(matrix, first + g + 8, unit, columns, lane, in_memory + 8 * ROW_WORDS)
    };
    // One thing after another is on its way while something else is done.
    for (u32 tile = 0; tile < least(own.tiles, own.room); tile++) fill_x<KIND>(memory, own, tile, tile, threadIdx.x);
    load_masks(rows, masked);
    if (threadIdx.x == 0) memory.x[ProductMemory<PARTS>::OCTETS_OF_X] = {0, 0, 0, 0};
    for (u32 i = threadIdx.x; i < ALL_OCTETS; i += THREADS) memory.selectors[i] = selectors_of(i);
    u32 row_runs = matrix.columns / RUN, run = (first + g) * row_runs + unit * (UNIT / RUN) + lane % 4;
    bool by_tile = matrix.scale_runs < row_runs;
    Looks<PARTS> looks[2];
    looks[0].ones = looks[1].ones = kept(0x01010101);
    load_looks<KIND>(matrix, run, looks[0]);
    load_looks<KIND>(matrix, run + 8 * row_runs, looks[1]);
    count_levels(rows, lane);
    copy_levels(levels, rows, lane);
    u32 place = 0;  // of the tile of x
#pragma unroll 1
    for (u32 tile = 0; tile < own.tiles; tile++) {
        if (tile && by_tile) {
            run += TILE / RUN;
            load_looks<KIND>(matrix, run, looks[0]);
            load_looks<KIND>(matrix, run + 8 * row_runs, looks[1]);
        }
        Words words = rows.above.words, others = rows.below.words;
        u32 at = rows.above.at, other = rows.below.at;
        wait_for_copies();
        if (tile == 0 || own.room < own.tiles) __syncthreads();
        else __syncwarp();
        load_masks(rows, masked);
        // Nobody needs the tile of x before this one any more.
        u32 coming = tile + own.room - 1, free = (place ? place : own.room) - 1;
        if (tile && coming < own.tiles) fill_x<KIND>(memory, own, coming, free, threadIdx.x);
        Columns x = {memory.x + ProductMemory<PARTS>::OCTETS_OF_X, 0, 0};
        if (g < own.batch) {
            x = {memory.x + place * own.octets + 4 * g + lane % 4, 4 * own.batch, own.octets / PARTS};
        }
        if (++place == own.room) place = 0;
#pragma unroll 1
        for (u32 i = 0; i < 4; i++) {
            if (i == 3) count_levels(rows, lane);
            Queue queue = queue_at(rows.above.levels, at), other_queue = queue_at(rows.below.levels, other);
            if (i == 3) {  // no level of this tile is in shared memory only
                __syncwarp();
                copy_levels(levels, rows, lane);
            }
            add_word<KIND, PARTS>(sum, memory.selectors, looks, words.a, others.a, queue, other_queue, x);
            at += __popc(words.a);
            other += __popc(others.a);
            words = {words.b, words.c, words.d, 0};
            others = {others.b, others.c, others.d, 0};
        }
    }
}

// Writes an element of the result, rounded to its dtype. Args: y: [batch, rows]; bias: [rows], of the same dtype, or
// null.
template <Kind KIND, u32 PARTS>
__device__ inline void write_element(const Matrix &matrix, u32 row, u32 column, float sum, const void *bias, void *y) {
    u64 at = (u64)column * matrix.rows + row;
    if (PARTS > 1) {
        ((float *)y)[at] = bias ? sum + ((const float *)bias)[row] : sum;
        return;
    }
    if (bias) sum += widened(((const u16 *)bias)[row], KIND == OF_BF16 ? (u32)BF16 : (u32)F16);
    ((u16 *)y)[at] = (u16)two_rounded<KIND>(sum, 0);
}

// What a launch is told beside the matrix.
struct Call {
    const Words *x;    // [batch, columns], at a multiple of 16
    const void *bias;  // [rows], or null
    void *y;           // [batch, rows]
    float *sums;       // [slices, rows, batch], where there are several slices
    u32 *done;         // [blocks of rows], zero, and zero again afterwards: how many slices of each were summed up
    u32 batch;
    u32 units;         // of a slice
};

// The product of a block: 64 rows, a slice of the columns. Of several slices the block that is done last adds up the
// sums of all, always in the same order.
template <Kind KIND, u32 PARTS>
__device__ inline void multiply(const Matrix &matrix, ProductMemory<PARTS> &memory, const Call &call) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, batch = call.batch;
    u32 units = (matrix.columns + UNIT - 1) / UNIT, slices = (units + call.units - 1) / call.units;
    u32 slice = blockIdx.x % slices, block = blockIdx.x / slices, unit = slice * call.units;
    u32 columns = least(call.units * UNIT, matrix.columns - unit * UNIT);
    Activations<PARTS> own = activations_of<PARTS>(matrix, call.x, batch, unit * UNIT, columns);
    float sum[4] = {0, 0, 0, 0};
    u32 first = block * BLOCK_ROWS + warp * WARP_ROWS;
    multiply_rows<KIND>(matrix, memory, own, first, unit, columns, warp, lane, sum);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 row = first + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        if (row >= matrix.rows || column >= batch) continue;
        if (slices == 1) write_element<KIND, PARTS>(matrix, row, column, sum[i], call.bias, call.y);
        else call.sums[((u64)slice * matrix.rows + row) * batch + column] = sum[i];
    }
    if (slices == 1) return;
    __syncthreads();  // for other blocks
    if (threadIdx.x == 0) {
        __threadfence();  // for what all threads of the block wrote, which the barrier lets this one see
        memory.is_last = atomicAdd(call.done + block, 1) == slices - 1;
        __threadfence();
    }
    __syncthreads();
    if (!memory.is_last) return;
    const u32 most = BLOCK_ROWS * MAX_BATCH / THREADS;  // of the block's elements for a thread, summed up at once
    u32 elements = matrix.rows * batch, first_element = block * BLOCK_ROWS * batch + threadIdx.x;
    u32 stop = least(elements, (block + 1) * BLOCK_ROWS * batch);
    float totals[most] = {};
    for (u32 s = 0; s < slices; s++) {
#pragma unroll
        for (u32 k = 0; k < most; k++) {
            u32 element = first_element + k * THREADS;
            if (element < stop) totals[k] += __ldcg(call.sums + (u64)s * elements + element);
        }
    }
#pragma unroll
    for (u32 k = 0; k < most; k++) {
        u32 element = first_element + k * THREADS;
        if (element >= stop) break;
        write_element<KIND, PARTS>(matrix, element / batch, element % batch, totals[k], call.bias, call.y);
    }
    if (threadIdx.x == 0) call.done[block] = 0;
}
