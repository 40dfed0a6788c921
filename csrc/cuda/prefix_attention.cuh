// Device code of prefix_attention: a scan of two scalars (m, u) per head over the scores, and a convex recurrence,
//   o_t = a_t o_{t-1} + g_t v_t,  a_t = u_{t-1} exp(m_{t-1} - m_t) / u_t,  g_t = exp(s_t - m_t) / u_t.
// The scalars of a tile take a thread each; the threads of a group then read a and g of their tokens in shared memory.
// The factor over several tokens is taken from (m, u) at their ends: a product of many a would add up their roundings.
//
// Backward, from the last token to the first: R_t = do_t + c_t, c_{t-1} = a_t R_t, and r alike with <do_t, o_t> -
// dlse_t;
//   dv_t = g_t R_t,  ds_t = g_t (<R_t, v_t> - r_t).
// Behind the last token c is u dw and -u du of the final state; before the first, c and -r are gradients of w0 and u0.
#pragma once

#include "cuda/scan.cuh"

namespace flowattn {

struct PrefixAttentionArgs {
  ScanShape shape;
  ScanSequences sequences;
  ScanLookBack look_back;
  bool float_scores;
  ScanTensor scores, values, mask, out, m, u;
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
__device__ inline float rescale(float from, float to) { return from == kNothing ? 0.0f : expf(from - to); }

__device__ inline Sums merge(const Sums& a, const Sums& b) {
  if (b.cut || a.m == kNothing) return {b.m, b.u, a.cut || b.cut};
  if (b.m == kNothing) return a;
  const bool rises = b.m > a.m;
  const float factor = expf(-fabsf(a.m - b.m));
  return {rises ? b.m : a.m, rises ? fmaf(a.u, factor, b.u) : fmaf(b.u, factor, a.u), a.cut};
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
  float a, g;  // g < 0: masked
  int code;
};

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads, 3)
    prefix_attention_fwd_kernel(const __grid_constant__ PrefixAttentionArgs args) {
  constexpr int N = kPrefixFwdTokens;
  typedef WarpMaps<V, 0, false, float> Maps;
  __shared__ Maps maps;
  __shared__ PrefixToken tokens[kScanTile];
  __shared__ float m_at[kScanTile + 1], u_at[kScanTile + 1];  // before the tile and after each of its tokens
  __shared__ bool open_at[kScanTile + 1];                     // whether what stands before the tile counts there
  __shared__ Sums warp_sums[kScanWarps];
  __shared__ float carry[kScanColumns], weights[kScanBlock];
  __shared__ Sums carry_sums;
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  const ScanLookBack& look_back = args.look_back;
  ScanRun run(shape, look_back);
  const ScanThread<V, N> me(shape, run.line);
  const int thread = threadIdx.x, columns = shape.columns;
  const bool owns_scalars = me.column_block == 0;
  if (thread < kScanColumns) carry[thread] = 0.0f;
  if (thread == 0) carry_sums = {kNothing, 0.0f, false};

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> values[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = load_pack<S, V>(me.template at<const S>(args.values, token_at(shape, mine + n)) + me.column);
    }
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

    // The scalars, a token a thread: `local` sums from the start of the tile.
    const int64_t position = first + thread, t = token_at(shape, position);
    const bool has_token = thread < shape.tile && position < shape.tokens;
    const int code = has_token ? token_code(args.sequences, me.row, t, shape.tokens) : kOutside | kFirst | kLast;
    const float score = load_score<S>(args, me.row, me.head, t, code);
    Sums start{kNothing, 0.0f, true};
    if (code & kInitial) {
      const float u = *me.at(args.u0, state_of(code));
      if (u != 0.0f) start = {*me.at(args.m0, state_of(code)), u, true};  // else nothing was summed, whatever m says
    }
    Sums local{score, score == kNothing ? 0.0f : expf(score - score), false};  // a score of +inf is a NaN too
    if (code & kFirst) local = merge(start, local), local.cut = true;
    local = warp_scan(local, kWarp);
    if (thread % kWarp == kWarp - 1) warp_sums[thread / kWarp] = local;
    __syncthreads();
    if (thread >= kWarp) {
      const int lane = thread % kWarp;
      const Sums all = warp_scan(lane < kScanWarps ? warp_sums[lane] : Sums{kNothing, 0.0f, false}, kScanWarps);
      const int from = thread / kWarp - 1;
      const Sums before{__shfl_sync(kWholeWarp, all.m, from), __shfl_sync(kWholeWarp, all.u, from),
                        __shfl_sync(kWholeWarp, static_cast<int>(all.cut), from) != 0};
      local = merge(before, local);
    }
    // Writes sums and weights of all tokens, given the sums before the tile. Two barriers.
    const auto weigh = [&](const Sums& before) {
      const Sums sums = merge(before, local);
      if (thread < shape.tile) m_at[thread + 1] = sums.m, u_at[thread + 1] = sums.u, open_at[thread + 1] = !local.cut;
      if (thread == 0) m_at[0] = before.m, u_at[0] = before.u, open_at[0] = true;
      __syncthreads();
      if (thread < shape.tile) {
        const Sums kept = code & kFirst ? start : Sums{m_at[thread], u_at[thread], false};
        const float inverse = 1.0f / sums.u;
        const float a = kept.u * rescale(kept.m, sums.m) * inverse;
        tokens[thread] = {a, score == kNothing ? -1.0f : expf(score - sums.m) * inverse, code};
      }
      __syncthreads();
      return sums;
    };
    const bool looks_back = look_back.ticket && run.tile > 0;
    Sums sums = weigh(looks_back ? Sums{kNothing, 0.0f, false} : carry_sums);

    const auto step = [&](int n, const PrefixToken& token, float (&o)[V]) {
      if (token.code & kFirst) {
#pragma unroll
        for (int e = 0; e < V; ++e) o[e] = 0.0f;
        if (token.code & kInitial) {
          const float u = *me.at(args.u0, state_of(token.code));
          const Floats<V> w = load<V>(me.at(args.w0, state_of(token.code)) + me.column);
#pragma unroll
          for (int e = 0; e < V; ++e) o[e] = u == 0.0f ? 0.0f : w[e] / u;
        }
      }
      if (token.g < 0.0f) return;
      const Floats<V> v = floats(values[n]);
#pragma unroll
      for (int e = 0; e < V; ++e) o[e] = fmaf(token.a, o[e], token.g * v[e]);
    };

    typename Maps::Map map = Maps::Map::identity();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const PrefixToken token = tokens[me.group * N + n];
      step(n, token, map.b);
      map.cut |= (token.code & kFirst) != 0;
    }
    const int begin = me.group * N, end = begin + N;
    map.a[0] = u_at[end] == 0.0f ? 1.0f : u_at[begin] * rescale(m_at[begin], m_at[end]) / u_at[end];
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();

    float o[V];
#pragma unroll
    for (int e = 0; e < V; ++e) o[e] = carry[me.offset + e];
    maps.advance(o, before, shape.lanes);
    if (look_back.ticket) {
      const int number = run.tile / look_back.block, index = run.tile % look_back.block;
      const bool ends_block = index == look_back.block - 1;
      const Sums tile{m_at[shape.tile], u_at[shape.tile], !open_at[shape.tile]};
      const Sums own{m_at[begin], u_at[begin], !open_at[begin]};  // before this group, from the start of the tile
      if (!ends_block && thread < columns) {
        Word* to = look_back.tile(shape, run.line, run.tile);
        publish(to + 2 + thread, word_of(maps.after(thread, 0.0f)));
        if (thread == 0) publish(to, word_of(tile.m, tile.cut)), publish(to + 1, word_of(tile.u));
      }
      if (looks_back) {
        // Entries: the state before this block of tiles, then the tiles of the block before this one.
        const int size = look_back.tile_words, states = number > 0, entries = states + index;
        fetch(look_back.tile(shape, run.line, run.tile - index), index * size, words + states * size);
        if (states) fetch(look_back.state(shape, run.line, number - 1), size, words);
        __syncthreads();
        if (thread < kWarp) {
          Sums entry{kNothing, 0.0f, false};
          if (thread < entries) {
            read_word(words[thread * size], entry.m), read_word(words[thread * size + 1], entry.u);
            entry.cut = words[thread * size] & kCut;
          }
          const unsigned cuts = __ballot_sync(kWholeWarp, entry.cut);
          const bool counts = thread < entries && (cuts >> thread) <= 1u;  // no cut after it
          float m = counts ? entry.m : kNothing;
          for (int by = kWarp / 2; by > 0; by /= 2) {
            const float other = __shfl_xor_sync(kWholeWarp, m, by);
            m = other > m ? other : m;
          }
          m = __shfl_sync(kWholeWarp, m, 0);
          const float term = counts ? entry.u * rescale(entry.m, m) : 0.0f;
          const float u = group_sum(term, kWarp);
          weights[thread] = !counts ? -1.0f : u == 0.0f ? 0.0f : term / u;
          if (thread == 0) carry_sums = {m, u, cuts != 0};
        }
        __syncthreads();
        if (thread < columns) {
          float sum = 0.0f;
          for (int entry = 0; entry < entries; ++entry) {
            float x;
            read_word(words[entry * size + 2 + thread], x);
            if (!(weights[entry] < 0.0f)) sum = fmaf(weights[entry], x, sum);
          }
          carry[thread] = sum;
        }
        __syncthreads();
      }
      // The state after `tokens` of the tile: the mean of what stands before the tile and of the tokens, by weight.
      const auto mix = [&](const Sums& sums, float from_tile, float from_carry) {
        if (sums.cut) return from_tile;
        const Sums both = merge(carry_sums, sums);
        if (both.u == 0.0f) return 0.0f;
        float mean = sums.u == 0.0f ? 0.0f : sums.u * rescale(sums.m, both.m) / both.u * from_tile;
        if (carry_sums.u != 0.0f) mean = fmaf(carry_sums.u * rescale(carry_sums.m, both.m) / both.u, from_carry, mean);
        return mean;
      };
      if (ends_block && thread < columns) {
        Word* to = look_back.state(shape, run.line, number);
        const Sums both = merge(carry_sums, tile);
        publish(to + 2 + thread, word_of(mix(tile, maps.after(thread, 0.0f), carry[thread])));
        if (thread == 0) publish(to, word_of(both.m)), publish(to + 1, word_of(both.u));
      }
      if (looks_back) {
        sums = weigh(carry_sums);
#pragma unroll
        for (int e = 0; e < V; ++e) o[e] = mix(own, o[e], carry[me.offset + e]);
      }
    }

    if (has_token && owns_scalars) {
      if (args.m.data) {
        const int64_t at = scalar_at(args.m, me.row, t, me.head);
        static_cast<float*>(args.m.data)[at] = sums.m, static_cast<float*>(args.u.data)[at] = sums.u;
      }
      if (code & kFinal) {
        *me.at(args.m_final, state_of(code)) = sums.m, *me.at(args.u_final, state_of(code)) = sums.u;
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const PrefixToken token = tokens[begin + n];
      forget_floats(values[n]);
      step(n, token, o);
      if (!me.active || mine + n >= shape.tokens) continue;
      Floats<V> result;
#pragma unroll
      for (int e = 0; e < V; ++e) result[e] = o[e];
      store(me.template at<S>(args.out, token_at(shape, mine + n)) + me.column, result);
      if (token.code & kFinal) {
        const float u = u_at[begin + n + 1];
#pragma unroll
        for (int e = 0; e < V; ++e) result[e] *= u;
        store(me.at(args.w_final, state_of(token.code)) + me.column, result);
      }
    }
    if (run.tile + 1 < run.end) {
      __syncthreads();
      if (thread < columns) carry[thread] = maps.after(thread, carry[thread]);
      if (thread == 0) carry_sums = {m_at[shape.tile], u_at[shape.tile], false};
      __syncthreads();
    }
  }
}

// The scalars of a token in the backward.
struct alignas(16) PrefixBwdToken {
  float a, g, dlse;  // g < 0: masked
  int code;
};

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads, 2)
    prefix_attention_bwd_kernel(const __grid_constant__ PrefixAttentionArgs args) {
  constexpr int N = kPrefixBwdTokens;
  typedef WarpMaps<V, 1, false, float> Maps;
  __shared__ Maps maps;
  __shared__ PrefixBwdToken tokens[kScanTile];
  __shared__ float2 sums_of[kScanTile], sums_before[kScanTile];  // (m, u) of a token and of the one before it
  __shared__ float carry[kScanColumns + 1];
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  ScanRun run(shape, args.look_back);
  const ScanThread<V, N> me(shape, run.line);
  const int thread = threadIdx.x, numbers = shape.columns + 1;
  const bool owns_scalars = me.column_block == 0;
  if (thread <= kScanColumns) carry[thread] = 0.0f;

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> gradients[N], values[N], outs[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t t = token_at(shape, mine + n);
      gradients[n] = load_pack<S, V>(me.template at<const S>(args.dout, t) + me.column);
      outs[n] = load_pack<S, V>(me.template at<const S>(args.out, t) + me.column);
      values[n] = load_pack<S, V>(me.template at<const S>(args.values, t) + me.column);
    }
    if (args.sequences.initial) {
      each_empty_sequence(args.sequences, run.tile * me.groups + me.group, shape.tiles * me.groups, [&](int s) {
        if (me.active) {
          store(me.at(args.dw0, s) + me.column,
                args.dw_final.data ? load<V>(me.at(args.dw_final, s) + me.column) : splat<V>(0.0f));
        }
        if (me.lane == 0 && owns_scalars) {
          args.du0[int64_t{s} * shape.heads + me.head] = args.du_final.data ? *me.at(args.du_final, s) : 0.0f;
        }
      });
    }

    const int64_t position = first + thread;
    if (thread < shape.tile) {
      PrefixBwdToken token{0.0f, -1.0f, 0.0f, kOutside | kFirst | kLast};
      float2 sums{kNothing, 0.0f}, before = sums;
      if (position < shape.tokens) {
        const int64_t t = token_at(shape, position), previous = token_at(shape, position + 1);
        token.code = token_code(args.sequences, me.row, t, shape.tokens);
        const auto* m = me.template at<const float>(args.m, 0);
        const auto* u = me.template at<const float>(args.u, 0);
        sums = {m[t * args.m.time], u[t * args.u.time]};
        if (!(token.code & kFirst)) {
          before = {m[previous * args.m.time], u[previous * args.u.time]};
        } else if (token.code & kInitial) {
          before = {*me.at(args.m0, state_of(token.code)), 1.0f};  // the gradient is that of one unit of u0 and w0
        }
        const float score = load_score<S>(args, me.row, me.head, t, token.code);
        if (sums.y != 0.0f) {
          token.a = before.y * rescale(before.x, sums.x) / sums.y;
          if (score != kNothing) token.g = expf(score - sums.x) / sums.y;
          if (args.dlse.data && owns_scalars) {
            token.dlse = static_cast<const float*>(args.dlse.data)[scalar_at(args.dlse, me.row, t, me.head)];
          }
        }
      }
      tokens[thread] = token, sums_of[thread] = sums, sums_before[thread] = before;
    }
    __syncthreads();

    // From c to R, columns and, at V, the scalar; `delta` is <do, o> - dlse of the token.
    const auto step = [&](const PrefixBwdToken& token, const Floats<V>& gradient, float delta, float (&c)[V + 1]) {
      if (token.code & kLast) {
#pragma unroll
        for (int k = 0; k <= V; ++k) c[k] = 0.0f;
        if (token.code & kFinal) {
          const int state = state_of(token.code);
          const float u = *me.at(args.u_final, state);
          if (u != 0.0f && args.du_final.data && owns_scalars) c[V] = -u * *me.at(args.du_final, state);
          if (u != 0.0f && args.dw_final.data) {
            const Floats<V> dw = load<V>(me.at(args.dw_final, state) + me.column);
#pragma unroll
            for (int e = 0; e < V; ++e) c[e] = u * dw[e];
          }
        }
      }
#pragma unroll
      for (int e = 0; e < V; ++e) c[e] += gradient[e];
      c[V] += delta;
    };

    float deltas[N];
    typename Maps::Map map = Maps::Map::identity();
    const int begin = me.group * N;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const PrefixBwdToken token = tokens[begin + n];
      const Floats<V> gradient = floats(gradients[n]), out = floats(outs[n]);
      float delta = 0.0f;
#pragma unroll
      for (int e = 0; e < V; ++e) delta = fmaf(gradient[e], out[e], delta);
      deltas[n] = group_sum(me.active ? delta : 0.0f, shape.lanes) - token.dlse;
      step(token, gradient, deltas[n], map.b);
      map.cut |= (token.code & kLast) != 0;
#pragma unroll
      for (int k = 0; k <= V; ++k) map.b[k] *= token.a;
    }
    const float2 newest = sums_of[begin], oldest = sums_before[begin + N - 1];
    map.a[0] = newest.y == 0.0f ? 0.0f : oldest.y * rescale(oldest.x, newest.x) / newest.y;
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();
    if (args.look_back.ticket) look_back_affine(shape, args.look_back, run, maps, words, carry);

    float c[V + 1];
#pragma unroll
    for (int e = 0; e < V; ++e) c[e] = carry[me.offset + e];
    c[V] = carry[numbers - 1];
    maps.advance(c, before, shape.lanes);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const PrefixBwdToken token = tokens[begin + n];
      forget_floats(gradients[n]);
      step(token, floats(gradients[n]), deltas[n], c);
      const bool inside = mine + n < shape.tokens, kept = !(token.g < 0.0f);
      const int64_t t = token_at(shape, mine + n);
      const Floats<V> v = floats(values[n]);
      Floats<V> dvalue;
      float dot = 0.0f;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        dvalue[e] = kept ? token.g * c[e] : 0.0f;
        dot = fmaf(c[e], v[e], dot);
      }
      dot = group_sum(me.active ? dot : 0.0f, shape.lanes);
      if (inside && me.lane == 0) {
        const float dscore = kept ? token.g * (dot - c[V]) : 0.0f;
        const int64_t rows = int64_t{shape.lines} / shape.column_blocks / shape.heads;
        const int64_t at = ((me.column_block * rows + me.row) * shape.tokens + t) * shape.heads + me.head;
        if (args.float_dscores) {
          static_cast<float*>(args.dscores)[at] = dscore;
        } else {
          from_float(dscore, static_cast<S*>(args.dscores)[at]);
        }
      }
#pragma unroll
      for (int k = 0; k <= V; ++k) c[k] *= token.a;
      if (inside && (token.code & kInitial)) {
        const int state = state_of(token.code);
        if (me.active) {
          Floats<V> dw;
#pragma unroll
          for (int e = 0; e < V; ++e) dw[e] = c[e];
          store(me.at(args.dw0, state) + me.column, dw);
        }
        if (me.lane == 0) {
          const int64_t states = args.sequences.states;
          args.du0[(me.column_block * states + state) * shape.heads + me.head] = -c[V];
        }
      }
      if (inside && me.active) store(me.template at<S>(args.dvalues, t) + me.column, dvalue);
    }
    __syncthreads();
    if (run.tile + 1 < run.end) {
      if (thread < numbers) carry[thread] = maps.after(thread, carry[thread]);
      __syncthreads();
    }
  }
}

}  // namespace flowattn
