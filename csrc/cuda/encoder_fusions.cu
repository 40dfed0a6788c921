// bias_gelu and bias_residual_layer_norm on CUDA: vector width, team size, grids, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>
#include <type_traits>

#include "common/cuda_stream.h"
#include "common/encoder_fusions.h"
#include "cuda/elements.h"
#include "cuda/encoder_fusions.cuh"

namespace flowattn {
namespace {

// Can every one of these be read in 16-byte vectors along its rows?
class Alignment {
 public:
  explicit Alignment(const Tensor& x) : bytes_(x.element_size()) { add(x); }
  void add(const Tensor& x) {
    bits_ |= reinterpret_cast<uintptr_t>(x.data_ptr()) | static_cast<uintptr_t>(x.size(x.dim() - 1) * bytes_);
    if (x.dim() == 2 && x.size(0) > 1) bits_ |= static_cast<uintptr_t>(x.stride(0) * bytes_);
  }
  void add(const MaybeTensor& x) {
    if (x) add(*x);
  }
  bool vectors() const { return bits_ % 16 == 0; }

 private:
  int64_t bytes_;
  uintptr_t bits_ = 0;
};

template <class S>
Rows<S> rows_of(const Tensor& x) {
  return {static_cast<S*>(x.data_ptr()), x.stride(0)};
}
template <class S>
Rows<S> rows_of(const MaybeTensor& x) {
  return x ? rows_of<S>(*x) : Rows<S>{nullptr, 0};
}

ColumnVector column_vector(const MaybeTensor& vector) {
  return {data_or_null(vector), vector && vector->scalar_type() == ScalarType::Float};
}

int width_of(const char* op, const Tensor& x) {
  FA_CHECK(x.size(1) < (int64_t{1} << 28), op, "d must be below 2^28", x.size(1));
  return static_cast<int>(x.size(1));
}

// Second stage of a backward: partials (count, kinds, width) to the gradients that are not empty.
template <class S>
void launch_column_sums(const char* op, const Tensor& partials, int count, std::initializer_list<Tensor> gradients,
                        int width, cudaStream_t stream) {
  ColumnSumsArgs args{partials.const_data_ptr<float>(), count, width};
  int kinds = 0;
  for (const Tensor& gradient : gradients) {
    args.out[kinds] = gradient.size(0) ? gradient.data_ptr() : nullptr;
    args.is_float[kinds++] = gradient.scalar_type() == ScalarType::Float;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(width, kWarp)), kinds), block(kWarp, kColumnWarps);
  column_sums_kernel<S><<<grid, block, 0, stream>>>(args);
  check_launch(op, cudaGetLastError());
}

Tensor empty_floats(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, {shape.begin(), shape.size()}, ScalarType::Float);
}

// ---- bias_gelu

// Threads along the columns: what leaves the fewest idle in the last block of a row, the most if equal.
struct GeluShape {
  dim3 block;
  int64_t column_blocks;

  explicit GeluShape(int64_t vectors) {
    unsigned lanes = std::bit_ceil(static_cast<unsigned>(vectors));
    if (vectors > kWarp) {
      lanes = kGeluThreads;
      for (unsigned fewer = kGeluThreads / 2; fewer >= kWarp; fewer /= 2) {
        if (ceil_div(vectors, fewer) * fewer < ceil_div(vectors, lanes) * lanes) lanes = fewer;
      }
    }
    block = dim3(lanes, kGeluThreads / lanes);
    column_blocks = ceil_div(vectors, lanes);
  }
  dim3 grid(int64_t rows, int64_t thread_rows, int64_t most) const {
    const int64_t row_blocks = ceil_div(rows, block.y * thread_rows);
    return dim3(static_cast<unsigned>(std::clamp<int64_t>(row_blocks, 1, most)), static_cast<unsigned>(column_blocks));
  }
};

constexpr int64_t kMostColumnBlocks = 65535;  // gridDim.y

// Calls run(V, Tanh) as compile-time constants.
template <class S, class Run>
void with_gelu(bool vectors, bool tanh, const Run& run) {
  constexpr std::integral_constant<int, 16 / sizeof(S)> wide;
  constexpr std::integral_constant<int, 1> one;
  if (vectors) {
    tanh ? run(wide, std::true_type{}) : run(wide, std::false_type{});
  } else {
    tanh ? run(one, std::true_type{}) : run(one, std::false_type{});
  }
}

Tensor bias_gelu_fwd_cuda(Tensor x, MaybeTensor bias, bool tanh) {
  const CudaLaunch launch(x);
  const GeluForward results(x, bias);
  if (x.numel() == 0) return results.y;
  Alignment alignment(x);
  alignment.add(results.y);
  alignment.add(bias);
  with_element(kGelu, x, [&](auto element) {
    using S = decltype(element);
    BiasGeluArgs<S> args{x.size(0), width_of(kGelu, x), column_vector(bias), rows_of<const S>(x)};
    args.out = rows_of<S>(results.y);
    with_gelu<S>(alignment.vectors(), tanh, [&](auto v, auto form) {
      const GeluShape shape(args.width / v);
      FA_CHECK(shape.column_blocks <= kMostColumnBlocks, kGelu, "d must be smaller", args.width);
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
      const dim3 grid = shape.grid(args.rows, kGeluRows, kMost);
      if (int64_t{grid.x} * grid.y >= int64_t{processors(kGelu, x)} * kGeluFew) {
        bias_gelu_fwd_kernel<S, v, form, kGeluRows><<<grid, shape.block, 0, launch.stream()>>>(args);
      } else {
        const dim3 more = shape.grid(args.rows, 1, kMost);
        bias_gelu_fwd_kernel<S, v, form, 1><<<more, shape.block, 0, launch.stream()>>>(args);
      }
      check_launch(kGelu, cudaGetLastError());
    });
  });
  return results.y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd_cuda(Tensor dy, Tensor x, MaybeTensor bias, bool tanh, bool want_dbias) {
  const CudaLaunch launch(x);
  const GeluBackward results(dy, x, bias, want_dbias);
  if (x.size(1) == 0) return {results.dx, results.dbias};
  Alignment alignment(x);
  alignment.add(dy);
  alignment.add(results.dx);
  alignment.add(bias);
  with_element(kGelu, x, [&](auto element) {
    using S = decltype(element);
    BiasGeluArgs<S> args{x.size(0), width_of(kGelu, x), column_vector(bias), rows_of<const S>(x), rows_of<const S>(dy)};
    args.out = rows_of<S>(results.dx);
    with_gelu<S>(alignment.vectors(), tanh, [&](auto v, auto form) {
      const GeluShape shape(args.width / v);
      FA_CHECK(shape.column_blocks <= kMostColumnBlocks, kGelu, "d must be smaller", args.width);
      const int64_t most = ceil_div(int64_t{processors(kGelu, x)} * kGeluBlocks, shape.column_blocks);
      const dim3 grid = shape.grid(args.rows, kGeluBwdRows, most);
      const Tensor partials = empty_floats(x, {results.want_dbias ? grid.x : 0, args.width});
      if (results.want_dbias) args.partials = partials.mutable_data_ptr<float>();
      bias_gelu_bwd_kernel<S, v, form><<<grid, shape.block, 0, launch.stream()>>>(args);
      check_launch(kGelu, cudaGetLastError());
      if (results.want_dbias) {
        launch_column_sums<S>(kGelu, partials, static_cast<int>(grid.x), {results.dbias}, args.width, launch.stream());
      }
    });
  });
  return {results.dx, results.dbias};
}

// ---- bias_residual_layer_norm

constexpr int64_t kMostNormStages = 96 << 10;  // bytes that every GPU from compute capability 8.0 on gives a block

// Calls run(V, Team, K) as compile-time constants, for rows of `width` elements. A thread keeps at most 32 columns.
template <class S, int V, int WidestTeam, class Run>
void with_team(int width, const Run& run) {
  using std::integral_constant;
  constexpr integral_constant<int, V> v;
  constexpr integral_constant<int, kWarp> warp;
  constexpr integral_constant<int, 256> block;
  constexpr integral_constant<int, WidestTeam> widest;
  if (width <= 8 * kWarp) {
    run(v, warp, integral_constant<int, 8 / V>{});
  } else if (width <= 16 * kWarp) {
    run(v, warp, integral_constant<int, 16 / V>{});
  } else if (V > 1 && width <= 24 * kWarp) {
    run(v, warp, integral_constant<int, V == 1 ? 16 : 24 / V>{});
  } else if (width <= 32 * kWarp) {
    run(v, warp, integral_constant<int, 32 / V>{});
  } else if (width <= 16 * block) {
    run(v, block, integral_constant<int, 16 / V>{});
  } else if (width <= 16 * widest) {
    run(v, widest, integral_constant<int, 16 / V>{});
  } else {
    run(v, widest, integral_constant<int, 0>{});
  }
}

template <class S, int WidestTeam, class Run>
void with_vectors_and_team(bool vectors, int width, const Run& run) {
  if (vectors) {
    with_team<S, 16 / sizeof(S), WidestTeam>(width, run);
  } else {
    with_team<S, 1, WidestTeam>(width, run);
  }
}

template <class S>
NormArgs<S> norm_args(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual, const MaybeTensor& weight,
                      const MaybeTensor& ln_bias, const MaybeTensor& index) {
  NormArgs<S> args{};
  args.width = width_of(kNorm, x);
  args.bias = column_vector(bias);
  args.weight = column_vector(weight);
  args.ln_bias = column_vector(ln_bias);
  args.x = rows_of<const S>(x);
  args.residual = rows_of<const S>(residual);
  args.index = static_cast<const int*>(data_or_null(index));
  return args;
}

std::tuple<Tensor, Tensor, Tensor> bias_residual_layer_norm_fwd_cuda(Tensor x, MaybeTensor bias, MaybeTensor residual,
                                                                     MaybeTensor weight, MaybeTensor ln_bias,
                                                                     MaybeTensor index, double eps, bool want_sum) {
  const CudaLaunch launch(x);
  const NormForward results(x, bias, residual, weight, ln_bias, index, want_sum);
  if (results.rows == 0) return {results.y, results.z, results.stats};
  Alignment alignment(x);
  for (const MaybeTensor& other : {bias, residual, weight, ln_bias, MaybeTensor(results.y), MaybeTensor(results.z)}) {
    alignment.add(other);
  }
  with_element(kNorm, x, [&](auto element) {
    using S = decltype(element);
    NormArgs<S> args = norm_args<S>(x, bias, residual, weight, ln_bias, index);
    args.rows = results.rows;
    args.eps = static_cast<float>(eps);
    args.indexed_rows = x.size(0);
    args.stats = static_cast<float2*>(results.stats.data_ptr());
    args.y = rows_of<S>(results.y);
    if (want_sum) args.z = rows_of<S>(results.z);
    with_vectors_and_team<S, 1024>(alignment.vectors(), args.width, [&](auto v, auto team, auto k) {
      const int64_t blocks = ceil_div(args.rows, kNormThreads<team> / team);
      FA_CHECK(blocks <= std::numeric_limits<int32_t>::max(), kNorm, "there must be fewer than 2^31 rows", args.rows);
      bias_residual_layer_norm_fwd_kernel<S, v, team, k>
          <<<static_cast<unsigned>(blocks), kNormThreads<team>, 0, launch.stream()>>>(args);
      check_launch(kNorm, cudaGetLastError());
    });
  });
  return {results.y, results.z, results.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bias_residual_layer_norm_bwd_cuda(Tensor dy, MaybeTensor dz, Tensor x,
                                                                             MaybeTensor bias, MaybeTensor residual,
                                                                             MaybeTensor weight, MaybeTensor ln_bias,
                                                                             Tensor stats, MaybeTensor inverse,
                                                                             bool want_params) {
  const CudaLaunch launch(x);
  const NormBackward results(dy, dz, x, bias, residual, weight, ln_bias, stats, inverse, want_params);
  const auto gradients = [&] { return std::tuple(results.dx, results.dbias, results.dweight, results.dln_bias); };
  if (x.size(1) == 0) return gradients();
  Alignment alignment(x);
  for (const MaybeTensor& other : {MaybeTensor(dy), dz, bias, residual, weight, ln_bias, MaybeTensor(results.dx)}) {
    alignment.add(other);
  }
  with_element(kNorm, x, [&](auto element) {
    using S = decltype(element);
    NormArgs<S> args = norm_args<S>(x, bias, residual, weight, ln_bias, inverse);
    args.rows = x.size(0);
    args.indexed_rows = dy.size(0);
    args.stats = static_cast<float2*>(stats.data_ptr());
    args.dy = rows_of<const S>(dy);
    args.dz = rows_of<const S>(dz);
    args.dx = rows_of<S>(results.dx);
    with_vectors_and_team<S, 512>(alignment.vectors(), args.width, [&](auto v, auto team, auto k) {
      // A block for each multiprocessor, then 4 rows a team: few partial sums.
      const int64_t teams = kNormThreads<team> / team, least = processors(kNorm, x);
      const int64_t wanted = std::max(ceil_div(args.rows, 4 * teams), std::min(ceil_div(args.rows, teams), least));
      const int64_t blocks = std::clamp<int64_t>(wanted, 1, least * kNormBlocks<team, k * v>);
      const Tensor partials = empty_floats(x, {want_params ? blocks : 0, 3, args.width});
      if (want_params) args.partials = partials.mutable_data_ptr<float>();
      const auto kernel = bias_residual_layer_norm_bwd_kernel<S, v, team, k>;
      int64_t shared = 0;
      if constexpr (kNormStaged<v, team, k>) {
        const int64_t part = teams * kNormStages * StagedRows<S, v, team, k>::kPart * sizeof(S);
        shared = (2 + bool(residual)) * part;
        args.stage_dz = dz && shared + part <= kMostNormStages;
        if (args.stage_dz) shared += part;
        const int bytes = static_cast<int>(shared);
        check_launch(kNorm, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      }
      kernel<<<static_cast<unsigned>(blocks), kNormThreads<team>, shared, launch.stream()>>>(args);
      check_launch(kNorm, cudaGetLastError());
      if (want_params) {
        launch_column_sums<S>(kNorm, partials, static_cast<int>(blocks),
                              {results.dbias, results.dweight, results.dln_bias}, args.width, launch.stream());
      }
    });
  });
  return gradients();
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&flowattn::bias_gelu_fwd_cuda));
  m.impl("bias_gelu_bwd", TORCH_BOX(&flowattn::bias_gelu_bwd_cuda));
  m.impl("bias_residual_layer_norm_fwd", TORCH_BOX(&flowattn::bias_residual_layer_norm_fwd_cuda));
  m.impl("bias_residual_layer_norm_bwd", TORCH_BOX(&flowattn::bias_residual_layer_norm_bwd_cuda));
}
