// Computes products with a compressed matrix. Weights are decoded in registers, as operands of the tensor cores; they
// are never written to memory.
//
// Theory of operation: a warp has 16 rows, and 512 columns of them at a time, a *tile*. Four lanes, a *quad*, share the
// rows g and g + 8; each lane has the same 128 neighbouring columns in both rows: 16 bytes of the mask, loaded at once.
// A lane's levels begin where those of the previous lanes end; the numbers of mask bits determine this. All levels of a
// row are contiguous; the quad copies them to shared memory, 16 bytes per copy, while the warp computes with the tile
// before.
//
//   32 columns    a word of the mask, and 32 levels, from that of its first survivor on, in four words
//   4 columns     four levels, which operands.cuh converts to two words of two weights, with zeros at pruned positions
//   8 × 32 lanes  two steps of `multiply_add`: 16 rows and 16 columns per step. A step can have any columns, if those of
//                 x are the same: it has eight of each lane of a quad
//
// Data are loaded before they are needed: the mask of the next tile to registers that are not read before; its levels to
// shared memory, once the last levels of this tile are in registers; and tiles of x, of which shared memory has room for
// a few, if a block has more.
//
// Bounds: mask bits beyond the matrix are 0. Copies stop at the end of the file. For any mask, a quad copies at most 512
// levels of a row, for which there is room.
#pragma once
#include "operands.cuh"

enum : u32 {
    TILE = 512,  // columns per warp at a time
    WARP_ROWS = 16,
    BLOCK_ROWS = WARPS * WARP_ROWS,
    MAX_BATCH = 8,
    LEVELS_A_COPY = 32,
    // Words per row of levels: 512 levels, up to 31 before them, four more words that are read, and padding so that the
    // rows begin in different banks.
    ROW_WORDS = 76
};

// ------------------------------------------------------------------------------------------------- rows

// The state of a lane in a row.
struct Row {
    const Words *mask;  // address of the mask of the next tile, without `before`
    u32 before;         // offset of the chunk's mask, in bytes
    u32 runs;           // number of runs that remain for this lane; 0 in rows beyond the matrix
    Words words;        // the mask of the next tile
    u32 own;            // number of survivors in it
    u32 level;          // index of the quad's first level of that tile, counted from the file's first chunk
    u32 all;            // number of the quad's levels
    u32 at;             // index of this lane's first level in shared memory
    u32 *levels;        // the row in shared memory
};

// The levels of all rows, in the file's order.
struct StoredLevels {
    const Words *data;
    u32 count;  // number of `Words`, of 32 levels each
};

// Returns the state at the beginning of a part of a row. Args: unit: its first unit; columns: its greatest number of
// columns.
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

// Counts the levels of the next tile, whose mask was loaded, and advances past those of the tile before.
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

// Begins to copy these levels to shared memory.
__device__ inline void copy_levels(const StoredLevels &levels, const Row &row, u32 lane) {
    u32 stop = least((row.level + row.all + LEVELS_A_COPY - 1) / LEVELS_A_COPY, levels.count);
    Words *to = (Words *)row.levels + lane % 4;
#pragma unroll 1
    for (u32 i = row.level / LEVELS_A_COPY + lane % 4; i < stop; i += 4, to += 4) copy_ahead(to, levels.data + i);
}

// Both rows of a lane.
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
    // Octets (8 columns) of x in a unit: of 8 rows of x, or of 4 rows in three parts.
    static const u32 OCTETS_OF_X = (PARTS == 1 ? MAX_BATCH : MAX_BATCH / 2 * PARTS) * UNIT / 8;
    Words x[OCTETS_OF_X + 1];  // the last one is zero
    Words levels[WARPS][WARP_ROWS * ROW_WORDS / 4];
    u32 selectors[ALL_OCTETS];
    u32 is_last;
};

// The columns of x that a block needs, in tiles. Shared memory has room for a few tiles, at least two.
template <u32 PARTS> struct Activations {
    const Words *x;
    u32 columns, batch;
    u32 first;  // the first column of the block
    u32 tiles;
    u32 octets;  // of a tile in shared memory, of all rows and parts
    u32 room;    // number of tiles that fit into shared memory
};

template <u32 PARTS>
__device__ inline Activations<PARTS> activations_of(
    const Matrix &matrix, const Words *x, u32 batch, u32 first, u32 columns
) {
    u32 octets = TILE / 8 * PARTS * batch;
    u32 room = ProductMemory<PARTS>::OCTETS_OF_X / octets;
    return {x, matrix.columns, batch, first, (columns + TILE - 1) / TILE, octets, room};
}

// Begins to copy a tile of x to shared memory, in the order in which lanes read it: for each octet of a lane's run, for
// each row of x, the octets of the four lanes of a quad. Beyond the matrix x is zero. Args: place: index of the tile in
// shared memory, below `Activations::room`.
template <Kind KIND, u32 PARTS>
__device__ inline void fill_x(
    ProductMemory<PARTS> &memory, const Activations<PARTS> &own, u32 tile, u32 place, u32 thread
) {
    const Words zero = {0, 0, 0, 0};
    u32 of_part = TILE / 8 * own.batch;
    Words *tile_in_memory = memory.x + place * own.octets;
    for (u32 i = thread; i < of_part; i += THREADS) {
        // Two neighbouring octets are 32 contiguous bytes of memory; the octets of a quad are contiguous in shared memory.
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

// The location of a lane's octets of x.
struct Columns {
    const Words *next;
    u32 step;  // from octet to octet
    u32 part;  // from part to part
};

// Adds the products of an octet of each lane, in both rows. Omits products of parts that are below the last bit of the
// greatest product.
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

// Computes the sums of a warp's rows over the columns of its block, in the layout of `multiply_add`. Args: first: the
// first row; unit: the first unit of the columns.
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
    // Loads and copies overlap with other work.
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
    u32 place = 0;  // index in shared memory of this tile of x
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
        // The tile of x before this one is not needed any more.
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
            if (i == 3) {  // all levels of this tile are in registers
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

// The arguments of a launch, except the matrix.
struct Call {
    const Words *x;    // [batch, columns], at a multiple of 16
    const void *bias;  // [rows], or null
    void *y;           // [batch, rows]
    float *sums;       // [slices, rows, batch], if there are several slices
    u32 *done;         // [blocks of rows]: number of slices that are done; zero before and after the launch
    u32 batch;
    u32 units;         // of a slice
};

// Computes the product of a block: 64 rows, one slice of the columns. If there are several slices, the block that ends
// last adds the sums of all slices, always in the same order.
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
        __threadfence();  // publishes the sums of all threads of the block, which the barrier made visible to this one
        memory.is_last = atomicAdd(call.done + block, 1) == slices - 1;
        __threadfence();
    }
    __syncthreads();
    if (!memory.is_last) return;
    const u32 most = BLOCK_ROWS * MAX_BATCH / THREADS;  // elements of the block per thread
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
