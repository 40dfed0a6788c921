// Device code of the backward of selective_scan. Tiles go from the last to the first. The states of a tile are walked
// again from the kept one in front of it, first for the state before every stretch of kStretch tokens, then, backwards,
// a stretch at a time, whose states x and decays E stay in registers. With g the gradient that later tokens send back
// to the state,
//   lambda = g + gy_t C_t,  dC_t = sum gy_t x_t,  dB_t = sum lambda d_t u_t,  g = E_t lambda,  through = g x_{t-1},
//   du_t = d_t <lambda, B_t> + skip gy_t,  dd_t = <through, A> + u_t <lambda, B_t>,  dA = sum through d_t,
// so that g before the first token is the gradient of the initial state. dB and dC are sums over channels: transposed
// sums over the lanes of a warp, then over the warps in shared memory, then, in a second kernel, over blocks.
#pragma once

#include "cuda/selective_scan.cuh"

namespace flowattn {

// Sums b and c over the channels of a warp, in place. Afterwards register k counts where k % kOrders == 0; it holds
// state k ^ order. Where lanes are left, those of the upper half of the channels hold the sum of c in place of b.
template <class Z>
__device__ inline void sum_channels(Floats<Z::K>& b, Floats<Z::K>& c) {
  constexpr int P = Z::P;
  const auto receive = [](float& to, float sent, int channels) {
    to += __shfl_xor_sync(kWholeWarp, sent, P * channels);
  };
#pragma unroll
  for (int half = 1; half < Z::kOrders; half *= 2) {
#pragma unroll
    for (int k = 0; k < Z::K; ++k) {
      if (k % (2 * half)) continue;  // register k + half of the other lane is what this one holds in k
      receive(b[k], b[k + half], half), receive(c[k], c[k + half], half);
    }
  }
  if constexpr (Z::kOrders < Z::kWarpChannels) {
    static_assert(Z::kOrders == Z::K);
    const bool upper = threadIdx.x & P * (Z::kWarpChannels / 2);
    const float sent = upper ? b[0] : c[0];
    if (upper) b[0] = c[0];
    receive(b[0], sent, Z::kWarpChannels / 2);
#pragma unroll
    for (int channels = Z::kOrders; channels < Z::kWarpChannels / 2; channels *= 2) receive(b[0], b[0], channels);
  }
}

// Shared memory of the backward, in floats; kStretch tokens have their states in registers.
template <class Z>
struct SelectiveBackwardMemory {
  static constexpr int kStretch = Z::K > kStep ? kStep : 2 * kStep, kStretches = kTile / kStretch;
  static constexpr int kRows = kTile * (Z::kOrders * Z::kStates + 4);
  static constexpr int kSums = 2 * Z::kStates;  // of a token, in each warp
  static constexpr int B = 0, C = B + kRows, states = C + kRows, sums = states + (kStretches - 1) * Z::kThreads * Z::K,
                       u = sums + Z::kWarps * kStretch * kSums, d = u + Z::kTileFloats, gy = d + Z::kTileFloats,
                       z = gy + Z::kTileFloats, slots = z + Z::kTileFloats, bias = slots + kTile,
                       kFloats = bias + Z::kChannels;
};

template <class S, class Z>
__global__ void __launch_bounds__(Z::kThreads, 2)
    selective_scan_bwd_kernel(const __grid_constant__ SelectiveScanArgs args) {
  typedef SelectiveBackwardMemory<Z> At;
  typedef RowLoad<S, Z, Z::kOrders> Rows;
  constexpr int K = Z::K, kStretch = At::kStretch;
  extern __shared__ __align__(16) float shared[];
  int* slots = reinterpret_cast<int*>(shared + At::slots);
  const SelectiveRun<Z> run(args);
  const SelectiveLane<Z> lane(run, true);
  const TileMap<Z> map(args.u);
  const Floats<K> rates = load_rates(lane, args);
  const float skip = args.skip && lane.active ? args.skip[lane.channel] : 0.0f;
  const int row_offset = lane.order * Z::kStates + lane.first;
  const bool gated = args.z.data;
  Floats<K> g = lane.load(args.start, run.place, args), carry = splat<K>(0.0f), dA = splat<K>(0.0f);
  float dskip = 0.0f, dbias = 0.0f;
  TileLoad<S, Z> u, delta, dout, z;
  Rows B, C;
  const auto start_tile = [&](int tile) {
    u.load(map, args.u, run, tile, -kTile), delta.load(map, args.delta, run, tile, -kTile);
    dout.load(map, args.dout, run, tile, -kTile);
    if (gated) z.load(map, args.z, run, tile, -kTile);
    B.load(args.B, run, args.states, tile, -kTile), C.load(args.C, run, args.states, tile, -kTile);
    carry = lane.load_carry(args, run.chunk + tile / kTile);
  };

  // One token from x to x, returning its decays.
  const auto advance = [&](Floats<K>& x, int t) {
    const int at = t * Z::kPitch + lane.column;
    const float d = shared[At::d + at], du = d * shared[At::u + at];
    const Floats<K> b = load<K>(shared + At::B + t * Rows::kPitch + row_offset);
    Floats<K> decays;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      decays[k] = exp2_approx(d * rates[k]);
      x[k] = fmaf(decays[k], x[k], du * b[k]);
    }
    return decays;
  };

  // dB and dC of a stretch, summed over the warps, to this block's part: thread by thread along what is contiguous.
  const bool by_time = args.parts.time < args.parts.state;
  const int64_t part =
      run.block * args.part + run.row * args.parts.row + run.group * args.parts.group + run.origin * args.parts.time;
  const auto store_sums = [&](int position) {
#pragma unroll
    for (int e = 0; e < kStretch * At::kSums; e += Z::kThreads) {
      const int mine = e + threadIdx.x;
      const int i = by_time ? mine % kStretch : mine / At::kSums, number = by_time ? mine / kStretch : mine % At::kSums;
      const int n = number % Z::kStates;
      if (mine >= kStretch * At::kSums || position + i >= run.count || n >= args.states) continue;
      const float* sums = shared + At::sums + i * At::kSums + number;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < Z::kWarps; ++warp) sum += sums[warp * kStretch * At::kSums];
      float* to = (number < Z::kStates ? args.dB_parts : args.dC_parts) + part;
      to[int64_t{run.step} * (position + i) * args.parts.time + n * args.parts.state] = sum;
    }
  };

  int tile = (run.tiles() - 1) * kTile;
  u.aim(map, args.u, run, tile), delta.aim(map, args.delta, run, tile), dout.aim(map, args.dout, run, tile);
  z.aim(map, args.z, run, tile), B.aim(args.B, run, tile), C.aim(args.C, run, tile);
  if (run.count) start_tile(tile);
  stage_bias(shared + At::bias, args, run);
  __syncthreads();
  for (; tile >= 0; tile -= kTile) {
    map.each(run, tile, [&](int i, int at, int c, bool exists) {
      float gy = to_float(dout.raw[i]);
      if (gated) {  // gy = dout silu(z), and dz = y z'
        const float gate = to_float(z.raw[i]), open = sigmoid(gate);
        shared[At::z + at] = gy * open * fmaf(gate, 1.0f - open, 1.0f);
        gy *= gate * open;
      }
      shared[At::gy + at] = gy;
      shared[At::u + at] = to_float(u.raw[i]);
      shared[At::d + at] = exists ? step_size(to_float(delta.raw[i]) + shared[At::bias + c], args.softplus) : 0.0f;
    });
    B.commit(shared + At::B, args.B, run, args.states, tile);
    C.commit(shared + At::C, args.C, run, args.states, tile);
    const bool has_slots = stage_slots(slots, args.dslot_states ? args.slots : nullptr, args.num_slots, run, tile);
    const int count = min(kTile, run.count - tile), stretches = (count + kStretch - 1) / kStretch;
    float* kept = shared + At::states + threadIdx.x * K;  // only this thread's
    Floats<K> start = carry;
#pragma unroll 1
    for (int s = 0; s + 1 < stretches; ++s) {
      store<K>(kept + s * Z::kThreads * K, start);
#pragma unroll
      for (int i = 0; i < kStretch; ++i) advance(start, s * kStretch + i);
    }
    if (tile) start_tile(tile - kTile);
    Floats<K> tile_dA = splat<K>(0.0f);
    float tile_dskip = 0.0f, tile_dbias = 0.0f;
    const auto walk_back = [&](int first, auto with_slots) {
      Floats<K> states[kStretch], decays[kStretch], x = start;
      float y[kStretch];
#pragma unroll
      for (int i = 0; i < kStretch; ++i) {
        decays[i] = advance(x, first + i);
        states[i] = x;
        y[i] = 0.0f;
        if (gated) {
          const Floats<K> c = load<K>(shared + At::C + (first + i) * Rows::kPitch + row_offset);
#pragma unroll
          for (int k = 0; k < K; ++k) y[i] = fmaf(x[k], c[k], y[i]);
        }
      }
#pragma unroll
      for (int group = kStretch - kStep; group >= 0; group -= kStep) {
        float along_A[kStep], along_B[kStep];
#pragma unroll
        for (int j = kStep - 1; j >= 0; --j) {
          const int i = group + j, t = first + i, at = t * Z::kPitch + lane.column;
          const float d = shared[At::d + at], du = d * shared[At::u + at], gy = shared[At::gy + at];
          const Floats<K> b = load<K>(shared + At::B + t * Rows::kPitch + row_offset);
          const Floats<K> c = load<K>(shared + At::C + t * Rows::kPitch + row_offset);
          if constexpr (with_slots) {
            if (slots[t] >= 0) {
              const Floats<K> more = lane.load(args.dslot_states, run.row * args.num_slots + slots[t], args);
#pragma unroll
              for (int k = 0; k < K; ++k) g[k] += more[k];
            }
          }
          Floats<K> db, dc;
          along_A[j] = along_B[j] = 0.0f;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const float lambda = fmaf(gy, c[k], g[k]);
            g[k] = decays[i][k] * lambda;
            const float through = g[k] * (i ? states[i ? i - 1 : 0][k] : start[k]);
            db[k] = lambda * du, dc[k] = gy * states[i][k];
            tile_dA[k] = fmaf(through, d, tile_dA[k]);
            along_A[j] = fmaf(through, rates[k], along_A[j]);
            along_B[j] = fmaf(lambda, b[k], along_B[j]);
          }
          sum_channels<Z>(db, dc);
          float* sums = shared + At::sums + (threadIdx.x / kWarp * kStretch + i) * At::kSums;
          if constexpr (Z::kOrders < Z::kWarpChannels) {
            constexpr int kHalf = Z::kWarpChannels / 2;
            if (lane.in_warp % kHalf < Z::kOrders) {
              sums[lane.in_warp / kHalf * Z::kStates + lane.state(0)] = db[0];
            }
          } else {
#pragma unroll
            for (int k = 0; k < K; k += Z::kOrders) {
              sums[lane.state(k)] = db[k], sums[Z::kStates + lane.state(k)] = dc[k];
            }
          }
        }
        const float sum_A = transposed_sum<Z>(along_A) * kLn2, sum_B = transposed_sum<Z>(along_B);
        float sum_y = 0.0f;
        if (gated) {
          float part[kStep];
#pragma unroll
          for (int j = 0; j < kStep; ++j) part[j] = y[group + j];
          sum_y = transposed_sum<Z>(part);
        }
        const int t = first + group + lane.part;
        if (lane.part < kStep && t < count) {  // a token for each lane; results replace what they were made from
          const int at = t * Z::kPitch + lane.column;
          const float d = shared[At::d + at], value = shared[At::u + at], gy = shared[At::gy + at];
          const float slope = args.softplus ? -expm1f(-d) : 1.0f;  // of softplus, by what it gave
          const float dd = fmaf(sum_B, value, sum_A) * slope;
          shared[At::u + at] = fmaf(sum_B, d, skip * gy), shared[At::d + at] = dd;
          if (gated) shared[At::z + at] *= fmaf(skip, value, sum_y);
          tile_dskip = fmaf(gy, value, tile_dskip), tile_dbias += dd;
        }
      }
    };
#pragma unroll 1
    for (int s = stretches - 1; s >= 0; --s) {
      const int first = s * kStretch;
      if (s + 1 < stretches) start = load<K>(kept + s * Z::kThreads * K);
      if (has_slots) {
        walk_back(first, std::true_type{});
      } else {
        walk_back(first, std::false_type{});
      }
      __syncthreads();
      store_sums(tile + first);
      __syncthreads();
    }
    store_tile<S>(shared + At::u, args.du, run, tile);
    store_tile<S>(shared + At::d, args.ddelta, run, tile);
    if (gated) store_tile<S>(shared + At::z, args.dz, run, tile);
    __syncthreads();
    // Sums of sums: one running sum over all tokens would lose digits.
    dskip += tile_dskip, dbias += tile_dbias;
#pragma unroll
    for (int k = 0; k < K; ++k) dA[k] += tile_dA[k];
  }
  if (args.end) lane.store(args.end, run.place, g, args);
  lane.store(args.dA_parts, run.place, dA, args);
#pragma unroll
  for (int step = 1; step < kStep; step *= 2) {
    dskip += __shfl_xor_sync(kWholeWarp, dskip, step), dbias += __shfl_xor_sync(kWholeWarp, dbias, step);
  }
  if (lane.part == 0 && lane.active) {
    const int64_t at = run.place * args.channels + lane.channel;
    args.dskip_parts[at] = dskip, args.dbias_parts[at] = dbias;
  }
}

}  // namespace flowattn
