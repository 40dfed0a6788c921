// Checks that the launchers of varlen_attention share. The public op has said it all before, in a friendlier way.
#pragma once

#include "cuda/tile_map.h"

namespace flowattn {

inline void check_offsets(const char* op, const torch::stable::Tensor& cu) {
  FA_CHECK(
      cu.scalar_type() == torch::headeronly::ScalarType::Int && cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous(),
      op, "cu_seqlens must be contiguous int32 of shape (B+1,)", cu.dim());
}

inline void check_call(const char* op, const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                       const torch::stable::Tensor& v, const torch::stable::Tensor& cu_q,
                       const torch::stable::Tensor& cu_k, double scale) {
  for (const torch::stable::Tensor* x : {&q, &k, &v}) check_rows(op, *x);
  check_offsets(op, cu_q);
  check_offsets(op, cu_k);
  FA_CHECK(k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == k.size(1), op, "k and v must fit q",
           k.size(2));
  FA_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, "the heads of k must divide the heads of q", k.size(1));
  FA_CHECK(cu_q.size(0) == cu_k.size(0), op, "cu_seqlens_q and cu_seqlens_k must have one length", cu_k.size(0));
  FA_CHECK(scale > 0, op, "scale must be > 0", scale);
  const auto type = q.scalar_type();
  FA_CHECK(type == torch::headeronly::ScalarType::Half || type == torch::headeronly::ScalarType::BFloat16, op,
           "q must be float16 or bfloat16", static_cast<int>(type));
}

}  // namespace flowattn
