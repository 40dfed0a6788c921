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
constexpr int shared_bytes(int warpgroups) { return (warpgroups + 2 * kStages) * kTileBytes; }
// A row's reference maximum moves only when its scores outgrow it by this factor of 2: P stays below 2^8 and the
// accumulator is rescaled a few times a sequence instead of once a block.
constexpr float kRescaleThreshold = 8.0f;

struct VarlenForwardArgs {
  const void *q, *k, *v;  // (Tq, H, D), (Tk, Hkv, D), (Tk, Hkv, DV)
  void* out;              // (Tq, H, DV)
  float* lse;             // (H, Tq)
  const int *cu_seqlens_q, *cu_seqlens_k;
  const Tile* tiles;                                    // or null
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
  int batch, total_q, total_k, heads, group, width, width_v;
  int window_left, window_right;  // -1 = unbounded
  bool top_left, self_attention;
  float scale_log2;  // scale * log2(e), >= 0
};

#ifdef FA_HOPPER

// Starts the copy of 64 rows from `row` on of one head into a tile; rows from `rows` on and columns from `width` on are
// zeros, so that nothing outside the sequence, NaN included, reaches a product.
template <class T, int Threads>
__device__ inline void copy_tile(uint32_t tile, const T* head, int64_t row_stride, int row, int rows, int width,
                                 int thread) {
  const int chunk = thread % kTileRowChunks;
  const bool column_inside = chunk * (kChunkBytes / int{sizeof(T)}) < width;
#  pragma unroll
  for (int i = 0; i < kRowTile / (Threads / kTileRowChunks); ++i) {
    const int r = i * (Threads / kTileRowChunks) + thread / kTileRowChunks;
    const bool inside = column_inside && row + r < rows;
    const T* from = head + (row + r) * row_stride + chunk * (kChunkBytes / sizeof(T));
    copy_chunk(tile + swizzled(r, chunk), inside ? from : head, inside);
  }
}

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
      // scale may be 0: a masked score stays -inf instead of becoming NaN.
      largest[half] = m == -INFINITY ? -INFINITY : m * scale;
    }
    const bool outgrown = largest[0] > top[0] + kRescaleThreshold || largest[1] > top[1] + kRescaleThreshold;
    if (__any_sync(0xffffffffu, outgrown)) {
#  pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float moved = fmaxf(top[half], largest[half]);
        const float factor = top[half] == moved ? 1.0f : exp2_fast(top[half] - moved);
        top[half] = moved;
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

// All key blocks for the rows of one block: `Warpgroups` row tiles from place.row on, of one head.
template <class T, int Warpgroups>
__device__ inline void attend(const VarlenForwardArgs& args, char* shared, const TilePlace& place, const Span& keys,
                              int head) {
  constexpr int threads = Warpgroups * kWarpgroup;
  const T* q = static_cast<const T*>(args.q) + place.start * args.q_row + head * args.q_head;
  const T* k = static_cast<const T*>(args.k) + keys.start * args.k_row + head / args.group * args.k_head;
  const T* v = static_cast<const T*>(args.v) + keys.start * args.v_row + head / args.group * args.v_head;
  const int warpgroup = threadIdx.x / kWarpgroup, row = place.row + warpgroup * kRowTile;
  char* const q_rows = shared + warpgroup * kTileBytes;
  const uint32_t q_tile = shared_address(q_rows), stages = shared_address(shared) + Warpgroups * kTileBytes;
  const KeyWindow window = {keys.length, args.top_left ? 0 : keys.length - place.length, args.window_left,
                            args.window_right};
  // Union of the key intervals of the block's rows, in key blocks; blocks outside the intersection of this warpgroup's
  // rows are masked.
  const int block_last = min(place.row + threads / 2, place.length) - 1, last = min(row + kRowTile, place.length) - 1;
  const int begin = window.first(place.row) / kKeyBlock;
  const int end = (window.last(block_last) + kKeyBlock - 1) / kKeyBlock;
  const int full_begin = (window.first(last) + kKeyBlock - 1) / kKeyBlock, full_end = window.last(row) / kKeyBlock;
  const bool active = row < place.length;

  const auto stage = [&](int block) { return stages + block % kStages * 2 * kTileBytes; };
  const auto copy_block = [&](int block) {
    if (block < end) {
      copy_tile<T, threads>(stage(block), k, args.k_row, block * kKeyBlock, keys.length, args.width, threadIdx.x);
      copy_tile<T, threads>(stage(block) + kTileBytes, v, args.v_row, block * kKeyBlock, keys.length, args.width_v,
                            threadIdx.x);
    }
    copies_commit();
  };
  RowTile tile;
  const auto weigh = [&](int block) {
    wgmma_commit();
    wgmma_wait<0>();
    if (block < full_begin || block >= full_end) tile.mask(window, row, block * kKeyBlock);
    tile.template softmax<T>(args.scale_log2);
  };
  // Waits for the copies of `block`. Everyone has then also finished the products of the block two before, whose stage
  // the copies started here overwrite.
  const auto arrive = [&](int block) {
    copies_wait<1>();
    fence_async_proxy();
    __syncthreads();
    copy_block(block + 2);
  };

  if (begin < end) {
    copy_tile<T, kWarpgroup>(q_tile, q, args.q_row, row, place.length, args.width, threadIdx.x % kWarpgroup);
    copy_block(begin);
    copy_block(begin + 1);
    arrive(begin);
    if (active) {
      wgmma_fence();
      start_scores<T>(tile, q_tile, stage(begin));
      weigh(begin);
    }
    for (int block = begin + 1; block < end; ++block) {
      arrive(block);
      if (active) {
        wgmma_fence();
        start_values<T>(tile, stage(block - 1) + kTileBytes);
        start_scores<T>(tile, q_tile, stage(block));
        weigh(block);
      }
    }
    if (active) {
      wgmma_fence();
      start_values<T>(tile, stage(end - 1) + kTileBytes);
      wgmma_commit();
      wgmma_wait<0>();
    }
  }
  if (active) write_rows<T>(args, tile, q_rows, row, place.length, place.start, head);
}

#endif  // FA_HOPPER

template <class T, int Warpgroups>
__global__ void __launch_bounds__(Warpgroups* kWarpgroup, 4 / Warpgroups)
    varlen_attention_fwd_kernel(const VarlenForwardArgs args) {
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
