// Rows on a GPU: vectors of V elements as floats, teams of threads that share a row, sums over a team. No torch here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flowattn {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// V elements, moved at once if they fill at most 16 bytes, else in pieces of 16.
template <class S, int V>
struct alignas(sizeof(S) * V < 16 ? sizeof(S) * V : 16) Pack {
  S values[V];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// exp with the accuracy of a factor: relative to 1 where x <= 0. 0 where the result would be below 2^-126.
__device__ inline float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

// 1 / x, x a normal float; one Newton step, since the bare approximation may be off by one in the last place.
__device__ inline float fast_inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return fmaf(result, fmaf(-x, result, 1.0f), result);
}

template <int V>
struct Floats {
  float values[V];

  __device__ float& operator[](int e) { return values[e]; }
  __device__ float operator[](int e) const { return values[e]; }
};

template <int V, class S>
__device__ inline Pack<S, V> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, V>*>(from);
}

template <class S, int V>
__device__ inline Floats<V> unpack(const Pack<S, V>& pack) {
  Floats<V> to;
#pragma unroll
  for (int e = 0; e < V; ++e) to[e] = to_float(pack.values[e]);
  return to;
}

template <int V, class S>
__device__ inline Floats<V> load(const S* from) {
  return unpack(load_pack<V>(from));
}

template <int V, class S>
__device__ inline void store(S* to, const Floats<V>& from) {
  Pack<S, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) from_float(from[e], pack.values[e]);
  *reinterpret_cast<Pack<S, V>*>(to) = pack;
}

template <int V>
__device__ inline Floats<V> splat(float value) {
  Floats<V> to;
#pragma unroll
  for (int e = 0; e < V; ++e) to[e] = value;
  return to;
}

// A vector over the columns, in the type of the rows or in float32.
struct ColumnVector {
  const void* data;  // nullptr: absent
  bool is_float;
};

template <int V, class S>
__device__ inline Floats<V> load(const ColumnVector& vector, int column, float missing) {
  if (!vector.data) return splat<V>(missing);
  if (vector.is_float) return load<V>(static_cast<const float*>(vector.data) + column);
  return load<V>(static_cast<const S*>(vector.data) + column);
}

__device__ inline float2 warp_sum(float2 value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value.x += __shfl_xor_sync(kWholeWarp, value.x, step);
    value.y += __shfl_xor_sync(kWholeWarp, value.y, step);
  }
  return value;
}

// Sum over a team, which is a warp or a whole block; every thread gets the same bits. All threads of the team call it.
template <int Team>
__device__ inline float2 team_sum(float2 value) {
  static_assert(Team % kWarp == 0 && Team <= kWarp * kWarp);
  value = warp_sum(value);
  if constexpr (Team > kWarp) {
    __shared__ float2 parts[Team / kWarp];
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = warp_sum(lane < Team / kWarp ? parts[lane] : float2{0, 0});
    __syncthreads();  // the next call writes to parts
  }
  return value;
}

// Calls f(k, column) for the k-th vector of this thread: K vectors in registers, or, with K = 0, any number of them.
template <int V, int Team, int K, class F>
__device__ inline void each_vector(int width, F f) {
  const int first = static_cast<int>(threadIdx.x % Team) * V;
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = first + k * Team * V;
      if (column < width) f(k, column);
    }
  } else {
    for (int column = first; column < width; column += Team * V) f(0, column);
  }
}

// A thread's vectors of a row, or of a vector over the columns. In registers (K > 0) all are asked for before the first
// is used: what depends on the arguments is decided once, not between two loads. Else each is read when it is wanted.
template <int V, int Team, int K, class S>
class RowColumns {
 public:
  __device__ RowColumns(const S* row, int width) : row_(row) {
    if constexpr (K > 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) packs_[k] = {};
      if (row) each_vector<V, Team, K>(width, [&](int k, int column) { packs_[k] = load_pack<V>(row + column); });
    }
  }
  __device__ Floats<V> operator()(int k, int column) const {
    if constexpr (K > 0) return unpack(packs_[k]);
    return row_ ? load<V>(row_ + column) : splat<V>(0.0f);
  }

 private:
  const S* row_;  // nullptr: zeros
  Pack<S, V> packs_[K > 0 ? K : 1];
};

template <int V, int Team, int K, class S>
class VectorColumns {
 public:
  __device__ VectorColumns(const ColumnVector& vector, int width, float missing) : vector_(vector), missing_(missing) {
    if constexpr (K > 0) {
      const auto fill = [&](auto value) {
        each_vector<V, Team, K>(width, [&](int k, int column) { floats_[k] = value(column); });
      };
      if (!vector.data) {
        fill([&](int) { return splat<V>(missing); });
      } else if (vector.is_float) {
        fill([&](int column) { return load<V>(static_cast<const float*>(vector.data) + column); });
      } else {
        fill([&](int column) { return load<V>(static_cast<const S*>(vector.data) + column); });
      }
    }
  }
  __device__ Floats<V> operator()(int k, int column) const {
    if constexpr (K > 0) return floats_[k];
    return load<V, S>(vector_, column, missing_);
  }

 private:
  const ColumnVector& vector_;
  float missing_;
  Floats<V> floats_[K > 0 ? K : 1];
};

}  // namespace flowattn
