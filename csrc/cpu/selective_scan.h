// What csrc/cpu/selective_scan.cpp hands to its kernels.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

// Channels that one task walks together: they share the rows of B and C, and the partial sums of their gradients.
constexpr int64_t kScanChannels = 64;
// Tokens of a tile; where the caller keeps states, those between two kept ones.
constexpr int64_t kScanTile = 64;

// Pointers without a type are to the compute type. Channel tensors are ScanTensors whose head is a channel.
struct SelectiveScan {
  Storage storage;
  int64_t batch, tokens, channels, groups, states;  // states: N, numbers in the state of a channel
  int64_t tile;
  bool softplus;
  ScanTensor u, delta, z;
  StateRows B, C;
  const void *A, *skip, *bias;  // (channels, N); (channels) or nullptr
  ScanState initial;            // (S, channels, N)
  const int32_t* slots;         // (tokens), nullptr: no state is wanted; -1 or where to put the state after the token
  int64_t num_slots;
  void* carries;  // (chunks, N, channels): the states before every `tile` tokens, nullptr: not kept

  // Forward only.
  ScanTensor out;
  ScanState final;
  void* slot_states;  // (batch, num_slots, channels, N)

  // Backward only; the gradient of an absent result is nullptr.
  ScanTensor dout, du, ddelta, dz;
  ScanState dfinal, dinitial;
  const void* dslot_states;
  // Sums over the channels of a task: (tasks of a group, batch, tokens, groups, N).
  void *dB_parts, *dC_parts;
  StateRows dB, dC;
  // Sums over the sequences of a task: (sets of sequences, channels, N), (sets, channels), (sets, channels).
  void *dA_parts, *dskip_parts, *dbias_parts;
};

// Segments begin..end, whose set has number `set`, for channels first..last of group `group`: number `part` there.
struct SelectiveTask {
  const ScanSegment *begin, *end;
  int64_t set, group, part, first, last;
};

}  // namespace flowattn

FA_ISA_DECLARE(int64_t selective_scan_scratch_bytes(const SelectiveScan& op, bool backward))
FA_ISA_DECLARE(void selective_scan_fwd(const SelectiveScan& op, const SelectiveTask& task, std::byte* scratch))
FA_ISA_DECLARE(void selective_scan_bwd(const SelectiveScan& op, const SelectiveTask& task, std::byte* scratch))
// dB and dC of tokens begin..end, counted through the batch, from their parts.
FA_ISA_DECLARE(void selective_scan_sum_parts(const SelectiveScan& op, int64_t parts, int64_t begin, int64_t end))
