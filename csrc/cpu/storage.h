// The element types of the CPU kernels: chosen at run time from a tensor, named S inside a kernel.
#pragma once

#include "cpu/isa.h"

#ifndef FLOWATTN_ISA  // kernels see no torch header
#  include <torch/csrc/stable/tensor.h>

#  include <string>

#  include "common/check.h"
#endif

namespace flowattn {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

#ifndef FLOWATTN_ISA
inline Storage storage_of(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      FA_CHECK(false, op, std::string(name) + " must be float16, bfloat16, float32 or float64",
               toString(tensor.scalar_type()));
  }
}
#endif

}  // namespace flowattn

// Evaluates to CALL, in which S names the storage type of `op`.
#define FA_DISPATCH_STORAGE(op, CALL) \
  [&] {                               \
    switch ((op).storage) {           \
      case Storage::kDouble: {        \
        using S = double;             \
        return CALL;                  \
      }                               \
      case Storage::kHalf: {          \
        using S = Half;               \
        return CALL;                  \
      }                               \
      case Storage::kBFloat16: {      \
        using S = BFloat16;           \
        return CALL;                  \
      }                               \
      default: {                      \
        using S = float;              \
        return CALL;                  \
      }                               \
    }                                 \
  }()
