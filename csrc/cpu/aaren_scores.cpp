// The scores of aaren_attention on the CPU.
#include "cpu/aaren_scores.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "aaren_attention";

AarenScores describe(const Tensor& query, const Tensor& keys, double scale) {
  FA_CHECK(keys.dim() == 4 && query.dim() == 3, kOp, "query and keys must have shapes (B or 1, H, K) and (B, T, H, K)",
           shape_text(query.sizes()) + " and " + shape_text(keys.sizes()));
  AarenScores op{};
  op.storage = storage_of(kOp, "keys", keys), op.scale = scale;
  op.tokens = keys.size(1), op.heads = keys.size(2), op.width = keys.size(3);
  check_scan_tensor(kOp, "keys", keys, keys.scalar_type(), {keys.size(0), op.tokens, op.heads, op.width}, true);
  const int64_t queries = query.size(0) == 1 ? 1 : keys.size(0);
  check_scan_tensor(kOp, "query", query, keys.scalar_type(), {queries, op.heads, op.width}, true);
  op.query = scan_state(query), op.keys = scan_tensor(keys);
  if (queries == 1) op.query.row = 0;
  return op;
}

int64_t items_of(const AarenScores& op, const Tensor& keys) {
  return keys.size(0) * ((op.tokens + kScoreTokens - 1) / kScoreTokens);
}

Tensor aaren_scores_fwd_cpu(Tensor query, Tensor keys, double scale) {
  AarenScores op = describe(query, keys, scale);
  const Tensor scores = torch::stable::new_empty(keys, {keys.size(0), op.tokens, op.heads}, compute_dtype(keys));
  op.scores = scan_tensor(scores);
  parallel_items(items_of(op, keys), double(keys.numel()), 0,
                 [&](int64_t begin, int64_t end, void*) { FA_ISA_CALL(aaren_scores_fwd, op, begin, end); });
  return scores;
}

// Sums the parts of each query in the order of the items.
template <typename T>
void sum_parts(const Tensor& parts, const Tensor& total) {
  const int64_t queries = total.size(0), n = total.size(1) * total.size(2);
  const int64_t per_query = queries ? parts.size(0) / queries : 0;
  const T* in = static_cast<const T*>(parts.data_ptr());
  T* out = static_cast<T*>(total.data_ptr());
  std::vector<double> sums(n);
  for (int64_t q = 0; q < queries; ++q) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t part = q * per_query; part < (q + 1) * per_query; ++part) {
      for (int64_t j = 0; j < n; ++j) sums[j] += in[part * n + j];
    }
    std::copy(sums.begin(), sums.end(), out + q * n);
  }
}

std::tuple<Tensor, Tensor> aaren_scores_bwd_cpu(Tensor dscores, Tensor query, Tensor keys, double scale) {
  AarenScores op = describe(query, keys, scale);
  const ScalarType compute = compute_dtype(keys);
  check_scan_tensor(kOp, "dscores", dscores, compute, {keys.size(0), op.tokens, op.heads}, false);
  const Tensor dkeys = torch::stable::new_empty(keys, {keys.size(0), op.tokens, op.heads, op.width});
  Tensor dquery = torch::stable::new_empty(query, {query.size(0), op.heads, op.width});
  const int64_t items = items_of(op, keys);
  const Tensor parts = torch::stable::new_empty(keys, {items, op.heads, op.width}, compute);
  const Tensor total = torch::stable::new_empty(keys, {query.size(0), op.heads, op.width}, compute);
  op.scores = scan_tensor(dscores), op.dkeys = scan_tensor(dkeys), op.dquery_parts = scan_state(parts);
  parallel_items(items, 3.0 * keys.numel(), 0,
                 [&](int64_t begin, int64_t end, void*) { FA_ISA_CALL(aaren_scores_bwd, op, begin, end); });
  compute == ScalarType::Double ? sum_parts<double>(parts, total) : sum_parts<float>(parts, total);
  torch::stable::copy_(dquery, total);
  return {dquery, dkeys};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("aaren_scores_fwd", TORCH_BOX(&flowattn::aaren_scores_fwd_cpu));
  m.impl("aaren_scores_bwd", TORCH_BOX(&flowattn::aaren_scores_bwd_cpu));
}
