// Forward of varlen_attention: one item is one tile of query rows of one head, online softmax over key tiles.
#include "cpu/attention_tile.h"
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
  int64_t bytes;

  ForwardScratch(const VarlenAttention& op, void* base)
      : ldq(padded(op.width)), ldk(padded(op.max_keys)), ldv(padded(op.width_v)) {
    ScratchCursor<T> cursor(base);
    q = cursor.take(op.max_rows * ldq);
    kt = cursor.take(op.width * ldk);
    v = cursor.take(op.max_keys * ldv);
    scores = cursor.take(op.max_rows * ldk);
    out = cursor.take(op.max_rows * ldv);
    top = cursor.take(op.max_rows);
    total = cursor.take(op.max_rows);
    bytes = cursor.bytes();
  }
};

// Turns one row of n scores into exp(score - maximum so far); returns the factor for what was summed before.
template <typename T>
inline T softmax_row(T* scores, int64_t n, T& top, T& total) {
  constexpr int W = kLanes<T>;
  Vec<T> largest = load(scores);
  for (int64_t j = W; j < n; j += W) {
    Vec<T> x = load(scores + j);
    largest = largest > x ? largest : x;
  }
  T new_top = reduce_max<T>(largest);
  new_top = top > new_top ? top : new_top;
  T base = new_top == kMinusInfinity<T> ? 0 : new_top;  // a row that has seen no key yet
  Vec<T> sum = {};
  for (int64_t j = 0; j < n; j += W) {
    Vec<T> x = exp(load(scores + j) - base);
    store(scores + j, x);
    sum += x;
  }
  T keep = top == new_top ? 1 : exp(splat(top - base))[0];
  total = total * keep + reduce_sum<T>(sum);
  top = new_top;
  return keep;
}

template <typename T>
inline void scale_row(T* row, int64_t n, T factor) {
  for (int64_t j = 0; j < n; j += kLanes<T>) store(row + j, load(row + j) * factor);
}

template <typename S, typename T = Compute<S>>
void forward_tile(const VarlenAttention& op, const VarlenTask& task, int64_t head, const ForwardScratch<T>& at) {
  const Sequence sequence(op, task.sequence);
  const int64_t rows = task.q_end - task.q_begin, row0 = sequence.q0 + task.q_begin;
  const int64_t head_kv = head / (op.heads / op.heads_kv);
  load_rows<T>(row_of<S>(op.q, row0, head), op.q.row, rows, op.width, T(op.scale), at.q, at.ldq);
  for (int64_t r = 0; r < rows; ++r) at.top[r] = kMinusInfinity<T>, at.total[r] = 0;

  const KeyRange keys = sequence.tile_keys(task.q_begin, task.q_end);
  for (int64_t first = keys.begin; first < keys.end; first += kKeyTile) {
    const int64_t n = min(kKeyTile, keys.end - first);
    pack_transposed<T>(row_of<S>(op.k, sequence.k0 + first, head_kv), op.k.row, n, op.width, at.kt, at.ldk);
    load_rows<T>(row_of<S>(op.v, sequence.k0 + first, head_kv), op.v.row, n, op.width_v, T(1), at.v, at.ldv);
    gemm<T>(rows, n, op.width, at.q, at.ldq, 1, at.kt, at.ldk, at.scores, at.ldk, false);
    for (int64_t r = 0; r < rows; ++r) {
      T* scores = at.scores + r * at.ldk;
      hide_keys(scores, first, n, sequence.row_keys(task.q_begin + r));
      T keep = softmax_row(scores, n, at.top[r], at.total[r]);
      if (first != keys.begin && keep != 1) scale_row(at.out + r * at.ldv, op.width_v, keep);
    }
    gemm<T>(rows, op.width_v, n, at.scores, at.ldk, 1, at.v, at.ldv, at.out, at.ldv, first != keys.begin);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = at.total[r] == 0;
    T* out = at.out + r * at.ldv;
    if (empty) __builtin_memset(out, 0, op.width_v * sizeof(T));
    store_rows<S, T>(out, at.ldv, 1, op.width_v, empty ? 0 : 1 / at.total[r], row_of<S>(op.out, row0 + r, head), 0);
    value_of<T>(op.lse, head, row0 + r) = empty ? kMinusInfinity<T> : at.top[r] + log(at.total[r]);
  }
}

template <typename S>
void forward(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end, void* memory) {
  const ForwardScratch<Compute<S>> scratch(op, memory);
  for (int64_t item = begin; item < end; ++item) {
    forward_tile<S>(op, tasks[item / op.heads], item % op.heads, scratch);
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
