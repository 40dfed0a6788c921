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
};

struct VarlenAttention {
  Storage storage;
  int64_t heads, heads_kv, width, width_v;
  const int32_t *cu_q, *cu_k;
  double scale;
  int64_t left, right;  // -1 = unbounded
  bool top_left;
  PackedRows q, k, v, out;
  RowValues lse;
  int64_t max_rows, max_keys;  // of one task's tiles; they size the scratch memory

  // Backward only.
  PackedRows dout, dq, dk, dv;
  RowValues dlse;
  bool want_dq, want_dkv;
  int64_t key_slots;  // key tiles kept packed at a time: all of a task's, or 1
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
