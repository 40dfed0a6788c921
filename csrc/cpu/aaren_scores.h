// What csrc/cpu/aaren_scores.cpp hands to its kernels.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace flowattn {

// Tokens of one item; the gradient of the query is summed over each item first, so the size fixes the order of the sum.
constexpr int64_t kScoreTokens = 512;

struct AarenScores {
  Storage storage;
  int64_t tokens, heads, width;
  double scale;
  ScanState query;  // row 0 for every batch row where there is only one query
  ScanTensor keys, scores;

  // Backward only; scores then holds their gradient.
  ScanTensor dkeys;
  ScanState dquery_parts;  // (items, heads, width) in the compute type
};

}  // namespace flowattn

// Items begin..end; item i is tokens of block i % blocks of batch row i / blocks, blocks of kScoreTokens.
FA_ISA_DECLARE(void aaren_scores_fwd(const AarenScores& op, int64_t begin, int64_t end))
FA_ISA_DECLARE(void aaren_scores_bwd(const AarenScores& op, int64_t begin, int64_t end))
