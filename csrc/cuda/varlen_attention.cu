// Padding-free attention forward on CUDA: checks, grid, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/cuda_stream.h"
#include "cuda/varlen_attention.cuh"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "varlen_attention_fwd";
constexpr int64_t kPairFrom = 256;  // longest key sequence from which a block has two warpgroups

// Bulk copies need rows at multiples of 16 bytes; the public op asks the same before it picks this kernel.
void check_rows(const Tensor& x) {
  FA_CHECK(x.dim() == 3 && x.size(2) <= kWidth && x.size(2) % 8 == 0, kOp,
           "q, k, v must be (T, heads, width) with a width of 8, 16 .. 64", x.size(2));
  FA_CHECK(x.stride(2) == 1, kOp, "the last dim must be contiguous", x.stride(2));
  for (int dim = 0; dim < 2; ++dim) {
    FA_CHECK(x.size(dim) <= 1 || (x.stride(dim) > 0 && x.stride(dim) % 8 == 0), kOp,
             "rows and heads must lie at multiples of 16 bytes", x.stride(dim));
  }
  FA_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kChunkBytes == 0, kOp,
           "q, k, v must start at multiples of 16 bytes", x.stride(0));
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_launch(kOp,
                 cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return encode;
}

// x (T, heads, width) in boxes of 64 rows of one head, as tiles of hopper.cuh. Empty x gives a map that is never used.
CUtensorMap tile_map(const Tensor& x, bool half) {
  CUtensorMap map = {};
  if (x.numel() == 0) return map;
  const auto extent = [&](int dim) { return static_cast<cuuint64_t>(x.size(dim)); };
  const auto bytes = [&](int dim) { return static_cast<cuuint64_t>(x.size(dim) > 1 ? 2 * x.stride(dim) : 128); };
  const cuuint64_t sizes[] = {extent(2), extent(1), extent(0)}, strides[] = {bytes(1), bytes(0)};
  const cuuint32_t box[] = {kWidth, 1, kRowTile}, steps[] = {1, 1, 1};
  const CUresult status =
      encode_tiled()(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                     const_cast<void*>(x.const_data_ptr()), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FA_CHECK(status == CUDA_SUCCESS, kOp, "the driver must encode the tensor map", static_cast<int>(status));
  return map;
}

void check_offsets(const Tensor& cu) {
  FA_CHECK(cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous(), kOp,
           "cu_seqlens must be contiguous int32 of shape (B+1,)", cu.dim());
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
  for (const Tensor* x : {&q, &k, &v}) check_rows(*x);
  check_offsets(cu_q);
  check_offsets(cu_k);
  const int64_t total_q = q.size(0), total_k = k.size(0), heads = q.size(1), heads_kv = k.size(1);
  FA_CHECK(k.size(2) == q.size(2) && v.size(0) == total_k && v.size(1) == heads_kv, kOp, "k and v must fit q",
           k.size(2));
  FA_CHECK(heads_kv > 0 && heads % heads_kv == 0, kOp, "the heads of k must divide the heads of q", heads_kv);
  FA_CHECK(cu_q.size(0) == cu_k.size(0), kOp, "cu_seqlens_q and cu_seqlens_k must have one length", cu_k.size(0));
  FA_CHECK(scale > 0, kOp, "scale must be > 0", scale);
  const bool half = q.scalar_type() == ScalarType::Half;
  FA_CHECK(half || q.scalar_type() == ScalarType::BFloat16, kOp, "q must be float16 or bfloat16",
           static_cast<int>(q.scalar_type()));
  const Tensor out = torch::stable::new_empty(q, {total_q, heads, v.size(2)});
  const Tensor lse = torch::stable::new_empty(q, {heads, total_q}, ScalarType::Float);
  if (total_q == 0 || heads == 0) return {out, lse};
  if (tiles) {
    FA_CHECK(tiles->scalar_type() == ScalarType::Int && tiles->dim() == 2 && tiles->size(1) == 4 &&
                 tiles->is_contiguous() && reinterpret_cast<uintptr_t>(tiles->const_data_ptr()) % sizeof(Tile) == 0,
             kOp, "tiles must be a plan's (N, 4) int32 list", tiles->dim());
  }
  VarlenForwardArgs args;
  args.q = tile_map(q, half);
  args.k = tile_map(k, half);
  args.v = tile_map(v, half);
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
