// What the warpgroups of a backward block of varlen_attention share: arguments, shared memory, the steps of the loop,
// their barriers, and how tiles move. varlen_attention_bwd.cuh says what a block does.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/tiles.cuh"
#include "cuda/varlen_attention.cuh"

namespace flowattn {

constexpr int kKeyGroups = 3;                          // key warpgroups
constexpr int kQueryThread = kKeyGroups * kWarpgroup;  // first thread of the query warpgroup
constexpr int kBackwardThreads = kQueryThread + kWarpgroup;
constexpr int kQueryStages = 3;   // blocks of Q and dO in shared memory
constexpr int kMostRanked = 128;  // sequences up to which blocks find the longest ones themselves

// Shared memory, in bytes from its start; every tile at a multiple of 1024.
struct BackwardLayout {
  static constexpr int keys = 0;                                           // two rounds of K and V tiles
  static constexpr int queries = keys + 2 * kKeyGroups * 2 * kTileBytes;   // stages of a Q and a dO tile
  static constexpr int dscores = queries + kQueryStages * 2 * kTileBytes;  // two steps of dS^T tiles
  static constexpr int staging = dscores + 2 * kKeyGroups * kTileBytes;    // a dQ tile on its way out
  static constexpr int rows = staging + kTileBytes;                        // stages of (LSE log2(e), D) of a row
  static constexpr int barriers = rows + kQueryStages * kRowTile * sizeof(float2);
  static constexpr int bytes = barriers + 8 * (3 * kQueryStages + 8);
};

struct VarlenBackwardArgs {
  CUtensorMap q, k, v, dout;
  const void* out;          // (Tq, H, DV)
  const float *lse, *dlse;  // (H, Tq); dlse or null
  int64_t stride_dlse;      // of dlse, between heads
  void *dq, *dk, *dv;       // (Tq, H, D), (Tk, Hkv, D), (Tk, Hkv, DV)
  float* delta;             // (H, Tq): D between rounds
  float4* partial_dq;       // (Tq / 64 + B + 1, H, 8, 128): dQ between rounds, in the accumulators' order
  const int *cu_seqlens_q, *cu_seqlens_k;
  int batch, total_q, total_k, heads_kv, group, width, width_v;
  int window_left, window_right;  // -1 = unbounded
  bool top_left;
  float scale;  // > 0
};

#ifdef FA_HOPPER

// One sequence and key head: its rows, its rounds of keys, and the blocks of queries that each round meets.
struct BackwardPlace {
  Span queries, keys;
  KeyWindow seen_by;                // first(j) .. last(j): the queries that see key j
  int head_kv, rounds, round_keys;  // round_keys: a multiple of 64

  __device__ int begin(int round) const { return seen_by.first(round * round_keys) / kRowTile; }
  __device__ int end(int round) const {
    return (seen_by.last(min((round + 1) * round_keys, keys.length) - 1) + kRowTile - 1) / kRowTile;
  }
};

// A step of the loop: every round meets, for every query head of the group, its blocks of queries in order.
struct Step {
  int round, member, block;

  __device__ explicit Step(const BackwardPlace& place, int group) : round(-1), member(group - 1), block(0) {
    advance(place, group, true);
  }
  __device__ bool ended(const BackwardPlace& place) const { return round >= place.rounds; }
  __device__ void advance(const BackwardPlace& place, int group, bool fresh = false) {
    if (!fresh && ++block < place.end(round)) return;
    if (++member < group) {
      block = place.begin(round);
      return;
    }
    member = 0;
    do ++round;
    while (round < place.rounds && place.begin(round) >= place.end(round));
    if (round < place.rounds) block = place.begin(round);
  }
};

// Addresses of the barriers. `use` counts the steps, `turn` the rounds that have any step.
struct BackwardBarriers {
  uint32_t first;

  __device__ uint32_t arrived(int use) const { return first + 8 * (use % kQueryStages); }
  __device__ uint32_t summed(int use) const { return first + 8 * (kQueryStages + use % kQueryStages); }
  __device__ uint32_t released(int use) const { return first + 8 * (2 * kQueryStages + use % kQueryStages); }
  __device__ uint32_t keys_arrived(int turn) const { return first + 8 * (3 * kQueryStages + turn % 2); }
  __device__ uint32_t keys_released(int turn) const { return first + 8 * (3 * kQueryStages + 2 + turn % 2); }
  __device__ uint32_t dscores_ready(int use) const { return first + 8 * (3 * kQueryStages + 4 + use % 2); }
  __device__ uint32_t dscores_taken(int use) const { return first + 8 * (3 * kQueryStages + 6 + use % 2); }

  __device__ void init() const {
    constexpr int key_warps = kQueryThread / 32, query_warps = kWarpgroup / 32;
    for (int i = 0; i < kQueryStages; ++i) {
      barrier_init(arrived(i), 1);
      barrier_init(summed(i), query_warps);
      barrier_init(released(i), key_warps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(keys_arrived(i), 1);
      barrier_init(keys_released(i), key_warps);
      barrier_init(dscores_ready(i), key_warps);
      barrier_init(dscores_taken(i), query_warps);
    }
  }
};

// Through a shuffle, so that the compiler knows it to be the same in all threads of a warp.
__device__ inline int warpgroup_index() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0); }

// One arrival of the calling warp, after all of its threads have come here.
__device__ inline void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Zeroes the rows of a tile from `rows` on with the threads of one warpgroup: they belong to another sequence, and
// 0 * NaN is NaN. A barrier must follow.
__device__ inline void zero_tail(char* tile, int rows) {
  for (int at = rows * kTileRowBytes + threadIdx.x % kWarpgroup * kChunkBytes; at < kTileBytes;
       at += kWarpgroup * kChunkBytes) {
    *reinterpret_cast<uint4*>(tile + at) = uint4{};
  }
  fence_async_proxy();
}

// Zeroes the rows [from, to) of one head of x (T, heads, width) with all threads of the block.
template <class T>
__device__ inline void zero_rows(T* x, int heads, int head, int width, int64_t start, int from, int to) {
  const int chunks = width * static_cast<int>(sizeof(T)) / kChunkBytes;
  for (int64_t at = threadIdx.x; at < int64_t{max(to - from, 0)} * chunks; at += kBackwardThreads) {
    T* row = x + ((start + from + at / chunks) * heads + head) * width;
    reinterpret_cast<uint4*>(row)[at % chunks] = uint4{};
  }
}

// Writes up to 64 rows of one head of x (T, heads, width) from a warpgroup's accumulators, by way of a staging tile.
template <class T>
__device__ inline void write_tile(T* x, int heads, int head, int width, int64_t first_row, int rows, char* staging,
                                  const float (&values)[32], float factor) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % kWarpgroup / 32 * 16;
  __syncwarp();
#  pragma unroll
  for (int j = 0; j < 8; ++j) {
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<uint32_t*>(staging + swizzled(warp_row + lane / 4 + 8 * half, j) + lane % 4 * 4) =
          pack_pair<T>(values[4 * j + 2 * half] * factor, values[4 * j + 2 * half + 1] * factor);
    }
  }
  __syncwarp();
#  pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = warp_row + i * 4 + lane / kTileRowChunks, chunk = lane % kTileRowChunks;
    constexpr int per_chunk = kChunkBytes / sizeof(T);
    if (r < rows && chunk * per_chunk < width) {
      *reinterpret_cast<uint4*>(x + ((first_row + r) * heads + head) * width + chunk * per_chunk) =
          *reinterpret_cast<const uint4*>(staging + swizzled(r, chunk));
    }
  }
}

// d = A B^T of two tiles.
template <class T>
__device__ inline void start_product(float (&d)[32], uint32_t a_tile, uint32_t b_tile) {
  const uint64_t a = tile_descriptor(a_tile), b = tile_descriptor(b_tile);
  wgmma_fence();
#  pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) wgmma_ss<T>(d, a + step * 2, b + step * 2, step > 0);
  wgmma_commit();
}

// dS^T of this warpgroup as a tile, from packed pairs in the accumulators' order.
__device__ inline void store_tile(uint32_t tile, const uint32_t (&pairs)[16]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#  pragma unroll
  for (int j = 0; j < 8; j += 2) {
    store_matrices(tile + swizzled(row, j + lane / 16), pairs + 2 * j);
  }
}

#endif  // FA_HOPPER

}  // namespace flowattn
