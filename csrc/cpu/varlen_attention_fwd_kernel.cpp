// Forward of varlen_attention: one item is one tile of query rows of one head, online softmax over key tiles.
#include "cpu/attention_tile.h"
#include "cpu/rotation.h"
#include "cpu/score_modification.h"
#include "cpu/varlen_attention.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename T>
struct ForwardScratch {
  int64_t ldq, ldk, ldv;
  T* q;       // (rows, ldq), times scale
  T* kt;      // (width, ldk), keys transposed
  T* v;       // (keys, ldv)
  T* scores;  // (rows, ldk)
  T* out;     // (rows, ldv), not yet divided by total
  T* top;     // (rows,) running maximum
  T* total;   // (rows,) running sum of exp(score - top)
  ScratchCursor<T> cursor;
  ScoreScratch<T> modification;
  int64_t bytes;

  ForwardScratch(const VarlenAttention& op, void* base)
      : ldq(padded(op.width)),
        ldk(padded(op.max_keys)),
        ldv(padded(op.width_v)),
        cursor(base),
        modification(op, cursor) {
    q = cursor.take(op.max_rows * ldq);
    kt = cursor.take(op.width * ldk);
    v = cursor.take(op.max_keys * ldv);
    scores = cursor.take(op.max_rows * ldk);
    out = cursor.take(op.max_rows * ldv);
    top = cursor.take(padded(op.max_rows) + kRowPad);  // whole vectors are read from any row on
    total = cursor.take(padded(op.max_rows) + kRowPad);
    bytes = cursor.bytes();
  }
};

// Turns `count` rows of n scores, at most one for each lane, into exp(score - maximum so far) and updates the running
// maximum and sum; what was summed before in `out` is scaled to the new maximum.
template <typename T>
inline void softmax_rows(T* scores, int64_t ldk, int64_t count, int64_t n, T* top, T* total, T* out, int64_t ldv) {
  constexpr int W = kLanes<T>;
  Vec<T> rows[W];  // one register a row, so that all rows are reduced together
  for (int64_t r = 0; r < W; ++r) rows[r] = splat(kMinusInfinity<T>);
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = load(scores + r * ldk);
    for (int64_t j = W; j < n; j += W) {
      Vec<T> x = load(scores + r * ldk + j);
      rows[r] = rows[r] > x ? rows[r] : x;
    }
  }
  const Vec<T> old_top = load(top), row_top = max_of_rows<T>(rows);
  const Vec<T> new_top = old_top > row_top ? old_top : row_top;
  const Vec<T> base = new_top == kMinusInfinity<T> ? Vec<T>{} : new_top;  // rows that have seen no key yet
  const Vec<T> keep = exp(old_top - base);
  for (int64_t r = 0; r < W; ++r) rows[r] = Vec<T>{};
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> sum = {};
    for (int64_t j = 0; j < n; j += W) {
      Vec<T> x = exp(load(scores + r * ldk + j) - base[r]);
      store(scores + r * ldk + j, x);
      sum += x;
    }
    rows[r] = sum;
  }
  store(top, new_top);
  store(total, load(total) * keep + sum_of_rows<T>(rows));
  for (int64_t r = 0; r < count && out; ++r) {
    for (int64_t j = 0; j < ldv && keep[r] != 1; j += W) store(out + r * ldv + j, load(out + r * ldv + j) * keep[r]);
  }
}

template <typename S, typename T = Compute<S>>
void forward_tile(const VarlenAttention& op, const VarlenTask& task, int64_t head, const ForwardScratch<T>& at) {
  const Sequence sequence(op, task.sequence);
  const int64_t rows = task.q_end - task.q_begin, row0 = sequence.q0 + task.q_begin;
  const int64_t head_kv = head / (op.heads / op.heads_kv);
  load_rows<T>(row_of<S>(op.q, row0, head), op.q.row, rows, op.width, T(op.scale), at.q, at.ldq);
  if (op.rotation.pairs) rotate_rows(op.rotation, op.rotation.q_first + task.q_begin, rows, at.q, at.ldq, false);
  for (int64_t r = 0; r < padded(rows); ++r) at.top[r] = kMinusInfinity<T>, at.total[r] = 0;

  const KeyRange keys = sequence.tile_keys(task.q_begin, task.q_end);
  ScoreModification<T> modification(op, at.modification, sequence, task);
  modification.begin(head, task.q_begin, rows, keys, at.q, at.ldq);
  const bool one_tile = keys.end - keys.begin <= kKeyTile;
  if (!one_tile) __builtin_memset(at.out, 0, rows * at.ldv * sizeof(T));
  for (int64_t first = keys.begin; first < keys.end; first += kKeyTile) {
    const int64_t n = min(kKeyTile, keys.end - first);
    const RowRange seeing = seeing_rows(sequence, task.q_begin, rows, {first, first + n});
    const int64_t count = seeing.end - seeing.begin;
    const T* q = at.q + seeing.begin * at.ldq;
    T* out = at.out + seeing.begin * at.ldv;
    pack_transposed<T>(row_of<S>(op.k, sequence.k0 + first, head_kv), op.k.row, n, op.width, at.kt, at.ldk);
    if (op.rotation.pairs) rotate_columns(op.rotation, op.rotation.k_first + first, n, at.kt, at.ldk);
    load_rows<T>(row_of<S>(op.v, sequence.k0 + first, head_kv), op.v.row, n, op.width_v, T(1), at.v, at.ldv);
    gemm<T>(count, n, op.width, q, at.ldq, 1, at.kt, at.ldk, at.scores, at.ldk, false);
    modification.begin_keys(seeing, {first, first + n}, at.kt, at.ldk);
    const int64_t row = task.q_begin + seeing.begin;
    for (int64_t r = 0; r < count && op.scores.modified; ++r) {
      modification.modify(at.scores + r * at.ldk, row + r, {first, first + n});
    }
    for (int64_t r = 0; r < count; ++r) hide_keys(at.scores + r * at.ldk, first, n, sequence.row_keys(row + r));
    for (int64_t r = 0; r < count; r += kLanes<T>) {
      softmax_rows<T>(at.scores + r * at.ldk, at.ldk, min(kLanes<T>, count - r), n, at.top + seeing.begin + r,
                      at.total + seeing.begin + r, one_tile ? nullptr : out + r * at.ldv, at.ldv);
    }
    for (int64_t r = 0; r < count && op.scores.dropout; ++r) {  // after the sums: the LSE knows nothing of dropout
      multiply_row(at.scores + r * at.ldk, modification.keep(row + r, {first, first + n}), n);
    }
    gemm<T>(count, op.width_v, n, at.scores, at.ldk, 1, at.v, at.ldv, out, at.ldv, !one_tile);
  }

  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    const Vec<T> total = load(at.total + r);
    const Vec<T> hidden = splat(kMinusInfinity<T>);
    store(at.top + r, total == 0 ? hidden : load(at.top + r) + log(total));
    store(at.total + r, total == 0 ? Vec<T>{} : 1 / total);
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* out = at.out + r * at.ldv;
    if (at.total[r] == 0) __builtin_memset(out, 0, op.width_v * sizeof(T));
    store_rows<S, T>(out, at.ldv, 1, op.width_v, at.total[r], row_of<S>(op.out, row0 + r, head), 0);
    value_of<T>(op.lse, head, row0 + r) = at.top[r];
  }
}

template <typename S>
void forward(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end, void* memory) {
  const ForwardScratch<Compute<S>> scratch(op, memory);
  for (int64_t item = begin; item < end; ++item) {
    const VarlenTask& task = tasks[item / op.heads];
    if (task.q_begin < task.q_end) forward_tile<S>(op, task, item % op.heads, scratch);
  }
}

}  // namespace

int64_t varlen_attention_fwd_scratch(const VarlenAttention& op) {
  return FA_DISPATCH_STORAGE(op, ForwardScratch<Compute<S>>(op, nullptr).bytes);
}

void varlen_attention_fwd(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end,
                          void* scratch) {
  FA_DISPATCH_STORAGE(op, forward<S>(op, tasks, begin, end, scratch));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
