// Padding-free attention forward on Hopper for head widths up to 64 in half precision. Raw pointers, no torch header.
//
// A block is one or two warpgroups, each the owner of 64 query rows of one head; the warpgroups of a block share the
// copies of keys and values. P V of a key block is issued together with Q K^T of the next one, and the softmax runs
// with no product in flight; the other warpgroups of the SM (four in all) use the tensor cores meanwhile. Several
// blocks an SM also hide the loads of short sequences, whose cost is latency, not arithmetic.
//
// Scores are kept in registers in wgmma's accumulator layout: thread t of a warp holds, of rows t / 4 and t / 4 + 8 of
// its warp's 16, the columns 8 j + 2 (t % 4) and the next, as d[4 j], d[4 j + 1] and d[4 j + 2], d[4 j + 3]. The same
// registers, packed in pairs, are the left operand of P V.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/tiles.cuh"

namespace flowattn {

constexpr int kWidth = 64;     // head width of the tiles; narrower heads are zero-padded on load
constexpr int kRowTile = 64;   // query rows of a warpgroup
constexpr int kKeyBlock = 64;  // keys of a block
constexpr int kStages = 4;     // key blocks in shared memory: two arriving, one in Q K^T, one in P V
constexpr int kWarpgroup = 128;
constexpr int kTileBytes = kRowTile * kTileRowBytes;
constexpr int kBarrierBytes = 8 * (1 + 2 * kStages);
constexpr int shared_bytes(int warpgroups) { return (warpgroups + 2 * kStages) * kTileBytes + kBarrierBytes; }
// A row's reference maximum moves only when its scores outgrow it by this factor of 2: P stays below 2^8 and the
// accumulator is rescaled a few times a sequence instead of once a block.
constexpr float kRescaleThreshold = 8.0f;

struct VarlenForwardArgs {
  CUtensorMap q, k, v;  // (Tq, H, D), (Tk, Hkv, D), (Tk, Hkv, DV) in boxes of 64 rows of one head
  void* out;            // (Tq, H, DV)
  float* lse;           // (H, Tq)
  const int *cu_seqlens_q, *cu_seqlens_k;
  const Tile* tiles;  // or null
  int batch, total_q, total_k, heads, group, width_v;
  int window_left, window_right;  // -1 = unbounded
  bool top_left, self_attention;
  float scale_log2;  // scale * log2(e), > 0
};

#ifdef FA_HOPPER

// Online softmax of one row tile: 64 rows, two of them this thread's.
struct RowTile {
  float scores[32];
  float out[32] = {};
  float top[2] = {-INFINITY, -INFINITY};  // reference maximum of the scaled scores, in log2 units
  float total[2] = {0.0f, 0.0f};          // this thread's share of sum exp2(score - top)
  uint32_t weights[16];                   // P as left operand

  __device__ void mask(const KeyWindow& window, int row, int key) {
    const int lane = threadIdx.x % 32;
    row += threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = window.first(row + 8 * half) - key, last = window.last(row + 8 * half) - key;
#  pragma unroll
      for (int j = 0; j < 8; ++j) {
#  pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + 2 * (lane % 4) + c;
          if (column < first || column >= last) scores[4 * j + 2 * half + c] = -INFINITY;
        }
      }
    }
  }

  // Turns scores into weights against the reference maximum, moving it and rescaling where it has been outgrown.
  template <class T>
  __device__ void softmax(float scale) {
    float largest[2];
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = scores[2 * half];
#  pragma unroll
      for (int j = 0; j < 8; ++j) m = fmaxf(m, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      largest[half] = m * scale;
    }
    // Each row decides for itself, so that its bits depend on no other row, least of all on another sequence's.
    const bool outgrown[2] = {largest[0] > top[0] + kRescaleThreshold, largest[1] > top[1] + kRescaleThreshold};
    if (__any_sync(0xffffffffu, outgrown[0] || outgrown[1])) {
#  pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = outgrown[half] ? exp2_fast(top[half] - largest[half]) : 1.0f;
        top[half] = outgrown[half] ? largest[half] : top[half];
        total[half] *= factor;
#  pragma unroll
        for (int j = 0; j < 8; ++j) {
          out[4 * j + 2 * half] *= factor;
          out[4 * j + 2 * half + 1] *= factor;
        }
      }
    }
    const float reference[2] = {top[0] == -INFINITY ? 0.0f : top[0], top[1] == -INFINITY ? 0.0f : top[1]};
#  pragma unroll
    for (int j = 0; j < 8; ++j) {
#  pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = exp2_fast(fmaf(scores[4 * j + 2 * half], scale, -reference[half]));
        const float high = exp2_fast(fmaf(scores[4 * j + 2 * half + 1], scale, -reference[half]));
        total[half] += low + high;
        weights[2 * j + half] = pack_pair<T>(low, high);
      }
    }
  }
};

template <class T>
__device__ inline void start_scores(RowTile& tile, uint32_t q_tile, uint32_t k_tile) {
  const uint64_t q = tile_descriptor(q_tile), k = tile_descriptor(k_tile);
#  pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    wgmma_ss<T>(tile.scores, q + step * 2, k + step * 2, step > 0);  // 16 elements are 32 bytes
  }
}

template <class T>
__device__ inline void start_values(RowTile& tile, uint32_t v_tile) {
  const uint64_t v = tile_descriptor(v_tile);
#  pragma unroll
  for (int step = 0; step < kKeyBlock / 16; ++step) {
    wgmma_rs<T>(tile.out, tile.weights + 4 * step, v + step * (16 * kTileRowBytes >> 4));
  }
}

// Divides by the row sums and writes one row tile and its LSE; the tile's own query rows in shared memory are staging.
template <class T>
__device__ inline void write_rows(const VarlenForwardArgs& args, RowTile& tile, char* staging, int row, int rows,
                                  int64_t first_row, int head) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % kWarpgroup / 32 * 16;
#  pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = tile.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int r = warp_row + lane / 4 + 8 * half;
#  pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t pair =
          pack_pair<T>(tile.out[4 * j + 2 * half] * inverse, tile.out[4 * j + 2 * half + 1] * inverse);
      *reinterpret_cast<uint32_t*>(staging + swizzled(r, j) + lane % 4 * 4) = pair;
    }
    if (lane % 4 == 0 && row + r < rows) {
      constexpr float ln2 = 0.6931471805599453f;
      args.lse[int64_t{head} * args.total_q + first_row + row + r] =
          total == 0.0f ? -INFINITY : tile.top[half] * ln2 + logf(total);
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(args.out);
#  pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = warp_row + i * 4 + lane / kTileRowChunks, chunk = lane % kTileRowChunks;
    constexpr int per_chunk = kChunkBytes / sizeof(T);
    if (row + r < rows && chunk * per_chunk < args.width_v) {
      const int64_t at = ((first_row + row + r) * args.heads + head) * args.width_v + chunk * per_chunk;
      *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(staging + swizzled(r, chunk));
    }
  }
}

// All key blocks for the rows of one block: `Warpgroups` row tiles from place.row on, of one head. The first thread
// also starts the copies, two key blocks ahead; `arrived` and `released` of a stage hand it back and forth.
template <class T, int Warpgroups>
__device__ inline void attend(const VarlenForwardArgs& args, char* shared, const TilePlace& place, const Span& keys,
                              int head) {
  const int warpgroup = threadIdx.x / kWarpgroup, row = place.row + warpgroup * kRowTile;
  char* const q_rows = shared + warpgroup * kTileBytes;
  const uint32_t q_tiles = shared_address(shared), stages = q_tiles + Warpgroups * kTileBytes;
  const uint32_t q_arrived = stages + 2 * kStages * kTileBytes;
  const auto arrived = [&](int use) { return q_arrived + 8 * (1 + use % kStages); };
  const auto released = [&](int use) { return q_arrived + 8 * (1 + kStages + use % kStages); };
  const KeyWindow window = {keys.length, args.top_left ? 0 : keys.length - place.length, args.window_left,
                            args.window_right};
  // Union of the key intervals of the block's rows, in key blocks; blocks outside the intersection of this warpgroup's
  // rows are masked.
  const int block_last = min(place.row + Warpgroups * kRowTile, place.length) - 1;
  const int last = min(row + kRowTile, place.length) - 1;
  const int begin = window.first(place.row) / kKeyBlock;
  const int uses = (window.last(block_last) + kKeyBlock - 1) / kKeyBlock - begin;
  const int full_begin = (window.first(last) + kKeyBlock - 1) / kKeyBlock - begin;
  const int full_end = window.last(row) / kKeyBlock - begin;
  const int head_kv = head / args.group;
  const int row_tiles = place.row + kRowTile < place.length ? Warpgroups : 1;

  if (threadIdx.x == 0) {
    barrier_init(q_arrived, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(arrived(stage), 1);
      barrier_init(released(stage), row_tiles);
    }
    fence_async_proxy();
  }
  __syncthreads();
  if (row >= place.length) return;

  const auto stage = [&](int use) { return stages + use % kStages * 2 * kTileBytes; };
  const auto start_copies = [&](int use) {
    if (threadIdx.x != 0 || use >= uses) return;
    if (use >= kStages) barrier_wait(released(use), (use / kStages - 1) & 1);
    barrier_expect(arrived(use), 2 * kTileBytes);
    copy_tile(stage(use), &args.k, head_kv, keys.start + (begin + use) * kKeyBlock, arrived(use));
    copy_tile(stage(use) + kTileBytes, &args.v, head_kv, keys.start + (begin + use) * kKeyBlock, arrived(use));
  };
  // A copied tile runs on into the next sequence: those keys are masked, but 0 * NaN is NaN, so their values are
  // zeroed. Each warpgroup does it for itself, which needs no barrier between them.
  const auto zero_values = [&](int use) {
    const int rows = keys.length - (begin + use) * kKeyBlock;
    if (rows >= kKeyBlock) return;
    char* values = shared + (stage(use) - q_tiles) + kTileBytes;
    for (int at = rows * kTileRowBytes + threadIdx.x % kWarpgroup * kChunkBytes; at < kTileBytes;
         at += kWarpgroup * kChunkBytes) {
      *reinterpret_cast<uint4*>(values + at) = uint4{};
    }
    fence_async_proxy();
    warpgroup_sync(1 + warpgroup);
  };
  RowTile tile;
  const auto weigh = [&](int use) {
    wgmma_commit();
    wgmma_wait<0>();
    if (use > 0 && threadIdx.x % kWarpgroup == 0) barrier_arrive(released(use - 1));
    if (use < full_begin || use >= full_end) tile.mask(window, row, (begin + use) * kKeyBlock);
    tile.template softmax<T>(args.scale_log2);
  };

  if (uses > 0) {
    if (threadIdx.x == 0) {
      barrier_expect(q_arrived, row_tiles * kTileBytes);
      for (int t = 0; t < row_tiles; ++t) {
        copy_tile(q_tiles + t * kTileBytes, &args.q, head, place.start + place.row + t * kRowTile, q_arrived);
      }
    }
    const uint32_t q_tile = q_tiles + warpgroup * kTileBytes;
    start_copies(0);
    start_copies(1);
    start_copies(2);
    barrier_wait(q_arrived, 0);
    barrier_wait(arrived(0), 0);
    wgmma_fence();
    start_scores<T>(tile, q_tile, stage(0));
    weigh(0);
    for (int use = 1; use < uses; ++use) {
      start_copies(use + 2);
      barrier_wait(arrived(use), use / kStages & 1);
      wgmma_fence();
      start_values<T>(tile, stage(use - 1) + kTileBytes);
      start_scores<T>(tile, q_tile, stage(use));
      weigh(use);
    }
    zero_values(uses - 1);
    wgmma_fence();
    start_values<T>(tile, stage(uses - 1) + kTileBytes);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_sync(1 + warpgroup);  // the query rows become staging
  }
  write_rows<T>(args, tile, q_rows, row, place.length, place.start, head);
}

#endif  // FA_HOPPER

template <class T, int Warpgroups>
__global__ void __launch_bounds__(Warpgroups* kWarpgroup, 4 / Warpgroups)
    varlen_attention_fwd_kernel(const __grid_constant__ VarlenForwardArgs args) {
#ifdef FA_HOPPER
  extern __shared__ __align__(1024) char shared[];
  constexpr int parts = kTile / (Warpgroups * kRowTile);  // blocks of a slot
  const int head = blockIdx.x % args.heads, part = blockIdx.x / args.heads % parts;
  TilePlace place =
      locate_tile(blockIdx.x / args.heads / parts, args.tiles, args.cu_seqlens_q, args.batch, args.total_q);
  place.row += part * Warpgroups * kRowTile;
  if (place.row >= place.length) return;
  Span keys = {place.start, place.sequence == args.batch ? 0 : place.length};
  if (!args.self_attention) {
    keys = sequence_span(args.cu_seqlens_k, place.sequence, args.batch, args.total_k, false);
  }
  attend<T, Warpgroups>(args, shared, place, keys, head);
#endif
}

}  // namespace flowattn
