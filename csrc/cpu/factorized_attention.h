// What csrc/cpu/factorized_attention.cpp hands to its kernels: one line along an axis, for every head.
#pragma once

#include <cstdint>

#include "cpu/storage.h"

namespace flowattn {

struct FactorizedLine {
  Storage storage;       // float or double
  int64_t heads, width;  // channels of a head
  int64_t n_out, n_in;
  const void* kernel;  // (heads, n_out, n_in), contiguous
  void *in, *out;      // (n_in, heads, width) and (n_out, heads, width), strides in elements
  int64_t in_row, in_head, out_row, out_head;
  void* dkernel;  // of factorized_kernel_gradient: (heads, n_out, n_in), added to
  bool add;       // of factorized_value_gradient: to what `in` holds
};

}  // namespace flowattn

// out = kernel in; in (+)= kernel^T out; dkernel += out in^T. `scratch` is for the last: scratch bytes of a thread.
FA_ISA_DECLARE(int64_t factorized_scratch(const FactorizedLine& line))
FA_ISA_DECLARE(void factorized_apply(const FactorizedLine& line))
FA_ISA_DECLARE(void factorized_value_gradient(const FactorizedLine& line))
FA_ISA_DECLARE(void factorized_kernel_gradient(const FactorizedLine& line, int64_t head, void* scratch))
