// What the forward and backward attention kernels share: which keys a query row sees, typed rows, scratch memory.
#pragma once

#include "cpu/gemm.h"
#include "cpu/varlen_attention.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

template <typename T>
constexpr T kMinusInfinity = -__builtin_inff();

constexpr int64_t kRowPad = 16;  // scratch rows are a whole number of the widest vectors
inline int64_t padded(int64_t n) { return (n + kRowPad - 1) / kRowPad * kRowPad; }

// Keys begin..end of a sequence.
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange intersect(KeyRange a, KeyRange b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// One sequence of the packed batch: its first rows, lengths and mask.
struct Sequence {
  int64_t q0, k0, lq, lk, shift, left, right;

  Sequence(const VarlenAttention& op, int64_t b)
      : q0(op.cu_q[b]),
        k0(op.cu_k[b]),
        lq(op.cu_q[b + 1] - q0),
        lk(op.cu_k[b + 1] - k0),
        shift(op.shift + (op.top_left ? 0 : lk - lq)),
        left(op.left),
        right(op.right) {}

  // What query row i sees.
  KeyRange row_keys(int64_t i) const {
    int64_t begin = left < 0 ? 0 : min(max(i + shift - left, 0), lk);
    int64_t end = right < 0 ? lk : min(i + shift + right + 1, lk);
    return {begin, max(begin, end)};
  }

  // What query rows begin..end see together; both ends of row_keys grow with the row.
  KeyRange tile_keys(int64_t begin, int64_t end) const { return {row_keys(begin).begin, row_keys(end - 1).end}; }
};

template <typename S>
inline S* row_of(const PackedRows& rows, int64_t t, int64_t head) {
  return static_cast<S*>(rows.data) + t * rows.row + head * rows.head;
}

template <typename T>
inline T& value_of(const RowValues& values, int64_t head, int64_t t) {
  return static_cast<T*>(values.data)[head * values.head + t * values.row];
}

// The rows begin..end of a tile of query rows that see a key of a tile of keys.
struct RowRange {
  int64_t begin, end;
};

inline RowRange seeing_rows(const Sequence& sequence, int64_t first_row, int64_t rows, KeyRange keys) {
  RowRange range{0, rows};
  while (range.begin < range.end && sequence.row_keys(first_row + range.begin).end <= keys.begin) ++range.begin;
  while (range.begin < range.end && sequence.row_keys(first_row + range.end - 1).begin >= keys.end) --range.end;
  return range;
}

// Sets the scores of one query row for keys first..first+n that lie outside `keys` to -inf, the row's padding too.
template <typename T>
inline void hide_keys(T* row, int64_t first, int64_t n, KeyRange keys) {
  constexpr int W = kLanes<T>;
  int64_t begin = min(max(keys.begin - first, 0), n), end = max(min(keys.end - first, n), begin);
  LaneInts<T> lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  Vec<T> hidden = splat(kMinusInfinity<T>);
  for (int64_t j = 0; j < begin; j += W) store(row + j, lane + int(j) < int(begin) ? hidden : load(row + j));
  for (int64_t j = end / W * W; j < n; j += W) store(row + j, lane + int(j) >= int(end) ? hidden : load(row + j));
}

// Hands out consecutive pieces of a thread's scratch memory; with a null base it only counts.
template <typename T>
class ScratchCursor {
 public:
  explicit ScratchCursor(void* base) : base_(static_cast<T*>(base)) {}

  T* take(int64_t count) {
    T* piece = base_ ? base_ + used_ : nullptr;
    used_ += padded(count);
    return piece;
  }
  int64_t bytes() const { return used_ * sizeof(T); }

 private:
  T* base_;
  int64_t used_ = 0;
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
