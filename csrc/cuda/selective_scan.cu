// selective_scan on CUDA: checks, output allocation, choice of a kernel and of spans, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/scan_launch.h"
#include "cuda/selective_scan_bwd.cuh"

namespace flowattn {
namespace {

constexpr const char* kOp = "selective_scan";
constexpr int64_t kMaxStates = 256;
constexpr int kBlocksAProcessor = 2;  // fewer, and time is cut into spans
constexpr int64_t kLeastSpan = 256;   // tokens

// Calls run(Z{}) with the smallest shape that holds the states.
template <class Run>
void with_shape(int64_t states, const Run& run) {
  if (states <= 4) return run(SelectiveShape<1, 4, 128>{});
  if (states <= 16) return run(SelectiveShape<4, 4, 128>{});
  if (states <= 32) return run(SelectiveShape<4, 8, 128>{});
  if (states <= 64) return run(SelectiveShape<4, 16, 128>{});
  run(SelectiveShape<8, 32, 128>{});
}

struct Call {
  SelectiveScanArgs args{};
  const Tensor& u;
  const Tensor& A;
  bool time_last;  // (B, channels, L) and (B, G, N, L), else (B, L, channels) and (B, L, G, N)
  int64_t batch, tokens, channels, groups, states, sequences, places;
  cudaStream_t stream;

  Call(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& skip,
       const MaybeTensor& z, const MaybeTensor& bias, const MaybeTensor& cu_seqlens, bool softplus, bool reverse,
       bool time_last, int64_t chunk, cudaStream_t stream)
      : u(u), A(A), time_last(time_last), stream(stream) {
    FA_CHECK(u.dim() == 3 && A.dim() == 2 && B.dim() == 4, kOp, "u must have 3 dims, A 2 and B 4",
             shape_text(u.sizes()) + ", " + shape_text(A.sizes()) + " and " + shape_text(B.sizes()));
    batch = u.size(0), tokens = u.size(time_last ? 2 : 1), channels = u.size(time_last ? 1 : 2);
    groups = B.size(time_last ? 1 : 2), states = A.size(1);
    FA_CHECK(states >= 1 && states <= kMaxStates, kOp, "A must have 1 to 256 columns", states);
    FA_CHECK(groups >= 1 && channels % groups == 0, kOp, "the groups of B must divide the channels",
             std::to_string(groups) + " and " + std::to_string(channels));
    FA_CHECK(chunk == 0 || chunk == kTile, kOp, "chunk must be 0 or " + std::to_string(kTile), chunk);
    FA_CHECK(channels * states < (int64_t{1} << 31) && tokens < (int64_t{1} << 31) - kTile, kOp,
             "the numbers of a state and the tokens must be below 2^31", shape_text(u.sizes()));
    args.u = channels_of("u", u), args.delta = channels_of("delta", delta);
    if (z) args.z = channels_of("z", *z);
    args.B = rows_of("B", B), args.C = rows_of("C", C);
    args.A = parameter("A", A, {channels, states});
    args.skip = skip ? parameter("skip", *skip, {channels}) : nullptr;
    args.bias = bias ? parameter("delta_bias", *bias, {channels}) : nullptr;
    args.tokens = tokens, args.channels = static_cast<int>(channels), args.groups = static_cast<int>(groups);
    args.states = static_cast<int>(states), args.softplus = softplus, args.reverse = reverse;
    sequences = batch;
    if (cu_seqlens) {
      const ScanSequences packed = scan_sequences(kOp, u, cu_seqlens, {}, reverse, false);
      sequences = packed.states, args.ends = packed.ends;
    }
    with_shape(states, [&](auto z) { cut<decltype(z)>(); });
  }

  // Blocks of channels, and spans of time where the blocks are few.
  template <class Z>
  void cut() {
    const int64_t blocks = ceil_div(channels / groups, Z::kChannels), programs = sequences * groups * blocks;
    const int64_t wanted = kBlocksAProcessor * processors(kOp, u) / std::max<int64_t>(programs, 1);
    const int64_t spans = std::max<int64_t>(1, std::min(wanted, tokens / kLeastSpan));
    args.blocks = static_cast<int>(blocks), args.spans = static_cast<int>(spans);
    args.span = static_cast<int>(ceil_div(ceil_div(tokens, spans), kTile) * kTile);
    places = sequences * spans;
    FA_CHECK(programs * spans < (int64_t{1} << 31), kOp, "the tensor must have fewer sequences and channels",
             programs * spans);
  }

  ScanTensor channels_of(const char* name, const Tensor& x) const {
    const int64_t time = time_last ? 2 : 1, channel = 3 - time;
    check_on_gpu(kOp, name, x, u.scalar_type(), {batch, time_last ? channels : tokens, time_last ? tokens : channels},
                 false);
    return {x.data_ptr(), x.stride(0), x.stride(time), x.stride(channel)};
  }
  StateRows rows_of(const char* name, const Tensor& x) const {
    if (time_last) {
      check_on_gpu(kOp, name, x, u.scalar_type(), {batch, groups, states, tokens}, false);
      return {x.data_ptr(), x.stride(0), x.stride(3), x.stride(1), x.stride(2)};
    }
    check_on_gpu(kOp, name, x, u.scalar_type(), {batch, tokens, groups, states}, false);
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  }
  const float* parameter(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const {
    check_on_gpu(kOp, name, x, ScalarType::Float, shape);
    FA_CHECK(x.is_contiguous(), kOp, std::string(name) + " must be contiguous", "other strides");
    return x.const_data_ptr<float>();
  }
  const float* state(const char* name, const MaybeTensor& x) const {
    return x ? parameter(name, *x, {sequences, channels, states}) : nullptr;
  }
  void use_slots(const MaybeTensor& slots, int64_t count) {
    if (!slots) return;
    check_on_gpu(kOp, "slots", *slots, ScalarType::Int, {tokens});
    args.slots = slots->const_data_ptr<int32_t>(), args.num_slots = count;
  }

  // Packed tokens may belong to no sequence: their results are zeros.
  Tensor result(std::vector<int64_t> shape, ScalarType dtype) const {
    return args.ends ? torch::stable::new_zeros(u, shape, dtype) : torch::stable::new_empty(u, shape, dtype);
  }
  Tensor like_u() const {
    return result({batch, time_last ? channels : tokens, time_last ? tokens : channels}, u.scalar_type());
  }
  std::vector<int64_t> shape_of_rows() const {
    if (time_last) return {batch, groups, states, tokens};
    return {batch, tokens, groups, states};
  }

  template <class Z, class Kernel, class... More>
  void launch(Kernel kernel, int floats, More... more) const {
    const int bytes = floats * static_cast<int>(sizeof(float));
    check_launch(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const unsigned blocks = static_cast<unsigned>(places * groups * args.blocks);
    kernel<<<blocks, Z::kThreads, bytes, stream>>>(args, more...);
    check_launch(kOp, cudaGetLastError());
  }

  // Walks all spans with run(), which takes args.start, args.end and args.step_sums as they are. Several spans of a
  // sequence are walked for their ends first; `first` enters the first of them, `last` leaves the last.
  template <class S, class Z, class Run>
  void walk(const float* first, float* last, bool backward, const Run& run) {
    if (args.spans == 1) {
      args.start = first, args.end = last;
      return run();
    }
    const Tensor ends = empty_floats(u, {places, channels, states}), step_sums = empty_floats(u, {places, channels});
    args.end = ends.mutable_data_ptr<float>(), args.step_sums = step_sums.mutable_data_ptr<float>();
    launch<Z>(selective_scan_ends_kernel<S, Z>, SelectiveForwardMemory<Z>::kFloats, backward);
    const int size = static_cast<int>(channels * states);
    const dim3 grid(static_cast<unsigned>(ceil_div(size, kCarryThreads)), static_cast<unsigned>(sequences));
    selective_scan_carry_kernel<<<grid, kCarryThreads, 0, stream>>>(args.end, args.step_sums, args.A, first, last, size,
                                                                    static_cast<int>(states), args.spans, backward);
    check_launch(kOp, cudaGetLastError());
    args.start = args.end, args.end = nullptr;
    run();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_fwd_cuda(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                                   MaybeTensor skip, MaybeTensor z,
                                                                   MaybeTensor delta_bias, MaybeTensor initial,
                                                                   MaybeTensor cu_seqlens, MaybeTensor slots,
                                                                   int64_t num_slots, bool softplus, bool reverse,
                                                                   bool time_last, int64_t chunk) {
  const CudaLaunch launch(u);
  Call call(u, delta, A, B, C, skip, z, delta_bias, cu_seqlens, softplus, reverse, time_last, chunk, launch.stream());
  SelectiveScanArgs& args = call.args;
  call.use_slots(slots, num_slots);
  const Tensor out = call.like_u();
  const Tensor final = empty_floats(u, {call.sequences, call.channels, call.states});
  const Tensor states = call.result({call.batch, num_slots, call.channels, call.states}, ScalarType::Float);
  const int64_t chunks = chunk ? call.batch * call.tokens / chunk + call.sequences : 0;
  const Tensor carries = empty_floats(u, {chunks, call.states, call.channels});
  const float* first = call.state("initial", initial);
  if (final.numel() == 0) return {out, final, states, carries};
  args.out = call.channels_of("out", out), args.slot_states = states.mutable_data_ptr<float>();
  args.carries = chunk ? carries.mutable_data_ptr<float>() : nullptr;
  with_element(kOp, u, [&](auto element) {
    with_shape(call.states, [&](auto shape) {
      using S = decltype(element);
      using Z = decltype(shape);
      call.walk<S, Z>(first, final.mutable_data_ptr<float>(), false, [&] {
        call.template launch<Z>(selective_scan_fwd_kernel<S, Z>, SelectiveForwardMemory<Z>::kFloats);
      });
    });
  });
  return {out, final, states, carries};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_bwd_cuda(Tensor dout, MaybeTensor dfinal, MaybeTensor dstates, Tensor u, Tensor delta,
                                  Tensor A, Tensor B, Tensor C, MaybeTensor skip, MaybeTensor z, MaybeTensor delta_bias,
                                  bool has_initial, MaybeTensor cu_seqlens, MaybeTensor slots, Tensor carries,
                                  bool softplus, bool reverse, bool time_last, int64_t chunk) {
  const CudaLaunch launch(u);
  FA_CHECK(chunk > 0, kOp, "the backward needs the states of the forward, chunk must be positive", chunk);
  Call call(u, delta, A, B, C, skip, z, delta_bias, cu_seqlens, softplus, reverse, time_last, chunk, launch.stream());
  SelectiveScanArgs& args = call.args;
  const int64_t channels = call.channels, states = call.states, places = call.places;
  if (dstates) {
    call.use_slots(slots, dstates->size(1));
    args.dslot_states = call.parameter("dstates", *dstates, {call.batch, args.num_slots, channels, states});
  }
  const int64_t chunks = call.batch * call.tokens / chunk + call.sequences;
  check_on_gpu(kOp, "carries", carries, ScalarType::Float, {chunks, states, channels});
  args.carries = carries.mutable_data_ptr<float>(), args.dout = call.channels_of("dout", dout);
  const float* last = call.state("dfinal", dfinal);

  const Tensor du = call.like_u(), ddelta = call.like_u();
  const Tensor dz = z ? call.like_u() : torch::stable::new_empty(u, {0});
  Tensor dA = empty_floats(u, {channels, states});
  Tensor dB = torch::stable::new_empty(u, call.shape_of_rows()), dC = torch::stable::new_empty(u, call.shape_of_rows());
  Tensor dskip = empty_floats(u, {skip ? channels : 0}), dbias = empty_floats(u, {delta_bias ? channels : 0});
  const Tensor dinitial = empty_floats(u, {has_initial ? call.sequences : 0, channels, states});
  const Gradients gradients{du, ddelta, dA, dB, dC, dskip, dz, dbias, dinitial};
  if (places == 0 || channels == 0) {
    for (Tensor* x : {&dA, &dB, &dC, &dskip, &dbias}) torch::stable::zero_(*x);
    return gradients;
  }

  std::vector<int64_t> shape = call.shape_of_rows();
  shape.insert(shape.begin(), {2, args.blocks});
  const Tensor parts = call.result(shape, ScalarType::Float);
  const int64_t group = time_last ? states * call.tokens : states, number = time_last ? call.tokens : 1;
  args.part = dB.numel(), args.dB_parts = parts.mutable_data_ptr<float>();
  args.dC_parts = args.dB_parts + args.blocks * args.part;
  args.parts = {nullptr, call.tokens * call.groups * states, time_last ? 1 : call.groups * states, group, number};
  const Tensor dA_parts = empty_floats(u, {places, channels, states});
  const Tensor dskip_parts = empty_floats(u, {places, channels}), dbias_parts = empty_floats(u, {places, channels});
  args.dA_parts = dA_parts.mutable_data_ptr<float>(), args.dskip_parts = dskip_parts.mutable_data_ptr<float>();
  args.dbias_parts = dbias_parts.mutable_data_ptr<float>();
  args.du = call.channels_of("du", du), args.ddelta = call.channels_of("ddelta", ddelta);
  if (z) args.dz = call.channels_of("dz", dz);
  with_element(kOp, u, [&](auto element) {
    with_shape(states, [&](auto shape) {
      using S = decltype(element);
      using Z = decltype(shape);
      call.walk<S, Z>(last, has_initial ? dinitial.mutable_data_ptr<float>() : nullptr, true, [&] {
        call.template launch<Z>(selective_scan_bwd_kernel<S, Z>, SelectiveBackwardMemory<Z>::kFloats);
      });
    });
  });
  sum_parts(kOp, args.dB_parts, 1, args.blocks, dB, launch.stream());
  sum_parts(kOp, args.dC_parts, 1, args.blocks, dC, launch.stream());
  sum_parts(kOp, args.dA_parts, 1, places, dA, launch.stream());
  sum_parts(kOp, args.dskip_parts, 1, places, dskip, launch.stream());
  sum_parts(kOp, args.dbias_parts, 1, places, dbias, launch.stream());
  return gradients;
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CUDA, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&flowattn::selective_scan_fwd_cuda));
  m.impl("selective_scan_bwd", TORCH_BOX(&flowattn::selective_scan_bwd_cuda));
}
