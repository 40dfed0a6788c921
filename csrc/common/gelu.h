// GELU and its slope, u Phi(u) and Phi(u) + u Phi'(u), for a float or a vector of floats; no torch here.
//
// Math supplies what differs between devices and types: Scalar; `exp`, which gives infinity or 0 where it leaves the
// range; `inverse`; and `normal_cdf(u, exp(-u^2 / 2))`.
#pragma once

#ifdef __CUDACC__
#  define FA_HOST_DEVICE __host__ __device__
#  define FA_UNROLL _Pragma("unroll")
#else
#  define FA_HOST_DEVICE
#  define FA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace flowattn {
namespace {  // internal linkage: every instruction set keeps the copy compiled for it (cpu/simd.h)

// Phi(u), the normal distribution function, in float, given gauss = exp(-u^2 / 2), which the slope needs too. Within
// 1e-7, and within 1e-3 relative down to u = -5.8: 1 + erf(u / sqrt 2) instead cancels there. For results of 16 bits,
// shorter: within 3e-5 relative down to u = -3, 2e-3 to u = -5, a fraction of their last bit.
template <bool Half, typename F>
FA_HOST_DEVICE inline F float_normal_cdf(F u, F gauss) {
  constexpr float kEnd = 5.8f;  // Phi(-5.8) = 3e-9
  // Minimax fits of exp(a^2 / 2) Phi(-a) on [0, kEnd]. The long one's error is weighted by exp(-a^2 / 2) + 2e-4: at
  // most 1.5e-8. The short one's is relative, and counts less from a = 3.6 on: at most 2.3e-5.
  constexpr float kLong[] = {0.499999984875f,   -0.398940797461f,   0.249975972377f,   -0.132828580242f,
                             0.0620012873521f,  -0.0256232694548f,  0.00918746125404f, -0.00273315783905f,
                             6.36245707159e-4f, -1.08521978027e-4f, 1.25205574638e-5f, -8.62477159682e-7f,
                             2.65716294843e-8f};
  constexpr float kShort[] = {0.499988380287f,   -0.398503751272f,  0.247067085045f,   -0.124910650716f,
                              0.0504962946204f,  -0.0154842216432f, 0.00337660440968f, -4.84643579164e-4f,
                              4.05687156421e-5f, -1.48944330183e-6f};
  constexpr int kDegree = Half ? 9 : 12;
  const F a = u < 0.0f ? -u : u, end = F{} + kEnd;
  const F t = a < end ? a : end;
  F tail = F{} + (Half ? kShort[9] : kLong[12]);
  FA_UNROLL
  for (int i = kDegree - 1; i >= 0; --i) tail = tail * t + (Half ? kShort[Half ? i : 0] : kLong[i]);
  tail = tail * gauss;
  const F head = 1.0f - tail;
  return u < 0.0f ? tail : head;
}

// The tanh form's factor of u, (1 + tanh w) / 2 with w = sqrt(2 / pi) (u + 0.044715 u^3), and its slope. Written with
// q = exp(-2 |w|), the factor is 1 / (1 + q) or q / (1 + q), so that neither it nor 1 minus it ever cancels.
template <typename F>
struct TanhFactor {
  F value, slope;
};

template <typename Math, typename F>
FA_HOST_DEVICE inline TanhFactor<F> tanh_factor(F u) {
  constexpr typename Math::Scalar kScale = 0.7978845608028654, kCubic = 0.044715;
  const F limit = F{} + 144.0f;  // the slope is 0 beyond |u| = 12; infinity would make it NaN
  F square = u * u;
  square = square < limit ? square : limit;
  const F w = kScale * (kCubic * square + 1.0f) * u;
  const F q = Math::exp(w < 0.0f ? 2.0f * w : -2.0f * w);
  const F head = Math::inverse(q + 1.0f), tail = q * head;
  return {w < 0.0f ? tail : head, head * tail * (2.0f * kScale * (3.0f * kCubic * square + 1.0f))};
}

template <bool Tanh, typename Math, typename F>
FA_HOST_DEVICE inline F gelu(F u) {
  if constexpr (Tanh) {
    return u * tanh_factor<Math>(u).value;
  } else {
    return u * Math::normal_cdf(u, Math::exp(-0.5f * u * u));
  }
}

template <bool Tanh, typename Math, typename F>
FA_HOST_DEVICE inline F gelu_slope(F u) {
  if constexpr (Tanh) {
    const TanhFactor<F> factor = tanh_factor<Math>(u);
    return factor.value + u * factor.slope;
  } else {
    constexpr typename Math::Scalar kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
    const F gauss = Math::exp(-0.5f * u * u);
    return Math::normal_cdf(u, gauss) + u * kDensity * gauss;
  }
}

}  // namespace
}  // namespace flowattn
