// Checks and allocations of the packing ops, the same for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <tuple>

#include "common/check.h"
#include "common/packing.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_ints(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Int);
}

// pack_plan's input, checked, and its six results, allocated.
struct Plan {
  int kind;
  int64_t batch, padded_len, capacity;
  Tensor cu_seqlens, indices, inverse, position_ids, tiles, stats;

  Plan(const Tensor& source, int64_t kind_, int64_t padded_len_, int64_t capacity_)
      : kind(static_cast<int>(kind_)), padded_len(padded_len_), capacity(capacity_) {
    constexpr const char* op = "pack_plan";
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    FA_CHECK(kind >= kMask && kind <= kCuSeqlens, op, "kind must be 0 (mask), 1 (lengths) or 2 (cu_seqlens)", kind);
    FA_CHECK(source.dim() == (kind == kMask ? 2 : 1), op, "source must have 2 dims for a mask, else 1", source.dim());
    batch = source.size(0) - (kind == kCuSeqlens);
    FA_CHECK(batch >= 0, op, "cu_seqlens must have shape (B+1,)", "(0,)");
    FA_CHECK(padded_len >= 0, op, "padded_len must be >= 0", padded_len);
    FA_CHECK(kind != kMask || source.size(1) == padded_len, op, "padded_len must be the mask's width", padded_len);
    FA_CHECK(padded_len == 0 || batch <= most / padded_len, op, "B must be below 2^31 / padded_len", batch);
    const int64_t entries = tile_capacity(capacity, batch);
    FA_CHECK(capacity >= 0 && entries <= most, op, "capacity must be >= 0 and below 2^31", capacity);
    const auto bytes = source.element_size();
    FA_CHECK(bytes == 4 || bytes == 8 || (bytes == 1 && kind == kMask), op,
             "source must have 4 or 8 bytes an element, or 1 for a mask", bytes);
    cu_seqlens = empty_ints(source, {batch + 1});
    indices = empty_ints(source, {capacity});
    inverse = empty_ints(source, {batch * padded_len});
    position_ids = empty_ints(source, {capacity});
    tiles = empty_ints(source, {entries, 4});
    stats = empty_ints(source, {3});
  }

  auto results() const { return std::tuple(cu_seqlens, indices, inverse, position_ids, tiles, stats); }
};

using PlanResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// One element of `dtype` with the value `fill`, repeated to 16 bytes.
inline std::array<uint8_t, 16> fill_pattern(ScalarType dtype, double fill) {
  std::array<uint8_t, 16> pattern{};
  const auto repeat = [&](auto value) {
    for (size_t at = 0; at < pattern.size(); at += sizeof(value)) std::memcpy(&pattern[at], &value, sizeof(value));
  };
  switch (dtype) {
#define FA_FILL_CASE(type, name)     \
  case ScalarType::name:             \
    repeat(static_cast<type>(fill)); \
    break;
    AT_FORALL_SCALAR_TYPES_WITH_COMPLEX_EXCEPT_COMPLEX_HALF_F8NZ(FA_FILL_CASE)
    FA_FILL_CASE(c10::Float8_e5m2fnuz, Float8_e5m2fnuz)
    FA_FILL_CASE(c10::Float8_e4m3fnuz, Float8_e4m3fnuz)
    FA_FILL_CASE(uint16_t, UInt16)
    FA_FILL_CASE(uint32_t, UInt32)
    FA_FILL_CASE(uint64_t, UInt64)
#undef FA_FILL_CASE
    default:
      FA_CHECK(fill == 0, "gather_rows", "this dtype must be filled with 0", fill);
  }
  return pattern;
}

// A checked gather of rows (H, D) out of src (B, S, H, D), dims merged where the strides allow it. Offsets in bytes.
struct RowGather {
  int64_t rows, source_rows;         // rows of the result; B * S
  uint32_t inner_rows;               // S, at least 1 because callers divide by it before they look
  int64_t outer_stride, row_stride;  // of B and of S
  int64_t heads, head_stride, head_bytes;
  Tensor out;

  RowGather(const Tensor& src, const Tensor& index) {
    constexpr const char* op = "gather_rows";
    FA_CHECK(src.dim() == 4, op, "src must have 4 dims (B, S, H, D)", src.dim());
    FA_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Int && index.is_contiguous(), op,
             "index must be a contiguous int32 vector (1 dim)", index.dim());
    FA_CHECK(src.is_cuda() == index.is_cuda() && src.get_device_index() == index.get_device_index(), op,
             "index must be on the device of src", index.get_device_index());
    const int64_t width = src.size(3), bytes = src.element_size();
    FA_CHECK(src.stride(3) == 1 || width <= 1, op, "the last dim of src must be contiguous", src.stride(3));
    rows = index.size(0);
    source_rows = src.size(0) * src.size(1);
    // An index is below 2^31, so it never leaves a dim longer than that.
    inner_rows = static_cast<uint32_t>(std::clamp<int64_t>(src.size(1), 1, int64_t{1} << 31));
    outer_stride = src.stride(0) * bytes;
    row_stride = src.stride(1) * bytes;
    heads = src.size(2);
    head_stride = src.stride(2) * bytes;
    head_bytes = width * bytes;
    if (heads == 1 || head_stride == head_bytes) {
      head_bytes *= heads;
      head_stride = head_bytes;
      heads = 1;
    }
    if (src.size(0) == 1) outer_stride = 0;  // the stride of a size-1 dim is arbitrary
    if (src.size(1) == 1) row_stride = 0;
    out = torch::stable::new_empty(src, {{rows, src.size(2), width}});
  }

  bool empty() const { return rows == 0 || heads * head_bytes == 0; }
};

}  // namespace flowattn
