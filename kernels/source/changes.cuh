// Finds the changed elements of a delta in the tensors of a base, and changes them (SPEC.md chapter 28).
//
// A delta lists the changes of a block by key and rank: the change with rank r belongs to the r-th element of the block
// with its key. A block is divided into tiles of at most `TILE_ELEMENTS` neighbouring elements, one per warp:
//
//   count_keys     counts the elements of each key in each tile
//   sum_keys       replaces these counts by those of all earlier tiles of the block
//   place_changes  goes through the elements of a tile, in order, with the rank of the next element of each key, and with
//                  the rank of the next change of each key. Where they are equal, it writes where the element is, and the
//                  bits that change
//   flip_elements  changes the elements: a second call restores them
//
// Nothing is written to the tensors before `flip_elements`. The warp reads 32 neighbouring elements at a time, and loads
// them before they are needed. `count_keys` and `place_changes` also compute the CRC-32 of the tile, and of its changes.
#pragma once
#include "base.cuh"

enum : u32 {
    TILE_ELEMENTS = 4096,
    MOST_KEYS = 256,     // keys of a range
    LOADED = 8,          // elements that a lane loads before the first is needed
    SUMMED = 8,          // counts that a lane loads before the first is needed
    SUM_POLYNOMIAL = 0xEDB88320,
    NO_RANGE = 0xFFFFFFFF,   // of a tile in which nothing changes
    NO_CHANGE = 0xFFFFFFFF,  // rank of the next change if there is none; place of a change that is not made
    KEY_GROUPS = MOST_KEYS / WARP
};
enum : u32 {
    IS_CHANGED = 1,  // changes are made: of tensors that share memory, in one only
    IS_BOOL = 2      // the checksum is that of 1 for each byte that is not 0
};

// Neighbouring elements of a tensor that one warp processes. There are several tiles for the same elements if the changes
// of their block have keys of several ranges.
struct ChangeTile {
    u64 data;   // address
    u32 count;  // of elements
    u32 range;  // index of the keys with changes, or NO_RANGE
    u32 flags;
    u32 padding;
};

// A range of keys with changes in a block. Elements with other keys do not change.
struct KeyRange {
    u64 counts;  // address of a number for each tile of the range and each of its keys: its elements with that key
    u64 totals;  // address of the number of all elements with each key
    u64 starts;  // address of the index of the first change of each key, and of the end of the last
    u32 first, tiles;  // index of the first tile, number of tiles
    u32 key, keys;     // the first key, number of keys
    u32 shift;         // bits of a magnitude below its exponent
    u32 is_float;      // 0: all elements have key 0
};

// The changes of a launch, in the order of blocks, keys and ranks. `patterns`: the levels of the differences, which are
// replaced by the bits to flip. `places`: tile * TILE_ELEMENTS + index of the element in it.
struct ChangeList {
    const u32 *ranks;
    u8 *patterns;
    u32 *places;
};

// ---------------------------------------------------------------------------------------------- checksums
//
// The CRC-32 of zeros, xor a sum over the 32-bit words of the data: of the products of each word with a power of x that
// depends on its distance from the end. A lane sums the words of every 32nd element by Horner's rule: it multiplies the
// sum by the power of x for 32 elements, with tables. At the end it multiplies by the power for its own distance.

// For elements of one width. An element of 8 bytes is two words with separate sums.
struct SumTables {
    u32 factor[4][256];     // products of each byte of a sum with the power for 32 elements
    u32 weights[2][WARP];   // for each word of an element and each lane: the power for its distance from the end
};

template <class Element> struct Sum {
    static constexpr u32 WORDS = (sizeof(Element) + 3) / 4;
    u32 words[WORDS];
};

template <class Element>
__device__ inline void add_to_sum(Sum<Element> &sum, Element bits, const SumTables &tables) {
    for (u32 i = 0; i < Sum<Element>::WORDS; i++) {
        u32 word = sum.words[i];
        word = tables.factor[0][word & 255] ^ tables.factor[1][word >> 8 & 255] ^ tables.factor[2][word >> 16 & 255] ^
               tables.factor[3][word >> 24];
        sum.words[i] = word ^ (u32)((u64)bits >> 32 * i);
    }
}

// Returns a product modulo the polynomial; the highest bit is the coefficient of 1.
__device__ inline u32 product_of_sums(u32 a, u32 b) {
    u32 product = 0;
    for (u32 i = 0; i < 32; i++) {
        product ^= b & (u32)((int)a >> 31);
        a <<= 1;
        b = (b >> 1) ^ (SUM_POLYNOMIAL & (0 - (b & 1)));
    }
    return product;
}

// Returns the sum of all lanes.
template <class Element>
__device__ inline u32 joined_sum(const Sum<Element> &sum, const SumTables &tables, u32 lane) {
    u32 word = 0;
    for (u32 i = 0; i < Sum<Element>::WORDS; i++) word ^= product_of_sums(sum.words[i], tables.weights[i][lane]);
    for (u32 step = 1; step < WARP; step *= 2) word ^= (u32)__shfl_sync(ALL_LANES, word, lane ^ step);
    return word;
}

__device__ inline void copy_sum_tables(const SumTables *tables, SumTables &own, u32 thread) {
    const u32 *from = (const u32 *)tables;
    u32 *to = (u32 *)&own;
    for (u32 i = thread; i < sizeof(SumTables) / sizeof(u32); i += THREADS) to[i] = from[i];
}

// ----------------------------------------------------------------------------------------------- elements

// The slots of a tile: 32 per step, so that the last element is in the last lane; the first slots can be empty.
__device__ inline u32 empty_slots(const ChangeTile &tile) { return (0 - tile.count) % WARP; }

// Loads a lane's elements of the next steps, from slot `slot` on; 0 for a slot without an element.
template <class Element>
__device__ inline void load_elements(const ChangeTile &tile, u32 slot, Element (&elements)[LOADED]) {
    const Element *data = (const Element *)tile.data;
    u32 empty = empty_slots(tile);
    for (u32 i = 0; i < LOADED; i++, slot += WARP) {
        u32 index = slot - empty;  // before the first element, a large number
        elements[i] = index < tile.count ? data[index] : (Element)0;
    }
}

// Calls `visit(slot, bits)` for each slot of a tile, in order: all lanes together, with 32 neighbouring slots. `slot` is
// counted from the first element; it is not less than the tile's count in an empty slot, whose bits are 0.
template <class Element, class Visit>
__device__ inline void for_each_slot(const ChangeTile &tile, u32 lane, Visit visit) {
    u32 empty = empty_slots(tile), slots = tile.count + empty;
    for (u32 first = 0; first < slots; first += LOADED * WARP) {
        Element elements[LOADED];
        load_elements(tile, first + lane, elements);
        for (u32 i = 0; i < LOADED; i++) {
            u32 slot = first + i * WARP + lane;
            if (slot - lane >= slots) break;
            visit(slot - empty, elements[i]);
        }
    }
}

// Returns the key of an element, counted from the first of the range. Not less than `keys` outside the range.
template <class Element> __device__ inline u32 key_in_range(Element bits, const KeyRange &range) {
    const Element low = (Element)((Element) ~(Element)0 >> 1);
    Element below = (Element)((Element)((bits & low) - 1) & low);
    return (range.is_float ? (u32)(below >> range.shift) : 0) - range.key;
}

// Maps floats to integers in the order of the values, and back.
template <class Element> __device__ inline Element ordered(Element bits, u32 is_float) {
    const Element low = (Element)((Element) ~(Element)0 >> 1);
    return is_float && bits > low ? (Element)(bits ^ low) : bits;
}

// Returns an element with a difference, given as its level.
template <class Element> __device__ inline Element changed(Element bits, Element level, u32 is_float) {
    Element difference = (Element)((level >> 1) ^ (Element)(0 - (level & 1)));
    return ordered((Element)(ordered(bits, is_float) + difference), is_float);
}

// ------------------------------------------------------------------------------------------------ kernels

// Copies the sum tables to the memory of the block. Returns whether the warp has a tile, the index of which it stores.
__device__ inline bool start_tiles(u32 count, const SumTables *tables, SumTables &own, u32 &index) {
    index = blockIdx.x * WARPS + threadIdx.x / WARP;
    copy_sum_tables(tables, own, threadIdx.x);
    __syncthreads();
    return index < count;
}

struct CountMemory {
    SumTables tables;
    u32 counts[WARPS][MOST_KEYS];
};

// Counts the elements of each key of a tile's range. Returns the sum of the tile's elements.
template <class Element>
__device__ inline u32 count_tile(
    const ChangeTile &tile, u32 index, const KeyRange &range, const SumTables &tables, u32 *counts, u32 lane
) {
    for (u32 key = lane; key < range.keys; key += WARP) counts[key] = 0;
    __syncwarp();
    Sum<Element> sum = {};
    for_each_slot<Element>(tile, lane, [&](u32 slot, Element bits) {
        if (tile.flags & IS_BOOL) bits = bits != 0;
        add_to_sum(sum, bits, tables);
        u32 key = key_in_range(bits, range);
        if (slot < tile.count && key < range.keys) atomicAdd(&counts[key], 1);
    });
    __syncwarp();
    if (range.keys) {
        u32 *row = (u32 *)range.counts + (u64)(index - range.first) * range.keys;
        for (u32 key = lane; key < range.keys; key += WARP) row[key] = counts[key];
    }
    return joined_sum(sum, tables, lane);
}

// Replaces the counts of 32 keys of a range by those of all earlier tiles, with one block. Each warp has a part of the
// tiles.
__device__ inline void sum_counts(const KeyRange &range, u32 key, u32 warp, u32 lane, u32 (&sums)[WARPS][WARP]) {
    u32 each = (range.tiles + WARPS - 1) / WARPS;
    u32 first = least(warp * each, range.tiles), stop = least(first + each, range.tiles);
    u32 *counts = (u32 *)range.counts + key;
    bool has = key < range.keys;
    u32 sum = 0;
    for (u32 tile = first; has && tile < stop; tile++) sum += counts[(u64)tile * range.keys];
    sums[warp][lane] = sum;
    __syncthreads();
    if (!has) return;
    u32 before = 0;
    for (u32 i = 0; i < warp; i++) before += sums[i][lane];
    for (u32 tile = first; tile < stop; tile += SUMMED) {
        u32 own[SUMMED];
        for (u32 i = 0; i < SUMMED; i++) own[i] = tile + i < stop ? counts[(u64)(tile + i) * range.keys] : 0;
        for (u32 i = 0; i < SUMMED; i++) {
            if (tile + i < stop) counts[(u64)(tile + i) * range.keys] = before;
            before += own[i];
        }
    }
    if (warp == WARPS - 1) ((u32 *)range.totals)[key] = before;
}

// What a warp knows about the keys of its range.
struct Ranks {
    u32 rank[MOST_KEYS];    // of the next element
    u32 change[MOST_KEYS];  // index of the next change
    u32 next[MOST_KEYS];    // its rank, or NO_CHANGE
};

struct PlaceMemory {
    SumTables tables;
    Ranks ranks[WARPS];
};

// Returns the first of the changes `low` to `high` - 1 with at least this rank; `high` if there is none.
__device__ inline u32 change_from(const u32 *ranks, u32 low, u32 high, u32 rank) {
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (ranks[middle] < rank) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Returns the lanes with the same key. Compares bit by bit, which is faster for few bits than `__match_any_sync`.
__device__ inline u32 lanes_with(u32 key, u32 bits) {
    u32 lanes = ALL_LANES;
    for (u32 i = 0; i < bits; i++) {
        u32 set = __ballot_sync(ALL_LANES, (key >> i & 1) != 0);
        lanes &= key >> i & 1 ? set : ~set;
    }
    return lanes;
}

// Finds the changes of a tile. Returns the sum of the bits that change.
template <class Element>
__device__ inline u32 place_tile(
    const ChangeTile &tile, u32 index, const KeyRange &range, const ChangeList &list, const SumTables &tables,
    Ranks &own, u32 lane
) {
    const u32 *row = (const u32 *)range.counts + (u64)(index - range.first) * range.keys;
    const u32 *starts = (const u32 *)range.starts;
    for (u32 key = lane; key < range.keys; key += WARP) {
        u32 rank = row[key], end = starts[key + 1], change = change_from(list.ranks, starts[key], end, rank);
        own.rank[key] = rank;
        own.change[key] = change;
        own.next[key] = change < end ? list.ranks[change] : NO_CHANGE;
    }
    __syncwarp();  // before a shuffle
    Sum<Element> sum = {};
    u32 key_bits = 32 - __clz((int)(range.keys - 1));
    Element *patterns = (Element *)list.patterns;
    for_each_slot<Element>(tile, lane, [&](u32 slot, Element bits) {
        Element flipped = 0;
        u32 key = key_in_range(bits, range);
        bool inside = slot < tile.count && key < range.keys;
        u32 lanes = __ballot_sync(ALL_LANES, inside);
        if (lanes != 0) {
            lanes &= lanes_with(key, key_bits);
            u32 before = (u32)__popc(lanes & ((1u << lane) - 1));  // elements of the key in earlier lanes
            bool found = false;
            u32 change = 0, end = 0;
            if (inside && own.next[key] <= own.rank[key] + before) {
                u32 rank = own.rank[key] + before;
                change = own.change[key];
                end = starts[key + 1];
                change = change_from(list.ranks, change, least(change + before, end), rank);
                found = change < end && list.ranks[change] == rank;
            }
            if (found) {
                flipped = (Element)(bits ^ changed(bits, patterns[change], range.is_float));
                patterns[change] = flipped;
                u32 place = index * TILE_ELEMENTS + slot;
                list.places[change] = tile.flags & IS_CHANGED ? place : (u32)NO_CHANGE;
            }
            u32 all_found = __ballot_sync(ALL_LANES, found);
            __syncwarp();  // before a shuffle
            if (inside && before == 0) {
                own.rank[key] += (u32)__popc(lanes);
                u32 passed = (u32)__popc(all_found & lanes);
                if (passed) {
                    change = own.change[key] += passed;
                    own.next[key] = change < starts[key + 1] ? list.ranks[change] : NO_CHANGE;
                }
            }
            __syncwarp();  // before a shuffle
        }
        add_to_sum(sum, flipped, tables);
    });
    return joined_sum(sum, tables, lane);
}

template <class Element>
__device__ inline void flip(const ChangeTile *tiles, u32 place, const void *patterns, u32 change) {
    ((Element *)tiles[place / TILE_ELEMENTS].data)[place % TILE_ELEMENTS] ^= ((const Element *)patterns)[change];
}
