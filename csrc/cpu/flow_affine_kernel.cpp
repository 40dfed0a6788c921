// flow_affine_forward, its gradient and flow_affine_inverse on the CPU, a token at a time.
#include "cpu/flow_affine.h"
#include "cpu/flow_affine_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename T>
const T* row(const FlowTokens& tokens, int64_t n, int64_t i) {
  return tokens.data ? static_cast<const T*>(tokens.data) + i / n * tokens.batch + i % n * tokens.token : nullptr;
}

template <typename T>
void forward(const FlowAffine& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *x = row<T>(op.x, op.tokens, i), *params = row<T>(op.params, op.tokens, i);
    T* z = static_cast<T*>(op.out) + i * op.features;
    Sum<T> total;
    each_vector<T>(op.features, [&](int64_t c, int slot, auto part) {
      const ScaleMean<T> map = scale_and_mean(op.options, params, op.features, c, part);
      store(z + c, (load(x + c, part) - map.mean) * exp(-map.log_scale), part);
      total.slots[slot] += inside<T>(map.log_scale, part);
    });
    static_cast<T*>(op.sums)[i] = -total.total();
  }
}

// Slope of the clip and the scale function at one raw output.
template <typename T>
T clip_slope(double clip, T raw) {
  if (clip <= 0) return 1;
  const double t = __builtin_tanh(raw / clip);
  return T(1 - t * t);
}

template <typename T>
T softplus_slope(double alpha) {  // of log(softplus(alpha)): sigmoid / softplus, which tends to 1 below
  if (alpha < -30) return 1;
  const double e = __builtin_exp(-alpha);
  return T(1 / ((1 + e) * (alpha > 30 ? alpha : __builtin_log1p(1 / e))));
}

template <typename T>
void backward(const FlowAffine& op, int64_t begin, int64_t end) {
  const FlowAffineOptions& options = op.options;
  const int64_t width = options.volume_preserving ? op.features : 2 * op.features;
  for (int64_t i = begin; i < end; ++i) {
    const T *z = row<T>(op.x, op.tokens, i), *params = row<T>(op.params, op.tokens, i);
    const T *dz = row<T>(op.grad_out, op.tokens, i), *sums = row<T>(op.grad_sums, op.tokens, i);
    const T dlogdet = sums ? *sums : T(0);
    T* dx = static_cast<T*>(op.grad_x) + i * op.features;
    T* dparams = static_cast<T*>(op.grad_params) + i * width;
    each_vector<T>(op.features, [&](int64_t c, int, auto part) {
      const ScaleMean<T> map = scale_and_mean(options, params, op.features, c, part);
      const Vec<T> down = load(dz + c, part) * exp(-map.log_scale);
      store(dx + c, down, part);
      // z = (x - mu) / sigma, so d z / d log sigma = -z.
      Vec<T> dscale = -load(dz + c, part) * load(z + c, part) - dlogdet, dmean = -down;
      const int64_t count = min(kLanes<T>, op.features - c);
      const T* raw_mean = params + width - op.features + c;
      for (int64_t k = 0; k < count; ++k) {
        dmean[k] *= clip_slope(options.soft_clip, raw_mean[k]);
        if (options.volume_preserving) continue;
        const T raw = params[c + k];
        const double clip = options.soft_clip;
        if (options.softplus) {
          dscale[k] *= softplus_slope<T>((clip > 0 ? clip * __builtin_tanh(raw / clip) : raw) + kSoftplusShift);
        }
        dscale[k] *= clip_slope(clip, raw);
      }
      if (!options.volume_preserving) store(dparams + c, dscale, part);
      store(dparams + width - op.features + c, dmean, part);
    });
  }
}

template <typename T>
void inverse(const FlowAffine& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* guidance = row<T>(op.guidance, op.tokens, i);
    affine_inverse_row(op.options, op.features, row<T>(op.x, op.tokens, i), row<T>(op.params, op.tokens, i),
                       row<T>(op.params_uncond, op.tokens, i), guidance ? *guidance : T(0),
                       row<T>(op.previous, op.tokens, i), static_cast<T*>(op.out) + i * op.features,
                       static_cast<T*>(op.sums) + i * kFlowStatistics);
  }
}

}  // namespace

void flow_affine_fwd(const FlowAffine& op, int64_t begin, int64_t end) {
  op.storage == Storage::kDouble ? forward<double>(op, begin, end) : forward<float>(op, begin, end);
}

void flow_affine_bwd(const FlowAffine& op, int64_t begin, int64_t end) {
  op.storage == Storage::kDouble ? backward<double>(op, begin, end) : backward<float>(op, begin, end);
}

void flow_affine_inv(const FlowAffine& op, int64_t begin, int64_t end) {
  op.storage == Storage::kDouble ? inverse<double>(op, begin, end) : inverse<float>(op, begin, end);
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
