// What the tiles of a line do to its state, and the state before each of them. It comes
//   * from the tile before, which the same block took, where there are lines enough to fill the GPU, else
//   * by looking back. Each tile publishes what it does to a state as soon as it knows, and the last of every `block`
//     tiles publishes its final state. A tile takes the latter from the block before its own, then applies the tiles in
//     between, in order. Up to kScanCluster tiles of a line form a cluster where the GPU has them: it then publishes
//     in shared memory. The order of all sums is fixed by the shape, so results are bitwise repeatable.
#pragma once

#include "cuda/scan.cuh"

namespace flowattn {

constexpr int kScanBlock = 32;   // most tiles of a block: the entries of a look-back fit a warp
constexpr int kScanCluster = 8;  // most tiles of a cluster

// ---- maps of a state ----------------------------------------------------------------------------------------------

// h <- a h + b for K numbers with one factor or a factor each. h = 0 says nothing was summed: a product that overflowed
// then has nothing to act on.
template <int K, int KA>
__device__ inline void apply(const float (&a)[KA], float (&h)[K], const float (&b)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) h[k] = h[k] == 0.0f ? b[k] : fmaf(a[KA == 1 ? 0 : k], h[k], b[k]);
}
// Rare, so not in line.
__device__ __noinline__ inline float apply_exactly(double a, float h, float b) {
  return h == 0.0f ? b : static_cast<float>(fma(a, static_cast<double>(h), static_cast<double>(b)));
}
// Conversions are slow, so products that floats hold well are taken as such.
template <int K, int KA>
__device__ inline void apply(const double (&a)[KA], float (&h)[K], const float (&b)[K]) {
  float near[KA];
  bool all_near = true;
#pragma unroll
  for (int k = 0; k < KA; ++k) {
    near[k] = static_cast<float>(a[k]);
    all_near &= (fabsf(near[k]) > 0x1p-100f && fabsf(near[k]) < 0x1p100f) || a[k] == 0.0;
  }
  if (all_near) {
#pragma unroll
    for (int k = 0; k < K; ++k) h[k] = fmaf(near[KA == 1 ? 0 : k], h[k], b[k]);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) h[k] = apply_exactly(a[KA == 1 ? 0 : k], h[k], b[k]);
  }
}

// h -> a h + b for K numbers with KA = 1 or K factors; h -> b if some token was a kFirst. Products of gates above 1
// take A = double: 2^1024 is out of reach for any state that a float could hold before.
template <int K, int KA, class A>
struct Affine {
  A a[KA];
  float b[K];
  bool cut;

  static __device__ Affine identity() {
    Affine map;
#pragma unroll
    for (int k = 0; k < KA; ++k) map.a[k] = 1;
#pragma unroll
    for (int k = 0; k < K; ++k) map.b[k] = 0.0f;
    map.cut = false;
    return map;
  }
  __device__ void act(float (&h)[K]) const {
    if (!cut) return apply(a, h, b);
#pragma unroll
    for (int k = 0; k < K; ++k) h[k] = b[k];
  }
  __device__ void follow(const Affine& before) {
    if (cut) return;
    float h[K];
#pragma unroll
    for (int k = 0; k < K; ++k) h[k] = before.b[k];
    apply(a, h, b);
#pragma unroll
    for (int k = 0; k < K; ++k) b[k] = h[k];
#pragma unroll
    for (int k = 0; k < KA; ++k) a[k] *= before.a[k];
    cut = before.cut;
  }
  __device__ Affine of_lane_before(int by) const {
    Affine map;
#pragma unroll
    for (int k = 0; k < KA; ++k) map.a[k] = __shfl_up_sync(kWholeWarp, a[k], by);
#pragma unroll
    for (int k = 0; k < K; ++k) map.b[k] = __shfl_up_sync(kWholeWarp, b[k], by);
    map.cut = __shfl_up_sync(kWholeWarp, static_cast<int>(cut), by);
    return map;
  }
};

// What the warps of a block do to a state. `X` more numbers than columns belong to it; every lane has them.
// Full: a factor for each column.
template <int V, int X, bool Full, class A>
struct WarpMaps {
  static constexpr int KA = Full ? V : 1;
  typedef Affine<V + X, KA, A> Map;

  A a[kScanWarps][Full ? kScanColumns : 1];
  alignas(16) float b[kScanWarps][kScanColumns];
  float more[kScanWarps][X > 0 ? X : 1];
  bool cut[kScanWarps];

  // Scans the groups of each warp: what stands before this group in its warp. The next barrier shows the whole warps.
  __device__ Map scan(Map map, int lanes) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, offset = (lane & (lanes - 1)) * V;
    for (int by = lanes; by < kWarp; by *= 2) {
      const Map before = map.of_lane_before(by);
      if (lane >= by) map.follow(before);
    }
    if (lane >= kWarp - lanes) {
#pragma unroll
      for (int k = 0; k < KA; ++k) a[warp][Full ? offset + k : 0] = map.a[k];
#pragma unroll
      for (int k = 0; k < V; ++k) b[warp][offset + k] = map.b[k];
      if constexpr (X > 0) more[warp][0] = map.b[V];
      cut[warp] = map.cut;
    }
    const Map before = map.of_lane_before(lanes);
    return lane < lanes ? Map::identity() : before;
  }

  // Takes number `at` of the state, h, through the tile. What it is before each warp stands in the place of its sums,
  // behind the next barrier. One thread a number.
  __device__ float pass(int at, int columns, float h) {
    float sums[kScanWarps];
#pragma unroll
    for (int warp = 0; warp < kScanWarps; ++warp) sums[warp] = number(warp, at, columns);
#pragma unroll
    for (int warp = 0; warp < kScanWarps; ++warp) {
      number(warp, at, columns) = h;
      h = step(warp, at, h, sums[warp]);
    }
    return h;
  }

  // The state before this group.
  __device__ void before(float (&h)[V + X], const Map& before, int lanes) const {
    const int warp = threadIdx.x / kWarp, offset = (threadIdx.x & (lanes - 1)) * V;
#pragma unroll
    for (int k = 0; k < V; ++k) h[k] = b[warp][offset + k];
    if constexpr (X > 0) h[V] = more[warp][0];
    before.act(h);
  }

  // What the tile adds to a number, and what it multiplies it with. Before `pass`.
  __device__ float sum(int at, int columns) {
    float h = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kScanWarps; ++warp) h = step(warp, at, h, number(warp, at, columns));
    return h;
  }
  __device__ A product(int at) const {
    A product = 1;
    for (int warp = 0; warp < kScanWarps; ++warp) product *= a[warp][Full ? at : 0];
    return product;
  }
  __device__ bool any_cut() const {
    bool any = false;
    for (int warp = 0; warp < kScanWarps; ++warp) any |= cut[warp];
    return any;
  }

 private:
  __device__ float& number(int warp, int at, int columns) {
    return X == 0 || at < columns ? b[warp][at] : more[warp][at - columns];
  }
  __device__ float step(int warp, int at, float h, float sum) const {
    if (cut[warp]) return sum;
    const A factor[1] = {a[warp][Full ? at : 0]};
    float next[1] = {h};
    const float sums[1] = {sum};
    apply(factor, next, sums);
    return next[0];
  }
};

// ---- looking back -------------------------------------------------------------------------------------------------

// A number and, in the same 8 bytes, whether it is there: one store publishes it and one load finds it, without fences.
typedef unsigned long long Word;
constexpr Word kThere = 1, kCut = 2;

__device__ inline Word word_of(float x, bool cut = false) {
  return static_cast<Word>(__float_as_uint(x)) << 32 | (cut ? kThere | kCut : kThere);
}
__device__ inline Word word_of(double x, bool cut = false) {  // gives up the last two bits of the mantissa
  constexpr double kMost = 1.7976931348623157e308;            // an infinity with bits in its mantissa would be a NaN
  x = x > kMost ? kMost : x < -kMost ? -kMost : x;
  return (static_cast<Word>(__double_as_longlong(x)) & ~(kThere | kCut)) | (cut ? kThere | kCut : kThere);
}
__device__ inline void read_word(Word word, float& x) { x = __uint_as_float(static_cast<unsigned>(word >> 32)); }
__device__ inline void read_word(Word word, double& x) {
  x = __longlong_as_double(static_cast<long long>(word & ~(kThere | kCut)));
}

__device__ inline Word peek(const Word* at) { return *const_cast<const volatile Word*>(at); }
__device__ inline void publish(Word* at, Word word) { *const_cast<volatile Word*>(at) = word; }

// Shared memory for what a look-back fetches: a state and the maps of all but one tile of a block. Behind them lies
// what a tile of a cluster publishes.
constexpr int kLookBackColumns = 2048;  // most columns times tiles of a block; half as many with a factor a column
constexpr int kTileWords = 2 * kScanColumns + 2;
constexpr int kScanWords = kLookBackColumns + kScanColumns + 4 * kScanBlock;
static_assert(kScanColumns + 1 + kScanCluster * kTileWords <= kScanWords);

struct ScanLookBack {
  bool cluster;      // the tiles of a line form a cluster, and are fewer than `block`
  unsigned* ticket;  // nullptr, and no cluster: a block takes all tiles of a line. All memory here starts as zeros.
  Word* tiles;       // (lines, tiles, tile_words): what a tile does to a state
  Word* states;      // (lines, blocks, state_words): the state after a block of tiles
  int block, tile_words, state_words;
  int resident;  // blocks of threads that the GPU runs at a time, 0 where they are all

  __device__ bool used() const { return ticket || cluster; }
  __device__ Word* tile(const ScanShape& shape, int line, int tile) const {
    return tiles + (int64_t{line} * shape.tiles + tile) * tile_words;
  }
  __device__ Word* state(const ScanShape& shape, int line, int number) const {
    return states + (int64_t{line} * ((shape.tiles + block - 1) / block) + number) * state_words;
  }
};

// The tiles of this block of threads: `tile` up to `end` of `line`. Blocks that look back take their tiles by ticket,
// the earliest of all lines first, so whatever a tile waits for is running or done.
struct ScanRun {
  int line, tile, end;

  __device__ ScanRun(const ScanShape& shape, const ScanLookBack& look_back)
      : line(blockIdx.x), tile(0), end(shape.tiles) {
    if (look_back.cluster) line = blockIdx.x / shape.tiles, tile = blockIdx.x % shape.tiles, end = tile + 1;
    if (!look_back.ticket) return;
    __shared__ int taken[2];
    if (threadIdx.x == 0) {
      const unsigned ticket = atomicAdd(look_back.ticket, 1u), lines = shape.lines;
      taken[0] = static_cast<int>(ticket % lines), taken[1] = static_cast<int>(ticket / lines);
    }
    __syncthreads();
    line = taken[0], tile = taken[1], end = tile + 1;
  }
};

// Asks for the rows of a tensor in the tile that this multiprocessor will take next, or a block its line's: memory
// would idle while the tiles that run now wait for each other.
template <class S, int V, int N>
__device__ inline void prefetch_next(const ScanTensor& x, const ScanShape& shape, const ScanLookBack& look_back,
                                     const ScanRun& run) {
  int line = run.line, tile = run.tile + 1;
  if (look_back.used()) {
    if (look_back.resident == 0) return;
    const bool by_line = look_back.cluster;  // the order in which blocks take tiles
    const int next =
        (by_line ? run.line * shape.tiles + run.tile : run.tile * shape.lines + run.line) + look_back.resident;
    line = by_line ? next / shape.tiles : next % shape.lines;
    tile = by_line ? next % shape.tiles : next / shape.lines;
  }
  const int64_t position = int64_t{tile} * shape.tile + threadIdx.x;
  if (line >= shape.lines || static_cast<int>(threadIdx.x) >= shape.tile || position >= shape.tokens) return;
  const ScanThread<V, N> there(shape, line);
  const int first = there.column_block * shape.columns;
  const auto* row = reinterpret_cast<const char*>(there.template at<const S>(x, token_at(shape, position)) + first);
  const int bytes = min(shape.columns, shape.width - first) * static_cast<int>(sizeof(S));
  for (int at = 0; at < bytes; at += kLineBytes) prefetch(row + at);
}

// Copies `count` words into shared memory as they appear. The next barrier shows them to the block.
__device__ inline void fetch(const Word* from, int count, Word* to) {
  constexpr int kAtOnce = 4;
  for (int first = threadIdx.x; first < count; first += kAtOnce * kScanThreads) {
    Word words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kScanThreads;
      words[i] = at < count ? peek(from + at) : kThere;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kScanThreads;
      while (!(words[i] & kThere)) words[i] = peek(from + at);
      if (at < count) to[at] = words[i];
    }
  }
}

__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// A word of the same place in the shared memory of block `rank` of the cluster.
__device__ inline Word peer_word(const Word* at, int rank) {
  Word word = 0;
#if __CUDA_ARCH__ >= 900
  const auto own = static_cast<unsigned>(__cvta_generic_to_shared(at));
  unsigned peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(word) : "r"(peer) : "memory");
#endif
  return word;
}

// Where this tile publishes what it does. `words`: the shared memory of kScanWords.
__device__ inline Word* published(const ScanShape& shape, const ScanLookBack& look_back, const ScanRun& run,
                                  Word* words) {
  return look_back.cluster ? words + kScanWords - kTileWords : look_back.tile(shape, run.line, run.tile);
}

// Copies what the `before` tiles before this one published to `to`. All blocks of a cluster call it, once;
// leave_cluster is the last that they do. The next barrier shows the words to the block.
__device__ inline void fetch_tiles(const ScanShape& shape, const ScanLookBack& look_back, const ScanRun& run,
                                   int before, Word* words, Word* to) {
  const int size = look_back.tile_words;
  if (!look_back.cluster) return fetch(look_back.tile(shape, run.line, run.tile - before), before * size, to);
  cluster_arrive(), cluster_wait();
  const Word* from = published(shape, look_back, run, words);
  for (int at = threadIdx.x; at < before * size; at += kScanThreads) to[at] = peer_word(from + at % size, at / size);
  cluster_arrive();
}
// Other blocks of the cluster may read this one's shared memory until here.
__device__ inline void leave_cluster(const ScanLookBack& look_back) {
  if (look_back.cluster) cluster_wait();
}

// Publishes what this tile does, finds the state before it and, after the last tile of a block, publishes that after
// it: number `at` of the state before the tile, for thread `at` of `numbers` = columns of the tile + X. Where no tile
// looks back, that is what the thread kept in `carry` from the tile before. Leaves the state before each warp in
// `maps`, which are complete; a barrier ends it.
template <int V, int X, bool Full, class A>
__device__ inline void find_states(const ScanShape& shape, const ScanLookBack& look_back, const ScanRun& run,
                                   WarpMaps<V, X, Full, A>& maps, Word* words, float& carry) {
  const int numbers = shape.columns + X, factors = Full ? shape.columns : 1, at = threadIdx.x;
  if (!look_back.used()) {
    if (at < numbers) carry = maps.pass(at, shape.columns, carry);
    __syncthreads();
    return;
  }
  const int number = run.tile / look_back.block, before = run.tile % look_back.block;
  const bool ends_block = before == look_back.block - 1;
  if (!ends_block && at < numbers) {
    Word* to = published(shape, look_back, run, words);
    publish(to + factors + at, word_of(maps.sum(at, shape.columns)));
    if (at < factors) publish(to + at, word_of(maps.product(at), maps.any_cut()));
  }
  fetch_tiles(shape, look_back, run, before, words, words + numbers);
  if (number > 0) fetch(look_back.state(shape, run.line, number - 1), numbers, words);
  __syncthreads();
  if (at < numbers) {
    float h[1] = {0.0f};
    if (number > 0) read_word(words[at], h[0]);
    for (int tile = 0; tile < before; ++tile) {
      const Word* map = words + numbers + tile * look_back.tile_words;
      const Word factor = map[Full ? at : 0];
      A a[1];
      float b[1];
      read_word(factor, a[0]), read_word(map[factors + at], b[0]);
      if (factor & kCut) {
        h[0] = b[0];
      } else {
        apply(a, h, b);
      }
    }
    const float after = maps.pass(at, shape.columns, h[0]);
    if (ends_block) publish(look_back.state(shape, run.line, number) + at, word_of(after));
  }
  __syncthreads();
}

}  // namespace flowattn
