// Rotary position tables inside attention kernels: turns packed tiles of queries and keys, and turns gradients back.
#pragma once

#include "cpu/attention_tile.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {

// Rows of x (rows, ld): channel pairs of row r turn by the angles of table row first + r, or back if `inverse`.
template <typename T>
inline void rotate_rows(const Rotation& at, int64_t first, int64_t rows, T* x, int64_t ld, bool inverse) {
  const int64_t pairs = at.pairs, step = at.interleaved ? 2 : 1, other = at.interleaved ? 1 : pairs;
  const T sign = inverse ? -1 : 1;
  for (int64_t r = 0; r < rows; ++r, x += ld) {
    const T* cos = static_cast<const T*>(at.cos) + (first + r) * pairs;
    const T* sin = static_cast<const T*>(at.sin) + (first + r) * pairs;
#pragma omp simd
    for (int64_t c = 0; c < pairs; ++c) {
      const T a = x[c * step], b = x[c * step + other], turn = sign * sin[c];
      x[c * step] = a * cos[c] - b * turn;
      x[c * step + other] = b * cos[c] + a * turn;
    }
  }
}

// The same for rows that lie in the columns of x (width, ld).
template <typename T>
inline void rotate_columns(const Rotation& at, int64_t first, int64_t rows, T* x, int64_t ld) {
  for (int64_t c = 0; c < at.pairs; ++c) {
    const T* cos = static_cast<const T*>(at.cos_columns) + c * at.rows + first;
    const T* sin = static_cast<const T*>(at.sin_columns) + c * at.rows + first;
    T* a = x + (at.interleaved ? 2 * c : c) * ld;
    T* b = x + (at.interleaved ? 2 * c + 1 : c + at.pairs) * ld;
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j) {
      const T before = a[j];
      a[j] = before * cos[j] - b[j] * sin[j];
      b[j] = b[j] * cos[j] + before * sin[j];
    }
  }
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
