// factorized_attention on the CPU: checks, output allocation, and which lines of the grid each thread takes.
#include "cpu/factorized_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/parallel.h"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "factorized_attention";
constexpr int64_t kParts = 16;  // runs of lines whose gradients of a kernel are summed apart, whatever the threads

// Half precision is computed in float32 as a whole: its rows would have to be converted once for each axis.
Tensor widened(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  return half ? torch::stable::to(x, ScalarType::Float) : x;
}

// One axis of a call. Line numbers count the other axes, the last one fastest; the batch is the first.
class Axis {
 public:
  Axis(const Tensor& in, const Tensor& out, const Tensor& kernel, int64_t axis, int64_t slot) : in_(in), out_(out) {
    const int64_t dims = in.dim();
    const auto shape = kernel.sizes();
    FA_CHECK(axis >= 1 && axis <= dims - 3, kOp, "axes must be grid axes", axis);
    line_.storage = storage_of(kOp, "v", in);
    line_.heads = in.size(dims - 2), line_.width = in.size(dims - 1);
    const bool fits = kernel.is_cpu() && kernel.scalar_type() == in.scalar_type() && kernel.dim() == 4 &&
                      kernel.is_contiguous() && shape[0] == in.size(0) && shape[1] == line_.heads &&
                      shape[2] == out.size(axis) && shape[3] == in.size(axis);
    FA_CHECK(fits, kOp, "kernels must be contiguous CPU tensors (B, H, N_out, N_in) in the compute type of v",
             shape_text(shape));
    line_.n_out = shape[2], line_.n_in = shape[3];
    line_.in_row = in.stride(axis), line_.in_head = in.stride(dims - 2);
    line_.out_row = out.stride(axis), line_.out_head = out.stride(dims - 2);
    slot_ = slot * line_.width, matrices_ = line_.heads * line_.n_out * line_.n_in, element_ = in.element_size();
    kernel_ = static_cast<const char*>(kernel.data_ptr());
    for (int64_t d = 0; d < dims - 2; ++d) {
      if (d != axis) axes_.push_back(d);
    }
    lines = 1;
    for (int64_t d : axes_) lines *= in.size(d);
  }

  // The line `index`; its gradient of the kernel goes to `dkernel` + its batch row, in units of all heads' matrices.
  FactorizedLine at(int64_t index) const {
    FactorizedLine line = line_;
    int64_t in = 0, out = slot_, batch = 0;
    for (size_t i = axes_.size(); i-- > 0;) {
      const int64_t d = axes_[i], size = in_.size(d);
      batch = index % size;
      in += batch * in_.stride(d), out += batch * out_.stride(d);
      index /= size;
    }
    line.in = static_cast<char*>(in_.data_ptr()) + in * element_;
    line.out = static_cast<char*>(out_.data_ptr()) + out * element_;
    line.kernel = kernel_ + batch * matrices_ * element_;
    return line;
  }

  const FactorizedLine& shape() const { return line_; }
  int64_t matrices() const { return matrices_; }
  double work() const { return double(lines) * matrices_ * line_.width; }

  int64_t lines;

 private:
  const Tensor &in_, &out_;
  FactorizedLine line_{};
  const char* kernel_;
  int64_t slot_, matrices_, element_;
  std::vector<int64_t> axes_;
};

template <typename Run>
void over_lines(const Axis& axis, const Run& run) {
  parallel_items(axis.lines, axis.work(), 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t index = begin; index < end; ++index) run(axis.at(index));
  });
}

void check_values(const char* name, const Tensor& x, int64_t dims) {
  FA_CHECK(x.is_cpu() && x.dim() == dims && dims >= 4, kOp, std::string(name) + " must be a CPU tensor (B, N.., H, C)",
           shape_text(x.sizes()));
  FA_CHECK(x.numel() == 0 || x.size(dims - 1) <= 1 || x.stride(dims - 1) == 1, kOp,
           std::string(name) + " must have a contiguous last dim", "stride " + std::to_string(x.stride(dims - 1)));
}

Tensor factorized_attention_fwd_cpu(Tensor v, std::vector<Tensor> kernels, std::vector<int64_t> axes) {
  check_values("v", v, v.dim());
  FA_CHECK(!kernels.empty() && kernels.size() == axes.size(), kOp, "there must be one kernel an axis", kernels.size());
  const Tensor in = widened(v);
  std::vector<int64_t> shape(v.sizes().begin(), v.sizes().end());
  shape.back() *= int64_t(axes.size());
  if (axes.size() == 1 && axes[0] >= 0 && axes[0] < v.dim()) shape[axes[0]] = kernels[0].size(2);
  const Tensor out = torch::stable::new_empty(in, shape);
  for (size_t a = 0; a < axes.size(); ++a) {
    const Axis axis(in, out, kernels[a], axes[a], a);
    over_lines(axis, [](const FactorizedLine& line) { FA_ISA_CALL(factorized_apply, line); });
  }
  return torch::stable::to(out, v.scalar_type());
}

template <typename T>
void add_parts(const Tensor& parts, const Tensor& sum) {
  const int64_t batch = sum.size(0), count = batch ? sum.numel() / batch : 0;
  const T* values = parts.const_data_ptr<T>();
  T* total = sum.mutable_data_ptr<T>();
  for (int64_t b = 0; b < batch; ++b, total += count) {
    std::fill(total, total + count, T(0));
    for (int64_t part = 0; part < parts.size(1); ++part, values += count) {
      for (int64_t i = 0; i < count; ++i) total[i] += values[i];
    }
  }
}

// Item = (run of a sample's lines, head): one owner for every partial sum.
Tensor kernel_gradient(const Axis& axis, const Tensor& kernel) {
  const int64_t batch = kernel.size(0), heads = kernel.size(1), lines = batch ? axis.lines / batch : 0;
  const int64_t parts = std::clamp<int64_t>(lines, 1, kParts);
  const Tensor sums = torch::stable::new_zeros(kernel, {batch, parts, heads, kernel.size(2), kernel.size(3)});
  parallel_items(batch * parts * heads, axis.work(), FA_ISA_CALL(factorized_scratch, axis.shape()),
                 [&](int64_t begin, int64_t end, void* scratch) {
                   for (int64_t item = begin; item < end; ++item) {
                     const int64_t head = item % heads, run = item / heads, b = run / parts, part = run % parts;
                     const int64_t last = b * lines + lines * (part + 1) / parts;
                     for (int64_t index = b * lines + lines * part / parts; index < last; ++index) {
                       FactorizedLine line = axis.at(index);
                       line.dkernel = static_cast<char*>(sums.data_ptr()) + run * axis.matrices() * sums.element_size();
                       FA_ISA_CALL(factorized_kernel_gradient, line, head, scratch);
                     }
                   }
                 });
  const Tensor total = torch::stable::new_empty(kernel, kernel.sizes());
  kernel.scalar_type() == ScalarType::Double ? add_parts<double>(sums, total) : add_parts<float>(sums, total);
  return total;
}

std::tuple<Tensor, std::vector<Tensor>> factorized_attention_bwd_cpu(Tensor dout, Tensor v, std::vector<Tensor> kernels,
                                                                     std::vector<int64_t> axes) {
  check_values("v", v, v.dim());
  check_values("dout", dout, v.dim());
  FA_CHECK(!kernels.empty() && kernels.size() == axes.size(), kOp, "there must be one kernel an axis", kernels.size());
  FA_CHECK(
      dout.size(v.dim() - 1) == v.size(v.dim() - 1) * int64_t(axes.size()) && dout.scalar_type() == v.scalar_type(),
      kOp, "dout must have the dtype of v and its channels once an axis", shape_text(dout.sizes()));
  for (int64_t d = 0; d < v.dim() - 1; ++d) {
    const bool own = axes.size() == 1 && d == axes[0];
    FA_CHECK(own || dout.size(d) == v.size(d), kOp, "dout must have the grid of v", shape_text(dout.sizes()));
  }
  const Tensor in = widened(v), out = widened(dout);
  const Tensor dv = torch::stable::new_empty(in, in.sizes());
  std::vector<Tensor> dkernels;
  for (size_t a = 0; a < axes.size(); ++a) {
    const Axis values(dv, out, kernels[a], axes[a], a);
    over_lines(values, [&](FactorizedLine line) {
      line.add = a > 0;
      FA_ISA_CALL(factorized_value_gradient, line);
    });
    dkernels.push_back(kernel_gradient(Axis(in, out, kernels[a], axes[a], a), kernels[a]));
  }
  return {torch::stable::to(dv, v.scalar_type()), dkernels};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("factorized_attention_fwd", TORCH_BOX(&flowattn::factorized_attention_fwd_cpu));
  m.impl("factorized_attention_bwd", TORCH_BOX(&flowattn::factorized_attention_bwd_cpu));
}
