// Rows, states and typed access that the scan kernels share.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/scan.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

constexpr int64_t kScanBlock = 32;    // tokens whose scalars are computed together
constexpr int64_t kStateScalars = 8;  // doubles in front of the row of a state

// float rows as vectors of double, which takes half as many lanes.
inline Vec<double> load_wide(const float* p) {
  typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
  return __builtin_convertvector(load_bits<Narrow>(p), Vec<double>);
}
inline void store_wide(float* p, Vec<double> v) {
  typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow narrow = __builtin_convertvector(v, Narrow);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

// The first n <= kLanes<A> elements of a row in type A; with a whole vector n is a constant and the branch is gone.
template <typename A, typename S>
inline Vec<A> load_lanes(const S* p, int n) {
  if constexpr (std::is_same_v<A, Compute<S>>) {
    return n == kLanes<A> ? load(p) : load_tail(p, n);
  } else {
    if (n == kLanes<A>) return load_wide(p);
    S buffer[kLanes<A>] = {};
    __builtin_memcpy(buffer, p, n * sizeof(S));
    return load_wide(buffer);
  }
}

template <typename A, typename S>
inline void store_lanes(S* p, Vec<A> v, int n) {
  if constexpr (std::is_same_v<A, Compute<S>>) {
    n == kLanes<A> ? store(p, v) : store_tail(p, v, n);
  } else {
    if (n == kLanes<A>) return store_wide(p, v);
    S buffer[kLanes<A>];
    store_wide(buffer, v);
    __builtin_memcpy(p, buffer, n * sizeof(S));
  }
}

template <typename A, typename Body>
inline __attribute__((always_inline)) void for_lanes(int64_t width, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, kLanes<A>);
  if (j < width) body(j, int(width - j));
}

template <typename S>
inline Compute<S> load_one(const S* p) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    return *p;
  } else {
    return load_tail(p, 1)[0];
  }
}

template <typename S>
inline void store_one(S* p, Compute<S> x) {
  store_tail(p, splat(x), 1);
}

template <typename S>
inline S* at(const ScanTensor& x, const ScanSegment& segment, int64_t i, int64_t head) {
  return static_cast<S*>(x.data) + segment.row * x.row + (segment.first + i * segment.step) * x.time + head * x.head;
}

template <typename T>
inline T* at(const ScanState& x, const ScanSegment& segment, int64_t head) {
  return static_cast<T*>(x.data) + segment.state * x.row + head * x.head;
}

// The running state of one head in a carry: a few scalars, then a row of `padded(width)` elements.
template <typename A>
struct HeadState {
  double* scalars;
  A* row;

  HeadState(std::byte* base, int64_t bytes, int64_t index)
      : scalars(reinterpret_cast<double*>(base + index * bytes)), row(reinterpret_cast<A*>(scalars + kStateScalars)) {}
};

inline int64_t state_bytes(int64_t width, int64_t element_size) {
  return kStateScalars * int64_t(sizeof(double)) + padded(width) * element_size;
}

// Scalars of a head, kept in memory of another type than they are computed in: values i..i+n of a (rows, T, heads)
// tensor.
template <typename E>
inline void read_scalars(const ScanTensor& x, Storage storage, const ScanSegment& segment, int64_t i, int64_t n,
                         int64_t head, E* out) {
  const auto read = [&](auto tag) {
    using S = decltype(tag);
    for (int64_t k = 0; k < n; ++k) out[k] = load_one(at<const S>(x, segment, i + k, head));
  };
  if constexpr (std::is_same_v<E, double>) {
    read(double{});
  } else {
    storage == Storage::kHalf ? read(Half{}) : storage == Storage::kBFloat16 ? read(BFloat16{}) : read(float{});
  }
}

template <typename E>
inline void write_scalar(const ScanTensor& x, Storage storage, const ScanSegment& segment, int64_t i, int64_t head,
                         E value) {
  if constexpr (std::is_same_v<E, double>) {
    *at<double>(x, segment, i, head) = value;
  } else if (storage == Storage::kHalf) {
    store_one(at<Half>(x, segment, i, head), value);
  } else if (storage == Storage::kBFloat16) {
    store_one(at<BFloat16>(x, segment, i, head), value);
  } else {
    *at<float>(x, segment, i, head) = value;
  }
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
