// Device code of bias_gelu and bias_residual_layer_norm. Raw pointers and sizes, no torch header.
//
// A thread moves vectors of V elements: 16 bytes where every address and the width allow it, else V = 1. Column sums of
// a backward are float32 partial sums of one block each, then added up in order by column_sums_kernel: no atomics, the
// same bits every time.
#pragma once

#include <type_traits>

#include "common/gelu.h"
#include "cuda/row_vectors.cuh"

namespace flowattn {

template <class S>
struct Rows {
  S* data;         // nullptr: absent
  int64_t stride;  // elements

  __device__ S* row(int64_t index) const { return data ? data + index * stride : nullptr; }
};

// ---- bias_gelu ----------------------------------------------------------------------------------------------------
//
// blockDim.x threads lie along the columns and blockDim.y along the rows; gridDim.y covers the columns, gridDim.x takes
// turns over the rows. A thread keeps its columns, so it reads the bias once, and has several rows in flight.

constexpr int kGeluThreads = 256, kGeluRows = 4, kGeluBwdRows = 2;
constexpr int kGeluFew = 4;     // blocks a multiprocessor: with fewer, a forward takes a row a thread
constexpr int kGeluBlocks = 3;  // a multiprocessor, in the backward: few partial sums, and 48 KiB of loads in flight

template <class S>  // of the results, and of what is summed up from them
struct DeviceMath {
  typedef float Scalar;
  static __device__ float exp(float x) { return fast_exp(x); }
  static __device__ float inverse(float x) { return fast_inverse(x); }  // of 1..2 only
  static __device__ float normal_cdf(float u, float gauss) { return float_normal_cdf<sizeof(S) == 2>(u, gauss); }
};

template <class S>
struct BiasGeluArgs {
  int64_t rows;
  int width;
  ColumnVector bias;
  Rows<const S> x, dy;
  Rows<S> out;      // y or dx
  float* partials;  // (gridDim.x, width) or nullptr; backward
};

template <class S, int V, bool Tanh, int ThreadRows>
__global__ void __launch_bounds__(kGeluThreads) bias_gelu_fwd_kernel(const BiasGeluArgs<S> args) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (column >= args.width) return;
  const Floats<V> bias = load<V, S>(args.bias, column, 0.0f);
  const int64_t step = blockDim.y, turn = int64_t{gridDim.x} * step * ThreadRows;
  for (int64_t first = blockIdx.x * step * ThreadRows + threadIdx.y; first < args.rows; first += turn) {
    Floats<V> x[ThreadRows];
#pragma unroll
    for (int i = 0; i < ThreadRows; ++i) {
      const int64_t row = first + i * step;
      if (row < args.rows) x[i] = load<V>(args.x.row(row) + column);
    }
#pragma unroll
    for (int i = 0; i < ThreadRows; ++i) {
      const int64_t row = first + i * step;
      if (row >= args.rows) break;
#pragma unroll
      for (int e = 0; e < V; ++e) x[i][e] = gelu<Tanh, DeviceMath<S>>(x[i][e] + bias[e]);
      store<V>(args.out.row(row) + column, x[i]);
    }
  }
}

template <class S, int V, bool Tanh>
__global__ void __launch_bounds__(kGeluThreads, kGeluBlocks) bias_gelu_bwd_kernel(const BiasGeluArgs<S> args) {
  __shared__ float sums[kGeluThreads * V];
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const bool inside = column < args.width;  // the others only meet the barrier
  Floats<V> sum = splat<V>(0.0f);
  const Floats<V> bias = inside ? load<V, S>(args.bias, column, 0.0f) : sum;
  const int64_t step = blockDim.y, turn = int64_t{gridDim.x} * step * kGeluBwdRows;
  for (int64_t first = blockIdx.x * step * kGeluBwdRows + threadIdx.y; inside && first < args.rows; first += turn) {
    Pack<S, V> x[kGeluBwdRows], dy[kGeluBwdRows];
#pragma unroll
    for (int i = 0; i < kGeluBwdRows; ++i) {
      const int64_t row = first + i * step;
      if (row < args.rows) {
        x[i] = *reinterpret_cast<const Pack<S, V>*>(args.x.row(row) + column);
        dy[i] = *reinterpret_cast<const Pack<S, V>*>(args.dy.row(row) + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kGeluBwdRows; ++i) {
      const int64_t row = first + i * step;
      if (row >= args.rows) break;
      Floats<V> dx;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        dx[e] = to_float(dy[i].values[e]) * gelu_slope<Tanh, DeviceMath<float>>(to_float(x[i].values[e]) + bias[e]);
        sum[e] += dx[e];
      }
      store<V>(args.out.row(row) + column, dx);
    }
  }
  if (!args.partials) return;  // the whole grid
#pragma unroll
  for (int e = 0; e < V; ++e) sums[(threadIdx.y * V + e) * blockDim.x + threadIdx.x] = sum[e];
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
  for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += sums[(y * V + e) * blockDim.x + threadIdx.x];
  }
  float* partial = args.partials + int64_t{blockIdx.x} * args.width + column;
#pragma unroll
  for (int e = 0; e < V; ++e) partial[e] = sum[e];
}

// ---- bias_residual_layer_norm -------------------------------------------------------------------------------------
//
// A team of threads, a warp or a block, owns a row and keeps it in registers, K vectors a thread; K = 0 reads it again
// (from L1 or L2) for each pass instead, which takes any width.

constexpr int kWarpTeams = 4;  // teams of a block whose teams are warps
template <int Team>
constexpr int kNormThreads = Team == kWarp ? kWarp * kWarpTeams : Team;

template <class S>
struct NormArgs {
  int64_t rows;  // of y in the forward, of x in the backward
  int width;
  float eps;
  ColumnVector bias, weight, ln_bias;
  Rows<const S> x, residual;
  const int* index;      // forward: row of x for each row of y; backward: row of y for each row of x; nullptr: the same
  int64_t indexed_rows;  // an index outside 0..indexed_rows means a row of zeros
  float2* stats;         // (rows of y,): mean and 1 / deviation
  Rows<S> y, z;          // forward
  Rows<const S> dy, dz;  // backward
  Rows<S> dx;
  float* partials;  // (gridDim.x, 3, width): sums for bias, weight and ln_bias; or nullptr
  bool stage_dz;    // backward: dz fits the stages too
};

template <class S>
struct NormRow {
  int64_t from;  // the indexed row, or -1
  const S *x, *residual;

  // z = x + bias + residual of V columns.
  template <int V>
  __device__ Floats<V> sum(const NormArgs<S>& args, int column) const {
    Floats<V> z = load<V>(x + column);
    const Floats<V> bias = load<V, S>(args.bias, column, 0.0f);
    const Floats<V> more = residual ? load<V>(residual + column) : splat<V>(0.0f);
#pragma unroll
    for (int e = 0; e < V; ++e) z[e] = z[e] + bias[e] + more[e];
    return z;
  }
};

// Row `row` of y or of x, and the row of the other that the index gives it.
template <class S>
__device__ inline int64_t indexed_row(const NormArgs<S>& args, int64_t row, int index) {
  const int64_t from = args.index ? index : row;
  return from >= 0 && from < args.indexed_rows ? from : -1;
}
template <class S>
__device__ inline int64_t indexed_row(const NormArgs<S>& args, int64_t row) {
  return indexed_row(args, row, args.index ? args.index[row] : 0);
}

template <class S, int V, int Team, int K>
__global__ void __launch_bounds__(kNormThreads<Team>, Team == kWarp ? (K * V > 24 ? 4 : 5) : 1)
    bias_residual_layer_norm_fwd_kernel(const NormArgs<S> args) {
  const int64_t row = int64_t{blockIdx.x} * (kNormThreads<Team> / Team) + threadIdx.x / Team;
  if (row >= args.rows) return;  // whole teams
  const auto each = [&](auto f) { each_vector<V, Team, K>(args.width, f); };
  S *y = args.y.row(row), *sum = args.z.row(row);
  const int64_t from = indexed_row(args, row);
  if (from < 0) {  // whole teams
    const Floats<V> zero = splat<V>(0.0f);
    each([&](int, int column) {
      store<V>(y + column, zero);
      if (sum) store<V>(sum + column, zero);
    });
    if (threadIdx.x % Team == 0) args.stats[row] = {0.0f, 0.0f};
    return;
  }
  const RowColumns<V, Team, K, S> x(args.x.row(from), args.width), residual(args.residual.row(from), args.width);
  const VectorColumns<V, Team, K, S> bias(args.bias, args.width, 0.0f);
  const auto read = [&](int k, int column) {
    Floats<V> z = x(k, column), shift = bias(k, column), more = residual(k, column);
#pragma unroll
    for (int e = 0; e < V; ++e) z[e] = z[e] + shift[e] + more[e];
    return z;
  };
  Floats<V> z[K > 0 ? K : 1];
  float total = 0.0f;
  each([&](int k, int column) {
    z[k] = read(k, column);
    if (sum) store<V>(sum + column, z[k]);
#pragma unroll
    for (int e = 0; e < V; ++e) total += z[k][e];
  });
  const VectorColumns<V, Team, K, S> weights(args.weight, args.width, 1.0f), shifts(args.ln_bias, args.width, 0.0f);
  float mean = team_sum<Team>({total, 0.0f}).x / args.width;
  float2 moments = {0.0f, 0.0f};
  each([&](int k, int column) {
    if constexpr (K == 0) z[k] = read(k, column);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float delta = z[k][e] - mean;
      moments.x += delta;
      moments.y += delta * delta;
    }
  });
  moments = team_sum<Team>(moments);
  // The rounding of the mean, taken back: a constant row has variance 0 exactly, whatever its value. A square that
  // overflowed stays infinite, so that the row becomes ln_bias.
  const float error = moments.x / args.width, square = moments.y / args.width;
  mean += error;
  const float variance = square < INFINITY ? fmaxf(square - error * error, 0.0f) : square;
  const float scale = 1.0f / sqrtf(variance + args.eps);
  each([&](int k, int column) {
    if constexpr (K == 0) z[k] = read(k, column);
    const Floats<V> weight = weights(k, column), shift = shifts(k, column);
#pragma unroll
    for (int e = 0; e < V; ++e) z[k][e] = (z[k][e] - mean) * scale * weight[e] + shift[e];
    store<V>(y + column, z[k]);
  });
  if (threadIdx.x % Team == 0) args.stats[row] = {mean, scale};
}

// Writes the sums of a block's teams to its partial sums. With K = 0 they are there already. `total`: shared memory
// that nobody reads any more, (3, columns of a team), where teams are warps.
template <int V, int Team, int K>
__device__ inline void store_partials(const Floats<V> (&sums)[3][K], int width, float* total, float* partials) {
  if constexpr (Team > kWarp) {
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      each_vector<V, Team, K>(width, [&](int k, int column) {
#pragma unroll
        for (int e = 0; e < V; ++e) partials[kind * width + column + e] = sums[kind][k][e];
      });
    }
  } else {
    constexpr int kColumns = K * V * kWarp;
    for (int team = 0; team < kWarpTeams; ++team) {  // one after the other, in a fixed order
      if (threadIdx.x / kWarp == team) {
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) {
          each_vector<V, Team, K>(width, [&](int k, int column) {
#pragma unroll
            for (int e = 0; e < V; ++e) {
              float& sum = total[kind * kColumns + column + e];
              sum = team > 0 ? sum + sums[kind][k][e] : sums[kind][k][e];
            }
          });
        }
      }
      __syncthreads();
    }
    for (int kind = 0; kind < 3; ++kind) {
      for (int column = threadIdx.x; column < width; column += kNormThreads<Team>) {
        partials[kind * width + column] = total[kind * kColumns + column];
      }
    }
  }
}

// Blocks a multiprocessor in the backward: the register file divided by what three sums of so many columns need.
template <int Team, int Columns>
constexpr int kNormBlocks = Team > 256                       ? 1
                            : (Team > kWarp || Columns > 24) ? 2
                            : Columns > 16                   ? 3
                            : Columns > 8                    ? 4
                                                             : 6;

// A row of the backward, its parts in memory or, on the way to a thread, in shared memory.
template <class S>
struct NormBwdRow : NormRow<S> {
  const S *dy, *dz;
  float2 stats;
};

template <class S, int Columns>
class DirectRows {
 public:
  __device__ DirectRows(const NormArgs<S>& args, int64_t, int64_t) : args_(args) {}
  __device__ NormBwdRow<S> read(int64_t row) const {
    const int64_t from = indexed_row(args_, row);
    if (from < 0) return {{from}};
    return {
        {from, args_.x.row(row), args_.residual.row(row)}, args_.dy.row(from), args_.dz.row(from), args_.stats[from]};
  }
  __device__ void pass() {}
  __device__ float* memory() const {  // (3, columns of a team)
    __shared__ float memory[3 * Columns];
    return memory;
  }

 private:
  const NormArgs<S>& args_;
};

// The sums leave no registers to fetch rows ahead, and few warps. So a team copies its next rows into shared memory
// while it works on one. A thread reads what it copied itself: no barriers.
constexpr int kNormStages = 2;
template <int V, int Team, int K>
constexpr bool kNormStaged = K > 0 && V > 1 && Team <= 256;

template <class S, int V, int Team, int K>
class StagedRows {
 public:
  static constexpr int kPart = K * Team * V;  // elements of a part of a row: x, dy and, if given, residual and dz

  __device__ StagedRows(const NormArgs<S>& args, int64_t first, int64_t turn)
      : args_(args), next_(first), turn_(turn), next_index_(index_of(first)) {
    stage_ = 2 + (args.residual.data != nullptr) + (args.dz.data && args.stage_dz);
    stage_ *= kPart;
    to_ = reinterpret_cast<S*>(memory()) + threadIdx.x / Team * kNormStages * stage_;
    fetch(), fetch();
  }
  // The row fetched first.
  __device__ NormBwdRow<S> read(int64_t) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNormStages - 1) : "memory");
    NormBwdRow<S> staged{{coming_[0].from, to_}, to_ + kPart, nullptr, coming_[0].stats};
    const S* more = to_ + 2 * kPart;
    if (args_.residual.data) staged.residual = more, more += kPart;
    if (args_.dz.data) staged.dz = args_.stage_dz ? more : args_.dz.row(max(coming_[0].from, int64_t{0}));
    return staged;
  }
  // That row is done, another one takes its place.
  __device__ void pass() { fetch(); }
  static __device__ float* memory() {
    extern __shared__ uint4 stages[];
    return reinterpret_cast<float*>(stages);
  }

 private:
  struct Coming {
    int64_t from = -1;
    float2 stats = {0.0f, 0.0f};
  };
  static_assert(kNormStages == 2);

  __device__ int index_of(int64_t row) const { return args_.index && row < args_.rows ? args_.index[row] : -1; }

  __device__ void copy(S* to, const S* row) const {
    each_vector<V, Team, K>(args_.width, [&](int, int column) {
      const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to + column));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(row + column) : "memory");
    });
  }
  // Into the stage that `to_` points to, which becomes the other one.
  __device__ void fetch() {
    coming_[0] = coming_[1], coming_[1] = {};
    if (next_ < args_.rows) coming_[1].from = indexed_row(args_, next_, next_index_);
    const int64_t from = coming_[1].from;
    if (from >= 0) {  // whole teams
      coming_[1].stats = args_.stats[from];
      copy(to_, args_.x.row(next_)), copy(to_ + kPart, args_.dy.row(from));
      S* more = to_ + 2 * kPart;
      if (args_.residual.data) copy(more, args_.residual.row(next_)), more += kPart;
      if (args_.dz.data && args_.stage_dz) copy(more, args_.dz.row(from));
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    next_ += turn_, next_index_ = index_of(next_);  // the index is here by the time it is used
    to_ += odd_ ? -stage_ : stage_, odd_ = !odd_;
  }

  const NormArgs<S>& args_;
  int64_t next_, turn_;
  int next_index_, stage_;
  bool odd_ = false;
  Coming coming_[kNormStages];
  S* to_;
};

template <class S, int V, int Team, int K>
__global__ void __launch_bounds__(kNormThreads<Team>, kNormBlocks<Team, K * V>)
    bias_residual_layer_norm_bwd_kernel(const __grid_constant__ NormArgs<S> args) {
  const auto each = [&](auto f) { each_vector<V, Team, K>(args.width, f); };
  constexpr int kept = K > 0 ? K : 1, teams = kNormThreads<Team> / Team;
  float* partials = args.partials ? args.partials + int64_t{blockIdx.x} * 3 * args.width : nullptr;
  Floats<V> sums[3][kept];
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) {
    for (int k = 0; k < kept; ++k) sums[kind][k] = splat<V>(0.0f);
  }
  if (K == 0 && partials) {  // too wide for registers: a thread adds to its own columns of the partial sums
    for (int kind = 0; kind < 3; ++kind) {
      each([&](int, int column) {
#pragma unroll
        for (int e = 0; e < V; ++e) partials[kind * args.width + column + e] = 0.0f;
      });
    }
  }
  const int64_t turn = int64_t{gridDim.x} * teams, first = int64_t{blockIdx.x} * teams + threadIdx.x / Team;
  std::conditional_t<kNormStaged<V, Team, K>, StagedRows<S, V, Team, K>,
                     DirectRows<S, Team == kWarp ? K * V * Team : 1>>
      rows(args, first, turn);
  for (int64_t row = first; row < args.rows; row += turn, rows.pass()) {
    S* dx = args.dx.row(row);
    const NormBwdRow<S> source = rows.read(row);
    if (source.from < 0) {  // whole teams
      const Floats<V> zero = splat<V>(0.0f);
      each([&](int, int column) { store<V>(dx + column, zero); });
      continue;
    }
    Floats<V> normal[kept], grad[kept];
    const auto read = [&](int k, int column) {
      grad[k] = load<V>(source.dy + column);
      normal[k] = source.template sum<V>(args, column);
#pragma unroll
      for (int e = 0; e < V; ++e) normal[k][e] = (normal[k][e] - source.stats.x) * source.stats.y;
    };
    float2 means = {0.0f, 0.0f};
    each([&](int k, int column) {
      read(k, column);
      const Floats<V> weight = load<V, S>(args.weight, column, 1.0f);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float g = grad[k][e] * weight[e];
        means.x += g;
        means.y += g * normal[k][e];
      }
    });
    means = team_sum<Team>(means);
    means.x /= args.width;
    means.y /= args.width;
    each([&](int k, int column) {
      if constexpr (K == 0) read(k, column);
      const Floats<V> weight = load<V, S>(args.weight, column, 1.0f);
      const Floats<V> more = source.dz ? load<V>(source.dz + column) : splat<V>(0.0f);
      Floats<V> out;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        // Rounded, not fused into the subtraction: else it does not cancel against the mean in a row of width 1.
        const float g = __fmul_rn(grad[k][e], weight[e]);
        out[e] = source.stats.y * (g - means.x - normal[k][e] * means.y) + more[e];
        if constexpr (K > 0) {
          sums[0][k][e] += out[e];
          sums[1][k][e] += grad[k][e] * normal[k][e];
          sums[2][k][e] += grad[k][e];
        } else if (partials) {
          partials[column + e] += out[e];
          partials[args.width + column + e] += grad[k][e] * normal[k][e];
          partials[2 * args.width + column + e] += grad[k][e];
        }
      }
      store<V>(dx + column, out);
    });
  }
  if constexpr (K > 0) {
    if (!partials) return;
    __syncthreads();  // all rows are done with their shared memory
    store_partials<V, Team, K>(sums, args.width, rows.memory(), partials);
  }
}

// ---- column sums --------------------------------------------------------------------------------------------------
//
// The second stage: blockIdx.y chooses one of the vectors, a warp's lanes lie along 32 columns, and the warps of a
// block share the partial sums.

constexpr int kColumnWarps = 32;

struct ColumnSumsArgs {
  const float* partials;  // (count, gridDim.y, width)
  int count, width;
  void* out[3];  // (width,) each; nullptr: not wanted
  bool is_float[3];
};

template <class S>
__global__ void __launch_bounds__(kWarp* kColumnWarps) column_sums_kernel(const __grid_constant__ ColumnSumsArgs args) {
  __shared__ float sums[kColumnWarps][kWarp];
  const int kind = blockIdx.y, column = blockIdx.x * kWarp + threadIdx.x;
  if (!args.out[kind]) return;  // the whole block
  float sum = 0.0f;
  if (column < args.width) {
    const float* partials = args.partials + int64_t{kind} * args.width + column;
#pragma unroll 4
    for (int at = threadIdx.y; at < args.count; at += kColumnWarps)
      sum += partials[int64_t{at} * gridDim.y * args.width];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.width) return;
  for (int y = 1; y < kColumnWarps; ++y) sum += sums[y][threadIdx.x];
  if (args.is_float[kind]) {
    static_cast<float*>(args.out[kind])[column] = sum;
  } else {
    from_float(sum, static_cast<S*>(args.out[kind])[column]);
  }
}

}  // namespace flowattn
