// chunk_hybrid_attention: one item is one head of one row, walked chunk by chunk with its state.
//
// A tile of query rows holds its scores against the whole chunk, so that softmax and its gradient see complete rows.
// Backward, a first walk keeps the state before every chunk; the second goes from the last chunk to the first.
#include "cpu/attention_tile.h"
#include "cpu/chunk_hybrid_attention.h"
#include "cpu/row_vectors.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

constexpr int64_t kTile = 32;      // query rows
constexpr double kGateScale = 16;  // decay = logsigmoid(gate) / 16

template <typename T>
struct Scratch {
  int64_t ld, ldv, ldc;
  ScratchCursor<T> cursor;
  T *k, *kt, *v, *vt;                // (chunk, ld) and (width, ldc), times D^-0.5; (chunk, ldv), (width_v, ldc)
  T *q, *p, *y, *cross;              // (tile, ld), (tile, ldc), (tile, ldv), (tile, ldv or ld)
  T *state, *decay;                  // (width, ldv), (chunk): exp of the running sum of g
  T *dout, *ds, *dq, *dk, *dv, *st;  // (tile, ldv), (tile, ldc), (tile, ld), (chunk, ld), (chunk, ldv), (width_v, ld)
  T *dstate, *along, *states;        // (width, ldv), (chunk), (chunks, width, ldv)
  int64_t bytes;

  Scratch(const ChunkHybridAttention& op, bool backward, void* base)
      : ld(padded(op.width)), ldv(padded(op.width_v)), ldc(padded(op.chunk)), cursor(base) {
    k = cursor.take(op.chunk * ld), kt = cursor.take(op.width * ldc), v = cursor.take(op.chunk * ldv);
    q = cursor.take(kTile * ld), p = cursor.take(kTile * ldc), y = cursor.take(kTile * ldv);
    cross = cursor.take(kTile * max(ld, ldv)), state = cursor.take(op.width * ldv), decay = cursor.take(op.chunk);
    vt = dout = ds = dq = dk = dv = st = dstate = along = states = nullptr;
    if (backward) {
      vt = cursor.take(op.width_v * ldc), dout = cursor.take(kTile * ldv), ds = cursor.take(kTile * ldc);
      dq = cursor.take(kTile * ld), dk = cursor.take(op.chunk * ld), dv = cursor.take(op.chunk * ldv);
      st = cursor.take(op.width_v * ld), dstate = cursor.take(op.width * ldv), along = cursor.take(op.chunk);
      states = cursor.take(op.tokens / op.chunk * op.width * ldv);
    }
    bytes = cursor.bytes();
  }
};

template <typename T>
inline T logsigmoid(T x) {
  const T low = x < 0 ? x : 0, magnitude = x < 0 ? x : -x;
  return low - T(__builtin_log1p(__builtin_exp(magnitude)));
}

template <typename T>
inline T dot(const T* a, const T* b, int64_t n) {
  Sum<T> sum;
  each_vector<T>(n, [&](int64_t c, int slot, auto part) { sum.slots[slot] += load(a + c, part) * load(b + c, part); });
  return sum.total();
}

template <typename S, typename T = Compute<S>>
class Item {
 public:
  Item(const ChunkHybridAttention& op, int64_t row, int64_t head, const Scratch<T>& at)
      : op_(op),
        row_(row),
        head_(head),
        head_kv_(head / op.group),
        at_(at),
        scale_(T(1 / __builtin_sqrt(double(op.width)))) {}

  void forward() {
    load_state(op_.initial, at_.state);
    for (int64_t first = 0; first < op_.tokens; first += op_.chunk) {
      const T kept = load_chunk(first);
      for (int64_t i = 0; i < op_.chunk; i += kTile) forward_tile(first, i, min(kTile, op_.chunk - i));
      add_chunk(kept);
    }
    store_state(at_.state, op_.final);
  }

  void backward() {
    load_state(op_.initial, at_.state);
    const int64_t size = op_.width * at_.ldv;
    for (int64_t first = 0; first < op_.tokens; first += op_.chunk) {
      __builtin_memcpy(at_.states + first / op_.chunk * size, at_.state, size * sizeof(T));
      const T kept = load_chunk(first);
      add_chunk(kept);
    }
    load_state(op_.dfinal, at_.dstate);
    for (int64_t first = op_.tokens - op_.chunk; first >= 0; first -= op_.chunk) {
      backward_chunk(first, at_.states + first / op_.chunk * size);
    }
    store_state(at_.dstate, op_.dinitial);
  }

 private:
  template <typename R>
  R* at(const ScanTensor& x, int64_t t, int64_t head) const {
    return static_cast<R*>(x.data) + row_ * x.row + t * x.time + head * x.head;
  }
  T* lse(int64_t t) const { return static_cast<T*>(op_.lse) + (row_ * op_.heads + head_) * op_.tokens + t; }
  T gate(int64_t t) const { return *at<T>(op_.gate, t, head_); }

  T* state_of(void* states) const {
    return states ? static_cast<T*>(states) + (row_ * op_.heads + head_) * op_.width * op_.width_v : nullptr;
  }
  void load_state(void* from, T* to) const {
    clear(to, op_.width * at_.ldv);
    if (from) load_rows<T, T>(state_of(from), op_.width_v, op_.width, op_.width_v, 1, to, at_.ldv);
  }
  void store_state(const T* from, void* to) const {
    if (to) store_rows<T, T>(from, at_.ldv, op_.width, op_.width_v, 1, state_of(to), op_.width_v);
  }
  static void clear(T* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(T)); }

  // Keys, values and decays of a chunk; returns what the chunk leaves of the state, exp(mean g).
  T load_chunk(int64_t first) {
    const S *k = at<S>(op_.k, first, head_kv_), *v = at<S>(op_.v, first, head_kv_);
    clear(at_.k, op_.chunk * at_.ld), clear(at_.v, op_.chunk * at_.ldv);
    load_rows<T>(k, op_.k.time, op_.chunk, op_.width, scale_, at_.k, at_.ld);
    load_rows<T>(v, op_.v.time, op_.chunk, op_.width_v, T(1), at_.v, at_.ldv);
    pack_transposed<T>(at_.k, at_.ld, op_.chunk, op_.width, at_.kt, at_.ldc);
    double sum = 0;
    for (int64_t i = 0; i < op_.chunk; ++i) {
      sum += logsigmoid(gate(first + i)) / kGateScale;
      at_.decay[i] = exp(splat<T>(T(sum)))[0];
    }
    return exp(splat<T>(T(sum / op_.chunk)))[0];
  }

  void scale_state(T* state, T factor) const {
    for (int64_t j = 0; j < op_.width * at_.ldv; j += kLanes<T>) store(state + j, load(state + j) * factor);
  }

  void add_chunk(T kept) {
    scale_state(at_.state, kept);
    gemm<T>(op_.width, op_.width_v, op_.chunk, at_.k, 1, at_.ld, at_.v, at_.ldv, at_.state, at_.ldv, true);
  }

  void load_queries(int64_t first, int64_t i, int64_t rows) {
    load_rows<T>(at<S>(op_.q, first + i, head_), op_.q.time, rows, op_.width, T(1), at_.q, at_.ld);
    gemm<T>(rows, op_.chunk, op_.width, at_.q, at_.ld, 1, at_.kt, at_.ldc, at_.p, at_.ldc, false);
  }

  // exp(score - shift) over a row, 0 past the chunk; returns the sum.
  T exponentials(T* row, T shift) const {
    Vec<T> sum = {};
    each_vector<T>(op_.chunk, [&](int64_t c, int, auto part) {
      const Vec<T> x = inside<T>(exp(load(row + c, part) - shift), part);
      store(row + c, x, part);
      sum += x;
    });
    return reduce_sum<T>(sum);
  }

  void forward_tile(int64_t first, int64_t i, int64_t rows) {
    load_queries(first, i, rows);
    for (int64_t r = 0; r < rows; ++r) {
      T *row = at_.p + r * at_.ldc, top = row[0];
      for (int64_t j = 1; j < op_.chunk; ++j) top = row[j] > top ? row[j] : top;
      const T total = exponentials(row, top);
      *lse(first + i + r) = top + T(__builtin_log(total));
      each_vector<T>(op_.chunk,
                     [&](int64_t c, int, auto part) { store(row + c, load(row + c, part) * (1 / total), part); });
    }
    gemm<T>(rows, op_.width_v, op_.chunk, at_.p, at_.ldc, 1, at_.v, at_.ldv, at_.y, at_.ldv, false);
    for (int64_t r = 0; r < rows; ++r) {
      T* q = at_.q + r * at_.ld;
      each_vector<T>(op_.width,
                     [&](int64_t c, int, auto part) { store(q + c, load(q + c, part) * at_.decay[i + r], part); });
    }
    gemm<T>(rows, op_.width_v, op_.width, at_.q, at_.ld, 1, at_.state, at_.ldv, at_.y, at_.ldv, true);
    store_rows<S, T>(at_.y, at_.ldv, rows, op_.width_v, 1, at<S>(op_.o, first + i, head_), op_.o.time);
  }

  void backward_chunk(int64_t first, const T* state) {
    const int64_t ld = at_.ld, ldv = at_.ldv, n = op_.chunk;
    const T kept = load_chunk(first);
    pack_transposed<T>(at_.v, ldv, n, op_.width_v, at_.vt, at_.ldc);
    pack_transposed<T>(at_.dstate, ldv, op_.width, op_.width_v, at_.st, ld);
    gemm<T>(n, op_.width_v, op_.width, at_.k, ld, 1, at_.dstate, ldv, at_.dv, ldv, false);
    gemm<T>(n, op_.width, op_.width_v, at_.v, ldv, 1, at_.st, ld, at_.dk, ld, false);
    const T dkept = kept * dot(at_.dstate, state, op_.width * ldv) / n;
    scale_state(at_.dstate, kept);
    pack_transposed<T>(state, ldv, op_.width, op_.width_v, at_.st, ld);
    for (int64_t i = 0; i < n; i += kTile) backward_tile(first, i, min(kTile, n - i));
    store_rows<S, T>(at_.dk, ld, n, op_.width, scale_, at<S>(op_.dk, first, head_), op_.dk.time);
    store_rows<S, T>(at_.dv, ldv, n, op_.width_v, 1, at<S>(op_.dv, first, head_), op_.dv.time);
    double after = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      after += at_.along[i];
      const T slope = T(1 / (1 + __builtin_exp(gate(first + i))) / kGateScale);
      *at<T>(op_.dgate, first + i, head_) = T(after + dkept) * slope;
    }
  }

  void backward_tile(int64_t first, int64_t i, int64_t rows) {
    const int64_t ld = at_.ld, ldv = at_.ldv, ldc = at_.ldc, n = op_.chunk;
    load_queries(first, i, rows);
    load_rows<T>(at<S>(op_.dout, first + i, head_), op_.dout.time, rows, op_.width_v, T(1), at_.dout, ldv);
    gemm<T>(rows, n, op_.width_v, at_.dout, ldv, 1, at_.vt, ldc, at_.ds, ldc, false);
    gemm<T>(rows, op_.width, op_.width_v, at_.dout, ldv, 1, at_.st, ld, at_.cross, ld, false);
    for (int64_t r = 0; r < rows; ++r) {
      T *p = at_.p + r * ldc, *ds = at_.ds + r * ldc;
      exponentials(p, *lse(first + i + r));
      const T delta = dot(p, ds, n);
      each_vector<T>(
          n, [&](int64_t c, int, auto part) { store(ds + c, load(p + c, part) * (load(ds + c, part) - delta), part); });
    }
    gemm<T>(n, op_.width_v, rows, at_.p, 1, ldc, at_.dout, ldv, at_.dv, ldv, true);
    gemm<T>(n, op_.width, rows, at_.ds, 1, ldc, at_.q, ld, at_.dk, ld, true);
    gemm<T>(rows, op_.width, n, at_.ds, ldc, 1, at_.k, ld, at_.dq, ld, false);
    for (int64_t r = 0; r < rows; ++r) {
      T *q = at_.q + r * ld, *dq = at_.dq + r * ld, *cross = at_.cross + r * ld;
      const T decay = at_.decay[i + r];
      at_.along[i + r] = decay * dot(q, cross, op_.width);
      each_vector<T>(op_.width, [&](int64_t c, int, auto part) {
        store(dq + c, load(dq + c, part) + decay * load(cross + c, part), part);
        store(q + c, load(q + c, part) * decay, part);
      });
    }
    store_rows<S, T>(at_.dq, ld, rows, op_.width, 1, at<S>(op_.dq, first + i, head_), op_.dq.time);
    gemm<T>(op_.width, op_.width_v, rows, at_.q, 1, ld, at_.dout, ldv, at_.dstate, ldv, true);
  }

  const ChunkHybridAttention& op_;
  const int64_t row_, head_, head_kv_;
  const Scratch<T>& at_;
  const T scale_;
};

template <typename S>
void run(const ChunkHybridAttention& op, bool backward, int64_t begin, int64_t end, void* memory) {
  const Scratch<Compute<S>> scratch(op, backward, memory);
  for (int64_t i = begin; i < end; ++i) {
    Item<S> item(op, i / op.heads, i % op.heads, scratch);
    backward ? item.backward() : item.forward();
  }
}

}  // namespace

int64_t chunk_hybrid_attention_scratch(const ChunkHybridAttention& op, bool backward) {
  return FA_DISPATCH_STORAGE(op, Scratch<Compute<S>>(op, backward, nullptr).bytes);
}

void chunk_hybrid_attention_run(const ChunkHybridAttention& op, bool backward, int64_t begin, int64_t end,
                                void* scratch) {
  FA_DISPATCH_STORAGE(op, run<S>(op, backward, begin, end, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
