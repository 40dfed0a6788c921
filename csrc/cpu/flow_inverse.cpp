// The private ops of flow_inverse on the CPU: a window of steps over a static cache, and the sequential inverse.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/flow_network.h"

namespace flowattn {
namespace {

// Puts a weight (columns, depth) into `packed` from `offset` on.
void flow_pack_cpu(Tensor weight, Tensor packed, int64_t offset) {
  FA_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.stride(1) == 1, kFlowInverse,
           "weights must have contiguous rows", weight.dim());
  const bool wide = weight.scalar_type() == ScalarType::Double;
  FA_CHECK(packed.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), kFlowInverse,
           "packed must be float32, or float64", toString(packed.scalar_type()));
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const int64_t numbers = (columns + kFlowPanel - 1) / kFlowPanel * kFlowPanel * depth;
  FA_CHECK(offset >= 0 && offset + numbers <= packed.numel(), kFlowInverse, "packed must hold the weight",
           packed.numel());
  auto* panels = static_cast<std::byte*>(packed.mutable_data_ptr()) + offset * packed.element_size();
  FA_ISA_CALL(flow_pack, storage_of(kFlowInverse, "a weight", weight), weight.data_ptr(), weight.stride(0), columns,
              depth, panels);
}

// Raw outputs of steps lo[b] .. hi[b] of each sample; rows beyond hi[b] stay as they are.
Tensor flow_window_cpu(Tensor tokens, Tensor weights, Tensor vectors, Tensor config, MaybeTensor positions,
                       MaybeTensor cond, MaybeTensor prefix, MaybeTensor rope, MaybeTensor start, Tensor scale,
                       Tensor keys, Tensor values, Tensor lo, Tensor hi, int64_t width, int64_t outputs, double eps) {
  const Network network(tokens, weights, vectors, config, positions, cond, prefix, rope, start, scale, keys, values,
                        eps);
  const FlowNetwork& net = network.net;
  FA_CHECK(outputs == net.outputs, kFlowInverse, "outputs must be those of the weights", outputs);
  const bool bounds = lo.scalar_type() == ScalarType::Long && hi.scalar_type() == ScalarType::Long &&
                      lo.is_contiguous() && hi.is_contiguous() && lo.numel() == net.batch && hi.numel() == net.batch;
  FA_CHECK(bounds, kFlowInverse, "lo and hi must be contiguous int64 vectors of B numbers", lo.numel());
  const int64_t *from = lo.const_data_ptr<int64_t>(), *to = hi.const_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t b = 0; b < net.batch; ++b) {
    const bool fits = from[b] >= -net.prefix && to[b] <= network.steps() && to[b] - from[b] <= width;
    FA_CHECK(fits, kFlowInverse, "a window must lie within the steps",
             std::to_string(from[b]) + ".." + std::to_string(to[b]));
    total += std::max<int64_t>(to[b] - from[b], 0);
  }
  Tensor out = torch::stable::new_zeros(tokens, {net.batch * net.streams, width, net.outputs});
  const int64_t row_bytes = net.outputs * network.element;
  auto* results = static_cast<std::byte*>(out.mutable_data_ptr());
  const double work = network.multiply_adds() * total * net.streams;
  over_samples(network, width, work, [&](Runner& runner, int64_t most, int64_t first, int64_t last) {
    std::vector<FlowRow> rows;
    rows.reserve(most);
    const auto flush = [&] {
      const FlowPass pass = runner.run(tokens.data_ptr(), rows.data(), rows.size());
      for (size_t i = 0; i < rows.size(); ++i) {
        const FlowRow& row = rows[i];
        std::memcpy(results + (row.row * width + row.step - from[row.sample]) * row_bytes,
                    static_cast<const std::byte*>(pass.out) + i * row_bytes, row_bytes);
      }
      rows.clear();
    };
    for (int64_t b = first; b < last; ++b) {
      for (int64_t stream = 0; stream < net.streams; ++stream) {
        for (int64_t step = from[b]; step < to[b]; ++step) {
          rows.push_back({stream * net.batch + b, b, step});
          if (int64_t(rows.size()) == most) flush();
        }
      }
    }
    if (!rows.empty()) flush();
  });
  return out;
}

// Steps begin .. N one after the other, writing each token into `tokens`. Returns (B, 4): the first token that is not
// finite or -1, the largest log sigma, entries clamped, scales that are not positive.
Tensor flow_sequential_cpu(Tensor tokens, Tensor weights, Tensor vectors, Tensor config, MaybeTensor positions,
                           MaybeTensor cond, MaybeTensor prefix, MaybeTensor rope, MaybeTensor start, Tensor scale,
                           Tensor keys, Tensor values, Tensor z, MaybeTensor guidance, int64_t begin, int64_t rule,
                           bool guide_scale, bool guide_mean, bool softplus, double soft_clip, double clamp,
                           double eps) {
  const Network network(tokens, weights, vectors, config, positions, cond, prefix, rope, start, scale, keys, values,
                        eps);
  const FlowNetwork& net = network.net;
  FlowAffineOptions options{net.outputs == net.features, softplus,    soft_clip,
                            GuidanceRule(rule),          guide_scale, guide_mean};
  const auto* noise = static_cast<const std::byte*>(data_of("z", z, tokens, tokens.numel()));
  const void* guide = data_of("guidance", guidance, tokens, net.batch * net.tokens);
  FA_CHECK(net.streams == 1 || guide, kFlowInverse, "two streams need guidance", "none");
  Tensor info = torch::stable::new_zeros(tokens, {net.batch, 4}, ScalarType::Double);
  auto* infos = static_cast<double*>(info.mutable_data_ptr());
  auto* data = static_cast<std::byte*>(tokens.mutable_data_ptr());
  const int64_t count = std::max<int64_t>(network.steps() - begin, 0), token_bytes = net.features * network.element;
  const double work = network.multiply_adds() * count * net.batch * net.streams;

  const auto finish = [&](const FlowPass& pass, int64_t own, int64_t other, const FlowRow& row) {
    const int64_t token = row.sample * net.tokens + row.step + net.first;
    const auto output = [&](int64_t i) {
      return static_cast<const std::byte*>(pass.out) + i * net.outputs * network.element;
    };
    double weight = 0, measured[kFlowStatistics];
    if (guide) weight = net.wide ? static_cast<const double*>(guide)[token] : static_cast<const float*>(guide)[token];
    std::byte* u = data + token * token_bytes;
    FA_ISA_CALL(flow_affine_token, net.wide, options, net.features, noise + token * token_bytes, output(own),
                other < 0 ? nullptr : output(other), weight, u, measured);
    double* result = infos + 4 * row.sample;
    if (measured[kFlowNotFinite] > 0 && result[0] < 0) result[0] = row.step + net.first;
    result[1] = std::fmax(result[1], measured[kFlowMaxLogScale]);
    result[3] += measured[kFlowNotPositive];
    for (int64_t c = 0; clamp > 0 && c < net.features; ++c) {
      const double value = net.wide ? reinterpret_cast<double*>(u)[c] : reinterpret_cast<float*>(u)[c];
      if (!(std::abs(value) > clamp)) continue;
      result[2] += 1;
      const double clamped = std::copysign(clamp, value);
      net.wide ? void(reinterpret_cast<double*>(u)[c] = clamped) : void(reinterpret_cast<float*>(u)[c] = clamped);
    }
  };
  over_samples(network, 1, work, [&](Runner& runner, int64_t most, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      infos[4 * b] = -1, infos[4 * b + 1] = -std::numeric_limits<double>::infinity();
    const int64_t samples = most / net.streams;  // both streams of a sample go together
    std::vector<FlowRow> rows;
    for (int64_t from = first; from < last; from += samples) {
      const int64_t to = std::min(from + samples, last);
      for (int64_t step = begin; step < network.steps(); ++step) {
        rows.clear();
        for (int64_t stream = 0; stream < net.streams; ++stream) {
          for (int64_t b = from; b < to; ++b) rows.push_back({stream * net.batch + b, b, step});
        }
        const FlowPass pass = runner.run(data, rows.data(), rows.size());
        for (int64_t i = 0; i < to - from; ++i) finish(pass, i, net.streams == 2 ? i + to - from : -1, rows[i]);
      }
    }
  });
  return info;
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("flow_pack", TORCH_BOX(&flowattn::flow_pack_cpu));
  m.impl("flow_window", TORCH_BOX(&flowattn::flow_window_cpu));
  m.impl("flow_sequential", TORCH_BOX(&flowattn::flow_sequential_cpu));
}
