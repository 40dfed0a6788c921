// linear_scan: h_t = a_t h_{t-1} + b_t. The backward is the same recurrence from the last token to the first,
//   lambda_t = dout_t + c_t,  c_{t-1} = a_t lambda_t,  db_t = lambda_t,  da_t = lambda_t h_{t-1},
// so that c before the first token is the gradient of the initial state.
#include "cpu/linear_scan.h"
#include "cpu/scan_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

// S: storage of tokens, G: storage of gates.
template <typename S, typename G>
class Pass {
 public:
  using E = Compute<S>;
  using State = HeadState<E>;  // its row: h or c; in what a walk from nothing leaves, the product of the gates follows

  Pass(const LinearScan& op, const ScanTask& task, std::byte* scratch)
      : op_(op),
        task_(task),
        segment_(*task.segment),
        heads_(task.head_end - task.head_begin),
        pad_(padded(op.width)),
        bytes_(state_bytes(2 * pad_, sizeof(E))),
        work_(scratch),
        gradients_(reinterpret_cast<E*>(scratch + heads_ * bytes_)),
        gates_(gradients_ + heads_ * pad_) {}

  void run(bool backward, ScanPhase phase, std::byte* carry, std::byte* local) {
    const ScanState& start = backward ? op_.dfinal : op_.initial;
    if (phase == ScanPhase::kStart) return load_states(start, backward ? segment_.final : segment_.initial, carry);
    if (phase == ScanPhase::kCombine) return combine(backward, carry, local);
    if (carry) __builtin_memcpy(work_, carry, heads_ * bytes_);
    if (op_.dgate_parts.data) __builtin_memset(gradients_, 0, heads_ * pad_ * sizeof(E));
    walk(backward, carry ? work_ : nullptr, local, true);
    if (!carry) return;
    if (op_.dgate_parts.data) store_gate_gradients();
    const bool last = task_.end == segment_.length && (backward ? segment_.initial : segment_.final);
    if (last) store_states(backward ? op_.dinitial : op_.final);
  }

 private:
  State state(std::byte* base, int64_t h) const { return State(base, bytes_, h); }

  void load_states(const ScanState& from, bool present, std::byte* carry) const {
    __builtin_memset(carry, 0, heads_ * bytes_);
    if (!present || !from.data) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const E* row = at<const E>(from, segment_, task_.head_begin + h);
      __builtin_memcpy(state(carry, h).row, row, op_.width * sizeof(E));
    }
  }

  void store_states(const ScanState& to) const {
    for (int64_t h = 0; h < heads_; ++h) {
      __builtin_memcpy(at<E>(to, segment_, task_.head_begin + h), state(work_, h).row, op_.width * sizeof(E));
    }
  }

  void store_gate_gradients() const {
    const int64_t part = segment_.part + task_.begin / kScanChunk;
    for (int64_t h = 0; h < heads_; ++h) {
      E* to = static_cast<E*>(op_.dgate_parts.data) + part * op_.dgate_parts.row +
              (task_.head_begin + h) * op_.dgate_parts.head;
      __builtin_memcpy(to, gradients_ + h * pad_, op_.gate_width * sizeof(E));
    }
  }

  // Steps from the states in `carry`, in place, and from nothing into `local`; nullptr: not wanted.
  void walk(bool backward, std::byte* carry, std::byte* local, bool write) {
    const bool scalar = op_.gate_width == 1;
    for (int64_t done = task_.begin; done < task_.end; done += kScanBlock) {
      const int64_t n = min(kScanBlock, task_.end - done);
      const int64_t i = backward ? segment_.length - done - n : done;
      for (int64_t h = 0; scalar && h < heads_; ++h) read_gates(i, n, h);
      for (int64_t step = 0; step < n; ++step) {
        const int64_t k = backward ? n - 1 - step : step;
        const bool first = done + step == task_.begin;
        for (int64_t h = 0; h < heads_; ++h) {
          const E gate = scalar ? gates_[h * kScanBlock + k] : 0;
          if (carry && backward) step_backward(state(carry, h).row, i + k, h, gate, write);
          if (carry && !backward) step_forward(state(carry, h).row, i + k, h, gate, write);
          if (local) step_local(backward ? op_.dout : op_.tokens, backward, state(local, h).row, i + k, h, gate, first);
        }
      }
    }
  }

  void read_gates(int64_t i, int64_t n, int64_t h) {
    E* gates = gates_ + h * kScanBlock;
    for (int64_t k = n; k < kScanBlock; ++k) gates[k] = 0;
    read_scalars(op_.gates, op_.gates_storage, segment_, i, n, task_.head_begin + h, gates);
    if (!op_.log_gate) return;
    for (int64_t k = 0; k < kScanBlock; k += kLanes<E>) store(gates + k, exp(load(gates + k)));
  }

  // The gates of lanes j..j+n of a row; `scalar` where the row has one gate.
  Vec<E> gate_lanes(const G* gates, int64_t j, int n, E scalar) const {
    if (op_.gate_width == 1) return splat(scalar);
    const Vec<E> gate = load_lanes<E>(gates + j, n);
    return op_.log_gate ? exp(gate) : gate;
  }

  void step_forward(E* row, int64_t i, int64_t h, E scalar, bool write) const {
    const int64_t head = task_.head_begin + h;
    const G* gates = at<const G>(op_.gates, segment_, i, head);
    const S* tokens = at<const S>(op_.tokens, segment_, i, head);
    S* out = at<S>(op_.out, segment_, i, head);
    const bool fresh = i == 0 && !segment_.initial;  // the gate has nothing to act on, and may be infinite
    for_lanes<E>(op_.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      Vec<E> value = load_lanes<E>(tokens + j, n);
      if (!fresh) value += gate_lanes(gates, j, n, scalar) * load(row + j);
      store(row + j, value);
      if (write) store_lanes<E>(out + j, value, n);
    });
  }

  void step_backward(E* row, int64_t i, int64_t h, E scalar, bool write) const {
    const int64_t head = task_.head_begin + h;
    const G* gates = at<const G>(op_.gates, segment_, i, head);
    const S* dout = at<const S>(op_.dout, segment_, i, head);
    S* dtokens = at<S>(op_.dtokens, segment_, i, head);
    const S* before = i > 0 ? at<const S>(op_.out, segment_, i - 1, head) : nullptr;
    const E* initial = i == 0 && segment_.initial ? at<const E>(op_.initial, segment_, head) : nullptr;
    const bool fresh = !before && !initial, one_gate = op_.gate_width == 1, constant = op_.dgate_parts.data;
    E* gradients = gradients_ + h * pad_;
    Vec<E> total = {};
    for_lanes<E>(op_.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec<E> lambda = load(row + j) + load_lanes<E>(dout + j, n);
      Vec<E> gate = {}, gradient = {};
      if (!fresh) {
        gate = gate_lanes(gates, j, n, scalar);
        gradient = lambda * (before ? load_lanes<E>(before + j, n) : load_lanes<E>(initial + j, n));
        store(row + j, gate * lambda);
      }
      if (!write) return;
      store_lanes<E>(dtokens + j, lambda, n);
      if (op_.log_gate && !fresh) gradient *= gate;
      if (one_gate) {
        total += gradient;
      } else if (constant) {
        store(gradients + j, load(gradients + j) + gradient);
      } else {
        store_lanes<E>(at<G>(op_.dgates, segment_, i, head) + j, gradient, n);
      }
    });
    if (!write || !one_gate) return;
    if (constant) {
      *gradients += reduce_sum<E>(total);
    } else {
      write_scalar(op_.dgates, op_.gates_storage, segment_, i, head, reduce_sum<E>(total));
    }
  }

  // A walk from nothing: the recurrence in row, the product of the gates in row + pad_.
  void step_local(const ScanTensor& inputs, bool backward, E* row, int64_t i, int64_t h, E scalar, bool first) const {
    const int64_t head = task_.head_begin + h;
    const G* gates = at<const G>(op_.gates, segment_, i, head);
    const S* input = at<const S>(inputs, segment_, i, head);
    for_lanes<E>(op_.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec<E> gate = gate_lanes(gates, j, n, scalar), x = load_lanes<E>(input + j, n);
      const Vec<E> state = first ? Vec<E>{} : load(row + j);
      store(row + pad_ + j, first ? gate : gate * load(row + pad_ + j));
      if (backward) {
        store(row + j, gate * (state + x));
      } else {
        store(row + j, first ? x : gate * state + x);
      }
    });
  }

  // Whether product * carry is the number the recurrence would reach. Gates above 1 can overflow the product although
  // the state, growing from less, stays finite.
  bool product_serves(std::byte* carry, std::byte* local) const {
    for (int64_t h = 0; h < heads_; ++h) {
      const E *state_row = state(carry, h).row, *products = state(local, h).row + pad_;
      for (int64_t j = 0; j < op_.width; ++j) {
        if (state_row[j] != 0 && !(__builtin_isfinite(state_row[j]) && __builtin_isfinite(products[j]))) return false;
      }
    }
    return true;
  }

  void combine(bool backward, std::byte* carry, std::byte* local) {
    if (!product_serves(carry, local)) return walk(backward, carry, nullptr, false);
    for (int64_t h = 0; h < heads_; ++h) {
      E* row = state(carry, h).row;
      const E* end = state(local, h).row;
      for (int64_t j = 0; j < op_.width; ++j) row[j] = row[j] == 0 ? end[j] : end[pad_ + j] * row[j] + end[j];
    }
  }

  const LinearScan& op_;
  const ScanTask& task_;
  const ScanSegment& segment_;
  const int64_t heads_, pad_, bytes_;
  std::byte* const work_;  // states of the walk from the carry
  E* const gradients_;     // (heads, pad_) sums over the task of the gradients of constant gates
  E* const gates_;         // (heads, kScanBlock)
};

template <typename S>
void run(const LinearScan& op, bool backward, ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local,
         std::byte* scratch) {
  if (op.gates_storage == op.storage) {
    Pass<S, S>(op, task, scratch).run(backward, phase, carry, local);
  } else {
    Pass<S, float>(op, task, scratch).run(backward, phase, carry, local);
  }
}

}  // namespace

int64_t linear_scan_state_bytes(const LinearScan& op) {
  return FA_DISPATCH_STORAGE(op, state_bytes(2 * padded(op.width), sizeof(Compute<S>)));
}

int64_t linear_scan_scratch_bytes(const LinearScan& op, int64_t heads) {
  const int64_t element = FA_DISPATCH_STORAGE(op, int64_t(sizeof(Compute<S>)));
  return heads * (linear_scan_state_bytes(op) + (padded(op.width) + kScanBlock) * element);
}

void linear_scan_fwd(const LinearScan& op, ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local,
                     std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, run<S>(op, false, phase, task, carry, local, scratch));
}

void linear_scan_bwd(const LinearScan& op, ScanPhase phase, const ScanTask& task, std::byte* carry, std::byte* local,
                     std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, run<S>(op, true, phase, task, carry, local, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
