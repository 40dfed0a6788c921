// Tiles (tokens, lanes) of channel tensors in either memory order, and the activations of a selective scan.
#pragma once

#include "cpu/scan_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

// A tile holds a vector of channels for each token, in the order of the recurrence; `lanes` of them exist.
struct TilePlace {
  const ScanSegment& segment;
  int64_t begin, tokens, channel;
  int lanes;
};

// Whether blocks of the tile can be moved as vectors along time.
template <typename E>
inline bool moves_along_time(const ScanTensor& x, const TilePlace& place) {
  return x.time == 1 && x.head != 1 && place.lanes == kLanes<E>;
}

// The first of W tokens from k on in memory, and the row of the tile that token number j there has.
struct TimeBlock {
  int64_t begin;
  bool reversed;
  template <int W>
  int64_t row(int64_t k, int j) const {
    return k + (reversed ? W - 1 - j : j);
  }
};

template <int W>
inline TimeBlock time_block(const TilePlace& place, int64_t k) {
  const bool reversed = place.segment.step < 0;
  return {place.begin + k + (reversed ? W - 1 : 0), reversed};
}

template <typename S>
inline void read_tile(const ScanTensor& x, const TilePlace& place, Compute<S>* tile) {
  using E = Compute<S>;
  constexpr int W = kLanes<E>;
  int64_t k = 0;
  if (x.head == 1) {
    for (; k < place.tokens; ++k) {
      store(tile + k * W, load_lanes<E>(at<const S>(x, place.segment, place.begin + k, place.channel), place.lanes));
    }
    return;
  }
  for (; moves_along_time<E>(x, place) && k + W <= place.tokens; k += W) {
    const TimeBlock block = time_block<W>(place, k);
    Vec<E> rows[W];
    for (int l = 0; l < W; ++l) rows[l] = load(at<const S>(x, place.segment, block.begin, place.channel + l));
    transpose_registers<E>(rows);
    for (int j = 0; j < W; ++j) store(tile + block.row<W>(k, j) * W, rows[j]);
  }
  for (; k < place.tokens; ++k) {
    Vec<E> row = {};
    const S* from = at<const S>(x, place.segment, place.begin + k, place.channel);
    for (int l = 0; l < place.lanes; ++l) row[l] = load_one(from + l * x.head);
    store(tile + k * W, row);
  }
}

template <typename S>
inline void write_tile(const ScanTensor& x, const TilePlace& place, const Compute<S>* tile) {
  using E = Compute<S>;
  constexpr int W = kLanes<E>;
  int64_t k = 0;
  if (x.head == 1) {
    for (; k < place.tokens; ++k) {
      store_lanes<E>(at<S>(x, place.segment, place.begin + k, place.channel), load(tile + k * W), place.lanes);
    }
    return;
  }
  for (; moves_along_time<E>(x, place) && k + W <= place.tokens; k += W) {
    const TimeBlock block = time_block<W>(place, k);
    Vec<E> rows[W];
    for (int j = 0; j < W; ++j) rows[j] = load(tile + block.row<W>(k, j) * W);
    transpose_registers<E>(rows);
    for (int l = 0; l < W; ++l) store(at<S>(x, place.segment, block.begin, place.channel + l), rows[l]);
  }
  for (; k < place.tokens; ++k) {
    S* to = at<S>(x, place.segment, place.begin + k, place.channel);
    for (int l = 0; l < place.lanes; ++l) store_one(to + l * x.head, tile[k * W + l]);
  }
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(s) with s = y / (2 + y) <= 1/3: no digit of a small y is lost.
inline Vec<float> log1p_of_fraction(Vec<float> y) {
  const Vec<float> s = y / (y + 2.0f), q = s * s;
  Vec<float> p = q * (1.0f / 13) + 1.0f / 11;  // the series; the next term is below 5e-9 of the first
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * s * (p * q + 1.0f);
}

inline Vec<double> log1p_of_fraction(Vec<double> y) {
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_log1p(y[i]);
  return y;
}

// 1 / (1 + exp(-x)).
template <typename V>
inline V sigmoid(V x) {
  return 1 / (exp(-x) + 1);
}

// log(1 + exp(x)) and its slope; from 20 on x and 1, as in torch.
template <typename V>
inline V softplus(V x, V* slope = nullptr) {
  const V y = exp(x > 0 ? -x : x), value = log1p_of_fraction(y) + (x > 0 ? x : V{});
  if (slope) *slope = x > 20 ? 1 + V{} : (x > 0 ? 1 + V{} : y) / (1 + y);
  return x > 20 ? x : value;
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
