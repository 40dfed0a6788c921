// What csrc/cpu/encoder_fusions.cpp hands to its kernels. Plain data only: kernels are compiled per instruction set.
#pragma once

#include <cstdint>

#include "cpu/storage.h"

namespace flowattn {

// (rows, width) with a contiguous last dim; stride in elements.
struct FusionRows {
  void* data;  // nullptr: absent
  int64_t stride;
};

// A vector over the columns, in its own type.
struct FusionVector {
  Storage storage;
  void* data;  // nullptr: absent
};

struct BiasGelu {
  Storage storage;
  int64_t rows, width;
  bool tanh;
  const void* bias;  // (width,) in the compute type, like every parameter below
  FusionRows x, y;

  // Backward only.
  FusionRows dy, dx;
  void* sums;  // (runs, 1, width) in the compute type
};

struct BiasResidualLayerNorm {
  Storage storage;
  int64_t rows, width;  // rows of y in the forward, of x in the backward
  double eps;
  const void *bias, *weight, *ln_bias;
  FusionRows x, residual, y, z;
  void* stats;           // (rows of y, 2): mean and 1 / deviation, in the compute type
  const int32_t* index;  // forward: row of x for each row of y; backward: row of y for each row of x; nullptr: the same
  int64_t indexed_rows;  // an index outside 0..indexed_rows means a row of zeros

  // Backward only.
  FusionRows dy, dz, dx;
  void* sums;  // (runs, 3, width): gradients of bias, weight, ln_bias
};

// A backward sums columns over runs of consecutive rows, then over the runs, in an order that depends on no thread.
constexpr int64_t kMostRuns = 64, kLeastRunRows = 16;
constexpr int64_t run_rows(int64_t rows) {
  const int64_t share = (rows + kMostRuns - 1) / kMostRuns;
  return share > kLeastRunRows ? share : kLeastRunRows;
}

}  // namespace flowattn

// The forwards run rows begin..end, the backwards runs begin..end. `scratch` holds 2 rows in the compute type.
FA_ISA_DECLARE(void bias_gelu_fwd(const BiasGelu& op, int64_t begin, int64_t end))
FA_ISA_DECLARE(void bias_gelu_bwd(const BiasGelu& op, int64_t begin, int64_t end))
FA_ISA_DECLARE(void bias_residual_layer_norm_fwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end,
                                                 void* scratch))
FA_ISA_DECLARE(void bias_residual_layer_norm_bwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end,
                                                 void* scratch))
// Copies a vector to the compute type of `storage`; an absent one becomes `missing`.
FA_ISA_DECLARE(void fusion_widen(Storage storage, const FusionVector& vector, double missing, int64_t width, void* to))
// Adds up rows 0..count of `sums`, `stride` apart, into a vector.
FA_ISA_DECLARE(void fusion_add_runs(Storage storage, void* sums, int64_t count, int64_t stride, int64_t width,
                                    const FusionVector& to))
