// Vectors of one register, for *_kernel.cpp files: GNU vector extensions plus the few intrinsics they cannot express.
//
// Everything lives in FLOWATTN_ISA_NAMESPACE and no std template is used: a weak symbol shared by the three copies of a
// kernel could otherwise put AVX-512 code into the baseline copy.
#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#  include <immintrin.h>
#endif

#include "cpu/isa.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
using LaneInts = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a storage type is computed in.
template <typename S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 keeps -0.0, x + 0 does not
}

// --- loads and stores: storage type in memory, compute type in registers; *_tail touch the first n elements only

using U16 = typename VectorOf<uint16_t, kVectorBytes / 2>::type;  // as many lanes as Vec<float>
using U32 = Vec<uint32_t>;

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
  float value = magnitude < 0x0400 ? float(magnitude) * 0x1p-24f : __builtin_bit_cast(float, bits);
  return sign ? -value : value;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x47800000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal result: adding 0.5 rounds at the place of the last half bit
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);  // to nearest even
  return sign | uint16_t(bits >> 13);
}

template <typename V, typename S>
inline V load_bits(const S* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }
inline float scalar(Half x) { return half_to_float(x.bits); }
inline float scalar(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }

// Between U16 and U32; GCC 12 splits the general form at 512 bits.
inline U32 widen_bits(U16 v) {
#if defined(__AVX512F__)
  return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}
inline U16 narrow_bits(U32 v) {
#if defined(__AVX512F__)
  return (U16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, U16);
#endif
}

inline Vec<float> load(const BFloat16* p) { return (Vec<float>)(widen_bits(load_bits<U16>(p)) << 16); }

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  // The unmasked forms of GCC 12's header warn about an uninitialised operand.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

inline void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, Vec<float> v) {
  U32 bits = (U32)v;
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  U16 narrow = narrow_bits(v == v ? rounded : 0x7fc0 + U32{});
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

template <typename S>
inline Vec<Compute<S>> load_tail(const S* p, int n) {
  S buffer[kLanes<Compute<S>>] = {};
  __builtin_memcpy(buffer, p, n * sizeof(S));
  return load(buffer);
}

template <typename S>
inline void store_tail(S* p, Vec<Compute<S>> v, int n) {
  S buffer[kLanes<Compute<S>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(S));
}

#if defined(__AVX512F__)
inline Vec<float> load_tail(const float* p, int n) { return (Vec<float>)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline Vec<double> load_tail(const double* p, int n) { return (Vec<double>)_mm512_maskz_loadu_pd((1u << n) - 1, p); }
inline void store_tail(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
inline void store_tail(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int n, Vec<int32_t>) { return (__m256i)(Vec<int32_t>{0, 1, 2, 3, 4, 5, 6, 7} < n); }
inline __m256i first_lanes(int n, Vec<int64_t>) { return (__m256i)(Vec<int64_t>{0, 1, 2, 3} < n); }
inline Vec<float> load_tail(const float* p, int n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_lanes(n, Vec<int32_t>{}));
}
inline Vec<double> load_tail(const double* p, int n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes(n, Vec<int64_t>{}));
}
inline void store_tail(float* p, Vec<float> v, int n) {
  _mm256_maskstore_ps(p, first_lanes(n, Vec<int32_t>{}), (__m256)v);
}
inline void store_tail(double* p, Vec<double> v, int n) {
  _mm256_maskstore_pd(p, first_lanes(n, Vec<int64_t>{}), (__m256d)v);
}
#endif

// --- shuffles and reductions

// Lane l of the result is lane Pick::lane(l) of the concatenation (a, b).
template <typename Pick, typename T, int... L>
inline Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::lane(L)...);
#else
  return __builtin_shuffle(a, b, LaneInts<T>{Pick::lane(L)...});
#endif
}

template <typename Pick, typename T>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle_lanes<Pick, T>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <int Distance, int Lanes>
struct Rotate {
  static constexpr int lane(int l) { return (l + Distance) % Lanes; }
};

template <typename T, int Distance = kLanes<T> / 2>
inline T reduce_sum(Vec<T> v) {
  v += shuffle<Rotate<Distance, kLanes<T>>, T>(v, v);
  if constexpr (Distance == 1) {
    return v[0];
  } else {
    return reduce_sum<T, Distance / 2>(v);
  }
}

// Step of a square transpose: exchanges the off-diagonal blocks of side Block between two rows Block apart.
template <int Block, int Lanes>
struct UpperRow {
  static constexpr int lane(int l) { return l & Block ? Lanes + l - Block : l; }
};
template <int Block, int Lanes>
struct LowerRow {
  static constexpr int lane(int l) { return l & Block ? Lanes + l : l + Block; }
};

template <typename T, int Block = kLanes<T> / 2>
inline void transpose_registers(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Block) continue;
    Vec<T> upper = rows[i], lower = rows[i + Block];
    rows[i] = shuffle<UpperRow<Block, W>, T>(upper, lower);
    rows[i + Block] = shuffle<LowerRow<Block, W>, T>(upper, lower);
  }
  if constexpr (Block > 1) transpose_registers<T, Block / 2>(rows);
}

// Lane i of the result is the maximum, or the sum, of the lanes of rows[i].
template <typename T>
inline Vec<T> max_of_rows(Vec<T> (&rows)[kLanes<T>]) {
  transpose_registers<T>(rows);
  Vec<T> largest = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<T>; ++i) largest = largest > rows[i] ? largest : rows[i];
  return largest;
}

template <typename T>
inline Vec<T> sum_of_rows(Vec<T> (&rows)[kLanes<T>]) {
  transpose_registers<T>(rows);
  Vec<T> sum = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<T>; ++i) sum += rows[i];
  return sum;
}

// --- exp, tanh, log

// exp(x) = 2^n (1 + m), with n the nearest integer to x / ln 2.
struct ExpParts {
  Vec<float> n, m;
};

inline ExpParts exp_parts(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  Vec<float> n = (x * 0x1.715476p0f + kRound) - kRound;
  Vec<float> r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first exact in products with n
  // Minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, relative error of exp 3e-9.
  Vec<float> p = r * 0.001381454971f + 0.008368843979f;
  p = p * r + 0.04166839624f;
  p = p * r + 0.166665196f;
  p = p * r + 0.499999934f;
  return {n, (p * r + 1.0f) * r};
}

inline Vec<float> power_of_two(Vec<float> n) {
  return (Vec<float>)((__builtin_convertvector(n, Vec<int32_t>) + 127) << 23);
}

// Within 1 ulp for float; below -87.34 it gives 0 instead of a subnormal, above 88.37 infinity.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.6f;
  x = x > kHighest ? splat(kHighest) : x;  // then 2^n below is infinity
  const ExpParts parts = exp_parts(x);
  return x < kLowest ? Vec<float>{} : (parts.m + 1.0f) * power_of_two(parts.n);
}

// (exp(2|x|) - 1) / (exp(2|x|) + 1) with the sign of x: small arguments keep their relative precision.
inline Vec<float> tanh(Vec<float> x) {
  constexpr float kOne = 20.0f;  // from 2|x| = 18.02 on the result rounds to 1
  Vec<float> twice = 2 * (x < 0 ? -x : x);
  twice = twice > kOne ? splat(kOne) : twice;
  const ExpParts parts = exp_parts(twice);
  const Vec<float> power = power_of_two(parts.n), less_one = parts.m * power + (power - 1.0f);
  const Vec<float> t = less_one / (less_one + 2.0f);
  return x < 0 ? -t : t;
}

inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <typename V>
inline V log(V x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = __builtin_log(x[i]);
  return x;
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
