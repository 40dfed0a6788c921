// Flow-Attention on the CPU, whole and causal: checks, output allocation, and the list of tasks the threads share.
#include "cpu/flow_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "flow_attention";

using MaybeTensor = std::optional<Tensor>;

FlowMask flow_mask(const char* name, const MaybeTensor& mask, int64_t batch, int64_t tokens) {
  if (!mask) return {};
  check_scan_tensor(kOp, name, *mask, ScalarType::Bool, {batch, tokens}, false);
  return {static_cast<const bool*>(mask->data_ptr()), mask->stride(0), mask->stride(1)};
}

FlowScalars flow_scalars(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

struct Call {
  FlowAttention op{};
  int64_t batch, sinks, sources, states, used;
  ScalarType compute;
  std::vector<FlowTask> tasks;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& cu_seqlens, bool relu, double clamp,
       double eps, double extra) {
    FA_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kOp, "q, k and v must have shape (B, T, H, width)",
             shape_text(q.sizes()) + ", " + shape_text(k.sizes()) + " and " + shape_text(v.sizes()));
    batch = q.size(0), sinks = q.size(1), sources = k.size(1), compute = compute_dtype(q);
    op.storage = storage_of(kOp, "q", q);
    op.heads = q.size(2), op.width = q.size(3), op.width_v = v.size(3);
    op.relu = relu, op.clamp = clamp, op.eps = eps, op.extra = extra;
    const int64_t heads_kv = k.size(2);
    FA_CHECK(heads_kv > 0 && op.heads % heads_kv == 0, kOp, "the heads of k must divide the heads of q",
             std::to_string(heads_kv) + " and " + std::to_string(op.heads));
    op.group = op.heads / heads_kv;
    check_scan_tensor(kOp, "q", q, q.scalar_type(), {batch, sinks, op.heads, op.width}, true);
    check_scan_tensor(kOp, "k", k, q.scalar_type(), {batch, sources, heads_kv, op.width}, true);
    check_scan_tensor(kOp, "v", v, q.scalar_type(), {batch, sources, heads_kv, op.width_v}, true);
    op.q = scan_tensor(q), op.k = scan_tensor(k), op.v = scan_tensor(v);
    list_tasks(cu_seqlens);
  }

  void list_tasks(const MaybeTensor& cu_seqlens) {
    if (!cu_seqlens) {
      states = batch, used = sinks;
      for (int64_t b = 0; b < batch; ++b) tasks.push_back({b, 0, sinks, sources, b});
    } else {
      FA_CHECK(sinks == sources, kOp, "packed q and k must have one length", sources);
      const ScanSegments segments(kOp, batch, sinks, cu_seqlens, std::nullopt, false, false);
      states = segments.states, used = segments.used;
      for (const ScanSegment& s : segments.list) tasks.push_back({0, s.first, s.length, s.length, s.state});
      for (int64_t state : segments.empty) tasks.push_back({0, 0, 0, 0, state});
    }
    for (const FlowTask& task : tasks) {
      op.most_sinks = std::max(op.most_sinks, task.sinks);
      op.most_sources = std::max(op.most_sources, task.sources);
    }
  }

  Tensor rows(const Tensor& like, int64_t tokens, int64_t width) const {
    return torch::stable::new_empty(like, {batch, tokens, op.heads, width});
  }
  Tensor values(const Tensor& like, std::initializer_list<int64_t> shape) const {
    return torch::stable::new_empty(like, shape, compute);
  }
  // Scalars of all tokens; rows behind the last sequence, which no task visits, are 0.
  Tensor flows(const Tensor& like, int64_t planes, int64_t tokens) const {
    Tensor x = values(like, {planes, batch, op.heads, tokens});
    if (used < sinks) torch::stable::zero_(x);
    return x;
  }
  FlowStates states_of(const MaybeTensor& sums, const MaybeTensor& total, const MaybeTensor& state) const {
    if (sums) check_contiguous("sums", *sums, {states, op.heads, 4, op.width});
    if (total) check_contiguous("total", *total, {states, op.heads});
    if (state) check_contiguous("state", *state, {states, op.heads, op.width, op.width_v});
    return {sums ? sums->data_ptr() : nullptr, total ? total->data_ptr() : nullptr,
            state ? state->data_ptr() : nullptr};
  }
  void check_contiguous(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const {
    check_scan_tensor(kOp, name, x, compute, shape, false);
    FA_CHECK(x.is_contiguous(), kOp, std::string(name) + " must be contiguous", shape_text(x.sizes()));
  }

  // Multiply-adds: products with the state and inside a chunk.
  double work(bool backward) const {
    return double(batch) * (sinks + sources) * op.heads * op.width * (op.width_v + kFlowChunk) * (backward ? 4 : 1);
  }
  void run(bool backward) const {
    parallel_items(tasks.size() * op.heads, work(backward), FA_ISA_CALL(flow_attention_scratch, op, backward),
                   [&](int64_t begin, int64_t end, void* scratch) {
                     FA_ISA_CALL(flow_attention_run, op, backward, tasks.data(), begin, end, scratch);
                   });
  }
  void run_causal(bool backward) const {
    parallel_items(tasks.size() * op.heads, work(backward), FA_ISA_CALL(causal_flow_attention_scratch, op, backward),
                   [&](int64_t begin, int64_t end, void* scratch) {
                     FA_ISA_CALL(causal_flow_attention_run, op, backward, tasks.data(), begin, end, scratch);
                   });
  }
};

// The gradients of q, k and v, a row of dk and dv for every query head.
std::tuple<Tensor, Tensor, Tensor> gradients(Call& call, const Tensor& dy, const Tensor& q) {
  FlowAttention& op = call.op;
  check_scan_tensor(kOp, "dy", dy, q.scalar_type(), {call.batch, call.sinks, op.heads, op.width_v}, true);
  const Tensor dq = call.rows(q, call.sinks, op.width), dk = call.rows(q, call.sources, op.width);
  const Tensor dv = call.rows(q, call.sources, op.width_v);
  op.dy = scan_tensor(dy), op.dq = scan_tensor(dq), op.dk = scan_tensor(dk), op.dv = scan_tensor(dv);
  for (const Tensor& x : {dq, dk, dv}) clear_rows(x, x.size(1) == call.sinks ? call.used : x.size(1));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> flow_attention_fwd_cpu(
    Tensor q, Tensor k, Tensor v, MaybeTensor key_mask, MaybeTensor query_mask, MaybeTensor cu_seqlens, bool relu,
    double clamp, double eps, double extra) {
  Call call(q, k, v, cu_seqlens, relu, clamp, eps, extra);
  FlowAttention& op = call.op;
  op.key_mask = flow_mask("key_mask", key_mask, call.batch, call.sources);
  op.query_mask = flow_mask("query_mask", query_mask, call.batch, call.sinks);
  const Tensor y = call.rows(q, call.sinks, op.width_v);
  const Tensor flows_q = call.flows(q, 2, call.sinks);
  const Tensor flows_k = call.flows(q, 2, call.sources);
  const Tensor sums = call.values(q, {call.states, op.heads, 4, op.width});
  const Tensor lse = call.values(q, {call.states, op.heads});
  const Tensor kv = call.values(q, {call.states, op.heads, op.width, op.width_v});
  op.y = scan_tensor(y), op.saved = call.states_of(sums, lse, kv);
  op.flows_q = flow_scalars(flows_q), op.flows_k = flow_scalars(flows_k);
  clear_rows(y, call.used);
  call.run(false);
  return {y, flows_q, flows_k, sums, lse, kv};
}

std::tuple<Tensor, Tensor, Tensor> flow_attention_bwd_cpu(Tensor dy, Tensor q, Tensor k, Tensor v, MaybeTensor key_mask,
                                                          MaybeTensor query_mask, MaybeTensor cu_seqlens,
                                                          Tensor flows_q, Tensor flows_k, Tensor sums, Tensor lse,
                                                          Tensor kv, bool relu, double clamp, double eps,
                                                          double extra) {
  Call call(q, k, v, cu_seqlens, relu, clamp, eps, extra);
  FlowAttention& op = call.op;
  op.key_mask = flow_mask("key_mask", key_mask, call.batch, call.sources);
  op.query_mask = flow_mask("query_mask", query_mask, call.batch, call.sinks);
  call.check_contiguous("flows_q", flows_q, {2, call.batch, op.heads, call.sinks});
  call.check_contiguous("flows_k", flows_k, {2, call.batch, op.heads, call.sources});
  op.saved = call.states_of(sums, lse, kv);
  op.flows_q = flow_scalars(flows_q), op.flows_k = flow_scalars(flows_k);
  auto result = gradients(call, dy, q);
  call.run(true);
  return result;
}

void set_causal(Call& call, const MaybeTensor& mask, const MaybeTensor& sums, const MaybeTensor& total,
                const MaybeTensor& count, const MaybeTensor& state) {
  FA_CHECK(call.sinks == call.sources, kOp, "causal q and k must have one length", call.sources);
  FlowAttention& op = call.op;
  op.key_mask = flow_mask("mask", mask, call.batch, call.sinks);
  op.initial = call.states_of(sums, total, state);
  if (count) {
    check_scan_tensor(kOp, "count", *count, ScalarType::Long, {call.states}, false);
    FA_CHECK(count->is_contiguous(), kOp, "count must be contiguous", "strides");
    op.count = count->const_data_ptr<int64_t>();
  }
  constexpr double kUnclamped = 60;  // bounds exp(P): a running sum has no maximum to subtract
  op.clamp = std::min(op.clamp, kUnclamped);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> causal_flow_attention_fwd_cpu(
    Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor sums, MaybeTensor total,
    MaybeTensor count, MaybeTensor state, bool relu, double clamp, double eps, double extra) {
  Call call(q, k, v, cu_seqlens, relu, clamp, eps, extra);
  set_causal(call, mask, sums, total, count, state);
  FlowAttention& op = call.op;
  const Tensor y = call.rows(q, call.sinks, op.width_v);
  const Tensor flows = call.flows(q, 5, call.sinks);
  const Tensor sums_final = call.values(q, {call.states, op.heads, 4, op.width});
  const Tensor total_final = call.values(q, {call.states, op.heads});
  const Tensor state_final = call.values(q, {call.states, op.heads, op.width, op.width_v});
  op.y = scan_tensor(y), op.flows = flow_scalars(flows);
  op.final = call.states_of(sums_final, total_final, state_final);
  clear_rows(y, call.used);
  call.run_causal(false);
  return {y, flows, sums_final, total_final, state_final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> causal_flow_attention_bwd_cpu(
    Tensor dy, MaybeTensor dsums, MaybeTensor dtotal, MaybeTensor dstate, Tensor q, Tensor k, Tensor v,
    MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor sums, MaybeTensor total, MaybeTensor count, MaybeTensor state,
    Tensor flows, bool relu, double clamp, double eps, double extra) {
  Call call(q, k, v, cu_seqlens, relu, clamp, eps, extra);
  set_causal(call, mask, sums, total, count, state);
  FlowAttention& op = call.op;
  call.check_contiguous("flows", flows, {5, call.batch, op.heads, call.sinks});
  op.flows = flow_scalars(flows), op.dfinal = call.states_of(dsums, dtotal, dstate);
  const int64_t states = sums ? call.states : 0;
  const Tensor dsums0 = call.values(q, {states, op.heads, 4, op.width}), dtotal0 = call.values(q, {states, op.heads});
  const Tensor dstate0 = call.values(q, {states, op.heads, op.width, op.width_v});
  if (sums) op.dinitial = call.states_of(dsums0, dtotal0, dstate0);
  const auto [dq, dk, dv] = gradients(call, dy, q);
  call.run_causal(true);
  return {dq, dk, dv, dsums0, dtotal0, dstate0};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("flow_attention_fwd", TORCH_BOX(&flowattn::flow_attention_fwd_cpu));
  m.impl("flow_attention_bwd", TORCH_BOX(&flowattn::flow_attention_bwd_cpu));
  m.impl("causal_flow_attention_fwd", TORCH_BOX(&flowattn::causal_flow_attention_fwd_cpu));
  m.impl("causal_flow_attention_bwd", TORCH_BOX(&flowattn::causal_flow_attention_bwd_cpu));
}
