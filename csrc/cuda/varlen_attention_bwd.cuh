// Padding-free attention backward on Hopper for head widths up to 64 in half precision. Raw pointers, no torch header.
//
// A block computes every gradient of one sequence and one key head, so nothing is added up across blocks: no atomics,
// no second kernel, the same bits every time. Three warpgroups each own 64 keys and keep their dK and dV in registers;
// a fourth owns the queries: it starts the copies, makes the row sums D = rowsum(dO O) - dLSE, and turns the score
// gradients that the others leave in shared memory into dQ. Each step of the loop is one block of 64 queries:
//
//   keys      S^T = K Q^T, P^T = exp(S^T - LSE), dP^T = V dO^T, dS^T = P^T (dP^T - D), dV += P^T dO, dK += dS^T Q
//   queries   dQ += dS K over the 192 keys of the round
//
// Sequences longer than 192 keys take several rounds; between rounds a query block's dQ waits in global memory as
// float32, written and read by the same threads. P^T and dS^T go from the accumulators straight into the left operands
// of dV and dK; dS^T also passes through shared memory, where dQ reads it transposed.
#pragma once

#include "cuda/varlen_attention_bwd_block.cuh"

namespace flowattn {

#ifdef FA_HOPPER

// One step of a key warpgroup, from the arrived queries to P^T and dS^T, packed as left operands. One after the other,
// so that no more than one block of accumulators is alive beside dK and dV.
template <class T>
__device__ inline void weigh(const BackwardPlace& place, uint32_t k_tile, uint32_t v_tile, uint32_t q_tile,
                             uint32_t dout_tile, const float2* rows, int key, int query, float scale_log2,
                             uint32_t (&weights)[16], uint32_t (&dscores)[16]) {
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
  float block[32];
  start_product<T>(block, k_tile, q_tile);
  wgmma_wait<0>();
#  pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float low = rows[8 * j + column].x, high = rows[8 * j + column + 1].x;
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      block[4 * j + 2 * half] = exp2_fast(fmaf(block[4 * j + 2 * half], scale_log2, -low));
      block[4 * j + 2 * half + 1] = exp2_fast(fmaf(block[4 * j + 2 * half + 1], scale_log2, -high));
    }
  }
  const int last_key = min(key + kKeyBlock, place.keys.length) - 1;
  const bool seen = key + kKeyBlock <= place.keys.length && place.seen_by.first(last_key) <= query &&
                    place.seen_by.last(key) >= min(query + kRowTile, place.queries.length);
  if (!seen) {
    const int own = key + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = own + 8 * half;
      const int first = place.seen_by.first(mine) - query;
      const int last = mine < place.keys.length ? place.seen_by.last(mine) - query : 0;
#  pragma unroll
      for (int j = 0; j < 8; ++j) {
#  pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = 8 * j + column + c;
          if (at < first || at >= last) block[4 * j + 2 * half + c] = 0.0f;
        }
      }
    }
  }
#  pragma unroll
  for (int pair = 0; pair < 16; ++pair) weights[pair] = pack_pair<T>(block[2 * pair], block[2 * pair + 1]);
  start_product<T>(block, v_tile, dout_tile);
  wgmma_wait<0>();
#  pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float low = rows[8 * j + column].y, high = rows[8 * j + column + 1].y;
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 p = unpack_pair<T>(weights[2 * j + half]);
      dscores[2 * j + half] =
          pack_pair<T>(p.x * (block[4 * j + 2 * half] - low), p.y * (block[4 * j + 2 * half + 1] - high));
    }
  }
}

template <class T>
__device__ inline void own_keys(const VarlenBackwardArgs& args, char* shared, const BackwardPlace& place,
                                const BackwardBarriers& barriers) {
  const int warpgroup = warpgroup_index();
  const float scale_log2 = args.scale * 1.4426950408889634f;
  int use = 0, turn = 0;
  for (int round = 0; round < place.rounds; ++round) {
    const int key = round * place.round_keys + warpgroup * kKeyBlock;
    const int round_end = min((round + 1) * place.round_keys, place.keys.length);
    const bool active = key < round_end;
    const int begin = place.begin(round), end = place.end(round);
    char* const k_tile = shared + BackwardLayout::keys + (turn % 2 * kKeyGroups + warpgroup) * 2 * kTileBytes;
    char* const v_tile = k_tile + kTileBytes;
    float dk[32] = {}, dv[32] = {};
    if (begin < end) {
      barrier_wait(barriers.keys_arrived(turn), turn / 2 & 1);
      if (active && key + kKeyBlock > place.keys.length) {
        zero_tail(k_tile, place.keys.length - key);
        zero_tail(v_tile, place.keys.length - key);
        warpgroup_sync(1 + warpgroup);
      }
      for (int member = 0; member < args.group; ++member) {
        for (int block = begin; block < end; ++block, ++use) {
          const int stage = use % kQueryStages;
          const uint32_t q_tile = shared_address(shared) + BackwardLayout::queries + stage * 2 * kTileBytes;
          const uint32_t dout_tile = q_tile + kTileBytes;
          const uint32_t dscores_tile =
              shared_address(shared) + BackwardLayout::dscores + (use % 2 * kKeyGroups + warpgroup) * kTileBytes;
          const float2* rows = reinterpret_cast<const float2*>(shared + BackwardLayout::rows) + stage * kRowTile;
          uint32_t weights[16], dscores[16];
          barrier_wait(barriers.arrived(use), use / kQueryStages & 1);
          barrier_wait(barriers.summed(use), use / kQueryStages & 1);
          if (active) {
            weigh<T>(place, shared_address(k_tile), shared_address(v_tile), q_tile, dout_tile, rows, key,
                     block * kRowTile, scale_log2, weights, dscores);
          }
          if (use >= 2) barrier_wait(barriers.dscores_taken(use), (use / 2 - 1) & 1);
          if (active) {
            store_tile(dscores_tile, dscores);
            fence_async_proxy();
          }
          warp_arrive(barriers.dscores_ready(use));
          if (active) {
            const uint64_t q = tile_descriptor(q_tile), dout = tile_descriptor(dout_tile);
            wgmma_fence();
#  pragma unroll
            for (int step = 0; step < kRowTile / 16; ++step) {
              wgmma_rs<T>(dv, weights + 4 * step, dout + step * (16 * kTileRowBytes >> 4));
            }
#  pragma unroll
            for (int step = 0; step < kRowTile / 16; ++step) {
              wgmma_rs<T>(dk, dscores + 4 * step, q + step * (16 * kTileRowBytes >> 4));
            }
            wgmma_commit();
            wgmma_wait<0>();
          }
          warp_arrive(barriers.released(use));
        }
      }
    }
    if (active) {  // V is staging now: only this warpgroup has read it
      const int rows = min(round_end - key, kKeyBlock);
      const int64_t first_row = place.keys.start + key;
      warpgroup_sync(1 + warpgroup);
      write_tile(static_cast<T*>(args.dv), args.heads_kv, place.head_kv, args.width_v, first_row, rows, v_tile, dv,
                 1.0f);
      write_tile(static_cast<T*>(args.dk), args.heads_kv, place.head_kv, args.width, first_row, rows, v_tile, dk,
                 args.scale);
      fence_async_proxy();
    }
    if (begin < end) warp_arrive(barriers.keys_released(turn++));
  }
}

template <class T>
__device__ inline float dot_pairs(uint32_t a, uint32_t b) {
  const float2 x = unpack_pair<T>(a), y = unpack_pair<T>(b);
  return x.x * y.x + x.y * y.y;
}

// (LSE log2(e), D) of the rows of a query block. `out` holds this thread's chunks of O, loaded long before.
template <class T>
struct RowSums {
  uint4 out[4];

  static __device__ int row(int i) {
    return i * (kWarpgroup / kTileRowChunks) + threadIdx.x % kWarpgroup / kTileRowChunks;
  }

  __device__ void load(const VarlenBackwardArgs& args, const BackwardPlace& place, const Step& step, bool first) {
    if (!first) return;  // an earlier round left D in global memory
    const int head = place.head_kv * args.group + step.member, chunk = threadIdx.x % kTileRowChunks;
    constexpr int per_chunk = kChunkBytes / sizeof(T);
#  pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = step.block * kRowTile + row(i);
      out[i] = uint4{};
      if (at < place.queries.length && chunk * per_chunk < args.width_v) {
        const int64_t from = (int64_t{place.queries.start + at} * args.heads_kv * args.group + head) * args.width_v;
        out[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(args.out) + from + chunk * per_chunk);
      }
    }
  }

  __device__ void finish(const VarlenBackwardArgs& args, const BackwardPlace& place, const Step& step, bool first,
                         bool last, const char* dout_tile, float2* rows) const {
    const int head = place.head_kv * args.group + step.member, chunk = threadIdx.x % kTileRowChunks;
#  pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = step.block * kRowTile + row(i);
      float sum = 0.0f;
      if (first) {
        const uint4 dout = *reinterpret_cast<const uint4*>(dout_tile + swizzled(row(i), chunk));
        sum = dot_pairs<T>(out[i].x, dout.x) + dot_pairs<T>(out[i].y, dout.y) + dot_pairs<T>(out[i].z, dout.z) +
              dot_pairs<T>(out[i].w, dout.w);
#  pragma unroll
        for (int distance = 1; distance < kTileRowChunks; distance *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        }
      }
      if (chunk != 0) continue;
      float2 result = {INFINITY, 0.0f};  // no such row, or one that sees no key: P is 0
      if (at < place.queries.length) {
        const int64_t from = place.queries.start + at;
        const float lse = args.lse[int64_t{head} * args.total_q + from];
        if (first && args.dlse) sum -= args.dlse[head * args.stride_dlse + from];
        float* delta = args.delta + int64_t{head} * args.total_q + from;
        if (!first) sum = *delta;
        if (first && !last) *delta = sum;
        if (lse != -INFINITY) result = {lse * 1.4426950408889634f, sum};
      }
      rows[row(i)] = result;
    }
  }
};

template <class T>
__device__ inline void own_queries(const VarlenBackwardArgs& args, char* shared, const BackwardPlace& place,
                                   const BackwardBarriers& barriers, int first_block) {
  const bool leader = threadIdx.x == kQueryThread;
  const uint32_t base = shared_address(shared);
  const int group = args.group, heads = args.heads_kv * group;
  const auto key_blocks = [&](int round) {
    return (min((round + 1) * place.round_keys, place.keys.length) - round * place.round_keys + kKeyBlock - 1) /
           kKeyBlock;
  };
  // An earlier or a later round meets the block too: begin and end only grow from round to round.
  const auto first_round = [&](const Step& s) { return s.round == 0 || s.block >= place.end(s.round - 1); };
  const auto last_round = [&](const Step& s) {
    return s.round + 1 >= place.rounds || s.block < place.begin(s.round + 1);
  };

  Step copy(place, group), step = copy, next = copy;
  int copied = 0, copy_turn = 0, copy_round = -1, turn = 0;
  const auto start_copies = [&](int until) {
    // Two rounds of keys fit: a third may only come when the one before the current is done with.
    while (copied < until && !copy.ended(place) && copy_turn - (copy.round == copy_round) <= turn + 1) {
      if (copy.round != copy_round) {
        copy_round = copy.round;
        const int blocks = key_blocks(copy.round);
        if (leader) {
          if (copy_turn >= 2) barrier_wait(barriers.keys_released(copy_turn), (copy_turn / 2 - 1) & 1);
          barrier_expect(barriers.keys_arrived(copy_turn), blocks * 2 * kTileBytes);
          for (int i = 0; i < blocks; ++i) {
            const uint32_t tile = base + BackwardLayout::keys + (copy_turn % 2 * kKeyGroups + i) * 2 * kTileBytes;
            const int row = place.keys.start + copy.round * place.round_keys + i * kKeyBlock;
            copy_tile(tile, &args.k, place.head_kv, row, barriers.keys_arrived(copy_turn));
            copy_tile(tile + kTileBytes, &args.v, place.head_kv, row, barriers.keys_arrived(copy_turn));
          }
        }
        ++copy_turn;
      }
      if (leader) {
        const uint32_t tile = base + BackwardLayout::queries + copied % kQueryStages * 2 * kTileBytes;
        const int row = place.queries.start + copy.block * kRowTile, head = place.head_kv * group + copy.member;
        if (copied >= kQueryStages) barrier_wait(barriers.released(copied), (copied / kQueryStages - 1) & 1);
        barrier_expect(barriers.arrived(copied), 2 * kTileBytes);
        copy_tile(tile, &args.q, head, row, barriers.arrived(copied));
        copy_tile(tile + kTileBytes, &args.dout, head, row, barriers.arrived(copied));
      }
      ++copied;
      copy.advance(place, group);
    }
    __syncwarp();
  };

  RowSums<T> sums;
  const auto sum_rows = [&](int use, const Step& s) {
    char* const q_tile = shared + BackwardLayout::queries + use % kQueryStages * 2 * kTileBytes;
    barrier_wait(barriers.arrived(use), use / kQueryStages & 1);
    const int rows = place.queries.length - s.block * kRowTile;
    if (rows < kRowTile) {
      zero_tail(q_tile, rows);
      zero_tail(q_tile + kTileBytes, rows);
      warpgroup_sync(1 + kKeyGroups);
    }
    sums.finish(args, place, s, first_round(s), last_round(s), q_tile + kTileBytes,
                reinterpret_cast<float2*>(shared + BackwardLayout::rows) + use % kQueryStages * kRowTile);
    warp_arrive(barriers.summed(use));
  };

  start_copies(2);
  if (!next.ended(place)) {
    sums.load(args, place, next, first_round(next));
    sum_rows(0, next);
    next.advance(place, group);
  }
  for (int use = 0; !step.ended(place); ++use) {
    start_copies(use + 3);
    const bool more = !next.ended(place) && copied > use + 1;
    if (more) sums.load(args, place, next, first_round(next));
    barrier_wait(barriers.dscores_ready(use), use / 2 & 1);
    float dq[32];
    wgmma_fence();
    const int blocks = key_blocks(step.round);
    for (int i = 0; i < blocks; ++i) {
      const uint64_t dscores =
          tile_descriptor(base + BackwardLayout::dscores + (use % 2 * kKeyGroups + i) * kTileBytes);
      const uint64_t k = tile_descriptor(base + BackwardLayout::keys + (turn % 2 * kKeyGroups + i) * 2 * kTileBytes);
#  pragma unroll
      for (int s = 0; s < kKeyBlock / 16; ++s) {
        constexpr uint64_t rows = 16 * kTileRowBytes >> 4;
        wgmma_ss_transposed<T>(dq, dscores + s * rows, k + s * rows, i + s > 0);
      }
    }
    wgmma_commit();
    if (more) {
      sum_rows(use + 1, next);
      next.advance(place, group);
    }
    wgmma_wait<0>();
    warp_arrive(barriers.dscores_taken(use));
    const int head = place.head_kv * group + step.member;
    float4* partial = args.partial_dq + (int64_t{first_block + step.block} * heads + head) * 8 * kWarpgroup +
                      threadIdx.x % kWarpgroup;
    if (!first_round(step)) {
#  pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 before = partial[j * kWarpgroup];
        dq[4 * j] += before.x, dq[4 * j + 1] += before.y, dq[4 * j + 2] += before.z, dq[4 * j + 3] += before.w;
      }
    }
    if (last_round(step)) {
      write_tile(static_cast<T*>(args.dq), heads, head, args.width, place.queries.start + step.block * kRowTile,
                 place.queries.length - step.block * kRowTile, shared + BackwardLayout::staging, dq, args.scale);
    } else {
#  pragma unroll
      for (int j = 0; j < 8; ++j) {
        partial[j * kWarpgroup] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
      }
    }
    const int round = step.round;
    step.advance(place, group);
    turn += step.round != round;
    if (!more && !next.ended(place)) {  // the next round's keys had no room yet
      start_copies(use + 2);
      sums.load(args, place, next, first_round(next));
      sum_rows(use + 1, next);
      next.advance(place, group);
    }
  }
}

// The sequence with the slot-th most work, so that the longest start first; all threads of the block call it.
__device__ inline int ranked_sequence(const VarlenBackwardArgs& args, int slot, int* work) {
  const int b = threadIdx.x;
  if (args.batch > kMostRanked) return slot;
  const auto blocks = [](const Span& span) { return min(span.length / kRowTile, (1 << 14) - 1) + 1; };
  if (b < args.batch) {
    work[b] = blocks(sequence_span(args.cu_seqlens_q, b, args.batch, args.total_q, false)) *
              blocks(sequence_span(args.cu_seqlens_k, b, args.batch, args.total_k, false));
  }
  __syncthreads();
  if (b < args.batch) {
    int rank = 0;
    for (int other = 0; other < args.batch; ++other) {
      rank += work[other] > work[b] || (work[other] == work[b] && other < b);
    }
    if (rank == slot) work[kMostRanked] = b;
  }
  __syncthreads();
  return work[kMostRanked];
}

#endif  // FA_HOPPER

template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    varlen_attention_bwd_kernel(const __grid_constant__ VarlenBackwardArgs args) {
#ifdef FA_HOPPER
  extern __shared__ __align__(1024) char shared[];
  const int slot = blockIdx.x / args.heads_kv, heads = args.heads_kv * args.group;
  BackwardPlace place;
  place.head_kv = blockIdx.x % args.heads_kv;
  const auto zero_queries = [&](int from, int to) {
    for (int member = 0; member < args.group; ++member) {
      zero_rows(static_cast<T*>(args.dq), heads, place.head_kv * args.group + member, args.width, place.queries.start,
                from, to);
    }
  };
  const int b =
      slot < args.batch ? ranked_sequence(args, slot, reinterpret_cast<int*>(shared + BackwardLayout::rows)) : slot;
  place.queries = sequence_span(args.cu_seqlens_q, b, args.batch, args.total_q, true);
  place.keys = sequence_span(args.cu_seqlens_k, b, args.batch, args.total_k, true);
  if (b == args.batch) {  // rows behind the last sequence
    zero_queries(0, place.queries.length);
    zero_rows(static_cast<T*>(args.dk), args.heads_kv, place.head_kv, args.width, place.keys.start, 0,
              place.keys.length);
    zero_rows(static_cast<T*>(args.dv), args.heads_kv, place.head_kv, args.width_v, place.keys.start, 0,
              place.keys.length);
    return;
  }
  const int shift = args.top_left ? 0 : place.keys.length - place.queries.length;
  place.seen_by = {place.queries.length, -shift, args.window_right, args.window_left};
  const int key_blocks = (place.keys.length + kKeyBlock - 1) / kKeyBlock;
  place.rounds = (key_blocks + kKeyGroups - 1) / kKeyGroups;
  place.round_keys = place.rounds > 0 ? (key_blocks + place.rounds - 1) / place.rounds * kKeyBlock : kKeyBlock;
  place.rounds = (place.keys.length + place.round_keys - 1) / place.round_keys;
  // Queries that see nothing lie before the first round's and behind the last round's.
  const int seen_from = place.rounds > 0 ? place.begin(0) * kRowTile : place.queries.length;
  const int seen_to = place.rounds > 0 ? max(place.end(place.rounds - 1) * kRowTile, seen_from) : place.queries.length;
  zero_queries(0, min(seen_from, place.queries.length));
  zero_queries(seen_to, place.queries.length);

  const BackwardBarriers barriers = {shared_address(shared) + BackwardLayout::barriers};
  if (threadIdx.x == 0) {
    barriers.init();
    fence_async_proxy();
  }
  __syncthreads();
  if (warpgroup_index() < kKeyGroups) {
    own_keys<T>(args, shared, place, barriers);
  } else {
    own_queries<T>(args, shared, place, barriers, place.queries.start / kRowTile + b);
  }
#endif
}

}  // namespace flowattn
