// scale * q_h . k_t for one query per head, and its gradients dk_t = scale ds_t q_h, dq_h = scale sum_t ds_t k_t.
#include "cpu/aaren_scores.h"
#include "cpu/scan_rows.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename S, typename Body>
void for_items(const AarenScores& op, int64_t begin, int64_t end, const Body& body) {
  const int64_t blocks = (op.tokens + kScoreTokens - 1) / kScoreTokens;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, first = item % blocks * kScoreTokens;
    const ScanSegment segment{row, first, min(kScoreTokens, op.tokens - first), 1, row, false, false, item};
    for (int64_t t = 0; t < segment.length; ++t) {
      for (int64_t h = 0; h < op.heads; ++h) body(segment, t, h, at<const S>(op.query, segment, h));
    }
  }
}

template <typename S, typename E = Compute<S>>
void forward(const AarenScores& op, int64_t begin, int64_t end) {
  for_items<S>(op, begin, end, [&](const ScanSegment& segment, int64_t t, int64_t h, const S* query) {
    const S* key = at<const S>(op.keys, segment, t, h);
    Vec<E> sum = {};
    for_lanes<E>(op.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      sum += load_lanes<E>(query + j, n) * load_lanes<E>(key + j, n);
    });
    *at<E>(op.scores, segment, t, h) = E(op.scale) * reduce_sum<E>(sum);
  });
}

template <typename S, typename E = Compute<S>>
void backward(const AarenScores& op, int64_t begin, int64_t end) {
  for_items<S>(op, begin, end, [&](const ScanSegment& segment, int64_t t, int64_t h, const S* query) {
    const S* key = at<const S>(op.keys, segment, t, h);
    S* dkey = at<S>(op.dkeys, segment, t, h);
    E* dquery = static_cast<E*>(op.dquery_parts.data) + segment.part * op.dquery_parts.row + h * op.dquery_parts.head;
    const E gradient = E(op.scale) * *at<const E>(op.scores, segment, t, h);
    for_lanes<E>(op.width, [&](int64_t j, int n) __attribute__((always_inline)) {
      const Vec<E> before = t == 0 ? Vec<E>{} : load_lanes<E>(dquery + j, n);
      store_lanes<E>(dquery + j, before + load_lanes<E>(key + j, n) * gradient, n);
      store_lanes<E>(dkey + j, load_lanes<E>(query + j, n) * gradient, n);
    });
  });
}

}  // namespace

void aaren_scores_fwd(const AarenScores& op, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, forward<S>(op, begin, end));
}

void aaren_scores_bwd(const AarenScores& op, int64_t begin, int64_t end) {
  FA_DISPATCH_STORAGE(op, backward<S>(op, begin, end));
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
