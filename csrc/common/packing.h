// Facts that pack_plan's CPU and CUDA kernels, and every kernel that reads its tile list, must share. No torch here.
// python/flowattn/reference/packing.py says the same.
#pragma once

#include <cstdint>

namespace flowattn {

constexpr int kTile = 128;  // query rows of one entry of the tile list

// What pack_plan's `source` holds.
enum PlanKind : int { kMask = 0, kLengths = 1, kCuSeqlens = 2 };

// The tile list is sorted by counting: sequence lengths in units of 2^plan_shift fall into this many buckets.
constexpr int kPlanBuckets = 256;

constexpr int plan_shift(int64_t padded_len) {
  int shift = 0;
  while ((padded_len >> shift) >= kPlanBuckets) ++shift;
  return shift;
}

constexpr int tiles_of(int length) { return length / kTile + (length % kTile != 0); }

// Most entries a tile list can need: every sequence may end in a partial tile, and so may the unused tail.
constexpr int64_t tile_capacity(int64_t capacity, int64_t batch) { return capacity / kTile + batch + 1; }

// One entry of the tile list: rows start + row .. start + min(row + kTile, length) of the packed tensor.
struct alignas(16) Tile {
  int sequence, row, start, length;
};

}  // namespace flowattn
