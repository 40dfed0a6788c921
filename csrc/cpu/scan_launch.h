// What the launchers of the scans share: checks, segments, and the choice between threads over rows and over chunks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"

namespace flowattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks device, dtype, shape and, with `row`, that the last dim is contiguous.
inline void check_scan_tensor(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                              std::initializer_list<int64_t> shape, bool row) {
  const auto rule = [&](const std::string& what) { return std::string(name) + " must have " + what; };
  FA_CHECK(x.is_cpu(), op, std::string(name) + " must be on the CPU", "another device");
  FA_CHECK(x.scalar_type() == dtype, op, rule(std::string("dtype ") + toString(dtype)), toString(x.scalar_type()));
  const auto sizes = x.sizes();
  const bool fits = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  FA_CHECK(fits, op, rule("shape " + shape_text(shape)), shape_text(sizes));
  const int64_t last = x.dim() - 1;
  FA_CHECK(!row || x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, op, rule("a contiguous last dim"),
           "stride " + std::to_string(x.stride(last)));
}

// (B, T, H, ...) and (S, H, ...) as the kernels see them.
inline ScanTensor scan_tensor(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
inline ScanState scan_state(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
inline ScanTensor scan_tensor(const std::optional<Tensor>& x) { return x ? scan_tensor(*x) : ScanTensor{}; }
inline ScanState scan_state(const std::optional<Tensor>& x) { return x ? scan_state(*x) : ScanState{}; }

// The sequences of a call, cut at resets. Sequence s has state row s.
struct ScanSegments {
  std::vector<ScanSegment> list;                  // longest first, so that the threads finish together
  std::vector<int64_t> empty;                     // sequences without a token
  int64_t states, used, chunks = 0, longest = 0;  // used: rows that belong to a sequence

  ScanSegments(const char* op, int64_t batch, int64_t tokens, const std::optional<Tensor>& cu_seqlens,
               const std::optional<Tensor>& reset, bool reverse, bool initial)
      : states(batch), used(tokens), initial_(initial) {
    if (reset) check_scan_tensor(op, "reset", *reset, ScalarType::Bool, {batch, tokens}, false);
    if (!cu_seqlens) {
      for (int64_t b = 0; b < batch; ++b) add_sequence(b, b, 0, tokens, reset, reverse);
    } else {
      FA_CHECK(batch == 1, op, "packed tensors must have batch size 1", batch);
      const Tensor cu = torch::stable::contiguous(*cu_seqlens);
      const bool fits = cu.is_cpu() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) >= 1;
      FA_CHECK(fits, op, "cu_seqlens must be an int32 CPU tensor of shape (S+1,)", shape_text(cu.sizes()));
      const int32_t* ends = cu.const_data_ptr<int32_t>();
      states = cu.size(0) - 1, used = ends[states];
      for (int64_t s = 0; s <= states; ++s) {
        const bool good = s == 0 ? ends[0] == 0 : ends[s] >= ends[s - 1] && ends[s] <= tokens;
        FA_CHECK(good, op,
                 "cu_seqlens must start at 0, never decrease and end at or before the " + std::to_string(tokens) +
                     " packed rows",
                 std::to_string(ends[s]) + " at position " + std::to_string(s));
      }
      for (int64_t s = 0; s < states; ++s) add_sequence(0, s, ends[s], ends[s + 1], reset, reverse);
    }
    std::stable_sort(list.begin(), list.end(),
                     [](const ScanSegment& a, const ScanSegment& b) { return a.length > b.length; });
    for (ScanSegment& segment : list) {
      segment.part = chunks;
      chunks += (segment.length + kScanChunk - 1) / kScanChunk;
    }
    longest = list.empty() ? 0 : list[0].length;
  }

  int64_t total() const {
    int64_t tokens = 0;
    for (const ScanSegment& segment : list) tokens += segment.length;
    return tokens;
  }

 private:
  // A token with reset forgets everything before it, the initial state too.
  void add_sequence(int64_t row, int64_t state, int64_t begin, int64_t end, const std::optional<Tensor>& reset,
                    bool reverse) {
    if (begin == end) empty.push_back(state);
    const int64_t step = reverse ? -1 : 1, length = end - begin, first = reverse ? end - 1 : begin;
    const bool* flags = reset ? static_cast<const bool*>(reset->data_ptr()) + row * reset->stride(0) : nullptr;
    const auto resets = [&](int64_t i) { return flags && flags[(first + i * step) * reset->stride(1)]; };
    for (int64_t from = 0; from < length;) {
      int64_t to = from + 1;
      while (to < length && !resets(to)) ++to;
      list.push_back(
          {row, first + from * step, to - from, step, state, initial_ && from == 0 && !resets(0), to == length, 0});
      from = to;
    }
  }

  const bool initial_;  // whether the call has an initial state
};

// Clears what no segment writes: rows from `first` on of a contiguous (1, T, ...) tensor.
inline void clear_rows(const Tensor& x, int64_t first) {
  if (x.numel() == 0 || first == x.size(1)) return;
  const int64_t row_bytes = x.numel() / x.size(1) * x.element_size();
  std::memset(static_cast<char*>(x.data_ptr()) + first * row_bytes, 0, (x.size(1) - first) * row_bytes);
}

// Sequences without a token pass their state on; absent states are 0. `to` is contiguous.
inline void pass_states(const Tensor& to, const std::optional<Tensor>& from, const std::vector<int64_t>& empty) {
  for (int64_t state : empty) {
    Tensor target = torch::stable::select(to, 0, state);
    from ? torch::stable::copy_(target, torch::stable::select(*from, 0, state)) : torch::stable::zero_(target);
  }
}

// Runs `pass(phase, task, carry, local, scratch)` over all segments. With enough segments and heads each item is a
// segment and some heads, and is walked once; else the items are chunks: their aggregates first, then the carries
// between them, then the results. Both add in the same order. `scratch_bytes(n)` is the memory a walk of n heads needs.
template <typename ScratchBytes, typename Pass>
void run_scan(const ScanSegments& segments, int64_t heads, double work, int64_t state_bytes,
              const ScratchBytes& scratch_bytes, const Pass& pass) {
  const std::vector<ScanSegment>& list = segments.list;
  if (list.empty() || heads == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), rows = list.size();
  const auto chunk = [](const ScanSegment& segment, int64_t begin, int64_t head_begin, int64_t head_end) {
    return ScanTask{&segment, begin, std::min(begin + kScanChunk, segment.length), head_begin, head_end};
  };
  const auto last = [](const ScanTask& task) { return task.end == task.segment->length; };

  if (segments.longest <= kScanChunk || 3 * rows * heads > threads) {
    // Few head groups keep the memory accesses of an item in one piece.
    const int64_t wanted = std::min(heads, (4 * threads + rows - 1) / rows);
    const int64_t per_group = (heads + wanted - 1) / wanted, groups = (heads + per_group - 1) / per_group;
    const int64_t states = per_group * state_bytes;
    parallel_items(rows * groups, work, 2 * states + scratch_bytes(per_group),
                   [&](int64_t begin, int64_t end, void* memory) {
                     auto* carry = static_cast<std::byte*>(memory);
                     std::byte *local = carry + states, *scratch = local + states;
                     for (int64_t item = begin; item < end; ++item) {
                       const ScanSegment& segment = list[item / groups];
                       const int64_t head = item % groups * per_group, head_end = std::min(head + per_group, heads);
                       pass(ScanPhase::kStart, chunk(segment, 0, head, head_end), carry, nullptr, scratch);
                       for (int64_t t = 0; t < segment.length; t += kScanChunk) {
                         const ScanTask task = chunk(segment, t, head, head_end);
                         pass(ScanPhase::kWalk, task, carry, last(task) ? nullptr : local, scratch);
                         if (!last(task)) pass(ScanPhase::kCombine, task, carry, local, scratch);
                       }
                     }
                   });
    return;
  }

  std::vector<ScanTask> tasks;  // a segment's chunks in order; the first is number segment.part
  for (const ScanSegment& segment : list) {
    for (int64_t t = 0; t < segment.length; t += kScanChunk) tasks.push_back(chunk(segment, t, 0, heads));
  }
  const int64_t count = tasks.size(), states = heads * state_bytes, scratch_size = scratch_bytes(heads);
  const Tensor memory = torch::stable::empty({2 * count * states}, ScalarType::Byte);
  auto* carries = static_cast<std::byte*>(memory.mutable_data_ptr());
  std::byte* locals = carries + count * states;
  const auto over = [&](int64_t items, double multiply_adds, const auto& run) {
    parallel_items(items, multiply_adds, scratch_size, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t i = begin; i < end; ++i) run(i, static_cast<std::byte*>(scratch));
    });
  };
  over(count, work, [&](int64_t i, std::byte* scratch) {
    if (!last(tasks[i])) pass(ScanPhase::kWalk, tasks[i], nullptr, locals + i * states, scratch);
  });
  over(rows, double(count) * states, [&](int64_t row, std::byte* scratch) {
    int64_t i = list[row].part;
    std::byte* carry = carries + i * states;
    pass(ScanPhase::kStart, tasks[i], carry, nullptr, scratch);
    for (; !last(tasks[i]); ++i, carry += states) {
      std::memcpy(carry + states, carry, states);
      pass(ScanPhase::kCombine, tasks[i], carry + states, locals + i * states, scratch);
    }
  });
  over(count, work, [&](int64_t i, std::byte* scratch) {
    pass(ScanPhase::kWalk, tasks[i], carries + i * states, nullptr, scratch);
  });
}

}  // namespace flowattn
