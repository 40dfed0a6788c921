// Device code of aaren_attention's scores: scale * q_h . k_t, and dk_t = scale ds_t q_h, dq_h = scale sum_t ds_t k_t.
// Tiles are those of a scan (cuda/scan.cuh), with wider rows taken in several pieces.
#pragma once

#include "cuda/scan.cuh"

namespace flowattn {

struct AarenScoresArgs {
  ScanShape shape;
  float scale;
  ScanTensor keys, dkeys;
  const void* query;
  int64_t query_row, query_head;
  ScanTensor scores;    // backward: their gradient
  float* dquery_parts;  // (rows, tiles, heads, width)
};

constexpr int kAarenTokens = 8;

// Calls f(column, active) for every piece of a row, all threads alike.
template <int V, class F>
__device__ inline void each_piece(const ScanShape& shape, int lane, const F& f) {
  for (int piece = 0; piece < shape.column_blocks; ++piece) {
    const int column = piece * shape.columns + lane * V;
    f(column < shape.width ? column : 0, column < shape.width);
  }
}

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads) aaren_scores_fwd_kernel(const __grid_constant__ AarenScoresArgs args) {
  constexpr int N = kAarenTokens;
  const ScanShape& shape = args.shape;
  const int line = blockIdx.x / shape.tiles * shape.column_blocks, tile = blockIdx.x % shape.tiles;
  const ScanThread<V, N> me(shape, line);
  const S* query = static_cast<const S*>(args.query) + me.row * args.query_row + me.head * args.query_head;
  const int64_t first = int64_t{tile} * shape.tile + me.group * N;
  float sums[N] = {};
  each_piece<V>(shape, me.lane, [&](int column, bool active) {
    Pack<S, V> keys[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      keys[n] = load_pack<S, V>(me.template at<const S>(args.keys, token_at(shape, first + n)) + column);
    }
    const Floats<V> q = active ? load<V>(query + column) : splat<V>(0.0f);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Floats<V> k = floats(keys[n]);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (active) sums[n] = fmaf(q[e], k[e], sums[n]);
      }
    }
  });
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float score = args.scale * group_sum(sums[n], shape.lanes);
    if (me.lane == 0 && first + n < shape.tokens) {
      static_cast<float*>(args.scores.data)[scalar_at(args.scores, me.row, first + n, me.head)] = score;
    }
  }
}

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads) aaren_scores_bwd_kernel(const __grid_constant__ AarenScoresArgs args) {
  constexpr int N = kAarenTokens;
  __shared__ float warps[kScanWarps][kScanColumns];
  const ScanShape& shape = args.shape;
  const int line = blockIdx.x / shape.tiles * shape.column_blocks, tile = blockIdx.x % shape.tiles;
  const ScanThread<V, N> me(shape, line);
  const S* query = static_cast<const S*>(args.query) + me.row * args.query_row + me.head * args.query_head;
  float* parts = args.dquery_parts + ((me.row * shape.tiles + tile) * shape.heads + me.head) * shape.width;
  const int64_t first = int64_t{tile} * shape.tile + me.group * N;
  float gradients[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t at = scalar_at(args.scores, me.row, token_at(shape, first + n), me.head);
    gradients[n] = first + n < shape.tokens ? args.scale * static_cast<const float*>(args.scores.data)[at] : 0.0f;
  }
  each_piece<V>(shape, me.lane, [&](int column, bool active) {
    Pack<S, V> keys[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      keys[n] = load_pack<S, V>(me.template at<const S>(args.keys, token_at(shape, first + n)) + column);
    }
    const Floats<V> q = load<V>(query + column);
    Floats<V> dq = splat<V>(0.0f);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (first + n >= shape.tokens) break;
      const Floats<V> k = floats(keys[n]);
      Floats<V> dk;
#pragma unroll
      for (int e = 0; e < V; ++e) dk[e] = gradients[n] * q[e], dq[e] = fmaf(gradients[n], k[e], dq[e]);
      if (active) store(me.template at<S>(args.dkeys, first + n) + column, dk);
    }
    for (int by = shape.lanes; by < kWarp; by *= 2) {
#pragma unroll
      for (int e = 0; e < V; ++e) dq[e] += __shfl_xor_sync(kWholeWarp, dq[e], by);
    }
    const int warp = threadIdx.x / kWarp;
    if (static_cast<int>(threadIdx.x % kWarp) < shape.lanes) {
#pragma unroll
      for (int e = 0; e < V; ++e) warps[warp][me.offset + e] = dq[e];
    }
    __syncthreads();
    if (me.group == 0 && active) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        float sum = 0.0f;
        for (int from = 0; from < kScanWarps; ++from) sum += warps[from][me.offset + e];
        parts[column + e] = sum;
      }
    }
    __syncthreads();
  });
}

}  // namespace flowattn
