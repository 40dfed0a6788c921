// Checks and allocations of the encoder fusions, the same for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "common/check.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kGelu = "bias_gelu";
constexpr const char* kNorm = "bias_residual_layer_norm";

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// `x` holds `rows` rows like those of `like`: (rows, d), the last dim contiguous, any row stride.
inline void check_rows(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t rows) {
  const std::string prefix = std::string(name) + " must ";
  FA_CHECK(x.dim() == 2, op, prefix + "have 2 dims", x.dim());
  FA_CHECK(x.size(0) == rows, op, prefix + "have " + std::to_string(rows) + " rows", x.size(0));
  FA_CHECK(x.size(1) == like.size(1), op, prefix + "have the width of x", x.size(1));
  FA_CHECK(x.size(1) <= 1 || x.stride(1) == 1, op, prefix + "have a contiguous last dim", x.stride(1));
  FA_CHECK(x.scalar_type() == like.scalar_type(), op, prefix + "have the dtype of x", toString(x.scalar_type()));
  FA_CHECK(same_device(x, like), op, prefix + "be on the device of x", x.get_device_index());
}

inline void check_parameter(const char* op, const char* name, const MaybeTensor& vector, const Tensor& x) {
  if (!vector) return;
  const std::string prefix = std::string(name) + " must ";
  const ScalarType dtype = vector->scalar_type();
  FA_CHECK(vector->dim() == 1 && vector->size(0) == x.size(1), op, prefix + "have shape (d,)", vector->dim());
  FA_CHECK(vector->is_contiguous(), op, prefix + "be contiguous", vector->stride(0));
  FA_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, op, prefix + "have the dtype of x or float32",
           toString(dtype));
  FA_CHECK(same_device(*vector, x), op, prefix + "be on the device of x", vector->get_device_index());
}

inline void check_index(const MaybeTensor& index, const Tensor& x) {
  if (!index) return;
  const bool vector = index->dim() == 1 && index->is_contiguous() && index->scalar_type() == ScalarType::Int;
  FA_CHECK(vector, kNorm, "the index must be a contiguous int32 vector", index->dim());
  FA_CHECK(same_device(*index, x), kNorm, "the index must be on the device of x", index->get_device_index());
}

// The gradient of a parameter that is given and wanted, else an empty vector.
inline Tensor gradient_of(const MaybeTensor& parameter, bool wanted, const Tensor& x) {
  if (parameter && wanted) return torch::stable::new_empty(*parameter, {parameter->size(0)});
  return torch::stable::new_empty(x, {0});
}

inline ScalarType sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void* data_or_null(const MaybeTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Checked inputs and allocated results of one direction of one op.
struct GeluForward {
  Tensor y;

  GeluForward(const Tensor& x, const MaybeTensor& bias) {
    check_rows(kGelu, "x", x, x, x.size(0));
    check_parameter(kGelu, "bias", bias, x);
    y = torch::stable::new_empty(x, x.sizes());
  }
};

struct GeluBackward {
  bool want_dbias;
  Tensor dx, dbias;

  GeluBackward(const Tensor& dy, const Tensor& x, const MaybeTensor& bias, bool want)
      : want_dbias(want && bias.has_value()) {
    check_rows(kGelu, "x", x, x, x.size(0));
    check_rows(kGelu, "dy", dy, x, x.size(0));
    check_parameter(kGelu, "bias", bias, x);
    dx = torch::stable::new_empty(x, x.sizes());
    dbias = gradient_of(bias, want, x);
  }
};

struct NormForward {
  int64_t rows;  // of y
  Tensor y, z, stats;

  NormForward(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual, const MaybeTensor& weight,
              const MaybeTensor& ln_bias, const MaybeTensor& index, bool want_sum) {
    check_rows(kNorm, "x", x, x, x.size(0));
    if (residual) check_rows(kNorm, "residual", *residual, x, x.size(0));
    check_parameter(kNorm, "bias", bias, x);
    check_parameter(kNorm, "weight", weight, x);
    check_parameter(kNorm, "ln_bias", ln_bias, x);
    check_index(index, x);
    rows = index ? index->size(0) : x.size(0);
    y = torch::stable::new_empty(x, {rows, x.size(1)});
    z = torch::stable::new_empty(x, {want_sum ? rows : 0, x.size(1)});
    stats = torch::stable::new_empty(x, {rows, 2}, sum_dtype(x));
  }
};

struct NormBackward {
  Tensor dx, dbias, dweight, dln_bias;

  NormBackward(const Tensor& dy, const MaybeTensor& dz, const Tensor& x, const MaybeTensor& bias,
               const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& ln_bias, const Tensor& stats,
               const MaybeTensor& inverse, bool want_params) {
    check_rows(kNorm, "x", x, x, x.size(0));
    check_rows(kNorm, "dy", dy, x, inverse ? dy.size(0) : x.size(0));
    if (dz) check_rows(kNorm, "dz", *dz, x, dy.size(0));
    if (residual) check_rows(kNorm, "residual", *residual, x, x.size(0));
    check_parameter(kNorm, "bias", bias, x);
    check_parameter(kNorm, "weight", weight, x);
    check_parameter(kNorm, "ln_bias", ln_bias, x);
    check_index(inverse, x);
    if (inverse) FA_CHECK(inverse->size(0) == x.size(0), kNorm, "the index must have one entry a row", x.size(0));
    const bool fits = stats.dim() == 2 && stats.size(0) == dy.size(0) && stats.size(1) == 2 && stats.is_contiguous();
    FA_CHECK(fits, kNorm, "stats must be contiguous, two values a row of dy", stats.dim());
    FA_CHECK(stats.scalar_type() == sum_dtype(x), kNorm, "stats must be float32, or float64 for float64", "another");
    FA_CHECK(same_device(stats, x), kNorm, "stats must be on the device of x", stats.get_device_index());
    dx = torch::stable::new_empty(x, x.sizes());
    dbias = gradient_of(bias, want_params, x);
    dweight = gradient_of(weight, want_params, x);
    dln_bias = gradient_of(ln_bias, want_params, x);
  }
};

}  // namespace flowattn
