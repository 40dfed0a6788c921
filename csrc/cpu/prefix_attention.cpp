// prefix_attention on the CPU: checks, output allocation, states of empty sequences.
#include "cpu/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "prefix_attention";

using MaybeTensor = std::optional<Tensor>;

struct Call {
  PrefixAttention op{};
  int64_t batch, tokens, heads;
  ScalarType compute;

  Call(const Tensor& scores, const Tensor& values, const MaybeTensor& mask) {
    FA_CHECK(values.dim() == 4, kOp, "values must have shape (B, T, H, D)", shape_text(values.sizes()));
    batch = values.size(0), tokens = values.size(1), heads = values.size(2), op.width = values.size(3);
    op.storage = storage_of(kOp, "values", values), compute = compute_dtype(values);
    op.scores_storage = storage_of(kOp, "scores", scores);
    check_scan_tensor(kOp, "values", values, values.scalar_type(), {batch, tokens, heads, op.width}, true);
    const ScalarType dtype = op.scores_storage == op.storage ? values.scalar_type() : compute;
    check_scan_tensor(kOp, "scores", scores, dtype, {batch, tokens, heads}, false);
    if (mask) check_scan_tensor(kOp, "mask", *mask, ScalarType::Bool, {batch, tokens, heads}, false);
    op.scores = scan_tensor(scores), op.values = scan_tensor(values), op.mask = scan_tensor(mask);
  }

  void check_row(const char* name, const Tensor& x, const Tensor& values) const {
    check_scan_tensor(kOp, name, x, values.scalar_type(), {batch, tokens, heads, op.width}, true);
  }
  void check_scalars(const char* name, const Tensor& x) const {
    check_scan_tensor(kOp, name, x, compute, {batch, tokens, heads}, false);
  }
  // A state tensor of `states` rows, or of none where it is absent.
  ScanState state(const char* name, const MaybeTensor& x, int64_t states, bool row) const {
    if (!x) return {};
    if (row) {
      check_scan_tensor(kOp, name, *x, compute, {states, heads, op.width}, true);
    } else {
      check_scan_tensor(kOp, name, *x, compute, {states, heads}, false);
    }
    return scan_state(*x);
  }
};

template <typename T>
void copy_state(const ScanState& to, const ScanState& from, int64_t state, int64_t heads, int64_t width, T absent) {
  for (int64_t h = 0; h < heads; ++h) {
    T* out = static_cast<T*>(to.data) + state * to.row + h * to.head;
    const T* in = static_cast<const T*>(from.data) + state * from.row + h * from.head;
    for (int64_t j = 0; j < width; ++j) out[j] = from.data ? in[j] : absent;
  }
}

void copy_state(ScalarType dtype, const ScanState& to, const ScanState& from, int64_t state, int64_t heads,
                int64_t width, double absent = 0) {
  dtype == ScalarType::Double ? copy_state<double>(to, from, state, heads, width, absent)
                              : copy_state<float>(to, from, state, heads, width, float(absent));
}

template <typename T>
void fill_rows(const Tensor& x, int64_t first, T value) {
  const int64_t row = x.size(2);
  T* data = static_cast<T*>(x.data_ptr());
  std::fill(data + first * row, data + x.size(1) * row, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_fwd_cpu(
    Tensor scores, Tensor values, MaybeTensor mask, MaybeTensor reset, MaybeTensor cu_seqlens, MaybeTensor m0,
    MaybeTensor u0, MaybeTensor w0, bool reverse, bool keep_sums, bool keep_lse) {
  Call call(scores, values, mask);
  const int64_t batch = call.batch, tokens = call.tokens, heads = call.heads, width = call.op.width;
  const ScanSegments segments(kOp, batch, tokens, cu_seqlens, reset, reverse, bool(m0));
  const int64_t states = segments.states;
  PrefixAttention& op = call.op;
  op.m0 = call.state("m0", m0, states, false), op.u0 = call.state("u0", u0, states, false);
  op.w0 = call.state("w0", w0, states, true);
  const bool whole = bool(m0) == bool(u0) && bool(m0) == bool(w0);
  FA_CHECK(whole, kOp, "m0, u0 and w0 must be given together", "some of them");

  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const Tensor out = torch::stable::new_empty(values, {batch, tokens, heads, width});
  const int64_t kept = keep_sums ? tokens : 0;
  const Tensor m = torch::stable::new_empty(values, {batch, kept, heads}, call.compute);
  const Tensor u = torch::stable::new_empty(values, {batch, kept, heads}, call.compute);
  const Tensor lse = torch::stable::new_empty(values, {batch, keep_lse ? tokens : 0, heads}, call.compute);
  const Tensor m_final = torch::stable::new_empty(values, {states, heads}, call.compute);
  const Tensor u_final = torch::stable::new_empty(values, {states, heads}, call.compute);
  const Tensor w_final = torch::stable::new_empty(values, {states, heads, width}, call.compute);
  op.out = scan_tensor(out);
  if (keep_sums) op.m = scan_tensor(m), op.u = scan_tensor(u);
  if (keep_lse) op.lse = scan_tensor(lse);
  op.m_final = scan_state(m_final), op.u_final = scan_state(u_final), op.w_final = scan_state(w_final);
  for (int64_t state : segments.empty) {
    copy_state(call.compute, op.m_final, op.m0, state, heads, 1, kNone);
    copy_state(call.compute, op.u_final, op.u0, state, heads, 1);
    copy_state(call.compute, op.w_final, op.w0, state, heads, width);
  }
  clear_rows(out, segments.used);
  for (const Tensor* x : {&m, &lse}) {
    if (x->numel() == 0 || segments.used == tokens) continue;
    call.compute == ScalarType::Double ? fill_rows<double>(*x, segments.used, kNone)
                                       : fill_rows<float>(*x, segments.used, float(kNone));
  }
  clear_rows(u, segments.used);

  run_scan(
      segments, heads, double(segments.total()) * heads * (width + 24), FA_ISA_CALL(prefix_attention_state_bytes, op),
      [&](int64_t n) { return FA_ISA_CALL(prefix_attention_scratch_bytes, op, n); },
      [&](ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local, std::byte* scratch) {
        FA_ISA_CALL(prefix_attention_fwd, op, phase, task, carry, local, scratch);
      });
  return {out, m, u, lse, m_final, u_final, w_final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_attention_bwd_cpu(Tensor dout, MaybeTensor dlse, MaybeTensor du_final,
                                                                    MaybeTensor dw_final, Tensor scores, Tensor values,
                                                                    MaybeTensor mask, MaybeTensor reset,
                                                                    MaybeTensor cu_seqlens, MaybeTensor m0, Tensor out,
                                                                    Tensor m, Tensor u, Tensor u_final, bool reverse) {
  Call call(scores, values, mask);
  const int64_t batch = call.batch, tokens = call.tokens, heads = call.heads, width = call.op.width;
  const ScanSegments segments(kOp, batch, tokens, cu_seqlens, reset, reverse, bool(m0));
  const int64_t states = segments.states;
  PrefixAttention& op = call.op;
  call.check_row("dout", dout, values), call.check_row("out", out, values);
  call.check_scalars("m", m), call.check_scalars("u", u);
  if (dlse) call.check_scalars("dlse", *dlse);
  op.dout = scan_tensor(dout), op.out = scan_tensor(out), op.dlse = scan_tensor(dlse);
  op.m = scan_tensor(m), op.u = scan_tensor(u);
  op.m0 = call.state("m0", m0, states, false), op.u_final = call.state("u_final", u_final, states, false);
  op.du_final = call.state("du_final", du_final, states, false);
  op.dw_final = call.state("dw_final", dw_final, states, true);

  const int64_t given = m0 ? states : 0;
  const Tensor dscores = torch::stable::new_empty(scores, {batch, tokens, heads});
  const Tensor dvalues = torch::stable::new_empty(values, {batch, tokens, heads, width});
  const Tensor du0 = torch::stable::new_zeros(values, {given, heads}, call.compute);
  const Tensor dw0 = torch::stable::new_zeros(values, {given, heads, width}, call.compute);
  op.dscores = scan_tensor(dscores), op.dvalues = scan_tensor(dvalues);
  op.du0 = scan_state(du0), op.dw0 = scan_state(dw0);
  for (int64_t state : segments.empty) {
    if (!m0) break;
    copy_state(call.compute, op.du0, op.du_final, state, heads, 1);
    copy_state(call.compute, op.dw0, op.dw_final, state, heads, width);
  }
  clear_rows(dscores, segments.used);
  clear_rows(dvalues, segments.used);

  run_scan(
      segments, heads, double(segments.total()) * heads * (2 * width + 24),
      FA_ISA_CALL(prefix_attention_state_bytes, op),
      [&](int64_t n) { return FA_ISA_CALL(prefix_attention_scratch_bytes, op, n); },
      [&](ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local, std::byte* scratch) {
        FA_ISA_CALL(prefix_attention_bwd, op, phase, task, carry, local, scratch);
      });
  return {dscores, dvalues, du0, dw0};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&flowattn::prefix_attention_fwd_cpu));
  m.impl("prefix_attention_bwd", TORCH_BOX(&flowattn::prefix_attention_bwd_cpu));
}
