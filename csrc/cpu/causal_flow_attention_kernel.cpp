// Causal Flow-Attention: one item is one head of one sequence, walked in chunks.
//
// Forward: one pass from left to right. Backward: a pass from left to right for what reaches q through y, which needs
// the state before every chunk, then one from right to left with the sums over what comes after. Nothing is
// un-accumulated by subtraction, and nothing of size (T, D, M) exists.
#include "cpu/flow_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

constexpr int64_t kStrip = 16;  // rows of a triangular product that share their number of columns

template <typename T>
struct Scratch {
  int64_t ld, ldv, ldc;
  ScratchCursor<T> cursor;
  T *eps, *fq, *fk, *kt;         // (ld), (chunk, ld), (chunk, ld), (width, ldc)
  T *v, *vt, *dy, *y;            // (chunk, ldv), (width_v, ldc), (chunk, ldv), (chunk, ldv)
  T *p, *state, *statet;         // (chunk, ldc), (width, ldv), (width_v, ld)
  T *n, *w, *z, *x;              // (chunk)
  LongSum<T> k1, q1, k2, q2;     // in the backward pass from right to left: of what comes after
  T *dq, *r, *starts, *totals;   // (tokens, ld), (tokens), (chunks, 4, ld), (chunks)
  T *dk, *before, *conserved_q;  // (chunk, ld), (chunk, 4, ld), (chunk)
  int64_t bytes;

  Scratch(const FlowAttention& op, bool backward, void* base)
      : ld(padded(op.width)),
        ldv(padded(op.width_v)),
        ldc(kFlowChunk),
        cursor(base),
        eps(cursor.take(ld)),
        fq(cursor.take(kFlowChunk * ld)),
        fk(cursor.take(kFlowChunk * ld)),
        kt(cursor.take(op.width * ldc)),
        v(cursor.take(kFlowChunk * ldv)),
        vt(cursor.take(backward ? op.width_v * ldc : 0)),
        dy(cursor.take(backward ? kFlowChunk * ldv : 0)),
        y(cursor.take(kFlowChunk * ldv)),
        p(cursor.take(kFlowChunk * ldc)),
        state(cursor.take(op.width * ldv)),
        statet(cursor.take(backward ? op.width_v * ld : 0)),
        n(cursor.take(kFlowChunk)),
        w(cursor.take(kFlowChunk)),
        z(cursor.take(kFlowChunk)),
        x(cursor.take(kFlowChunk)),
        k1(cursor, ld),
        q1(cursor, ld),
        k2(cursor, ld),
        q2(cursor, ld) {
    const int64_t tokens = backward ? op.most_sinks : 0, chunks = (tokens + kFlowChunk - 1) / kFlowChunk;
    dq = cursor.take(tokens * ld), r = cursor.take(tokens);
    starts = cursor.take(chunks * 4 * ld), totals = cursor.take(chunks);
    dk = cursor.take(backward ? kFlowChunk * ld : 0), before = cursor.take(backward ? kFlowChunk * 4 * ld : 0);
    conserved_q = cursor.take(backward ? kFlowChunk : 0);
    bytes = cursor.bytes();
    if (!base) return;
    for (int64_t j = 0; j < ld; ++j) eps[j] = j < op.width ? T(op.eps) : 0;
  }
};

template <typename S, typename T = Compute<S>>
class Item {
 public:
  Item(const FlowAttention& op, const FlowTask& task, int64_t head, Scratch<T>& at)
      : op_(op), task_(task), head_(head), head_kv_(head / op.group), at_(at), ld_(at.ld), ldv_(at.ldv) {
    index_ = task.state * op.heads + head;
  }

  void forward() {
    start();
    for (int64_t first = 0; first < task_.sinks; first += kFlowChunk) {
      first_ = first, size_ = min(kFlowChunk, task_.sinks - first);
      load_features_of_chunk();
      forward_flows();
      load_values(op_.v, head_kv_, at_.w, at_.v);
      pack_transposed<T>(at_.fk, ld_, size_, op_.width, at_.kt, at_.ldc);
      gemm<T>(size_, op_.width_v, op_.width, at_.fq, ld_, 1, at_.state, ldv_, at_.y, ldv_, false);
      for (int64_t row = 0; row < size_; row += kStrip) {
        const int64_t rows = min(kStrip, size_ - row), columns = row + rows;
        lower_products(at_.fq, ld_, op_.width, at_.kt, row, rows);
        gemm<T>(rows, op_.width_v, columns, at_.p + row * at_.ldc, at_.ldc, 1, at_.v, ldv_, at_.y + row * ldv_, ldv_,
                true);
      }
      for (int64_t i = 0; i < size_; ++i) {
        store_rows<S, T>(at_.y + i * ldv_, 0, 1, op_.width_v, at_.z[i], tensor(op_.y, i, head_), 0);
      }
      gemm<T>(op_.width, op_.width_v, size_, at_.fk, 1, ld_, at_.v, ldv_, at_.state, ldv_, true);
    }
    T* sums = state_row<T>(op_.final.sums, index_, 4 * op_.width);
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->finish(sums, op_.width), sums += op_.width;
    *state_row<T>(op_.final.total, index_, 1) = T(total_);
    store_rows<T, T>(at_.state, ldv_, op_.width, op_.width_v, 1,
                     state_row<T>(op_.final.state, index_, op_.width * op_.width_v), op_.width_v);
  }

  void backward() {
    start();
    pack_transposed<T>(at_.state, ldv_, op_.width, op_.width_v, at_.statet, ld_);
    for (int64_t first = 0; first < task_.sinks; first += kFlowChunk) forward_chunk(first);
    start_backward();
    for (int64_t first = (task_.sinks - 1) / kFlowChunk * kFlowChunk; first >= 0; first -= kFlowChunk) {
      backward_chunk(first);
    }
    finish_backward();
  }

 private:
  bool takes_part(int64_t i) const { return seen(op_.key_mask, task_.row, task_.first + first_ + i); }
  S* tensor(const ScanTensor& x, int64_t i, int64_t head) const {
    return token<S>(x, task_.row, task_.first + first_ + i, head);
  }
  T* flow(int64_t plane) const { return scalars<T>(op_.flows, plane, task_.row, head_, task_.first + first_); }
  T clamped(T x) const { return x > T(op_.clamp) ? T(op_.clamp) : x < -T(op_.clamp) ? -T(op_.clamp) : x; }

  void start() {
    const T* sums = state_row<T>(op_.initial.sums, index_, 4 * op_.width);
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) {
      sum->start(sums, op_.width, ld_);
      sums = sums ? sums + op_.width : nullptr;
    }
    total_ = op_.initial.total ? *state_row<T>(op_.initial.total, index_, 1) : 0;
    count_ = op_.count ? op_.count[task_.state] : 0;
    start_state(op_.initial.state);
  }

  void start_state(void* from) {
    clear_row(at_.state, op_.width * ldv_);
    const T* values = state_row<T>(from, index_, op_.width * op_.width_v);
    if (values) load_rows<T, T>(values, op_.width_v, op_.width, op_.width_v, 1, at_.state, ldv_);
  }

  void load_features_of_chunk() {
    clear_row(at_.fq, size_ * ld_), clear_row(at_.fk, size_ * ld_);
    for (int64_t i = 0; i < size_; ++i) {
      if (!takes_part(i)) continue;
      load_features<T>(tensor(op_.q, i, head_), op_.relu, op_.width, at_.fq + i * ld_);
      load_features<T>(tensor(op_.k, i, head_kv_), op_.relu, op_.width, at_.fk + i * ld_);
    }
  }

  // Rows of the chunk, each times its factor; zeros where the token takes no part.
  void load_values(const ScanTensor& x, int64_t head, const T* factor, T* to) {
    clear_row(to, size_ * ldv_);
    for (int64_t i = 0; i < size_; ++i) {
      if (takes_part(i)) load_rows<T>(tensor(x, i, head), 0, 1, op_.width_v, factor[i], to + i * ldv_, ldv_);
    }
  }

  // x (+) (sum before the chunk + its part up to here)
  T flow_of(const T* x, const LongSum<T>& sum) const {
    Vec<T> total = {};
    for (int64_t j = 0; j < ld_; j += kLanes<T>) {
      total += (load(x + j) + load(at_.eps + j)) * (load(sum.before + j) + load(sum.part + j));
    }
    return reduce_sum<T>(total) + T(op_.extra);
  }

  // The chunk's flows, token by token; n, w and z of its tokens, 0 for one that takes no part.
  void forward_flows() {
    T *in = flow(0), *out = flow(1), *conserved_in = flow(2), *conserved_out = flow(3), *total = flow(4);
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->plus(at_.eps, ld_);
    for (int64_t i = 0; i < size_; ++i) {
      if (!takes_part(i)) {
        in[i] = out[i] = 1, conserved_in[i] = conserved_out[i] = 0, total[i] = T(total_);
        at_.w[i] = at_.z[i] = 0;
        continue;
      }
      const T *q = at_.fq + i * ld_, *k = at_.fk + i * ld_, n = T(++count_);
      add_row(at_.k1.part, T(1), k, ld_), add_row(at_.q1.part, T(1), q, ld_);
      in[i] = flow_of(q, at_.k1), out[i] = flow_of(k, at_.q1);
      add_row(at_.k2.part, n / out[i], k, ld_), add_row(at_.q2.part, n / in[i], q, ld_);
      conserved_in[i] = flow_of(q, at_.k2) / n, conserved_out[i] = flow_of(k, at_.q2) / n;
      const T x = exp(splat<T>(clamped(conserved_out[i])))[0];
      total_ += x;
      total[i] = T(total_);
      at_.w[i] = n * x / total[i], at_.z[i] = sigmoid_of(conserved_in[i]) / in[i];
    }
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->fold(ld_);
  }

  // p[i][j] = a_i . b_j for rows row..row+rows of the chunk and all j before them, 0 for j > i.
  void lower_products(const T* a, int64_t lda, int64_t depth, const T* bt, int64_t row, int64_t rows) {
    gemm<T>(rows, row + rows, depth, a + row * lda, lda, 1, bt, at_.ldc, at_.p + row * at_.ldc, at_.ldc, false);
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t j = i + 1; j < row + rows; ++j) at_.p[i * at_.ldc + j] = 0;
    }
  }

  // n, w, z and x of the chunk's tokens from the saved flows.
  void recall_scalars() {
    const T *in = flow(0), *conserved_in = flow(2), *conserved_out = flow(3), *total = flow(4);
    for (int64_t i = 0; i < size_; ++i) {
      at_.n[i] = 1, at_.w[i] = at_.z[i] = at_.x[i] = 0;
      if (!takes_part(i)) continue;
      at_.n[i] = T(++count_), at_.x[i] = exp(splat<T>(clamped(conserved_out[i])))[0];
      at_.w[i] = at_.n[i] * at_.x[i] / total[i], at_.z[i] = sigmoid_of(conserved_in[i]) / in[i];
    }
  }

  // From left to right: what reaches q through y, r = q . dq, and the sums before the chunk.
  void forward_chunk(int64_t first) {
    first_ = first, size_ = min(kFlowChunk, task_.sinks - first);
    load_features_of_chunk();
    recall_scalars();
    T* starts = at_.starts + first / kFlowChunk * 4 * ld_;
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) {
      __builtin_memcpy(starts, sum->plus(at_.eps, ld_), ld_ * sizeof(T));
      starts += ld_;
    }
    for (int64_t i = 0; i < size_; ++i) {
      add_row(at_.k1.part, T(1), at_.fk + i * ld_, ld_), add_row(at_.q1.part, T(1), at_.fq + i * ld_, ld_);
      add_row(at_.k2.part, at_.n[i] / flow(1)[i], at_.fk + i * ld_, ld_);
      add_row(at_.q2.part, at_.n[i] / flow(0)[i], at_.fq + i * ld_, ld_);
    }
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->fold(ld_);

    load_values(op_.v, head_kv_, at_.w, at_.v);
    load_values(op_.dy, head_, at_.z, at_.dy);
    pack_transposed<T>(at_.v, ldv_, size_, op_.width_v, at_.vt, at_.ldc);
    T* dq = at_.dq + first * ld_;
    clear_row(dq, size_ * ld_);
    gemm<T>(size_, op_.width, op_.width_v, at_.dy, ldv_, 1, at_.statet, ld_, dq, ld_, false);
    for (int64_t row = 0; row < size_; row += kStrip) {
      const int64_t rows = min(kStrip, size_ - row), columns = row + rows;
      lower_products(at_.dy, ldv_, op_.width_v, at_.vt, row, rows);
      gemm<T>(rows, op_.width, columns, at_.p + row * at_.ldc, at_.ldc, 1, at_.fk, ld_, dq + row * ld_, ld_, true);
    }
    for (int64_t i = 0; i < size_; ++i) at_.r[first + i] = dot_rows(at_.fq + i * ld_, dq + i * ld_, ld_);
    gemm<T>(op_.width_v, op_.width, size_, at_.v, 1, ldv_, at_.fk, ld_, at_.statet, ld_, true);
  }

  // The sums over what comes after take the places of those over what comes before, k1 that of dI (q + eps) and so on.
  void start_backward() {
    const T* sums = state_row<T>(op_.dfinal.sums, index_, 4 * op_.width);
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) {
      sum->start(sums, op_.width, ld_);
      sums = sums ? sums + op_.width : nullptr;
    }
    total_ = op_.dfinal.total ? -*state_row<T>(op_.dfinal.total, index_, 1) : 0;
    start_state(op_.dfinal.state);
  }

  void backward_chunk(int64_t first) {
    first_ = first, size_ = min(kFlowChunk, task_.sinks - first);
    load_features_of_chunk();
    int64_t tokens = 0;
    for (int64_t i = 0; i < size_; ++i) tokens += takes_part(i);
    count_ -= tokens;
    recall_scalars();
    count_ -= tokens;
    load_values(op_.dy, head_, at_.z, at_.dy);
    backward_values();
    backward_direct_keys();
    gemm<T>(op_.width, op_.width_v, size_, at_.fq, 1, ld_, at_.dy, ldv_, at_.state, ldv_, true);
    backward_flows();
  }

  // dv = w (R^T k + sum_{i >= j} (q_i . k_j) z_i dy_i)
  void backward_values() {
    pack_transposed<T>(at_.fk, ld_, size_, op_.width, at_.kt, at_.ldc);
    gemm<T>(size_, op_.width_v, op_.width, at_.fk, ld_, 1, at_.state, ldv_, at_.y, ldv_, false);
    for (int64_t row = 0; row < size_; row += kStrip) {
      const int64_t rows = min(kStrip, size_ - row), columns = row + rows;
      lower_products(at_.fq, ld_, op_.width, at_.kt, row, rows);
      gemm<T>(columns, op_.width_v, rows, at_.p + row * at_.ldc, 1, at_.ldc, at_.dy + row * ldv_, ldv_, at_.y, ldv_,
              true);
    }
    for (int64_t i = 0; i < size_; ++i) {
      S* dv = tensor(op_.dv, i, head_);
      takes_part(i) ? store_rows<S, T>(at_.y + i * ldv_, 0, 1, op_.width_v, at_.w[i], dv, 0)
                    : clear_token(dv, op_.width_v);
    }
  }

  // dk = w (R v + sum_{i >= j} (z_i dy_i . v_j) q_i)
  void backward_direct_keys() {
    load_values(op_.v, head_kv_, at_.w, at_.v);
    pack_transposed<T>(at_.v, ldv_, size_, op_.width_v, at_.vt, at_.ldc);
    pack_transposed<T>(at_.state, ldv_, op_.width, op_.width_v, at_.statet, ld_);
    clear_row(at_.dk, size_ * ld_);
    gemm<T>(size_, op_.width, op_.width_v, at_.v, ldv_, 1, at_.statet, ld_, at_.dk, ld_, false);
    for (int64_t row = 0; row < size_; row += kStrip) {
      const int64_t rows = min(kStrip, size_ - row), columns = row + rows;
      lower_products(at_.dy, ldv_, op_.width_v, at_.vt, row, rows);
      gemm<T>(columns, op_.width, rows, at_.p + row * at_.ldc, 1, at_.ldc, at_.fq + row * ld_, ld_, at_.dk, ld_, true);
    }
  }

  void backward_flows() {
    const T *in = flow(0), *out = flow(1), *conserved_in = flow(2), *conserved_out = flow(3), *total = flow(4);
    prefixes();
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->value(ld_);
    for (int64_t i = size_ - 1; i >= 0; --i) {
      if (!takes_part(i)) {
        clear_token(tensor(op_.dq, i, head_), op_.width), clear_token(tensor(op_.dk, i, head_), op_.width);
        continue;
      }
      const T *q = at_.fq + i * ld_, *k = at_.fk + i * ld_, *before = at_.before + i * 4 * ld_, n = at_.n[i];
      T *dq = at_.dq + (first_ + i) * ld_, *dk = at_.dk + i * ld_;
      const T t = dot_rows(k, dk, ld_), r = at_.r[first_ + i];
      total_ += t / total[i];
      const bool in_bounds = conserved_out[i] <= T(op_.clamp) && conserved_out[i] >= -T(op_.clamp);
      const T dconserved_out = in_bounds ? (t - at_.x[i] * T(total_)) / n : 0;
      const T dconserved_in = sigmoid_of(-conserved_in[i]) * r / n;
      add_row(at_.q2.part, dconserved_out, k, at_.eps, ld_), add_row(at_.k2.part, dconserved_in, q, at_.eps, ld_);
      const T a = n / in[i], b = n / out[i];
      const T din = -(r + a * dot_after(q, at_.q2)) / in[i], dout = -b * dot_after(k, at_.k2) / out[i];
      add_row(at_.k1.part, din, q, at_.eps, ld_), add_row(at_.q1.part, dout, k, at_.eps, ld_);
      add_flow_gradient(dq, dconserved_in, before + 2 * ld_, din, before, a, at_.q2, at_.q1);
      add_flow_gradient(dk, dconserved_out, before + 3 * ld_, dout, before + ld_, b, at_.k2, at_.k1);
      store_feature_gradient<T>(dq, q, tensor(op_.q, i, head_), op_.relu, op_.width, tensor(op_.dq, i, head_));
      store_feature_gradient<T>(dk, k, tensor(op_.k, i, head_kv_), op_.relu, op_.width, tensor(op_.dk, i, head_));
    }
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->fold(ld_);
  }

  // The sums up to each token of the chunk, plus eps: (chunk, 4, ld).
  void prefixes() {
    const T* from = at_.starts + first_ / kFlowChunk * 4 * ld_;
    for (int64_t i = 0; i < size_; ++i) {
      const T *q = at_.fq + i * ld_, *k = at_.fk + i * ld_, a = at_.n[i] / flow(0)[i], b = at_.n[i] / flow(1)[i];
      T* to = at_.before + i * 4 * ld_;
      for (int64_t j = 0; j < ld_; j += kLanes<T>) {
        const Vec<T> qj = load(q + j), kj = load(k + j);
        store(to + j, load(from + j) + kj), store(to + ld_ + j, load(from + ld_ + j) + qj);
        store(to + 2 * ld_ + j, load(from + 2 * ld_ + j) + b * kj);
        store(to + 3 * ld_ + j, load(from + 3 * ld_ + j) + a * qj);
      }
      from = to;
    }
  }

  // x . (sum after the chunk + its part from here on)
  T dot_after(const T* x, const LongSum<T>& sum) const {
    Vec<T> total = {};
    for (int64_t j = 0; j < ld_; j += kLanes<T>) total += load(x + j) * (load(sum.before + j) + load(sum.part + j));
    return reduce_sum<T>(total);
  }

  void add_flow_gradient(T* d, T conserved, const T* second, T direct, const T* first, T weight,
                         const LongSum<T>& after_second, const LongSum<T>& after_first) const {
    for (int64_t j = 0; j < ld_; j += kLanes<T>) {
      const Vec<T> after = load(after_second.before + j) + load(after_second.part + j);
      Vec<T> sum = load(d + j) + conserved * load(second + j) + direct * load(first + j) + weight * after;
      store(d + j, sum + (load(after_first.before + j) + load(after_first.part + j)));
    }
  }

  void finish_backward() {
    T* sums = state_row<T>(op_.dinitial.sums, index_, 4 * op_.width);
    if (!sums) return;
    for (LongSum<T>* sum : {&at_.k1, &at_.q1, &at_.k2, &at_.q2}) sum->finish(sums, op_.width), sums += op_.width;
    *state_row<T>(op_.dinitial.total, index_, 1) = T(-total_);
    store_rows<T, T>(at_.state, ldv_, op_.width, op_.width_v, 1,
                     state_row<T>(op_.dinitial.state, index_, op_.width * op_.width_v), op_.width_v);
  }

  const FlowAttention& op_;
  const FlowTask& task_;
  const int64_t head_, head_kv_;
  Scratch<T>& at_;
  const int64_t ld_, ldv_;
  int64_t index_, count_ = 0, first_ = 0, size_ = 0;
  double total_ = 0;  // the running sum of x; backward, that of t / total over what comes after
};

template <typename S>
void run(const FlowAttention& op, bool backward, const FlowTask* tasks, int64_t begin, int64_t end, void* memory) {
  Scratch<Compute<S>> scratch(op, backward, memory);
  for (int64_t i = begin; i < end; ++i) {
    Item<S> item(op, tasks[i / op.heads], i % op.heads, scratch);
    backward ? item.backward() : item.forward();
  }
}

}  // namespace

int64_t causal_flow_attention_scratch(const FlowAttention& op, bool backward) {
  return FA_DISPATCH_STORAGE(op, Scratch<Compute<S>>(op, backward, nullptr).bytes);
}

void causal_flow_attention_run(const FlowAttention& op, bool backward, const FlowTask* tasks, int64_t begin,
                               int64_t end, void* scratch) {
  FA_DISPATCH_STORAGE(op, run<S>(op, backward, tasks, begin, end, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
