// Packing plans and row gathers on CUDA: checks, grids, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>

#include "common/cuda_stream.h"
#include "common/packing_tensors.h"
#include "cuda/packing.cuh"

namespace flowattn {
namespace {

template <class T>
void launch_plan(const PackPlanArgs& args, cudaStream_t stream, int device) {
  int processors = 1;
  check_launch("pack_plan", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t pieces = int64_t{args.batch} * args.row_pieces;
  const int64_t workers = std::min<int64_t>((pieces + kPlanWarps - 1) / kPlanWarps, processors - 1);
  cudaLaunchConfig_t config = {};
  // One more block for the tile list; never more than one block a processor, so that all can meet at the grid barrier.
  config.gridDim = workers > 1 ? static_cast<unsigned>(workers) + 1 : 1;
  config.blockDim = kPlanThreads;
  config.stream = stream;
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = args.kind == kMask && config.gridDim.x > 1;
  check_launch("pack_plan", cudaLaunchKernelEx(&config, pack_plan_kernel<T>, args));
}

PlanResults pack_plan(const Tensor& source, int64_t kind, int64_t padded_len, int64_t capacity) {
  const CudaLaunch launch(source);
  const Plan plan(source, kind, padded_len, capacity);
  PackPlanArgs args;
  args.source = source.const_data_ptr();
  args.outer_stride = source.stride(0);
  args.inner_stride = kind == kMask ? source.stride(1) : 0;
  args.kind = static_cast<PlanKind>(plan.kind);
  args.batch = static_cast<int>(plan.batch);
  args.padded_len = static_cast<int>(padded_len);
  args.capacity = static_cast<int>(capacity);
  args.row_pieces = static_cast<int>((padded_len + kPiece - 1) / kPiece);
  args.shift = plan_shift(padded_len);
  args.entries = static_cast<int>(plan.tiles.size(0));
  const Tensor counts = empty_ints(source, {kind == kMask ? plan.batch * args.row_pieces : 0});
  args.counts = counts.mutable_data_ptr<int32_t>();
  args.cu_seqlens = plan.cu_seqlens.mutable_data_ptr<int32_t>();
  args.indices = plan.indices.mutable_data_ptr<int32_t>();
  args.inverse = plan.inverse.mutable_data_ptr<int32_t>();
  args.position_ids = plan.position_ids.mutable_data_ptr<int32_t>();
  args.tiles = static_cast<Tile*>(plan.tiles.mutable_data_ptr());
  args.stats = plan.stats.mutable_data_ptr<int32_t>();
  switch (source.element_size()) {
    case 1:
      launch_plan<uint8_t>(args, launch.stream(), source.get_device_index());
      break;
    case 4:
      launch_plan<int32_t>(args, launch.stream(), source.get_device_index());
      break;
    default:
      launch_plan<int64_t>(args, launch.stream(), source.get_device_index());
  }
  return plan.results();
}

template <class Vec>
void launch_gather(GatherRowsArgs args, int64_t row_bytes, int64_t head_bytes, cudaStream_t stream) {
  const int64_t vectors = row_bytes / int64_t{sizeof(Vec)};
  FA_CHECK(vectors < (int64_t{1} << 30), "gather_rows", "a row must have fewer than 2^30 vectors", vectors);
  args.vectors = static_cast<int>(vectors);
  args.head_vectors = static_cast<int>(head_bytes / int64_t{sizeof(Vec)});
  const unsigned lanes = std::min<unsigned>(std::bit_ceil(static_cast<unsigned>(vectors)), kGatherThreads);
  const dim3 block(lanes, kGatherThreads / lanes);
  const int64_t block_rows = int64_t{block.y} * kRowsAThread;
  const dim3 grid(static_cast<unsigned>((args.rows + block_rows - 1) / block_rows),
                  static_cast<unsigned>(std::min<int64_t>((vectors + lanes - 1) / lanes, 65535)));
  gather_rows_kernel<Vec><<<grid, block, 0, stream>>>(args);
  check_launch("gather_rows", cudaGetLastError());
}

Tensor gather_rows(const Tensor& src, const Tensor& index, double fill) {
  const CudaLaunch launch(src);
  const RowGather g(src, index);
  if (g.empty()) return g.out;
  const auto pattern = fill_pattern(src.scalar_type(), fill);
  GatherRowsArgs args;
  args.src = static_cast<const char*>(src.const_data_ptr());
  args.index = index.const_data_ptr<int32_t>();
  args.out = static_cast<char*>(g.out.mutable_data_ptr());
  args.rows = g.rows;
  args.source_rows = g.source_rows;
  args.inner_rows = g.inner_rows;
  args.outer_stride = g.outer_stride;
  args.row_stride = g.row_stride;
  args.head_stride = g.head_stride;
  std::memcpy(&args.fill, pattern.data(), sizeof(args.fill));
  // The widest vector that every address is a multiple of: the lowest bit set in any of them.
  const auto addresses = reinterpret_cast<uintptr_t>(args.src) | reinterpret_cast<uintptr_t>(args.out);
  const auto bits =
      static_cast<uint64_t>(g.outer_stride | g.row_stride | g.head_stride | g.head_bytes | 16) | addresses;
  const int64_t row_bytes = g.heads * g.head_bytes;
  switch (bits & -bits) {
    case 16:
      launch_gather<uint4>(args, row_bytes, g.head_bytes, launch.stream());
      break;
    case 8:
      launch_gather<uint2>(args, row_bytes, g.head_bytes, launch.stream());
      break;
    case 4:
      launch_gather<uint32_t>(args, row_bytes, g.head_bytes, launch.stream());
      break;
    case 2:
      launch_gather<uint16_t>(args, row_bytes, g.head_bytes, launch.stream());
      break;
    default:
      launch_gather<uint8_t>(args, row_bytes, g.head_bytes, launch.stream());
  }
  return g.out;
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("pack_plan", TORCH_BOX(&flowattn::pack_plan));
  m.impl("gather_rows", TORCH_BOX(&flowattn::gather_rows));
}
