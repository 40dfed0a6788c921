// Rows of features, running sums and scratch memory that the two Flow-Attention kernels share.
//
// A row in scratch memory has padded(width) elements; those past the width are 0, and so are whole rows of hidden
// tokens. The eps of x (+) y = sum (x + eps)(y + eps) comes from a row `eps` that is 0 past the width.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/flow_attention.h"
#include "cpu/row_vectors.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

constexpr double kReluEps = 1e-6;

inline bool seen(const FlowMask& mask, int64_t row, int64_t t) {
  return !mask.data || mask.data[row * mask.row + t * mask.time];
}

template <typename S>
inline S* token(const ScanTensor& x, int64_t row, int64_t t, int64_t head) {
  return static_cast<S*>(x.data) + row * x.row + t * x.time + head * x.head;
}

template <typename T>
inline T* scalars(const FlowScalars& x, int64_t plane, int64_t row, int64_t head, int64_t t) {
  return static_cast<T*>(x.data) + plane * x.plane + row * x.row + head * x.head + t;
}

// Row `index` of (states * heads, size), or nullptr.
template <typename T>
inline T* state_row(void* data, int64_t index, int64_t size) {
  return data ? static_cast<T*>(data) + index * size : nullptr;
}

template <typename T>
inline void clear_row(T* row, int64_t n) {
  __builtin_memset(row, 0, n * sizeof(T));
}

template <typename T>
inline T sigmoid_of(T x) {
  return 1 / (1 + exp(-splat<T>(x))[0]);
}

// row = phi(x), zeros past the width.
template <typename T, typename S>
inline void load_features(const S* x, bool relu, int64_t width, T* row) {
  each_vector<T>(width, [&](int64_t c, int, auto part) {
    const Vec<T> raw = load(x + c, part);
    const Vec<T> f = relu ? (raw > 0 ? raw : Vec<T>{}) + T(kReluEps) : T(1) / (T(1) + exp(-raw));
    store(row + c, inside<T>(f, part));
  });
}

// to = gradient * phi'(x), given phi(x) in `row`.
template <typename T, typename S>
inline void store_feature_gradient(const T* gradient, const T* row, const S* x, bool relu, int64_t width, S* to) {
  each_vector<T>(width, [&](int64_t c, int, auto part) {
    const Vec<T> g = load(gradient + c), f = load(row + c);
    store(to + c, relu ? (load(x + c, part) > 0 ? g : Vec<T>{}) : g * f * (T(1) - f), part);
  });
}

template <typename S>
inline void clear_token(S* to, int64_t width) {
  __builtin_memset(to, 0, width * sizeof(S));
}

// y += factor * (x + plus), over whole vectors.
template <typename T>
inline void add_row(T* y, T factor, const T* x, const T* plus, int64_t ld) {
  for (int64_t j = 0; j < ld; j += kLanes<T>) store(y + j, load(y + j) + factor * (load(x + j) + load(plus + j)));
}
template <typename T>
inline void add_row(T* y, T factor, const T* x, int64_t ld) {
  for (int64_t j = 0; j < ld; j += kLanes<T>) store(y + j, load(y + j) + factor * load(x + j));
}
template <typename T>
inline void scale_row(T* y, T factor, int64_t ld) {
  for (int64_t j = 0; j < ld; j += kLanes<T>) store(y + j, load(y + j) * factor);
}

template <typename T>
inline T dot_rows(const T* x, const T* y, int64_t ld) {
  Vec<T> sum = {};
  for (int64_t j = 0; j < ld; j += kLanes<T>) sum += load(x + j) * load(y + j);
  return reduce_sum<T>(sum);
}

// sum (x + plus) y
template <typename T>
inline T dot_rows(const T* x, const T* plus, const T* y, int64_t ld) {
  Vec<T> sum = {};
  for (int64_t j = 0; j < ld; j += kLanes<T>) sum += (load(x + j) + load(plus + j)) * load(y + j);
  return reduce_sum<T>(sum);
}

// A row of the compute type times one of the storage type.
template <typename T, typename S>
inline T dot_token(const T* x, const S* y, int64_t width) {
  Sum<T> sum;
  each_vector<T>(width,
                 [&](int64_t c, int slot, auto part) { sum.slots[slot] += load(x + c, part) * load(y + c, part); });
  return sum.total();
}

// A sum of rows over a long sequence: `part` holds the current chunk, `whole` the chunks before it, in double.
template <typename T>
struct LongSum {
  double* whole;
  T* part;
  T* before;  // `whole`, or `whole` plus eps, as the chunk starts

  template <typename Scratch>
  LongSum(Scratch& cursor, int64_t ld) {
    whole = reinterpret_cast<double*>(cursor.take(ld * sizeof(double) / sizeof(T)));
    part = cursor.take(ld), before = cursor.take(ld);
  }
  void start(const T* from, int64_t width, int64_t ld) {
    for (int64_t j = 0; j < ld; ++j) whole[j] = from && j < width ? from[j] : 0;
    clear_row(part, ld);
  }
  // Adds the chunk to the sum.
  void fold(int64_t ld) {
    for (int64_t j = 0; j < ld; ++j) whole[j] += part[j];
    clear_row(part, ld);
  }
  const T* plus(const T* eps, int64_t ld) {
    for (int64_t j = 0; j < ld; ++j) before[j] = T(whole[j] + eps[j]);
    return before;
  }
  const T* value(int64_t ld) {
    for (int64_t j = 0; j < ld; ++j) before[j] = T(whole[j]);
    return before;
  }
  void finish(T* to, int64_t width) const {
    for (int64_t j = 0; to && j < width; ++j) to[j] = T(whole[j]);
  }
};

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
