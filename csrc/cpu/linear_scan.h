// What csrc/cpu/linear_scan.cpp hands to its kernels.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

struct LinearScan {
  Storage storage, gates_storage;
  int64_t width, gate_width;  // gate_width 1: one gate for a whole row
  bool log_gate;
  ScanTensor gates, tokens, out;
  ScanState initial, final;

  // Backward only.
  ScanTensor dout, dgates, dtokens;
  ScanState dinitial, dfinal;
  // Gradient of gates that are constant in time, summed over each chunk: (chunks, heads, gate_width), compute type.
  ScanState dgate_parts;
};

}  // namespace flowattn

// Bytes of one head's state in a carry, bytes of a thread's scratch memory for `heads` heads, one phase of one task.
FA_ISA_DECLARE(int64_t linear_scan_state_bytes(const LinearScan& op))
FA_ISA_DECLARE(int64_t linear_scan_scratch_bytes(const LinearScan& op, int64_t heads))
FA_ISA_DECLARE(void linear_scan_fwd(const LinearScan& op, ScanPhase phase, const ScanTask& task, std::byte* carry,
                                    std::byte* local, std::byte* scratch))
FA_ISA_DECLARE(void linear_scan_bwd(const LinearScan& op, ScanPhase phase, const ScanTask& task, std::byte* carry,
                                    std::byte* local, std::byte* scratch))
