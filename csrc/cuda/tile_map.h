// Host side of hopper.cuh: which tensors bulk copies can read as tiles, and the maps that describe them.
#pragma once

#include <cuda.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common/check.h"
#include "common/cuda_stream.h"
#include "cuda/hopper.cuh"

namespace flowattn {

constexpr int kMapWidth = 64, kMapRows = 64;  // of a tile

// Bulk copies need rows at multiples of 16 bytes; the public op asks the same before it picks this kernel.
inline void check_rows(const char* op, const torch::stable::Tensor& x) {
  FA_CHECK(x.dim() == 3 && x.size(2) <= kMapWidth && x.size(2) % 8 == 0, op,
           "q, k, v must be (T, heads, width), and dout alike, with a width of 8, 16 .. 64", x.size(2));
  FA_CHECK(x.stride(2) == 1, op, "the last dim must be contiguous", x.stride(2));
  for (int dim = 0; dim < 2; ++dim) {
    FA_CHECK(x.size(dim) <= 1 || (x.stride(dim) > 0 && x.stride(dim) % 8 == 0), op,
             "rows and heads must lie at multiples of 16 bytes", x.stride(dim));
  }
  FA_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kChunkBytes == 0, op,
           "q, k, v and dout must start at multiples of 16 bytes", x.stride(0));
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled(const char* op) {
  static const EncodeTiled encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_launch(op,
                 cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return encode;
}

// x (T, heads, width) in boxes of 64 rows of one head, as tiles of hopper.cuh. Empty x gives a map that is never used.
inline CUtensorMap tile_map(const char* op, const torch::stable::Tensor& x) {
  CUtensorMap map = {};
  if (x.numel() == 0) return map;
  const auto extent = [&](int dim) { return static_cast<cuuint64_t>(x.size(dim)); };
  const auto bytes = [&](int dim) { return static_cast<cuuint64_t>(x.size(dim) > 1 ? 2 * x.stride(dim) : 128); };
  const cuuint64_t sizes[] = {extent(2), extent(1), extent(0)}, strides[] = {bytes(1), bytes(0)};
  const cuuint32_t box[] = {kMapWidth, 1, kMapRows}, steps[] = {1, 1, 1};
  const bool half = x.scalar_type() == torch::headeronly::ScalarType::Half;
  const CUresult status = encode_tiled(op)(
      &map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(x.const_data_ptr()), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FA_CHECK(status == CUDA_SUCCESS, op, "the driver must encode the tensor map", static_cast<int>(status));
  return map;
}

}  // namespace flowattn
