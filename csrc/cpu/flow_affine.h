// What csrc/cpu/flow_affine.cpp hands to its kernels. Plain data only: kernels are compiled per instruction set.
#pragma once

#include <cstdint>

#include "cpu/storage.h"

namespace flowattn {

// (B, n, width) with a contiguous last dim; strides in elements. All tensors have the type of `storage`.
struct FlowTokens {
  const void* data;  // nullptr: absent
  int64_t batch, token;
};

enum class GuidanceRule : int64_t { kLogLinear, kSigmaLinear, kGaussianRatio };

// How raw outputs become a scale and a mean.
struct FlowAffineOptions {
  bool volume_preserving, softplus;
  double soft_clip;  // 0: none
  GuidanceRule rule;
  bool guide_scale, guide_mean;
};

struct FlowAffine {
  Storage storage;
  int64_t batch, tokens, features;
  FlowAffineOptions options;
  FlowTokens x, params;                // x: data in the forward, noise in the inverse
  FlowTokens params_uncond, previous;  // inverse only, may be absent
  FlowTokens guidance;                 // (B, n)
  void *out, *sums;                    // results, dense: (B, n, D) and (B, n), or (B, n, kFlowStatistics)

  // Backward only; x is then the result of the forward.
  FlowTokens grad_out, grad_sums;  // (B, n, D), (B, n) or absent
  void *grad_x, *grad_params;      // dense
};

// Columns of the statistics of a token, as in reference/flow_affine.py.
enum FlowStatistic {
  kFlowUpdate,
  kFlowSize,
  kFlowResidual,
  kFlowUpdateSquares,
  kFlowSquares,
  kFlowLogScale,
  kFlowMaxLogScale,
  kFlowNotFinite,
  kFlowNotPositive,
  kFlowStatistics
};

}  // namespace flowattn

// Tokens begin..end of the flattened (B, n).
FA_ISA_DECLARE(void flow_affine_fwd(const FlowAffine& op, int64_t begin, int64_t end))
FA_ISA_DECLARE(void flow_affine_bwd(const FlowAffine& op, int64_t begin, int64_t end))
FA_ISA_DECLARE(void flow_affine_inv(const FlowAffine& op, int64_t begin, int64_t end))
