// Device code of prefix_attention: a scan of two scalars (m, u) per head over the scores, and a convex recurrence,
//   o_t = a_t o_{t-1} + g_t v_t,  a_t = u_{t-1} exp(m_{t-1} - m_t) / u_t,  g_t = exp(s_t - m_t) / u_t.
// The scalars of a tile take a thread each; the threads of a group then read a and g of their tokens in shared memory.
// The factor over several tokens is taken from (m, u) at their ends: a product of many a would add up their roundings.
#pragma once

#include "cuda/scan_states.cuh"

namespace flowattn {

struct PrefixAttentionArgs {
  ScanShape shape;
  ScanSequences sequences;
  ScanLookBack look_back;
  bool float_scores;
  ScanTensor scores, values, mask, out, m, u, lse;
  ScanState m0, u0, w0, m_final, u_final, w_final;

  // Backward; u_final is an input of it. With several column blocks dscores and du0 are sums of theirs, which a second
  // kernel adds up: (column_blocks, rows, tokens, heads) and (column_blocks, states, heads), contiguous.
  ScanTensor dout, dlse, dvalues;
  void* dscores;
  bool float_dscores;
  ScanState du_final, dw_final, dw0;
  float* du0;
};

constexpr int kPrefixFwdTokens = 8, kPrefixBwdTokens = 4;
constexpr float kNothing = -__builtin_huge_valf();

// The sum u exp(m) over some tokens. With `cut`, what stands before them does not count.
struct Sums {
  float m, u;
  bool cut;
};

// exp(from - to) for gauges from <= to; a gauge of -inf stands for nothing summed.
__device__ inline float rescale(float from, float to) { return from == kNothing ? 0.0f : fast_exp(from - to); }

// Without branches: every token's thread calls it several times. A NaN in either u stays.
__device__ inline Sums merge(const Sums& a, const Sums& b) {
  const float before = b.cut ? kNothing : a.m, sum = b.cut ? 0.0f : a.u;
  const float rise = before == b.m ? 0.0f : b.m - before;  // equal infinities
  const bool rises = rise > 0.0f;
  const float factor = fast_exp(-fabsf(rise));
  return {rises ? b.m : before, fmaf(rises ? sum : b.u, factor, rises ? b.u : sum), a.cut || b.cut};
}

__device__ inline Sums of_lane_before(const Sums& sums, int by) {
  return {__shfl_up_sync(kWholeWarp, sums.m, by), __shfl_up_sync(kWholeWarp, sums.u, by),
          __shfl_up_sync(kWholeWarp, static_cast<int>(sums.cut), by) != 0};
}

// Inclusive scan over the first `count` lanes' values, for every lane.
__device__ inline Sums warp_scan(Sums sums, int count) {
  const int lane = threadIdx.x % kWarp;
  for (int by = 1; by < count; by *= 2) {
    const Sums before = of_lane_before(sums, by);
    if (lane >= by) sums = merge(before, sums);
  }
  return sums;
}

// A score, -inf where the token is masked or outside.
template <class S>
__device__ inline float load_score(const PrefixAttentionArgs& args, int64_t row, int head, int64_t t, int code) {
  if (code & kOutside) return kNothing;
  if (args.mask.data && !static_cast<const bool*>(args.mask.data)[scalar_at(args.mask, row, t, head)]) return kNothing;
  return load_scalar<S>(args.scores.data, scalar_at(args.scores, row, t, head), args.float_scores);
}

struct alignas(16) PrefixToken {
  float a, g, u;  // g < 0: masked
  int code;
};

// What a sequence starts from, columns of w0 / u0. Rare, so not in line.
template <int V>
__device__ __noinline__ Floats<V> initial_mean(const ScanState& w0, const ScanState& u0, int head, int column,
                                               int state) {
  const float u = static_cast<const float*>(u0.data)[state * u0.row + head * u0.head];
  Floats<V> mean = load<V>(static_cast<const float*>(w0.data) + state * w0.row + head * w0.head + column);
#pragma unroll
  for (int e = 0; e < V; ++e) mean[e] = u == 0.0f ? 0.0f : mean[e] / u;
  return mean;
}

// The mean over what stands before a tile and some of its tokens: which share of it each of the two has.
struct Shares {
  float before, tokens;
  bool open;  // else what stands before does not count, whatever its mean is

  __device__ Shares(const Sums& carry, const Sums& sums) : before(0.0f), tokens(1.0f), open(!sums.cut) {
    if (!open) return;
    const Sums both = merge(carry, sums);
    const float inverse = both.u == 0.0f ? 0.0f : fast_inverse(both.u);
    before = carry.u == 0.0f ? 0.0f : carry.u * rescale(carry.m, both.m) * inverse;
    tokens = sums.u == 0.0f ? 0.0f : sums.u * rescale(sums.m, both.m) * inverse;
  }
  __device__ float mean(float of_before, float of_tokens) const {
    return open ? fmaf(before, of_before, tokens * of_tokens) : of_tokens;
  }
};

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads, 4)
    prefix_attention_fwd_kernel(const __grid_constant__ PrefixAttentionArgs args) {
  constexpr int N = kPrefixFwdTokens;
  typedef WarpMaps<V, 0, false, float> Maps;
  __shared__ Maps maps;
  __shared__ PrefixToken tokens[kScanTile];
  __shared__ Sums sums_at[kScanTile + 1];  // before the tile and after each of its tokens; cut: since the tile began
  __shared__ Sums warp_sums[kScanWarps];
  __shared__ float means[kScanColumns];  // before the tile
  __shared__ Sums found;
  __shared__ TokenBits special;
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  const ScanLookBack& look_back = args.look_back;
  ScanRun run(shape, look_back);
  const ScanThread<V, N> me(shape, run.line);
  const int thread = threadIdx.x, columns = shape.columns, lane = thread % kWarp, warp = thread / kWarp;
  const bool owns_scalars = me.column_block == 0;
  // What stands before the tile; `mean` of column `thread`.
  Sums carry{kNothing, 0.0f, false};
  float mean = 0.0f;

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> values[N];
    const auto load_values = [&] {
      RowWalk<const S> value(me, args.values, shape, mine);
#pragma unroll
      for (int n = 0; n < N; value.pass(n++)) values[n] = load_pack<S, V>(value.row);
    };
    load_values();
    prefetch_next<S, V, N>(args.values, shape, look_back, run);
    each_empty_sequence(args.sequences, run.tile * me.groups + me.group, shape.tiles * me.groups, [&](int s) {
      const bool given = args.sequences.initial;
      if (me.active) {
        store(me.at(args.w_final, s) + me.column, given ? load<V>(me.at(args.w0, s) + me.column) : splat<V>(0.0f));
      }
      if (me.lane == 0 && owns_scalars) {
        *me.at(args.m_final, s) = given ? *me.at(args.m0, s) : kNothing;
        *me.at(args.u_final, s) = given ? *me.at(args.u0, s) : 0.0f;
      }
    });

    // The scalars, a token a thread: `local` sums from the start of the tile, `previous` those of the token before.
    const int64_t position = first + thread, t = token_at(shape, position);
    const bool has_token = thread < shape.tile && position < shape.tokens;
    const int code = has_token ? token_code(args.sequences, me.row, t, shape.tokens) : kOutside | kFirst | kLast;
    const float score = load_score<S>(args, me.row, me.head, t, code);
    Sums start{kNothing, 0.0f, true};
    if (code & kInitial) {
      const float u = *me.at(args.u0, state_of(code));
      if (u != 0.0f) start = {*me.at(args.m0, state_of(code)), u, true};  // else nothing was summed, whatever m says
    }
    special.set(score == kNothing || code & (kFirst | kFinal | kOutside));
    // A score of +inf is a NaN too.
    Sums local{score, score == kNothing ? 0.0f : 1.0f + (score - score), false};
    if (code & kFirst) local = merge(start, local), local.cut = true;
    local = warp_scan(local, kWarp);
    if (lane == kWarp - 1) warp_sums[warp] = local;
    Sums previous = of_lane_before(local, 1);
    if (lane == 0) previous = {kNothing, 0.0f, false};
    __syncthreads();
    if (warp > 0) {
      const Sums all = warp_scan(lane < kScanWarps ? warp_sums[lane] : Sums{kNothing, 0.0f, false}, kScanWarps);
      const Sums before{__shfl_sync(kWholeWarp, all.m, warp - 1), __shfl_sync(kWholeWarp, all.u, warp - 1),
                        __shfl_sync(kWholeWarp, static_cast<int>(all.cut), warp - 1) != 0};
      local = merge(before, local), previous = merge(before, previous);
    }
    const bool looks_back = look_back.used() && run.tile > 0;
    if (thread < shape.tile) {
      const Sums sums = merge(carry, local), kept = code & kFirst ? start : merge(carry, previous);
      const float inverse = fast_inverse(sums.u);
      const float a = kept.u * rescale(kept.m, sums.m) * inverse;
      const float g = score == kNothing ? -1.0f : fast_exp(score - sums.m) * inverse;
      tokens[thread] = {a, g, sums.u, code}, sums_at[thread + 1] = {sums.m, sums.u, local.cut};
    }
    if (thread == 0) sums_at[0] = {carry.m, carry.u, false};
    __syncthreads();

    // `plain`: no token of the warp is special.
    const auto step = [&](auto plain, int n, const PrefixToken& token, float (&o)[V]) {
      if constexpr (!plain) {
        if (token.code & kFirst) {
          Floats<V> from = splat<V>(0.0f);
          if (token.code & kInitial) {
            from = initial_mean<V>(args.w0, args.u0, me.head, me.column, state_of(token.code));
          }
#pragma unroll
          for (int e = 0; e < V; ++e) o[e] = from[e];
        }
        if (token.g < 0.0f) return;
      }
      const Floats<V> v = floats(values[n]);
#pragma unroll
      for (int e = 0; e < V; ++e) o[e] = fmaf(token.a, o[e], token.g * v[e]);
    };

    typename Maps::Map map = Maps::Map::identity();
    const int begin = me.group * N;
    const bool is_plain = !special.any_in_warp<N>(begin);
    if (is_plain) {
#pragma unroll
      for (int n = 0; n < N; ++n) step(std::true_type{}, n, tokens[begin + n], map.b);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const PrefixToken token = tokens[begin + n];
        step(std::false_type{}, n, token, map.b);
        map.cut |= (token.code & kFirst) != 0;
      }
    }
    const Sums newest = sums_at[begin + N], oldest = sums_at[begin];
    map.a[0] = newest.u == 0.0f ? 1.0f : oldest.u * rescale(oldest.m, newest.m) * fast_inverse(newest.u);
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();

    const Sums tile = sums_at[shape.tile];
    if (!look_back.used()) {
      if (thread < columns) mean = maps.pass(thread, columns, mean);
      carry = {tile.m, tile.u, false};
    } else {
      const int number = run.tile / look_back.block, index = run.tile % look_back.block;
      const bool ends_block = index == look_back.block - 1;
      // Entries: the state before this block of tiles, then the tiles of the block before this one.
      const int size = look_back.tile_words, states = number > 0, entries = states + index;
      float tile_mean = 0.0f;
      if (thread < columns) {
        tile_mean = maps.pass(thread, columns, 0.0f);
        if (!ends_block) {
          Word* to = published(shape, look_back, run, words);
          publish(to + 2 + thread, word_of(tile_mean));
          if (thread == 0) publish(to, word_of(tile.m, tile.cut)), publish(to + 1, word_of(tile.u));
        }
      }
      fetch_tiles(shape, look_back, run, index, words, words + states * size);
      if (looks_back) {
        if (states) fetch(look_back.state(shape, run.line, number - 1), size, words);
        __syncthreads();
        if (warp * kWarp < columns) {  // each of these warps finds the sums of all entries, a lane each
          Sums entry{kNothing, 0.0f, false};
          if (lane < entries) {
            read_word(words[lane * size], entry.m), read_word(words[lane * size + 1], entry.u);
            entry.cut = words[lane * size] & kCut;
          }
          const unsigned cuts = __ballot_sync(kWholeWarp, entry.cut);
          const bool counts = lane < entries && (cuts >> lane) <= 1u;  // no cut after it
          float m = counts ? entry.m : kNothing;
          for (int by = kWarp / 2; by > 0; by /= 2) {
            const float other = __shfl_xor_sync(kWholeWarp, m, by);
            m = other > m ? other : m;
          }
          m = __shfl_sync(kWholeWarp, m, 0);
          const float term = counts ? entry.u * rescale(entry.m, m) : 0.0f;
          const float u = group_sum(term, kWarp);
          const float weight = !counts ? -1.0f : u == 0.0f ? 0.0f : term / u;
          carry = {m, u, false};
          for (int at = 0; at < entries; ++at) {
            const float share = __shfl_sync(kWholeWarp, weight, at);
            float x = 0.0f;
            if (thread < columns) read_word(words[at * size + 2 + thread], x);
            if (!(share < 0.0f)) mean = fmaf(share, x, mean);
          }
          if (thread < columns) means[thread] = mean;
          if (thread == 0) found = carry;
        }
      }
      if (ends_block && thread < columns) {
        Word* to = look_back.state(shape, run.line, number);
        const Sums both = merge(carry, tile);
        publish(to + 2 + thread, word_of(Shares(carry, tile).mean(mean, tile_mean)));
        if (thread == 0) publish(to, word_of(both.m)), publish(to + 1, word_of(both.u));
      }
    }
    __syncthreads();
    float o[V];
    maps.before(o, before, shape.lanes);
    load_values();  // from the cache: registers that kept them would be taken from other blocks
    Sums sums = sums_at[min(thread, shape.tile - 1) + 1];
    if (looks_back) {
      if (thread < shape.tile && !sums.cut) {  // behind a cut nothing before the tile counts
        PrefixToken token = tokens[thread];
        const Sums own = sums, kept = merge(found, sums_at[thread]);
        sums = merge(found, own);
        const float inverse = fast_inverse(sums.u);
        token.a = kept.u * rescale(kept.m, sums.m) * inverse, token.u = sums.u;
        if (!(token.g < 0.0f)) token.g *= own.u * rescale(own.m, sums.m) * inverse;
        tokens[thread] = token;
      }
      const Shares shares(found, sums_at[begin]);
#pragma unroll
      for (int e = 0; e < V; ++e) o[e] = shares.mean(means[me.offset + e], o[e]);
      __syncthreads();
    }

    if (thread < shape.tile && first + thread < shape.tokens && owns_scalars) {
      const int64_t t = token_at(shape, first + thread);
      const int code = tokens[thread].code;
      if (args.m.data) {
        const int64_t at = scalar_at(args.m, me.row, t, me.head);
        static_cast<float*>(args.m.data)[at] = sums.m, static_cast<float*>(args.u.data)[at] = sums.u;
      }
      if (args.lse.data) {
        static_cast<float*>(args.lse.data)[scalar_at(args.lse, me.row, t, me.head)] = sums.m + logf(sums.u);
      }
      if (code & kFinal) {
        *me.at(args.m_final, state_of(code)) = sums.m, *me.at(args.u_final, state_of(code)) = sums.u;
      }
    }
    RowWalk<S> out(me, args.out, shape, mine);
    const auto write = [&](auto plain) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const PrefixToken token = tokens[begin + n];
        step(plain, n, token, o);
        Floats<V> result;
#pragma unroll
        for (int e = 0; e < V; ++e) result[e] = o[e];
        if constexpr (plain) {
          if (me.active) store(out.row, result);
          out.row += out.step;
        } else {
          if (me.active && out.inside(n)) {
            store(out.row, result);
            if (token.code & kFinal) {
#pragma unroll
              for (int e = 0; e < V; ++e) result[e] *= token.u;
              store(me.at(args.w_final, state_of(token.code)) + me.column, result);
            }
          }
          out.pass(n);
        }
      }
    };
    if (is_plain) {
      write(std::true_type{});
    } else {
      write(std::false_type{});
    }
    __syncthreads();  // the next tile writes to tokens and maps
  }
  leave_cluster(look_back);
}

}  // namespace flowattn
