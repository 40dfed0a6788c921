// chunk_hybrid_attention on the CPU: checks, output allocation, threads over rows and heads.
#include "cpu/chunk_hybrid_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "chunk_hybrid_attention";

using MaybeTensor = std::optional<Tensor>;

struct Call {
  ChunkHybridAttention op{};
  int64_t batch;
  ScalarType compute;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const MaybeTensor& state, int64_t chunk) {
    FA_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kOp, "q, k and v must have shape (B, T, H, width)",
             shape_text(q.sizes()) + ", " + shape_text(k.sizes()) + " and " + shape_text(v.sizes()));
    batch = q.size(0), compute = compute_dtype(q);
    op.storage = storage_of(kOp, "q", q);
    op.tokens = q.size(1), op.heads = q.size(2), op.width = q.size(3), op.width_v = v.size(3), op.chunk = chunk;
    const int64_t heads_kv = k.size(2);
    FA_CHECK(heads_kv > 0 && op.heads % heads_kv == 0, kOp, "the heads of k must divide the heads of q",
             std::to_string(heads_kv) + " and " + std::to_string(op.heads));
    FA_CHECK(chunk > 0 && op.tokens % chunk == 0, kOp, "the tokens must be a multiple of chunk",
             std::to_string(op.tokens) + " and " + std::to_string(chunk));
    op.group = op.heads / heads_kv;
    check_scan_tensor(kOp, "q", q, q.scalar_type(), {batch, op.tokens, op.heads, op.width}, true);
    check_scan_tensor(kOp, "k", k, q.scalar_type(), {batch, op.tokens, heads_kv, op.width}, true);
    check_scan_tensor(kOp, "v", v, q.scalar_type(), {batch, op.tokens, heads_kv, op.width_v}, true);
    check_scan_tensor(kOp, "gate", gate, compute, {batch, op.tokens, op.heads}, false);
    op.q = scan_tensor(q), op.k = scan_tensor(k), op.v = scan_tensor(v), op.gate = scan_tensor(gate);
    op.initial = state_data("state", state);
  }

  void* state_data(const char* name, const MaybeTensor& state) const {
    if (!state) return nullptr;
    check_contiguous(name, *state, {batch, op.heads, op.width, op.width_v});
    return state->data_ptr();
  }
  void check_contiguous(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const {
    check_scan_tensor(kOp, name, x, compute, shape, false);
    FA_CHECK(x.is_contiguous(), kOp, std::string(name) + " must be contiguous", shape_text(x.sizes()));
  }
  void run(bool backward) const {
    const double work = double(batch) * op.tokens * op.heads * (op.chunk + op.width) * (op.width + op.width_v);
    parallel_items(batch * op.heads, backward ? 3 * work : work,
                   FA_ISA_CALL(chunk_hybrid_attention_scratch, op, backward),
                   [&](int64_t begin, int64_t end, void* scratch) {
                     FA_ISA_CALL(chunk_hybrid_attention_run, op, backward, begin, end, scratch);
                   });
  }
};

std::tuple<Tensor, Tensor, Tensor> chunk_hybrid_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor gate,
                                                                  MaybeTensor state, int64_t chunk) {
  Call call(q, k, v, gate, state, chunk);
  ChunkHybridAttention& op = call.op;
  const Tensor o = torch::stable::new_empty(q, {call.batch, op.tokens, op.heads, op.width_v});
  const Tensor lse = torch::stable::new_empty(q, {call.batch, op.heads, op.tokens}, call.compute);
  const Tensor final = torch::stable::new_empty(q, {call.batch, op.heads, op.width, op.width_v}, call.compute);
  op.o = scan_tensor(o), op.lse = lse.data_ptr(), op.final = final.data_ptr();
  call.run(false);
  return {o, lse, final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> chunk_hybrid_attention_bwd_cpu(Tensor dout, MaybeTensor dfinal,
                                                                                  Tensor q, Tensor k, Tensor v,
                                                                                  Tensor gate, MaybeTensor state,
                                                                                  Tensor lse, int64_t chunk) {
  Call call(q, k, v, gate, state, chunk);
  ChunkHybridAttention& op = call.op;
  check_scan_tensor(kOp, "do", dout, q.scalar_type(), {call.batch, op.tokens, op.heads, op.width_v}, true);
  call.check_contiguous("lse", lse, {call.batch, op.heads, op.tokens});
  const auto rows = [&](int64_t width) {
    return torch::stable::new_empty(q, {call.batch, op.tokens, op.heads, width});
  };
  const Tensor dq = rows(op.width), dk = rows(op.width), dv = rows(op.width_v);
  const Tensor dgate = torch::stable::new_empty(gate, {call.batch, op.tokens, op.heads});
  const Tensor dinitial =
      torch::stable::new_empty(q, {state ? call.batch : 0, op.heads, op.width, op.width_v}, call.compute);
  op.dout = scan_tensor(dout), op.dq = scan_tensor(dq), op.dk = scan_tensor(dk), op.dv = scan_tensor(dv);
  op.dgate = scan_tensor(dgate), op.lse = lse.data_ptr(), op.dfinal = call.state_data("dfinal", dfinal);
  op.dinitial = state ? dinitial.data_ptr() : nullptr;
  call.run(true);
  return {dq, dk, dv, dgate, dinitial};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("chunk_hybrid_attention_fwd", TORCH_BOX(&flowattn::chunk_hybrid_attention_fwd_cpu));
  m.impl("chunk_hybrid_attention_bwd", TORCH_BOX(&flowattn::chunk_hybrid_attention_bwd_cpu));
}
