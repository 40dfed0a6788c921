// prefix_attention: a scan of two scalars (m, u) per head over the scores, and a convex recurrence over the values,
//   o_t = a_t o_{t-1} + g_t v_t,  a_t = u_{t-1} exp(m_{t-1} - m_t) / u_t,  g_t = exp(s_t - m_t) / u_t.
//
// For float inputs the rows run in double: the loop waits for memory, and a million equal scores stay a mean to one
// rounding. m trails the largest score by up to kGaugeSlack, so that u is hardly ever rescaled, which would round it.
#include "cpu/prefix_attention.h"
#include "cpu/scan_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

constexpr float kGaugeSlack = 16;

template <typename S>
using Accumulator = std::conditional_t<std::is_same_v<S, float>, double, Compute<S>>;

// exp(from - to); a gauge of -inf stands for nothing summed yet.
inline double rescale(double from, double to) {
  return from == to ? 1 : from == kMinusInfinity<double> ? 0 : __builtin_exp(from - to);
}

// The running sums of one head: sum of exp(score - m), and the largest score.
template <typename E>
struct Sums {
  E m = kMinusInfinity<E>, top = kMinusInfinity<E>;
  double u = 0;

  Sums() = default;
  explicit Sums(const double* scalars) : m(scalars[0]), top(scalars[1]), u(scalars[2]) {}
  void save(double* scalars) const { scalars[0] = m, scalars[1] = top, scalars[2] = u; }

  // Takes n <= kScanBlock scores, -inf where masked. Writes the gates a and g, and m and u after each token.
  template <typename A>
  void take(const E* scores, int64_t n, A* a, A* g, E* m_out, E* u_out) {
    alignas(64) E gauge[kScanBlock] = {}, terms[kScanBlock] = {};
    E before = m;
    for (int64_t i = 0; i < n; ++i) {
      top = scores[i] > top ? scores[i] : top;
      m = scores[i] > m + E(kGaugeSlack) ? scores[i] : m;
      gauge[i] = m;
      terms[i] = scores[i] == kMinusInfinity<E> ? scores[i] : scores[i] - m;
    }
    for (int64_t i = 0; i < kScanBlock; i += kLanes<E>) store(terms + i, exp(load(terms + i)));
    for (int64_t i = 0; i < n; ++i) {
      u *= rescale(before, gauge[i]);
      before = gauge[i];
      const double kept = u;
      u += terms[i];
      const double inverse = 1 / u;
      a[i] = u == 0 ? 1 : kept * inverse;
      g[i] = u == 0 ? 0 : terms[i] * inverse;
      m_out[i] = gauge[i], u_out[i] = u;
    }
  }
};

// The scalars of one head for a block of tokens.
template <typename S, typename E = Compute<S>, typename A = Accumulator<S>>
struct HeadBlock {
  E scores[kScanBlock], m[kScanBlock], u[kScanBlock];
  A a[kScanBlock], g[kScanBlock];              // of the walk that starts from the carry
  A local_a[kScanBlock], local_g[kScanBlock];  // of the walk that starts from nothing
  A lse_grad[kScanBlock];
};

// A score of -inf means masked, so that a masked value is never read into a product.
template <typename E>
inline void read_scores(const PrefixAttention& op, const ScanSegment& segment, int64_t i, int64_t n, int64_t head,
                        E* scores) {
  read_scalars(op.scores, op.scores_storage, segment, i, n, head, scores);
  if (!op.mask.data) return;
  for (int64_t k = 0; k < n; ++k) {
    if (!*at<const bool>(op.mask, segment, i + k, head)) scores[k] = kMinusInfinity<E>;
  }
}

template <typename S>
class Pass {
 public:
  using E = Compute<S>;
  using A = Accumulator<S>;
  using State = HeadState<A>;
  using Block = HeadBlock<S>;

  Pass(const PrefixAttention& op, const ScanTask& task, std::byte* scratch)
      : op_(op),
        task_(task),
        segment_(*task.segment),
        heads_(task.head_end - task.head_begin),
        bytes_(state_bytes(op.width, sizeof(A))),
        work_(scratch),
        blocks_(reinterpret_cast<Block*>(scratch + heads_ * bytes_)) {}

  void forward(ScanPhase phase, std::byte* carry, std::byte* local) {
    if (phase == ScanPhase::kStart) return start_forward(carry);
    if (phase == ScanPhase::kCombine) return combine_forward(carry, local);
    if (carry) __builtin_memcpy(work_, carry, heads_ * bytes_);
    if (local) clear_sums(local);
    for (int64_t i = task_.begin; i < task_.end; i += kScanBlock) {
      const int64_t n = min(kScanBlock, task_.end - i);
      for (int64_t h = 0; h < heads_; ++h) scan_scores(i, n, h, carry, local);
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t h = 0; h < heads_; ++h) {
          const bool kept = blocks_[h].scores[k] != kMinusInfinity<E>;
          const S* values = at<const S>(op_.values, segment_, i + k, task_.head_begin + h);
          if (carry) {
            S* out = at<S>(op_.out, segment_, i + k, task_.head_begin + h);
            step_forward(work(h).row, kept, blocks_[h].a[k], blocks_[h].g[k], values, out);
          }
          if (local && kept) {
            step_forward(state(local, h).row, kept, blocks_[h].local_a[k], blocks_[h].local_g[k], values, (S*)nullptr);
          }
        }
      }
    }
    if (carry && task_.end == segment_.length && segment_.final) finish_forward();
  }

  void backward(ScanPhase phase, std::byte* carry, std::byte* local) {
    if (phase == ScanPhase::kStart) return start_backward(carry);
    if (phase == ScanPhase::kCombine) return combine_backward(carry, local);
    if (carry) __builtin_memcpy(work_, carry, heads_ * bytes_);
    if (local) __builtin_memset(local, 0, heads_ * bytes_);
    // Blocks of tokens from the last to the first; steps count from the segment's end.
    for (int64_t end = segment_.length - task_.begin; end > segment_.length - task_.end;) {
      const int64_t n = min(kScanBlock, end - (segment_.length - task_.end)), i = end - n;
      for (int64_t h = 0; h < heads_; ++h) read_weights(i, n, h);
      for (int64_t k = n; k-- > 0;) {
        for (int64_t h = 0; h < heads_; ++h) {
          if (carry) step_backward<true>(work(h), i + k, k, h);
          if (local) step_backward<false>(state(local, h), i + k, k, h);
        }
      }
      end = i;
    }
    if (carry && task_.end == segment_.length && segment_.initial) finish_backward();
  }

 private:
  State state(std::byte* base, int64_t h) const { return State(base, bytes_, h); }
  State work(int64_t h) const { return state(work_, h); }

  void clear_sums(std::byte* states) {
    __builtin_memset(states, 0, heads_ * bytes_);
    for (int64_t h = 0; h < heads_; ++h) Sums<E>().save(state(states, h).scalars);
  }

  void start_forward(std::byte* carry) {
    clear_sums(carry);
    if (!segment_.initial) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t head = task_.head_begin + h;
      const E u = *at<const E>(op_.u0, segment_, head), m = *at<const E>(op_.m0, segment_, head);
      if (u == 0) continue;  // nothing summed yet, whatever m is
      Sums<E> sums;
      sums.m = sums.top = m, sums.u = u;
      sums.save(state(carry, h).scalars);
      const E* w = at<const E>(op_.w0, segment_, head);
      for (int64_t j = 0; j < op_.width; ++j) state(carry, h).row[j] = A(w[j]) / A(u);
    }
  }

  void scan_scores(int64_t i, int64_t n, int64_t h, bool carry, std::byte* local) {
    Block& block = blocks_[h];
    read_scores(op_, segment_, i, n, task_.head_begin + h, block.scores);
    if (local) {
      Sums<E> sums(state(local, h).scalars);
      sums.take(block.scores, n, block.local_a, block.local_g, block.m, block.u);
      sums.save(state(local, h).scalars);
    }
    if (!carry) return;
    Sums<E> sums(work(h).scalars);
    sums.take(block.scores, n, block.a, block.g, block.m, block.u);
    sums.save(work(h).scalars);
    const int64_t head = task_.head_begin + h;
    for (int64_t k = 0; op_.m.data && k < n; ++k) {
      *at<E>(op_.m, segment_, i + k, head) = block.m[k], *at<E>(op_.u, segment_, i + k, head) = block.u[k];
    }
    for (int64_t k = 0; op_.lse.data && k < n; ++k) {
      *at<E>(op_.lse, segment_, i + k, head) = E(double(block.m[k]) + __builtin_log(double(block.u[k])));
    }
  }

  // row = a * row + g * values, and its copy in `out`.
  void step_forward(A* row, bool kept, A a, A g, const S* values, S* out) const {
    for_lanes<A>(op_.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      Vec<A> o = load(row + j);
      if (kept) {
        o = o * a + load_lanes<A>(values + j, n) * g;
        store(row + j, o);
      }
      if (out) store_lanes<A>(out + j, o, n);
    });
  }

  void combine_forward(std::byte* carry, std::byte* local) {
    for (int64_t h = 0; h < heads_; ++h) {
      State to = state(carry, h), from = state(local, h);
      Sums<E> sums(to.scalars);
      const Sums<E> more(from.scalars);
      const E m = more.m > sums.m ? more.m : sums.m;
      const double kept = sums.u * rescale(sums.m, m), added = more.u * rescale(more.m, m);
      sums.u = kept + added, sums.m = m, sums.top = more.top > sums.top ? more.top : sums.top;
      sums.save(to.scalars);
      if (more.u == 0) continue;
      const A a = kept / sums.u, g = added / sums.u;
      for (int64_t j = 0; j < op_.width; ++j) to.row[j] = a * to.row[j] + g * from.row[j];
    }
  }

  void finish_forward() const {
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t head = task_.head_begin + h;
      const Sums<E> sums(work(h).scalars);
      const double u = sums.u * rescale(sums.m, sums.top);
      *at<E>(op_.m_final, segment_, head) = sums.top;
      *at<E>(op_.u_final, segment_, head) = u;
      E* w = at<E>(op_.w_final, segment_, head);
      for (int64_t j = 0; j < op_.width; ++j) w[j] = u * work(h).row[j];
    }
  }

  // Backward. A state holds c = a_{t+1} R_{t+1} in its row and a_{t+1} r_{t+1} in its scalar.
  void start_backward(std::byte* carry) {
    __builtin_memset(carry, 0, heads_ * bytes_);
    if (!segment_.final) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t head = task_.head_begin + h;
      const E u = *at<const E>(op_.u_final, segment_, head);
      if (u == 0) continue;
      if (op_.du_final.data) *state(carry, h).scalars = -double(u) * *at<const E>(op_.du_final, segment_, head);
      if (!op_.dw_final.data) continue;
      const E* dw = at<const E>(op_.dw_final, segment_, head);
      for (int64_t j = 0; j < op_.width; ++j) state(carry, h).row[j] = A(u) * A(dw[j]);
    }
  }

  // a_i, the weight that the sums before token i keep at it; before the first, the factor from R to dw0.
  double keep(int64_t i, int64_t head) const {
    const double m = *at<const E>(op_.m, segment_, i, head), u = *at<const E>(op_.u, segment_, i, head);
    if (u == 0) return 0;
    if (i > 0) {
      return *at<const E>(op_.u, segment_, i - 1, head) * rescale(*at<const E>(op_.m, segment_, i - 1, head), m) / u;
    }
    return segment_.initial ? rescale(*at<const E>(op_.m0, segment_, head), m) / u : 0;
  }

  void read_weights(int64_t i, int64_t n, int64_t h) {
    Block& block = blocks_[h];
    const int64_t head = task_.head_begin + h;
    read_scores(op_, segment_, i, n, head, block.scores);
    alignas(64) E terms[kScanBlock] = {};
    for (int64_t k = 0; k < n; ++k) {
      const bool kept = block.scores[k] != kMinusInfinity<E>;
      block.m[k] = *at<const E>(op_.m, segment_, i + k, head);
      terms[k] = kept ? block.scores[k] - block.m[k] : block.scores[k];
    }
    for (int64_t k = 0; k < kScanBlock; k += kLanes<E>) store(terms + k, exp(load(terms + k)));
    for (int64_t k = 0; k < n; ++k) {
      const E u = *at<const E>(op_.u, segment_, i + k, head);
      block.a[k] = keep(i + k, head);
      block.g[k] = u == 0 ? 0 : terms[k] / u;
      block.lse_grad[k] = op_.dlse.data && u != 0 ? *at<const E>(op_.dlse, segment_, i + k, head) : 0;
    }
  }

  template <bool Write>
  void step_backward(State state, int64_t i, int64_t k, int64_t h) const {
    const Block& block = blocks_[h];
    const int64_t head = task_.head_begin + h;
    const bool kept = block.scores[k] != kMinusInfinity<E>;
    const A a = block.a[k], g = block.g[k];
    const S* dout = at<const S>(op_.dout, segment_, i, head);
    const S* out = at<const S>(op_.out, segment_, i, head);
    const S* values = at<const S>(op_.values, segment_, i, head);
    S* dvalues = at<S>(op_.dvalues, segment_, i, head);
    Vec<A> delta = {}, score = {};
    for_lanes<A>(op_.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec<A> go = load_lanes<A>(dout + j, n), r = load(state.row + j) + go;
      delta += go * load_lanes<A>(out + j, n);
      store(state.row + j, r * a);
      if constexpr (Write) {
        if (kept) score += r * load_lanes<A>(values + j, n);
        store_lanes<A>(dvalues + j, kept ? r * g : Vec<A>{}, n);
      }
    });
    const A r = A(*state.scalars) + reduce_sum<A>(delta) - block.lse_grad[k];
    *state.scalars = a * r;
    if constexpr (Write) {
      const E gradient = kept ? g * (reduce_sum<A>(score) - r) : 0;
      write_scalar(op_.dscores, op_.scores_storage, segment_, i, head, gradient);
    }
  }

  void combine_backward(std::byte* carry, std::byte* local) {
    const int64_t last = segment_.length - 1 - task_.begin, first = segment_.length - task_.end;  // never 0
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t head = task_.head_begin + h;
      const double u = *at<const E>(op_.u, segment_, last, head), m = *at<const E>(op_.m, segment_, last, head);
      const double u_before = *at<const E>(op_.u, segment_, first - 1, head);
      const double m_before = *at<const E>(op_.m, segment_, first - 1, head);
      const double kept = u == 0 ? 0 : u_before * rescale(m_before, m) / u;
      State to = state(carry, h), from = state(local, h);
      *to.scalars = kept * *to.scalars + *from.scalars;
      for (int64_t j = 0; j < op_.width; ++j) to.row[j] = A(kept) * to.row[j] + from.row[j];
    }
  }

  void finish_backward() const {
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t head = task_.head_begin + h;
      *at<E>(op_.du0, segment_, head) = -*work(h).scalars;
      E* dw = at<E>(op_.dw0, segment_, head);
      for (int64_t j = 0; j < op_.width; ++j) dw[j] = work(h).row[j];
    }
  }

  const PrefixAttention& op_;
  const ScanTask& task_;
  const ScanSegment& segment_;
  const int64_t heads_, bytes_;
  std::byte* const work_;  // states of the walk from the carry
  Block* const blocks_;
};

}  // namespace

int64_t prefix_attention_state_bytes(const PrefixAttention& op) {
  return FA_DISPATCH_STORAGE(op, state_bytes(op.width, sizeof(Accumulator<S>)));
}

int64_t prefix_attention_scratch_bytes(const PrefixAttention& op, int64_t heads) {
  return heads * (prefix_attention_state_bytes(op) + FA_DISPATCH_STORAGE(op, int64_t(sizeof(HeadBlock<S>))));
}

void prefix_attention_fwd(const PrefixAttention& op, ScanPhase phase, const ScanTask& task, std::byte* carry,
                          std::byte* local, std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, Pass<S>(op, task, scratch).forward(phase, carry, local));
}

void prefix_attention_bwd(const PrefixAttention& op, ScanPhase phase, const ScanTask& task, std::byte* carry,
                          std::byte* local, std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, Pass<S>(op, task, scratch).backward(phase, carry, local));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
