// The network of a flow block on the CPU: a window of steps over a static cache, and the sequential inverse.
//
// Samples are independent. With at least as many samples as threads each thread takes some of them through everything
// and never waits for another; with fewer, the threads share the stages of each layer.
#include "cpu/flow_inverse.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/parallel.h"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "flow_inverse";
constexpr int64_t kPassRows = 192;    // rows that go through all layers together: their activations stay in the cache
constexpr int64_t kProductRows = 48;  // rows of one item of a product

// Walks the packed weights in the order of ops/flow_network.py.
struct Packed {
  int64_t weights = 0, vectors = 0;

  FlowProduct product(int64_t columns, int64_t depth) {
    const FlowProduct result{weights, vectors, depth, columns};
    weights += (columns + kFlowPanel - 1) / kFlowPanel * kFlowPanel * depth;
    vectors += columns;
    return result;
  }
  int64_t norm(bool present, int64_t width) {
    if (!present) return -1;
    vectors += 2 * width;
    return vectors - 2 * width;
  }
};

// Numbers of ops/flow_network.py: CONFIG.
enum Config {
  kWidth,
  kFeatures,
  kOutputs,
  kHeads,
  kKvHeads,
  kHeadDim,
  kHidden,
  kLayers,
  kRms,
  kGated,
  kQkNorm,
  kPostNorm,
  kFinalNorm,
  kFirst,
  kConfigs
};  // clang-format off

const void* data_of(const char* name, const MaybeTensor& x, const Tensor& like, int64_t numbers) {
  if (!x) return nullptr;
  const bool fits = x->is_cpu() && x->is_contiguous() && x->scalar_type() == like.scalar_type();
  FA_CHECK(fits, kOp, std::string(name) + " must be a contiguous CPU tensor of the dtype of tokens", "another");
  FA_CHECK(x->numel() == numbers, kOp, std::string(name) + " must hold " + std::to_string(numbers) + " numbers",
           x->numel());
  return x->data_ptr();
}
// clang-format on

// Everything about a call but the steps it runs; owns the layer list.
struct Network {
  FlowNetwork net{};
  std::vector<FlowLayerWeights> layers;
  int64_t element, qkv_width;

  Network(const Tensor& tokens, const Tensor& weights, const Tensor& vectors, const Tensor& config,
          const MaybeTensor& positions, const MaybeTensor& cond, const MaybeTensor& prefix, const MaybeTensor& rope,
          const MaybeTensor& start, const Tensor& scale, const Tensor& keys, const Tensor& values, double eps) {
    const ScalarType dtype = tokens.scalar_type();
    FA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, "tokens must be float32 or float64",
             toString(dtype));
    FA_CHECK(tokens.dim() == 3, kOp, "tokens must have shape (B, T, D)", tokens.dim());
    FA_CHECK(config.numel() == kConfigs && config.scalar_type() == ScalarType::Long, kOp, "bad config", config.numel());
    const int64_t* c = config.const_data_ptr<int64_t>();
    net.wide = dtype == ScalarType::Double, element = net.wide ? 8 : 4;
    net.width = c[kWidth], net.features = c[kFeatures], net.outputs = c[kOutputs], net.heads = c[kHeads];
    net.kv_heads = c[kKvHeads], net.head_dim = c[kHeadDim], net.hidden = c[kHidden], net.layers = c[kLayers];
    net.rms = c[kRms], net.gated = c[kGated], net.eps = eps, net.first = c[kFirst];
    net.batch = tokens.size(0), net.tokens = tokens.size(1);
    qkv_width = (net.heads + 2 * net.kv_heads) * net.head_dim;
    data_of("tokens", tokens, tokens, net.batch * net.tokens * net.features);

    Packed packed;
    net.proj_in = packed.product(net.width, net.features);
    for (int64_t i = 0; i < net.layers; ++i) {
      FlowLayerWeights layer{};
      layer.norm1 = packed.norm(true, net.width);
      layer.qkv = packed.product(qkv_width, net.width);
      layer.q_norm = packed.norm(c[kQkNorm], net.head_dim), layer.k_norm = packed.norm(c[kQkNorm], net.head_dim);
      layer.proj = packed.product(net.width, net.heads * net.head_dim);
      layer.post1 = packed.norm(c[kPostNorm], net.width);
      layer.norm2 = packed.norm(true, net.width);
      if (net.gated) layer.gate = packed.product(net.hidden, net.width);
      layer.up = packed.product(net.hidden, net.width), layer.down = packed.product(net.width, net.hidden);
      layer.post2 = packed.norm(c[kPostNorm], net.width);
      layers.push_back(layer);
    }
    net.final_norm = packed.norm(c[kFinalNorm], net.width);
    net.proj_out = packed.product(net.outputs, net.width);
    net.layer = layers.data();
    net.weights = data_of("weights", weights, tokens, packed.weights);
    net.vectors = data_of("vectors", vectors, tokens, packed.vectors);

    FA_CHECK(scale.numel() > 0 || net.batch == 0, kOp, "scale must have a number for each row", scale.numel());
    net.streams = net.batch ? scale.numel() / net.batch : 1;
    const int64_t rows = net.batch * net.streams;
    net.scale = data_of("scale", scale, tokens, rows);
    net.cond = data_of("cond", cond, tokens, rows * net.width);
    net.prefix = prefix ? prefix->size(1) : 0;
    net.prefix_hidden = data_of("prefix", prefix, tokens, rows * net.prefix * net.width);
    net.start = data_of("start", start, tokens, net.features);
    FA_CHECK(net.first == 1 || start, kOp, "a network whose step 0 is about token 0 needs start", "none");
    if (positions) {
      const int64_t each = steps() * net.width;
      net.positions_batch = positions->size(0) == 1 ? 0 : each;
      net.positions = data_of("positions", positions, tokens, (net.positions_batch ? net.batch : 1) * each);
    }
    if (rope) {
      net.rope_slots = rope->size(1);
      FA_CHECK(net.rope_slots >= net.prefix + steps(), kOp, "rope must cover every slot", net.rope_slots);
      net.rope = data_of("rope", rope, tokens, 2 * net.rope_slots * (net.head_dim / 2));
    }
    net.slots = net.prefix + steps();
    const int64_t numbers = net.layers * rows * net.kv_heads * net.slots * net.head_dim;
    net.keys = const_cast<void*>(data_of("keys", keys, tokens, numbers));
    net.values = const_cast<void*>(data_of("values", values, tokens, numbers));
  }

  int64_t steps() const { return std::max<int64_t>(net.tokens - net.first, 0); }
  double multiply_adds() const {  // of one row
    return double(net.layers) * net.width * (qkv_width + net.heads * net.head_dim + (net.gated ? 3 : 2) * net.hidden);
  }
};

// Numbers of a pass's buffers.
int64_t pass_numbers(const Network& network, int64_t rows) {
  const FlowNetwork& net = network.net;
  return rows * (3 * net.width + network.qkv_width + net.heads * net.head_dim + net.hidden + net.outputs);
}

// Takes rows, ascending in the steps of each sample, through the network. Three ways: `serial`, within one thread; many
// rows shared between the threads, which meet once a layer, since only keys and values tie rows together; few rows, of
// which the threads share every product.
class Runner {
 public:
  Runner(const Network& network, bool serial, int64_t rows, void* memory)
      : network_(network), net_(network.net), serial_(serial), memory_(static_cast<std::byte*>(memory)), rows_(rows) {}

  static int64_t bytes(const Network& network, int64_t rows) {
    return (pass_numbers(network, rows) + kFlowTile * network.net.slots) * network.element + 64;
  }

  // At most `rows` of the constructor; the outputs lie in pass.out.
  FlowPass run(const void* tokens, const FlowRow* rows, int64_t count) {
    FlowPass pass{&net_, rows, count};
    std::byte* next = memory_;
    const auto buffer = [&](int64_t width) {
      std::byte* begin = next;
      next += rows_ * width * network_.element;
      return begin;
    };
    pass.hidden = buffer(net_.width), pass.work = buffer(net_.width), pass.added = buffer(net_.width);
    pass.qkv = buffer(network_.qkv_width), pass.attended = buffer(net_.heads * net_.head_dim);
    pass.wide = buffer(net_.hidden), pass.out = buffer(net_.outputs);
    find_tiles(pass);
    const int64_t tiles = tiles_.size() - 1, threads = serial_ ? 1 : torch::stable::get_num_threads();
    const int64_t groups = std::min(2 * threads, tiles), scratch_bytes = kFlowTile * net_.slots * network_.element;
    if (threads == 1 || groups < threads || count < 2 * kFlowTile) {
      const Span whole{pass, 0, tiles, 0, count, threads == 1, next};
      for (int64_t stage = 0; stage <= net_.layers; ++stage) run_stage(whole, tokens, stage);
      return pass;
    }
    const double work = network_.multiply_adds() * count / net_.layers;
    for (int64_t stage = 0; stage <= net_.layers; ++stage) {
      parallel_items(groups, work, scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
        const int64_t from = begin * tiles / groups, to = end * tiles / groups;
        run_stage({pass, from, to, tiles_[from], tiles_[to], true, scratch}, tokens, stage);
      });
    }
    return pass;
  }

 private:
  // Some rows of a pass, which are whole tiles; `serial`: within the calling thread.
  struct Span {
    const FlowPass& pass;
    int64_t first_tile, last_tile, begin, end;
    bool serial;
    void* scratch;
  };

  // All between two reads of other rows' keys and values: the end of layer stage - 1 and the begin of layer `stage`.
  void run_stage(const Span& span, const void* tokens, int64_t stage) {
    const FlowPass& pass = span.pass;
    if (stage == 0) {
      FA_ISA_CALL(flow_embed, pass, tokens, span.begin, span.end);
    } else {
      const FlowLayerWeights& weights = net_.layer[stage - 1];
      attention(span, stage - 1);
      residual(span, weights.proj, weights.post1, pass.attended);
      norm(span, weights.norm2, pass.hidden, pass.work, false);
      if (net_.gated) product(span, weights.gate, pass.work, pass.wide, FlowEpilogue::kGeluTanh);
      product(span, weights.up, pass.work, pass.wide, net_.gated ? FlowEpilogue::kMultiply : FlowEpilogue::kGelu);
      residual(span, weights.down, weights.post2, pass.wide);
    }
    if (stage < net_.layers) {
      norm(span, net_.layer[stage].norm1, pass.hidden, pass.work, false);
      product(span, net_.layer[stage].qkv, pass.work, pass.qkv, FlowEpilogue::kStore);
      FA_ISA_CALL(flow_store_keys, pass, stage, span.begin, span.end);
    } else {
      if (net_.final_norm >= 0) norm(span, net_.final_norm, pass.hidden, pass.work, false);
      product(span, net_.proj_out, net_.final_norm >= 0 ? pass.work : pass.hidden, pass.out, FlowEpilogue::kStore);
    }
  }

  // hidden += post(x W + b)
  void residual(const Span& span, const FlowProduct& weights, int64_t post, const void* x) {
    const FlowPass& pass = span.pass;
    if (post < 0) return product(span, weights, x, pass.hidden, FlowEpilogue::kAdd);
    product(span, weights, x, pass.added, FlowEpilogue::kStore);
    norm(span, post, pass.added, pass.hidden, true);
  }

  void norm(const Span& span, int64_t weights, const void* x, void* y, bool add) {
    FA_ISA_CALL(flow_norm, span.pass, weights, net_.width, x, y, add, span.begin, span.end);
  }

  void product(const Span& span, const FlowProduct& weights, const void* x, void* y, FlowEpilogue epilogue) {
    const int64_t rows = span.end - span.begin, panels = (weights.columns + kFlowPanel - 1) / kFlowPanel;
    const int64_t tiles = (rows + kProductRows - 1) / kProductRows;
    each(span, panels * tiles, double(rows) * weights.columns * weights.depth, 0, [&](int64_t item, void*) {
      const int64_t begin = span.begin + item / panels * kProductRows, end = std::min(begin + kProductRows, span.end);
      FA_ISA_CALL(flow_product, span.pass, weights, x, y, epilogue, begin, end, item % panels);
    });
  }

  void attention(const Span& span, int64_t number) {
    const double work = 2.0 * (span.end - span.begin) * net_.heads * net_.head_dim * net_.slots;
    const int64_t items = (span.last_tile - span.first_tile) * net_.heads;
    each(span, items, work, kFlowTile * net_.slots * network_.element, [&](int64_t item, void* scratch) {
      const int64_t tile = span.first_tile + item / net_.heads, head = item % net_.heads;
      FA_ISA_CALL(flow_attend, span.pass, number, head, tiles_[tile], tiles_[tile + 1], scratch);
    });
  }

  // Begins of the runs of consecutive steps within a tile of slots, and the end of the last.
  void find_tiles(const FlowPass& pass) {
    tiles_.clear();
    for (int64_t i = 0; i < pass.count; ++i) {
      const FlowRow& row = pass.rows[i];
      const bool next = i > 0 && (row.step + net_.prefix) % kFlowTile != 0 && row.row == pass.rows[i - 1].row &&
                        row.step == pass.rows[i - 1].step + 1;
      if (!next) tiles_.push_back(i);
    }
    tiles_.push_back(pass.count);
  }

  template <typename Run>
  void each(const Span& span, int64_t items, double work, int64_t scratch_bytes, const Run& run) {
    constexpr double kTooLittle = 1 << 18;  // below this a second thread does not pay, nor does asking for scratch
    if (span.serial || work < kTooLittle) {
      for (int64_t i = 0; i < items; ++i) run(i, span.scratch);
      return;
    }
    parallel_items(items, work, scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t i = begin; i < end; ++i) run(i, scratch);
    });
  }

  const Network& network_;
  const FlowNetwork& net_;
  const bool serial_;
  std::byte* const memory_;
  const int64_t rows_;
  std::vector<int64_t> tiles_;
};

// Calls run(runner, first sample, last sample) for groups of samples: one for each thread, or a single one.
template <typename Run>
void over_samples(const Network& network, int64_t rows_of_sample, double work, const Run& run) {
  const int64_t batch = network.net.batch, threads = torch::stable::get_num_threads();
  if (batch == 0) return;
  const bool split = threads > 1 && batch >= threads && work > double(1 << 18);
  const int64_t groups = split ? threads : 1, per_group = (batch + groups - 1) / groups;
  const int64_t rows = std::min(kPassRows, per_group * network.net.streams * rows_of_sample);
  const int64_t bytes = (Runner::bytes(network, rows) + 63) / 64 * 64;
  const Tensor memory = torch::stable::empty({groups * bytes}, ScalarType::Byte);
  auto* base = static_cast<std::byte*>(memory.mutable_data_ptr());
  const auto group = [&](int64_t g, bool serial) {
    Runner runner(network, serial, rows, base + g * bytes);
    run(runner, rows, g * per_group, std::min((g + 1) * per_group, batch));
  };
  if (!split) return group(0, threads == 1);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) group(g, true);
  });
}

// Puts a weight (columns, depth) into `packed` from `offset` on.
void flow_pack_cpu(Tensor weight, Tensor packed, int64_t offset) {
  FA_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.stride(1) == 1, kOp, "weights must have contiguous rows",
           weight.dim());
  const bool wide = weight.scalar_type() == ScalarType::Double;
  FA_CHECK(packed.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), kOp,
           "packed must be float32, or float64", toString(packed.scalar_type()));
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const int64_t numbers = (columns + kFlowPanel - 1) / kFlowPanel * kFlowPanel * depth;
  FA_CHECK(offset >= 0 && offset + numbers <= packed.numel(), kOp, "packed must hold the weight", packed.numel());
  auto* panels = static_cast<std::byte*>(packed.mutable_data_ptr()) + offset * packed.element_size();
  FA_ISA_CALL(flow_pack, storage_of(kOp, "a weight", weight), weight.data_ptr(), weight.stride(0), columns, depth,
              panels);
}

// Raw outputs of steps lo[b] .. hi[b] of each sample; rows beyond hi[b] stay as they are.
Tensor flow_window_cpu(Tensor tokens, Tensor weights, Tensor vectors, Tensor config, MaybeTensor positions,
                       MaybeTensor cond, MaybeTensor prefix, MaybeTensor rope, MaybeTensor start, Tensor scale,
                       Tensor keys, Tensor values, Tensor lo, Tensor hi, int64_t width, double eps) {
  const Network network(tokens, weights, vectors, config, positions, cond, prefix, rope, start, scale, keys, values,
                        eps);
  const FlowNetwork& net = network.net;
  const bool bounds = lo.scalar_type() == ScalarType::Long && hi.scalar_type() == ScalarType::Long &&
                      lo.is_contiguous() && hi.is_contiguous() && lo.numel() == net.batch && hi.numel() == net.batch;
  FA_CHECK(bounds, kOp, "lo and hi must be contiguous int64 vectors of B numbers", lo.numel());
  const int64_t *from = lo.const_data_ptr<int64_t>(), *to = hi.const_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t b = 0; b < net.batch; ++b) {
    const bool fits = from[b] >= -net.prefix && to[b] <= network.steps() && to[b] - from[b] <= width;
    FA_CHECK(fits, kOp, "a window must lie within the steps", std::to_string(from[b]) + ".." + std::to_string(to[b]));
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
  FA_CHECK(net.streams == 1 || guide, kOp, "two streams need guidance", "none");
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
