// What csrc/cpu/flow_inverse.cpp hands to its kernels. Plain data only: kernels are compiled per instruction set.
#pragma once

#include <cstdint>

#include "cpu/flow_affine.h"

namespace flowattn {

constexpr int64_t kFlowPanel = 64;  // columns of a product that lie together in the packed weights
constexpr int64_t kFlowTile = 8;    // slots; the steps of a sample in one such run share a pass over keys and values

// Offsets into the weights, where a product is its panels, each (depth, kFlowPanel), and into the vectors: its bias; a
// norm is its weight, and then its bias. -1: absent.
struct FlowProduct {
  int64_t panels, bias, depth, columns;
};
struct FlowLayerWeights {
  int64_t norm1, norm2, q_norm, k_norm, post1, post2;
  FlowProduct qkv, proj, gate, up, down;
};

struct FlowNetwork {
  bool wide;  // float64, else float32
  int64_t width, features, outputs, heads, kv_heads, head_dim, hidden, layers;
  bool rms, gated;
  double eps;
  const void *weights, *vectors;
  FlowProduct proj_in, proj_out;
  const FlowLayerWeights* layer;
  int64_t final_norm;

  int64_t batch, streams, tokens, first, prefix, slots;  // slots: of the cache, a row of keys (head_dim, slots)
  const void *positions, *cond, *prefix_hidden, *rope, *start, *scale;
  int64_t positions_batch;  // stride between samples, 0 if they share
  int64_t rope_slots;
  void *keys, *values;  // (layers, S, Hkv, head_dim, slots), (layers, S, Hkv, slots, head_dim)
};

// Step `step` of stream-row `row` = stream * batch + sample; its place in the sequence is prefix + step.
struct FlowRow {
  int64_t row, sample, step;
};

// What some rows go through the layers with. Every buffer has one meaning and so one row length, since threads at
// different places in a layer use it side by side.
struct FlowPass {
  const FlowNetwork* net;
  const FlowRow* rows;
  int64_t count;
  void *hidden, *work, *added;        // (width): residual stream, its norm, what a post-norm takes
  void *qkv, *attended, *wide, *out;  // ((heads + 2 kv_heads) d), (heads d), (net.hidden), (outputs)
};

enum class FlowEpilogue { kStore, kAdd, kGelu, kGeluTanh, kMultiply };

}  // namespace flowattn

// Panels of a weight (columns, depth), in the compute type of `storage`.
FA_ISA_DECLARE(void flow_pack(Storage storage, const void* weight, int64_t stride, int64_t columns, int64_t depth,
                              void* panels))
FA_ISA_DECLARE(void flow_embed(const FlowPass& pass, const void* tokens, int64_t begin, int64_t end))
// y = norm(x), added to y if `add`; x and y have rows of `width` numbers.
FA_ISA_DECLARE(void flow_norm(const FlowPass& pass, int64_t weights, int64_t width, const void* x, void* y, bool add,
                              int64_t begin, int64_t end))
// One panel of y = x W + bias for rows begin..end; the epilogue says what becomes of it.
FA_ISA_DECLARE(void flow_product(const FlowPass& pass, const FlowProduct& product, const void* x, void* y,
                                 FlowEpilogue epilogue, int64_t begin, int64_t end, int64_t panel))
// Queries made ready in place, keys and values put into the cache.
FA_ISA_DECLARE(void flow_store_keys(const FlowPass& pass, int64_t layer, int64_t begin, int64_t end))
// Rows begin..end, consecutive steps of one sample in one tile of slots, into `attended`; scratch: kFlowTile * slots
// numbers.
FA_ISA_DECLARE(void flow_attend(const FlowPass& pass, int64_t layer, int64_t head, int64_t begin, int64_t end,
                                void* scratch))
// u = z sigma + mu of one token.
FA_ISA_DECLARE(void flow_affine_token(bool wide, const FlowAffineOptions& options, int64_t features, const void* z,
                                      const void* params, const void* uncond, double guidance, void* out,
                                      double* statistics))
