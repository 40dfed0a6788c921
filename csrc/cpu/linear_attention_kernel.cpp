// linear_attention, one pass (see linear_attention.h): chunks of 64 tokens, inside a chunk as masked products, between
// chunks through the state.
#include "cpu/feature_map.h"
#include "cpu/linear_attention.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kStrip = 16;            // rows of scores in one product: what lies above the diagonal is skipped
constexpr double kLowestLogDecay = -1e4;  // e^ it is 0, and differences stay numbers

template <typename E>
int64_t vector_width(const LinearAttention& op) {
  return padded(max(op.b.width, op.c.width));
}

template <typename E>
int64_t member_bytes(const LinearAttention& op) {
  return state_bytes(op.b.width * padded(op.c.width) + vector_width<E>(op), sizeof(E));
}

// Scratch memory of a thread, or with `base` null only its size.
template <typename E>
struct Scratch {
  E *a, *b, *bt, *c, *y, *sum, *phi, *scores;
  E *decay, *before, *after, *apart, *x, *w, *den, *factor, *diagonal;  // one a token of the chunk
  std::byte *walked, *effective;                                        // states: of the members, of one
  int64_t bytes;

  Scratch(const LinearAttention& op, std::byte* base) {
    std::byte* at = base;
    const auto take = [&](int64_t count) {
      E* p = reinterpret_cast<E*>(at);
      at += padded(count) * sizeof(E);
      return p;
    };
    const int64_t wide = padded(op.c.width);
    a = take(kChunk * padded(op.a.width)), b = take(kChunk * padded(op.b.width)), bt = take(op.b.width * kChunk);
    c = take(kChunk * wide), y = take(kChunk * wide), sum = take(kChunk * wide), phi = take(kChunk * wide);
    scores = take(kStrip * kChunk);
    for (E** scalars : {&decay, &before, &after, &apart, &x, &w, &den, &factor, &diagonal}) *scalars = take(kChunk);
    walked = at, at += op.members * member_bytes<E>(op);
    effective = at, at += member_bytes<E>(op);
    bytes = at - base;
  }
};

template <typename S>
class Pass {
 public:
  using E = Compute<S>;
  using State = HeadState<E>;  // scalars[0]: sum of the log decays since the walk began; row: S, then the vector z

  Pass(const LinearAttention& op, const ScanTask& task, std::byte* scratch)
      : op_(op),
        task_(task),
        segment_(*task.segment),
        lda_(padded(op.a.width)),
        ldb_(padded(op.b.width)),
        ldc_(padded(op.c.width)),
        matrix_(op.b.width * ldc_),
        elements_(matrix_ + vector_width<E>(op)),
        bytes_(member_bytes<E>(op)),
        vector_(op.normalize ? op.b.width
                : op.pairs   ? op.c.width
                             : 0),
        s_(op, scratch) {}

  void run(ScanPhase phase, std::byte* carry, std::byte* local) {
    const int64_t heads = task_.head_end - task_.head_begin;
    for (int64_t unit = 0; unit < heads; ++unit) {
      const int64_t head = task_.head_begin + unit, first = unit * op_.members;
      if (phase == ScanPhase::kStart) {
        for (int64_t m = 0; m < op_.members; ++m) load_state(head * op_.members + m, State(carry, bytes_, first + m));
      } else if (phase == ScanPhase::kCombine) {
        for (int64_t m = 0; m < op_.members && op_.walks; ++m)
          combine(State(carry, bytes_, first + m), State(local, bytes_, first + m), State(carry, bytes_, first + m));
      } else {
        walk(head, carry ? carry + first * bytes_ : nullptr, local ? local + first * bytes_ : s_.walked);
      }
    }
  }

 private:
  // --- states

  void clear(State state) const {
    state.scalars[0] = 0;
    __builtin_memset(state.row, 0, elements_ * sizeof(E));
  }

  // The state after a walk from nothing that left `local`, had it begun at `carry`.
  void combine(State carry, State local, State to) const {
    const E kept = E(__builtin_exp(local.scalars[0]));
    for (int64_t j = 0; j < elements_; j += kLanes<E>)
      store(to.row + j, load(carry.row + j) * kept + load(local.row + j));
  }

  bool given(const ScanState& state) const { return segment_.initial && state.data; }

  void load_state(int64_t head, State to) const {
    clear(to);
    if (given(op_.vector)) __builtin_memcpy(to.row + matrix_, at<E>(op_.vector, segment_, head), vector_ * sizeof(E));
    if (!given(op_.state)) return;
    const E* from = at<E>(op_.state, segment_, head);
    const int64_t rows = op_.b.width, cols = op_.c.width;
    if (op_.transposed) {
      pack_transposed(from, rows, cols, rows, to.row, ldc_);
    } else {
      for (int64_t i = 0; i < rows; ++i) __builtin_memcpy(to.row + i * ldc_, from + i * cols, cols * sizeof(E));
    }
  }

  void store_state(int64_t head, State from) const {
    const int64_t rows = op_.b.width, cols = op_.c.width;
    // A decay that acts late has not acted yet when the walk ends.
    const E kept = op_.late_decay && op_.decay.data ? E(__builtin_exp(double(gate(segment_.length, head)))) : E(1);
    if (op_.final_vector.data)
      store_rows(from.row + matrix_, 0, 1, vector_, kept, at<E>(op_.final_vector, segment_, head), 0);
    if (!op_.final_state.data) return;
    E* to = at<E>(op_.final_state, segment_, head);
    if (!op_.transposed) return store_rows(from.row, ldc_, rows, cols, kept, to, cols);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) to[j * rows + i] = kept * from.row[i * ldc_ + j];
    }
  }

  // --- one head of the result

  void walk(int64_t head, std::byte* carry, std::byte* walked) {
    // With nothing before the walk its own sums are the state.
    const bool fresh = op_.walks && task_.begin == 0 && !given(op_.state) && !given(op_.vector);
    for (int64_t m = 0; m < op_.members && op_.walks; ++m) clear(State(walked, bytes_, m));
    const bool write = carry && op_.out.data;
    for (int64_t i = task_.begin; i < task_.end && (write || op_.walks); i += kChunk) {
      const int64_t n = min(kChunk, task_.end - i);
      if (write && op_.input.rows.data) load_input(i, n, head);
      for (int64_t m = 0; m < op_.members; ++m) {
        const int64_t query_head = head * op_.members + m;
        const State own(walked, bytes_, m);
        load_chunk(i, n, query_head);
        if (write) {
          State state = own;
          if (!fresh) {
            const State before(carry, bytes_, m);
            state = op_.walks ? State(s_.effective, bytes_, 0) : before;
            if (op_.walks) combine(before, own, state);
          }
          attend(state, n, fresh && i == task_.begin);
          finish_member(i, n, query_head, m > 0);
        }
        if (op_.walks) add_chunk(own, n);
      }
      if (write) store_result(i, n, head);
    }
    if (!carry || !op_.walks || task_.end < segment_.length || !segment_.final) return;
    for (int64_t m = 0; m < op_.members; ++m) {
      const State before(carry, bytes_, m), end(s_.effective, bytes_, 0);
      combine(before, State(walked, bytes_, m), end);
      store_state(head * op_.members + m, end);
    }
  }

  // --- loading

  E gate(int64_t i, int64_t head) const {
    const int64_t token = op_.late_decay ? i - 1 : i;
    return token < 0 ? E(0) : max_of(*at<const E>(op_.decay, segment_, token, head), E(kLowestLogDecay));
  }
  static E max_of(E a, E b) { return a > b ? a : b; }

  void load_scalars(const ScanTensor& from, int64_t i, int64_t n, int64_t head, E* to) const {
    for (int64_t k = 0; k < n; ++k) to[k] = from.data ? *at<const E>(from, segment_, i + k, head) : E(1);
  }

  void load_mapped(const LinearRows& from, int64_t i, int64_t n, int64_t head, E* to, int64_t ld) const {
    const S* rows = at<const S>(from.rows, segment_, i, head / from.group);
    load_rows(rows, from.rows.time * segment_.step, n, from.width, E(from.scale), to, ld);
    map_rows(from.map, to, ld, n, from.width);
    if (!from.factor.data) return;
    load_scalars(from.factor, i, n, head, s_.factor);
    for (int64_t k = 0; k < n; ++k) scale_row(to + k * ld, from.width, s_.factor[k]);
  }

  static void scale_row(E* row, int64_t width, E factor) {
    map_row(row, width, [&](Vec<E> v, int64_t, int) { return v * factor; });
  }

  void load_input(int64_t i, int64_t n, int64_t head) const {
    const LinearRows& input = op_.input;
    load_rows(at<const S>(input.rows, segment_, i, head), input.rows.time * segment_.step, n, input.width, E(1), s_.phi,
              ldc_);
    map_rows(input.map, s_.phi, ldc_, n, input.width);
  }

  void load_chunk(int64_t i, int64_t n, int64_t head) const {
    if (op_.out.data) load_mapped(op_.a, i, n, head, s_.a, lda_);
    if (op_.walks) {
      load_mapped(op_.b, i, n, head, s_.b, ldb_);
      load_mapped(op_.c, i, n, head, s_.c, ldc_);
    }
    if (op_.pairs) {
      load_scalars(op_.x, i, n, head, s_.x);
      load_scalars(op_.w, i, n, head, s_.w);
    }
    if (!op_.decay.data) return;
    double sum = 0;
    for (int64_t k = 0; k < n; ++k) s_.decay[k] = gate(i + k, head), sum += s_.decay[k], s_.before[k] = E(sum);
    sum = 0;
    for (int64_t k = n - 1; k >= 0; --k) s_.after[k] = E(sum), sum += s_.decay[k];
    for (int64_t k = 0; k < n; k += kLanes<E>) {
      store(s_.before + k, exp(load(s_.before + k)));
      store(s_.after + k, exp(load(s_.after + k)));
    }
  }

  // --- computing

  // y of the chunk, and in den the weights of each row summed.
  void attend(State state, int64_t n, bool empty) const {
    const int64_t cols = op_.c.width;
    const E* vector = state.row + matrix_;
    if (empty) {
      __builtin_memset(s_.y, 0, n * ldc_ * sizeof(E));
      __builtin_memset(s_.den, 0, n * sizeof(E));
    } else {
      gemm(n, cols, op_.a.width, s_.a, lda_, 1, state.row, ldc_, s_.y, ldc_, false);
      for (int64_t i = 0; i < n; ++i) {
        E* row = s_.y + i * ldc_;
        if (op_.pairs) add_scaled(row, vector, cols, s_.x[i]);
        if (op_.normalize) s_.den[i] = dot_rows(s_.a + i * lda_, vector, op_.a.width);
        if (op_.decay.data && op_.walks) scale_row(row, cols, s_.before[i]), s_.den[i] *= s_.before[i];
      }
    }
    if (!op_.walks) return;
    pack_transposed(s_.b, ldb_, n, op_.b.width, s_.bt, kChunk);
    __builtin_memset(s_.apart, 0, kChunk * sizeof(E));
    for (int64_t first = 0; first < n; first += kStrip) {
      const int64_t rows = min(kStrip, n - first), keys = first + rows;
      gemm(rows, keys, op_.a.width, s_.a + first * lda_, lda_, 1, s_.bt, kChunk, s_.scores, kChunk, false);
      for (int64_t i = first; i < keys; ++i) weigh(s_.scores + (i - first) * kChunk, i, keys);
      gemm(rows, cols, keys, s_.scores, kChunk, 1, s_.c, ldc_, s_.y + first * ldc_, ldc_, true);
    }
  }

  static void add_scaled(E* to, const E* from, int64_t width, E factor) {
    map_row(to, width, [&](Vec<E> v, int64_t j, int n) { return v + load_lanes<E>(from + j, n) * factor; });
  }

  // Scores of token i against the first `keys` tokens: pairs, decays, the causal mask, and their sum for the
  // normaliser.
  void weigh(E* row, int64_t i, int64_t keys) const {
    if (op_.pairs) add_scaled(row, s_.w, i + 1, s_.x[i]);
    if (op_.decay.data) {
      // apart[j] = G_i - G_j, kept by adding: a difference of sums would lose its last digits to what both share.
      for (int64_t j = 0; j < i; j += kLanes<E>) store(s_.apart + j, load(s_.apart + j) + s_.decay[i]);
      for (int64_t j = i; j < min(kChunk, padded(i + 1)); ++j) s_.apart[j] = 0;
      map_row(row, i + 1, [&](Vec<E> v, int64_t j, int n) { return v * exp(load_lanes<E>(s_.apart + j, n)); });
    }
    for (int64_t j = i + 1; j < keys; ++j) row[j] = 0;
    // No decay acts between a token and itself: kept out of the product, where it would cancel only on paper.
    if (op_.product.data) s_.diagonal[i] = row[i], row[i] = 0;
    if (op_.normalize) s_.den[i] += sum_row(row, i + 1);
  }

  // Adds the chunk to the state. Leaves the values scaled.
  void add_chunk(State state, int64_t n) const {
    E *matrix = state.row, *vector = state.row + matrix_;
    if (op_.decay.data) {
      const E kept = s_.before[n - 1];
      for (int64_t j = 0; j < elements_; j += kLanes<E>) store(matrix + j, load(matrix + j) * kept);
      for (int64_t k = 0; k < n; ++k)
        state.scalars[0] += s_.decay[k], scale_row(s_.c + k * ldc_, op_.c.width, s_.after[k]);
    }
    gemm(op_.b.width, op_.c.width, n, s_.b, 1, ldb_, s_.c, ldc_, matrix, ldc_, true);
    for (int64_t k = 0; k < n && vector_; ++k) {
      if (op_.pairs) add_scaled(vector, s_.c + k * ldc_, op_.c.width, s_.w[k]);
      if (op_.normalize) add_scaled(vector, s_.b + k * ldb_, op_.b.width, op_.decay.data ? s_.after[k] : E(1));
    }
  }

  // --- the result

  // Scales y, takes its product with the input, and adds it to what earlier members left.
  void finish_member(int64_t i, int64_t n, int64_t head, bool add) const {
    const int64_t cols = op_.c.width;
    load_scalars(op_.out_factor, i, n, head, s_.factor);
    for (int64_t k = 0; k < n; ++k) {
      E *row = s_.y + k * ldc_, factor = s_.factor[k] * E(op_.scale);
      if (op_.normalize) {
        const E den = E(op_.scale) * s_.den[k] + E(op_.eps);
        *at<E>(op_.den, segment_, i + k, head) = den;
        factor /= den;
      }
      scale_row(row, cols, factor);
      if (op_.product.data) {
        const E dot = dot_rows(s_.phi + k * ldc_, row, cols);
        E* product = at<E>(op_.product, segment_, i + k, head);
        *product = op_.subtract ? *product - dot : dot;
        add_scaled(row, s_.c + k * ldc_, cols, s_.diagonal[k] * factor);
      }
      E* sum = s_.sum + k * ldc_;
      add ? add_scaled(sum, row, cols, E(1)) : (void)__builtin_memcpy(sum, row, cols * sizeof(E));
    }
  }

  void store_result(int64_t i, int64_t n, int64_t head) const {
    for (int64_t k = 0; k < n && op_.input.rows.data; ++k)
      multiply_derivative(op_.input.map, s_.phi + k * ldc_, s_.sum + k * ldc_, op_.c.width);
    store_rows(s_.sum, ldc_, n, op_.c.width, E(1), at<S>(op_.out, segment_, i, head), op_.out.time * segment_.step);
  }

  const LinearAttention& op_;
  const ScanTask& task_;
  const ScanSegment& segment_;
  const int64_t lda_, ldb_, ldc_, matrix_, elements_, bytes_, vector_;  // leading dims; sizes of S, of S and z, of z
  const Scratch<E> s_;
};

template <typename S>
void row_factors(const LinearAttentionRows& op, int64_t begin, int64_t end) {
  using E = Compute<S>;
  const auto scalar = [&](const ScanTensor& x, const ScanSegment& row, int64_t t, int64_t h) -> E* {
    return at<E>(x, row, t, h);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item % op.tokens;
    const ScanSegment row{item / op.tokens, 0, op.tokens, 1, 0, false, false, 0};
    for (int64_t h = 0; h < op.heads; ++h) {
      const E den = op.den.data ? *scalar(op.den, row, t, h) : E(1);
      const E given = op.row_scale.data ? *scalar(op.row_scale, row, t, h) : E(1);
      *scalar(op.factor, row, t, h) = given * E(op.scale) / den;
      if (!op.x.data) continue;
      const S *dout = at<const S>(op.dout, row, t, h), *out = at<const S>(op.out, row, t, h);
      Vec<E> sum = {};
      for_lanes<E>(op.width, [&](int64_t j, int n) __attribute__((always_inline)) {
        sum += load_lanes<E>(dout + j, n) * load_lanes<E>(out + j, n);
      });
      *scalar(op.x, row, t, h) = -E(op.scale) * reduce_sum<E>(sum) / den;
    }
  }
}

}  // namespace

int64_t linear_attention_state_bytes(const LinearAttention& op) {
  return op.members * FA_DISPATCH_STORAGE(op, member_bytes<Compute<S>>(op));
}

int64_t linear_attention_scratch_bytes(const LinearAttention& op) {
  return FA_DISPATCH_STORAGE(op, Scratch<Compute<S>>(op, nullptr).bytes);
}

void linear_attention_pass(const LinearAttention& op, ScanPhase phase, const ScanTask& task, std::byte* carry,
                           std::byte* local, std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, Pass<S>(op, task, scratch).run(phase, carry, local));
}

void linear_attention_rows(const LinearAttentionRows& op, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, row_factors<S>(op, begin, end));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
