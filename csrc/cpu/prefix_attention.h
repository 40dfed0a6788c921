// What csrc/cpu/prefix_attention.cpp hands to its kernels.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

struct PrefixAttention {
  Storage storage, scores_storage;
  int64_t width;
  ScanTensor scores, values, mask, out, m, u, lse;
  ScanState m0, u0, w0, m_final, u_final, w_final;

  // Backward only; u_final is an input of it.
  ScanTensor dout, dlse, dscores, dvalues;
  ScanState du_final, dw_final, du0, dw0;
};

}  // namespace flowattn

// Bytes of one head's state in a carry, bytes of a thread's scratch memory for `heads` heads, one phase of one task.
FA_ISA_DECLARE(int64_t prefix_attention_state_bytes(const PrefixAttention& op))
FA_ISA_DECLARE(int64_t prefix_attention_scratch_bytes(const PrefixAttention& op, int64_t heads))
FA_ISA_DECLARE(void prefix_attention_fwd(const PrefixAttention& op, ScanPhase phase, const ScanTask& task,
                                         std::byte* carry, std::byte* local, std::byte* scratch))
FA_ISA_DECLARE(void prefix_attention_bwd(const PrefixAttention& op, ScanPhase phase, const ScanTask& task,
                                         std::byte* carry, std::byte* local, std::byte* scratch))
