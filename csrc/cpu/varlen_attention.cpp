// varlen_attention on the CPU: checks, output allocation, and the list of tasks the threads share.
#include "cpu/varlen_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/parallel.h"
#include "cpu/score_tensors.h"
#include "cpu/varlen_tasks.h"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "varlen_attention";

void check_rows(const char* name, const Tensor& x, ScalarType dtype, int64_t rows, int64_t heads, int64_t width) {
  const auto rule = [&](const char* what) { return std::string(name) + " must have " + what; };
  FA_CHECK(x.is_cpu(), kOp, std::string(name) + " must be on the CPU", "another device");
  FA_CHECK(x.scalar_type() == dtype, kOp, rule("the dtype of q"), toString(x.scalar_type()));
  const bool fits = x.dim() == 3 && x.size(0) == rows && x.size(1) == heads && x.size(2) == width;
  const std::string shape =
      "shape (" + std::to_string(rows) + ", " + std::to_string(heads) + ", " + std::to_string(width) + ")";
  FA_CHECK(fits, kOp, rule(shape.c_str()), shape_text(x.sizes()));
  FA_CHECK(width <= 1 || x.stride(2) == 1, kOp, rule("a contiguous last dim"), "stride " + std::to_string(x.stride(2)));
}

void check_row_values(const char* name, const Tensor& x, ScalarType dtype, int64_t heads, int64_t rows) {
  const bool fits = x.is_cpu() && x.scalar_type() == dtype && x.dim() == 2 && x.size(0) == heads && x.size(1) == rows;
  FA_CHECK(fits, kOp, std::string(name) + " must be a " + toString(dtype) + " CPU tensor of shape (H, Tq)",
           shape_text(x.sizes()));
}

// The offsets as a contiguous tensor, checked so that no kernel reads outside the `total` rows.
Tensor check_offsets(const char* name, const Tensor& cu, int64_t total) {
  const bool fits = cu.is_cpu() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) >= 1;
  FA_CHECK(fits, kOp, std::string(name) + " must be an int32 CPU tensor of shape (B+1,)", shape_text(cu.sizes()));
  Tensor contiguous = torch::stable::contiguous(cu);
  const int32_t* values = contiguous.const_data_ptr<int32_t>();
  int64_t previous = 0;
  for (int64_t b = 0; b < cu.size(0); ++b) {
    const bool good = b == 0 ? values[0] == 0 : values[b] >= previous && values[b] <= total;
    FA_CHECK(good, kOp,
             std::string(name) + " must start at 0, never decrease and end at or before the " + std::to_string(total) +
                 " packed rows",
             std::to_string(values[b]) + " at position " + std::to_string(b));
    previous = values[b];
  }
  return contiguous;
}

PackedRows packed_rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
RowValues row_values(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// Checks the arguments both directions share; `cu_q` and `cu_k` come back contiguous; they and `scores` must
// outlive the result.
VarlenAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& cu_q, Tensor& cu_k, double scale,
                         int64_t left, int64_t right, bool top_left, ScoreTensors& scores) {
  VarlenAttention op{};
  op.storage = storage_of(kOp, "q", q);
  FA_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, kOp, "q, k and v must have shape (T, heads, width)",
           shape_text(q.sizes()) + ", " + shape_text(k.sizes()) + " and " + shape_text(v.sizes()));
  op.heads = q.size(1), op.heads_kv = k.size(1), op.width = q.size(2), op.width_v = v.size(2);
  check_rows("q", q, q.scalar_type(), q.size(0), op.heads, op.width);
  check_rows("k", k, q.scalar_type(), k.size(0), op.heads_kv, op.width);
  check_rows("v", v, q.scalar_type(), k.size(0), op.heads_kv, op.width_v);
  FA_CHECK(op.heads_kv > 0 && op.heads % op.heads_kv == 0, kOp, "the heads of k must divide the heads of q",
           std::to_string(op.heads_kv) + " and " + std::to_string(op.heads));
  cu_q = check_offsets("cu_seqlens_q", cu_q, q.size(0));
  cu_k = check_offsets("cu_seqlens_k", cu_k, k.size(0));
  FA_CHECK(cu_q.size(0) == cu_k.size(0), kOp, "cu_seqlens_q and cu_seqlens_k must have one length",
           std::to_string(cu_q.size(0)) + " and " + std::to_string(cu_k.size(0)));
  op.cu_q = cu_q.const_data_ptr<int32_t>(), op.cu_k = cu_k.const_data_ptr<int32_t>();
  op.scale = scale, op.top_left = top_left;
  constexpr int64_t kWide = int64_t(1) << 40;  // wider than any sequence, and i + kWide does not overflow
  op.left = left < 0 ? -1 : std::min(left, kWide), op.right = right < 0 ? -1 : std::min(right, kWide);
  op.q = packed_rows(q), op.k = packed_rows(k), op.v = packed_rows(v);
  op.scores = scores.describe(kOp, op, cu_q.size(0) - 1);
  return op;
}

// Rows that belong to no sequence: zeros, and an LSE of -inf.
void clear_rest(const Tensor& x, int64_t first) {
  const int64_t row_bytes = x.size(1) * x.size(2) * x.element_size();
  if (x.size(0) > first && row_bytes > 0) {
    std::memset(static_cast<char*>(x.data_ptr()) + first * row_bytes, 0, (x.size(0) - first) * row_bytes);
  }
}

template <typename T>
void clear_rest_of_lse(const Tensor& lse, int64_t first) {
  T* values = static_cast<T*>(lse.data_ptr());
  for (int64_t h = 0; h < lse.size(0); ++h) {
    std::fill(values + h * lse.size(1) + first, values + (h + 1) * lse.size(1), -std::numeric_limits<T>::infinity());
  }
}

void set_tile_sizes(VarlenAttention& op, const std::vector<VarlenTask>& tasks) {
  for (const VarlenTask& task : tasks) {
    const int64_t rows = std::min(task.q_end - task.q_begin, kQueryTile), keys = task.k_end - task.k_begin;
    op.max_rows = std::max(op.max_rows, rows);
    op.max_keys = std::max(op.max_keys, std::min(keys, kKeyTile));
    op.max_span = std::max(op.max_span, rows + keys);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, Tensor cu_q, Tensor cu_k,
                                   double scale, int64_t left, int64_t right, bool top_left, ScoreTensors scores) {
  VarlenAttention op = describe(q, k, v, cu_q, cu_k, scale, left, right, top_left, scores);
  Tensor out = torch::stable::new_empty(q, {q.size(0), op.heads, op.width_v});
  const bool wide = op.storage == Storage::kDouble;
  Tensor lse = torch::stable::new_empty(q, {op.heads, q.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
  op.out = packed_rows(out), op.lse = row_values(lse);

  const Sequences sequences(op, cu_q.size(0) - 1);
  const std::vector<VarlenTask> tasks = sequences.tasks(kQueryTile, kWhole);
  set_tile_sizes(op, tasks);
  parallel_items(tasks.size() * op.heads, sequences.all_pairs * op.heads * (op.width + op.width_v),
                 FA_ISA_CALL(varlen_attention_fwd_scratch, op), [&](int64_t begin, int64_t end, void* scratch) {
                   FA_ISA_CALL(varlen_attention_fwd, op, tasks.data(), begin, end, scratch);
                 });
  const int64_t rest = op.cu_q[cu_q.size(0) - 1];
  clear_rest(out, rest);
  wide ? clear_rest_of_lse<double>(lse, rest) : clear_rest_of_lse<float>(lse, rest);
  return {out, lse};
}

void run_backward(VarlenAttention op, const Sequences& sequences, int64_t q_step, int64_t k_step, bool dq, bool dkv) {
  op.want_dq = dq, op.want_dkv = dkv;
  if (!dq) op.dbias = op.dtable = nullptr;
  const std::vector<VarlenTask> tasks = sequences.tasks(q_step, k_step);
  set_tile_sizes(op, tasks);
  op.key_slots = 1;
  for (const VarlenTask& task : tasks) {
    if (dkv) op.key_slots = std::max(op.key_slots, tiles_of(task.k_end - task.k_begin, kKeyTile));
  }
  parallel_items(tasks.size() * op.heads_kv, 2.5 * sequences.all_pairs * op.heads * (op.width + op.width_v),
                 FA_ISA_CALL(varlen_attention_bwd_scratch, op), [&](int64_t begin, int64_t end, void* scratch) {
                   FA_ISA_CALL(varlen_attention_bwd, op, tasks.data(), begin, end, scratch);
                 });
}

// The gradient of a bias that sequences or heads share takes a pass of its own, in which one thread owns a row tile of
// the bias and sums over all who share it, in order.
void run_shared_bias(VarlenAttention op, const Sequences& sequences, const Tensor& bias) {
  constexpr int64_t kRows = 64;  // fewer than kQueryTile: short sequences and few heads must still occupy all threads
  std::vector<int64_t> begins;
  const std::vector<VarlenTask> tasks = sequences.row_groups(bias.size(0) == 1, kRows, begins);
  set_tile_sizes(op, tasks);
  op.key_slots = 1, op.want_dq = op.want_dkv = false, op.dtable = nullptr;
  const SharedBias shared = {{tasks.data(), begins.data()}, bias.size(1)};
  parallel_items((begins.size() - 1) * shared.bias_heads, sequences.all_pairs * op.heads * (op.width + op.width_v),
                 FA_ISA_CALL(varlen_attention_bwd_scratch, op), [&](int64_t begin, int64_t end, void* scratch) {
                   FA_ISA_CALL(varlen_attention_bwd_shared_bias, op, shared, begin, end, scratch);
                 });
}

// The sum over the first dim of parts (N, heads, buckets), in order, as (buckets, heads).
template <typename T>
void sum_parts(const Tensor& parts, const Tensor& out) {
  const int64_t heads = parts.size(1), buckets = parts.size(2);
  const T* values = parts.const_data_ptr<T>();
  std::vector<double> sums(heads * buckets, 0.0);
  for (int64_t part = 0; part < parts.size(0); ++part, values += sums.size()) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
  }
  T* result = out.mutable_data_ptr<T>();
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t r = 0; r < buckets; ++r) result[r * heads + h] = T(sums[h * buckets + r]);
  }
}

// An empty tensor made without the dispatcher, which would cost every plain backward pass 1 us for each.
Tensor nothing(ScalarType dtype) {
  static char memory;
  return torch::stable::from_blob(&memory, {0}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

void clear_rest_of_gradients(const VarlenAttention& op, const Tensor& cu_q, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv) {
  const int64_t batch = cu_q.size(0) - 1;
  clear_rest(dq, op.cu_q[batch]);
  clear_rest(dk, op.cu_k[batch]);
  clear_rest(dv, op.cu_k[batch]);
}

// The sum over the first dim of parts (N, heads, rows, width), in order, as (rows, heads, width).
template <typename T>
void sum_tables(const Tensor& parts, const Tensor& out) {
  const int64_t heads = parts.size(1), rows = parts.size(2), width = parts.size(3);
  T* result = out.mutable_data_ptr<T>();
  parallel_items(heads * rows, double(parts.numel()), 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t item = begin; item < end; ++item) {
      T* sum = result + (item % rows * heads + item / rows) * width;
      std::fill(sum, sum + width, T(0));
      const T* part = parts.const_data_ptr<T>() + item * width;
      for (int64_t n = 0; n < parts.size(0); ++n, part += heads * rows * width) {
        for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
      }
    }
  });
}

// Runs the backward of a disentangled bias; returns the gradients of its tables, empty where they are not wanted.
//
// A gradient of a table is as large as the table, too large for one partial sum a query tile. Groups of sequences share
// one, and their number depends on the work alone: a group has at least kPairs scores for each row of its sum. One
// thread has all of a group's head, so this is always one pass, however few the sequences.
std::tuple<Tensor, Tensor> run_positions(VarlenAttention op, const Sequences& sequences, const Tensor& like,
                                         bool want_tables) {
  constexpr double kPairs = 16;
  constexpr int64_t kMostGroups = 8;
  const bool is_double = op.storage == Storage::kDouble;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const PositionTables& tables = op.scores.positions;
  std::vector<int64_t> begins;
  const int64_t most = std::clamp<int64_t>(int64_t(sequences.all_pairs / (kPairs * tables.rows)), 1, kMostGroups);
  const std::vector<VarlenTask> tasks = sequences.sequence_groups(most, begins);
  const int64_t groups = begins.size() - 1;
  set_tile_sizes(op, tasks);
  op.want_dq = op.want_dkv = true, op.key_slots = 1;
  for (const VarlenTask& task : tasks) op.key_slots = std::max(op.key_slots, tiles_of(task.k_end, kKeyTile));
  const auto partial = [&](const void* table, void*& sums) {
    if (!table || !want_tables) return nothing(wide);
    Tensor parts = torch::stable::new_empty(like, {groups, op.heads, tables.rows, op.width}, wide);
    sums = parts.mutable_data_ptr();
    return parts;
  };
  const Tensor key_parts = partial(tables.keys, op.dposition_keys);
  const Tensor query_parts = partial(tables.queries, op.dposition_queries);
  const TaskGroups list = {tasks.data(), begins.data()};
  parallel_items(groups * op.heads_kv, 5 * sequences.all_pairs * op.heads * (op.width + op.width_v),
                 FA_ISA_CALL(varlen_attention_bwd_scratch, op), [&](int64_t begin, int64_t end, void* scratch) {
                   FA_ISA_CALL(varlen_attention_bwd_groups, op, list, begin, end, scratch);
                 });
  const auto total = [&](const void* table, const Tensor& parts) {
    if (!table || !want_tables) return parts;
    Tensor out = torch::stable::new_empty(like, {tables.rows, op.heads, op.width}, wide);
    is_double ? sum_tables<double>(parts, out) : sum_tables<float>(parts, out);
    return out;
  };
  return {total(tables.keys, key_parts), total(tables.queries, query_parts)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& out, const Tensor& lse, Tensor cu_q, Tensor cu_k, double scale,
                   int64_t left, int64_t right, bool top_left, ScoreTensors scores, bool want_dbias) {
  const std::optional<Tensor>&bias = scores.bias, &table = scores.table;
  VarlenAttention op = describe(q, k, v, cu_q, cu_k, scale, left, right, top_left, scores);
  const ScalarType wide = op.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  check_rows("out", out, q.scalar_type(), q.size(0), op.heads, op.width_v);
  check_rows("dout", dout, q.scalar_type(), q.size(0), op.heads, op.width_v);
  check_row_values("lse", lse, wide, op.heads, q.size(0));
  if (dlse) check_row_values("dlse", *dlse, wide, op.heads, q.size(0));
  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  op.out = packed_rows(out), op.lse = row_values(lse), op.dout = packed_rows(dout);
  op.dq = packed_rows(dq), op.dk = packed_rows(dk), op.dv = packed_rows(dv);
  if (dlse) op.dlse = row_values(*dlse);

  const Sequences sequences(op, cu_q.size(0) - 1);
  if (op.scores.positions.rows) {
    auto [dkeys, dqueries] = run_positions(op, sequences, q, want_dbias);
    clear_rest_of_gradients(op, cu_q, dq, dk, dv);
    return {dq, dk, dv, dkeys, dqueries};
  }
  const bool want_dense = want_dbias && bias, want_table = want_dbias && table;
  Tensor dbias = want_dense ? torch::stable::new_zeros(q, bias->sizes(), wide) : nothing(wide);
  const bool shared = want_dense && (bias->size(0) < sequences.count() || bias->size(1) < op.heads);
  if (want_dense) {
    op.dbias_batch = bias->size(0) == 1 ? 0 : dbias.stride(0), op.dbias_head = bias->size(1) == 1 ? 0 : dbias.stride(1);
    op.dbias_row = dbias.stride(2);
  }
  if (want_dense && !shared) op.dbias = dbias.mutable_data_ptr();
  std::optional<Tensor> parts;
  if (want_table) {
    parts = torch::stable::new_empty(q, {sequences.query_tiles(), op.heads, op.scores.buckets}, wide);
    op.dtable = parts->mutable_data_ptr();
  }

  // One pass takes 5 matrix products a tile but cannot share a head of a sequence between threads; two passes take 7.
  const double share = sequences.all_pairs * op.heads_kv / torch::stable::get_num_threads();
  if (sequences.most_pairs <= 1.4 * share) {
    run_backward(op, sequences, kWhole, kWhole, true, true);
  } else {
    run_backward(op, sequences, kQueryTile, kWhole, true, false);
    run_backward(op, sequences, kWhole, kKeyTile, false, true);
  }
  if (shared) {
    op.dbias = dbias.mutable_data_ptr();
    run_shared_bias(op, sequences, *bias);
  }
  Tensor dtable = nothing(wide);
  if (want_table) {
    dtable = torch::stable::new_empty(q, {op.scores.buckets, op.heads}, wide);
    wide == ScalarType::Double ? sum_parts<double>(*parts, dtable) : sum_parts<float>(*parts, dtable);
  }
  clear_rest_of_gradients(op, cu_q, dq, dk, dv);
  return {dq, dk, dv, dbias, dtable};
}

std::tuple<Tensor, Tensor> varlen_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k,
                                                    std::optional<Tensor>, int64_t, int64_t, double scale, int64_t left,
                                                    int64_t right, bool top_left, double softcap,
                                                    std::optional<Tensor> slopes, std::optional<Tensor> bias,
                                                    std::optional<Tensor> table, std::optional<Tensor> lut,
                                                    double dropout_p, std::optional<Tensor> rng) {
  return forward(q, k, v, cu_q, cu_k, scale, left, right, top_left,
                 {softcap, slopes, bias, table, lut, dropout_p, rng});
}

Gradients varlen_attention_bwd_cpu(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                   Tensor lse, Tensor cu_q, Tensor cu_k, std::optional<Tensor>, int64_t, int64_t,
                                   double scale, int64_t left, int64_t right, bool top_left, bool, double softcap,
                                   std::optional<Tensor> slopes, std::optional<Tensor> bias,
                                   std::optional<Tensor> table, std::optional<Tensor> lut, double dropout_p,
                                   std::optional<Tensor> rng, bool want_dbias) {
  return backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, scale, left, right, top_left,
                  {softcap, slopes, bias, table, lut, dropout_p, rng}, want_dbias);
}

std::tuple<Tensor, Tensor> varlen_attention_disentangled_fwd_cpu(
    Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, std::optional<Tensor>, int64_t, int64_t, double scale,
    int64_t left, int64_t right, bool top_left, double softcap, std::optional<Tensor> slopes,
    std::optional<Tensor> bias, std::optional<Tensor> table, std::optional<Tensor> lut, double dropout_p,
    std::optional<Tensor> rng, std::optional<Tensor> position_keys, std::optional<Tensor> position_queries) {
  return forward(q, k, v, cu_q, cu_k, scale, left, right, top_left,
                 {softcap, slopes, bias, table, lut, dropout_p, rng, position_keys, position_queries});
}

Gradients varlen_attention_disentangled_bwd_cpu(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                                                Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, std::optional<Tensor>,
                                                int64_t, int64_t, double scale, int64_t left, int64_t right,
                                                bool top_left, bool, double softcap, std::optional<Tensor> slopes,
                                                std::optional<Tensor> bias, std::optional<Tensor> table,
                                                std::optional<Tensor> lut, double dropout_p, std::optional<Tensor> rng,
                                                std::optional<Tensor> position_keys,
                                                std::optional<Tensor> position_queries, bool want_dbias) {
  return backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, scale, left, right, top_left,
                  {softcap, slopes, bias, table, lut, dropout_p, rng, position_keys, position_queries}, want_dbias);
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&flowattn::varlen_attention_fwd_cpu));
  m.impl("varlen_attention_bwd", TORCH_BOX(&flowattn::varlen_attention_bwd_cpu));
  m.impl("varlen_attention_disentangled_fwd", TORCH_BOX(&flowattn::varlen_attention_disentangled_fwd_cpu));
  m.impl("varlen_attention_disentangled_bwd", TORCH_BOX(&flowattn::varlen_attention_disentangled_bwd_cpu));
}
