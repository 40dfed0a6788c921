// Padding-free attention forward on CUDA: checks, grid, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/tile_map.h"
#include "cuda/varlen_attention.cuh"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "varlen_attention_fwd";
constexpr int64_t kPairFrom = 256;  // longest key sequence from which a block has two warpgroups

void check_offsets(const Tensor& cu) {
  FA_CHECK(cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous(), kOp,
           "cu_seqlens must be contiguous int32 of shape (B+1,)", cu.dim());
}

void check_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                double scale) {
  for (const Tensor* x : {&q, &k, &v}) check_rows(kOp, *x);
  check_offsets(cu_q);
  check_offsets(cu_k);
  FA_CHECK(k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == k.size(1), kOp, "k and v must fit q",
           k.size(2));
  FA_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, kOp, "the heads of k must divide the heads of q", k.size(1));
  FA_CHECK(cu_q.size(0) == cu_k.size(0), kOp, "cu_seqlens_q and cu_seqlens_k must have one length", cu_k.size(0));
  FA_CHECK(scale > 0, kOp, "scale must be > 0", scale);
  const auto type = q.scalar_type();
  FA_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, kOp, "q must be float16 or bfloat16",
           static_cast<int>(type));
}

std::tuple<Tensor, Tensor> varlen_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                                const Tensor& cu_k, const std::optional<Tensor>& tiles, int64_t,
                                                int64_t max_k, double scale, int64_t window_left, int64_t window_right,
                                                bool top_left, double softcap, const std::optional<Tensor>& slopes,
                                                const std::optional<Tensor>& bias, const std::optional<Tensor>& table,
                                                const std::optional<Tensor>&, double dropout_p,
                                                const std::optional<Tensor>&) {
  const CudaLaunch launch(q);
  FA_CHECK(softcap == 0 && dropout_p == 0 && !slopes && !bias && !table, kOp,
           "has no softcap, alibi_slopes, bias or dropout", "one of them");
  check_call(q, k, v, cu_q, cu_k, scale);
  const int64_t total_q = q.size(0), total_k = k.size(0), heads = q.size(1), heads_kv = k.size(1);
  const bool half = q.scalar_type() == ScalarType::Half;
  const Tensor out = torch::stable::new_empty(q, {total_q, heads, v.size(2)});
  const Tensor lse = torch::stable::new_empty(q, {heads, total_q}, ScalarType::Float);
  if (total_q == 0 || heads == 0) return {out, lse};
  if (tiles) {
    FA_CHECK(tiles->scalar_type() == ScalarType::Int && tiles->dim() == 2 && tiles->size(1) == 4 &&
                 tiles->is_contiguous() && reinterpret_cast<uintptr_t>(tiles->const_data_ptr()) % sizeof(Tile) == 0,
             kOp, "tiles must be a plan's (N, 4) int32 list", tiles->dim());
  }
  VarlenForwardArgs args;
  args.q = tile_map(kOp, q);
  args.k = tile_map(kOp, k);
  args.v = tile_map(kOp, v);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  args.cu_seqlens_q = cu_q.const_data_ptr<int32_t>();
  args.cu_seqlens_k = cu_k.const_data_ptr<int32_t>();
  args.tiles = tiles ? static_cast<const Tile*>(tiles->const_data_ptr()) : nullptr;
  args.batch = static_cast<int>(cu_q.size(0) - 1);
  args.total_q = static_cast<int>(total_q);
  args.total_k = static_cast<int>(total_k);
  args.heads = static_cast<int>(heads);
  args.group = static_cast<int>(heads / heads_kv);
  args.width_v = static_cast<int>(v.size(2));
  args.window_left = static_cast<int>(std::min<int64_t>(window_left, 1 << 30));
  args.window_right = static_cast<int>(std::min<int64_t>(window_right, 1 << 30));
  args.top_left = top_left;
  args.self_attention = args.cu_seqlens_q == args.cu_seqlens_k && total_q == total_k;
  args.scale_log2 = static_cast<float>(scale * 1.4426950408889634);

  const int64_t slots = tiles ? tiles->size(0) : total_q / kTile + cu_q.size(0);
  const auto launch_with = [&](auto kernel, int warpgroups) {
    const int64_t blocks = slots * heads * (kTile / (warpgroups * kRowTile));
    FA_CHECK(blocks < (int64_t{1} << 31), kOp, "tiles * heads must be below 2^30", slots * heads);
    check_launch(kOp,
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(warpgroups)));
    kernel<<<static_cast<unsigned>(blocks), warpgroups * kWarpgroup, shared_bytes(warpgroups), launch.stream()>>>(args);
    check_launch(kOp, cudaGetLastError());
  };
  if (slots == 0) return {out, lse};
  // Two warpgroups halve the reads of K and V from L2; one leaves none idle where most tiles are partial.
  const bool pair = max_k > kPairFrom;
  if (half) {
    pair ? launch_with(varlen_attention_fwd_kernel<__half, 2>, 2)
         : launch_with(varlen_attention_fwd_kernel<__half, 1>, 1);
  } else {
    pair ? launch_with(varlen_attention_fwd_kernel<__nv_bfloat16, 2>, 2)
         : launch_with(varlen_attention_fwd_kernel<__nv_bfloat16, 1>, 1);
  }
  return {out, lse};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&flowattn::varlen_attention_fwd));
}
