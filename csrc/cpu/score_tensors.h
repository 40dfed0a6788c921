// Checks the tensors behind ScoreOptions and keeps those alive that had to be converted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/philox.h"
#include "cpu/storage.h"
#include "cpu/varlen_attention.h"

namespace flowattn {

class ScoreTensors {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

 public:
  // The score arguments of the private ops, in the order of their schemas.
  double softcap;
  std::optional<Tensor> slopes, bias, table, lut;
  double dropout_p;
  std::optional<Tensor> rng;
  std::optional<Tensor> position_keys = std::nullopt, position_queries = std::nullopt;

  // `op` has everything else that both directions share.
  ScoreOptions describe(const char* name, const VarlenAttention& op, int64_t batch) {
    ScoreOptions scores{};
    FA_CHECK(softcap >= 0, name, "softcap must be >= 0", softcap);
    scores.softcap = softcap;
    if (slopes) read_slopes(name, op, batch, scores);
    if (bias) read_bias(name, op, batch, scores);
    const bool positions = position_keys || position_queries;
    FA_CHECK(!positions || !(bias || table), name, "position tables stand alone", "another bias with them");
    FA_CHECK((table || positions) == lut.has_value(), name, "a table and rel_lut must be given together",
             "one of them");
    if (table) read_table(name, op, scores);
    if (positions) read_positions(name, op, scores);
    scores.modified = softcap > 0 || slopes || bias || table || positions;
    FA_CHECK(dropout_p >= 0 && dropout_p < 1, name, "dropout_p must lie in [0, 1)", dropout_p);
    if (dropout_p > 0) read_rng(name, scores);
    return scores;
  }

 private:
  void read_slopes(const char* name, const VarlenAttention& op, int64_t batch, ScoreOptions& scores) const {
    const bool each = slopes->dim() == 2;
    const bool fits = slopes->is_cpu() && slopes->scalar_type() == ScalarType::Float && (each || slopes->dim() == 1) &&
                      slopes->size(each) == op.heads && (!each || slopes->size(0) == batch);
    FA_CHECK(fits, name, "alibi_slopes must be a float32 CPU tensor of shape (H,) or (B, H)",
             shape_text(slopes->sizes()));
    scores.slopes = slopes->const_data_ptr<float>();
    scores.slope_batch = each ? slopes->stride(0) : 0, scores.slope_head = slopes->stride(each);
  }

  void read_bias(const char* name, const VarlenAttention& op, int64_t batch, ScoreOptions& scores) const {
    const Tensor& x = *bias;
    const bool fits = x.is_cpu() && x.dim() == 4 && (x.size(0) == 1 || x.size(0) == batch) &&
                      (x.size(1) == 1 || x.size(1) == op.heads);
    FA_CHECK(fits, name, "bias must be a CPU tensor of shape (1 or B, 1 or H, S, S)", shape_text(x.sizes()));
    const Storage storage = storage_of(name, "bias", x);
    FA_CHECK(storage == op.storage || storage == Storage::kFloat, name, "bias must have the dtype of q, or float32",
             toString(x.scalar_type()));
    int64_t lq = 0, lk = 0;
    for (int64_t b = 0; b < batch; ++b) {
      lq = std::max<int64_t>(lq, op.cu_q[b + 1] - op.cu_q[b]), lk = std::max<int64_t>(lk, op.cu_k[b + 1] - op.cu_k[b]);
    }
    FA_CHECK_VALUE(
        x.size(2) >= lq && x.size(3) >= lk, name,
        "bias must cover the longest sequences, " + std::to_string(lq) + " queries and " + std::to_string(lk) + " keys",
        shape_text(x.sizes()));
    scores.bias = {storage,     x.const_data_ptr(), x.size(0) == 1 ? 0 : x.stride(0), x.size(1) == 1 ? 0 : x.stride(1),
                   x.stride(2), x.stride(3)};
  }

  void read_table(const char* name, const VarlenAttention& op, ScoreOptions& scores) {
    const bool fits = table->is_cpu() && table->dim() == 2 && table->size(1) == op.heads;
    FA_CHECK(fits, name, "rel_table must be a CPU tensor of shape (buckets, H)", shape_text(table->sizes()));
    storage_of(name, "rel_table", *table);
    table = torch::stable::to(*table, wide(op));
    scores.table = table->const_data_ptr(), scores.buckets = table->size(0);
    scores.table_row = table->stride(0), scores.table_head = table->stride(1);
    read_lut(name, scores.buckets, scores);
  }

  void read_positions(const char* name, const VarlenAttention& op, ScoreOptions& scores) {
    PositionTables& tables = scores.positions;
    tables.rows = (position_keys ? position_keys : position_queries)->size(0);
    tables.keys = read_position_table(name, "position_keys", op, tables.rows, position_keys);
    tables.queries = read_position_table(name, "position_queries", op, tables.rows, position_queries);
    read_lut(name, tables.rows, scores);
    for (int64_t r = 1; r < lut->size(0); ++r) {
      tables.step = std::max<int64_t>(tables.step, std::abs(scores.lut[r] - scores.lut[r - 1]));
    }
  }

  const void* read_position_table(const char* name, const char* which, const VarlenAttention& op, int64_t rows,
                                  std::optional<Tensor>& given) {
    if (!given) return nullptr;
    const bool fits = given->is_cpu() && given->dim() == 3 && given->size(0) == rows && given->size(1) == op.heads &&
                      given->size(2) == op.width;
    FA_CHECK(fits, name, std::string(which) + " must be a CPU tensor of shape (rows, H, D)",
             shape_text(given->sizes()));
    storage_of(name, which, *given);
    given = torch::stable::contiguous(torch::stable::to(*given, wide(op)));
    return given->const_data_ptr();
  }

  static ScalarType wide(const VarlenAttention& op) {
    return op.storage == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  }

  void read_lut(const char* name, int64_t buckets, ScoreOptions& scores) {
    const ScalarType dtype = lut->scalar_type();
    const bool indexes = lut->is_cpu() && (dtype == ScalarType::Short || dtype == ScalarType::Int) && lut->dim() == 1 &&
                         lut->size(0) % 2 == 1;
    FA_CHECK(indexes, name, "rel_lut must be an int16 or int32 CPU tensor of odd length", shape_text(lut->sizes()));
    lut = torch::stable::contiguous(torch::stable::to(*lut, ScalarType::Int));
    scores.lut = lut->const_data_ptr<int32_t>(), scores.reach = lut->size(0) / 2;
    const auto [least, most] = std::minmax_element(scores.lut, scores.lut + lut->size(0));
    FA_CHECK_VALUE(*least >= 0 && *most < buckets, name, "rel_lut must hold buckets 0.." + std::to_string(buckets - 1),
                   std::to_string(*least) + ".." + std::to_string(*most));
  }

  void read_rng(const char* name, ScoreOptions& scores) const {
    const bool fits = rng && rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->dim() == 1 &&
                      rng->size(0) == 2 && rng->stride(0) == 1;
    FA_CHECK(fits, name, "rng must be a contiguous int64 CPU tensor of shape (2,) with dropout",
             rng ? shape_text(rng->sizes()) : "none");
    const int64_t* values = rng->const_data_ptr<int64_t>();
    scores.dropout = true, scores.threshold = dropout_threshold(dropout_p), scores.kept = 1 / (1 - dropout_p);
    scores.seed_low = static_cast<uint32_t>(values[0]), scores.seed_high = static_cast<uint64_t>(values[0]) >> 32;
    scores.offset = static_cast<uint32_t>(values[1]);
  }
};

}  // namespace flowattn
