// What the launchers of the scans (prefix_attention, linear_scan) hand to their kernels. Plain data only: kernels are
// compiled per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/scan.h"
#include "cpu/storage.h"

namespace flowattn {

// Tokens between two points where a long segment may be cut for several threads. A cut changes the order of the sums,
// so they lie at multiples of this in every segment, whether it is cut or not: results do not depend on the threads.
constexpr int64_t kScanChunk = 4096;

// Tokens over which one recurrence runs. Token i = 0..length-1, in the order of the recurrence, is first + i * step.
struct ScanSegment {
  int64_t row, first, length, step;
  int64_t state;        // row of the state tensors
  bool initial, final;  // whether it starts from the initial state, and whether it ends in the final state
  int64_t part;         // number of its first chunk among the chunks of all segments
};

// Steps begin..end of the pass over one segment, for some heads. Backward passes count from the last token.
struct ScanTask {
  const ScanSegment* segment;
  int64_t begin, end, head_begin, head_end;
};

// kStart: write the state before the first step to `carry`.
// kWalk: take the steps of the task; from `carry` with all results written, from nothing with the end in `local`, or
//        both; the one that is not wanted is nullptr.
// kCombine: replace the state in `carry` by the one at the end of the task, given what kWalk left in `local`.
enum class ScanPhase { kStart, kWalk, kCombine };

}  // namespace flowattn
