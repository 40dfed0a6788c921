// Device code that prefix_attention and linear_scan share: tiles, segments, threads.
//
// A line is one (row, head, column block) of a (B, T, H, D) tensor. A block of threads takes a tile of a line: `lanes`
// threads along the columns, V columns each, times kScanThreads / lanes groups along time, N tokens each. A group keeps
// its tokens in registers, walks them once from nothing, learns the state before it, and walks them again: every
// element is read once from memory. That state is the business of
// scan_states.cuh.
#pragma once

#include <type_traits>

#include "common/scan.h"
#include "cuda/row_vectors.cuh"

namespace flowattn {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarp;
constexpr int kScanColumns = 128;        // most columns of a tile
constexpr int kScanTile = kScanThreads;  // most tokens of a tile: their scalars take a thread each

struct ScanShape {
  int64_t tokens;
  int heads, width, column_blocks;
  int lanes, columns, tile;  // of a tile: threads along its columns, its columns, its tokens
  int tiles, lines;          // tiles of a line
  bool backwards;            // from the last token to the first
};

// ---- tokens and segments ------------------------------------------------------------------------------------------

struct ScanSequences {
  const int32_t* ends;  // cu_seqlens, (states + 1,); nullptr: every row is a sequence
  int states;
  const bool* reset;
  int64_t reset_row, reset_time;
  bool initial, reverse;
};

// What a token is to the recurrence; its row of the state tensors stands above these bits.
enum TokenCode : int {
  kFirst = 1,     // nothing before it counts,
  kInitial = 2,   // except the initial state
  kLast = 4,      // the token after it is a kFirst
  kFinal = 8,     // its state is the final state
  kOutside = 16,  // belongs to no sequence
  kCodeBits = 5,
};

__device__ inline int state_of(int code) { return code >> kCodeBits; }

// The sequence of token t, `states` if it lies behind the last. Whatever stands in `ends`, it lies in 0..states.
__device__ inline int find_sequence(const ScanSequences& of, int64_t t) {
  int low = 0, high = of.states;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (of.ends[middle + 1] <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int token_code(const ScanSequences& of, int64_t row, int64_t t, int64_t tokens) {
  int state = static_cast<int>(row);
  int64_t begin = 0, end = tokens;
  if (of.ends) {
    state = find_sequence(of, t);
    if (state == of.states) return kOutside | kFirst | kLast;
    begin = max(int64_t{of.ends[state]}, int64_t{0}), end = min(int64_t{of.ends[state + 1]}, tokens);
  }
  const bool at_begin = t == begin, at_end = t == end - 1;
  const int64_t next = of.reverse ? t - 1 : t + 1;
  const bool first = of.reverse ? at_end : at_begin;
  // Offsets that lie may end a sequence outside the row.
  const bool final = (of.reverse ? at_begin : at_end) || next < 0 || next >= tokens;
  bool restarts = false, next_restarts = false;
  if (of.reset) {
    const bool* reset = of.reset + row * of.reset_row;
    restarts = reset[t * of.reset_time];
    if (!final) next_restarts = reset[next * of.reset_time];
  }
  int code = state << kCodeBits;
  if (first || restarts) code |= kFirst;
  if (first && !restarts && of.initial) code |= kInitial;
  if (final || next_restarts) code |= kLast;
  if (final) code |= kFinal;
  return code;
}

// Calls f(sequence) for each sequence without a token; `part` of `parts` takes its share.
template <class F>
__device__ inline void each_empty_sequence(const ScanSequences& of, int part, int parts, const F& f) {
  if (!of.ends) return;
  for (int s = part; s < of.states; s += parts) {
    if (of.ends[s + 1] <= of.ends[s]) f(s);
  }
}

// ---- who a thread is ----------------------------------------------------------------------------------------------

template <int V, int N>
struct ScanThread {
  int row, head, column_block;
  int lane, group, groups;
  int offset, column;  // of its first column, in the tile and in the tensor
  bool active;         // other threads repeat column 0 and store nothing

  __device__ ScanThread(const ScanShape& shape, int line) {
    column_block = 0;
    if (shape.column_blocks > 1) column_block = line % shape.column_blocks, line /= shape.column_blocks;
    const int batch = line / shape.heads, bits = 31 - __clz(shape.lanes);
    head = line - batch * shape.heads, row = batch;
    lane = threadIdx.x & (shape.lanes - 1), group = threadIdx.x >> bits, groups = kScanThreads >> bits;
    offset = lane * V, column = column_block * shape.columns + offset;
    active = column < shape.width;
    if (!active) column = 0;
  }
  template <class S>
  __device__ S* at(const ScanTensor& x, int64_t t) const {
    return static_cast<S*>(x.data) + row * x.row + t * x.time + head * x.head;
  }
  __device__ float* at(const ScanState& x, int64_t state) const {
    return static_cast<float*>(x.data) + state * x.row + head * x.head;
  }
};

// The token at a position of the scan; positions behind the end stand for the last token.
__device__ inline int64_t token_at(const ScanShape& shape, int64_t position) {
  position = min(position, shape.tokens - 1);
  return shape.backwards ? shape.tokens - 1 - position : position;
}

// The rows of a thread's tokens, one after the other in the order of the scan. Behind the end it stays on the last one.
template <class S>
struct RowWalk {
  S* row;
  int64_t step;
  int left;  // tokens behind the first one

  template <int V, int N>
  __device__ RowWalk(const ScanThread<V, N>& me, const ScanTensor& x, const ScanShape& shape, int64_t position)
      : row(me.template at<S>(x, token_at(shape, position)) + me.column),
        step(shape.backwards ? -x.time : x.time),
        left(static_cast<int>(min(shape.tokens - 1 - position, int64_t{kScanTile}))) {}
  __device__ bool inside(int n) const { return n <= left; }
  __device__ void pass(int n) {  // from token n to the next
    if (n < left) row += step;
  }
};

// Scalars of a token: in float32, or in the type of the rows.
template <class S>
__device__ inline float load_scalar(const void* from, int64_t at, bool is_float) {
  return is_float ? static_cast<const float*>(from)[at] : to_float(static_cast<const S*>(from)[at]);
}

__device__ inline int64_t scalar_at(const ScanTensor& x, int64_t row, int64_t t, int head) {
  return row * x.row + t * x.time + head * x.head;
}

template <class S, int V>
__device__ inline Pack<S, V> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, V>*>(from);
}

constexpr int kLineBytes = 128;

// Asks for the line of memory in the second cache, without a register that waits for it.
__device__ inline void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

template <class S, int V>
__device__ inline Floats<V> floats(const Pack<S, V>& pack) {
  Floats<V> to;
  if constexpr (std::is_same_v<S, __nv_bfloat16> && V % 2 == 0) {  // the upper half of a float: one operation each
    unsigned words[V / 2];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) to[e] = to_float(pack.values[e]);
  }
  return to;
}

// Hides from the compiler that a pack was converted before. It would keep the floats from one walk to the next, in
// twice the registers.
template <class S, int V>
__device__ inline void forget_floats(Pack<S, V>& pack) {
  if constexpr (sizeof(S) < sizeof(float) && V > 1) {
    unsigned words[sizeof(pack) / sizeof(unsigned)];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (unsigned& word : words) asm volatile("" : "+r"(word));
    memcpy(&pack, words, sizeof(pack));
  }
}

// Which tokens of a tile need more than the recurrence, a bit each: warps without one take a shorter way.
struct TokenBits {
  unsigned words[kScanTile / kWarp];

  __device__ void set(bool bit) {  // of token `thread`
    const unsigned word = __ballot_sync(kWholeWarp, bit);
    if (threadIdx.x % kWarp == 0) words[threadIdx.x / kWarp] = word;
  }
  // Whether a group of this warp has one among its tokens, `begin`, a multiple of N, up to begin + N.
  template <int N>
  __device__ bool any_in_warp(int begin) const {
    static_assert(kWarp % N == 0);
    return __any_sync(kWholeWarp, words[begin / kWarp] >> begin % kWarp & ((1u << N) - 1));
  }
};

// Sum over the threads of a group; each gets the same bits.
__device__ inline float group_sum(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// ---- sums of parts ------------------------------------------------------------------------------------------------

// out (gridDim.y, n) = the sum over `count` parts of each: parts (gridDim.y, count, n). kWarp columns a block.
constexpr int kPartWarps = 32;

template <class S>
__global__ void __launch_bounds__(kWarp* kPartWarps)
    sum_parts_kernel(const float* parts, int64_t count, int64_t n, S* out) {
  __shared__ float sums[kPartWarps][kWarp];
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < n) {
    const float* from = parts + blockIdx.y * count * n + column;
    for (int64_t part = threadIdx.y; part < count; part += kPartWarps) sum += from[part * n];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= n) return;
  for (int y = 1; y < kPartWarps; ++y) sum += sums[y][threadIdx.x];
  from_float(sum, out[blockIdx.y * n + column]);
}

// The same where the columns alone fill a GPU: a thread each V of them, through all parts.
constexpr int kColumnThreads = 128;

template <class S, int V>
__global__ void __launch_bounds__(kColumnThreads)
    sum_columns_kernel(const float* parts, int64_t count, int64_t n, S* out) {
  const int64_t column = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * V;
  if (column >= n) return;
  const float* from = parts + blockIdx.y * count * n + column;
  Floats<V> sum = splat<V>(0.0f);
#pragma unroll 8
  for (int64_t part = 0; part < count; ++part) {
    const Floats<V> more = load<V>(from + part * n);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += more[e];
  }
  store(out + blockIdx.y * n + column, sum);
}

}  // namespace flowattn
