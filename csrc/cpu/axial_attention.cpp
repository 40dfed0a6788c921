// axial_attention on the CPU: checks, output allocation, and which lines each thread takes.
#include "cpu/axial_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/parallel.h"

namespace flowattn {

constexpr const char* kOp = "axial_attention";

AxialCall::AxialCall(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, const MaybeTensor& cos,
                     const MaybeTensor& sin, int64_t axis, double scale, int64_t mask, bool interleaved)
    : axis(axis), dims(q.dim() - 2) {
  op.storage = storage_of(kOp, "q", q);
  wide = op.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  FA_CHECK(dims >= 2 && axis >= 0 && axis < dims, kOp, "axis must be a grid axis of q", axis);
  FA_CHECK(k.dim() == q.dim() && v.dim() == q.dim(), kOp, "k and v must have the dims of q", k.dim());
  op.heads = q.size(dims), op.heads_kv = k.size(dims), op.width = q.size(dims + 1), op.width_v = v.size(dims + 1);
  n = q.size(axis), m = k.size(axis);
  FA_CHECK(std::max(n, m) < int64_t(1) << 31, kOp, "the axis must be shorter than 2^31", std::max(n, m));
  FA_CHECK(op.heads_kv > 0 && op.heads % op.heads_kv == 0, kOp, "the heads of k must divide the heads of q",
           std::to_string(op.heads_kv) + " and " + std::to_string(op.heads));
  for (int64_t d = 0; d < dims; ++d) {
    if (d == axis) continue;
    sizes.push_back(q.size(d));
    sequences *= q.size(d);
  }
  cu_q_[0] = cu_k_[0] = 0, cu_q_[1] = int32_t(n), cu_k_[1] = int32_t(m);
  op.cu_q = cu_q_, op.cu_k = cu_k_;
  op.scale = scale, op.left = -1, op.right = mask == 0 ? -1 : 0, op.shift = mask == 2 ? -1 : 0;
  op.max_rows = std::min(n, kQueryTile), op.max_keys = std::min(m, kKeyTile), op.max_span = op.max_rows + m;
  op.key_slots = std::max<int64_t>((m + kKeyTile - 1) / kKeyTile, 1);
  op.want_dq = op.want_dkv = true;
  q_ = lines("q", q, q.scalar_type(), false, op.heads, op.width);
  k_ = lines("k", k, q.scalar_type(), true, op.heads_kv, op.width);
  v_ = lines("v", v, q.scalar_type(), true, op.heads_kv, op.width_v);
  if (bias) read_bias(*bias);
  if (cos || sin) read_rotation(cos, sin, interleaved);
}

Lines AxialCall::lines(const char* name, const Tensor& x, ScalarType dtype, bool keys, int64_t heads,
                       int64_t width) const {
  check(name, x, dtype, keys, heads, width);
  return Lines(x, axis, dims);
}

void AxialCall::check(const char* name, const Tensor& x, ScalarType dtype, bool keys, int64_t heads,
                      int64_t width) const {
  const auto rule = [&](const std::string& what) { return std::string(name) + " must have " + what; };
  FA_CHECK(x.is_cpu() && x.scalar_type() == dtype, kOp, rule(std::string("dtype ") + toString(dtype) + " on the CPU"),
           toString(x.scalar_type()));
  std::vector<int64_t> shape(sizes);
  shape.insert(shape.begin() + axis, keys ? m : n);
  shape.push_back(heads);
  if (width) shape.push_back(width);
  const auto got = x.sizes();
  FA_CHECK(std::equal(got.begin(), got.end(), shape.begin(), shape.end()), kOp, rule("shape " + shape_text(shape)),
           shape_text(got));
  FA_CHECK(width <= 1 || x.stride(dims + 1) == 1, kOp, rule("a contiguous last dim"),
           "stride " + std::to_string(x.stride(dims + 1)));
}

void AxialCall::read_bias(const Tensor& bias) {
  const int64_t batch_axes = dims - 1, head = batch_axes;
  const auto got = bias.sizes();
  bool fits = bias.is_cpu() && bias.dim() == dims + 2 && (got[head] == 1 || got[head] == op.heads) &&
              got[head + 1] == n && got[head + 2] == m;
  for (int64_t d = 0; fits && d < batch_axes; ++d) fits = got[d] == 1 || got[d] == sizes[d];
  FA_CHECK(fits, kOp, "bias must be a CPU tensor (other axes.., H, n, m) with dims of size 1 where it is broadcast",
           shape_text(got));
  const Storage storage = storage_of(kOp, "bias", bias);
  FA_CHECK(storage == op.storage || storage == Storage::kFloat, kOp, "bias must have the dtype of q, or float32",
           toString(bias.scalar_type()));
  for (int64_t d = 0; d < batch_axes; ++d) bias_strides.push_back(got[d] == 1 ? 0 : bias.stride(d));
  op.scores.modified = true;
  op.scores.bias = {storage,
                    bias.const_data_ptr(),
                    0,
                    got[head] == 1 ? 0 : bias.stride(head),
                    bias.stride(head + 1),
                    bias.stride(head + 2)};
}

void AxialCall::read_rotation(const MaybeTensor& cos, const MaybeTensor& sin, bool interleaved) {
  const int64_t rows = std::max(n, m);
  for (const MaybeTensor& table : {cos, sin}) {
    const bool fits = table && table->is_cpu() && table->scalar_type() == wide && table->dim() == 2 &&
                      table->size(0) == rows && table->size(1) == cos->size(1) && 2 * table->size(1) <= op.width;
    FA_CHECK(fits, kOp,
             "cos and sin must be " + std::string(toString(wide)) + " CPU tensors (" + std::to_string(rows) +
                 ", R) with 2R <= " + std::to_string(op.width),
             table ? shape_text(table->sizes()) : "none");
  }
  const auto columns = [](const Tensor& table) {
    return torch::stable::contiguous(torch::stable::transpose(table, 0, 1));
  };
  cos_ = torch::stable::contiguous(*cos), sin_ = torch::stable::contiguous(*sin);
  cos_columns_ = columns(*cos), sin_columns_ = columns(*sin);
  op.rotation = {cos_->data_ptr(),
                 sin_->data_ptr(),
                 cos_columns_->data_ptr(),
                 sin_columns_->data_ptr(),
                 rows,
                 cos->size(1),
                 rows - n,
                 rows - m,
                 interleaved};
}

void AxialCall::place(VarlenAttention& op, const Coordinates& at) const {
  op.q = q_.rows(at), op.k = k_.rows(at), op.v = v_.rows(at);
  if (bias_strides.empty()) return;
  int64_t offset = 0;
  for (size_t d = 0; d < at.size(); ++d) offset += at[d] * bias_strides[d];
  const int64_t bytes = op.scores.bias.storage == Storage::kDouble  ? 8
                        : op.scores.bias.storage == Storage::kFloat ? 4
                                                                    : 2;
  op.scores.bias.data = static_cast<const char*>(this->op.scores.bias.data) + offset * bytes;
}

namespace {

// Sets the coordinates of the given axes from their linear index, the last axis fastest.
void unravel(int64_t index, const std::vector<int64_t>& axes, const std::vector<int64_t>& sizes, Coordinates& at) {
  for (size_t i = axes.size(); i-- > 0;) {
    const int64_t size = sizes[axes[i]];
    at[axes[i]] = index % size;
    index /= size;
  }
}

std::vector<int64_t> counted(int64_t count) {
  std::vector<int64_t> axes(count);
  for (int64_t d = 0; d < count; ++d) axes[d] = d;
  return axes;
}

std::tuple<Tensor, Tensor> axial_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor cos,
                                                   MaybeTensor sin, int64_t axis, double scale, int64_t mask,
                                                   bool interleaved) {
  const AxialCall call(q, k, v, bias, cos, sin, axis, scale, mask, interleaved);
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end() - 1);
  const Tensor lse = torch::stable::new_empty(q, shape, call.wide);
  shape.push_back(call.op.width_v);
  const Tensor out = torch::stable::new_empty(q, shape);
  const Lines out_lines(out, axis, call.dims), lse_lines(lse, axis, call.dims);

  std::vector<VarlenTask> tasks;  // of one line
  for (int64_t row = 0; row < call.n; row += kQueryTile) {
    tasks.push_back({0, row, std::min(row + kQueryTile, call.n), 0, call.m, 0});
  }
  const int64_t per_line = tasks.size() * call.op.heads;
  const double work = double(call.sequences) * call.n * call.m * call.op.heads * (call.op.width + call.op.width_v);
  const std::vector<int64_t> axes = counted(call.sizes.size());
  parallel_items(call.sequences * per_line, work, FA_ISA_CALL(varlen_attention_fwd_scratch, call.op),
                 [&](int64_t begin, int64_t end, void* scratch) {
                   VarlenAttention op = call.op;
                   Coordinates at(axes.size());
                   for (int64_t item = begin; item < end;) {
                     const int64_t sequence = item / per_line, first = item % per_line;
                     const int64_t count = std::min(per_line - first, end - item);
                     unravel(sequence, axes, call.sizes, at);
                     call.place(op, at);
                     op.out = out_lines.rows(at), op.lse = lse_lines.values(at);
                     FA_ISA_CALL(varlen_attention_fwd, op, tasks.data(), first, first + count, scratch);
                     item += count;
                   }
                 });
  return {out, lse};
}

// The gradient of a bias that lines share is summed in order, over up to kParts runs of them, then over the runs: the
// number of threads does not enter.
constexpr int64_t kParts = 16;

// Which lines share an element of the bias. Without its gradient every line stands alone.
struct Sharing {
  std::vector<int64_t> own, shared;  // batch axes the bias has, and those over which it is broadcast
  int64_t slots = 1, lines = 1;      // elements along `own`, lines of each
  int64_t parts = 1;                 // runs of a slot's lines
  bool heads = false;                // whether all heads share it too

  Sharing(const AxialCall& call, const Tensor* bias) {
    for (size_t d = 0; d < call.sizes.size(); ++d) {
      const bool broadcast = bias && bias->size(d) == 1 && call.sizes[d] != 1;
      (broadcast ? shared : own).push_back(d);
      (broadcast ? lines : slots) *= call.sizes[d];
    }
    heads = bias && bias->size(call.sizes.size()) == 1 && call.op.heads > 1;
    if (slots > 0) parts = std::clamp<int64_t>(kParts / slots, 1, std::max<int64_t>(lines, 1));
  }
};

template <typename T>
void add_parts(const Tensor& parts, const Tensor& sum) {
  const int64_t count = sum.numel();
  const T* values = parts.const_data_ptr<T>();
  T* total = sum.mutable_data_ptr<T>();
  std::fill(total, total + count, T(0));
  for (int64_t part = 0; part < parts.size(0); ++part, values += count) {
    for (int64_t i = 0; i < count; ++i) total[i] += values[i];
  }
}

// Runs the backward kernels over all lines; returns the gradient of the bias, empty if it is not wanted.
Tensor run_backward(const AxialCall& call, const Tensor& dout, const MaybeTensor& dlse, const Tensor& out,
                    const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv, const MaybeTensor& bias,
                    bool want_dbias) {
  const VarlenAttention& base = call.op;
  const ScalarType dtype = dq.scalar_type();
  const Lines out_lines = call.lines("out", out, dtype, false, base.heads, base.width_v);
  const Lines dout_lines = call.lines("dout", dout, dtype, false, base.heads, base.width_v);
  const Lines lse_lines = call.lines("lse", lse, call.wide, false, base.heads, 0);
  const Lines dlse_lines = dlse ? call.lines("dlse", *dlse, call.wide, false, base.heads, 0) : Lines();
  const Lines dq_lines(dq, call.axis, call.dims), dk_lines(dk, call.axis, call.dims),
      dv_lines(dv, call.axis, call.dims);
  const bool want = want_dbias && bias;
  const Sharing sharing(call, want ? &*bias : nullptr);
  std::vector<int64_t> shape = {0};
  if (want) shape.assign(bias->sizes().begin(), bias->sizes().end());
  const Tensor dbias = torch::stable::new_zeros(dq, shape, call.wide);
  MaybeTensor parts;
  if (want && sharing.parts > 1) {
    shape.insert(shape.begin(), sharing.parts);
    parts = torch::stable::new_zeros(dq, shape, call.wide);
  }
  const Tensor& target = parts ? *parts : dbias;
  const int64_t pairs = call.n * call.m, heads_of_bias = sharing.heads ? 1 : base.heads;
  const int64_t groups = sharing.heads ? 1 : base.heads_kv, heads = sharing.heads ? base.heads_kv : 1;
  const VarlenTask task = {0, 0, call.n, 0, call.m, 0};
  const double work = 2.5 * call.sequences * pairs * base.heads * (base.width + base.width_v);
  // Head groups of a line are neighbours in memory, so they are neighbours in time.
  parallel_items(sharing.slots * sharing.parts * groups * (sharing.lines > 0), work,
                 FA_ISA_CALL(varlen_attention_bwd_scratch, base), [&](int64_t begin, int64_t end, void* scratch) {
                   VarlenAttention op = base;
                   Coordinates at(call.sizes.size());
                   for (int64_t item = begin; item < end; ++item) {
                     const int64_t head = item % groups, run = item / groups;
                     const int64_t slot = run / sharing.parts, part = run % sharing.parts;
                     unravel(slot, sharing.own, call.sizes, at);
                     if (want) {
                       op.dbias_head = sharing.heads ? 0 : pairs, op.dbias_row = call.m;
                       op.dbias = static_cast<char*>(target.data_ptr()) +
                                  (part * sharing.slots + slot) * heads_of_bias * pairs * target.element_size();
                     }
                     const int64_t last = sharing.lines * (part + 1) / sharing.parts;
                     for (int64_t line = sharing.lines * part / sharing.parts; line < last; ++line) {
                       unravel(line, sharing.shared, call.sizes, at);
                       call.place(op, at);
                       op.out = out_lines.rows(at), op.dout = dout_lines.rows(at), op.lse = lse_lines.values(at);
                       op.dlse = dlse_lines.values(at);
                       op.dq = dq_lines.rows(at), op.dk = dk_lines.rows(at), op.dv = dv_lines.rows(at);
                       FA_ISA_CALL(varlen_attention_bwd, op, &task, head, head + heads, scratch);
                     }
                   }
                 });
  if (parts) call.wide == ScalarType::Double ? add_parts<double>(*parts, dbias) : add_parts<float>(*parts, dbias);
  return dbias;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> axial_attention_bwd_cpu(Tensor dout, MaybeTensor dlse, Tensor q, Tensor k,
                                                                   Tensor v, Tensor out, Tensor lse, MaybeTensor bias,
                                                                   MaybeTensor cos, MaybeTensor sin, int64_t axis,
                                                                   double scale, int64_t mask, bool interleaved,
                                                                   bool want_dbias) {
  const AxialCall call(q, k, v, bias, cos, sin, axis, scale, mask, interleaved);
  const Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes());
  const Tensor dv = torch::stable::new_empty(v, v.sizes());
  const Tensor dbias = run_backward(call, dout, dlse, out, lse, dq, dk, dv, bias, want_dbias);
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor> axial_attention_qkvpacked_bwd_cpu(Tensor dout, MaybeTensor dlse, Tensor qkv, Tensor out,
                                                             Tensor lse, MaybeTensor bias, MaybeTensor cos,
                                                             MaybeTensor sin, int64_t axis, double scale, int64_t mask,
                                                             bool interleaved, bool want_dbias) {
  const int64_t packed = qkv.dim() - 3;
  FA_CHECK(packed >= 2 && qkv.size(packed) == 3, kOp, "qkv must have shape (grid.., 3, H, D)", shape_text(qkv.sizes()));
  const auto part = [&](const Tensor& x, int64_t index) { return torch::stable::select(x, packed, index); };
  const AxialCall call(part(qkv, 0), part(qkv, 1), part(qkv, 2), bias, cos, sin, axis, scale, mask, interleaved);
  const Tensor dqkv = torch::stable::new_empty(qkv, qkv.sizes());
  const Tensor dbias =
      run_backward(call, dout, dlse, out, lse, part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), bias, want_dbias);
  return {dqkv, dbias};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("axial_attention_fwd", TORCH_BOX(&flowattn::axial_attention_fwd_cpu));
  m.impl("axial_attention_bwd", TORCH_BOX(&flowattn::axial_attention_bwd_cpu));
  m.impl("axial_attention_qkvpacked_bwd", TORCH_BOX(&flowattn::axial_attention_qkvpacked_bwd_cpu));
}
