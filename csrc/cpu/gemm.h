// Register-tiled matrix products of small row-major tiles, the inner loop of every CPU op (see simd.h for the
// namespace).
#pragma once

#include "cpu/simd.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

// Register tile: kTileRows x kTileVectors accumulators, one row of B and one broadcast of A; 32 or 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// The next step of a loop over `rest` elements that takes `most` at a time and splits the last two steps evenly.
inline int64_t balanced_step(int64_t rest, int64_t most) {
  return rest <= most ? rest : rest < 2 * most ? (rest + 1) / 2 : most;
}

template <typename T, int Rows, int Vectors, bool Tail>
inline void gemm_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c,
                      int64_t ldc, int tail, bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_col, b += ldb) {
    Vec<T> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      row[v] = Tail && v == Vectors - 1 ? load_tail(b + v * W, tail) : load(b + v * W);
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      Vec<T> scalar = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += scalar * row[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r, c += ldc) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      if (Tail && v == Vectors - 1) {
        store_tail(c + v * W, accumulate ? sum[r][v] + load_tail(c + v * W, tail) : sum[r][v], tail);
      } else {
        store(c + v * W, accumulate ? sum[r][v] + load(c + v * W) : sum[r][v]);
      }
    }
  }
}

// Calls gemm_tile with `rows` in 1..Rows as a constant.
template <typename T, int Rows, int Vectors, bool Tail, typename... Args>
inline void gemm_rows(int64_t rows, Args... args) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return gemm_rows<T, Rows - 1, Vectors, Tail>(rows, args...);
  }
  gemm_tile<T, Rows, Vectors, Tail>(args...);
}

template <typename T, int Vectors, bool Tail>
inline void gemm_panel(int64_t m, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb,
                       T* c, int64_t ldc, int tail, bool accumulate) {
  for (int64_t i = 0; i < m;) {
    int64_t rows = balanced_step(m - i, kTileRows);
    gemm_rows<T, kTileRows, Vectors, Tail>(rows, depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, tail,
                                           accumulate);
    i += rows;
  }
}

// Calls gemm_panel with `vectors` in 1..Vectors as a constant.
template <typename T, int Vectors, typename... Args>
inline void gemm_vectors(int64_t vectors, int tail, Args... args) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) return gemm_vectors<T, Vectors - 1>(vectors, tail, args...);
  }
  if (tail == 0) {
    gemm_panel<T, Vectors, false>(args...);
  } else {
    gemm_panel<T, Vectors, true>(args...);
  }
}

// C (m, n) = A (m, depth) B (depth, n), added to C if `accumulate`. A has any strides, rows of B and C are contiguous;
// only the named elements are touched. Element (i, j) sums over the depth in order, whatever the other sizes are.
template <typename T>
inline void gemm(int64_t m, int64_t n, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb,
                 T* c, int64_t ldc, bool accumulate) {
  constexpr int W = kLanes<T>;
  int64_t vectors = (n + W - 1) / W;
  for (int64_t v = 0; v < vectors;) {
    int64_t step = balanced_step(vectors - v, kTileVectors);
    int tail = v + step == vectors ? n % W : 0;
    gemm_vectors<T, kTileVectors>(step, tail, m, depth, a, a_row, a_col, b + v * W, ldb, c + v * W, ldc, tail,
                                  accumulate);
    v += step;
  }
}

// dst (cols, ld)[j][i] = src[i * stride + j] for `rows` rows of a storage type; the row ends up to the next whole
// vector are zeroed, so ld must be a multiple of kLanes<T>.
template <typename T, typename S>
inline void pack_transposed(const S* src, int64_t stride, int64_t rows, int64_t cols, T* dst, int64_t ld) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; i += W) {
    int64_t height = min(W, rows - i);
    for (int64_t j = 0; j < cols; j += W) {
      int64_t width = min(W, cols - j);
      Vec<T> block[W] = {};
      for (int64_t r = 0; r < height; ++r) {
        const S* p = src + (i + r) * stride + j;
        block[r] = width == W ? load(p) : load_tail(p, int(width));
      }
      transpose_registers<T>(block);
      for (int64_t r = 0; r < width; ++r) store(dst + (j + r) * ld + i, block[r]);
    }
  }
}

// dst (rows, ld) = factor * src, row by row, from the storage type to the compute type.
template <typename T, typename S>
inline void load_rows(const S* src, int64_t stride, int64_t rows, int64_t cols, T factor, T* dst, int64_t ld) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i, src += stride, dst += ld) {
    int64_t j = 0;
    for (; j + W <= cols; j += W) store(dst + j, load(src + j) * factor);
    if (j < cols) store_tail(dst + j, load_tail(src + j, int(cols - j)) * factor, int(cols - j));
  }
}

// dst = factor * src (rows, ld), row by row, from the compute type to the storage type.
template <typename S, typename T>
inline void store_rows(const T* src, int64_t ld, int64_t rows, int64_t cols, T factor, S* dst, int64_t stride) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i, src += ld, dst += stride) {
    int64_t j = 0;
    for (; j + W <= cols; j += W) store(dst + j, load(src + j) * factor);
    if (j < cols) store_tail(dst + j, load_tail(src + j, int(cols - j)) * factor, int(cols - j));
  }
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
