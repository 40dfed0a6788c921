// The encoder fusions on the CPU: parameters in the compute type, rows shared between threads, sums of the runs.
#include "cpu/encoder_fusions.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/encoder_fusions.h"
#include "cpu/parallel.h"

namespace flowattn {
namespace {

constexpr double kGeluWork = 32, kNormWork = 8;  // multiply-adds an element, for parallel_items

FusionRows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0)}; }
FusionRows rows_of(const MaybeTensor& x) { return x ? rows_of(*x) : FusionRows{}; }

// A parameter in the compute type of `x`: itself, or a copy.
Tensor in_compute_type(const char* op, const MaybeTensor& parameter, double missing, const Tensor& x) {
  const ScalarType wide = sum_dtype(x);
  if (parameter && parameter->scalar_type() == wide) return *parameter;
  Tensor copy = torch::stable::new_empty(x, {x.size(1)}, wide);
  FusionVector vector{};
  if (parameter) vector = {storage_of(op, "a parameter", *parameter), parameter->data_ptr()};
  FA_ISA_CALL(fusion_widen, storage_of(op, "x", x), vector, missing, x.size(1), copy.data_ptr());
  return copy;
}

constexpr double kNoBias = -0.0;  // x + -0.0 is x for every x

int64_t runs_of(int64_t rows) { return (rows + run_rows(rows) - 1) / run_rows(rows); }

// Column sums of every run, `kinds` vectors each; at least one run, so that no row still gives a sum.
Tensor run_sums(const Tensor& x, int64_t kinds) {
  return torch::stable::new_empty(x, {std::max<int64_t>(runs_of(x.size(0)), 1), kinds, x.size(1)}, sum_dtype(x));
}

// Turns the sums of one kind into the gradient of a parameter that is given.
void add_runs(const char* op, const Tensor& x, const Tensor& sums, int64_t kind, const Tensor& gradient) {
  const int64_t width = x.size(1), stride = sums.stride(0);
  if (gradient.size(0) == 0) return;
  const FusionVector to{storage_of(op, "a parameter", gradient), gradient.data_ptr()};
  void* first = static_cast<char*>(sums.data_ptr()) + kind * width * sums.element_size();
  if (x.size(0) == 0) std::memset(first, 0, width * sums.element_size());
  FA_ISA_CALL(fusion_add_runs, storage_of(op, "x", x), first, sums.size(0), stride, width, to);
}

Tensor bias_gelu_fwd_cpu(Tensor x, MaybeTensor bias, bool tanh) {
  const GeluForward results(x, bias);
  const Tensor wide_bias = in_compute_type(kGelu, bias, kNoBias, x);
  BiasGelu op{storage_of(kGelu, "x", x), x.size(0), x.size(1), tanh, wide_bias.data_ptr()};
  op.x = rows_of(x), op.y = rows_of(results.y);
  parallel_items(op.rows, kGeluWork * op.rows * op.width, 0,
                 [&](int64_t begin, int64_t end, void*) { FA_ISA_CALL(bias_gelu_fwd, op, begin, end); });
  return results.y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd_cpu(Tensor dy, Tensor x, MaybeTensor bias, bool tanh, bool want_dbias) {
  const GeluBackward results(dy, x, bias, want_dbias);
  const Tensor wide_bias = in_compute_type(kGelu, bias, kNoBias, x);
  BiasGelu op{storage_of(kGelu, "x", x), x.size(0), x.size(1), tanh, wide_bias.data_ptr()};
  op.x = rows_of(x), op.dy = rows_of(dy), op.dx = rows_of(results.dx);
  Tensor sums;
  if (results.want_dbias) sums = run_sums(x, 1), op.sums = sums.data_ptr();
  parallel_items(runs_of(op.rows), kGeluWork * op.rows * op.width, 0,
                 [&](int64_t begin, int64_t end, void*) { FA_ISA_CALL(bias_gelu_bwd, op, begin, end); });
  if (results.want_dbias) add_runs(kGelu, x, sums, 0, results.dbias);
  return {results.dx, results.dbias};
}

// What both directions of the LayerNorm share; the parameters in the compute type live as long as this.
struct Norm {
  Tensor bias, weight, ln_bias;
  BiasResidualLayerNorm op{};

  Norm(const Tensor& x, const MaybeTensor& bias_, const MaybeTensor& residual, const MaybeTensor& weight_,
       const MaybeTensor& ln_bias_, const MaybeTensor& index)
      : bias(in_compute_type(kNorm, bias_, kNoBias, x)),
        weight(in_compute_type(kNorm, weight_, 1, x)),
        ln_bias(in_compute_type(kNorm, ln_bias_, kNoBias, x)) {
    op.storage = storage_of(kNorm, "x", x);
    op.width = x.size(1);
    op.bias = bias.data_ptr(), op.weight = weight.data_ptr(), op.ln_bias = ln_bias.data_ptr();
    op.x = rows_of(x), op.residual = rows_of(residual);
    op.index = static_cast<const int32_t*>(data_or_null(index));
  }

  template <typename Run>
  void share(int64_t items, const Run& run) const {
    parallel_items(items, kNormWork * op.rows * op.width, 2 * op.width * sizeof(double), run);
  }
};

std::tuple<Tensor, Tensor, Tensor> bias_residual_layer_norm_fwd_cpu(Tensor x, MaybeTensor bias, MaybeTensor residual,
                                                                    MaybeTensor weight, MaybeTensor ln_bias,
                                                                    MaybeTensor index, double eps, bool want_sum) {
  const NormForward results(x, bias, residual, weight, ln_bias, index, want_sum);
  Norm norm(x, bias, residual, weight, ln_bias, index);
  BiasResidualLayerNorm& op = norm.op;
  op.rows = results.rows, op.eps = eps, op.indexed_rows = x.size(0);
  op.y = rows_of(results.y), op.stats = results.stats.data_ptr();
  if (want_sum) op.z = rows_of(results.z);
  norm.share(op.rows, [&](int64_t begin, int64_t end, void* scratch) {
    FA_ISA_CALL(bias_residual_layer_norm_fwd, op, begin, end, scratch);
  });
  return {results.y, results.z, results.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bias_residual_layer_norm_bwd_cpu(Tensor dy, MaybeTensor dz, Tensor x,
                                                                            MaybeTensor bias, MaybeTensor residual,
                                                                            MaybeTensor weight, MaybeTensor ln_bias,
                                                                            Tensor stats, MaybeTensor inverse,
                                                                            bool want_params) {
  const NormBackward results(dy, dz, x, bias, residual, weight, ln_bias, stats, inverse, want_params);
  Norm norm(x, bias, residual, weight, ln_bias, inverse);
  BiasResidualLayerNorm& op = norm.op;
  op.rows = x.size(0), op.indexed_rows = dy.size(0);
  op.dy = rows_of(dy), op.dz = rows_of(dz), op.dx = rows_of(results.dx), op.stats = stats.data_ptr();
  Tensor sums;
  if (want_params) sums = run_sums(x, 3), op.sums = sums.data_ptr();
  norm.share(runs_of(op.rows), [&](int64_t begin, int64_t end, void* scratch) {
    FA_ISA_CALL(bias_residual_layer_norm_bwd, op, begin, end, scratch);
  });
  if (want_params) {
    add_runs(kNorm, x, sums, 0, results.dbias);
    add_runs(kNorm, x, sums, 1, results.dweight);
    add_runs(kNorm, x, sums, 2, results.dln_bias);
  }
  return {results.dx, results.dbias, results.dweight, results.dln_bias};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&flowattn::bias_gelu_fwd_cpu));
  m.impl("bias_gelu_bwd", TORCH_BOX(&flowattn::bias_gelu_bwd_cpu));
  m.impl("bias_residual_layer_norm_fwd", TORCH_BOX(&flowattn::bias_residual_layer_norm_fwd_cpu));
  m.impl("bias_residual_layer_norm_bwd", TORCH_BOX(&flowattn::bias_residual_layer_norm_bwd_cpu));
}
