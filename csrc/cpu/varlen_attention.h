// What csrc/cpu/varlen_attention.cpp hands to its kernels. Plain data only: kernels are compiled per instruction set.
#pragma once

#include <cstdint>

#include "cpu/storage.h"

namespace flowattn {

// Query rows and keys of one tile of scores. 64 keys of width 64 fill a third of L1; 256 rows halve the cost of packing
// them against 128, and two score tiles still fit an L2 of 512 KiB.
constexpr int64_t kQueryTile = 256;
constexpr int64_t kKeyTile = 64;

// (T, heads, width) with a contiguous last dim; strides in elements.
struct PackedRows {
  void* data;
  int64_t row, head;
};

// (heads, T) in the compute type.
struct RowValues {
  void* data;  // nullptr: absent
  int64_t head, row;
};

// A rectangle of one sequence's scores, for every head: query rows and keys counted from the start of the sequence.
struct VarlenTask {
  int64_t sequence;
  int64_t q_begin, q_end, k_begin, k_end;
  int64_t first_tile;  // number of the sequence's first query tile among those of all sequences
  int64_t group;       // the partial sum of position-table gradients it adds to
};

// (1 or B, 1 or H, rows, keys) with any strides, in elements; a dim of size 1 is broadcast and has stride 0.
struct DenseBias {
  Storage storage;
  const void* data;  // nullptr: absent
  int64_t batch, head, row, key;
};

// The tables of a disentangled bias, (rows, heads, width) contiguous in the compute type.
struct PositionTables {
  const void *keys, *queries;  // nullptr: absent
  int64_t rows;                // 0: no such bias
  int64_t step;                // most that the row changes from one distance to the next
};

// What happens to a score between scale * q . k and the softmax, and to a probability after it.
struct ScoreOptions {
  double softcap;       // 0: none
  const float* slopes;  // ALiBi; nullptr: none
  int64_t slope_batch, slope_head;
  DenseBias bias;
  const void* table;  // (buckets, heads) in the compute type; nullptr: none
  int64_t table_row, table_head, buckets;
  PositionTables positions;
  const int32_t* lut;  // (2 * reach + 1,), the bucket, or row of the position tables, of each distance -reach..reach
  int64_t reach;
  bool modified;  // any of the above
  bool dropout;
  uint32_t threshold, offset, seed_low, seed_high;
  double kept;  // 1 / (1 - p), the factor of a kept probability
};

// Rotary position tables (rows, pairs) and their transposes, in the compute type.
struct Rotation {
  const void *cos, *sin, *cos_columns, *sin_columns;
  int64_t rows, pairs;       // pairs 0: none
  int64_t q_first, k_first;  // table row of the first query and of the first key
  bool interleaved;          // channel pairs (2c, 2c + 1) instead of (c, c + pairs)
};

struct VarlenAttention {
  Storage storage;
  int64_t heads, heads_kv, width, width_v;
  const int32_t *cu_q, *cu_k;
  double scale;
  int64_t left, right;  // -1 = unbounded
  bool top_left;
  int64_t shift;  // added to that of the mask: -1 hides the diagonal of a causal one
  Rotation rotation;
  PackedRows q, k, v, out;
  RowValues lse;
  int64_t max_rows, max_keys;  // of one task's tiles; they size the scratch memory
  int64_t max_span;            // most distances between the rows of a query tile and the keys of its task
  ScoreOptions scores;

  // Backward only.
  PackedRows dout, dq, dk, dv;
  RowValues dlse;
  bool want_dq, want_dkv;
  int64_t key_slots;  // key tiles kept packed at a time: all of a task's, or 1
  void* dbias;        // contiguous, in the compute type; nullptr: not in this pass
  int64_t dbias_batch, dbias_head, dbias_row;
  void* dtable;  // (query tiles of all sequences, heads, buckets) in the compute type; nullptr: not in this pass
  void *dposition_keys, *dposition_queries;  // (groups, heads, rows, width) in the compute type; nullptr: not wanted
};

// Tasks of which one item does all of a group: group g holds tasks begin[g]..begin[g + 1].
struct TaskGroups {
  const VarlenTask* tasks;
  const int64_t* begin;
};

// The gradient of a bias that several sequences or heads share. Item i owns the query rows of group i / bias_heads, for
// head i % bias_heads of the bias; it sums over the group's tasks and over the heads that share the bias, in order.
struct SharedBias {
  TaskGroups groups;
  int64_t bias_heads;
};

}  // namespace flowattn

// Each runs items begin..end. Forward item i is head i % heads of task i / heads; backward item i is key/value head
// i % heads_kv of task i / heads_kv. The *_scratch functions give the bytes of memory one thread needs.
FA_ISA_DECLARE(int64_t varlen_attention_fwd_scratch(const VarlenAttention& op))
FA_ISA_DECLARE(int64_t varlen_attention_bwd_scratch(const VarlenAttention& op))
FA_ISA_DECLARE(void varlen_attention_fwd(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end,
                                         void* scratch))
FA_ISA_DECLARE(void varlen_attention_bwd(const VarlenAttention& op, const VarlenTask* tasks, int64_t begin, int64_t end,
                                         void* scratch))
FA_ISA_DECLARE(void varlen_attention_bwd_groups(const VarlenAttention& op, const TaskGroups& groups, int64_t begin,
                                                int64_t end, void* scratch))
FA_ISA_DECLARE(void varlen_attention_bwd_shared_bias(const VarlenAttention& op, const SharedBias& bias, int64_t begin,
                                                     int64_t end, void* scratch))
