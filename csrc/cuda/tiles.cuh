// Where a block's tile lies in a packed batch, and which keys its rows see: the CUDA twin of
// triton_kernels/intervals.py.
#pragma once

#include <cstdint>

#include "common/packing.h"

namespace flowattn {

struct Span {
  int start, length;
};

struct TilePlace {
  int sequence, row, start, length;  // row: first row of the tile within the sequence
};

// Start of sequence b, clamped so that no offset, however wrong, leaves the tensor.
__device__ inline int bounded_start(const int* cu_seqlens, int b, int total) {
  return min(max(cu_seqlens[b], 0), total);
}

// Rows of sequence b; the unused tail, b = batch, holds `tail` ? everything behind the last sequence : nothing.
__device__ inline Span sequence_span(const int* cu_seqlens, int b, int batch, int total, bool tail) {
  const int start = bounded_start(cu_seqlens, b, total);
  const int end = b < batch ? bounded_start(cu_seqlens, b + 1, total) : tail ? total : start;
  return {start, max(end - start, 0)};
}

// A slot is an entry of the plan's tile list, or without one the slot-th tile of the batch, where sequence b owns the
// slots from start_b / kTile + b on: at least as many as it has tiles.
__device__ inline TilePlace locate_tile(int slot, const Tile* tiles, const int* cu_seqlens, int batch, int total) {
  if (tiles != nullptr) {
    const Tile tile = tiles[slot];
    const int start = min(max(tile.start, 0), total);
    return {tile.sequence, max(tile.row, 0), start, min(max(tile.length, 0), total - start)};
  }
  int low = 0, high = batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (bounded_start(cu_seqlens, middle, total) / kTile + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Span span = sequence_span(cu_seqlens, low, batch, total, true);
  return {low, max(slot - span.start / kTile - low, 0) * kTile, span.start, span.length};
}

// Mask of a call: row i sees the keys [first(i), last(i)). Windows are -1 where unbounded.
struct KeyWindow {
  int keys, shift, left, right;
  __device__ int first(int row) const { return left < 0 ? 0 : max(row + shift - left, 0); }
  __device__ int last(int row) const { return right < 0 ? keys : min(max(row + shift + right + 1, 0), keys); }
};

}  // namespace flowattn
