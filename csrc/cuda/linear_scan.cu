// linear_scan on CUDA: checks, output allocation, choice of a kernel, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda/linear_scan.cuh"
#include "cuda/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "linear_scan";

struct Call {
  LinearScanArgs args{};
  int64_t batch, tokens, heads, width, gate_width;
  bool full;
  RowAlignment alignment;
  const Tensor& gates;
  const Tensor& x;

  Call(const Tensor& gates, const Tensor& x, const MaybeTensor& initial, const MaybeTensor& cu_seqlens,
       const MaybeTensor& reset, bool log_gate, bool reverse)
      : gates(gates), x(x) {
    FA_CHECK(x.dim() == 4 && gates.dim() == 4, kOp, "gates and tokens must have shape (B, T, H, D)",
             shape_text(gates.sizes()) + " and " + shape_text(x.sizes()));
    batch = x.size(0), tokens = x.size(1), heads = x.size(2), width = x.size(3), gate_width = gates.size(3);
    full = gate_width != 1;
    args.log_gate = log_gate, args.float_gates = gates.scalar_type() == ScalarType::Float;
    args.constant_gates = gates.size(0) == 1 && gates.size(1) == 1 && batch * tokens != 1;
    args.sequences = scan_sequences(kOp, x, cu_seqlens, reset, reverse, bool(initial));
    row("tokens", x);
    const ScalarType dtype = args.float_gates ? ScalarType::Float : x.scalar_type();
    const bool constant = args.constant_gates;
    check_on_gpu(kOp, "gates", gates, dtype, {constant ? 1 : batch, constant ? 1 : tokens, heads, full ? width : 1});
    args.gates = scan_tensor(gates);
    if (constant) args.gates.row = args.gates.time = 0;
    if (full) alignment.add(gates);
    args.initial = state("initial", initial);
  }

  ScanTensor row(const char* name, const Tensor& tensor) {
    check_on_gpu(kOp, name, tensor, x.scalar_type(), {batch, tokens, heads, width});
    alignment.add(tensor);
    return scan_tensor(tensor);
  }
  ScanState state(const char* name, const MaybeTensor& tensor) {
    if (!tensor) return {};
    check_on_gpu(kOp, name, *tensor, ScalarType::Float, {args.sequences.states, heads, width});
    alignment.add(tensor);
    return scan_state(*tensor);
  }

  // Calls run(S{}, G{}, V, Full) with the types of tokens and full gates.
  template <class Run>
  void with_kernel(const Run& run) const {
    with_element(kOp, x, [&](auto s) {
      using S = decltype(s);
      with_vectors<S>(alignment.vectors(), [&](auto v) {
        if (!full) return run(s, s, v, std::false_type{});
        if (!args.float_gates) return run(s, s, v, std::true_type{});
        run(s, float{}, v, std::true_type{});
      });
    });
  }

  LookBackMemory look_back(const void* kernel, cudaStream_t stream) const {
    return {kOp, x, args.shape, full ? 2 : 1, full ? 0 : 1, 0, kernel, stream};
  }
};

std::tuple<Tensor, Tensor> linear_scan_fwd_cuda(Tensor gates, Tensor tokens, MaybeTensor initial,
                                                MaybeTensor cu_seqlens, MaybeTensor reset, bool log_gate,
                                                bool reverse) {
  const CudaLaunch launch(tokens);
  Call call(gates, tokens, initial, cu_seqlens, reset, log_gate, reverse);
  const Tensor out = torch::stable::new_empty(tokens, {call.batch, call.tokens, call.heads, call.width});
  const Tensor final = empty_floats(tokens, {call.args.sequences.states, call.heads, call.width});
  if (out.numel() == 0) {
    pass_state(final, initial);
    return {out, final};
  }
  LinearScanArgs& args = call.args;
  args.tokens = scan_tensor(tokens), args.out = call.row("out", out), args.final = call.state("final", final);
  call.with_kernel([&](auto s, auto g, auto v, auto full) {
    using S = decltype(s);
    using G = decltype(g);
    args.shape = scan_shape(kOp, tokens, v, kLinearFwdTokens<S, G, full>, reverse);
    const auto kernel = linear_scan_fwd_kernel<S, G, v, full>;
    const LookBackMemory memory = call.look_back(reinterpret_cast<const void*>(kernel), launch.stream());
    args.look_back = memory.view;
    launch_scan(kOp, kernel, args, launch.stream());
  });
  return {out, final};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd_cuda(Tensor dout, MaybeTensor dfinal, Tensor gates, Tensor out,
                                                        MaybeTensor initial, MaybeTensor cu_seqlens, MaybeTensor reset,
                                                        bool log_gate, bool reverse) {
  const CudaLaunch launch(out);
  Call call(gates, out, initial, cu_seqlens, reset, log_gate, reverse);
  LinearScanArgs& args = call.args;
  const int64_t states = args.sequences.states;
  Tensor dgates = torch::stable::new_empty(gates, {gates.size(0), gates.size(1), gates.size(2), gates.size(3)});
  const Tensor dtokens = torch::stable::new_empty(out, {call.batch, call.tokens, call.heads, call.width});
  // Zeros: a sequence that starts with a reset passes nothing to its initial state.
  const Tensor dinitial =
      torch::stable::new_zeros(out, {initial ? states : 0, call.heads, call.width}, ScalarType::Float);
  if (out.numel() == 0) {
    torch::stable::zero_(dgates);
    if (initial) pass_state(dinitial, dfinal);
    return {dgates, dtokens, dinitial};
  }
  args.out = scan_tensor(out), args.dout = call.row("dout", dout), args.dtokens = call.row("dtokens", dtokens);
  args.dfinal = call.state("dfinal", dfinal);
  args.dgates = scan_tensor(dgates), args.dinitial = scan_state(dinitial);
  call.with_kernel([&](auto s, auto g, auto v, auto full) {
    using S = decltype(s);
    using G = decltype(g);
    args.shape = scan_shape(kOp, out, v, kLinearBwdTokens<full>, !reverse);
    const auto kernel = linear_scan_bwd_kernel<S, G, v, full>;
    const LookBackMemory memory = call.look_back(reinterpret_cast<const void*>(kernel), launch.stream());
    args.look_back = memory.view;
    // What a second kernel sums: tiles where gates are constant, column blocks that share a gate.
    int64_t parts = 0;
    if (args.constant_gates) {
      parts = call.batch * args.shape.tiles * (full ? 1 : args.shape.column_blocks);
    } else if (!full && args.shape.column_blocks > 1) {
      parts = args.shape.column_blocks;
    }
    const Tensor sums = empty_floats(out, {parts, dgates.numel()});
    if (parts) args.dgate_parts = sums.mutable_data_ptr<float>();
    launch_scan(kOp, kernel, args, launch.stream());
    if (parts) sum_parts(kOp, args.dgate_parts, 1, parts, dgates, launch.stream());
  });
  return {dgates, dtokens, dinitial};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("linear_scan_fwd", TORCH_BOX(&flowattn::linear_scan_fwd_cuda));
  m.impl("linear_scan_bwd", TORCH_BOX(&flowattn::linear_scan_bwd_cuda));
}
