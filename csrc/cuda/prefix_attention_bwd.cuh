// Device code of the backward of prefix_attention, from the last token to the first: R_t = do_t + c_t,
// c_{t-1} = a_t R_t, and r alike with <do_t, o_t> - dlse_t;
//   dv_t = g_t R_t,  ds_t = g_t (<R_t, v_t> - r_t).
// Behind the last token c is u dw and -u du of the final state; before the first, c and -r are gradients of w0 and u0.
#pragma once

#include "cuda/prefix_attention.cuh"

namespace flowattn {

// The scalars of a token.
struct alignas(16) PrefixBwdToken {
  float a, g, dlse;  // g < 0: masked
  int code;
};

template <class S, int V>
__global__ void __launch_bounds__(kScanThreads, 3)
    prefix_attention_bwd_kernel(const __grid_constant__ PrefixAttentionArgs args) {
  constexpr int N = kPrefixBwdTokens;
  typedef WarpMaps<V, 1, false, float> Maps;
  __shared__ Maps maps;
  __shared__ PrefixBwdToken tokens[kScanTile];
  __shared__ float2 sums_of[kScanTile], sums_before[kScanTile];  // (m, u) of a token and of the one before it
  __shared__ float dscores[kScanTile];
  __shared__ TokenBits special;
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  ScanRun run(shape, args.look_back);
  const ScanThread<V, N> me(shape, run.line);
  const int thread = threadIdx.x;
  const bool owns_scalars = me.column_block == 0;
  float carry = 0.0f;

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> gradients[N], values[N], outs[N];
    RowWalk<const S> gradient(me, args.dout, shape, mine), out(me, args.out, shape, mine);
#pragma unroll
    for (int n = 0; n < N; gradient.pass(n), out.pass(n++)) {
      gradients[n] = load_pack<S, V>(gradient.row), outs[n] = load_pack<S, V>(out.row);
    }
    const auto each_value = [&](const auto& f) {
      RowWalk<const S> value(me, args.values, shape, mine);
#pragma unroll
      for (int n = 0; n < N; value.pass(n++)) f(n, value.row);
    };
    each_value([](int, const S* row) { prefetch(row); });
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
    bool is_special = true;
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
          const float inverse = fast_inverse(sums.y);
          token.a = before.y * rescale(before.x, sums.x) * inverse;
          if (score != kNothing) token.g = fast_exp(score - sums.x) * inverse;
          if (args.dlse.data && owns_scalars) {
            token.dlse = static_cast<const float*>(args.dlse.data)[scalar_at(args.dlse, me.row, t, me.head)];
          }
        }
      }
      tokens[thread] = token, sums_of[thread] = sums, sums_before[thread] = before;
      is_special = token.g < 0.0f || token.code & (kInitial | kLast | kOutside);
    }
    special.set(is_special);
    __syncthreads();

    // From c to R, columns and, at V, the scalar; `delta` is <do, o> - dlse of the token. `plain`: no token of the warp
    // is special.
    const auto step = [&](auto plain, const PrefixBwdToken& token, const Floats<V>& gradient, float delta,
                          float (&c)[V + 1]) {
      if (!plain && token.code & kLast) {
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
    const bool is_plain = !special.any_in_warp<N>(begin);
    const auto walk_once = [&](auto plain) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const PrefixBwdToken token = tokens[begin + n];
        const Floats<V> gradient = floats(gradients[n]), out = floats(outs[n]);
        float delta = 0.0f;
#pragma unroll
        for (int e = 0; e < V; ++e) delta = fmaf(gradient[e], out[e], delta);
        deltas[n] = group_sum(me.active ? delta : 0.0f, shape.lanes) - token.dlse;
        step(plain, token, gradient, deltas[n], map.b);
        map.cut |= !plain && token.code & kLast;
#pragma unroll
        for (int k = 0; k <= V; ++k) map.b[k] *= token.a;
      }
    };
    if (is_plain) {
      walk_once(std::true_type{});
    } else {
      walk_once(std::false_type{});
    }
    const float2 newest = sums_of[begin], oldest = sums_before[begin + N - 1];
    map.a[0] = newest.y == 0.0f ? 0.0f : oldest.y * rescale(oldest.x, newest.x) * fast_inverse(newest.y);
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();
    RowWalk<const S> again(me, args.dout, shape, mine);
#pragma unroll
    for (int n = 0; n < N; again.pass(n++)) gradients[n] = load_pack<S, V>(again.row);
    each_value([&](int n, const S* row) { values[n] = load_pack<S, V>(row); });
    find_states(shape, args.look_back, run, maps, words, carry);

    float c[V + 1];
    maps.before(c, before, shape.lanes);
    RowWalk<S> dvalue_row(me, args.dvalues, shape, mine);
    const auto walk_again = [&](auto plain) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const PrefixBwdToken token = tokens[begin + n];
        step(plain, token, floats(gradients[n]), deltas[n], c);
        const bool inside = plain || dvalue_row.inside(n), kept = plain || !(token.g < 0.0f);
        const Floats<V> v = floats(values[n]);
        Floats<V> dvalue;
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          dvalue[e] = kept ? token.g * c[e] : 0.0f;
          dot = fmaf(c[e], v[e], dot);
        }
        dot = group_sum(me.active ? dot : 0.0f, shape.lanes);
        if (me.lane == 0) dscores[begin + n] = kept ? token.g * (dot - c[V]) : 0.0f;
#pragma unroll
        for (int k = 0; k <= V; ++k) c[k] *= token.a;
        if (!plain && inside && token.code & kInitial) {
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
        if (inside && me.active) store(dvalue_row.row, dvalue);
        if constexpr (plain) {
          dvalue_row.row += dvalue_row.step;
        } else {
          dvalue_row.pass(n);
        }
      }
    };
    if (is_plain) {
      walk_again(std::true_type{});
    } else {
      walk_again(std::false_type{});
    }
    __syncthreads();  // the next tile writes to tokens and maps
    if (thread < shape.tile && position < shape.tokens) {
      const int64_t rows = int64_t{shape.lines} / shape.column_blocks / shape.heads;
      const int64_t token = (me.column_block * rows + me.row) * shape.tokens + token_at(shape, position);
      const int64_t at = token * shape.heads + me.head;
      if (args.float_dscores) {
        static_cast<float*>(args.dscores)[at] = dscores[thread];
      } else {
        from_float(dscores[thread], static_cast<S*>(args.dscores)[at]);
      }
    }
  }
  leave_cluster(args.look_back);
}

}  // namespace flowattn
