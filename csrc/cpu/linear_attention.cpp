// linear_attention on the CPU: checks, output allocation, and the passes that make up a call.
#include "cpu/linear_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "linear_attention";
enum Mode : int64_t { kNonCausal, kCausal, kReverse };  // as in python/flowattn/reference/linear_attention.py

using MaybeTensor = std::optional<Tensor>;

// A tensor (B, T) of scalars that all heads share.
ScanTensor shared_scalars(const MaybeTensor& x) {
  return x ? ScanTensor{x->data_ptr(), x->stride(0), x->stride(1), 0} : ScanTensor{};
}

struct Call {
  const Tensor &q, &k, &v;
  const MaybeTensor &decay, &key_weight, &row_scale, &s0, &z0;
  int64_t batch, length, keys, heads, kv_heads, width, value_width;
  double scale, eps;
  FeatureMap map_q, map_k;
  int64_t mode;
  bool normalize;
  ScalarType compute;
  ScanSegments query_rows, key_rows;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& decay, const MaybeTensor& key_weight,
       const MaybeTensor& row_scale, const MaybeTensor& s0, const MaybeTensor& z0, const MaybeTensor& cu_seqlens,
       double scale, double eps, int64_t map_q, int64_t map_k, int64_t mode, bool normalize)
      : q(q),
        k(k),
        v(v),
        decay(decay),
        key_weight(key_weight),
        row_scale(row_scale),
        s0(s0),
        z0(z0),
        batch(q.size(0)),
        length(q.size(1)),
        keys(k.size(1)),
        heads(q.size(2)),
        kv_heads(k.size(2)),
        width(q.size(3)),
        value_width(v.size(3)),
        scale(scale),
        eps(eps),
        map_q(FeatureMap(map_q)),
        map_k(FeatureMap(map_k)),
        mode(mode),
        normalize(normalize),
        compute(compute_dtype(q)),
        query_rows(kOp, batch, length, cu_seqlens, std::nullopt, mode == kReverse, true),
        key_rows(kOp, batch, keys, cu_seqlens, std::nullopt, mode == kReverse, true) {
    const ScalarType dtype = q.scalar_type();
    check_scan_tensor(kOp, "q", q, dtype, {batch, length, heads, width}, true);
    check_scan_tensor(kOp, "k", k, dtype, {batch, keys, kv_heads, width}, true);
    check_scan_tensor(kOp, "v", v, dtype, {batch, keys, kv_heads, value_width}, true);
    FA_CHECK(kv_heads > 0 && heads % kv_heads == 0, kOp, "the heads of k must divide the heads of q", kv_heads);
    FA_CHECK(mode == kNonCausal || keys == length, kOp, "q and k must have one length if causal", keys);
    FA_CHECK(mode >= kNonCausal && mode <= kReverse, kOp, "mode must be 0, 1 or 2", mode);
    if (decay) {
      FA_CHECK(decay->dim() == 3, kOp, "decay must have shape (B or 1, T or 1, H)", shape_text(decay->sizes()));
      const int64_t rows = decay->size(0) == 1 ? 1 : batch, tokens = decay->size(1) == 1 ? 1 : length;
      check_scan_tensor(kOp, "decay", *decay, compute, {rows, tokens, heads}, false);
    }
    if (key_weight) check_scan_tensor(kOp, "key_weight", *key_weight, compute, {batch, keys}, false);
    if (row_scale) check_scan_tensor(kOp, "row_scale", *row_scale, compute, {batch, length}, false);
    check_states("s0", "z0", s0, z0);
  }

  int64_t states() const { return query_rows.states; }

  void check_states(const char* name, const char* vector_name, const MaybeTensor& s, const MaybeTensor& z) const {
    if (s) check_scan_tensor(kOp, name, *s, compute, {states(), heads, width, value_width}, true);
    if (z) check_scan_tensor(kOp, vector_name, *z, compute, {states(), heads, width}, true);
    for (const auto& [label, x] : {std::pair(name, &s), std::pair(vector_name, &z)}) {
      FA_CHECK(!*x || (*x)->is_contiguous(), kOp, std::string(label) + " must be contiguous",
               shape_text((*x)->strides()));
    }
  }

  LinearRows rows(const Tensor& x, int64_t group, FeatureMap map, ScanTensor factor = {}) const {
    return {scan_tensor(x), x.size(3), group, map, factor};
  }
  LinearRows query() const { return rows(q, 1, map_q); }
  LinearRows key() const { return rows(k, heads / kv_heads, map_k, shared_scalars(key_weight)); }
  LinearRows value() const { return rows(v, heads / kv_heads, FeatureMap::kIdentity); }

  // A causal pass with the options that all share.
  LinearAttention pass(const LinearRows& a, const LinearRows& b, const LinearRows& c) const {
    LinearAttention op{};
    op.storage = storage_of(kOp, "q", q);
    op.a = a, op.b = b, op.c = c, op.members = 1, op.walks = true, op.scale = 1;
    if (decay) {
      op.decay = scan_tensor(*decay);
      if (decay->size(0) == 1) op.decay.row = 0;
      if (decay->size(1) == 1) op.decay.time = 0;
    }
    return op;
  }

  // Runs a pass over `units` heads of its result.
  void run(const LinearAttention& op, const ScanSegments& segments, int64_t units) const {
    const double token = 2.0 * op.b.width * op.c.width + 64.0 * (op.a.width + op.c.width);
    run_scan(
        segments, units, double(segments.total()) * heads * token, FA_ISA_CALL(linear_attention_state_bytes, op),
        [&](int64_t) { return FA_ISA_CALL(linear_attention_scratch_bytes, op); },
        [&](ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local, std::byte* scratch) {
          FA_ISA_CALL(linear_attention_pass, op, phase, task, carry, local, scratch);
        });
  }

  Tensor empty(std::initializer_list<int64_t> shape) const {
    return torch::stable::new_empty(q, std::vector<int64_t>(shape), compute);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, MaybeTensor decay,
                                                                    MaybeTensor key_weight, MaybeTensor row_scale,
                                                                    MaybeTensor s0, MaybeTensor z0,
                                                                    MaybeTensor cu_seqlens, double scale, double eps,
                                                                    int64_t map_q, int64_t map_k, int64_t mode,
                                                                    bool normalize) {
  const Call call(q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize);
  const int64_t B = call.batch, T = call.length, H = call.heads, D = call.width, M = call.value_width;
  const Tensor out = torch::stable::new_empty(q, {B, T, H, M});
  const Tensor den = normalize ? call.empty({B, T, H}) : call.empty({0});
  const Tensor s = call.empty({call.states(), H, D, M});
  const Tensor z = normalize ? call.empty({call.states(), H, D}) : call.empty({0});
  clear_rows(out, call.query_rows.used);
  if (normalize) clear_rows(den, call.query_rows.used);
  pass_states(s, s0, call.key_rows.empty);
  if (normalize) pass_states(z, z0, call.key_rows.empty);

  LinearAttention op = call.pass(call.query(), call.key(), call.value());
  op.normalize = normalize, op.scale = scale, op.eps = eps, op.out_factor = shared_scalars(row_scale);
  op.state = scan_state(s0), op.vector = scan_state(z0), op.final_state = scan_state(s);
  if (normalize) op.den = scan_tensor(den), op.final_vector = scan_state(z);
  if (mode == kNonCausal) {
    call.run(op, call.key_rows, H);
    op.walks = false, op.state = op.final_state, op.vector = op.final_vector;
  }
  op.out = scan_tensor(out);
  call.run(op, call.query_rows, H);
  return {out, den, s, z};
}

// dg_t = sum over i >= t of (q_i . dq_i - k_i . dk_i) + <S_T, dS_T> + <z_T, dz_T>, in place of the terms of the sum.
template <typename E>
void sum_decay_gradients(const Call& call, const Tensor& terms, const Tensor& s, const MaybeTensor& ds, const Tensor& z,
                         const MaybeTensor& dz) {
  const auto dot = [&](const Tensor& x, const MaybeTensor& y, int64_t row, int64_t n) {
    double sum = 0;
    if (!y || x.numel() == 0) return sum;
    const E *a = static_cast<const E*>(x.data_ptr()) + row * n, *b = static_cast<const E*>(y->data_ptr()) + row * n;
    for (int64_t i = 0; i < n; ++i) sum += double(a[i]) * b[i];
    return sum;
  };
  E* data = static_cast<E*>(terms.data_ptr());
  for (const ScanSegment& segment : call.query_rows.list) {
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t row = segment.state * call.heads + h;
      double sum = dot(s, ds, row, call.width * call.value_width) + dot(z, dz, row, call.width);
      for (int64_t i = segment.length - 1; i >= 0; --i) {
        const int64_t token = segment.row * call.length + segment.first + i * segment.step;
        E& value = data[token * call.heads + h];
        sum += value;
        value = i == 0 && !call.s0 ? E(0) : E(sum);  // the first decay acts on nothing
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cpu(
    Tensor dout, MaybeTensor ds, MaybeTensor dz, Tensor q, Tensor k, Tensor v, MaybeTensor decay,
    MaybeTensor key_weight, MaybeTensor row_scale, MaybeTensor s0, MaybeTensor z0, MaybeTensor cu_seqlens, Tensor out,
    Tensor den, Tensor s, Tensor z, double scale, double eps, int64_t map_q, int64_t map_k, int64_t mode,
    bool normalize, bool want_ddecay) {
  const Call call(q, k, v, decay, key_weight, row_scale, s0, z0, cu_seqlens, scale, eps, map_q, map_k, mode, normalize);
  const int64_t B = call.batch, T = call.length, H = call.heads, group = H / call.kv_heads;
  check_scan_tensor(kOp, "dout", dout, q.scalar_type(), {B, T, H, call.value_width}, true);
  check_scan_tensor(kOp, "out", out, q.scalar_type(), {B, T, H, call.value_width}, true);
  call.check_states("ds", "dz", ds, dz);
  call.check_states("s", "z", s, normalize ? MaybeTensor(z) : std::nullopt);
  if (normalize) check_scan_tensor(kOp, "den", den, call.compute, {B, T, H}, false);

  const Tensor dq = torch::stable::new_empty(q, {B, T, H, call.width});
  const Tensor dk = torch::stable::new_empty(k, {B, call.keys, call.kv_heads, call.width});
  const Tensor dv = torch::stable::new_empty(v, {B, call.keys, call.kv_heads, call.value_width});
  const Tensor terms = want_ddecay ? call.empty({B, T, H}) : call.empty({0});
  // Of all tokens' states before the first: where nobody asks for it, the non-causal passes still do.
  const bool total = mode == kNonCausal;
  const Tensor ds0 = s0 || total ? call.empty({call.states(), H, call.width, call.value_width}) : call.empty({0});
  const Tensor dz0 = z0 || (total && normalize) ? call.empty({call.states(), H, call.width}) : call.empty({0});
  clear_rows(dq, call.query_rows.used), clear_rows(dk, call.key_rows.used), clear_rows(dv, call.key_rows.used);
  if (want_ddecay) clear_rows(terms, call.query_rows.used);
  if (ds0.dim() > 1) pass_states(ds0, ds, call.query_rows.empty);
  if (dz0.dim() > 1) pass_states(dz0, dz, call.query_rows.empty);

  // The gradient of S_t^T q_t is dout times a factor a row; that of a weight summed by the normaliser is x.
  LinearRows grad = call.rows(dout, 1, FeatureMap::kIdentity);
  grad.scale = normalize || row_scale ? 1 : scale;  // else it is in the factor
  Tensor factor, x;
  LinearAttentionRows prepare{};
  if (normalize || row_scale) {
    factor = call.empty({B, T, H}), grad.factor = prepare.factor = scan_tensor(factor);
    prepare.storage = storage_of(kOp, "q", q), prepare.width = call.value_width, prepare.scale = scale;
    prepare.batch = B, prepare.tokens = T, prepare.heads = H;
    prepare.dout = scan_tensor(dout), prepare.out = scan_tensor(out), prepare.row_scale = shared_scalars(row_scale);
    if (normalize) x = call.empty({B, T, H}), prepare.x = scan_tensor(x), prepare.den = scan_tensor(den);
    parallel_items(B * T, double(B * T) * H * call.value_width, 0, [&](int64_t begin, int64_t end, std::byte*) {
      FA_ISA_CALL(linear_attention_rows, prepare, begin, end);
    });
  }
  const ScanSegments back(kOp, B, T, cu_seqlens, std::nullopt, mode != kReverse, true);
  LinearAttention dq_pass = call.pass(grad, call.value(), call.key());
  dq_pass.out = scan_tensor(dq), dq_pass.input = call.query();
  dq_pass.state = scan_state(s0), dq_pass.vector = scan_state(z0), dq_pass.transposed = true;
  dq_pass.pairs = normalize, dq_pass.x = prepare.x;
  if (want_ddecay) dq_pass.product = scan_tensor(terms);

  LinearAttention dk_pass = call.pass(call.value(), grad, call.query());
  dk_pass.members = group, dk_pass.late_decay = true;
  dk_pass.state = scan_state(ds), dk_pass.vector = scan_state(dz), dk_pass.transposed = true;
  dk_pass.pairs = normalize, dk_pass.w = prepare.x;
  if (dz0.dim() > 1) dk_pass.final_vector = scan_state(dz0);
  if (want_ddecay) dk_pass.product = dq_pass.product, dk_pass.subtract = true;

  LinearAttention dv_pass = call.pass(call.key(), call.query(), grad);
  dv_pass.members = group, dv_pass.late_decay = true, dv_pass.out = scan_tensor(dv);
  dv_pass.state = scan_state(ds);

  if (total) {
    // One sum over the queries serves dk and dv.
    LinearAttention sums = dk_pass;
    sums.members = 1, sums.final_state = scan_state(ds0);
    call.run(sums, call.query_rows, H);
    dq_pass.state = scan_state(s), dk_pass.state = dv_pass.state = scan_state(ds0);
    dk_pass.final_vector = {};
    if (normalize) dq_pass.vector = scan_state(z), dk_pass.vector = scan_state(dz0);
    dq_pass.walks = dk_pass.walks = dv_pass.walks = false;
  } else if (s0) {
    dv_pass.final_state = scan_state(ds0);
  }
  dk_pass.out = scan_tensor(dk), dk_pass.input = call.rows(k, 1, call.map_k);
  dk_pass.out_factor = shared_scalars(key_weight);
  call.run(dq_pass, call.query_rows, H);
  call.run(dk_pass, total ? call.key_rows : back, call.kv_heads);
  call.run(dv_pass, total ? call.key_rows : back, call.kv_heads);
  if (want_ddecay) {
    call.compute == ScalarType::Double ? sum_decay_gradients<double>(call, terms, s, ds, z, dz)
                                       : sum_decay_gradients<float>(call, terms, s, ds, z, dz);
  }
  return {dq, dk, dv, terms, s0 ? ds0 : call.empty({0}), z0 ? dz0 : call.empty({0})};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("linear_attention_fwd", TORCH_BOX(&flowattn::linear_attention_fwd_cpu));
  m.impl("linear_attention_bwd", TORCH_BOX(&flowattn::linear_attention_bwd_cpu));
}
