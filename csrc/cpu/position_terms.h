// The disentangled bias inside the attention kernels: row i and key j add scale * (q_i . keys[x] + k_j . queries[x]) to
// their score, with x = lut[distance of j from i] (see attention_tile.h for the namespace).
//
// A tile of query rows is multiplied once with the rows of the first table that any of its keys needs, and each of its
// tiles of keys with those of the second; scores pick their terms out of both products, and the gradients of the scores
// are added up in the shape of the products before they are multiplied back.
#pragma once

#include "cpu/attention_tile.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

template <typename T>
struct PositionScratch {
  int64_t ldk;             // of the products with keys
  int32_t* row = nullptr;  // (distances of the tile,), table rows counted from the lowest of the tile
  T* packed = nullptr;     // (width, rows of the tile), transposed rows of the first table
  T *of_queries = nullptr, *dof_queries = nullptr;  // (query rows, rows of the tile)
  T *of_keys = nullptr, *dof_keys = nullptr;        // (rows of the key tile, ldk)

  PositionScratch(const VarlenAttention& op, ScratchCursor<T>& cursor) : ldk(padded(op.max_keys)) {
    const PositionTables& tables = op.scores.positions;
    if (tables.rows == 0) return;
    const int64_t rows = padded(min(tables.rows, tables.step * op.max_span + 1));
    row = reinterpret_cast<int32_t*>(cursor.take(op.max_span));
    packed = cursor.take(op.width * rows);
    of_queries = cursor.take(op.max_rows * rows);
    of_keys = cursor.take(rows * ldk);
    if (!op.dq.data) return;
    dof_queries = cursor.take(op.max_rows * rows);
    dof_keys = cursor.take(rows * ldk);
  }
};

// Indices of a table's rows.
struct TableRows {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

inline TableRows rows_between(const int32_t* row, int64_t n) {
  int32_t least = row[0], most = row[0];
  for (int64_t d = 1; d < n; ++d) {
    least = row[d] < least ? row[d] : least;
    most = row[d] > most ? row[d] : most;
  }
  return {least, most + 1};
}

// One query tile of one head. `d` is the distance of a row from the first key in question, counted from the lowest
// distance of the tile: row[d], row[d + 1], ... are the table rows of the keys that follow.
template <typename T>
class PositionTerms {
 public:
  PositionTerms(const VarlenAttention& op, const PositionScratch<T>& scratch, int64_t group)
      : op_(op), tables_(op.scores.positions), at_(scratch), group_(group) {}

  // `lowest` is the lowest of the `span` distances between the query rows q (rows, ldq), times scale, and their keys.
  void begin_queries(int64_t head, int64_t lowest, int64_t span, int64_t rows, const T* q, int64_t ldq) {
    head_ = head, rows_ = rows, q_ = q, ldq_ = ldq, span_ = span;
    if (span == 0) return;
    const int64_t reach = op_.scores.reach;
    for (int64_t d = 0; d < span; ++d) at_.row[d] = op_.scores.lut[min(max(lowest + d, -reach), reach) + reach];
    touched_ = rows_between(at_.row, span);
    for (int64_t d = 0; d < span; ++d) at_.row[d] -= int32_t(touched_.begin);
    ldx_ = padded(touched_.count());
    if (!tables_.keys) return;
    pack_transposed<T>(table(tables_.keys), stride(), touched_.count(), op_.width, at_.packed, ldx_);
    gemm<T>(rows, touched_.count(), op_.width, q, ldq, 1, at_.packed, ldx_, at_.of_queries, ldx_, false);
    if (at_.dof_queries) __builtin_memset(at_.dof_queries, 0, rows * ldx_ * sizeof(T));
  }

  // Before the rows of a tile of n keys kt (width, ldk), transposed, are visited; n_rows query rows see some of them.
  // `d` is that of the last of these rows.
  void begin_keys(const T* kt, int64_t ldk, int64_t n, int64_t n_rows, int64_t d) {
    n_ = n;
    if (!tables_.queries || n_rows == 0) return;
    by_key_ = rows_between(at_.row + d, n_rows - 1 + n);
    const T* queries = table(tables_.queries) + by_key_.begin * stride();
    gemm<T>(by_key_.count(), n, op_.width, queries, stride(), 1, kt, ldk, at_.of_keys, at_.ldk, false);
    if (at_.dof_keys) __builtin_memset(at_.dof_keys, 0, by_key_.count() * at_.ldk * sizeof(T));
  }

  // Adds the terms of row r of the tile to its scores.
  void add(T* scores, int64_t r, int64_t d) const {
    const int32_t* row = at_.row + d;
    if (tables_.keys) {
      const T* terms = at_.of_queries + r * ldx_;
#pragma omp simd
      for (int64_t j = 0; j < n_; ++j) scores[j] += terms[row[j]];
    }
    if (tables_.queries) {
      const T* terms = at_.of_keys;
      const int32_t first = int32_t(by_key_.begin), ldk = int32_t(at_.ldk);
      const T scale = T(op_.scale);
#pragma omp simd
      for (int64_t j = 0; j < n_; ++j) scores[j] += scale * terms[(row[j] - first) * ldk + int32_t(j)];
    }
  }

  // Takes the gradients of the scores of row r of the tile.
  void gradient(const T* ds, int64_t r, int64_t d) const {
    const int32_t* row = at_.row + d;
    if (tables_.keys) {
      T* sums = at_.dof_queries + r * ldx_;
      for (int64_t j = 0; j < n_; ++j) sums[row[j]] += ds[j];
    }
    if (tables_.queries) {
      T* sums = at_.dof_keys;
      const int32_t first = int32_t(by_key_.begin), ldk = int32_t(at_.ldk);
#pragma omp simd  // no two keys share an element
      for (int64_t j = 0; j < n_; ++j) sums[(row[j] - first) * ldk + int32_t(j)] += ds[j];
    }
  }

  // After all rows of the tile of keys k (n, ldq): adds to their gradients dk (n, ldq) and to that of the second table.
  void end_keys(const T* k, T* dk, int64_t ldq, int64_t n_rows) const {
    if (!tables_.queries || n_rows == 0) return;
    const int64_t count = by_key_.count(), ldk = at_.ldk;
    for (int64_t x = 0; x < count * ldk; x += kLanes<T>) {
      store(at_.dof_keys + x, load(at_.dof_keys + x) * T(op_.scale));
    }
    const T* queries = table(tables_.queries) + by_key_.begin * stride();
    gemm<T>(n_, op_.width, count, at_.dof_keys, 1, ldk, queries, stride(), dk, ldq, true);
    if (!op_.dposition_queries) return;
    T* dqueries = dtable(op_.dposition_queries) + by_key_.begin * op_.width;
    gemm<T>(count, op_.width, n_, at_.dof_keys, ldk, 1, k, ldq, dqueries, op_.width, true);
  }

  // After all keys: adds to dq (rows, ldq), which lacks the factor scale, and to the gradient of the first table.
  void end_queries(T* dq) const {
    if (!tables_.keys || span_ == 0) return;
    const int64_t count = touched_.count();
    gemm<T>(rows_, op_.width, count, at_.dof_queries, ldx_, 1, table(tables_.keys), stride(), dq, ldq_, true);
    if (!op_.dposition_keys) return;
    gemm<T>(count, op_.width, rows_, at_.dof_queries, 1, ldx_, q_, ldq_, dtable(op_.dposition_keys), op_.width, true);
  }

 private:
  int64_t stride() const { return op_.heads * op_.width; }
  // The head's part of a table, and of this group's sum of its gradient, from the tile's lowest row on.
  const T* table(const void* data) const {
    return static_cast<const T*>(data) + touched_.begin * stride() + head_ * op_.width;
  }
  T* dtable(void* data) const {
    return static_cast<T*>(data) + ((group_ * op_.heads + head_) * tables_.rows + touched_.begin) * op_.width;
  }

  const VarlenAttention& op_;
  const PositionTables& tables_;
  const PositionScratch<T> at_;
  const int64_t group_;
  int64_t head_ = 0, rows_ = 0, span_ = 0, n_ = 0, ldq_ = 0, ldx_ = 0;
  const T* q_ = nullptr;
  TableRows touched_{}, by_key_{};  // of the tables; of the tile's part of them
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
