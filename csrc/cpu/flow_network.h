// The network of a flow block on the CPU: weights and conditions of a call, and how its rows are shared between
// threads.
//
// Samples are independent. With at least as many samples as threads each thread takes some of them through everything
// and never waits for another; with fewer, the threads share the rows, or the products of a single one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/flow_inverse.h"
#include "cpu/parallel.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline constexpr const char* kFlowInverse = "flow_inverse";
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

inline const void* data_of(const char* name, const MaybeTensor& x, const Tensor& like, int64_t numbers) {
  if (!x) return nullptr;
  const bool fits = x->is_cpu() && x->is_contiguous() && x->scalar_type() == like.scalar_type();
  FA_CHECK(fits, kFlowInverse, std::string(name) + " must be a contiguous CPU tensor of the dtype of tokens", "another");
  FA_CHECK(x->numel() == numbers, kFlowInverse, std::string(name) + " must hold " + std::to_string(numbers) + " numbers",
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
    FA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kFlowInverse,
             "tokens must be float32 or float64", toString(dtype));
    FA_CHECK(tokens.dim() == 3, kFlowInverse, "tokens must have shape (B, T, D)", tokens.dim());
    FA_CHECK(config.numel() == kConfigs && config.scalar_type() == ScalarType::Long, kFlowInverse, "bad config",
             config.numel());
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

    FA_CHECK(scale.numel() > 0 || net.batch == 0, kFlowInverse, "scale must have a number for each row", scale.numel());
    net.streams = net.batch ? scale.numel() / net.batch : 1;
    const int64_t rows = net.batch * net.streams;
    net.scale = data_of("scale", scale, tokens, rows);
    net.cond = data_of("cond", cond, tokens, rows * net.width);
    net.prefix = prefix ? prefix->size(1) : 0;
    net.prefix_hidden = data_of("prefix", prefix, tokens, rows * net.prefix * net.width);
    net.start = data_of("start", start, tokens, net.features);
    FA_CHECK(net.first == 1 || start, kFlowInverse, "a network whose step 0 is about token 0 needs start", "none");
    if (positions) {
      const int64_t each = steps() * net.width;
      net.positions_batch = positions->size(0) == 1 ? 0 : each;
      net.positions = data_of("positions", positions, tokens, (net.positions_batch ? net.batch : 1) * each);
    }
    if (rope) {
      net.rope_slots = rope->size(1);
      FA_CHECK(net.rope_slots >= net.prefix + steps(), kFlowInverse, "rope must cover every slot", net.rope_slots);
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
inline int64_t pass_numbers(const Network& network, int64_t rows) {
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

}  // namespace flowattn
