// Padding-free attention backward on CUDA: checks, scratch, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/varlen_attention.h"
#include "cuda/varlen_attention_bwd.cuh"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "varlen_attention_bwd";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, const std::optional<Tensor>&, int64_t,
    int64_t, double scale, int64_t window_left, int64_t window_right, bool top_left, bool, double softcap,
    const std::optional<Tensor>& slopes, const std::optional<Tensor>& bias, const std::optional<Tensor>& table,
    const std::optional<Tensor>&, double dropout_p, const std::optional<Tensor>&, bool) {
  const CudaLaunch launch(q);
  FA_CHECK(softcap == 0 && dropout_p == 0 && !slopes && !bias && !table, kOp,
           "has no softcap, alibi_slopes, bias or dropout", "one of them");
  check_call(kOp, q, k, v, cu_q, cu_k, scale);
  check_rows(kOp, dout);
  const int64_t total_q = q.size(0), total_k = k.size(0), heads = q.size(1), heads_kv = k.size(1);
  const int64_t batch = cu_q.size(0) - 1, width_v = v.size(2);
  for (const Tensor* x : {&dout, &out}) {
    FA_CHECK(
        x->scalar_type() == q.scalar_type() && x->size(0) == total_q && x->size(1) == heads && x->size(2) == width_v,
        kOp, "out and dout must be (Tq, H, Dv) in the dtype of q", x->size(0));
  }
  FA_CHECK(out.is_contiguous() && lse.is_contiguous(), kOp, "out and lse must be those of the forward", out.dim());
  for (const Tensor* x : {&lse, dlse ? &*dlse : &lse}) {
    FA_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(0) == heads && x->size(1) == total_q &&
                 (x->stride(1) == 1 || total_q == 1),
             kOp, "lse and dlse must be float32 (H, Tq) with contiguous rows", x->dim());
  }
  const Tensor dq = torch::stable::new_empty(q, {total_q, heads, q.size(2)});
  const Tensor dk = torch::stable::new_empty(k, {total_k, heads_kv, k.size(2)});
  const Tensor dv = torch::stable::new_empty(v, {total_k, heads_kv, width_v});
  const Tensor nothing = torch::stable::new_empty(lse, {0});
  const auto gradients = [&] { return std::tuple(dq, dk, dv, nothing, nothing); };
  if ((total_q == 0 && total_k == 0) || heads == 0) return gradients();
  const Tensor delta = torch::stable::new_empty(lse, {heads, total_q});
  const Tensor partial = torch::stable::new_empty(lse, {total_q / kRowTile + batch + 1, heads, kRowTile * kWidth});

  VarlenBackwardArgs args;
  args.q = tile_map(kOp, q);
  args.k = tile_map(kOp, k);
  args.v = tile_map(kOp, v);
  args.dout = tile_map(kOp, dout);
  args.out = out.const_data_ptr();
  args.lse = lse.const_data_ptr<float>();
  args.dlse = dlse ? dlse->const_data_ptr<float>() : nullptr;
  args.stride_dlse = dlse ? dlse->stride(0) : 0;
  args.dq = dq.mutable_data_ptr();
  args.dk = dk.mutable_data_ptr();
  args.dv = dv.mutable_data_ptr();
  args.delta = delta.mutable_data_ptr<float>();
  args.partial_dq = static_cast<float4*>(partial.data_ptr());
  args.cu_seqlens_q = cu_q.const_data_ptr<int32_t>();
  args.cu_seqlens_k = cu_k.const_data_ptr<int32_t>();
  args.batch = static_cast<int>(batch);
  args.total_q = static_cast<int>(total_q);
  args.total_k = static_cast<int>(total_k);
  args.heads_kv = static_cast<int>(heads_kv);
  args.group = static_cast<int>(heads / heads_kv);
  args.width = static_cast<int>(q.size(2));
  args.width_v = static_cast<int>(width_v);
  args.window_left = static_cast<int>(std::min<int64_t>(window_left, 1 << 30));
  args.window_right = static_cast<int>(std::min<int64_t>(window_right, 1 << 30));
  args.top_left = top_left;
  args.scale = static_cast<float>(scale);

  const int64_t blocks = (batch + 1) * heads_kv;
  FA_CHECK(blocks < (int64_t{1} << 31), kOp, "sequences * heads must be below 2^31", blocks);
  const auto launch_with = [&](auto kernel) {
    check_launch(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BackwardLayout::bytes));
    kernel<<<static_cast<unsigned>(blocks), kBackwardThreads, BackwardLayout::bytes, launch.stream()>>>(args);
    check_launch(kOp, cudaGetLastError());
  };
  if (q.scalar_type() == ScalarType::Half) {
    launch_with(varlen_attention_bwd_kernel<__half>);
  } else {
    launch_with(varlen_attention_bwd_kernel<__nv_bfloat16>);
  }
  return gradients();
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("varlen_attention_bwd", TORCH_BOX(&flowattn::varlen_attention_bwd));
}
