// selective_scan on the CPU: checks, output allocation, tasks, and the sums that go across tasks.
#include "cpu/selective_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/scan_launch.h"

namespace flowattn {
namespace {

constexpr const char* kOp = "selective_scan";
constexpr int64_t kMaxStates = 256;
constexpr int64_t kSetTokens = 256;  // short sequences share a task, and one partial sum of dA, up to so many tokens

using MaybeTensor = std::optional<Tensor>;

struct Call {
  SelectiveScan op{};
  const Tensor& u;
  bool time_last;  // (B, channels, L) and (B, G, N, L), else (B, L, channels) and (B, L, G, N)
  ScalarType compute;

  Call(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& skip,
       const MaybeTensor& z, const MaybeTensor& bias, bool softplus, bool time_last, int64_t chunk)
      : u(u), time_last(time_last), compute(compute_dtype(u)) {
    FA_CHECK(u.dim() == 3 && A.dim() == 2 && B.dim() == 4, kOp, "u must have 3 dims, A 2 and B 4",
             shape_text(u.sizes()) + ", " + shape_text(A.sizes()) + " and " + shape_text(B.sizes()));
    op.storage = storage_of(kOp, "u", u), op.softplus = softplus;
    op.batch = u.size(0), op.tokens = u.size(time_last ? 2 : 1), op.channels = u.size(time_last ? 1 : 2);
    op.groups = B.size(time_last ? 1 : 2), op.states = A.size(1);
    FA_CHECK(op.states >= 1 && op.states <= kMaxStates, kOp, "A must have 1 to 256 columns", op.states);
    FA_CHECK(op.groups >= 1 && op.channels % op.groups == 0, kOp, "the groups of B must divide the channels",
             std::to_string(op.groups) + " and " + std::to_string(op.channels));
    FA_CHECK(chunk >= 0, kOp, "chunk must not be negative", chunk);
    op.tile = chunk ? chunk : kScanTile;
    op.u = channels_of("u", u), op.delta = channels_of("delta", delta);
    if (z) op.z = channels_of("z", *z);
    op.B = rows_of("B", B), op.C = rows_of("C", C);
    op.A = parameter("A", A, {op.channels, op.states});
    op.skip = skip ? parameter("skip", *skip, {op.channels}) : nullptr;
    op.bias = bias ? parameter("delta_bias", *bias, {op.channels}) : nullptr;
  }

  ScanTensor channels_of(const char* name, const Tensor& x) const {
    const int64_t time = time_last ? 2 : 1, channel = 3 - time;
    const int64_t sizes[] = {op.batch, time_last ? op.channels : op.tokens, time_last ? op.tokens : op.channels};
    check_scan_tensor(kOp, name, x, u.scalar_type(), {sizes[0], sizes[1], sizes[2]}, false);
    return {x.data_ptr(), x.stride(0), x.stride(time), x.stride(channel)};
  }
  StateRows rows_of(const char* name, const Tensor& x) const {
    if (time_last) {
      check_scan_tensor(kOp, name, x, u.scalar_type(), {op.batch, op.groups, op.states, op.tokens}, false);
      return {x.data_ptr(), x.stride(0), x.stride(3), x.stride(1), x.stride(2)};
    }
    check_scan_tensor(kOp, name, x, u.scalar_type(), {op.batch, op.tokens, op.groups, op.states}, false);
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  }
  const void* parameter(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const {
    check_scan_tensor(kOp, name, x, compute, shape, true);
    FA_CHECK(x.is_contiguous(), kOp, std::string(name) + " must be contiguous", "other strides");
    return x.data_ptr();
  }
  ScanState state(const char* name, const MaybeTensor& x, int64_t states) const {
    if (!x) return {};
    check_scan_tensor(kOp, name, *x, compute, {states, op.channels, op.states}, true);
    return scan_state(*x);
  }

  // A result in the shape of u, or of B; rows that belong to no sequence are cleared.
  Tensor result(bool of_u, int64_t used) const {
    std::vector<int64_t> shape = {op.batch, op.tokens, op.groups, op.states};
    if (of_u) {
      shape = {op.batch, time_last ? op.channels : op.tokens, time_last ? op.tokens : op.channels};
    } else if (time_last) {
      shape = {op.batch, op.groups, op.states, op.tokens};
    }
    return used < op.tokens ? torch::stable::new_zeros(u, shape) : torch::stable::new_empty(u, shape);
  }
  Tensor wide(std::initializer_list<int64_t> shape) const { return torch::stable::new_empty(u, shape, compute); }

  void use_slots(const MaybeTensor& slots, int64_t count) {
    if (!slots) return;
    check_scan_tensor(kOp, "slots", *slots, ScalarType::Int, {op.tokens}, true);
    op.slots = static_cast<const int32_t*>(slots->data_ptr()), op.num_slots = count;
    for (int64_t t = 0; t < op.tokens; ++t) {
      FA_CHECK(op.slots[t] < count, kOp, "slots must lie below " + std::to_string(count), op.slots[t]);
    }
  }
};

// Tasks: sets of consecutive segments times parts of the channels of each group.
struct Tasks {
  const SelectiveScan& op;
  const std::vector<ScanSegment>& segments;
  std::vector<int64_t> sets = {0};  // where each set ends
  int64_t parts;                    // of a group

  Tasks(const SelectiveScan& op, const ScanSegments& all) : op(op), segments(all.list) {
    parts = (op.channels / op.groups + kScanChannels - 1) / kScanChannels;
    int64_t tokens = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
      tokens += segments[i].length;
      if (tokens < kSetTokens && i + 1 < segments.size()) continue;
      sets.push_back(i + 1), tokens = 0;
    }
  }

  int64_t num_sets() const { return sets.size() - 1; }

  template <typename Run>
  void run(bool backward, int64_t tokens, const Run& run) const {
    if (op.channels == 0) return;
    const int64_t per_set = op.groups * parts, group_size = op.channels / op.groups;
    const double work = double(tokens) * op.channels * op.states * (backward ? 20 : 8);
    parallel_items(
        num_sets() * per_set, work, FA_ISA_CALL(selective_scan_scratch_bytes, op, backward),
        [&](int64_t begin, int64_t end, std::byte* scratch) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t set = item / per_set, group = item % per_set / parts, part = item % parts;
            const int64_t first = group * group_size + part * kScanChannels;
            const int64_t last = std::min(first + kScanChannels, (group + 1) * group_size);
            run(SelectiveTask{&segments[sets[set]], segments.data() + sets[set + 1], set, group, part, first, last},
                scratch);
          }
        });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_fwd_cpu(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                                  MaybeTensor skip, MaybeTensor z,
                                                                  MaybeTensor delta_bias, MaybeTensor initial,
                                                                  MaybeTensor cu_seqlens, MaybeTensor slots,
                                                                  int64_t num_slots, bool softplus, bool reverse,
                                                                  bool time_last, int64_t chunk) {
  Call call(u, delta, A, B, C, skip, z, delta_bias, softplus, time_last, chunk);
  SelectiveScan& op = call.op;
  const ScanSegments segments(kOp, op.batch, op.tokens, cu_seqlens, {}, reverse, bool(initial));
  call.use_slots(slots, num_slots);
  const Tensor out = call.result(true, segments.used);
  const Tensor final = call.wide({segments.states, op.channels, op.states});
  const Tensor states = segments.used < op.tokens
                            ? torch::stable::new_zeros(u, {op.batch, num_slots, op.channels, op.states}, call.compute)
                            : call.wide({op.batch, num_slots, op.channels, op.states});
  const int64_t chunks = chunk ? op.batch * op.tokens / chunk + segments.states : 0;
  const Tensor carries = call.wide({chunks, op.states, op.channels});
  op.initial = call.state("initial", initial, segments.states);
  op.out = call.channels_of("out", out), op.final = scan_state(final), op.slot_states = states.data_ptr();
  op.carries = chunk ? carries.data_ptr() : nullptr;
  pass_states(final, initial, segments.empty);
  const Tasks tasks(op, segments);
  tasks.run(false, segments.total(),
            [&](const SelectiveTask& task, std::byte* scratch) { FA_ISA_CALL(selective_scan_fwd, op, task, scratch); });
  return {out, final, states, carries};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_bwd_cpu(Tensor dout, MaybeTensor dfinal, MaybeTensor dstates, Tensor u, Tensor delta, Tensor A,
                                 Tensor B, Tensor C, MaybeTensor skip, MaybeTensor z, MaybeTensor delta_bias,
                                 bool has_initial, MaybeTensor cu_seqlens, MaybeTensor slots, Tensor carries,
                                 bool softplus, bool reverse, bool time_last, int64_t chunk) {
  Call call(u, delta, A, B, C, skip, z, delta_bias, softplus, time_last, chunk);
  SelectiveScan& op = call.op;
  FA_CHECK(chunk > 0, kOp, "the backward needs the states of the forward, chunk must be positive", chunk);
  const ScanSegments segments(kOp, op.batch, op.tokens, cu_seqlens, {}, reverse, has_initial);
  const int64_t used = segments.used, states = segments.states;
  if (dstates) {
    call.use_slots(slots, dstates->size(1));
    call.parameter("dstates", *dstates, {op.batch, op.num_slots, op.channels, op.states});
    op.dslot_states = dstates->data_ptr();
  }
  check_scan_tensor(kOp, "carries", carries, call.compute,
                    {op.batch * op.tokens / chunk + states, op.states, op.channels}, true);
  op.carries = carries.data_ptr();
  op.dout = call.channels_of("dout", dout), op.dfinal = call.state("dfinal", dfinal, states);

  const Tensor du = call.result(true, used), ddelta = call.result(true, used);
  const Tensor dz = z ? call.result(true, used) : torch::stable::new_empty(u, {0});
  const Tensor dB = call.result(false, used), dC = call.result(false, used);
  const Tensor dinitial = torch::stable::new_empty(u, {has_initial ? states : 0, op.channels, op.states}, call.compute);
  op.du = call.channels_of("du", du), op.ddelta = call.channels_of("ddelta", ddelta);
  if (z) op.dz = call.channels_of("dz", dz);
  op.dB = call.rows_of("dB", dB), op.dC = call.rows_of("dC", dC);
  if (has_initial) {
    op.dinitial = scan_state(dinitial);
    pass_states(dinitial, dfinal, segments.empty);
  }

  const Tasks tasks(op, segments);
  const int64_t sets = tasks.num_sets(), channels = op.channels;
  const Tensor parts = call.wide({2, tasks.parts, op.batch, op.tokens, op.groups, op.states});
  op.dB_parts = parts.data_ptr(), op.dC_parts = torch::stable::select(parts, 0, 1).data_ptr();
  const Tensor dA_parts = call.wide({sets, channels, op.states});
  const Tensor dskip_parts = call.wide({sets, channels}), dbias_parts = call.wide({sets, channels});
  op.dA_parts = dA_parts.data_ptr(), op.dskip_parts = dskip_parts.data_ptr(), op.dbias_parts = dbias_parts.data_ptr();
  tasks.run(true, segments.total(),
            [&](const SelectiveTask& task, std::byte* scratch) { FA_ISA_CALL(selective_scan_bwd, op, task, scratch); });

  const int64_t rows = cu_seqlens ? used : op.batch * op.tokens, row_size = op.groups * op.states;
  parallel_items(rows, double(rows) * row_size * tasks.parts, 0, [&](int64_t begin, int64_t end, std::byte*) {
    FA_ISA_CALL(selective_scan_sum_parts, op, tasks.parts, begin, end);
  });
  const Tensor dA = call.wide({channels, op.states});
  const Tensor dskip = call.wide({skip ? channels : 0}), dbias = call.wide({delta_bias ? channels : 0});
  sum_parts(dA_parts, dA);
  if (skip) sum_parts(dskip_parts, dskip);
  if (delta_bias) sum_parts(dbias_parts, dbias);
  return {du, ddelta, dA, dB, dC, dskip, dz, dbias, dinitial};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&flowattn::selective_scan_fwd_cpu));
  m.impl("selective_scan_bwd", TORCH_BOX(&flowattn::selective_scan_bwd_cpu));
}
