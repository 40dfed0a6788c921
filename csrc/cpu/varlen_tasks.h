// The list of tasks that the threads of varlen_attention share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/varlen_attention.h"

namespace flowattn {

constexpr int64_t kWhole = int64_t(1) << 40;  // as a task's step: the whole sequence

inline int64_t tiles_of(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }

// The sequences with the most work first, so that the threads finish together.
class Sequences {
 public:
  Sequences(const VarlenAttention& op, int64_t batch) : op_(op), order_(batch), first_tile_(batch + 1, 0) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int64_t b = 0; b < count(); ++b) first_tile_[b + 1] = first_tile_[b] + tiles_of(queries(b), kQueryTile);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return pairs(a) > pairs(b); });
    for (int64_t b : order_) all_pairs += pairs(b);
    most_pairs = order_.empty() ? 0 : pairs(order_[0]);
  }

  int64_t count() const { return order_.size(); }
  int64_t query_tiles() const { return first_tile_.back(); }
  int64_t queries(int64_t b) const { return op_.cu_q[b + 1] - op_.cu_q[b]; }
  int64_t keys(int64_t b) const { return op_.cu_k[b + 1] - op_.cu_k[b]; }
  double pairs(int64_t b) const { return double(queries(b)) * keys(b); }

  // One task per `q_step` query rows and `k_step` keys of every sequence. A sequence without query rows, or without
  // keys, has a task too: the backward must write the zeros of its other side.
  std::vector<VarlenTask> tasks(int64_t q_step, int64_t k_step) const {
    std::vector<VarlenTask> tasks;
    for (int64_t b : order_) {
      const int64_t lq = queries(b), lk = keys(b);
      // Last rows first: with a causal mask they see the most keys.
      for (int64_t row = lq == 0 ? 0 : (lq - 1) / q_step * q_step; row >= 0; row -= q_step) {
        for (int64_t key = 0; key == 0 || key < lk; key += k_step) {
          tasks.push_back({b, row, std::min(row + q_step, lq), key, std::min(key + k_step, lk), first_tile_[b], 0});
        }
      }
    }
    return tasks;
  }

  // The tasks of `rows` query rows and all keys, in groups of the same rows of all sequences, or of one sequence each;
  // group g holds tasks begins[g]..begins[g + 1].
  std::vector<VarlenTask> row_groups(bool across_sequences, int64_t rows, std::vector<int64_t>& begins) const {
    std::vector<VarlenTask> tasks;
    begins.assign(1, 0);
    int64_t longest = 0;
    for (int64_t b = 0; b < count(); ++b) longest = std::max(longest, queries(b));
    const auto add = [&](int64_t b, int64_t row) {
      if (row < queries(b)) tasks.push_back({b, row, std::min(row + rows, queries(b)), 0, keys(b), first_tile_[b], 0});
    };
    if (across_sequences) {
      for (int64_t row = 0; row < longest; row += rows, begins.push_back(tasks.size())) {
        for (int64_t b = 0; b < count(); ++b) add(b, row);
      }
    } else {
      for (int64_t b : order_) {
        for (int64_t row = 0; row < queries(b); row += rows, begins.push_back(tasks.size())) add(b, row);
      }
    }
    return tasks;
  }

  // One task per sequence, in at most `groups` groups of about equal work.
  std::vector<VarlenTask> sequence_groups(int64_t groups, std::vector<int64_t>& begins) const {
    std::vector<VarlenTask> tasks;
    begins.assign(1, 0);
    for (int64_t g = 0; g < std::min(groups, count()); ++g, begins.push_back(tasks.size())) {
      for (int64_t place = g; place < count(); place += groups) {  // neighbours in order_ have about the same work
        const int64_t b = order_[place];
        tasks.push_back({b, 0, queries(b), 0, keys(b), first_tile_[b], g});
      }
    }
    return tasks;
  }

  double all_pairs = 0, most_pairs = 0;

 private:
  const VarlenAttention& op_;
  std::vector<int64_t> order_, first_tile_;
};

}  // namespace flowattn
