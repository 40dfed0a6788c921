// Walking a row in vectors: whole ones, and a last one of its n remaining columns.
#pragma once

#include "cpu/simd.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

struct Whole {};
struct Tail {
  int n;
};

template <typename S>
inline Vec<Compute<S>> load(const S* p, Whole) {
  return load(p);
}
template <typename S>
inline Vec<Compute<S>> load(const S* p, Tail tail) {
  return load_tail(p, tail.n);
}
template <typename S>
inline void store(S* p, Vec<Compute<S>> v, Whole) {
  store(p, v);
}
template <typename S>
inline void store(S* p, Vec<Compute<S>> v, Tail tail) {
  store_tail(p, v, tail.n);
}

// Zeroes the lanes outside the row.
template <typename T>
inline Vec<T> inside(Vec<T> v, Whole) {
  return v;
}
template <typename T>
inline Vec<T> inside(Vec<T> v, Tail tail) {
  LaneInts<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < tail.n ? v : Vec<T>{};
}

constexpr int kSlots = 4;  // independent partial sums hide the latency of an addition

// Calls f(column, slot, Whole or Tail) for every vector of a row.
template <typename T, typename F>
inline void each_vector(int64_t width, F f) {
  constexpr int W = kLanes<T>;
  int64_t c = 0;
  for (; c + kSlots * W <= width; c += kSlots * W) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots; ++slot) f(c + slot * W, slot, Whole{});
  }
  for (; c + W <= width; c += W) f(c, 0, Whole{});
  if (c < width) f(c, 0, Tail{int(width - c)});
}

template <typename T>
struct Sum {
  Vec<T> slots[kSlots] = {};

  T total() const { return reduce_sum<T>((slots[0] + slots[1]) + (slots[2] + slots[3])); }
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
