// What common/gelu.h needs of a vector type.
#pragma once

#include "common/gelu.h"
#include "cpu/simd.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

template <typename T>
struct GeluMath {
  typedef T Scalar;
  static Vec<T> exp(Vec<T> x) { return FLOWATTN_ISA_NAMESPACE::exp(x); }
  static Vec<T> inverse(Vec<T> x) { return T(1) / x; }
  static Vec<float> normal_cdf(Vec<float> u, Vec<float> gauss) { return float_normal_cdf<false>(u, gauss); }
  static Vec<double> normal_cdf(Vec<double> u, Vec<double>) {
    for (int i = 0; i < kLanes<double>; ++i) u[i] = 0.5 * __builtin_erfc(-0.7071067811865476 * u[i]);
    return u;
  }
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
