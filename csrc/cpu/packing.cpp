// Packing plans and row gathers on the CPU: parallel over rows, one pass each to count and to place.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common/packing_tensors.h"

namespace flowattn {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // less work than this a thread costs more to hand out than to do

int64_t grain(int64_t bytes_a_row) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_a_row)); }

// Calls f with a typed pointer to integer (or bool: bytes) data.
template <class F>
void with_integers(const Tensor& tensor, F f) {
  switch (tensor.element_size()) {
    case 1:
      return f(static_cast<const uint8_t*>(tensor.const_data_ptr()));
    case 4:
      return f(static_cast<const int32_t*>(tensor.const_data_ptr()));
    default:
      return f(static_cast<const int64_t*>(tensor.const_data_ptr()));
  }
}

template <class T>
int64_t count_row(const T* row, int64_t width, int64_t stride) {
  int64_t count = 0;
  if (stride == 1) {
    for (int64_t s = 0; s < width; ++s) count += row[s] != 0;
  } else {
    for (int64_t s = 0; s < width; ++s) count += row[s * stride] != 0;
  }
  return count;
}

std::vector<int64_t> sequence_lengths(const Tensor& source, const Plan& plan) {
  std::vector<int64_t> lengths(plan.batch);
  const int64_t stride = source.stride(0);
  with_integers(source, [&](const auto* data) {
    if (plan.kind == kMask) {
      const int64_t inner = source.stride(1);
      torch::stable::parallel_for(0, plan.batch, grain(plan.padded_len), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) lengths[b] = count_row(data + b * stride, plan.padded_len, inner);
      });
    } else if (plan.kind == kLengths) {
      for (int64_t b = 0; b < plan.batch; ++b) lengths[b] = data[b * stride];
    } else {
      FA_CHECK_VALUE(data[0] == 0, "pack_plan", "cu_seqlens must start at 0", int64_t{data[0]});
      for (int64_t b = 0; b < plan.batch; ++b) {
        // Unsigned: nonsense near the ends of int64 wraps around and is then refused by check_lengths.
        const auto next = static_cast<uint64_t>(data[(b + 1) * stride]), here = static_cast<uint64_t>(data[b * stride]);
        lengths[b] = static_cast<int64_t>(next - here);
      }
    }
  });
  return lengths;
}

void check_lengths(const std::vector<int64_t>& lengths, const Plan& plan) {
  int64_t total = 0;  // cannot overflow: each length is at most padded_len, and B * S is below 2^31
  for (const int64_t length : lengths) {
    FA_CHECK_VALUE(length >= 0, "pack_plan", "lengths must be >= 0", length);
    FA_CHECK_VALUE(length <= plan.padded_len, "pack_plan",
                   "no sequence may be longer than max_seqlen=" << plan.padded_len, length);
    total += length;
  }
  FA_CHECK_VALUE(total <= plan.capacity, "pack_plan", "capacity=" << plan.capacity << " must hold all tokens", total);
}

// Writes what depends on single tokens: indices, inverse and position_ids.
void place_tokens(const Tensor& source, const Plan& plan, const int32_t* cu) {
  auto* indices = plan.indices.mutable_data_ptr<int32_t>();
  auto* inverse = plan.inverse.mutable_data_ptr<int32_t>();
  auto* position_ids = plan.position_ids.mutable_data_ptr<int32_t>();
  const auto place = [&](int64_t begin, int64_t end, auto keep) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t rank = cu[b];
      for (int64_t s = 0; s < plan.padded_len; ++s) {
        const int64_t flat = b * plan.padded_len + s;
        const bool kept = keep(b, s);
        inverse[flat] = kept ? rank : -1;
        if (kept) {
          indices[rank] = static_cast<int32_t>(flat);
          position_ids[rank++] = static_cast<int32_t>(s);
        }
      }
    }
  };
  with_integers(source, [&](const auto* data) {
    const int64_t outer = source.stride(0), inner = plan.kind == kMask ? source.stride(1) : 0;
    torch::stable::parallel_for(0, plan.batch, grain(12 * plan.padded_len), [&](int64_t begin, int64_t end) {
      if (plan.kind == kMask) {
        place(begin, end, [&](int64_t b, int64_t s) { return data[b * outer + s * inner] != 0; });
      } else {
        place(begin, end, [&](int64_t b, int64_t s) { return s < cu[b + 1] - cu[b]; });
      }
    });
  });
  std::fill(indices + cu[plan.batch], indices + plan.capacity, -1);
  std::fill(position_ids + cu[plan.batch], position_ids + plan.capacity, 0);
}

// Writes the tile list, sorted by counting, and returns how many of its entries belong to sequences.
int64_t place_tiles(const Plan& plan, const int32_t* cu) {
  auto* tiles = static_cast<Tile*>(plan.tiles.mutable_data_ptr());
  const int shift = plan_shift(plan.padded_len);
  const auto batch = static_cast<int>(plan.batch);
  const auto length = [&](int b) { return cu[b + 1] - cu[b]; };
  int64_t next[kPlanBuckets] = {};
  for (int b = 0; b < batch; ++b) next[length(b) >> shift] += tiles_of(length(b));
  int64_t entries = 0;
  for (int bucket = kPlanBuckets - 1; bucket >= 0; --bucket) entries += std::exchange(next[bucket], entries);
  for (int b = 0; b < batch; ++b) {
    int64_t& at = next[length(b) >> shift];
    for (int row = 0; row < length(b); row += kTile) tiles[at++] = {b, row, cu[b], length(b)};
  }
  const int tail = static_cast<int>(plan.capacity) - cu[batch];
  int64_t at = entries;
  for (int64_t row = 0; row < tail; row += kTile) tiles[at++] = {batch, static_cast<int>(row), cu[batch], tail};
  std::fill(tiles + at, tiles + plan.tiles.size(0), Tile{batch, 0, 0, 0});
  return entries;
}

PlanResults pack_plan(const Tensor& source, int64_t kind, int64_t padded_len, int64_t capacity) {
  const Plan plan(source, kind, padded_len, capacity);
  const auto lengths = sequence_lengths(source, plan);
  check_lengths(lengths, plan);
  auto* cu = plan.cu_seqlens.mutable_data_ptr<int32_t>();
  cu[0] = 0;
  int64_t longest = 0;
  for (int64_t b = 0; b < plan.batch; ++b) {
    cu[b + 1] = cu[b] + static_cast<int32_t>(lengths[b]);
    longest = std::max(longest, lengths[b]);
  }
  place_tokens(source, plan, cu);
  auto* stats = plan.stats.mutable_data_ptr<int32_t>();
  stats[0] = cu[plan.batch];
  stats[1] = static_cast<int32_t>(place_tiles(plan, cu));
  stats[2] = static_cast<int32_t>(longest);
  return plan.results();
}

// memcpy with a size known to the compiler: rows of one number are moved without a call each.
template <int kBytes>
struct FixedCopy {
  static constexpr int64_t bytes = kBytes;
  void operator()(char* to, const void* from) const { std::memcpy(to, from, kBytes); }
};

struct AnyCopy {
  int64_t bytes;
  void operator()(char* to, const void* from) const { std::memcpy(to, from, bytes); }
};

template <class Copy>
void gather(const RowGather& g, const char* src, const int32_t* index, const std::vector<uint8_t>& fill, Copy copy) {
  char* out = static_cast<char*>(g.out.mutable_data_ptr());
  const int64_t row_bytes = g.heads * copy.bytes;
  torch::stable::parallel_for(0, g.rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* to = out + i * row_bytes;
      const auto row = static_cast<uint32_t>(index[i]), outer = row / g.inner_rows, inner = row - outer * g.inner_rows;
      const bool inside = index[i] >= 0 && index[i] < g.source_rows;
      const char* from = src + (inside ? outer * g.outer_stride + inner * g.row_stride : 0);
      for (int64_t h = 0; h < g.heads; ++h) {
        copy(to + h * copy.bytes, inside ? static_cast<const void*>(from + h * g.head_stride) : fill.data());
      }
    }
  });
}

Tensor gather_rows(const Tensor& src, const Tensor& index, double fill) {
  const RowGather g(src, index);
  if (g.empty()) return g.out;
  const auto pattern = fill_pattern(src.scalar_type(), fill);
  std::vector<uint8_t> fill_row(g.head_bytes);
  for (int64_t at = 0; at < g.head_bytes; ++at) fill_row[at] = pattern[at % pattern.size()];
  const auto* from = static_cast<const char*>(src.const_data_ptr());
  const auto* rows = index.const_data_ptr<int32_t>();
  switch (g.head_bytes) {
    case 4:
      gather(g, from, rows, fill_row, FixedCopy<4>{});
      break;
    case 8:
      gather(g, from, rows, fill_row, FixedCopy<8>{});
      break;
    default:
      gather(g, from, rows, fill_row, AnyCopy{g.head_bytes});
  }
  return g.out;
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("pack_plan", TORCH_BOX(&flowattn::pack_plan));
  m.impl("gather_rows", TORCH_BOX(&flowattn::gather_rows));
}
