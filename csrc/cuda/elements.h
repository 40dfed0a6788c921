// What launchers of token-wise kernels and scans share: a tensor's element type, its GPU's size, rounding up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/cuda_stream.h"

namespace flowattn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int processors(const char* op, const torch::stable::Tensor& x) {
  int count = 1;
  check_launch(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  return count;
}

// Calls run(S{}) with the element type of x.
template <class Run>
void with_element(const char* op, const torch::stable::Tensor& x, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(__half{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      FA_CHECK(false, op, "tensors must be float16, bfloat16 or float32", toString(x.scalar_type()));
  }
}

}  // namespace flowattn
