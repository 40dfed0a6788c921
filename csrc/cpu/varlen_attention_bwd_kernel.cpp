// Backward of varlen_attention: one item is one task rectangle of one key/value head, for every query head that reads
// it.
//
// A task either covers a whole sequence and yields dq, dk and dv, or a row of tiles and yields dq, or a column of tiles
// and yields dk and dv. Tiles are the same and are summed in the same order in all three, so the bits are too.
#include "cpu/attention_tile.h"
#include "cpu/rotation.h"
#include "cpu/score_modification.h"
#include "cpu/varlen_attention.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

// What is kept of one key tile.
template <typename T>
struct KeySlot {
  T* k;   // (keys, ldq)
  T* kt;  // (width, ldk)
  T* vt;  // (width_v, ldk)
  T* dk;  // (keys, ldq)
  T* dv;  // (keys, ldv)
};

template <typename T>
struct BackwardScratch {
  int64_t ldq, ldk, ldv, slot_size;
  T* q;      // (rows, ldq), times scale
  T* dout;   // (rows, ldv), 0 in rows that see no key
  T* dq;     // (rows, ldq), to be multiplied by scale
  T* p;      // (rows, ldk) scores, then probabilities
  T* ds;     // (rows, ldk) gradients of the probabilities, then of the scores
  T* lse;    // (rows,), +inf in rows that see no key, so that exp(score - lse) = 0
  T* delta;  // (rows,) rowsum(dout * out) - dlse
  T* slots;
  ScratchCursor<T> cursor;
  ScoreScratch<T> modification;
  int64_t bytes;

  BackwardScratch(const VarlenAttention& op, void* base)
      : ldq(padded(op.width)),
        ldk(padded(op.max_keys)),
        ldv(padded(op.width_v)),
        cursor(base),
        modification(op, cursor) {
    q = cursor.take(op.max_rows * ldq);
    dout = cursor.take(op.max_rows * ldv);
    dq = cursor.take(op.max_rows * ldq);
    p = cursor.take(op.max_rows * ldk);
    ds = cursor.take(op.max_rows * ldk);
    lse = cursor.take(op.max_rows);
    delta = cursor.take(op.max_rows);
    slot_size = op.max_keys * (2 * ldq + ldv) + (op.width + op.width_v) * ldk;
    slots = cursor.take(op.key_slots * slot_size);
    bytes = cursor.bytes();
  }

  KeySlot<T> slot(const VarlenAttention& op, int64_t index) const {
    T* k = slots + index * slot_size;
    T* kt = k + op.max_keys * ldq;
    T* vt = kt + op.width * ldk;
    T* dk = vt + op.width_v * ldk;
    return {k, kt, vt, dk, dk + op.max_keys * ldq};
  }
};

template <typename T>
inline void clear(T* rows, int64_t count) {
  __builtin_memset(rows, 0, count * sizeof(T));
}

// The sum over one row of dout * out.
template <typename T, typename S>
inline T dot_row(const T* a, const S* b, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> sum = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) sum += load(a + j) * load(b + j);
  if (j < n) sum += load_tail(a + j, int(n - j)) * load_tail(b + j, int(n - j));
  return reduce_sum<T>(sum);
}

// Whether one key tile holds all keys of a row. Then delta is the sum of probability * dprobability over that tile: it
// cancels better than dout . out where few keys are seen, and `out` is not read.
inline bool in_one_tile(KeyRange keys) { return keys.begin / kKeyTile == (keys.end - 1) / kKeyTile; }

template <typename S, typename T = Compute<S>>
class BackwardItem {
 public:
  BackwardItem(const VarlenAttention& op, const VarlenTask& task, int64_t head_kv, const BackwardScratch<T>& scratch)
      : op_(op),
        task_(task),
        head_kv_(head_kv),
        at_(scratch),
        sequence_(op, task.sequence),
        modification_(op, scratch.modification, sequence_, task) {}

  void run() {
    const bool keep = op_.key_slots > 1 || task_.k_end - task_.k_begin <= kKeyTile;
    for (int64_t first = task_.k_begin; keep && first < task_.k_end; first += kKeyTile) pack_keys(first);
    const int64_t group = op_.heads / op_.heads_kv;
    for (int64_t head = head_kv_ * group; head < (head_kv_ + 1) * group; ++head) {
      for (int64_t row = task_.q_begin; row < task_.q_end; row += kQueryTile) query_tile(head, row, keep);
    }
    for (int64_t first = task_.k_begin; op_.want_dkv && first < task_.k_end; first += kKeyTile) store_keys(first);
  }

  // The task's gradient of the bias alone, for one query head.
  void run_bias(int64_t head) {
    for (int64_t row = task_.q_begin; row < task_.q_end; row += kQueryTile) query_tile(head, row, false);
  }

 private:
  int64_t tile_keys(int64_t first) const { return min(kKeyTile, task_.k_end - first); }
  KeySlot<T> slot(int64_t first) const {
    return at_.slot(op_, op_.key_slots > 1 ? (first - task_.k_begin) / kKeyTile : 0);
  }

  void pack_keys(int64_t first) {
    const KeySlot<T> slot = this->slot(first);
    const int64_t n = tile_keys(first), row = sequence_.k0 + first;
    const S* k = row_of<S>(op_.k, row, head_kv_);
    pack_transposed<T>(k, op_.k.row, n, op_.width, slot.kt, at_.ldk);
    pack_transposed<T>(row_of<S>(op_.v, row, head_kv_), op_.v.row, n, op_.width_v, slot.vt, at_.ldk);
    if (op_.want_dq) load_rows<T>(k, op_.k.row, n, op_.width, T(1), slot.k, at_.ldq);
    if (rotation_.pairs) rotate_columns(rotation_, rotation_.k_first + first, n, slot.kt, at_.ldk);
    if (rotation_.pairs && op_.want_dq) rotate_rows(rotation_, rotation_.k_first + first, n, slot.k, at_.ldq, false);
    if (op_.want_dkv) clear(slot.dk, n * at_.ldq), clear(slot.dv, n * at_.ldv);
  }

  void store_keys(int64_t first) {
    const KeySlot<T> slot = this->slot(first);
    const int64_t n = tile_keys(first), row = sequence_.k0 + first;
    if (rotation_.pairs) rotate_rows(rotation_, rotation_.k_first + first, n, slot.dk, at_.ldq, true);
    store_rows<S, T>(slot.dk, at_.ldq, n, op_.width, 1, row_of<S>(op_.dk, row, head_kv_), op_.dk.row);
    store_rows<S, T>(slot.dv, at_.ldv, n, op_.width_v, 1, row_of<S>(op_.dv, row, head_kv_), op_.dv.row);
  }

  void load_queries(int64_t head, int64_t row0, int64_t rows) {
    load_rows<T>(row_of<S>(op_.q, row0, head), op_.q.row, rows, op_.width, T(op_.scale), at_.q, at_.ldq);
    if (rotation_.pairs) {
      rotate_rows(rotation_, rotation_.q_first + row0 - sequence_.q0, rows, at_.q, at_.ldq, false);
    }
    load_rows<T>(row_of<S>(op_.dout, row0, head), op_.dout.row, rows, op_.width_v, T(1), at_.dout, at_.ldv);
    if (op_.want_dq) clear(at_.dq, rows * at_.ldq);
    for (int64_t r = 0; r < rows; ++r) {
      T* dout = at_.dout + r * at_.ldv;
      at_.delta[r] = 0;
      at_.lse[r] = value_of<T>(op_.lse, head, row0 + r);
      if (at_.lse[r] == kMinusInfinity<T>) {
        at_.lse[r] = -kMinusInfinity<T>;
        clear(dout, op_.width_v);
        continue;
      }
      if (!in_one_tile(sequence_.row_keys(row0 - sequence_.q0 + r))) {
        at_.delta[r] = dot_row<T>(dout, row_of<S>(op_.out, row0 + r, head), op_.width_v);
      }
      if (op_.dlse.data) at_.delta[r] -= value_of<T>(op_.dlse, head, row0 + r);
    }
  }

  void query_tile(int64_t head, int64_t row, bool keep) {
    const int64_t rows = min(kQueryTile, task_.q_end - row), row0 = sequence_.q0 + row;
    const KeyRange seen = intersect(sequence_.tile_keys(row, row + rows), {task_.k_begin, task_.k_end});
    if (seen.begin < seen.end || op_.want_dq) load_queries(head, row0, rows);
    modification_.begin(head, row, rows, seen, at_.q, at_.ldq);
    for (int64_t first = seen.begin / kKeyTile * kKeyTile; first < seen.end; first += kKeyTile) {
      if (!keep) pack_keys(first);
      score_tile(row, rows, first, intersect(seen, {first, first + kKeyTile}));
    }
    modification_.end(task_.first_tile + row / kQueryTile, at_.dq);
    if (op_.want_dq) {
      if (rotation_.pairs) rotate_rows(rotation_, rotation_.q_first + row, rows, at_.dq, at_.ldq, true);
      store_rows<S, T>(at_.dq, at_.ldq, rows, op_.width, T(op_.scale), row_of<S>(op_.dq, row0, head), op_.dq.row);
    }
  }

  // Row r of the tile at query row `row`: scores and gradients of the probabilities become probabilities and gradients
  // of scale * q . k; under dropout the probabilities that multiply the values.
  void softmax_gradient_row(T* p, T* ds, KeyRange keys, int64_t row, int64_t r) {
    constexpr int W = kLanes<T>;
    const int64_t n = keys.end - keys.begin;
    const KeyRange seen = sequence_.row_keys(row + r);
    if (op_.scores.modified) modification_.modify(p, row + r, keys);
    hide_keys(p, keys.begin, n, seen);
    const T* keep = op_.scores.dropout ? modification_.keep(row + r, keys) : nullptr;
    if (keep) multiply_row(ds, keep, n);
    const T lse = at_.lse[r];
    Vec<T> sum = {};
    for (int64_t j = 0; j < n; j += W) {
      Vec<T> x = exp(load(p + j) - lse);
      store(p + j, x);
      sum += j + W <= n ? x * load(ds + j) : x * load_tail(ds + j, int(n - j));
    }
    const T delta = at_.delta[r] + (in_one_tile(seen) ? reduce_sum<T>(sum) : 0);
    for (int64_t j = 0; j < n; j += W) store(ds + j, load(p + j) * (load(ds + j) - delta));
    if (keep) multiply_row(p, keep, n);
    if (op_.scores.modified) modification_.gradient(ds, row + r, keys);
  }

  // Adds the gradients of rows row..row+rows and of `keys`, a part of the key tile that starts at `first`.
  void score_tile(int64_t row, int64_t rows, int64_t first, KeyRange keys) {
    const KeySlot<T> slot = this->slot(first);
    const RowRange seeing = seeing_rows(sequence_, row, rows, keys);
    const int64_t count = seeing.end - seeing.begin, n = keys.end - keys.begin, skip = keys.begin - first;
    const int64_t ldq = at_.ldq, ldk = at_.ldk, ldv = at_.ldv;
    const T *q = at_.q + seeing.begin * ldq, *dout = at_.dout + seeing.begin * ldv;
    gemm<T>(count, n, op_.width, q, ldq, 1, slot.kt + skip, ldk, at_.p, ldk, false);
    gemm<T>(count, n, op_.width_v, dout, ldv, 1, slot.vt + skip, ldk, at_.ds, ldk, false);
    modification_.begin_keys(seeing, keys, slot.kt + skip, ldk);
    for (int64_t r = 0; r < count; ++r) {
      softmax_gradient_row(at_.p + r * ldk, at_.ds + r * ldk, keys, row, seeing.begin + r);
    }
    modification_.end_keys(seeing, slot.k + skip * ldq, slot.dk + skip * ldq, ldq);
    if (op_.want_dkv) {
      gemm<T>(n, op_.width_v, count, at_.p, 1, ldk, dout, ldv, slot.dv + skip * ldv, ldv, true);
      gemm<T>(n, op_.width, count, at_.ds, 1, ldk, q, ldq, slot.dk + skip * ldq, ldq, true);
    }
    if (op_.want_dq) {
      gemm<T>(count, op_.width, n, at_.ds, ldk, 1, slot.k + skip * ldq, ldq, at_.dq + seeing.begin * ldq, ldq, true);
    }
  }

  const VarlenAttention& op_;
  const Rotation& rotation_ = op_.rotation;
  const VarlenTask& task_;
  const int64_t head_kv_;
  const BackwardScratch<T>& at_;
  const Sequence sequence_;
  ScoreModification<T> modification_;
};

template <typename S>
void backward(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end, void* memory) {
  const BackwardScratch<Compute<S>> scratch(op, memory);
  for (int64_t item = begin; item < end; ++item) {
    BackwardItem<S>(op, tasks[item / op.heads_kv], item % op.heads_kv, scratch).run();
  }
}

template <typename S>
void backward_groups(const VarlenAttention& op, const TaskGroups& groups, int64_t begin, int64_t end, void* memory) {
  using T = Compute<S>;
  const BackwardScratch<T> scratch(op, memory);
  const int64_t part =
      op.heads / op.heads_kv * op.scores.positions.rows * op.width;  // of an item: its heads are its own
  for (int64_t item = begin; item < end; ++item) {
    for (void* sums : {op.dposition_keys, op.dposition_queries}) {
      if (sums) clear(static_cast<T*>(sums) + item * part, part);
    }
    const int64_t g = item / op.heads_kv;
    for (int64_t t = groups.begin[g]; t < groups.begin[g + 1]; ++t) {
      BackwardItem<S>(op, groups.tasks[t], item % op.heads_kv, scratch).run();
    }
  }
}

template <typename S>
void shared_bias(const VarlenAttention& op, const SharedBias& bias, int64_t begin, int64_t end, void* memory) {
  const BackwardScratch<Compute<S>> scratch(op, memory);
  const int64_t group = op.heads / op.heads_kv, sharing = op.heads / bias.bias_heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item / bias.bias_heads, first_head = item % bias.bias_heads * sharing;
    for (int64_t t = bias.groups.begin[g]; t < bias.groups.begin[g + 1]; ++t) {
      for (int64_t head = first_head; head < first_head + sharing; ++head) {
        BackwardItem<S>(op, bias.groups.tasks[t], head / group, scratch).run_bias(head);
      }
    }
  }
}

}  // namespace

int64_t varlen_attention_bwd_scratch(const VarlenAttention& op) {
  return FA_DISPATCH_STORAGE(op, BackwardScratch<Compute<S>>(op, nullptr).bytes);
}

void varlen_attention_bwd(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end,
                          void* scratch) {
  FA_DISPATCH_STORAGE(op, backward<S>(op, tasks, begin, end, scratch));
}

void varlen_attention_bwd_groups(const VarlenAttention& op, const TaskGroups& groups, int64_t begin, int64_t end,
                                 void* scratch) {
  FA_DISPATCH_STORAGE(op, backward_groups<S>(op, groups, begin, end, scratch));
}

void varlen_attention_bwd_shared_bias(const VarlenAttention& op, const SharedBias& bias, int64_t begin, int64_t end,
                                      void* scratch) {
  FA_DISPATCH_STORAGE(op, shared_bias<S>(op, bias, begin, end, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
