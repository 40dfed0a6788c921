// The scores of aaren_attention on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/aaren_scores.cuh"
#include "cuda/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "aaren_attention";

struct Call {
  AarenScoresArgs args{};
  int64_t queries;
  RowAlignment alignment;
  const Tensor& keys;

  Call(const Tensor& query, const Tensor& keys, double scale) : keys(keys) {
    FA_CHECK(keys.dim() == 4 && query.dim() == 3, kOp,
             "query and keys must have shapes (B or 1, H, K) and (B, T, H, K)",
             shape_text(query.sizes()) + " and " + shape_text(keys.sizes()));
    args.keys = row("keys", keys), args.scale = static_cast<float>(scale);
    queries = query.size(0) == 1 ? 1 : keys.size(0);
    check_on_gpu(kOp, "query", query, keys.scalar_type(), {queries, keys.size(2), keys.size(3)});
    alignment.add(query);
    args.query = query.const_data_ptr();
    args.query_row = queries == 1 ? 0 : query.stride(0), args.query_head = query.stride(1);
  }

  ScanTensor row(const char* name, const Tensor& x) {
    check_on_gpu(kOp, name, x, keys.scalar_type(), {keys.size(0), keys.size(1), keys.size(2), keys.size(3)});
    alignment.add(x);
    return scan_tensor(x);
  }

  template <class Run>
  void with_kernel(const Run& run) {
    with_element(kOp, keys, [&](auto s) {
      with_vectors<decltype(s)>(alignment.vectors(), [&](auto v) {
        args.shape = scan_shape(kOp, keys, v, kAarenTokens, false);
        run(s, v, static_cast<unsigned>(args.shape.lines / args.shape.column_blocks * args.shape.tiles));
      });
    });
    check_launch(kOp, cudaGetLastError());
  }
};

Tensor aaren_scores_fwd_cuda(Tensor query, Tensor keys, double scale) {
  const CudaLaunch launch(keys);
  Call call(query, keys, scale);
  const Tensor scores = empty_floats(keys, {keys.size(0), keys.size(1), keys.size(2)});
  if (keys.numel() == 0) return scores;
  call.args.scores = scan_tensor(scores);
  call.with_kernel([&](auto s, auto v, unsigned blocks) {
    aaren_scores_fwd_kernel<decltype(s), v><<<blocks, kScanThreads, 0, launch.stream()>>>(call.args);
  });
  return scores;
}

std::tuple<Tensor, Tensor> aaren_scores_bwd_cuda(Tensor dscores, Tensor query, Tensor keys, double scale) {
  const CudaLaunch launch(keys);
  Call call(query, keys, scale);
  check_on_gpu(kOp, "dscores", dscores, ScalarType::Float, {keys.size(0), keys.size(1), keys.size(2)}, false);
  const Tensor dkeys = torch::stable::new_empty(keys, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)});
  Tensor dquery = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  if (keys.numel() == 0) {
    torch::stable::zero_(dquery);
    return {dquery, dkeys};
  }
  call.args.scores = scan_tensor(dscores), call.args.dkeys = call.row("dkeys", dkeys);
  call.with_kernel([&](auto s, auto v, unsigned blocks) {
    const int64_t tiles = keys.size(0) * call.args.shape.tiles;
    const Tensor parts = empty_floats(keys, {tiles, keys.size(2), keys.size(3)});
    call.args.dquery_parts = parts.mutable_data_ptr<float>();
    aaren_scores_bwd_kernel<decltype(s), v><<<blocks, kScanThreads, 0, launch.stream()>>>(call.args);
    sum_parts(kOp, call.args.dquery_parts, call.queries, tiles / call.queries, dquery, launch.stream());
  });
  return {dquery, dkeys};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("aaren_scores_fwd", TORCH_BOX(&flowattn::aaren_scores_fwd_cuda));
  m.impl("aaren_scores_bwd", TORCH_BOX(&flowattn::aaren_scores_bwd_cuda));
}
