// Device code of pack_plan and gather_rows. Raw pointers and sizes, no torch header.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "common/packing.h"

namespace flowattn {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

// Inclusive prefix sum over the lanes of a warp.
__device__ inline int warp_scan(int value) {
  const int lane = threadIdx.x % kLanes;
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// ---- pack_plan ----------------------------------------------------------------------------------------------------
//
// One launch. The padded positions are cut into pieces of kPiece columns of one row; a warp reads a piece with one
// 16-byte load a lane (for a mask of bytes) and finds the ranks of its tokens by a scan over the lanes. A mask needs
// the counts of all pieces first: they are taken in a first phase, into `counts`, ended by the launch's only grid
// barrier. Lengths need no such phase. After it no block waits for another: each of `workers` blocks owns a run of
// pieces and adds up the counts before it (4 bytes a 512 positions, out of L2, against 12 bytes a position written:
// cheaper than a chained scan and free of its flags, which would need clearing), while the last block alone makes what
// is one entry a sequence: cu_seqlens, tiles and stats.
//
// Nothing is trusted: lengths are clamped to [0, padded_len], ranks to the capacity, so that no value of the source can
// lead outside a buffer. Sums of clamped lengths are at most B * S < 2^31.

constexpr int kPlanWarps = 32;
constexpr int kPlanThreads = kPlanWarps * kLanes;
constexpr int kLaneColumns = 16;
constexpr int kPiece = kLaneColumns * kLanes;
static_assert(kPlanWarps == kLanes, "a lane looks up the count of each warp's piece");

struct PackPlanArgs {
  const void* source;
  int64_t outer_stride, inner_stride;  // of source, in elements
  PlanKind kind;
  int batch, padded_len, capacity;
  int row_pieces;  // pieces of one row
  int shift;       // plan_shift(padded_len)
  int entries;     // of tiles
  int* counts;     // (batch * row_pieces,) scratch, masks only
  int *cu_seqlens, *indices, *inverse, *position_ids;
  Tile* tiles;
  int* stats;
};

__device__ inline int clamp(int64_t value, int low, int high) {
  return value < low ? low : value > high ? high : static_cast<int>(value);
}

// Length of a sequence given by lengths or cu_seqlens.
template <class T>
__device__ int given_length(const PackPlanArgs& args, int b) {
  const T* source = static_cast<const T*>(args.source);
  int64_t length = source[b * args.outer_stride];
  if (args.kind == kCuSeqlens) {
    // Unsigned: nonsense near the ends of int64 may wrap around, and is then clamped like any other.
    const uint64_t next = static_cast<uint64_t>(source[(b + int64_t{1}) * args.outer_stride]);
    length = static_cast<int64_t>(next - static_cast<uint64_t>(length));
  }
  return clamp(length, 0, args.padded_len);
}

// Bit k of the result: is (row, column + k) a token? Columns from padded_len on are not.
template <class T>
__device__ unsigned kept_bits(const PackPlanArgs& args, int row, int column) {
  const int width = clamp(int64_t{args.padded_len} - column, 0, kLaneColumns);
  if (args.kind != kMask) return (1u << clamp(int64_t{given_length<T>(args, row)} - column, 0, width)) - 1;
  const T* from = static_cast<const T*>(args.source) + row * args.outer_stride + column * args.inner_stride;
  unsigned bits = 0;
  if (width == kLaneColumns && args.inner_stride == 1 && reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0) {
    constexpr int per_load = sizeof(uint4) / sizeof(T);
#pragma unroll
    for (int load = 0; load < kLaneColumns / per_load; ++load) {
      const uint4 vector = reinterpret_cast<const uint4*>(from)[load];
      const T* values = reinterpret_cast<const T*>(&vector);
#pragma unroll
      for (int k = 0; k < per_load; ++k) bits |= unsigned{values[k] != 0} << (load * per_load + k);
    }
  } else {
    for (int k = 0; k < width; ++k) bits |= unsigned{from[k * args.inner_stride] != 0} << k;
  }
  return bits;
}

template <class T>
__device__ int piece_count(const PackPlanArgs& args, int piece) {
  if (args.kind == kMask) return args.counts[piece];
  const int row = piece / args.row_pieces, column = piece % args.row_pieces * kPiece;
  return clamp(int64_t{given_length<T>(args, row)} - column, 0, kPiece);
}

template <class T>
__device__ int row_count(const PackPlanArgs& args, int row) {
  if (args.kind != kMask) return given_length<T>(args, row);
  int count = 0;
  for (int piece = 0; piece < args.row_pieces; ++piece) count += args.counts[row * args.row_pieces + piece];
  return count;
}

template <class T>
__device__ void count_pieces(const PackPlanArgs& args) {
  const int64_t pieces = int64_t{args.batch} * args.row_pieces;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int64_t at = int64_t{blockIdx.x} * kPlanWarps + warp; at < pieces; at += int64_t{gridDim.x} * kPlanWarps) {
    const int piece = static_cast<int>(at), row = piece / args.row_pieces;
    const int column = piece % args.row_pieces * kPiece + lane * kLaneColumns;
    const int count = warp_sum(__popc(kept_bits<T>(args, row, column)));
    if (lane == 0) args.counts[piece] = count;
  }
}

// One warp writes inverse, indices and position_ids of one piece, whose first token has rank `start`.
template <class T>
__device__ void place_piece(const PackPlanArgs& args, int piece, int start) {
  const int lane = threadIdx.x % kLanes;
  const int row = piece / args.row_pieces, column = piece % args.row_pieces * kPiece;
  const int width = min(kPiece, args.padded_len - column), flat = row * args.padded_len + column;
  const unsigned bits = kept_bits<T>(args, row, column + lane * kLaneColumns);
  const int count = __popc(bits), before = start + warp_scan(count) - count;
  // A lane has read 16 neighbouring columns but writes every 32nd, so that a warp's stores are contiguous.
  for (int base = 0; base < width; base += kLanes) {
    const int offset = base + lane, owner = offset / kLaneColumns, k = offset % kLaneColumns;
    const unsigned owned = __shfl_sync(kAllLanes, bits, owner);
    const int rank = __shfl_sync(kAllLanes, before, owner) + __popc(owned & ((1u << k) - 1));
    const bool kept = (owned >> k & 1) && rank < args.capacity;
    if (offset < width) args.inverse[flat + offset] = kept ? rank : -1;
    if (kept) {
      args.indices[rank] = flat + offset;
      args.position_ids[rank] = column + offset;
    }
  }
}

// Writes everything of one worker's run of pieces, and its share of the unused rows.
template <class T>
__device__ void place_tokens(const PackPlanArgs& args, int worker, int workers) {
  __shared__ int warp_before[kPlanWarps], warp_total[kPlanWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t pieces = int64_t{args.batch} * args.row_pieces;
  const int first = static_cast<int>(pieces * worker / workers),
            last = static_cast<int>(pieces * (worker + 1) / workers);
  int before = 0, total = 0;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kPlanThreads) {
    const int count = piece_count<T>(args, static_cast<int>(piece));
    total += count;
    if (piece < first) before += count;
  }
  before = warp_sum(before);
  total = warp_sum(total);
  if (lane == 0) {
    warp_before[warp] = before;
    warp_total[warp] = total;
  }
  __syncthreads();
  int rank = warp_sum(warp_before[lane]);  // of the first token of the next kPlanWarps pieces, alike in all warps
  total = warp_sum(warp_total[lane]);
  for (int next = first; next < last; next += kPlanWarps) {
    const int count = lane < last - next ? piece_count<T>(args, next + lane) : 0;
    const int through = warp_scan(count);
    const int start = rank + __shfl_sync(kAllLanes, through - count, warp);
    if (warp < last - next) place_piece<T>(args, next + warp, start);
    rank += __shfl_sync(kAllLanes, through, kLanes - 1);
  }
  const int64_t step = int64_t{workers} * kPlanThreads;
  for (int64_t t = int64_t{total} + worker * kPlanThreads + threadIdx.x; t < args.capacity; t += step) {
    args.indices[t] = -1;
    args.position_ids[t] = 0;
  }
}

// One block writes cu_seqlens, tiles and stats. Each warp owns a contiguous run of sequences; the tiles are sorted by
// counting into buckets of decreasing length, where (bucket, warp, order within the warp) keeps equals in order.
template <class T>
__device__ void place_sequences(const PackPlanArgs& args) {
  __shared__ int slots[kPlanWarps][kPlanBuckets];  // tiles of a warp in a bucket, then the next free entry for them
  __shared__ int warp_tokens[kPlanWarps], warp_longest[kPlanWarps], scan_total[kPlanBuckets / kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int run = (args.batch / kPlanThreads + 1) * kLanes;  // 32 runs of whole warps cover the batch
  const int first = static_cast<int>(min(int64_t{warp} * run, int64_t{args.batch}));
  const int last = static_cast<int>(min(int64_t{first} + run, int64_t{args.batch}));

  int tokens = 0;
  for (int b = first + lane; b < last; b += kLanes) tokens += row_count<T>(args, b);
  tokens = warp_sum(tokens);
  if (lane == 0) warp_tokens[warp] = tokens;
  for (int bucket = lane; bucket < kPlanBuckets; bucket += kLanes) slots[warp][bucket] = 0;
  __syncthreads();

  const int through = warp_scan(warp_tokens[lane]);
  const int total = min(__shfl_sync(kAllLanes, through, kLanes - 1), args.capacity);
  int start = __shfl_sync(kAllLanes, through - warp_tokens[lane], warp), longest = 0;
  for (int base = first; base < last; base += kLanes) {
    const int b = base + lane, count = b < last ? row_count<T>(args, b) : 0;
    const int end = start + warp_scan(count);
    if (b < last) {
      const int begin = min(end - count, args.capacity), length = min(end, args.capacity) - begin;
      args.cu_seqlens[b] = begin;
      atomicAdd(&slots[warp][length >> args.shift], tiles_of(length));
      longest = max(longest, length);
    }
    start = __shfl_sync(kAllLanes, end, kLanes - 1);
  }
  longest = __reduce_max_sync(kAllLanes, longest);
  if (lane == 0) warp_longest[warp] = longest;
  if (threadIdx.x == 0) args.cu_seqlens[args.batch] = total;
  __syncthreads();

  // Exclusive prefix sums of slots in the order (bucket from long to short, warp); a thread owns a bucket.
  const int bucket = kPlanBuckets - 1 - static_cast<int>(threadIdx.x);
  int held = 0, held_through = 0;
  if (bucket >= 0) {  // whole warps
    for (int w = 0; w < kPlanWarps; ++w) held += slots[w][bucket];
    held_through = warp_scan(held);
    if (lane == kLanes - 1) scan_total[warp] = held_through;
  }
  __syncthreads();
  int real = 0;  // entries of all sequences
  for (int w = 0; w < kPlanBuckets / kLanes; ++w) {
    if (w < warp) held_through += scan_total[w];
    real += scan_total[w];
  }
  if (bucket >= 0) {
    int next = held_through - held;
    for (int w = 0; w < kPlanWarps; ++w) {
      const int here = slots[w][bucket];
      slots[w][bucket] = next;
      next += here;
    }
  }
  __syncthreads();

  for (int base = first; base < last; base += kLanes) {
    const int b = base + lane;
    const int begin = b < last ? args.cu_seqlens[b] : 0, length = b < last ? args.cu_seqlens[b + 1] - begin : 0;
    const int tiles = tiles_of(length), key = length >> args.shift;
    const int free = slots[warp][key];
    int at = free, added = 0;
    for (int other = 0; other < kLanes; ++other) {  // lanes with my key before me, and all of them
      const int their_tiles = __shfl_sync(kAllLanes, tiles, other);
      const bool same = __shfl_sync(kAllLanes, key, other) == key;
      if (same) added += their_tiles;
      if (same && other < lane) at += their_tiles;
    }
    __syncwarp();                     // every lane has read its slot
    slots[warp][key] = free + added;  // lanes of one key write one value
    __syncwarp();
    for (int tile = 0; tile < tiles; ++tile) args.tiles[at + tile] = {b, tile * kTile, begin, length};
  }

  const int tail = args.capacity - total, tail_tiles = tiles_of(tail);
  for (int64_t i = threadIdx.x; real + i < args.entries; i += kPlanThreads) {
    args.tiles[real + i] =
        i < tail_tiles ? Tile{args.batch, static_cast<int>(i) * kTile, total, tail} : Tile{args.batch, 0, 0, 0};
  }
  if (warp == 0) {
    longest = __reduce_max_sync(kAllLanes, warp_longest[lane]);
    if (lane == 0) {
      args.stats[0] = total;
      args.stats[1] = real;
      args.stats[2] = longest;
    }
  }
}

// A mask on more than one block needs a cooperative launch.
template <class T>
__global__ void __launch_bounds__(kPlanThreads) pack_plan_kernel(const PackPlanArgs args) {
  if (args.kind == kMask) {
    count_pieces<T>(args);
    if (gridDim.x > 1) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
    }
  }
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int workers = max(1, blocks - 1);
  if (block < workers) place_tokens<T>(args, block, workers);
  if (block == blocks - 1) place_sequences<T>(args);
}

// ---- gather_rows --------------------------------------------------------------------------------------------------
//
// blockDim.x threads share a row, each moving vectors of sizeof(Vec) bytes; a thread handles kRowsAThread rows at once:
// 4 loads of 16 bytes on each of the 1024 threads an SM holds are 64 KiB in flight, several times what the
// bandwidth-delay product of HBM asks for, and the latency of the index is paid once for 4 rows.

constexpr int kGatherThreads = 256;
constexpr int kRowsAThread = 4;

struct GatherRowsArgs {
  const char* src;
  const int* index;
  char* out;
  int64_t rows, source_rows;
  unsigned inner_rows;                            // S
  int64_t outer_stride, row_stride, head_stride;  // bytes
  int vectors, head_vectors;                      // of a row of the result, and of one of its heads
  uint4 fill;                                     // the fill value, repeated
};

template <class Vec>
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const GatherRowsArgs args) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * kRowsAThread + threadIdx.y;
  const char* from[kRowsAThread];
#pragma unroll
  for (int i = 0; i < kRowsAThread; ++i) {
    const int64_t row = first + i * blockDim.y;
    const int source = row < args.rows ? args.index[row] : -1;
    const unsigned outer = static_cast<unsigned>(source) / args.inner_rows;
    const unsigned inner = static_cast<unsigned>(source) - outer * args.inner_rows;
    const bool inside = source >= 0 && source < args.source_rows;
    from[i] = inside ? args.src + outer * args.outer_stride + inner * args.row_stride : nullptr;
  }
  const Vec fill = *reinterpret_cast<const Vec*>(&args.fill);
  Vec* out = reinterpret_cast<Vec*>(args.out);
  const int step = gridDim.y * blockDim.x;
  for (int column = blockIdx.y * blockDim.x + threadIdx.x; column < args.vectors; column += step) {
    const int head = column / args.head_vectors, within = column - head * args.head_vectors;
    const int64_t offset = head * args.head_stride + within * int64_t{sizeof(Vec)};
    Vec moved[kRowsAThread];
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
      moved[i] = from[i] ? *reinterpret_cast<const Vec*>(from[i] + offset) : fill;
    }
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
      const int64_t row = first + i * blockDim.y;
      if (row < args.rows) out[row * args.vectors + column] = moved[i];
    }
  }
}

}  // namespace flowattn
