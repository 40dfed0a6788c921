// linear_scan on the CPU: checks, output allocation, states of empty sequences, gradients of constant gates.
#include "cpu/linear_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "linear_scan";
constexpr int64_t kHeadWidth = 64;  // features of a diagonal scan that one item walks: 256 bytes of float

using MaybeTensor = std::optional<Tensor>;

struct Call {
  LinearScan op{};
  int64_t batch, tokens, heads, width;
  bool constant;  // gates (1, 1, H, D or 1)
  ScalarType compute;
  int64_t split = 1;  // heads of the kernel in one head of the tensors

  Call(const Tensor& gates, const Tensor& x, bool log_gate) {
    FA_CHECK(x.dim() == 4 && gates.dim() == 4, kOp, "gates and tokens must have shape (B, T, H, D)",
             shape_text(gates.sizes()) + " and " + shape_text(x.sizes()));
    batch = x.size(0), tokens = x.size(1), heads = x.size(2), width = x.size(3);
    op.storage = storage_of(kOp, "tokens", x), compute = compute_dtype(x);
    op.gates_storage = storage_of(kOp, "gates", gates), op.log_gate = log_gate;
    constant = gates.size(0) == 1 && gates.size(1) == 1 && batch * tokens != 1;
    op.gate_width = gates.size(3) == 1 ? 1 : width;
    check_scan_tensor(kOp, "tokens", x, x.scalar_type(), {batch, tokens, heads, width}, true);
    const ScalarType dtype = op.gates_storage == op.storage ? x.scalar_type() : compute;
    check_scan_tensor(kOp, "gates", gates, dtype, {constant ? 1 : batch, constant ? 1 : tokens, heads, op.gate_width},
                      true);
    op.gates = scan_tensor(gates), op.tokens = scan_tensor(x);
    if (constant) op.gates.row = op.gates.time = 0;
    // One wide head is as good as several narrower ones, which threads can share.
    if (heads == 1 && op.gate_width == width && width % kHeadWidth == 0)
      split = std::max<int64_t>(width / kHeadWidth, 1);
    op.width = width / split, op.gate_width = op.gate_width == 1 ? 1 : op.width;
    op.gates = split_heads(op.gates), op.tokens = split_heads(op.tokens);
  }

  ScanTensor split_heads(ScanTensor x) const {
    if (split > 1) x.head = kHeadWidth;
    return x;
  }
  ScanState split_heads(ScanState x) const {
    if (split > 1) x.head = kHeadWidth;
    return x;
  }
  ScanTensor rows(const char* name, const Tensor& x, ScalarType dtype) const {
    check_scan_tensor(kOp, name, x, dtype, {batch, tokens, heads, width}, true);
    return split_heads(scan_tensor(x));
  }
  ScanState state(const char* name, const MaybeTensor& x, int64_t states) const {
    if (!x) return {};
    check_scan_tensor(kOp, name, *x, compute, {states, heads, width}, true);
    return split_heads(scan_state(*x));
  }

  void run(bool backward, const ScanSegments& segments) const {
    run_scan(
        segments, heads * split, double(segments.total()) * heads * width * (backward ? 3 : 2),
        FA_ISA_CALL(linear_scan_state_bytes, op),
        [&](int64_t n) { return FA_ISA_CALL(linear_scan_scratch_bytes, op, n); },
        [&](ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local, std::byte* scratch) {
          if (backward) {
            FA_ISA_CALL(linear_scan_bwd, op, phase, task, carry, local, scratch);
          } else {
            FA_ISA_CALL(linear_scan_fwd, op, phase, task, carry, local, scratch);
          }
        });
  }
};

std::tuple<Tensor, Tensor> linear_scan_fwd_cpu(Tensor gates, Tensor tokens, MaybeTensor initial, MaybeTensor cu_seqlens,
                                               MaybeTensor reset, bool log_gate, bool reverse) {
  Call call(gates, tokens, log_gate);
  const ScanSegments segments(kOp, call.batch, call.tokens, cu_seqlens, reset, reverse, bool(initial));
  const Tensor out = torch::stable::new_empty(tokens, {call.batch, call.tokens, call.heads, call.width});
  const Tensor final = torch::stable::new_empty(tokens, {segments.states, call.heads, call.width}, call.compute);
  call.op.initial = call.state("initial", initial, segments.states);
  call.op.out = call.split_heads(scan_tensor(out)), call.op.final = call.split_heads(scan_state(final));
  pass_states(final, initial, segments.empty);
  clear_rows(out, segments.used);
  call.run(false, segments);
  return {out, final};
}

// The sum over chunks of (chunks, n) parts, in a fixed order.
template <typename T>
void sum_parts(const Tensor& parts, const Tensor& total) {
  const T* in = static_cast<const T*>(parts.data_ptr());
  T* out = static_cast<T*>(total.data_ptr());
  const int64_t n = total.numel();
  std::vector<double> sums(n, 0.0);
  for (int64_t part = 0; part < parts.size(0); ++part) {
    for (int64_t j = 0; j < n; ++j) sums[j] += in[part * n + j];
  }
  std::copy(sums.begin(), sums.end(), out);
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd_cpu(Tensor dout, MaybeTensor dfinal, Tensor gates, Tensor out,
                                                       MaybeTensor initial, MaybeTensor cu_seqlens, MaybeTensor reset,
                                                       bool log_gate, bool reverse) {
  Call call(gates, out, log_gate);
  const ScanSegments segments(kOp, call.batch, call.tokens, cu_seqlens, reset, reverse, bool(initial));
  LinearScan& op = call.op;
  op.out = call.rows("out", out, out.scalar_type()), op.dout = call.rows("dout", dout, out.scalar_type());
  op.initial = call.state("initial", initial, segments.states);
  op.dfinal = call.state("dfinal", dfinal, segments.states);

  const Tensor dgates = torch::stable::new_empty(gates, {gates.size(0), gates.size(1), gates.size(2), gates.size(3)});
  const Tensor dtokens = torch::stable::new_empty(out, {call.batch, call.tokens, call.heads, call.width});
  const Tensor dinitial =
      torch::stable::new_zeros(out, {initial ? segments.states : 0, call.heads, call.width}, call.compute);
  op.dgates = call.split_heads(scan_tensor(dgates)), op.dtokens = call.split_heads(scan_tensor(dtokens));
  op.dinitial = call.split_heads(scan_state(dinitial));
  if (initial) pass_states(dinitial, dfinal, segments.empty);
  clear_rows(dtokens, segments.used);
  if (!call.constant) {
    clear_rows(dgates, segments.used);
    call.run(true, segments);
    return {dgates, dtokens, dinitial};
  }
  const Tensor parts = torch::stable::new_empty(out, {segments.chunks, gates.size(2), gates.size(3)}, call.compute);
  const Tensor total =
      torch::stable::new_empty(out, {gates.size(0), gates.size(1), gates.size(2), gates.size(3)}, call.compute);
  op.dgate_parts = call.split_heads(scan_state(parts));
  call.run(true, segments);
  call.compute == ScalarType::Double ? sum_parts<double>(parts, total) : sum_parts<float>(parts, total);
  Tensor result = dgates;
  torch::stable::copy_(result, total);
  return {result, dtokens, dinitial};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("linear_scan_fwd", TORCH_BOX(&flowattn::linear_scan_fwd_cpu));
  m.impl("linear_scan_bwd", TORCH_BOX(&flowattn::linear_scan_bwd_cpu));
}
