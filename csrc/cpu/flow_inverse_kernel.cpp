// The layers of a flow block on the CPU, stage by stage over rows; flow_inverse.cpp shares them between threads.
#include "cpu/flow_affine_rows.h"
#include "cpu/flow_inverse.h"
#include "cpu/gelu_math.h"
#include "cpu/gemm.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

struct StorageOf {
  Storage storage;
};

template <typename T>
const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <typename T>
T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

template <typename T>
void embed(const FlowPass& pass, const T* tokens, int64_t begin, int64_t end) {
  const FlowNetwork& net = *pass.net;
  const T *weights = at<T>(net.weights, 0), *vectors = at<T>(net.vectors, 0);
  for (int64_t i = begin; i < end; ++i) {
    const FlowRow row = pass.rows[i];
    T* h = at<T>(pass.hidden, i * net.width);
    if (row.step < 0) {
      const T* given = at<T>(net.prefix_hidden, (row.row * net.prefix + net.prefix + row.step) * net.width);
      __builtin_memcpy(h, given, net.width * sizeof(T));
      continue;
    }
    const int64_t token = row.step + net.first - 1;
    const T* input = token < 0 ? at<T>(net.start, 0) : tokens + (row.sample * net.tokens + token) * net.features;
    for (int64_t c = 0; c < net.width; c += kFlowPanel) {
      gemm<T>(1, min(kFlowPanel, net.width - c), net.features, input, net.features, 1,
              weights + net.proj_in.panels + c * net.features, kFlowPanel, h + c, net.width, false);
    }
    const T* bias = vectors + net.proj_in.bias;
    const T* place =
        net.positions ? at<T>(net.positions, row.sample * net.positions_batch + row.step * net.width) : nullptr;
    const T* cond = net.cond ? at<T>(net.cond, row.row * net.width) : nullptr;
    each_vector<T>(net.width, [&](int64_t c, int, auto part) {
      Vec<T> sum = load(h + c, part) + load(bias + c, part);
      if (place) sum += load(place + c, part);
      if (cond) sum += load(cond + c, part);
      store(h + c, sum, part);
    });
  }
}

// LayerNorm, or RMSNorm, of one row; y may be x.
template <typename T>
void norm_row(const FlowNetwork& net, const T* weight, int64_t width, const T* x, T* y, bool add) {
  T mean = 0;
  if (!net.rms) {
    Sum<T> total;
    each_vector<T>(width, [&](int64_t c, int slot, auto part) { total.slots[slot] += load(x + c, part); });
    mean = total.total() / width;
  }
  Sum<T> squares;
  each_vector<T>(width, [&](int64_t c, int slot, auto part) {
    const Vec<T> delta = inside<T>(load(x + c, part) - mean, part);
    squares.slots[slot] += delta * delta;
  });
  const T scale = 1 / T(__builtin_sqrt(squares.total() / width + net.eps));
  const T* bias = weight + width;
  each_vector<T>(width, [&](int64_t c, int, auto part) {
    Vec<T> n = (load(x + c, part) - mean) * scale * load(weight + c, part) + load(bias + c, part);
    if (add) n += load(y + c, part);
    store(y + c, n, part);
  });
}

template <typename T>
void product(const FlowPass& pass, const FlowProduct& op, const T* x, T* y, FlowEpilogue epilogue, int64_t begin,
             int64_t end, int64_t panel) {
  const int64_t from = panel * kFlowPanel, columns = min(kFlowPanel, op.columns - from), rows = end - begin;
  const T* b = at<T>(pass.net->weights, op.panels + from * op.depth);
  const T* bias = at<T>(pass.net->vectors, op.bias + from);
  x += begin * op.depth, y += begin * op.columns + from;
  if (epilogue == FlowEpilogue::kStore || epilogue == FlowEpilogue::kAdd) {
    gemm<T>(rows, columns, op.depth, x, op.depth, 1, b, kFlowPanel, y, op.columns, epilogue == FlowEpilogue::kAdd);
    for (int64_t i = 0; i < rows; ++i, y += op.columns) {
      each_vector<T>(columns,
                     [&](int64_t c, int, auto part) { store(y + c, load(y + c, part) + load(bias + c, part), part); });
    }
    return;
  }
  T result[kFlowPanel * kTileRows];
  for (int64_t i = 0; i < rows; i += kTileRows, x += kTileRows * op.depth) {
    const int64_t count = min(kTileRows, rows - i);
    gemm<T>(count, columns, op.depth, x, op.depth, 1, b, kFlowPanel, result, kFlowPanel, false);
    for (int64_t r = 0; r < count; ++r, y += op.columns) {
      each_vector<T>(columns, [&](int64_t c, int, auto part) {
        Vec<T> v = load(result + r * kFlowPanel + c, part) + load(bias + c, part);
        if (epilogue == FlowEpilogue::kGelu) v = gelu<false, GeluMath<T>>(v);
        if (epilogue == FlowEpilogue::kGeluTanh) v = gelu<true, GeluMath<T>>(v);
        if (epilogue == FlowEpilogue::kMultiply) v *= load(y + c, part);
        store(y + c, v, part);
      });
    }
  }
}

// Turns the pairs (2i, 2i + 1) of a head.
template <typename T>
void rotate(T* head, const T* cos, const T* sin, int64_t width) {
  for (int64_t i = 0; i < width / 2; ++i) {
    const T even = head[2 * i], odd = head[2 * i + 1];
    head[2 * i] = even * cos[i] - odd * sin[i], head[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

template <typename T>
void store_keys(const FlowPass& pass, int64_t number, int64_t begin, int64_t end) {
  const FlowNetwork& net = *pass.net;
  const FlowLayerWeights& layer = net.layer[number];
  const int64_t d = net.head_dim, heads = net.heads, kv_heads = net.kv_heads;
  const T* vectors = at<T>(net.vectors, 0);
  for (int64_t i = begin; i < end; ++i) {
    const FlowRow row = pass.rows[i];
    const int64_t slot = row.step + net.prefix;
    T* qkv = at<T>(pass.qkv, i * (heads + 2 * kv_heads) * d);
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      T* head = qkv + h * d;
      const int64_t norm = h < heads ? layer.q_norm : layer.k_norm;
      if (norm >= 0) norm_row(net, vectors + norm, d, head, head, false);
      if (net.rope) {
        const T* cos = at<T>(net.rope, slot * (d / 2));
        rotate(head, cos, cos + net.rope_slots * (d / 2), d);
      }
    }
    const T scale = *at<T>(net.scale, row.row);
    for (int64_t c = 0; c < heads * d; ++c) qkv[c] *= scale;
    const int64_t cache = (number * net.batch * net.streams + row.row) * kv_heads;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const T *key = qkv + (heads + h) * d, *value = key + kv_heads * d;
      T* keys = at<T>(net.keys, (cache + h) * d * net.slots + slot);
      for (int64_t c = 0; c < d; ++c) keys[c * net.slots] = key[c];
      __builtin_memcpy(at<T>(net.values, ((cache + h) * net.slots + slot) * d), value, d * sizeof(T));
    }
  }
}

// Softmax of the first `count` scores of a row.
template <typename T>
void softmax_row(T* scores, int64_t count) {
  T largest = -T(__builtin_inff());
  for (int64_t c = 0; c < count; ++c) largest = scores[c] > largest ? scores[c] : largest;
  Sum<T> total;
  each_vector<T>(count, [&](int64_t c, int slot, auto part) {
    const Vec<T> p = exp(load(scores + c, part) - largest);
    store(scores + c, p, part);
    total.slots[slot] += inside<T>(p, part);
  });
  const T inverse = 1 / total.total();
  each_vector<T>(count, [&](int64_t c, int, auto part) { store(scores + c, load(scores + c, part) * inverse, part); });
}

template <typename T>
void attend(const FlowPass& pass, int64_t number, int64_t head, int64_t begin, int64_t end, T* scores) {
  const FlowNetwork& net = *pass.net;
  const int64_t d = net.head_dim, rows = end - begin, group = net.heads / net.kv_heads;
  const FlowRow row = pass.rows[begin];
  const int64_t first = row.step + net.prefix + 1;  // slots that the first row sees; each later one sees one more
  const int64_t cache = (number * net.batch * net.streams + row.row) * net.kv_heads + head / group;
  const T *keys = at<T>(net.keys, cache * d * net.slots), *values = at<T>(net.values, cache * net.slots * d);
  const int64_t pitch = (net.heads + 2 * net.kv_heads) * d, out_pitch = net.heads * d;
  const T* q = at<T>(pass.qkv, begin * pitch + head * d);
  T* out = at<T>(pass.attended, begin * out_pitch + head * d);
  gemm<T>(rows, first + rows - 1, d, q, pitch, 1, keys, net.slots, scores, net.slots, false);
  for (int64_t r = 0; r < rows; ++r) softmax_row(scores + r * net.slots, first + r);
  // Values that a row must not see are never multiplied: 0 times an infinity or NaN there would be NaN. Each row sums
  // the slots before the tile and then its own, so that no bit depends on which rows share the tile.
  const int64_t before = (first - 1) / kFlowTile * kFlowTile;
  if (before > 0) gemm<T>(rows, d, before, scores, net.slots, 1, values, d, out, out_pitch, false);
  for (int64_t r = 0; r < rows; ++r) {
    gemm<T>(1, d, first + r - before, scores + r * net.slots + before, net.slots, 1, values + before * d, d,
            out + r * out_pitch, out_pitch, before > 0);
  }
}

template <typename T>
void affine_token(const FlowAffineOptions& options, int64_t features, const void* z, const void* params,
                  const void* uncond, double guidance, void* out, double* statistics) {
  T measured[kFlowStatistics];
  affine_inverse_row<T>(options, features, at<T>(z, 0), at<T>(params, 0), static_cast<const T*>(uncond), T(guidance),
                        nullptr, at<T>(out, 0), measured);
  for (int i = 0; i < kFlowStatistics; ++i) statistics[i] = measured[i];
}

}  // namespace

void flow_embed(const FlowPass& pass, const void* tokens, int64_t begin, int64_t end) {
  pass.net->wide ? embed(pass, at<double>(tokens, 0), begin, end) : embed(pass, at<float>(tokens, 0), begin, end);
}

void flow_norm(const FlowPass& pass, int64_t weights, int64_t width, const void* x, void* y, bool add, int64_t begin,
               int64_t end) {
  const FlowNetwork& net = *pass.net;
  for (int64_t i = begin * width; i < end * width; i += width) {
    net.wide ? norm_row(net, at<double>(net.vectors, weights), width, at<double>(x, i), at<double>(y, i), add)
             : norm_row(net, at<float>(net.vectors, weights), width, at<float>(x, i), at<float>(y, i), add);
  }
}

void flow_pack(Storage storage, const void* weight, int64_t stride, int64_t columns, int64_t depth, void* panels) {
  FA_DISPATCH_STORAGE(StorageOf{storage}, [&] {
    using T = Compute<S>;
    for (int64_t from = 0; from < columns; from += kFlowPanel) {
      pack_transposed<T>(static_cast<const S*>(weight) + from * stride, stride, min(kFlowPanel, columns - from), depth,
                         static_cast<T*>(panels) + from * depth, kFlowPanel);
    }
  }());
}

void flow_product(const FlowPass& pass, const FlowProduct& op, const void* x, void* y, FlowEpilogue epilogue,
                  int64_t begin, int64_t end, int64_t panel) {
  pass.net->wide ? product(pass, op, at<double>(x, 0), at<double>(y, 0), epilogue, begin, end, panel)
                 : product(pass, op, at<float>(x, 0), at<float>(y, 0), epilogue, begin, end, panel);
}

void flow_store_keys(const FlowPass& pass, int64_t layer, int64_t begin, int64_t end) {
  pass.net->wide ? store_keys<double>(pass, layer, begin, end) : store_keys<float>(pass, layer, begin, end);
}

void flow_attend(const FlowPass& pass, int64_t layer, int64_t head, int64_t begin, int64_t end, void* scratch) {
  pass.net->wide ? attend(pass, layer, head, begin, end, at<double>(scratch, 0))
                 : attend(pass, layer, head, begin, end, at<float>(scratch, 0));
}

void flow_affine_token(bool wide, const FlowAffineOptions& options, int64_t features, const void* z, const void* params,
                       const void* uncond, double guidance, void* out, double* statistics) {
  wide ? affine_token<double>(options, features, z, params, uncond, guidance, out, statistics)
       : affine_token<float>(options, features, z, params, uncond, guidance, out, statistics);
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
