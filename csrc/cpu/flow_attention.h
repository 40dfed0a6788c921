// What csrc/cpu/flow_attention.cpp hands to its kernels. Plain data only: kernels are compiled per instruction set.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

// Tokens whose partial sums, and whose products, are taken together. Sums over more of them are kept in double.
constexpr int64_t kFlowChunk = 64;

// Which tokens take part: (rows, T), bool.
struct FlowMask {
  const bool* data;  // nullptr: all
  int64_t row, time;
};

// (planes, rows, heads, T) scalars in the compute type, contiguous.
struct FlowScalars {
  void* data;
  int64_t plane, row, head;
};

// One sequence: its row of the tensors, first token, lengths, and row of the states.
struct FlowTask {
  int64_t row, first, sinks, sources, state;
};

// Contiguous states in the compute type: sums (states, heads, 4, width) of k, q, b k and a q; total (states, heads);
// state (states, heads, width, width_v).
struct FlowStates {
  void *sums, *total, *state;  // nullptr: absent
};

struct FlowAttention {
  Storage storage;
  int64_t heads, group, width, width_v;  // `group` query heads read one key/value head
  int64_t most_sinks, most_sources;      // of one task; they size the scratch memory
  bool relu;
  double clamp, eps, extra;
  ScanTensor q, k, v, y;
  FlowMask key_mask, query_mask;  // the causal form has the first alone

  // Whole: I and J of the sinks, O and P of the sources. `saved.total` is the log of the softmax's denominator.
  FlowScalars flows_q, flows_k;
  FlowStates saved;

  // Causal: I, O, J, P and the running sum of x.
  FlowScalars flows;
  const int64_t* count;
  FlowStates initial, final;

  // Backward only. dk and dv have a row for every query head.
  ScanTensor dy, dq, dk, dv;
  FlowStates dfinal, dinitial;
};

}  // namespace flowattn

// Each runs items begin..end; item i is head i % heads of task i / heads. The *_scratch functions give the bytes of
// memory one thread needs.
FA_ISA_DECLARE(int64_t flow_attention_scratch(const FlowAttention& op, bool backward))
FA_ISA_DECLARE(void flow_attention_run(const FlowAttention& op, bool backward, const FlowTask* tasks, int64_t begin,
                                       int64_t end, void* scratch))
FA_ISA_DECLARE(int64_t causal_flow_attention_scratch(const FlowAttention& op, bool backward))
FA_ISA_DECLARE(void causal_flow_attention_run(const FlowAttention& op, bool backward, const FlowTask* tasks,
                                              int64_t begin, int64_t end, void* scratch))
