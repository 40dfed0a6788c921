// Philox4x32-10 (Salmon et al., 2011) and the mapping from attention scores to its words. No torch here.
// python/flowattn/reference/dropout.py says the same.
#pragma once

#include <cstdint>

// Internal linkage: a *_kernel.cpp is compiled once per instruction set, and the copies must not share one function.
#if defined(__CUDACC__)
#  define FA_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#  define FA_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace flowattn {

struct PhiloxWords {
  uint32_t x, y, z, w;
};

struct PhiloxKey {
  uint32_t low, high;
};

// The ten rounds: a bijection of the counter, chosen by the key.
FA_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords c, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x, b = uint64_t(0xCD9E8D57u) * c.z;
    c = {uint32_t(b >> 32) ^ c.y ^ key.low, uint32_t(b), uint32_t(a >> 32) ^ c.w ^ key.high, uint32_t(a)};
    key.low += 0x9E3779B9u, key.high += 0xBB67AE85u;
  }
  return c;
}

// Dropout of the probability of query i for key j, both counted from the start of sequence b, in head h of `heads`:
// word j % 4 of the counter below decides, and the probability is kept where the word is >= dropout_threshold(p).
// The key is the seed, `offset` the low half of the second number drawn.
FA_HOST_DEVICE PhiloxWords dropout_words(uint32_t j_div_4, uint32_t i, uint32_t b_times_heads_plus_h, uint32_t offset,
                                         PhiloxKey seed) {
  return philox4x32({j_div_4, i, b_times_heads_plus_h, offset}, seed);
}

// p * 2^32, rounded to nearest: a word is below it with probability p.
FA_HOST_DEVICE uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 0xFFFFFFFFu : uint32_t(scaled);
}

}  // namespace flowattn
