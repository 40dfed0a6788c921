// Feature maps of linear attention on rows in the compute type, and products with their derivatives.
#pragma once

#include "cpu/linear_attention.h"
#include "cpu/scan_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

constexpr float kLargestExponent = 80;
constexpr float kReluEps = 1e-6f;

// row = f(row, index) lane by lane.
template <typename E, typename F>
inline __attribute__((always_inline)) void map_row(E* row, int64_t width, const F& f) {
  for_lanes<E>(width, [&](int64_t j, int n) __attribute__((always_inline)) {
    store_lanes<E>(row + j, f(load_lanes<E>(row + j, n), j, n), n);
  });
}

template <typename E>
inline E sum_row(const E* row, int64_t width) {
  Vec<E> sum = {};
  for_lanes<E>(width, [&](int64_t j, int n) __attribute__((always_inline)) { sum += load_lanes<E>(row + j, n); });
  return reduce_sum<E>(sum);
}

template <typename E>
inline E dot_rows(const E* x, const E* y, int64_t width) {
  Vec<E> sum = {};
  for_lanes<E>(width, [&](int64_t j, int n)
                          __attribute__((always_inline)) { sum += load_lanes<E>(x + j, n) * load_lanes<E>(y + j, n); });
  return reduce_sum<E>(sum);
}

template <typename E>
inline E max_row(const E* row, int64_t width) {
  E largest = row[0];
  for (int64_t j = 1; j < width; ++j) largest = row[j] > largest ? row[j] : largest;
  return largest;
}

// x = phi(x) on rows of `ld` elements.
template <typename E>
void map_rows(FeatureMap map, E* x, int64_t ld, int64_t rows, int64_t width) {
  const Vec<E> zero = {}, one = splat(E(1)), most = splat(E(kLargestExponent));
  for (int64_t i = 0; i < rows; ++i, x += ld) {
    switch (map) {
      case FeatureMap::kIdentity:
        return;
      case FeatureMap::kElu1:
        map_row(x, width, [&](Vec<E> v, int64_t, int) { return v >= zero ? v + one : exp(v < zero ? v : zero); });
        break;
      case FeatureMap::kRelu:
        map_row(x, width, [&](Vec<E> v, int64_t, int) { return v > zero ? v : zero; });
        break;
      case FeatureMap::kReluEps:
        map_row(x, width, [&](Vec<E> v, int64_t, int) { return (v > zero ? v : zero) + E(kReluEps); });
        break;
      case FeatureMap::kSigmoid:
        map_row(x, width, [&](Vec<E> v, int64_t, int) {
          const Vec<E> e = exp(v > zero ? -v : v);  // of a number that is not positive
          return (v > zero ? one : e) / (one + e);
        });
        break;
      case FeatureMap::kExp:
        map_row(x, width, [&](Vec<E> v, int64_t, int) { return exp(v < most ? v : most); });
        break;
      case FeatureMap::kExpShifted:
      case FeatureMap::kSoftmax: {
        const E top = max_row(x, width);
        map_row(x, width, [&](Vec<E> v, int64_t, int) { return exp(v - top); });
        if (map == FeatureMap::kSoftmax) {
          const E factor = 1 / sum_row(x, width);
          map_row(x, width, [&](Vec<E> v, int64_t, int) { return v * factor; });
        }
      }
    }
  }
}

// y = phi'(x) y, given phi(x), for one row.
template <typename E>
void multiply_derivative(FeatureMap map, const E* phi, E* y, int64_t width) {
  const Vec<E> zero = {}, one = splat(E(1));
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    map_row(y, width, [&](Vec<E> v, int64_t j, int n) { return f(load_lanes<E>(phi + j, n), v); });
  };
  switch (map) {
    case FeatureMap::kIdentity:
      return;
    case FeatureMap::kElu1:
      return each([&](Vec<E> p, Vec<E> v) { return p < one ? p * v : v; });
    case FeatureMap::kRelu:
      return each([&](Vec<E> p, Vec<E> v) { return p > zero ? v : zero; });
    case FeatureMap::kReluEps:
      return each([&](Vec<E> p, Vec<E> v) { return p > E(kReluEps) ? v : zero; });
    case FeatureMap::kSigmoid:
      return each([&](Vec<E> p, Vec<E> v) { return p * (one - p) * v; });
    case FeatureMap::kExp: {
      const Vec<E> most = exp(splat(E(kLargestExponent)));
      return each([&](Vec<E> p, Vec<E> v) { return p < most ? p * v : zero; });
    }
    case FeatureMap::kExpShifted:
      return each([&](Vec<E> p, Vec<E> v) { return p * v; });
    case FeatureMap::kSoftmax: {
      const E mean = dot_rows(phi, y, width);
      return each([&](Vec<E> p, Vec<E> v) { return p * (v - mean); });
    }
  }
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
