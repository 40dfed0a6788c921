// The affine map of one token of a causal flow (see reference/flow_affine.py for the maths).
#pragma once

#include "cpu/flow_affine.h"
#include "cpu/row_vectors.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

constexpr double kSoftplusShift = 0.5413248546129181;  // log(e - 1): softplus gives 1 at 0

template <typename T>
inline bool finite(T x) {
  return x - x == 0;
}

template <typename T>
inline Vec<T> log_lanes(Vec<T> x) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = sizeof(T) == 4 ? T(__builtin_logf(x[i])) : T(__builtin_log(x[i]));
  return x;
}

// log(softplus(a)); below -30 softplus(a) is exp(a) to the last bit, above 30 it is a.
template <typename T>
inline Vec<T> log_softplus(Vec<T> a) {
  for (int i = 0; i < kLanes<T>; ++i) {
    const double x = a[i];
    a[i] = T(x < -30 ? x : __builtin_log(x > 30 ? x : __builtin_log1p(__builtin_exp(x))));
  }
  return a;
}

// (log sigma, mu) of the columns c.. of a token's raw outputs.
template <typename T>
struct ScaleMean {
  Vec<T> log_scale, mean;
};

template <typename T, typename Part>
inline ScaleMean<T> scale_and_mean(const FlowAffineOptions& options, const T* params, int64_t features, int64_t c,
                                   Part part) {
  Vec<T> alpha{}, mean = load(params + (options.volume_preserving ? c : features + c), part);
  if (!options.volume_preserving) alpha = load(params + c, part);
  if (options.soft_clip > 0) {
    const T clip = T(options.soft_clip);
    alpha = clip * tanh(alpha / clip), mean = clip * tanh(mean / clip);
  }
  if (options.softplus && !options.volume_preserving) alpha = log_softplus<T>(alpha + T(kSoftplusShift));
  return {alpha, mean};
}

// u = z sigma + mu of one token; `uncond` and `previous` may be nullptr. `out` may be `previous`.
template <typename T>
inline void affine_inverse_row(const FlowAffineOptions& options, int64_t features, const T* z, const T* params,
                               const T* uncond, T guidance, const T* previous, T* out, T* statistics) {
  const T w_scale = options.guide_scale ? guidance : T(0), w_mean = options.guide_mean ? guidance : T(0);
  for (int i = 0; i < kFlowStatistics; ++i) statistics[i] = 0;
  statistics[kFlowMaxLogScale] = features ? -T(__builtin_inf()) : T(0);
  each_vector<T>(features, [&](int64_t c, int, auto part) {
    ScaleMean<T> own = scale_and_mean(options, params, features, c, part);
    Vec<T> sigma = exp(own.log_scale), log_scale = own.log_scale, mean = own.mean;
    if (uncond) {
      const ScaleMean<T> other = scale_and_mean(options, uncond, features, c, part);
      if (options.rule == GuidanceRule::kGaussianRatio) {
        Vec<T> distance = own.log_scale - other.log_scale;
        distance = distance > T(0) ? Vec<T>{} : distance;
        const Vec<T> s = exp(T(2) * distance);
        log_scale = own.log_scale - T(0.5) * log_lanes<T>(T(1) + w_scale * (T(1) - s));
        sigma = exp(log_scale);
        mean = ((T(1) + w_mean) * own.mean - w_mean * s * other.mean) / (T(1) + w_mean * (T(1) - s));
      } else {
        mean = own.mean + w_mean * (own.mean - other.mean);
        if (options.rule == GuidanceRule::kLogLinear) {
          log_scale = own.log_scale + w_scale * (own.log_scale - other.log_scale);
          sigma = exp(log_scale);
        } else {
          sigma = sigma + w_scale * (sigma - exp(other.log_scale));
          log_scale = log_lanes<T>(sigma);
        }
      }
    }
    const Vec<T> u = load(z + c, part) * sigma + mean;
    const int64_t count = min(kLanes<T>, features - c);
    for (int64_t i = 0; i < count; ++i) {  // features are few (3 to 192), the network before them is the cost
      const T scale = sigma[i], value = u[i];
      statistics[kFlowLogScale] += log_scale[i];
      T& highest = statistics[kFlowMaxLogScale];
      highest = log_scale[i] > highest || log_scale[i] != log_scale[i] ? log_scale[i] : highest;
      if (!(scale > 0)) statistics[kFlowNotPositive] += 1;
      if (!finite(value)) {
        statistics[kFlowNotFinite] += 1;
        continue;
      }
      const T update = previous ? __builtin_fabs(value - previous[c + i]) : T(0), size = __builtin_fabs(value);
      const T residual = update > 0 ? update / T(__builtin_fabs(scale)) : T(0);
      if (update > statistics[kFlowUpdate]) statistics[kFlowUpdate] = update;
      if (size > statistics[kFlowSize]) statistics[kFlowSize] = size;
      if (residual > statistics[kFlowResidual]) statistics[kFlowResidual] = residual;
      statistics[kFlowUpdateSquares] += update * update;
      statistics[kFlowSquares] += size * size;
    }
    store(out + c, u, part);
  });
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
