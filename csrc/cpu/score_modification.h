// What the forward and backward attention kernels do to one row of scores beyond scale * q . k: softcap, position
// biases, dropout, and the gradients of the biases (see attention_tile.h for the namespace).
#pragma once

#include "common/philox.h"
#include "cpu/attention_tile.h"
#include "cpu/position_terms.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

template <typename T>
struct ScoreScratch {
  T *by_distance = nullptr, *dby_distance = nullptr, *cap_slope = nullptr, *keep = nullptr;
  uint32_t* words = nullptr;
  PositionScratch<T> positions;

  ScoreScratch(const VarlenAttention& op, ScratchCursor<T>& cursor) : positions(op, cursor) {
    const ScoreOptions& scores = op.scores;
    if (scores.slopes || scores.table) by_distance = cursor.take(op.max_span + kRowPad);
    if (scores.table && op.dtable) dby_distance = cursor.take(op.max_span + kRowPad);
    if (scores.softcap > 0) cap_slope = cursor.take(op.max_keys);
    if (!scores.dropout) return;
    keep = cursor.take(op.max_keys);
    words = reinterpret_cast<uint32_t*>(cursor.take(padded(op.max_keys) + kRowPad));
  }
};

// dst[j] += src[j]; nothing beyond n is touched.
template <typename T, typename S>
inline void add_row(T* dst, const S* src, int64_t n) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(dst + j, load(dst + j) + load(src + j));
  if (j < n) store_tail(dst + j, load_tail(dst + j, int(n - j)) + load_tail(src + j, int(n - j)), int(n - j));
}

// dst[j] *= src[j], the rows' padding too.
template <typename T>
inline void multiply_row(T* dst, const T* src, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes<T>) store(dst + j, load(dst + j) * load(src + j));
}

// The rows of one query tile of one head; query rows and keys count from the start of the sequence.
template <typename T>
class ScoreModification {
 public:
  ScoreModification(const VarlenAttention& op, const ScoreScratch<T>& scratch, const Sequence& sequence,
                    const VarlenTask& task)
      : op_(op),
        options_(op.scores),
        at_(scratch),
        sequence_(sequence),
        b_(task.sequence),
        positions_(op, scratch.positions, task.group) {}

  // Must be called before the rows first_row..first_row+rows of `head`, which are q (rows, ldq) times scale, and any
  // part of `keys` are visited.
  void begin(int64_t head, int64_t first_row, int64_t rows, KeyRange keys, const T* q, int64_t ldq) {
    head_ = head, first_row_ = first_row;
    if (!options_.modified) return;
    last_row_ = first_row + rows - 1, first_key_ = keys.begin;
    span_ = keys.end > keys.begin ? rows - 1 + keys.end - keys.begin : 0;
    if (options_.positions.rows) positions_.begin_queries(head, distance(0), span_, rows, q, ldq);
    if (!at_.by_distance) return;
    const T slope = options_.slopes ? options_.slopes[b_ * options_.slope_batch + head * options_.slope_head] : 0;
    const T* table = static_cast<const T*>(options_.table) + (options_.table ? head * options_.table_head : 0);
    for (int64_t d = 0; d < span_; ++d) {
      const int64_t distance = this->distance(d);
      at_.by_distance[d] = -slope * T(distance < 0 ? -distance : distance);
      if (options_.table) at_.by_distance[d] += table[bucket(distance) * options_.table_row];
    }
    if (at_.dby_distance) __builtin_memset(at_.dby_distance, 0, span_ * sizeof(T));
  }

  // Must be called before `rows` of the tile visit the keys kt (width, ldk), transposed.
  void begin_keys(RowRange rows, KeyRange keys, const T* kt, int64_t ldk) {
    if (options_.positions.rows) {
      const int64_t d = span_index(first_row_ + rows.end - 1, keys);
      positions_.begin_keys(kt, ldk, keys.end - keys.begin, rows.end - rows.begin, d);
    }
  }

  // Turns scale * q . k of row i and `keys` into scores; fills the row's padding with anything.
  void modify(T* scores, int64_t i, KeyRange keys) const {
    const int64_t n = keys.end - keys.begin;
    if (options_.softcap > 0) {
      const T cap = T(options_.softcap);
      for (int64_t j = 0; j < n; j += kLanes<T>) {
        const Vec<T> t = tanh(load(scores + j) / cap);
        store(scores + j, t * cap);
        store(at_.cap_slope + j, 1 - t * t);
      }
    }
    if (at_.by_distance) add_row(scores, at_.by_distance + span_index(i, keys), n);
    const DenseBias& bias = options_.bias;
    if (bias.data) FA_DISPATCH_STORAGE(bias, add_bias<S>(scores, i, keys));
    if (options_.positions.rows) positions_.add(scores, i - first_row_, span_index(i, keys));
  }

  // The factors of the probabilities of row i under dropout: 0, or 1 / (1 - p).
  const T* keep(int64_t i, KeyRange keys) const {
    const int64_t first = keys.begin / 4, groups = (keys.end + 3) / 4 - first, n = keys.end - keys.begin;
    const uint32_t row = uint32_t(i), stream = uint32_t(b_ * op_.heads + head_), offset = options_.offset;
    const PhiloxKey seed = {options_.seed_low, options_.seed_high};
    uint32_t* words = at_.words;
#pragma omp simd
    for (int64_t g = 0; g < groups; ++g) {
      const PhiloxWords four = dropout_words(uint32_t(first + g), row, stream, offset, seed);
      words[4 * g] = four.x, words[4 * g + 1] = four.y, words[4 * g + 2] = four.z, words[4 * g + 3] = four.w;
    }
    const uint32_t* begin = words + keys.begin % 4;
    const uint32_t threshold = options_.threshold;
    const T kept = T(options_.kept);
    for (int64_t j = 0; j < n; ++j) at_.keep[j] = begin[j] >= threshold ? kept : T(0);
    return at_.keep;
  }

  // Adds the gradients of row i's scores to those of the biases, then turns them into gradients of scale * q . k.
  // Must follow modify() of the same row.
  void gradient(T* ds, int64_t i, KeyRange keys) const {
    const int64_t n = keys.end - keys.begin;
    if (op_.dbias) {
      T* row = static_cast<T*>(op_.dbias) + b_ * op_.dbias_batch + head_ * op_.dbias_head + i * op_.dbias_row;
      add_row(row + keys.begin, ds, n);
    }
    if (at_.dby_distance) add_row(at_.dby_distance + span_index(i, keys), ds, n);
    if (options_.positions.rows) positions_.gradient(ds, i - first_row_, span_index(i, keys));
    if (options_.softcap > 0) multiply_row(ds, at_.cap_slope, n);
  }

  // After gradient() of all `rows` that see the keys k (keys, ldq): adds what is missing from dk (keys, ldq).
  void end_keys(RowRange rows, const T* k, T* dk, int64_t ldq) const {
    if (options_.positions.rows) positions_.end_keys(k, dk, ldq, rows.end - rows.begin);
  }

  // After all keys: adds what is missing from dq (rows, ldq), and writes the tile's share of the gradient of the table.
  void end(int64_t tile, T* dq) const {
    if (options_.positions.rows) positions_.end_queries(dq);
    if (!at_.dby_distance) return;
    T* buckets = static_cast<T*>(op_.dtable) + (tile * op_.heads + head_) * options_.buckets;
    __builtin_memset(buckets, 0, options_.buckets * sizeof(T));
    for (int64_t d = 0; d < span_; ++d) buckets[bucket(distance(d))] += at_.dby_distance[d];
  }

 private:
  // by_distance holds the distances of the tile in ascending order: the last row and the first key come first.
  int64_t span_index(int64_t i, KeyRange keys) const { return keys.begin - first_key_ + last_row_ - i; }
  int64_t distance(int64_t index) const { return index + first_key_ - last_row_ - sequence_.shift; }
  int64_t bucket(int64_t distance) const {
    return options_.lut[min(max(distance, -options_.reach), options_.reach) + options_.reach];
  }

  template <typename S>
  void add_bias(T* scores, int64_t i, KeyRange keys) const {
    const DenseBias& bias = options_.bias;
    const int64_t n = keys.end - keys.begin;
    const S* row = static_cast<const S*>(bias.data) + b_ * bias.batch + head_ * bias.head + i * bias.row;
    row += keys.begin * bias.key;
    if constexpr (sizeof(Compute<S>) == sizeof(T)) {
      if (bias.key == 1) return add_row(scores, row, n);
    }
    for (int64_t j = 0; j < n; ++j) scores[j] += T(scalar(row[j * bias.key]));
  }

  const VarlenAttention& op_;
  const ScoreOptions& options_;
  const ScoreScratch<T> at_;
  const Sequence& sequence_;
  const int64_t b_;
  int64_t head_ = 0, first_row_ = 0, last_row_ = 0, first_key_ = 0, span_ = 0;
  PositionTerms<T> positions_;
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
