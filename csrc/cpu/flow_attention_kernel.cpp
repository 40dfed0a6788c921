// Whole Flow-Attention: one item is one head of one sequence.
//
// The four phases depend on each other through sums over all tokens. phi(q) and phi(k) of the head stay in scratch
// memory between them, so that raw inputs are read once.
#include "cpu/flow_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename T>
struct Scratch {
  int64_t ld, ldv;
  ScratchCursor<T> cursor;
  T *eps, *fq, *fk;   // (ld), (sinks, ld), (sources, ld)
  T* dq;              // (sinks, ld)
  T *rows, *wide;     // (chunk, ldv), (chunk, ldv or ld)
  T *kv, *kvt, *dkv;  // (width, ldv), (width_v, ld), (width, ldv)
  T *per_q, *per_k;   // (3, sinks), (4, sources)
  LongSum<T> k1, q1, k2, q2, dk1, dq1, dk2, g1, g2;
  int64_t bytes;

  Scratch(const FlowAttention& op, bool backward, void* base)
      : ld(padded(op.width)),
        ldv(padded(op.width_v)),
        cursor(base),
        eps(cursor.take(ld)),
        fq(cursor.take(op.most_sinks * ld)),
        fk(cursor.take(op.most_sources * ld)),
        dq(cursor.take(backward ? op.most_sinks * ld : 0)),
        rows(cursor.take(kFlowChunk * ldv)),
        wide(cursor.take(kFlowChunk * max(ld, ldv))),
        kv(cursor.take(op.width * ldv)),
        kvt(cursor.take(backward ? op.width_v * ld : 0)),
        dkv(cursor.take(backward ? op.width * ldv : 0)),
        per_q(cursor.take(3 * op.most_sinks)),
        per_k(cursor.take(4 * op.most_sources)),
        k1(cursor, ld),
        q1(cursor, ld),
        k2(cursor, ld),
        q2(cursor, ld),
        dk1(cursor, ld),
        dq1(cursor, ld),
        dk2(cursor, ld),
        g1(cursor, ld),
        g2(cursor, ld),
        bytes(cursor.bytes()) {
    if (!base) return;
    for (int64_t j = 0; j < ld; ++j) eps[j] = j < op.width ? T(op.eps) : 0;
  }
};

template <typename F>
inline void each_chunk(int64_t tokens, F f) {
  for (int64_t t = 0; t < tokens; t += kFlowChunk) f(t, min(kFlowChunk, tokens - t));
}

template <typename S, typename T = Compute<S>>
class Item {
 public:
  Item(const FlowAttention& op, const FlowTask& task, int64_t head, Scratch<T>& at)
      : op_(op), task_(task), head_(head), head_kv_(head / op.group), at_(at), ld_(at.ld), ldv_(at.ldv) {
    index_ = task.state * op.heads + head;
    for (int64_t t = 0; t < task.sinks; ++t) sinks_ += sink(t);
    for (int64_t t = 0; t < task.sources; ++t) sources_ += source(t);
  }

  void forward() {
    T *in = flow_q(0), *out = flow_k(0), *conserved_in = flow_q(1), *conserved_out = flow_k(1);
    if (sinks_ == 0 || sources_ == 0) return forward_nothing();
    load_head(op_.q, head_, task_.sinks, op_.query_mask, at_.fq, at_.q1);
    load_head(op_.k, head_kv_, task_.sources, op_.key_mask, at_.fk, at_.k1);
    flows(at_.fq, task_.sinks, at_.k1, in);
    flows(at_.fk, task_.sources, at_.q1, out);
    weigh(at_.fq, task_.sinks, op_.query_mask, in, at_.q2);
    weigh(at_.fk, task_.sources, op_.key_mask, out, at_.k2);
    flows(at_.fq, task_.sinks, at_.k2, conserved_in);
    flows(at_.fk, task_.sources, at_.q2, conserved_out);
    aggregate(conserved_out);
    allocate(in, conserved_in);
    T* sums = state_row<T>(op_.saved.sums, index_, 4 * op_.width);
    at_.k1.finish(sums, op_.width), at_.q1.finish(sums + op_.width, op_.width);
    at_.k2.finish(sums + 2 * op_.width, op_.width), at_.q2.finish(sums + 3 * op_.width, op_.width);
  }

  void backward() {
    if (sinks_ == 0 || sources_ == 0) return backward_nothing();
    load_head(op_.q, head_, task_.sinks, op_.query_mask, at_.fq, at_.q1);
    load_head(op_.k, head_kv_, task_.sources, op_.key_mask, at_.fk, at_.k1);
    const T* sums = state_row<T>(op_.saved.sums, index_, 4 * op_.width);
    at_.k1.start(sums, op_.width, ld_), at_.q1.start(sums + op_.width, op_.width, ld_);
    at_.k2.start(sums + 2 * op_.width, op_.width, ld_), at_.q2.start(sums + 3 * op_.width, op_.width, ld_);
    const T* kv = state_row<T>(op_.saved.state, index_, op_.width * op_.width_v);
    pack_transposed<T>(kv, op_.width_v, op_.width, op_.width_v, at_.kvt, ld_);
    for (LongSum<T>* sum : {&at_.dk1, &at_.dq1, &at_.dk2, &at_.g1, &at_.g2}) sum->start(nullptr, 0, ld_);
    backward_outputs();
    backward_values();
    backward_queries();
    backward_keys();
  }

 private:
  bool sink(int64_t t) const { return seen(op_.query_mask, task_.row, task_.first + t); }
  bool source(int64_t t) const { return seen(op_.key_mask, task_.row, task_.first + t); }
  T* flow_q(int64_t plane) const { return scalars<T>(op_.flows_q, plane, task_.row, head_, task_.first); }
  T* flow_k(int64_t plane) const { return scalars<T>(op_.flows_k, plane, task_.row, head_, task_.first); }
  S* at(const ScanTensor& x, int64_t t, int64_t head) const { return token<S>(x, task_.row, task_.first + t, head); }

  // phi of all tokens of the head, and its sum.
  void load_head(const ScanTensor& x, int64_t head, int64_t tokens, const FlowMask& mask, T* to, LongSum<T>& sum) {
    sum.start(nullptr, 0, ld_);
    each_chunk(tokens, [&](int64_t first, int64_t n) {
      for (int64_t t = first; t < first + n; ++t) {
        T* row = to + t * ld_;
        clear_row(row, ld_);
        if (!seen(mask, task_.row, task_.first + t)) continue;
        load_features<T>(at(x, t, head), op_.relu, op_.width, row);
        add_row(sum.part, T(1), row, ld_);
      }
      sum.fold(ld_);
    });
  }

  // to[t] = x_t (+) total
  void flows(const T* x, int64_t tokens, LongSum<T>& total, T* to) {
    const T* plus = total.plus(at_.eps, ld_);
    for (int64_t t = 0; t < tokens; ++t) to[t] = dot_rows(x + t * ld_, at_.eps, plus, ld_) + T(op_.extra);
  }

  // sum = the sum of x_t / flow_t. A hidden token has flow 1, so that nothing divides by 0.
  void weigh(const T* x, int64_t tokens, const FlowMask& mask, T* flow, LongSum<T>& sum) {
    sum.start(nullptr, 0, ld_);
    each_chunk(tokens, [&](int64_t first, int64_t n) {
      for (int64_t t = first; t < first + n; ++t) {
        if (seen(mask, task_.row, task_.first + t)) {
          add_row(sum.part, 1 / flow[t], x + t * ld_, ld_);
        } else {
          flow[t] = 1;
        }
      }
      sum.fold(ld_);
    });
  }

  // kv = sum of k (w v)^T. The maximum of the exponents rises from chunk to chunk; what was summed before shrinks.
  void aggregate(const T* conserved) {
    T top = kMinusInfinity<T>;
    double total = 0;
    clear_row(at_.kv, op_.width * ldv_);
    each_chunk(task_.sources, [&](int64_t first, int64_t n) {
      T highest = top;
      for (int64_t t = first; t < first + n; ++t) {
        if (source(t)) highest = clamped(conserved[t]) > highest ? clamped(conserved[t]) : highest;
      }
      if (highest == kMinusInfinity<T>) return;
      if (highest > top) {
        const T shrink = exp(splat<T>(top - highest))[0];
        scale_row(at_.kv, shrink, op_.width * ldv_);
        total *= shrink, top = highest;
      }
      for (int64_t t = first; t < first + n; ++t) {
        T* row = at_.rows + (t - first) * ldv_;
        if (!source(t)) {
          clear_row(row, ldv_);
          continue;
        }
        const T x = exp(splat<T>(clamped(conserved[t]) - top))[0];
        load_rows<T>(at(op_.v, t, head_kv_), 0, 1, op_.width_v, x, row, ldv_);
        total += x;
      }
      gemm<T>(op_.width, op_.width_v, n, at_.fk + first * ld_, 1, ld_, at_.rows, ldv_, at_.kv, ldv_, true);
    });
    scale_row(at_.kv, T(sources_ / total), op_.width * ldv_);
    *state_row<T>(op_.saved.total, index_, 1) = top + T(__builtin_log(total));
    store_rows<T, T>(at_.kv, ldv_, op_.width, op_.width_v, 1,
                     state_row<T>(op_.saved.state, index_, op_.width * op_.width_v), op_.width_v);
  }

  void allocate(const T* in, const T* conserved) {
    each_chunk(task_.sinks, [&](int64_t first, int64_t n) {
      gemm<T>(n, op_.width_v, op_.width, at_.fq + first * ld_, ld_, 1, at_.kv, ldv_, at_.rows, ldv_, false);
      for (int64_t t = first; t < first + n; ++t) {
        const T factor = sink(t) ? sigmoid_of(conserved[t] * ratio()) / in[t] : 0;
        store_rows<S, T>(at_.rows + (t - first) * ldv_, 0, 1, op_.width_v, factor, at(op_.y, t, head_), 0);
      }
    });
  }

  // dq is what reaches q through y alone; dkv; the gradient of the sum of b k.
  void backward_outputs() {
    const T *in = flow_q(0), *conserved = flow_q(1);
    T *r = at_.per_q, *dconserved = at_.per_q + task_.sinks;
    clear_row(at_.dkv, op_.width * ldv_);
    each_chunk(task_.sinks, [&](int64_t first, int64_t n) {
      T* dq = at_.dq + first * ld_;
      clear_row(dq, n * ld_);
      for (int64_t t = first; t < first + n; ++t) {
        const T factor = sigmoid_of(conserved[t] * ratio()) / in[t];
        T* row = at_.rows + (t - first) * ldv_;
        clear_row(row, ldv_);
        if (sink(t)) load_rows<T>(at(op_.dy, t, head_), 0, 1, op_.width_v, factor, row, ldv_);
      }
      gemm<T>(n, op_.width, op_.width_v, at_.rows, ldv_, 1, at_.kvt, ld_, dq, ld_, false);
      gemm<T>(op_.width, op_.width_v, n, at_.fq + first * ld_, 1, ld_, at_.rows, ldv_, at_.dkv, ldv_, true);
      for (int64_t t = first; t < first + n; ++t) {
        const T* q = at_.fq + t * ld_;
        r[t] = dot_rows(q, at_.dq + t * ld_, ld_);
        dconserved[t] = ratio() * sigmoid_of(-conserved[t] * ratio()) * r[t];
        if (sink(t)) add_row(at_.dk2.part, dconserved[t], q, at_.eps, ld_);
      }
      at_.dk2.fold(ld_);
    });
  }

  // dv, and through the softmax the gradients of the sums of q and a q.
  void backward_values() {
    const T *out = flow_k(0), *conserved = flow_k(1);
    const T lse = *state_row<T>(op_.saved.total, index_, 1);
    T *t_of = at_.per_k, *w = t_of + task_.sources, *inner = w + task_.sources, *dout = inner + task_.sources;
    const T* dk2 = at_.dk2.value(ld_);
    each_chunk(task_.sources, [&](int64_t first, int64_t n) {
      gemm<T>(n, op_.width_v, op_.width, at_.fk + first * ld_, ld_, 1, at_.dkv, ldv_, at_.rows, ldv_, false);
      for (int64_t t = first; t < first + n; ++t) {
        const T *k = at_.fk + t * ld_, *row = at_.rows + (t - first) * ldv_;
        if (!source(t)) {
          t_of[t] = w[t] = inner[t] = dout[t] = 0;
          clear_token(at(op_.dv, t, head_), op_.width_v);
          continue;
        }
        w[t] = sources_ * exp(splat<T>(clamped(conserved[t]) - lse))[0];
        t_of[t] = w[t] * dot_token<T>(row, at(op_.v, t, head_kv_), op_.width_v);
        store_rows<S, T>(row, 0, 1, op_.width_v, w[t], at(op_.dv, t, head_), 0);
        const bool in_bounds = conserved[t] <= T(op_.clamp) && conserved[t] >= -T(op_.clamp);
        inner[t] = in_bounds, dout[t] = -dot_rows(k, dk2, ld_) / (out[t] * out[t]);
        total_t_ += t_of[t];
        add_row(at_.g1.part, inner[t] * t_of[t], k, at_.eps, ld_);
        add_row(at_.g2.part, inner[t] * w[t], k, at_.eps, ld_);
        add_row(at_.dq1.part, dout[t], k, at_.eps, ld_);
      }
      at_.g1.fold(ld_), at_.g2.fold(ld_), at_.dq1.fold(ld_);
    });
    for (int64_t j = 0; j < ld_; ++j) at_.g1.whole[j] -= total_t_ / sources_ * at_.g2.whole[j];
  }

  void backward_queries() {
    const T *in = flow_q(0), *r = at_.per_q, *dconserved = at_.per_q + task_.sinks;
    const T *dq2 = at_.g1.value(ld_), *dq1 = at_.dq1.value(ld_);
    const T *k1 = at_.k1.plus(at_.eps, ld_), *k2 = at_.k2.plus(at_.eps, ld_);
    each_chunk(task_.sinks, [&](int64_t first, int64_t n) {
      for (int64_t t = first; t < first + n; ++t) {
        if (!sink(t)) {
          clear_token(at(op_.dq, t, head_), op_.width);
          continue;
        }
        T *q = at_.fq + t * ld_, *dq = at_.dq + t * ld_;
        const T a = 1 / in[t], din = -a * r[t] - a * a * dot_rows(q, dq2, ld_);
        for (int64_t j = 0; j < ld_; j += kLanes<T>) {
          const Vec<T> flow = dconserved[t] * load(k2 + j) + a * load(dq2 + j);
          const Vec<T> direct = din * load(k1 + j) + load(dq1 + j);
          store(dq + j, load(dq + j) + flow + direct);
        }
        store_feature_gradient<T>(dq, q, at(op_.q, t, head_), op_.relu, op_.width, at(op_.dq, t, head_));
        add_row(at_.dk1.part, din, q, at_.eps, ld_);
      }
      at_.dk1.fold(ld_);
    });
  }

  void backward_keys() {
    const T *out = flow_k(0), *t_of = at_.per_k, *w = t_of + task_.sources, *inner = w + task_.sources;
    const T *dout = inner + task_.sources, *dk2 = at_.dk2.value(ld_), *dk1 = at_.dk1.value(ld_);
    const T *q1 = at_.q1.plus(at_.eps, ld_), *q2 = at_.q2.plus(at_.eps, ld_);
    const T mean = T(total_t_ / sources_);
    pack_transposed<T>(at_.dkv, ldv_, op_.width, op_.width_v, at_.kvt, ld_);
    each_chunk(task_.sources, [&](int64_t first, int64_t n) {
      clear_row(at_.wide, n * ld_);
      for (int64_t t = first; t < first + n; ++t) {
        T* row = at_.rows + (t - first) * ldv_;
        clear_row(row, ldv_);
        if (source(t)) load_rows<T>(at(op_.v, t, head_kv_), 0, 1, op_.width_v, w[t], row, ldv_);
      }
      gemm<T>(n, op_.width, op_.width_v, at_.rows, ldv_, 1, at_.kvt, ld_, at_.wide, ld_, false);
      for (int64_t t = first; t < first + n; ++t) {
        if (!source(t)) {
          clear_token(at(op_.dk, t, head_), op_.width);
          continue;
        }
        T* dk = at_.wide + (t - first) * ld_;
        add_row(dk, inner[t] * (t_of[t] - w[t] * mean), q2, ld_);
        add_row(dk, 1 / out[t], dk2, ld_);
        add_row(dk, dout[t], q1, ld_);
        add_row(dk, T(1), dk1, ld_);
        store_feature_gradient<T>(dk, at_.fk + t * ld_, at(op_.k, t, head_kv_), op_.relu, op_.width,
                                  at(op_.dk, t, head_));
      }
    });
  }

  // Without a sink or a source there is no flow: zeros, and flows that divide nothing by 0.
  void forward_nothing() {
    for (int64_t t = 0; t < task_.sinks; ++t) {
      clear_token(at(op_.y, t, head_), op_.width_v);
      flow_q(0)[t] = flow_q(1)[t] = 1;
    }
    for (int64_t t = 0; t < task_.sources; ++t) flow_k(0)[t] = flow_k(1)[t] = 1;
    clear_row(state_row<T>(op_.saved.sums, index_, 4 * op_.width), 4 * op_.width);
    clear_row(state_row<T>(op_.saved.total, index_, 1), 1);
    clear_row(state_row<T>(op_.saved.state, index_, op_.width * op_.width_v), op_.width * op_.width_v);
  }

  void backward_nothing() {
    for (int64_t t = 0; t < task_.sinks; ++t) clear_token(at(op_.dq, t, head_), op_.width);
    for (int64_t t = 0; t < task_.sources; ++t) {
      clear_token(at(op_.dk, t, head_), op_.width), clear_token(at(op_.dv, t, head_), op_.width_v);
    }
  }

  T clamped(T x) const { return x > T(op_.clamp) ? T(op_.clamp) : x < -T(op_.clamp) ? -T(op_.clamp) : x; }
  T ratio() const { return T(double(sinks_) / sources_); }

  const FlowAttention& op_;
  const FlowTask& task_;
  const int64_t head_, head_kv_;
  Scratch<T>& at_;
  const int64_t ld_, ldv_;
  int64_t index_, sinks_ = 0, sources_ = 0;
  double total_t_ = 0;
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

int64_t flow_attention_scratch(const FlowAttention& op, bool backward) {
  return FA_DISPATCH_STORAGE(op, Scratch<Compute<S>>(op, backward, nullptr).bytes);
}

void flow_attention_run(const FlowAttention& op, bool backward, const FlowTask* tasks, int64_t begin, int64_t end,
                        void* scratch) {
  FA_DISPATCH_STORAGE(op, run<S>(op, backward, tasks, begin, end, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
