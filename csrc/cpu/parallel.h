// Dynamic distribution of uneven work items over torch's CPU threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace flowattn {

// Calls run(begin, end, scratch) until 0..items is covered; each thread pulls the next few items when it is done, so
// put the long ones first. `scratch` is scratch_bytes of uninitialised memory of the calling thread, 64-byte aligned.
// `work` is the total in multiply-adds: below kMinWork a thread does not pay for being woken.
template <typename Run>
void parallel_items(int64_t items, double work, int64_t scratch_bytes, const Run& run) {
  constexpr double kMinWork = 1 << 17;
  if (items == 0) return;
  int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), items, int64_t(work / kMinWork) + 1});
  int64_t chunk = std::clamp<int64_t>(items / (threads * 32), 1, 64);
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  auto scratch = torch::stable::empty({threads * scratch_bytes}, torch::headeronly::ScalarType::Byte);
  auto* base = static_cast<std::byte*>(scratch.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < items;) {
        run(begin, std::min(begin + chunk, items), base + thread * scratch_bytes);
      }
    }
  });
}

}  // namespace flowattn
