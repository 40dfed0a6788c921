// What the launchers of the scans share on a GPU: element types, alignment, the shape of tiles, memory for looking
// back.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "common/cuda_stream.h"
#include "common/scan_tensors.h"
#include "cuda/elements.h"
#include "cuda/scan_states.cuh"

namespace flowattn {

using MaybeTensor = std::optional<Tensor>;

inline void check_on_gpu(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                         std::initializer_list<int64_t> shape, bool row = true) {
  check_scan_tensor(op, name, x, dtype, shape, row, ScanDevice::kCuda);
}

// Whether all rows can be read in 16-byte vectors.
class RowAlignment {
 public:
  void add(const Tensor& x) {
    const int64_t last = x.dim() - 1, bytes = x.element_size();
    bits_ |= reinterpret_cast<uintptr_t>(x.data_ptr()) | static_cast<uintptr_t>(x.size(last) * bytes);
    for (int64_t dim = 0; dim < last; ++dim) {
      if (x.size(dim) > 1) bits_ |= static_cast<uintptr_t>(x.stride(dim) * bytes);
    }
  }
  void add(const MaybeTensor& x) {
    if (x) add(*x);
  }
  bool vectors() const { return bits_ % 16 == 0; }

 private:
  uintptr_t bits_ = 0;
};

// Calls run(V) as a compile-time constant: 16 bytes of S, or one element.
template <class S, class Run>
void with_vectors(bool vectors, const Run& run) {
  if (vectors) {
    run(std::integral_constant<int, 16 / sizeof(S)>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

inline ScanSequences scan_sequences(const char* op, const Tensor& x, const MaybeTensor& cu_seqlens,
                                    const MaybeTensor& reset, bool reverse, bool initial) {
  ScanSequences sequences{};
  sequences.reverse = reverse, sequences.initial = initial;
  int64_t states = x.size(0);
  if (cu_seqlens) {
    FA_CHECK(x.size(0) == 1, op, "packed tensors must have batch size 1", x.size(0));
    FA_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op, "cu_seqlens must have shape (S+1,)",
             shape_text(cu_seqlens->sizes()));
    states = cu_seqlens->size(0) - 1;
    check_on_gpu(op, "cu_seqlens", *cu_seqlens, ScalarType::Int, {states + 1});
    sequences.ends = cu_seqlens->const_data_ptr<int32_t>();
  }
  if (reset) {
    check_on_gpu(op, "reset", *reset, ScalarType::Bool, {x.size(0), x.size(1)}, false);
    sequences.reset = static_cast<const bool*>(reset->data_ptr());
    sequences.reset_row = reset->stride(0), sequences.reset_time = reset->stride(1);
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() >> kCodeBits;
  FA_CHECK(states < kMost, op, "there must be fewer than 2^26 sequences", states);
  sequences.states = static_cast<int>(states);
  return sequences;
}

// Tiles of a (B, T, H, D) tensor for threads that keep `thread_tokens` tokens of `vector` columns each.
inline ScanShape scan_shape(const char* op, const Tensor& x, int vector, int thread_tokens, bool backwards) {
  ScanShape shape{};
  shape.tokens = x.size(1), shape.backwards = backwards;
  FA_CHECK(x.size(3) < (int64_t{1} << 28), op, "D must be below 2^28", x.size(3));
  shape.heads = static_cast<int>(x.size(2)), shape.width = static_cast<int>(x.size(3));
  const int vectors = static_cast<int>(ceil_div(shape.width, vector));
  // No fewer lanes than tokens of a thread: a tile then has at most kScanTile tokens.
  shape.lanes = std::clamp<int>(std::bit_ceil(static_cast<unsigned>(vectors)), thread_tokens,
                                std::min(kWarp, kScanColumns / vector));
  shape.column_blocks = static_cast<int>(ceil_div(vectors, shape.lanes));
  shape.columns = shape.lanes * vector, shape.tile = kScanThreads / shape.lanes * thread_tokens;
  const int64_t tiles = ceil_div(shape.tokens, shape.tile), lines = x.size(0) * shape.heads * shape.column_blocks;
  FA_CHECK(lines * tiles < std::numeric_limits<int32_t>::max() / 2, op, "the tensor must have fewer tiles",
           lines * tiles);
  shape.tiles = static_cast<int>(tiles), shape.lines = static_cast<int>(lines);
  return shape;
}

// The memory of a look-back, if tiles look back: with two lines for each multiprocessor a block may as well take all
// tiles of its line, with fewer the GPU would idle.
class LookBackMemory {
 public:
  // A tile publishes `per_column` numbers a column and `tile_scalars` more, a state one a column and `state_scalars`.
  LookBackMemory(const char* op, const Tensor& x, const ScanShape& shape, int per_column, int tile_scalars,
                 int state_scalars, const void* kernel, cudaStream_t stream) {
    if (shape.tiles == 1 || shape.lines >= kLinesAProcessor * processors(op, x)) return;
    view.tile_words = shape.columns * per_column + tile_scalars;
    if (int64_t{shape.lines} * shape.tiles > processors(op, x)) {
      int blocks = 0;
      check_launch(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kScanThreads, 0));
      view.resident = blocks * processors(op, x);
    }
    if (shape.tiles <= kScanCluster && has_clusters(op, kernel)) {
      view.cluster = true, view.block = kScanCluster + 1;
      return;
    }
    view.block = std::min(kScanBlock, kLookBackColumns / (shape.columns * per_column));
    view.state_words = shape.columns + state_scalars;
    const int64_t tiles = int64_t{shape.lines} * shape.tiles * view.tile_words;
    const int64_t words = 1 + tiles + shape.lines * ceil_div(shape.tiles, view.block) * view.state_words;
    memory_ = torch::stable::new_empty(x, {words}, ScalarType::Long);
    view.tiles = static_cast<Word*>(memory_->mutable_data_ptr()) + 1;
    view.states = view.tiles + tiles;
    view.ticket = static_cast<unsigned*>(memory_->mutable_data_ptr());
    // In the stream and so in a captured graph: no flag of an earlier run is left.
    check_launch(op, cudaMemsetAsync(view.ticket, 0, words * sizeof(Word), stream));
  }

  ScanLookBack view{};

 private:
  static constexpr int kLinesAProcessor = 2;

  // Whether the code of the kernel that runs on this GPU was compiled for one with clusters.
  static bool has_clusters(const char* op, const void* kernel) {
    cudaFuncAttributes attributes;
    check_launch(op, cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90;
  }

  MaybeTensor memory_;
};

template <class Args>
void launch_scan(const char* op, void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const bool tile_a_block = args.look_back.ticket || args.look_back.cluster;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(args.shape.tiles), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim =
      static_cast<unsigned>(tile_a_block ? int64_t{args.shape.lines} * args.shape.tiles : args.shape.lines);
  config.blockDim = kScanThreads, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = args.look_back.cluster ? 1 : 0;
  check_launch(op, cudaLaunchKernelEx(&config, kernel, args));
}

// out (groups, n...) = the sums over `count` parts each of parts (groups, count, n...).
inline void sum_parts(const char* op, const float* parts, int64_t groups, int64_t count, const Tensor& out,
                      cudaStream_t stream) {
  if (out.numel() == 0) return;
  FA_CHECK(groups <= 65535, op, "there must be fewer than 65536 queries", groups);
  constexpr int kVector = 4;
  constexpr int64_t kManyColumns = 1 << 15;
  const int64_t n = out.numel() / groups;
  const auto blocks = [&](int64_t columns) {
    return dim3(static_cast<unsigned>(ceil_div(n, columns)), static_cast<unsigned>(groups));
  };
  with_element(op, out, [&](auto element) {
    using S = decltype(element);
    S* to = static_cast<S*>(out.data_ptr());
    if (n < kManyColumns || n % kVector != 0) {
      sum_parts_kernel<S><<<blocks(kWarp), dim3(kWarp, kPartWarps), 0, stream>>>(parts, count, n, to);
    } else {
      sum_columns_kernel<S, kVector>
          <<<blocks(kVector * kColumnThreads), kColumnThreads, 0, stream>>>(parts, count, n, to);
    }
  });
  check_launch(op, cudaGetLastError());
}

inline Tensor empty_floats(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, {shape.begin(), shape.size()}, ScalarType::Float);
}

// Without any token a state is passed on; an absent one is `absent`.
inline void pass_state(const Tensor& to, const MaybeTensor& from, double absent = 0.0) {
  Tensor target = to;
  from ? torch::stable::copy_(target, *from) : torch::stable::fill_(target, absent);
}

}  // namespace flowattn
