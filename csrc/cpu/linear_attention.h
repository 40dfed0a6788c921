// What csrc/cpu/linear_attention.cpp hands to its kernel.
//
// One kind of pass serves the result and all three gradients. With queries a, keys b, values c, in the order in which
// the pass walks, and G the running sum of the log decays,
//
//   y_i = sum over j <= i of e^(G_i - G_j) (a_i . b_j + x_i w_j) c_j  +  e^(G_i) (S^T a_i + x_i z),
//
// where S = sum of decayed b c^T and z = sum of decayed w c come from the left. The result is a, b, c = q, k, v walked
// forward; dq = dy, v, k forward; dk = v, dy, q and dv = k, q, dy from the other end. The pairs (x, w) carry the
// gradient of the normaliser.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

// As FEATURE_MAPS in python/flowattn/reference/linear_attention.py.
enum class FeatureMap { kIdentity, kElu1, kRelu, kReluEps, kSigmoid, kExp, kExpShifted, kSoftmax };

// Rows (rows, T, heads, width) in the storage type, phi(scale * rows) * factor in use. Scalars here and below are in
// the compute type, (rows, T, query heads); absent is 1.
struct LinearRows {
  ScanTensor rows;
  int64_t width, group;  // query heads that share a head of the rows
  FeatureMap map;
  ScanTensor factor;
  double scale = 1;
};

struct LinearAttention {
  Storage storage;
  LinearRows a, b, c;
  LinearRows input;  // what the result is the gradient of: y becomes phi'(input) y; absent: y itself
  int64_t members;   // query heads that are added up in one head of the result
  ScanTensor out;    // absent: only the state is wanted
  bool walks;        // false: S and z are those given, of all tokens, and nothing is added to them
  ScanTensor decay;
  bool late_decay;  // a token's decay acts in the step after it
  bool pairs;       // whether there are x and w
  ScanTensor x, w;
  double scale, eps;      // y times scale
  ScanTensor out_factor;  // and times this
  bool normalize;         // y / den, and keep
  ScanTensor den;         // scale * (weights of a_i summed) + eps
  ScanTensor product;     // product[i] = or -= phi(input_i) . y_i, y_i without j = i
  bool subtract;
  // (S, query heads, D * M) and (S, query heads, D). S is read and written with its dims exchanged if `transposed`.
  ScanState state, vector, final_state, final_vector;
  bool transposed;
};

// What the gradient of the result needs once a row: factor = row_scale * scale / den and x = -scale (dout . out) / den.
struct LinearAttentionRows {
  Storage storage;
  int64_t width, batch, tokens, heads;
  double scale;
  ScanTensor dout, out, den, row_scale, factor, x;
};

}  // namespace flowattn

FA_ISA_DECLARE(int64_t linear_attention_state_bytes(const LinearAttention& op))
FA_ISA_DECLARE(int64_t linear_attention_scratch_bytes(const LinearAttention& op))
FA_ISA_DECLARE(void linear_attention_pass(const LinearAttention& op, ScanPhase phase, const ScanTask& task,
                                          std::byte* carry, std::byte* local, std::byte* scratch))
FA_ISA_DECLARE(void linear_attention_rows(const LinearAttentionRows& op, int64_t begin, int64_t end))
