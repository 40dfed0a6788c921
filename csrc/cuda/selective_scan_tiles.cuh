// What the kernels of selective_scan share: their arguments, what a block walks, tiles between memory and shared
// memory, sums over the lanes of a channel.
#pragma once

#include "common/scan.h"
#include "cuda/row_vectors.cuh"

namespace flowattn {

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
template <int K_, int P_, int Threads>
struct SelectiveShape {
  static constexpr int K = K_, P = P_, kThreads = Threads, kWarps = Threads / kWarp;
  static constexpr int kStates = K * P, kWarpChannels = kWarp / P, kChannels = kThreads / P;
  static constexpr int kPitch = kChannels + 1;  // of a token's row of channels: transposing hits all banks
  static constexpr int kLoads = kTile * kChannels / kThreads;
  static constexpr int kRowLoads = kTile * kStates / kThreads;
  static constexpr bool kRowsEarly = kRowLoads <= 16;  // few enough to wait in registers
  // The backward sums over the channels of a warp. Lanes hold their K states in an order of their own, so that these
  // sums transpose without selecting: register k holds state k ^ order, order < kOrders.
  static constexpr int kOrders = K < kWarpChannels ? K : kWarpChannels;
  static constexpr int kTileFloats = kTile * kPitch;
};

// a / N rounded up, for positive a.
template <int N>
__device__ inline int ceil_of(int a) {
  return (a + N - 1) / N;
}

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

// The elements (token, channel) of a tile that a thread moves: the i-th at (t + i dt, c + i dc).
template <class Z>
struct TileMap {
  bool by_time;
  int t, c, dt, dc;

  __device__ explicit TileMap(const ScanTensor& x) {
    constexpr int kChannels = Z::kThreads / kTile, kTokens = Z::kThreads / Z::kChannels;  // at once
    const int thread = threadIdx.x;
    by_time = x.time < x.head;
    t = by_time ? thread % kTile : thread / Z::kChannels, c = by_time ? thread / kTile : thread % Z::kChannels;
    dt = by_time ? 0 : kTokens, dc = by_time ? kChannels : 0;
  }
  // How many of them exist.
  __device__ int count(const SelectiveRun<Z>& run, int tile) const {
    const int tokens = run.count - tile - t, channels = run.channels - c;
    if (tokens <= 0 || channels <= 0) return 0;
    return by_time ? ceil_of<Z::kThreads / kTile>(channels) : ceil_of<Z::kThreads / Z::kChannels>(tokens);
  }
  // Calls f(i, place in a tile in shared memory, channel of the block, whether it exists).
  template <class F>
  __device__ void each(const SelectiveRun<Z>& run, int tile, const F& f) const {
    const int existing = count(run, tile), first = t * Z::kPitch + c, step = dt * Z::kPitch + dc;
#pragma unroll
    for (int i = 0; i < Z::kLoads; ++i) f(i, first + i * step, c + i * dc, i < existing);
  }
  // The first element of this thread, and how far the next one is.
  template <class S>
  __device__ S* first(const ScanTensor& x, const SelectiveRun<Z>& run, int tile) const {
    return static_cast<S*>(x.data) + run.row * x.row + run.token(tile + t) * x.time + (run.channel + c) * x.head;
  }
  __device__ int64_t stride(const ScanTensor& x, const SelectiveRun<Z>& run) const {
    return by_time ? dc * x.head : run.step * dt * x.time;
  }
};

// Tiles on their way to shared memory, one after the other: addresses are made once, and then moved.
template <class S, class Z>
struct TileLoad {
  S raw[Z::kLoads];
  const S* at;  // in the tile to load next

  __device__ void aim(const TileMap<Z>& map, const ScanTensor& x, const SelectiveRun<Z>& run, int tile) {
    at = map.template first<const S>(x, run, tile);
  }
  // All tensors of a call are moved by one map, so that a thread meets its own elements again. The next tile begins
  // `ahead` positions further on.
  __device__ void load(const TileMap<Z>& map, const ScanTensor& x, const SelectiveRun<Z>& run, int tile, int ahead) {
    const S* from = at;
    const int64_t stride = map.stride(x, run);
    map.each(run, tile, [&](int i, int, int, bool exists) {
      from_float(0.0f, raw[i]);
      if (exists) raw[i] = *from;
      from += stride;
    });
    at += run.step * ahead * x.time;
  }
};

template <class S, class Z>
__device__ inline void store_tile(const float* from, const ScanTensor& x, const SelectiveRun<Z>& run, int tile) {
  const TileMap<Z> map(x);
  const int64_t stride = map.stride(x, run);
  S* at = map.template first<S>(x, run, tile);
  map.each(run, tile, [&](int, int place, int, bool exists) {
    if (exists) from_float(from[place], *at);
    at += stride;
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
  static constexpr int kTokens = Z::kThreads / Z::kStates;  // at once, along the states
  S raw[Z::kRowsEarly ? Z::kRowLoads : 1];
  const S* at;  // in the tile to load next

  // Rows wider than a block are read along time.
  __device__ static bool by_time(const StateRows& x) { return kTokens == 0 || x.time < x.state; }
  __device__ static int first_token(const StateRows& x) {
    return static_cast<int>(by_time(x) ? threadIdx.x % kTile : threadIdx.x / Z::kStates);
  }
  __device__ static int first_state(const StateRows& x) {
    return static_cast<int>(by_time(x) ? threadIdx.x / kTile : threadIdx.x % Z::kStates);
  }
  __device__ static const S* first(const StateRows& x, const SelectiveRun<Z>& run, int tile) {
    return static_cast<const S*>(x.data) + run.row * x.row + run.token(tile + first_token(x)) * x.time +
           run.group * x.group + first_state(x) * x.state;
  }
  // Calls f(i, pointer, token of the tile, state, whether it exists), the pointers beginning at `from`.
  template <class F>
  __device__ static void each(const StateRows& x, const SelectiveRun<Z>& run, int states, int tile, const S* from,
                              const F& f) {
    const int t = first_token(x), n = first_state(x);
    const int dt = by_time(x) ? 0 : kTokens, dn = by_time(x) ? Z::kThreads / kTile : 0;
    const int64_t stride = by_time(x) ? dn * x.state : run.step * dt * x.time;
    const int tokens = run.count - tile - t, rest = states - n;
    const int along = by_time(x) ? ceil_of<Z::kThreads / kTile>(rest) : ceil_of<kTokens ? kTokens : 1>(tokens);
    const int existing = tokens > 0 && rest > 0 ? along : 0;
#pragma unroll(Z::kRowsEarly ? Z::kRowLoads : 4)
    for (int i = 0; i < Z::kRowLoads; ++i) {
      f(i, from, t + i * dt, n + i * dn, i < existing);
      from += stride;
    }
  }
  __device__ static S fetch(const S* at, bool exists) {
    S value;
    from_float(0.0f, value);
    if (exists) value = *at;
    return value;
  }
  __device__ void aim(const StateRows& x, const SelectiveRun<Z>& run, int tile) { at = first(x, run, tile); }
  __device__ void load(const StateRows& x, const SelectiveRun<Z>& run, int states, int tile, int ahead) {
    if constexpr (Z::kRowsEarly) {
      each(x, run, states, tile, at,
           [&](int i, const S* from, int, int, bool exists) { raw[i] = fetch(from, exists); });
      at += run.step * ahead * x.time;
    }
  }
  __device__ void commit(float* to, const StateRows& x, const SelectiveRun<Z>& run, int states, int tile) const {
    const S* late = Z::kRowsEarly ? nullptr : first(x, run, tile);
    each(x, run, states, tile, late, [&](int i, const S* from, int t, int n, bool exists) {
      const float value = to_float(Z::kRowsEarly ? raw[Z::kRowsEarly ? i : 0] : fetch(from, exists));
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

}  // namespace flowattn
