// selective_scan: x_t = E_t x_{t-1} + d_t u_t B_t with E_t = exp(d_t A), y_t = <C_t, x_t> + skip u_t. A vector holds
// channels, so that A, u, d and the state are vectors for each of the N numbers of a state, and B_t, C_t are scalars.
//
// The backward goes through the tiles from the last to the first. It recomputes the states of a tile from the kept one
// in front of it, then runs, with g the gradient that later tokens send back to the state,
//   lambda = g + gy_t C_t,  dC_t += gy_t x_t,  dB_t += lambda d_t u_t,  g = E_t lambda,  dd_t = <lambda, dx_t / dd_t>,
// so that g before the first token is the gradient of the initial state. dB and dC are summed over lanes last.
#include "cpu/selective_scan.h"
#include "cpu/selective_scan_tiles.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

// Where everything lies in a thread's scratch memory. Made with base nullptr it measures what is needed.
template <typename E>
struct Workspace {
  static constexpr int W = kLanes<E>;
  static constexpr int64_t kBlocks = kScanChannels / W;

  // For each block of W channels: (N, W) or (W).
  E *A, *state, *dA, *skip, *bias, *dskip, *dbias;
  E* tile_dA;                    // (N, W)
  E *B, *C;                      // (tile, N) scalars
  E *u, *d, *z, *y;              // (tile, W); y: y, in the forward then out
  E *slope, *gy, *du, *dd;       // (tile, W); gy: dout first, z becomes dz, slope of softplus
  E *states, *decays, *dB, *dC;  // (tile + 1, N, W): states before and after each token; (tile, N, W)
  int64_t bytes;

  Workspace(const SelectiveScan& op, bool backward, std::byte* base) : next_(base) {
    const int64_t rows = op.tile * op.states, state_size = kBlocks * op.states * W, lanes = kBlocks * W;
    take(state_size, A, state);
    take(lanes, skip, bias);
    take(padded(rows), B, C);
    take(op.tile * W, u, d, z, y);
    if (backward) {
      take(state_size, dA);
      take(op.states * W, tile_dA);
      take(lanes, dskip, dbias);
      take(op.tile * W, slope, gy, du, dd);
      take(rows * W, decays);
      take((rows + op.states) * W, states);
      take((rows + W) * W, dB, dC);
    }
    bytes = next_ - base;
  }

 private:
  template <typename... Pointers>
  void take(int64_t elements, Pointers&... pointers) {
    ((pointers = reinterpret_cast<E*>(next_), next_ += elements * sizeof(E)), ...);
  }
  std::byte* next_;
};

template <typename S>
class Pass {
 public:
  using E = Compute<S>;
  using V = Vec<E>;
  static constexpr int W = kLanes<E>;

  Pass(const SelectiveScan& op, const SelectiveTask& task, bool backward, std::byte* scratch)
      : op_(op), task_(task), w_(op, backward, scratch), N_(op.states), blocks_((task.last - task.first + W - 1) / W) {
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channel = first_channel(block);
      load_block(static_cast<const E*>(op.A), N_, channel, w_.A + block * N_ * W, false);
      const auto vector = [&](const void* from) {
        return from ? load_lanes<E>(static_cast<const E*>(from) + channel, lanes(block)) : V{};
      };
      store(w_.skip + block * W, vector(op.skip)), store(w_.bias + block * W, vector(op.bias));
    }
  }

  void forward() {
    for (segment_ = task_.begin; segment_ != task_.end; ++segment_) {
      load_states(op_.initial, segment_->initial);
      for (int64_t begin = 0; begin < segment_->length; begin += op_.tile) {
        const int64_t tokens = min(op_.tile, segment_->length - begin);
        read_state_rows(begin, tokens);
        for (int64_t block = 0; block < blocks_; ++block) forward_tile(place(block, begin, tokens), block);
      }
      store_states(op_.final);
    }
  }

  void backward() {
    __builtin_memset(w_.dA, 0, blocks_ * N_ * W * sizeof(E));
    __builtin_memset(w_.dskip, 0, blocks_ * W * sizeof(E));
    __builtin_memset(w_.dbias, 0, blocks_ * W * sizeof(E));
    for (segment_ = task_.begin; segment_ != task_.end; ++segment_) {
      load_states(op_.dfinal, true);
      for (int64_t begin = (segment_->length - 1) / op_.tile * op_.tile; begin >= 0; begin -= op_.tile) {
        const int64_t tokens = min(op_.tile, segment_->length - begin);
        read_state_rows(begin, tokens);
        __builtin_memset(w_.dB, 0, (tokens * N_ + W) * W * sizeof(E));
        __builtin_memset(w_.dC, 0, (tokens * N_ + W) * W * sizeof(E));
        for (int64_t block = 0; block < blocks_; ++block) {
          const TilePlace tile = place(block, begin, tokens);
          recompute(tile, block);
          read_output_gradients(tile);
          backward_tile(tile, block);
          write_gradients(tile);
        }
        sum_lanes(w_.dB, begin, tokens, op_.dB_parts);
        sum_lanes(w_.dC, begin, tokens, op_.dC_parts);
      }
      store_states(op_.dinitial);
    }
    store_parameter_gradients();
  }

 private:
  static void add(E* to, V value) { store(to, load(to) + value); }
  int64_t first_channel(int64_t block) const { return task_.first + block * W; }
  int lanes(int64_t block) const { return int(min(W, task_.last - first_channel(block))); }
  TilePlace place(int64_t block, int64_t begin, int64_t tokens) const {
    return {*segment_, begin, tokens, first_channel(block), lanes(block)};
  }
  int64_t time(int64_t i) const { return segment_->first + i * segment_->step; }

  // Rows (N) of W channels, channel_stride apart, as vectors (N, W); `add` to what is there.
  void load_block(const E* from, int64_t channel_stride, int64_t channel, E* to, bool add) const {
    const int64_t count = min(W, task_.last - channel);
    for (int64_t j = 0; j < N_; ++j) {
      V value = {};
      for (int64_t l = 0; l < count; ++l) value[l] = from[(channel + l) * channel_stride + j];
      store(to + j * W, add ? load(to + j * W) + value : value);
    }
  }
  void store_block(const E* from, E* to, int64_t channel_stride, int64_t channel) const {
    const int64_t count = min(W, task_.last - channel);
    for (int64_t j = 0; j < N_; ++j) {
      for (int64_t l = 0; l < count; ++l) to[(channel + l) * channel_stride + j] = from[j * W + l];
    }
  }

  void load_states(const ScanState& from, bool present) {
    if (!present || !from.data) return (void)__builtin_memset(w_.state, 0, blocks_ * N_ * W * sizeof(E));
    for (int64_t block = 0; block < blocks_; ++block) {
      load_block(at<const E>(from, *segment_, 0), from.head, first_channel(block), w_.state + block * N_ * W, false);
    }
  }
  void store_states(const ScanState& to) {
    for (int64_t block = 0; to.data && block < blocks_; ++block) {
      store_block(w_.state + block * N_ * W, at<E>(to, *segment_, 0), to.head, first_channel(block));
    }
  }

  // The state that is kept, or wanted, after the token at `slot`.
  template <typename P>
  P* slot_state(P* states, int32_t slot) const {
    return states + (segment_->row * op_.num_slots + slot) * op_.channels * N_;
  }
  E* carry(const TilePlace& tile) const {
    const ScanSegment& s = *segment_;
    const int64_t start = s.row * op_.tokens + (s.step > 0 ? s.first : s.first - s.length + 1);
    const int64_t index = start / op_.tile + s.state + tile.begin / op_.tile;
    return static_cast<E*>(op_.carries) + index * N_ * op_.channels + tile.channel;
  }

  void read_state_rows(int64_t begin, int64_t tokens) {
    const auto read = [&](const StateRows& x, E* to) {
      const S* from = static_cast<const S*>(x.data) + segment_->row * x.row + task_.group * x.group;
      for (int64_t k = 0; k < tokens; ++k) {
        const S* row = from + time(begin + k) * x.time;
        if (x.state == 1) {
          for_lanes<E>(N_, [&](int64_t j, int n) __attribute__((always_inline)) {
            store_lanes<E>(to + k * N_ + j, load_lanes<E>(row + j, n), n);
          });
        } else {
          for (int64_t j = 0; j < N_; ++j) to[k * N_ + j] = load_one(row + j * x.state);
        }
      }
    };
    read(op_.B, w_.B), read(op_.C, w_.C);
  }

  // u, and d = softplus(delta + bias), with its slope where it is wanted.
  void read_inputs(const TilePlace& tile, int64_t block, E* slope) {
    read_tile<S>(op_.u, tile, w_.u), read_tile<S>(op_.delta, tile, w_.d);
    const V bias = load(w_.bias + block * W);
    for (int64_t k = 0; k < tile.tokens * W; k += W) {
      V d = load(w_.d + k) + bias, one = 1 + V{};
      if (op_.softplus) d = softplus(d, slope ? &one : nullptr);
      store(w_.d + k, d);
      if (slope) store(slope + k, one);
    }
  }

  void forward_tile(const TilePlace& tile, int64_t block) {
    E* state = w_.state + block * N_ * W;
    const E* A = w_.A + block * N_ * W;
    for (int64_t j = 0; op_.carries && j < N_; ++j) {
      store_lanes<E>(carry(tile) + j * op_.channels, load(state + j * W), tile.lanes);
    }
    read_inputs(tile, block, nullptr);
    const V skip = load(w_.skip + block * W);
    for (int64_t k = 0; k < tile.tokens; ++k) {
      const V d = load(w_.d + k * W), u = load(w_.u + k * W), du = d * u;
      const E *B = w_.B + k * N_, *C = w_.C + k * N_;
      V y = {};
      for (int64_t j = 0; j < N_; ++j) {
        const V x = exp(d * load(A + j * W)) * load(state + j * W) + du * B[j];
        store(state + j * W, x);
        y += x * C[j];
      }
      store(w_.y + k * W, y + skip * u);
      const int32_t slot = op_.slots ? op_.slots[time(tile.begin + k)] : -1;
      if (slot >= 0) store_block(state, slot_state(static_cast<E*>(op_.slot_states), slot), N_, tile.channel);
    }
    if (op_.z.data) {
      read_tile<S>(op_.z, tile, w_.z);
      for (int64_t k = 0; k < tile.tokens * W; k += W) {
        const V z = load(w_.z + k);
        store(w_.y + k, load(w_.y + k) * z * sigmoid(z));
      }
    }
    write_tile<S>(op_.out, tile, w_.y);
  }

  // d, u, the slope of softplus, and all states and decays of a tile; y where its gate needs it.
  void recompute(const TilePlace& tile, int64_t block) {
    const E* A = w_.A + block * N_ * W;
    read_inputs(tile, block, w_.slope);
    for (int64_t j = 0; j < N_; ++j) {
      store(w_.states + j * W, load_lanes<E>(carry(tile) + j * op_.channels, tile.lanes));
    }
    const V skip = load(w_.skip + block * W);
    for (int64_t k = 0; k < tile.tokens; ++k) {
      const V d = load(w_.d + k * W), u = load(w_.u + k * W), du = d * u;
      const E *B = w_.B + k * N_, *C = w_.C + k * N_, *before = w_.states + k * N_ * W;
      E *after = w_.states + (k + 1) * N_ * W, *decays = w_.decays + k * N_ * W;
      V y = {};
      for (int64_t j = 0; j < N_; ++j) {
        const V decay = exp(d * load(A + j * W)), x = decay * load(before + j * W) + du * B[j];
        store(decays + j * W, decay), store(after + j * W, x);
        y += x * C[j];
      }
      store(w_.y + k * W, y + skip * u);
    }
  }

  // gy and dz, out = y silu(z), from dout.
  void read_output_gradients(const TilePlace& tile) {
    read_tile<S>(op_.dout, tile, w_.gy);
    if (!op_.z.data) return;
    read_tile<S>(op_.z, tile, w_.z);
    for (int64_t k = 0; k < tile.tokens * W; k += W) {
      const V z = load(w_.z + k), gate = sigmoid(z), go = load(w_.gy + k);
      store(w_.gy + k, go * z * gate);
      store(w_.z + k, go * load(w_.y + k) * gate * (1 + z * (1 - gate)));
    }
    write_tile<S>(op_.dz, tile, w_.z);
  }

  void backward_tile(const TilePlace& tile, int64_t block) {
    E* gradient = w_.state + block * N_ * W;
    const E* A = w_.A + block * N_ * W;
    const V skip = load(w_.skip + block * W);
    V dskip = {}, dbias = {};
    __builtin_memset(w_.tile_dA, 0, N_ * W * sizeof(E));
    for (int64_t k = tile.tokens - 1; k >= 0; --k) {
      const V d = load(w_.d + k * W), u = load(w_.u + k * W), gy = load(w_.gy + k * W), du = d * u;
      const E *B = w_.B + k * N_, *C = w_.C + k * N_;
      const int64_t row = k * N_ * W;
      const int32_t slot = op_.slots && op_.dslot_states ? op_.slots[time(tile.begin + k)] : -1;
      if (slot >= 0) {
        load_block(slot_state(static_cast<const E*>(op_.dslot_states), slot), N_, tile.channel, gradient, true);
      }
      V along_B = {}, along_A = {};
      for (int64_t j = 0; j < N_; ++j) {
        const int64_t i = row + j * W;
        const V lambda = load(gradient + j * W) + gy * C[j], before = load(w_.states + i);
        const V back = lambda * load(w_.decays + i), through = back * before;
        add(w_.dC + i, gy * load(w_.states + i + N_ * W));
        add(w_.dB + i, lambda * du);
        add(w_.tile_dA + j * W, through * d);
        store(gradient + j * W, back);
        along_B += lambda * B[j];
        along_A += through * load(A + j * W);
      }
      const V dd = (along_A + along_B * u) * load(w_.slope + k * W);
      store(w_.du + k * W, along_B * d + skip * gy);
      store(w_.dd + k * W, dd);
      dskip += gy * u, dbias += dd;
    }
    // Sums of sums: one running sum over all tokens would lose digits.
    add(w_.dskip + block * W, dskip), add(w_.dbias + block * W, dbias);
    for (int64_t j = 0; j < N_; ++j) add(w_.dA + (block * N_ + j) * W, load(w_.tile_dA + j * W));
  }

  void write_gradients(const TilePlace& tile) {
    write_tile<S>(op_.du, tile, w_.du);
    write_tile<S>(op_.ddelta, tile, w_.dd);
  }

  // Sums over lanes of (tokens, N) vectors, to this task's part.
  void sum_lanes(E* vectors, int64_t begin, int64_t tokens, void* parts) const {
    for (int64_t i = 0; i < tokens * N_; i += W) {
      V rows[W];
      for (int l = 0; l < W; ++l) rows[l] = load(vectors + (i + l) * W);
      store(vectors + i, sum_of_rows<E>(rows));  // in place: sum i was at i * W >= i
    }
    const int64_t row = task_.part * op_.batch + segment_->row;
    E* to = static_cast<E*>(parts) + (row * op_.tokens * op_.groups + task_.group) * N_;
    for (int64_t k = 0; k < tokens; ++k) {
      __builtin_memcpy(to + time(begin + k) * op_.groups * N_, vectors + k * N_, N_ * sizeof(E));
    }
  }

  void store_parameter_gradients() const {
    const auto part = [&](void* parts, int64_t row) { return static_cast<E*>(parts) + task_.set * op_.channels * row; };
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channel = first_channel(block);
      store_block(w_.dA + block * N_ * W, part(op_.dA_parts, N_), N_, channel);
      store_lanes<E>(part(op_.dskip_parts, 1) + channel, load(w_.dskip + block * W), lanes(block));
      store_lanes<E>(part(op_.dbias_parts, 1) + channel, load(w_.dbias + block * W), lanes(block));
    }
  }

  const SelectiveScan& op_;
  const SelectiveTask& task_;
  Workspace<E> w_;
  const int64_t N_, blocks_;
  const ScanSegment* segment_ = nullptr;
};

template <typename S>
void sum_parts(const SelectiveScan& op, int64_t parts, int64_t begin, int64_t end) {
  using E = Compute<S>;
  const int64_t row_size = op.groups * op.states, part_size = op.batch * op.tokens * row_size;
  const auto sum = [&](const void* from, const StateRows& to) {
    for (int64_t token = begin; token < end; ++token) {
      S* row = static_cast<S*>(to.data) + token / op.tokens * to.row + token % op.tokens * to.time;
      const E* first = static_cast<const E*>(from) + token * row_size;
      for (int64_t i = 0; i < row_size; ++i) {
        E total = 0;
        for (int64_t part = 0; part < parts; ++part) total += first[part * part_size + i];
        store_one(row + i / op.states * to.group + i % op.states * to.state, total);
      }
    }
  };
  sum(op.dB_parts, op.dB), sum(op.dC_parts, op.dC);
}

}  // namespace

int64_t selective_scan_scratch_bytes(const SelectiveScan& op, bool backward) {
  return FA_DISPATCH_STORAGE(op, (Workspace<Compute<S>>(op, backward, nullptr).bytes));
}

void selective_scan_fwd(const SelectiveScan& op, const SelectiveTask& task, std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, (Pass<S>(op, task, false, scratch).forward()));
}

void selective_scan_bwd(const SelectiveScan& op, const SelectiveTask& task, std::byte* scratch) {
  FA_DISPATCH_STORAGE(op, (Pass<S>(op, task, true, scratch).backward()));
}

void selective_scan_sum_parts(const SelectiveScan& op, int64_t parts, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, sum_parts<S>(op, parts, begin, end));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
