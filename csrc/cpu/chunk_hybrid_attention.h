// What csrc/cpu/chunk_hybrid_attention.cpp hands to its kernel. Plain data only: kernels are compiled per instruction
// set.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

struct ChunkHybridAttention {
  Storage storage;
  int64_t tokens, heads, group, width, width_v, chunk;  // `group` query heads read one key/value head
  ScanTensor q, k, v, o;
  ScanTensor gate;  // (B, T, H), compute type
  // Contiguous, compute type: lse (B, H, T), states (B, H, width, width_v); nullptr: absent.
  void *lse, *initial, *final;

  // Backward only. dk and dv have a row for every query head.
  ScanTensor dout, dq, dk, dv, dgate;
  void *dfinal, *dinitial;
};

}  // namespace flowattn

// Runs items begin..end; item i is head i % heads of row i / heads. The other gives the bytes of memory one thread
// needs.
FA_ISA_DECLARE(int64_t chunk_hybrid_attention_scratch(const ChunkHybridAttention& op, bool backward))
FA_ISA_DECLARE(void chunk_hybrid_attention_run(const ChunkHybridAttention& op, bool backward, int64_t begin,
                                               int64_t end, void* scratch))
