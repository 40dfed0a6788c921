#include "packing.h"

#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace flowattn::host {
namespace {

constexpr int64_t kDenseCapacity = 1 << 20;  // tables with an entry per possible room stay within 8 MB

void require(bool condition, const std::string& rule, int64_t value) {
  if (!condition) throw std::invalid_argument("pack_sequences: " + rule + "; got " + std::to_string(value));
}

// Open bins by their room, which is at most kDenseCapacity: a stack of bins for each room, and a tree of bitmaps, where
// one bit says that 64 bits of the level below are not all 0, to find the next room in use in log64(capacity) steps.
class DenseRooms {
 public:
  explicit DenseRooms(int64_t capacity) : top_(capacity + 1, -1) {
    int64_t bits = capacity + 1;
    do {
      bits = (bits + 63) / 64;
      levels_.emplace_back(bits, 0);
    } while (bits > 1);
  }

  // The least room in use that is >= `at`, or -1.
  int64_t best(int64_t at) const {
    for (size_t level = 0; level < levels_.size(); ++level) {
      const size_t word = at / 64;
      if (word >= levels_[level].size()) return -1;
      const uint64_t bits = levels_[level][word] >> (at % 64);
      if (bits == 0) {
        at = static_cast<int64_t>(word) + 1;
        continue;
      }
      at += std::countr_zero(bits);
      while (level-- > 0) at = at * 64 + std::countr_zero(levels_[level][at]);
      return at;
    }
    return -1;
  }

  int64_t& top(int64_t room) { return top_[room]; }

  void use(int64_t room) {
    for (auto& level : levels_) {
      level[room / 64] |= uint64_t{1} << (room % 64);
      room /= 64;
    }
  }

  void leave(int64_t room) {
    for (auto& level : levels_) {
      level[room / 64] &= ~(uint64_t{1} << (room % 64));
      if (level[room / 64] != 0) return;
      room /= 64;
    }
  }

 private:
  std::vector<int64_t> top_;                   // last filled bin of each room, or -1
  std::vector<std::vector<uint64_t>> levels_;  // levels_[0] has one bit a room
};

// The same for any capacity.
class SparseRooms {
 public:
  int64_t best(int64_t at) const {
    const auto found = top_.lower_bound(at);
    return found == top_.end() ? -1 : found->first;
  }
  int64_t& top(int64_t room) { return top_.try_emplace(room, -1).first->second; }
  void use(int64_t) {}
  void leave(int64_t room) { top_.erase(room); }

 private:
  std::map<int64_t, int64_t> top_;
};

// Sequence indices by decreasing length, equal lengths in their order.
std::vector<int64_t> sorted(const int64_t* lengths, int64_t n, int64_t capacity) {
  std::vector<int64_t> order(n);
  if (capacity > kDenseCapacity) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    return order;
  }
  std::vector<int64_t> next(capacity + 1);
  for (int64_t i = 0; i < n; ++i) ++next[lengths[i]];
  int64_t before = 0;
  for (int64_t length = capacity; length >= 0; --length) before += std::exchange(next[length], before);
  for (int64_t i = 0; i < n; ++i) order[next[lengths[i]]++] = i;
  return order;
}

// The bin of each sequence; returns the number of bins.
template <class Rooms>
int64_t fill(const std::vector<int64_t>& order, const int64_t* lengths, int64_t capacity, Rooms rooms, int64_t* bins) {
  std::vector<int64_t> below;  // of each bin: the one under it on the stack of its room, or -1
  for (const int64_t i : order) {
    int64_t room = rooms.best(lengths[i]), bin;
    if (room < 0) {
      room = capacity;
      bin = static_cast<int64_t>(below.size());
      below.push_back(-1);
    } else {
      int64_t& top = rooms.top(room);
      bin = std::exchange(top, below[top]);
      if (top < 0) rooms.leave(room);
    }
    bins[i] = bin;
    room -= lengths[i];
    below[bin] = std::exchange(rooms.top(room), bin);
    rooms.use(room);
  }
  return static_cast<int64_t>(below.size());
}

}  // namespace

std::vector<int64_t> pack_sequences(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* order) {
  require(capacity >= 1, "capacity must be >= 1", capacity);
  for (int64_t i = 0; i < n; ++i) {
    require(lengths[i] >= 0, "lengths must be >= 0", lengths[i]);
    require(lengths[i] <= capacity, "no length may exceed capacity=" + std::to_string(capacity), lengths[i]);
  }
  const auto by_length = sorted(lengths, n, capacity);
  std::vector<int64_t> bins(n);
  const int64_t count = capacity > kDenseCapacity
                            ? fill(by_length, lengths, capacity, SparseRooms{}, bins.data())
                            : fill(by_length, lengths, capacity, DenseRooms(capacity), bins.data());
  std::vector<int64_t> offsets(count + 1);
  for (const int64_t bin : bins) ++offsets[bin + 1];
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  auto next = offsets;
  for (const int64_t i : by_length) order[next[bins[i]]++] = i;
  return offsets;
}

}  // namespace flowattn::host
