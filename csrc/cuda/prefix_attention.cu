// prefix_attention on CUDA: checks, output allocation, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/prefix_attention_bwd.cuh"
#include "cuda/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "prefix_attention";

struct Call {
  PrefixAttentionArgs args{};
  int64_t batch, tokens, heads, width;
  RowAlignment alignment;
  const Tensor& values;

  Call(const Tensor& scores, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& reset,
       const MaybeTensor& cu_seqlens, bool reverse, bool initial)
      : values(values) {
    FA_CHECK(values.dim() == 4 && values.size(3) > 0, kOp, "values must have shape (B, T, H, D) with D > 0",
             shape_text(values.sizes()));
    batch = values.size(0), tokens = values.size(1), heads = values.size(2), width = values.size(3);
    args.values = row("values", values);
    args.float_scores = scores.scalar_type() == ScalarType::Float;
    args.scores = scalars("scores", scores, args.float_scores ? ScalarType::Float : values.scalar_type());
    if (mask) args.mask = scalars("mask", *mask, ScalarType::Bool);
    args.sequences = scan_sequences(kOp, values, cu_seqlens, reset, reverse, initial);
  }

  ScanTensor row(const char* name, const Tensor& x) {
    check_on_gpu(kOp, name, x, values.scalar_type(), {batch, tokens, heads, width});
    alignment.add(x);
    return scan_tensor(x);
  }
  ScanTensor scalars(const char* name, const Tensor& x, ScalarType dtype = ScalarType::Float) const {
    check_on_gpu(kOp, name, x, dtype, {batch, tokens, heads}, false);
    return scan_tensor(x);
  }
  ScanState state(const char* name, const MaybeTensor& x) const {
    if (!x) return {};
    check_on_gpu(kOp, name, *x, ScalarType::Float, {args.sequences.states, heads}, false);
    return scan_state(*x);
  }
  ScanState state_row(const char* name, const MaybeTensor& x) {
    if (!x) return {};
    check_on_gpu(kOp, name, *x, ScalarType::Float, {args.sequences.states, heads, width});
    alignment.add(x);
    return scan_state(*x);
  }

  template <class Run>
  void with_kernel(const Run& run) const {
    with_element(kOp, values,
                 [&](auto s) { with_vectors<decltype(s)>(alignment.vectors(), [&](auto v) { run(s, v); }); });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_fwd_cuda(
    Tensor scores, Tensor values, MaybeTensor mask, MaybeTensor reset, MaybeTensor cu_seqlens, MaybeTensor m0,
    MaybeTensor u0, MaybeTensor w0, bool reverse, bool keep_sums, bool keep_lse) {
  const CudaLaunch launch(values);
  const bool whole = bool(m0) == bool(u0) && bool(m0) == bool(w0);
  FA_CHECK(whole, kOp, "m0, u0 and w0 must be given together", "some of them");
  Call call(scores, values, mask, reset, cu_seqlens, reverse, bool(m0));
  PrefixAttentionArgs& args = call.args;
  const int64_t states = args.sequences.states, kept = keep_sums ? call.tokens : 0;
  const Tensor out = torch::stable::new_empty(values, {call.batch, call.tokens, call.heads, call.width});
  const Tensor m = empty_floats(values, {call.batch, kept, call.heads});
  const Tensor u = empty_floats(values, {call.batch, kept, call.heads});
  const Tensor lse = empty_floats(values, {call.batch, keep_lse ? call.tokens : 0, call.heads});
  const Tensor m_final = empty_floats(values, {states, call.heads}),
               u_final = empty_floats(values, {states, call.heads});
  const Tensor w_final = empty_floats(values, {states, call.heads, call.width});
  const std::tuple results(out, m, u, lse, m_final, u_final, w_final);
  if (out.numel() == 0) {
    pass_state(m_final, m0, kNothing), pass_state(u_final, u0), pass_state(w_final, w0);
    return results;
  }
  args.m0 = call.state("m0", m0), args.u0 = call.state("u0", u0), args.w0 = call.state_row("w0", w0);
  args.out = call.row("out", out), args.w_final = call.state_row("w_final", w_final);
  if (keep_sums) args.m = scan_tensor(m), args.u = scan_tensor(u);
  if (keep_lse) args.lse = scan_tensor(lse);
  args.m_final = scan_state(m_final), args.u_final = scan_state(u_final);
  call.with_kernel([&](auto s, auto v) {
    args.shape = scan_shape(kOp, values, v, kPrefixFwdTokens, reverse);
    const auto kernel = prefix_attention_fwd_kernel<decltype(s), v>;
    const LookBackMemory memory(kOp, values, args.shape, 1, 2, 2, reinterpret_cast<const void*>(kernel),
                                launch.stream());
    args.look_back = memory.view;
    launch_scan(kOp, kernel, args, launch.stream());
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_attention_bwd_cuda(Tensor dout, MaybeTensor dlse,
                                                                     MaybeTensor du_final, MaybeTensor dw_final,
                                                                     Tensor scores, Tensor values, MaybeTensor mask,
                                                                     MaybeTensor reset, MaybeTensor cu_seqlens,
                                                                     MaybeTensor m0, Tensor out, Tensor m, Tensor u,
                                                                     Tensor u_final, bool reverse) {
  const CudaLaunch launch(values);
  Call call(scores, values, mask, reset, cu_seqlens, reverse, bool(m0));
  PrefixAttentionArgs& args = call.args;
  const int64_t states = args.sequences.states, given = m0 ? states : 0;
  const Tensor dscores = torch::stable::new_empty(scores, {call.batch, call.tokens, call.heads});
  const Tensor dvalues = torch::stable::new_empty(values, {call.batch, call.tokens, call.heads, call.width});
  // Zeros: a sequence that starts with a reset passes nothing to its initial state.
  const Tensor du0 = torch::stable::new_zeros(values, {given, call.heads}, ScalarType::Float);
  const Tensor dw0 = torch::stable::new_zeros(values, {given, call.heads, call.width}, ScalarType::Float);
  const std::tuple results(dscores, dvalues, du0, dw0);
  if (values.numel() == 0) {
    if (m0) pass_state(du0, du_final), pass_state(dw0, dw_final);
    return results;
  }
  args.dout = call.row("dout", dout), args.out = call.row("out", out);
  args.m = call.scalars("m", m), args.u = call.scalars("u", u);
  if (dlse) args.dlse = call.scalars("dlse", *dlse);
  args.m0 = call.state("m0", m0), args.u_final = call.state("u_final", u_final);
  args.du_final = call.state("du_final", du_final), args.dw_final = call.state_row("dw_final", dw_final);
  args.dvalues = call.row("dvalues", dvalues);
  if (m0) args.dw0 = call.state_row("dw0", dw0);
  call.with_kernel([&](auto s, auto v) {
    args.shape = scan_shape(kOp, values, v, kPrefixBwdTokens, !reverse);
    const auto kernel = prefix_attention_bwd_kernel<decltype(s), v>;
    const LookBackMemory memory(kOp, values, args.shape, 1, 2, 1, reinterpret_cast<const void*>(kernel),
                                launch.stream());
    args.look_back = memory.view;
    // With several column blocks a second kernel adds up what each of them has of the scalars.
    const int64_t parts = args.shape.column_blocks > 1 ? args.shape.column_blocks : 0;
    const Tensor dscore_parts = empty_floats(values, {parts, dscores.numel()});
    const Tensor du_parts = torch::stable::new_zeros(values, {parts, du0.numel()}, ScalarType::Float);
    args.dscores = parts ? dscore_parts.data_ptr() : dscores.data_ptr();
    args.float_dscores = parts || args.float_scores;
    args.du0 = static_cast<float*>(parts ? du_parts.data_ptr() : du0.data_ptr());
    launch_scan(kOp, kernel, args, launch.stream());
    if (!parts) return;
    sum_parts(kOp, dscore_parts.const_data_ptr<float>(), 1, parts, dscores, launch.stream());
    sum_parts(kOp, du_parts.const_data_ptr<float>(), 1, parts, du0, launch.stream());
  });
  return results;
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&flowattn::prefix_attention_fwd_cuda));
  m.impl("prefix_attention_bwd", TORCH_BOX(&flowattn::prefix_attention_bwd_cuda));
}
