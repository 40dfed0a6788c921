// Device code of selective_scan: x_t = E_t x_{t-1} + d_t u_t B_t with E_t = exp(d_t A), y_t = <C_t, x_t> + skip u_t.
//
// A block walks one (sequence, channels of one group), or a span of its time, token by token. P lanes share a channel,
// each with K of its N states in registers; sums over N take log2(P) shuffles. Tiles of kTile tokens pass through
// shared memory: the next one travels in registers while this one is walked, and threads are laid along whichever of
// time and channels is contiguous. Tokens that do not exist have d = u = 0 and B = C = 0: they change nothing.
//
// Where there are few blocks time is cut into spans. `ends` walks each span from nothing, `carry` chains what comes out
// (the decay of a whole span is exp(A sum d)), and each span is walked again from the state that enters it.
#pragma once

#include "cuda/selective_scan_tiles.cuh"

namespace flowattn {

// ---- forward ------------------------------------------------------------------------------------------------------

// Shared memory of the forward, in floats.
template <class Z>
struct SelectiveForwardMemory {
  static constexpr int kRows = kTile * (Z::kStates + 4);
  static constexpr int B = 0, C = B + kRows, u = C + kRows, d = u + Z::kTileFloats, z = d + Z::kTileFloats,
                       out = z + Z::kTileFloats, slots = out + Z::kTileFloats, bias = slots + kTile,
                       kFloats = bias + Z::kChannels;
};

template <class S, class Z>
__global__ void __launch_bounds__(Z::kThreads, 2)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanArgs args) {
  typedef SelectiveForwardMemory<Z> At;
  typedef RowLoad<S, Z, 1> Rows;
  constexpr int K = Z::K;
  extern __shared__ __align__(16) float shared[];
  int* slots = reinterpret_cast<int*>(shared + At::slots);
  const SelectiveRun<Z> run(args);
  const SelectiveLane<Z> lane(run, false);
  const TileMap<Z> map(args.u);
  const Floats<K> rates = load_rates(lane, args);
  const float skip = args.skip && lane.active ? args.skip[lane.channel] : 0.0f;
  Floats<K> x = lane.load(args.start, run.place, args);
  TileLoad<S, Z> u, delta, z;
  Rows B, C;
  u.aim(map, args.u, run, 0), delta.aim(map, args.delta, run, 0), z.aim(map, args.z, run, 0);
  B.aim(args.B, run, 0), C.aim(args.C, run, 0);
  const auto start_tile = [&](int tile) {
    u.load(map, args.u, run, tile, kTile), delta.load(map, args.delta, run, tile, kTile);
    if (args.z.data) z.load(map, args.z, run, tile, kTile);
    B.load(args.B, run, args.states, tile, kTile), C.load(args.C, run, args.states, tile, kTile);
  };
  if (run.count) start_tile(0);
  stage_bias(shared + At::bias, args, run);
  __syncthreads();
  for (int tile = 0; tile < run.count; tile += kTile) {
    map.each(run, tile, [&](int i, int at, int c, bool exists) {
      shared[At::u + at] = to_float(u.raw[i]);
      shared[At::d + at] = exists ? step_size(to_float(delta.raw[i]) + shared[At::bias + c], args.softplus) : 0.0f;
      if (args.z.data) shared[At::z + at] = to_float(z.raw[i]);
    });
    B.commit(shared + At::B, args.B, run, args.states, tile);
    C.commit(shared + At::C, args.C, run, args.states, tile);
    const bool has_slots = stage_slots(slots, args.slots, args.num_slots, run, tile);
    if (tile + kTile < run.count) start_tile(tile + kTile);
    if (args.carries) lane.store_carry(args, run.chunk + tile / kTile, x);
    const int count = min(kTile, run.count - tile);
#pragma unroll 1
    for (int t = 0; t < count; t += kStep) {
      float y[kStep];
      Floats<K> after[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const int at = (t + i) * Z::kPitch + lane.column, row = (t + i) * Rows::kPitch + lane.first;
        const float d = shared[At::d + at], du = d * shared[At::u + at];
        const Floats<K> b = load<K>(shared + At::B + row), c = load<K>(shared + At::C + row);
        y[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          x[k] = fmaf(exp2_approx(d * rates[k]), x[k], du * b[k]);
          y[i] = fmaf(x[k], c[k], y[i]);
        }
        after[i] = x;
      }
      const float sum = transposed_sum<Z>(y);
      if (lane.part < kStep) {  // a token for each lane
        const int at = (t + lane.part) * Z::kPitch + lane.column;
        float result = fmaf(skip, shared[At::u + at], sum);
        if (args.z.data) result *= shared[At::z + at] * sigmoid(shared[At::z + at]);
        shared[At::out + at] = result;
      }
      if (has_slots) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const int slot = slots[t + i];
          if (slot >= 0) lane.store(args.slot_states, run.row * args.num_slots + slot, after[i], args);
        }
      }
    }
    __syncthreads();
    store_tile<S>(shared + At::out, args.out, run, tile);
  }
  if (args.end) lane.store(args.end, run.place, x, args);
}

// ---- spans --------------------------------------------------------------------------------------------------------

// What a span makes of nothing. Forward: x = E x + (d u) B. Backward, from the last token to the first: the gradient of
// the state before a token, g = E (g + gy C).
template <class S, class Z>
__global__ void __launch_bounds__(Z::kThreads, 2)
    selective_scan_ends_kernel(const __grid_constant__ SelectiveScanArgs args, bool backward) {
  typedef SelectiveForwardMemory<Z> At;
  typedef RowLoad<S, Z, 1> Rows;
  constexpr int K = Z::K;
  extern __shared__ __align__(16) float shared[];
  int* slots = reinterpret_cast<int*>(shared + At::slots);
  SelectiveRun<Z> run(args);
  if (backward) run.turn();
  const SelectiveLane<Z> lane(run, false);
  const TileMap<Z> map(args.u);
  const Floats<K> rates = load_rates(lane, args);
  const ScanTensor& scale_tensor = backward ? args.dout : args.u;
  const StateRows& row_tensor = backward ? args.C : args.B;
  const bool gated = backward && args.z.data;
  Floats<K> x = splat<K>(0.0f);
  float steps = 0.0f;
  TileLoad<S, Z> scales, delta, z;
  Rows rows;
  scales.aim(map, scale_tensor, run, 0), delta.aim(map, args.delta, run, 0), z.aim(map, args.z, run, 0);
  rows.aim(row_tensor, run, 0);
  const auto start_tile = [&](int tile) {
    scales.load(map, scale_tensor, run, tile, kTile), delta.load(map, args.delta, run, tile, kTile);
    if (gated) z.load(map, args.z, run, tile, kTile);
    rows.load(row_tensor, run, args.states, tile, kTile);
  };
  if (run.count) start_tile(0);
  stage_bias(shared + At::bias, args, run);
  __syncthreads();
  for (int tile = 0; tile < run.count; tile += kTile) {
    map.each(run, tile, [&](int i, int at, int c, bool exists) {
      const float d = exists ? step_size(to_float(delta.raw[i]) + shared[At::bias + c], args.softplus) : 0.0f;
      float scale = to_float(scales.raw[i]) * (backward ? 1.0f : d);
      if (gated) scale *= to_float(z.raw[i]) * sigmoid(to_float(z.raw[i]));
      shared[At::d + at] = d, shared[At::u + at] = scale;
    });
    rows.commit(shared + At::B, row_tensor, run, args.states, tile);
    const bool has_slots =
        stage_slots(slots, backward && args.dslot_states ? args.slots : nullptr, args.num_slots, run, tile);
    if (tile + kTile < run.count) start_tile(tile + kTile);
    const int count = min(kTile, run.count - tile);
    float tile_steps = 0.0f;
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const int at = t * Z::kPitch + lane.column;
      const float d = shared[At::d + at], scale = shared[At::u + at];
      const Floats<K> b = load<K>(shared + At::B + t * Rows::kPitch + lane.first);
      if (has_slots && slots[t] >= 0) {
        const Floats<K> more = lane.load(args.dslot_states, run.row * args.num_slots + slots[t], args);
#pragma unroll
        for (int k = 0; k < K; ++k) x[k] += more[k];
      }
      tile_steps += d;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float decay = exp2_approx(d * rates[k]), in = scale * b[k];
        x[k] = backward ? decay * (x[k] + in) : fmaf(decay, x[k], in);
      }
    }
    steps += tile_steps;
    __syncthreads();
  }
  lane.store(args.end, run.place, x, args);
  if (lane.part == 0 && lane.active) args.step_sums[run.place * args.channels + lane.channel] = steps;
}

// Turns what spans make of nothing into the states that enter them: ends (sequences * spans, size), size = channels *
// N. The chain starts from `first` and leaves `last`, (sequences, size) or nullptr.
constexpr int kCarryThreads = 128;

__global__ void __launch_bounds__(kCarryThreads)
    selective_scan_carry_kernel(float* ends, const float* step_sums, const float* A, const float* first, float* last,
                                int size, int states, int spans, bool backward) {
  const int at = blockIdx.x * kCarryThreads + threadIdx.x;
  const int64_t sequence = blockIdx.y;
  if (at >= size) return;
  const float rate = A[at] * kLog2E;
  float state = first ? first[sequence * size + at] : 0.0f;
  for (int k = 0; k < spans; ++k) {
    const int64_t place = sequence * spans + (backward ? spans - 1 - k : k);
    const float own = ends[place * size + at];
    ends[place * size + at] = state;
    state = fmaf(exp2_approx(rate * step_sums[place * (size / states) + at / states]), state, own);
  }
  if (last) last[sequence * size + at] = state;
}

}  // namespace flowattn
