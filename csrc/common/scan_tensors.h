// Checks and views that the launchers of the scans share, on the CPU and on GPUs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/scan.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class ScanDevice { kCpu, kCuda };

inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks device, dtype, shape and, with `row`, that the last dim is contiguous.
inline void check_scan_tensor(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                              std::initializer_list<int64_t> shape, bool row, ScanDevice device = ScanDevice::kCpu) {
  const auto rule = [&](const std::string& what) { return std::string(name) + " must have " + what; };
  const bool cpu = device == ScanDevice::kCpu;
  FA_CHECK(cpu ? x.is_cpu() : x.is_cuda(), op, std::string(name) + (cpu ? " must be on the CPU" : " must be on a GPU"),
           "another device");
  FA_CHECK(x.scalar_type() == dtype, op, rule(std::string("dtype ") + toString(dtype)), toString(x.scalar_type()));
  const auto sizes = x.sizes();
  const bool fits = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  FA_CHECK(fits, op, rule("shape " + shape_text(shape)), shape_text(sizes));
  const int64_t last = x.dim() - 1;
  FA_CHECK(!row || x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, op, rule("a contiguous last dim"),
           "stride " + std::to_string(x.stride(last)));
}

// (B, T, H, ...) and (S, H, ...) as the kernels see them.
inline ScanTensor scan_tensor(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
inline ScanState scan_state(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
inline ScanTensor scan_tensor(const std::optional<Tensor>& x) { return x ? scan_tensor(*x) : ScanTensor{}; }
inline ScanState scan_state(const std::optional<Tensor>& x) { return x ? scan_state(*x) : ScanState{}; }

}  // namespace flowattn
