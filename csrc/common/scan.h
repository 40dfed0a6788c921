// Tensors as the kernels of the scans see them, on the CPU and on GPUs. Plain data only.
#pragma once

#include <cstdint>

namespace flowattn {

// (rows, T, heads, width) with a contiguous last dim, or without it (rows, T, heads); strides in elements.
struct ScanTensor {
  void* data;  // nullptr: absent
  int64_t row, time, head;
};

// (states, heads, width) in the compute type.
struct ScanState {
  void* data;  // nullptr: absent
  int64_t row, head;
};

// (rows, T, groups, N), any strides: what a selective scan projects its states with.
struct StateRows {
  void* data;
  int64_t row, time, group, state;
};

}  // namespace flowattn
