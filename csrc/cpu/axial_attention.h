// Attention along one axis of a grid on the CPU: every line along the axis is one sequence for the kernels of
// varlen_attention, which get their pointers shifted to it. Nothing is permuted or copied.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "cpu/varlen_attention.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Coordinates =
    std::vector<int64_t>;  // one for each batch axis: all dims but the attended axis, heads and channels

// A tensor (grid..., heads, width) or, as per-row values, (grid..., heads), seen line by line.
class Lines {
 public:
  Lines() = default;
  Lines(const Tensor& x, int64_t axis, int64_t dims) : data_(static_cast<char*>(x.data_ptr())) {
    element_ = x.element_size(), row_ = x.stride(axis), head_ = x.stride(dims);
    for (int64_t d = 0; d < dims; ++d) {
      if (d != axis) strides_.push_back(x.size(d) == 1 ? 0 : x.stride(d));
    }
  }

  PackedRows rows(const Coordinates& at) const { return {line(at), row_, head_}; }
  RowValues values(const Coordinates& at) const { return {line(at), head_, row_}; }

 private:
  void* line(const Coordinates& at) const {
    if (!data_) return nullptr;
    int64_t offset = 0;
    for (size_t d = 0; d < at.size(); ++d) offset += at[d] * strides_[d];
    return data_ + offset * element_;
  }

  char* data_ = nullptr;
  int64_t element_ = 0, row_ = 0, head_ = 0;
  std::vector<int64_t> strides_;
};

// One call: sizes, masks and the tensors both directions share. Keeps what it had to convert.
class AxialCall {
 public:
  AxialCall(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, const MaybeTensor& cos,
            const MaybeTensor& sin, int64_t axis, double scale, int64_t mask, bool interleaved);
  AxialCall(const AxialCall&) = delete;  // `op` points into it

  // Lines of a tensor of the grid of q (or of k, where `keys`), checked; width 0 means per-row values.
  Lines lines(const char* name, const Tensor& x, ScalarType dtype, bool keys, int64_t heads, int64_t width) const;

  // Points `op` at one line.
  void place(VarlenAttention& op, const Coordinates& at) const;

  VarlenAttention op{};
  ScalarType wide;
  int64_t axis, dims;           // grid dims, the batch among them
  int64_t n, m, sequences = 1;  // queries and keys of a line, number of lines
  std::vector<int64_t> sizes;   // of the batch axes
  std::vector<int64_t> bias_strides;

 private:
  void read_bias(const Tensor& bias);
  void read_rotation(const MaybeTensor& cos, const MaybeTensor& sin, bool interleaved);
  void check(const char* name, const Tensor& x, ScalarType dtype, bool keys, int64_t heads, int64_t width) const;

  int32_t cu_q_[2], cu_k_[2];
  Lines q_, k_, v_;
  MaybeTensor cos_, sin_, cos_columns_, sin_columns_;
};

}  // namespace flowattn
