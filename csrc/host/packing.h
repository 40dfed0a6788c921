// Packing of sequences into batches of a token budget, before any tensor exists.
#pragma once

#include <cstdint>
#include <vector>

namespace flowattn::host {

// Best-fit decreasing bin packing: the sequences in order of decreasing length (equal ones as they come) each go to the
// bin with the least room that still holds them (of equal ones the last filled), or open a new bin.
//
// Writes the n sequence indices to `order`, bin after bin, each bin in the order it was filled, and returns where each
// bin starts in it: bin i is order[offsets[i]] .. order[offsets[i + 1]]. Bins are numbered as they were opened.
// O(n + capacity) time and memory for capacities up to 2^20, else O(n log n).
// Throws std::invalid_argument (ValueError) for a capacity below 1 and for lengths outside 0 .. capacity.
std::vector<int64_t> pack_sequences(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* order);

}  // namespace flowattn::host
