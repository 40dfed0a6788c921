// The encoder fusions on the CPU. A row is walked in vectors; what a row is walked twice for stays in scratch memory.
#include "cpu/encoder_fusions.h"
#include "cpu/gelu_math.h"
#include "cpu/row_vectors.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename S>
inline S* row_of(const FusionRows& rows, int64_t row) {
  return rows.data ? static_cast<S*>(rows.data) + row * rows.stride : nullptr;
}

template <typename S>
inline void clear(S* row, int64_t width) {
  if (row) __builtin_memset(row, 0, width * sizeof(S));
}

// --- bias + GELU

template <typename S, bool Tanh, typename T = Compute<S>>
void gelu_fwd(const BiasGelu& op, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(op.bias);
  for (int64_t row = begin; row < end; ++row) {
    const S* x = row_of<const S>(op.x, row);
    S* y = row_of<S>(op.y, row);
    each_vector<T>(op.width, [&](int64_t c, int, auto part) {
      store(y + c, gelu<Tanh, GeluMath<T>>(load(x + c, part) + load(bias + c, part)), part);
    });
  }
}

template <typename S, bool Tanh, typename T = Compute<S>>
void gelu_bwd(const BiasGelu& op, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(op.bias);
  const int64_t step = run_rows(op.rows);
  for (int64_t run = begin; run < end; ++run) {
    T* sums = op.sums ? static_cast<T*>(op.sums) + run * op.width : nullptr;
    clear(sums, op.width);
    for (int64_t row = run * step; row < min((run + 1) * step, op.rows); ++row) {
      const S *x = row_of<const S>(op.x, row), *dy = row_of<const S>(op.dy, row);
      S* dx = row_of<S>(op.dx, row);
      each_vector<T>(op.width, [&](int64_t c, int, auto part) {
        const Vec<T> u = load(x + c, part) + load(bias + c, part);
        const Vec<T> du = load(dy + c, part) * gelu_slope<Tanh, GeluMath<T>>(u);
        store(dx + c, du, part);
        if (sums) store(sums + c, load(sums + c, part) + du, part);
      });
    }
  }
}

// --- bias + residual + LayerNorm

// z = x + bias + residual of one row.
template <typename S, typename T, typename Part>
inline Vec<T> sum_of_row(const S* x, const T* bias, const S* residual, int64_t c, Part part) {
  const Vec<T> z = load(x + c, part) + load(bias + c, part);
  return residual ? z + load(residual + c, part) : z;
}

template <typename S, typename T = Compute<S>>
void norm_fwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end, T* z) {
  const T *bias = static_cast<const T*>(op.bias), *weight = static_cast<const T*>(op.weight);
  const T* ln_bias = static_cast<const T*>(op.ln_bias);
  for (int64_t row = begin; row < end; ++row) {
    S *y = row_of<S>(op.y, row), *sum = row_of<S>(op.z, row);
    T* stats = static_cast<T*>(op.stats) + 2 * row;
    const int64_t from = op.index ? op.index[row] : row;
    if (op.index && (from < 0 || from >= op.indexed_rows)) {
      clear(y, op.width);
      clear(sum, op.width);
      clear(stats, 2);
      continue;
    }
    const S *x = row_of<const S>(op.x, from), *residual = row_of<const S>(op.residual, from);
    Sum<T> total;
    each_vector<T>(op.width, [&](int64_t c, int slot, auto part) {
      const Vec<T> v = sum_of_row(x, bias, residual, c, part);
      store(z + c, v, part);
      if (sum) store(sum + c, v, part);
      total.slots[slot] += inside<T>(v, part);
    });
    T mean = total.total() / op.width;
    Sum<T> first, second;
    each_vector<T>(op.width, [&](int64_t c, int slot, auto part) {
      const Vec<T> delta = inside<T>(load(z + c, part) - mean, part);
      first.slots[slot] += delta;
      second.slots[slot] += delta * delta;
    });
    // The rounding of the mean, taken back: a constant row has variance 0 exactly, whatever its value. A square that
    // overflowed stays infinite, so that the row becomes ln_bias.
    const T error = first.total() / op.width, square = second.total() / op.width;
    mean += error;
    T variance = square < __builtin_inff() ? square - error * error : square;
    if (variance < 0) variance = 0;
    const T scale = 1 / T(__builtin_sqrt(variance + op.eps));
    each_vector<T>(op.width, [&](int64_t c, int, auto part) {
      const Vec<T> n = (load(z + c, part) - mean) * scale;
      store(y + c, n * load(weight + c, part) + load(ln_bias + c, part), part);
    });
    stats[0] = mean, stats[1] = scale;
  }
}

template <typename S, typename T = Compute<S>>
void norm_bwd_row(const BiasResidualLayerNorm& op, int64_t row, T* sums, T* normal, T* weighted) {
  const int64_t from = op.index ? op.index[row] : row;
  S* dx = row_of<S>(op.dx, row);
  if (op.index && (from < 0 || from >= op.indexed_rows)) return clear(dx, op.width);
  const T *bias = static_cast<const T*>(op.bias), *weight = static_cast<const T*>(op.weight);
  const T* stats = static_cast<const T*>(op.stats) + 2 * from;
  const S *x = row_of<const S>(op.x, row), *residual = row_of<const S>(op.residual, row);
  const S *dy = row_of<const S>(op.dy, from), *dz = row_of<const S>(op.dz, from);
  const T mean = stats[0], scale = stats[1];
  Sum<T> of_g, of_gn;
  each_vector<T>(op.width, [&](int64_t c, int slot, auto part) {
    const Vec<T> n = (sum_of_row(x, bias, residual, c, part) - mean) * scale, d = load(dy + c, part);
    const Vec<T> g = d * load(weight + c, part);  // 0 outside the row, where n is not
    store(normal + c, n, part);
    // Stored, and so rounded: an unrounded g does not cancel against mean_g in a row of width 1.
    store(weighted + c, g, part);
    of_g.slots[slot] += g;
    of_gn.slots[slot] += g * n;
  });
  const T mean_g = of_g.total() / op.width, mean_gn = of_gn.total() / op.width;
  // The second pass reads no new memory: the next row is fetched meanwhile (10% at d = 768 in float32).
  const S *next_x = x + op.x.stride, *next_dy = dy + op.dy.stride;
  const S* next_residual = residual ? residual + op.residual.stride : x;
  each_vector<T>(op.width, [&](int64_t c, int, auto part) {
    __builtin_prefetch(next_x + c), __builtin_prefetch(next_dy + c), __builtin_prefetch(next_residual + c);
    const Vec<T> n = load(normal + c, part);
    Vec<T> out = scale * (load(weighted + c, part) - mean_g - n * mean_gn);
    if (dz) out += load(dz + c, part);
    store(dx + c, out, part);
    if (sums) {
      const Vec<T> d = load(dy + c, part);
      T *dbias = sums + c, *dweight = dbias + op.width, *dln_bias = dweight + op.width;
      store(dbias, load(dbias, part) + out, part);
      store(dweight, load(dweight, part) + d * n, part);
      store(dln_bias, load(dln_bias, part) + d, part);
    }
  });
}

template <typename S, typename T = Compute<S>>
void norm_bwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end, T* scratch) {
  const int64_t step = run_rows(op.rows);
  for (int64_t run = begin; run < end; ++run) {
    T* sums = op.sums ? static_cast<T*>(op.sums) + run * 3 * op.width : nullptr;
    clear(sums, 3 * op.width);
    for (int64_t row = run * step; row < min((run + 1) * step, op.rows); ++row) {
      norm_bwd_row<S>(op, row, sums, scratch, scratch + op.width);
    }
  }
}

// --- vectors over the columns, between their own type and the compute type

template <typename T, typename S>
void widen(const S* from, int64_t width, T* to) {
  if constexpr (std::is_same_v<Compute<S>, T>) {
    each_vector<T>(width, [&](int64_t c, int, auto part) { store(to + c, load(from + c, part), part); });
  } else if constexpr (std::is_same_v<S, float>) {
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

template <typename T, typename S>
void narrow(const T* from, int64_t width, S* to) {
  if constexpr (std::is_same_v<Compute<S>, T>) {
    each_vector<T>(width, [&](int64_t c, int, auto part) { store(to + c, load(from + c, part), part); });
  } else if constexpr (std::is_same_v<S, float>) {
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

template <typename T>
void fill(T value, int64_t width, T* to) {
  for (int64_t c = 0; c < width; ++c) to[c] = value;
}

template <typename T>
void add_runs(T* sums, int64_t count, int64_t stride, int64_t width, const FusionVector& to) {
  for (int64_t run = 1; run < count; ++run) {
    const T* more = sums + run * stride;
    each_vector<T>(
        width, [&](int64_t c, int, auto part) { store(sums + c, load(sums + c, part) + load(more + c, part), part); });
  }
  FA_DISPATCH_STORAGE(to, narrow(sums, width, static_cast<S*>(to.data)));
}

}  // namespace

void bias_gelu_fwd(const BiasGelu& op, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, (op.tanh ? gelu_fwd<S, true>(op, begin, end) : gelu_fwd<S, false>(op, begin, end)));
}

void bias_gelu_bwd(const BiasGelu& op, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, (op.tanh ? gelu_bwd<S, true>(op, begin, end) : gelu_bwd<S, false>(op, begin, end)));
}

void bias_residual_layer_norm_fwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end, void* scratch) {
  FA_DISPATCH_STORAGE(op, norm_fwd<S>(op, begin, end, static_cast<Compute<S>*>(scratch)));
}

void bias_residual_layer_norm_bwd(const BiasResidualLayerNorm& op, int64_t begin, int64_t end, void* scratch) {
  FA_DISPATCH_STORAGE(op, norm_bwd<S>(op, begin, end, static_cast<Compute<S>*>(scratch)));
}

void fusion_widen(Storage storage, const FusionVector& vector, double missing, int64_t width, void* to) {
  const bool wide = storage == Storage::kDouble;
  if (!vector.data) {
    wide ? fill(missing, width, static_cast<double*>(to)) : fill(float(missing), width, static_cast<float*>(to));
  } else if (wide) {
    FA_DISPATCH_STORAGE(vector, widen(static_cast<const S*>(vector.data), width, static_cast<double*>(to)));
  } else {
    FA_DISPATCH_STORAGE(vector, widen(static_cast<const S*>(vector.data), width, static_cast<float*>(to)));
  }
}

void fusion_add_runs(Storage storage, void* sums, int64_t count, int64_t stride, int64_t width,
                     const FusionVector& to) {
  if (storage == Storage::kDouble) {
    add_runs(static_cast<double*>(sums), count, stride, width, to);
  } else {
    add_runs(static_cast<float*>(sums), count, stride, width, to);
  }
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
