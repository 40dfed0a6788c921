// Device code of linear_scan: h_t = a_t h_{t-1} + b_t. The backward is the same scan from the last token to the first,
//   lambda_t = dout_t + c_t,  c_{t-1} = a_t lambda_t,  db_t = lambda_t,  da_t = lambda_t h_{t-1},
// and c before the first token is the gradient of the initial state.
#pragma once

#include "cuda/scan_states.cuh"

namespace flowattn {

struct LinearScanArgs {
  ScanShape shape;
  ScanSequences sequences;
  ScanLookBack look_back;
  bool log_gate, float_gates;  // float_gates: for one gate a token; else the kernel knows the type
  ScanTensor gates, tokens, out;
  ScanState initial, final;

  // Backward.
  ScanTensor dout, dgates, dtokens;
  ScanState dinitial, dfinal;
  // Float sums that a second kernel adds up, or nullptr. Constant gates: (rows * tiles, heads, width), or with one gate
  // a head (rows * tiles * column_blocks, heads). Else, where a row has several column blocks and one gate:
  // (column_blocks, rows, tokens, heads).
  float* dgate_parts;
  bool constant_gates;
};

// Tokens a thread keeps: 256 bytes of inputs at most, in the forward and in the backward.
template <class S, class G, bool Full>
constexpr int kLinearFwdTokens = !Full || sizeof(G) <= sizeof(S) ? 8 : 4;
template <bool Full>
constexpr int kLinearBwdTokens = Full ? 4 : 8;

// The scalars of a token in shared memory; `gate` where a token has one.
struct TokenGate {
  int code;
  float gate;
};

template <class S>
__device__ inline TokenGate token_gate(const LinearScanArgs& args, int64_t row, int head, int64_t position, bool full) {
  if (position >= args.shape.tokens) return {kOutside | kFirst | kLast, 0.0f};
  const int64_t t = token_at(args.shape, position);
  TokenGate token{token_code(args.sequences, row, t, args.shape.tokens), 0.0f};
  if (!full) {
    token.gate = load_scalar<S>(args.gates.data, scalar_at(args.gates, row, t, head), args.float_gates);
    if (args.log_gate) token.gate = expf(token.gate);
  }
  return token;
}

// The gates of a token's columns.
template <int KA, bool Full, class G, int V>
__device__ inline Floats<KA> gates_of(const Pack<G, V>& raw, const TokenGate& token, bool log_gate) {
  if constexpr (!Full) {
    return splat<KA>(token.gate);
  } else {
    Floats<KA> gates = floats(raw);
    if (log_gate) {
#pragma unroll
      for (int e = 0; e < KA; ++e) gates[e] = expf(gates[e]);
    }
    return gates;
  }
}

// S: tokens, G: full gates, Full: a gate for each element.
template <class S, class G, int V, bool Full>
__global__ void __launch_bounds__(kScanThreads, Full ? 2 : 3)
    linear_scan_fwd_kernel(const __grid_constant__ LinearScanArgs args) {
  constexpr int N = kLinearFwdTokens<S, G, Full>, KA = Full ? V : 1;
  typedef WarpMaps<V, 0, Full, double> Maps;
  __shared__ Maps maps;
  __shared__ TokenGate scalars[kScanTile];
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  ScanRun run(shape, args.look_back);
  const ScanThread<V, N> me(shape, run.line);
  const auto initial = [&](int code) { return load<V>(me.at(args.initial, state_of(code)) + me.column); };
  float carry = 0.0f;

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> inputs[N];
    Pack<G, V> raw[Full ? N : 1];
    RowWalk<const S> input(me, args.tokens, shape, mine);
#pragma unroll
    for (int n = 0; n < N; input.pass(n++)) inputs[n] = load_pack<S, V>(input.row);
    if constexpr (Full) {
      RowWalk<const G> row(me, args.gates, shape, mine);
#pragma unroll
      for (int n = 0; n < N; row.pass(n++)) raw[n] = load_pack<G, V>(row.row);
    }
    prefetch_next<S, V, N>(args.tokens, shape, args.look_back, run);
    if (threadIdx.x < shape.tile) {
      scalars[threadIdx.x] = token_gate<S>(args, me.row, me.head, first + threadIdx.x, Full);
    }
    each_empty_sequence(args.sequences, run.tile * me.groups + me.group, shape.tiles * me.groups, [&](int s) {
      if (!me.active) return;
      store(me.at(args.final, s) + me.column,
            args.sequences.initial ? load<V>(me.at(args.initial, s) + me.column) : splat<V>(0.0f));
    });
    __syncthreads();

    // One step from the state h; `nothing`: there is no state.
    const auto step = [&](int n, const TokenGate& token, const Floats<KA>& gate, float (&h)[V], bool nothing) {
      const Floats<V> x = floats(inputs[n]);
      if (token.code & kInitial) {
        const Floats<V> start = initial(token.code);
#pragma unroll
        for (int e = 0; e < V; ++e) h[e] = start[e];
      }
      const bool fresh = (token.code & kInitial) ? false : nothing || (token.code & kFirst);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        h[e] = fresh ? ((token.code & kOutside) ? 0.0f : x[e]) : fmaf(gate[Full ? e : 0], h[e], x[e]);
      }
    };

    typename Maps::Map map = Maps::Map::identity();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const TokenGate token = scalars[me.group * N + n];
      const Floats<KA> gate = gates_of<KA, Full>(raw[Full ? n : 0], token, args.log_gate);
      step(n, token, gate, map.b, n == 0);
      map.cut |= (token.code & kFirst) != 0;
#pragma unroll
      for (int k = 0; k < KA; ++k) map.a[k] *= static_cast<double>(gate[k]);
    }
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();
    find_states(shape, args.look_back, run, maps, words, carry);

    float h[V];
    maps.before(h, before, shape.lanes);
    RowWalk<S> out(me, args.out, shape, mine);
#pragma unroll
    for (int n = 0; n < N; out.pass(n++)) {
      const TokenGate token = scalars[me.group * N + n];
      forget_floats(inputs[n]);
      if constexpr (Full) forget_floats(raw[n]);
      step(n, token, gates_of<KA, Full>(raw[Full ? n : 0], token, args.log_gate), h, false);
      if (!me.active || !out.inside(n)) continue;
      Floats<V> result;
#pragma unroll
      for (int e = 0; e < V; ++e) result[e] = h[e];
      store(out.row, result);
      if (token.code & kFinal) store(me.at(args.final, state_of(token.code)) + me.column, result);
    }
    __syncthreads();  // the next tile writes to scalars and maps
  }
  leave_cluster(args.look_back);
}

template <class S, class G, int V, bool Full>
__global__ void __launch_bounds__(kScanThreads, 2) linear_scan_bwd_kernel(const __grid_constant__ LinearScanArgs args) {
  constexpr int N = kLinearBwdTokens<Full>, KA = Full ? V : 1;
  typedef WarpMaps<V, 0, Full, double> Maps;
  __shared__ Maps maps;
  __shared__ TokenGate scalars[kScanTile];
  __shared__ float dgate_of[Full ? 1 : kScanTile];
  __shared__ Word words[kScanWords];
  const ScanShape& shape = args.shape;
  ScanRun run(shape, args.look_back);
  const ScanThread<V, N> me(shape, run.line);
  float carry = 0.0f;

  for (; run.tile < run.end; ++run.tile) {
    const int64_t first = int64_t{run.tile} * shape.tile, mine = first + me.group * N;
    Pack<S, V> gradients[N], states[N];  // states: h before the token
    Pack<G, V> raw[Full ? N : 1];
    RowWalk<const S> gradient(me, args.dout, shape, mine), state(me, args.out, shape, mine + 1);
#pragma unroll
    for (int n = 0; n < N; gradient.pass(n), state.pass(n++)) {
      gradients[n] = load_pack<S, V>(gradient.row), states[n] = load_pack<S, V>(state.row);
    }
    if constexpr (Full) {
      RowWalk<const G> row(me, args.gates, shape, mine);
#pragma unroll
      for (int n = 0; n < N; row.pass(n++)) raw[n] = load_pack<G, V>(row.row);
    }
    if (threadIdx.x < shape.tile) {
      scalars[threadIdx.x] = token_gate<S>(args, me.row, me.head, first + threadIdx.x, Full);
    }
    if (args.sequences.initial) {
      each_empty_sequence(args.sequences, run.tile * me.groups + me.group, shape.tiles * me.groups, [&](int s) {
        if (!me.active) return;
        store(me.at(args.dinitial, s) + me.column,
              args.dfinal.data ? load<V>(me.at(args.dfinal, s) + me.column) : splat<V>(0.0f));
      });
    }
    __syncthreads();

    // lambda of a token, from c behind it.
    const auto lambda = [&](int n, const TokenGate& token, const float (&c)[V]) {
      Floats<V> sum = floats(gradients[n]);
      if (token.code & kLast) {
        if ((token.code & kFinal) && args.dfinal.data) {
          const Floats<V> final = load<V>(me.at(args.dfinal, state_of(token.code)) + me.column);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += final[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += c[e];
      }
      return sum;
    };

    typename Maps::Map map = Maps::Map::identity();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const TokenGate token = scalars[me.group * N + n];
      const Floats<KA> gate = gates_of<KA, Full>(raw[Full ? n : 0], token, args.log_gate);
      const Floats<V> sum = lambda(n, token, map.b);
      map.cut |= (token.code & kLast) != 0;
#pragma unroll
      for (int e = 0; e < V; ++e) map.b[e] = gate[Full ? e : 0] * sum[e];
#pragma unroll
      for (int k = 0; k < KA; ++k) map.a[k] *= static_cast<double>(gate[k]);
    }
    const typename Maps::Map before = maps.scan(map, shape.lanes);
    __syncthreads();
    find_states(shape, args.look_back, run, maps, words, carry);

    float c[V];
    Floats<KA> total = splat<KA>(0.0f);  // gradient of constant gates
    maps.before(c, before, shape.lanes);
    RowWalk<S> dtoken(me, args.dtokens, shape, mine);
    RowWalk<G> dgate_row(me, args.dgates, shape, mine);
#pragma unroll
    for (int n = 0; n < N; dtoken.pass(n), dgate_row.pass(n++)) {
      const TokenGate token = scalars[me.group * N + n];
      forget_floats(gradients[n]);
      if constexpr (Full) forget_floats(raw[n]);
      const Floats<KA> gate = gates_of<KA, Full>(raw[Full ? n : 0], token, args.log_gate);
      const bool inside = dtoken.inside(n), outside = token.code & kOutside;
      Floats<V> sum = lambda(n, token, c), state = floats(states[n]);
      if (token.code & kInitial) state = load<V>(me.at(args.initial, state_of(token.code)) + me.column);
      const bool fresh = (token.code & kFirst) && !(token.code & kInitial);  // the gate acts on nothing
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (outside) sum[e] = 0.0f;
        c[e] = gate[Full ? e : 0] * sum[e];
      }
      if constexpr (Full) {
        Floats<V> dgate;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          dgate[e] = fresh || !me.active ? 0.0f : sum[e] * state[e];
          if (args.log_gate && !fresh) dgate[e] *= gate[e];
        }
        if (args.constant_gates) {
#pragma unroll
          for (int e = 0; e < V; ++e) total[e] += dgate[e];
        } else if (inside && me.active) {
          store(dgate_row.row, dgate);
        }
      } else {
        float of_token = 0.0f;
#pragma unroll
        for (int e = 0; e < V; ++e) of_token = fmaf(sum[e], state[e], of_token);
        if (args.log_gate) of_token *= token.gate;
        if (fresh || !me.active) of_token = 0.0f;
        if (args.constant_gates) {
          total[0] += of_token;
        } else {
          of_token = group_sum(of_token, shape.lanes);
          if (me.lane == 0) dgate_of[me.group * N + n] = of_token;
        }
      }
      if (!inside || !me.active) continue;
      store(dtoken.row, sum);
      if (token.code & kInitial) {
        Floats<V> before_all;
#pragma unroll
        for (int e = 0; e < V; ++e) before_all[e] = c[e];
        store(me.at(args.dinitial, state_of(token.code)) + me.column, before_all);
      }
    }
    __syncthreads();  // the next tile writes to scalars and maps

    if (!args.constant_gates) {
      const int64_t position = first + threadIdx.x;
      if (!Full && threadIdx.x < shape.tile && position < shape.tokens) {
        const int64_t at = (me.row * shape.tokens + token_at(shape, position)) * shape.heads + me.head;
        const float of_token = dgate_of[threadIdx.x];
        if (args.dgate_parts) {
          const int64_t all = int64_t{shape.lines} / shape.column_blocks * shape.tokens;
          args.dgate_parts[me.column_block * all + at] = of_token;
        } else if (args.float_gates) {
          static_cast<float*>(args.dgates.data)[at] = of_token;
        } else {
          from_float(of_token, static_cast<S*>(args.dgates.data)[at]);
        }
      }
      continue;
    }
    // The sum over the tile: of the groups of a warp, then of the warps. maps.b serves as memory.
    for (int by = Full ? shape.lanes : 1; by < kWarp; by *= 2) {
#pragma unroll
      for (int k = 0; k < KA; ++k) total[k] += __shfl_xor_sync(kWholeWarp, total[k], by);
    }
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane < (Full ? shape.lanes : 1)) {
#pragma unroll
      for (int k = 0; k < KA; ++k) maps.b[warp][lane * KA + k] = total[k];
    }
    __syncthreads();
    const int at = threadIdx.x, column = me.column_block * shape.columns + at;
    if (at < (Full ? shape.columns : 1) && column < shape.width) {
      float sum = 0.0f;
      for (int from = 0; from < kScanWarps; ++from) sum += maps.b[from][at];
      const int64_t tile = me.row * shape.tiles + run.tile;
      if constexpr (Full) {
        args.dgate_parts[(tile * shape.heads + me.head) * shape.width + column] = sum;
      } else {
        args.dgate_parts[(tile * shape.column_blocks + me.column_block) * shape.heads + me.head] = sum;
      }
    }
    __syncthreads();
  }
  leave_cluster(args.look_back);
}

}  // namespace flowattn
