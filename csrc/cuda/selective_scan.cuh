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

#include "common/scan.h"
#include "cuda/row_vectors.cuh"

namespace flowattn {

constexpr int kSelectiveThreads = 128, kSelectiveWarps = kSelectiveThreads / kWarp;
constexpr int kTile = 32;  // tokens of a tile, and between two states that the forward keeps for the backward
constexpr int kStep = 4;   // tokens walked at once: their sums over N are transposed to one token a lane
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

struct SelectiveScanArgs {
  int64_t tokens;
  int channels, groups, states;
  int blocks;           // of the channels of a group
  int spans, span;      // spans of a sequence, tokens of a span
  const int32_t* ends;  // cu_seqlens; nullptr: every row is a sequence
  bool softplus, reverse;
  ScanTensor u, delta, z;  // (B, L, channels) by strides: a head is a channel
  StateRows B, C;
  const float *A, *skip, *bias;  // (channels, N), (channels) or nullptr
  const int32_t* slots;          // (L), nullptr: no state is wanted; -1 or where the state after the token goes
  int64_t num_slots;
  // (places, channels, N), a place being a span of a sequence: states before and after it; in the backward, gradients
  // of the states after and before it. nullptr: zeros, not wanted.
  const float* start;
  float* end;
  float* step_sums;  // (places, channels): sums of d
  float* carries;    // (chunks, N, channels): the state before every tile, nullptr: not kept

  // Forward only.
  ScanTensor out;
  float* slot_states;  // (B, num_slots, channels, N)

  // Backward only.
  ScanTensor dout, du, ddelta, dz;
  const float* dslot_states;  // nullptr: no gradient comes from them
  StateRows parts;            // strides of the two below
  float *dB_parts, *dC_parts;
  int64_t part;                                 // from one block of channels to the next there
  float *dA_parts, *dskip_parts, *dbias_parts;  // (places, channels, N), (places, channels)
};

// How K states a lane and P lanes a channel fill a block.
template <int K_, int P_>
struct SelectiveShape {
  static constexpr int K = K_, P = P_;
  static constexpr int kStates = K * P, kWarpChannels = kWarp / P, kChannels = kSelectiveThreads / P;
  static constexpr int kPitch = kChannels + 1;  // of a token's row of channels: transposing hits all banks
  static constexpr int kLoads = kTile * kChannels / kSelectiveThreads;
  static constexpr int kRowLoads = kTile * kStates / kSelectiveThreads;
  static constexpr bool kRowsEarly = kRowLoads <= 16;  // few enough to wait in registers
  // The backward sums over the channels of a warp. Lanes hold their K states in an order of their own, so that these
  // sums transpose without selecting: register k holds state k ^ order, order < kOrders.
  static constexpr int kOrders = K < kWarpChannels ? K : kWarpChannels;
  static constexpr int kTileFloats = kTile * kPitch;
};

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(s) with s = y / (2 + y) <= 1/3: no digit of a small y is lost.
__device__ inline float log1p_of_fraction(float y) {
  const float s = __fdividef(y, y + 2.0f), q = s * s;
  float p = fmaf(q, 1.0f / 13, 1.0f / 11);  // the series; the next term is below 5e-9 of the first
  p = fmaf(p, q, 1.0f / 9), p = fmaf(p, q, 1.0f / 7), p = fmaf(p, q, 1.0f / 5), p = fmaf(p, q, 1.0f / 3);
  return 2.0f * s * fmaf(p, q, 1.0f);
}

// d of delta + bias; from 20 on softplus is the identity, as in torch. Both sides are computed: a branch costs more.
__device__ inline float step_size(float x, bool softplus) {
  const float soft = fmaxf(x, 0.0f) + log1p_of_fraction(__expf(-fabsf(x)));
  return softplus && !(x > 20.0f) ? soft : x;
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// ---- what a block walks -------------------------------------------------------------------------------------------

// Positions 0..count of a span, in the order of the recurrence.
template <class Z>
struct SelectiveRun {
  int64_t place, row, chunk;
  int64_t origin;  // token of position 0
  int step;        // 1, or -1 towards earlier tokens
  int count;
  int block, group, channel, channels;  // first channel, how many exist

  __device__ explicit SelectiveRun(const SelectiveScanArgs& args) {
    const int per_place = args.groups * args.blocks, rest = static_cast<int>(blockIdx.x % per_place);
    place = blockIdx.x / per_place;
    const int64_t sequence = place / args.spans;
    int64_t first = 0, length = args.tokens;
    row = sequence;
    if (args.ends) {  // whatever stands there, the tokens exist
      row = 0, first = min(max(int64_t{args.ends[sequence]}, int64_t{0}), args.tokens);
      length = max(min(int64_t{args.ends[sequence + 1]}, args.tokens) - first, int64_t{0});
    }
    const int64_t begin = min(place % args.spans * args.span, length);
    count = static_cast<int>(min(begin + args.span, length) - begin);
    step = args.reverse ? -1 : 1;
    origin = args.reverse ? first + length - 1 - begin : first + begin;
    chunk = (row * args.tokens + first) / kTile + sequence + begin / kTile;
    block = rest % args.blocks, group = rest / args.blocks;
    const int group_size = args.channels / args.groups;
    channel = group * group_size + block * Z::kChannels;
    channels = min(Z::kChannels, group_size - block * Z::kChannels);
  }
  __device__ void turn() { origin += int64_t{step} * (count - 1), step = -step; }
  __device__ int64_t token(int position) const { return origin + int64_t{step} * position; }
  __device__ int tiles() const { return (count + kTile - 1) / kTile; }
};

// The channel and the states of a thread.
template <class Z>
struct SelectiveLane {
  int part, column;  // which of the P lanes, which channel of the block
  int in_warp;       // which channel of the warp
  int order;         // register k holds state first + (k ^ order)
  int first;
  int channel;
  bool active;

  __device__ SelectiveLane(const SelectiveRun<Z>& run, bool ordered) {
    part = threadIdx.x % Z::P, column = threadIdx.x / Z::P, in_warp = threadIdx.x % kWarp / Z::P;
    order = ordered ? in_warp % Z::kOrders : 0;
    first = part * Z::K, channel = run.channel + column, active = column < run.channels;
  }
  __device__ int state(int k) const { return first + (k ^ order); }

  // This lane's states in rows (channels, N), row `index` of such.
  __device__ Floats<Z::K> load(const float* from, int64_t index, const SelectiveScanArgs& args) const {
    Floats<Z::K> to;
    const float* row = from + (index * args.channels + channel) * args.states;
#pragma unroll
    for (int k = 0; k < Z::K; ++k) to[k] = from && active && state(k) < args.states ? row[state(k)] : 0.0f;
    return to;
  }
  __device__ void store(float* to, int64_t index, const Floats<Z::K>& from, const SelectiveScanArgs& args) const {
    float* row = to + (index * args.channels + channel) * args.states;
#pragma unroll
    for (int k = 0; k < Z::K; ++k) {
      if (active && state(k) < args.states) row[state(k)] = from[k];
    }
  }
  // The same in rows (N, channels), as carries are kept.
  __device__ float* carry(const SelectiveScanArgs& args, int64_t chunk, int k) const {
    return args.carries + (chunk * args.states + state(k)) * args.channels + channel;
  }
  __device__ Floats<Z::K> load_carry(const SelectiveScanArgs& args, int64_t chunk) const {
    Floats<Z::K> to;
#pragma unroll
    for (int k = 0; k < Z::K; ++k) to[k] = active && state(k) < args.states ? *carry(args, chunk, k) : 0.0f;
    return to;
  }
  __device__ void store_carry(const SelectiveScanArgs& args, int64_t chunk, const Floats<Z::K>& from) const {
#pragma unroll
    for (int k = 0; k < Z::K; ++k) {
      if (active && state(k) < args.states) *carry(args, chunk, k) = from[k];
    }
  }
};

// ---- tiles between memory and shared memory -----------------------------------------------------------------------

// The elements (token, channel) of a tile that a thread moves: i-th at (t + i dt, c + i dc).
template <class Z>
struct TileMap {
  int t, c, dt, dc;

  __device__ explicit TileMap(const ScanTensor& x) {
    const int thread = threadIdx.x;
    if (x.time < x.head) {
      t = thread % kTile, c = thread / kTile, dt = 0, dc = kSelectiveThreads / kTile;
    } else {
      t = thread / Z::kChannels, c = thread % Z::kChannels, dt = kSelectiveThreads / Z::kChannels, dc = 0;
    }
  }
  // Calls f(i, token of the tile, channel of the block, whether it exists).
  template <class F>
  __device__ void each(const SelectiveRun<Z>& run, int tile, const F& f) const {
#pragma unroll
    for (int i = 0; i < Z::kLoads; ++i) {
      const int token = t + i * dt, column = c + i * dc;
      f(i, token, column, tile + token < run.count && column < run.channels);
    }
  }
  // The same with a pointer to the element behind i.
  template <class S, class F>
  __device__ void each_in(const ScanTensor& x, const SelectiveRun<Z>& run, int tile, const F& f) const {
    S* at = static_cast<S*>(x.data) + run.row * x.row + run.token(tile + t) * x.time + (run.channel + c) * x.head;
    const int64_t stride = dt ? run.step * dt * x.time : dc * x.head;
    each(run, tile, [&](int i, int token, int column, bool exists) {
      f(i, at, token, column, exists);
      at += stride;
    });
  }
};

// A tile on its way to shared memory.
template <class S, class Z>
struct TileLoad {
  S raw[Z::kLoads];

  // All tensors of a call are moved by one map, so that a thread meets its own elements again.
  __device__ void load(const TileMap<Z>& map, const ScanTensor& x, const SelectiveRun<Z>& run, int tile) {
    map.template each_in<const S>(x, run, tile, [&](int i, const S* at, int, int, bool exists) {
      from_float(0.0f, raw[i]);
      if (exists) raw[i] = *at;
    });
  }
};

template <class S, class Z>
__device__ inline void store_tile(const float* from, const ScanTensor& x, const SelectiveRun<Z>& run, int tile) {
  TileMap<Z>(x).template each_in<S>(x, run, tile, [&](int, S* at, int token, int column, bool exists) {
    if (exists) from_float(from[token * Z::kPitch + column], *at);
  });
}

// delta_bias of the block's channels; the next barrier shows it.
template <class Z>
__device__ inline void stage_bias(float* to, const SelectiveScanArgs& args, const SelectiveRun<Z>& run) {
  if (threadIdx.x >= Z::kChannels) return;
  const bool exists = args.bias && static_cast<int>(threadIdx.x) < run.channels;
  to[threadIdx.x] = exists ? args.bias[run.channel + threadIdx.x] : 0.0f;
}

// Rows of B or C on their way to shared memory, where a token has `Orders` copies of its row, each in another order of
// states: copy o holds state n at n ^ o.
template <class S, class Z, int Orders>
struct RowLoad {
  static constexpr int kPitch = Orders * Z::kStates + 4;
  S raw[Z::kRowsEarly ? Z::kRowLoads : 1];

  // Calls f(i, pointer, token of the tile, state, whether it exists). Rows wider than a block are read along time.
  template <class F>
  __device__ static void each(const StateRows& x, const SelectiveRun<Z>& run, int states, int tile, const F& f) {
    constexpr int kTokens = kSelectiveThreads / Z::kStates;  // at once, along the states
    const int thread = threadIdx.x;
    const bool by_time = kTokens == 0 || x.time < x.state;
    const int t = by_time ? thread % kTile : thread / Z::kStates, n = by_time ? thread / kTile : thread % Z::kStates;
    const int dt = by_time ? 0 : kTokens, dn = by_time ? kSelectiveThreads / kTile : 0;
    const S* at = static_cast<const S*>(x.data) + run.row * x.row + run.token(tile + t) * x.time + run.group * x.group +
                  n * x.state;
    const int64_t stride = by_time ? dn * x.state : run.step * dt * x.time;
#pragma unroll(Z::kRowsEarly ? Z::kRowLoads : 4)
    for (int i = 0; i < Z::kRowLoads; ++i) {
      f(i, at, t + i * dt, n + i * dn, tile + t + i * dt < run.count && n + i * dn < states);
      at += stride;
    }
  }
  __device__ static S fetch(const S* at, bool exists) {
    S value;
    from_float(0.0f, value);
    if (exists) value = *at;
    return value;
  }
  __device__ void load(const StateRows& x, const SelectiveRun<Z>& run, int states, int tile) {
    if constexpr (Z::kRowsEarly) {
      each(x, run, states, tile, [&](int i, const S* at, int, int, bool exists) { raw[i] = fetch(at, exists); });
    }
  }
  __device__ void commit(float* to, const StateRows& x, const SelectiveRun<Z>& run, int states, int tile) const {
    each(x, run, states, tile, [&](int i, const S* at, int t, int n, bool exists) {
      const float value = to_float(Z::kRowsEarly ? raw[Z::kRowsEarly ? i : 0] : fetch(at, exists));
#pragma unroll
      for (int o = 0; o < Orders; ++o) to[t * kPitch + o * Z::kStates + (n ^ o)] = value;
    });
  }
};

// The slots of a tile. Returns whether the tile has any; all threads call it, and it is a barrier.
template <class Z>
__device__ inline bool stage_slots(int* to, const int32_t* slots, int64_t num_slots, const SelectiveRun<Z>& run,
                                   int tile) {
  int slot = -1;
  if (slots && threadIdx.x < kTile) {
    if (tile + static_cast<int>(threadIdx.x) < run.count) slot = slots[run.token(tile + threadIdx.x)];
    if (slot >= num_slots) slot = -1;  // whatever stands there, memory is safe
    to[threadIdx.x] = slot;
  }
  if (slots) return __syncthreads_or(slot >= 0);
  __syncthreads();
  return false;
}

// Sums of kStep values over the P lanes of a channel; lane p gets sum p % kStep.
template <class Z>
__device__ inline float transposed_sum(const float (&values)[kStep]) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
  float first = high ? values[2] : values[0], second = high ? values[3] : values[1];
  first += __shfl_xor_sync(kWholeWarp, high ? values[0] : values[2], 2);
  second += __shfl_xor_sync(kWholeWarp, high ? values[1] : values[3], 2);
  float sum = (odd ? second : first) + __shfl_xor_sync(kWholeWarp, odd ? first : second, 1);
#pragma unroll
  for (int step = kStep; step < Z::P; step *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// A log2(e), so that exp(d A) is one exp2.
template <class Z>
__device__ inline Floats<Z::K> load_rates(const SelectiveLane<Z>& lane, const SelectiveScanArgs& args) {
  Floats<Z::K> rates = lane.load(args.A, 0, args);
#pragma unroll
  for (int k = 0; k < Z::K; ++k) rates[k] *= kLog2E;
  return rates;
}

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
__global__ void __launch_bounds__(kSelectiveThreads)
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
  const auto start_tile = [&](int tile) {
    u.load(map, args.u, run, tile), delta.load(map, args.delta, run, tile);
    if (args.z.data) z.load(map, args.z, run, tile);
    B.load(args.B, run, args.states, tile), C.load(args.C, run, args.states, tile);
  };
  if (run.count) start_tile(0);
  stage_bias(shared + At::bias, args, run);
  __syncthreads();
  for (int tile = 0; tile < run.count; tile += kTile) {
    map.each(run, tile, [&](int i, int t, int c, bool exists) {
      const int at = t * Z::kPitch + c;
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
__global__ void __launch_bounds__(kSelectiveThreads)
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
  const auto start_tile = [&](int tile) {
    scales.load(map, scale_tensor, run, tile), delta.load(map, args.delta, run, tile);
    if (gated) z.load(map, args.z, run, tile);
    rows.load(row_tensor, run, args.states, tile);
  };
  if (run.count) start_tile(0);
  stage_bias(shared + At::bias, args, run);
  __syncthreads();
  for (int tile = 0; tile < run.count; tile += kTile) {
    map.each(run, tile, [&](int i, int t, int c, bool exists) {
      const int at = t * Z::kPitch + c;
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
__global__ void __launch_bounds__(kSelectiveThreads)
    selective_scan_carry_kernel(float* ends, const float* step_sums, const float* A, const float* first, float* last,
                                int size, int states, int spans, bool backward) {
  const int at = blockIdx.x * kSelectiveThreads + threadIdx.x;
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
