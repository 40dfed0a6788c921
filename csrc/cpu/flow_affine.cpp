// flow_affine_forward and flow_affine_inverse on the CPU: checks, allocation, tokens shared between threads.
#include "cpu/flow_affine.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/check.h"
#include "cpu/parallel.h"

namespace flowattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "flow_affine";
constexpr double kWork = 32;  // multiply-adds a feature, for parallel_items

// `x` holds rows of `width` for the tokens of `like` (width 0: one number a token), in its dtype.
FlowTokens tokens_of(const char* name, const Tensor& x, const Tensor& like, int64_t width) {
  const std::string prefix = std::string(name) + " must ";
  const bool row = width > 0 || x.dim() == 3;
  FA_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type(), kOp, prefix + "be a CPU tensor of the dtype of x",
           toString(x.scalar_type()));
  const bool fits = x.dim() == (row ? 3 : 2) && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                    (!row || x.size(2) == width);
  FA_CHECK(fits, kOp, prefix + "have one row of " + std::to_string(width) + " for each token", shape_text(x.sizes()));
  FA_CHECK(!row || x.size(2) <= 1 || x.stride(2) == 1, kOp, prefix + "have a contiguous last dim", "another stride");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

FlowTokens tokens_of(const char* name, const MaybeTensor& x, const Tensor& like, int64_t width) {
  return x ? tokens_of(name, *x, like, width) : FlowTokens{};
}

FlowAffine call_of(const Tensor& x, const Tensor& params, bool softplus, double soft_clip) {
  FA_CHECK(x.dim() == 3 && params.dim() == 3, kOp, "tensors must have 3 dims", x.dim());
  const ScalarType dtype = x.scalar_type();
  FA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, "x must be float32 or float64",
           toString(dtype));
  FlowAffine op{};
  op.storage = storage_of(kOp, "x", x);
  op.batch = x.size(0), op.tokens = x.size(1), op.features = x.size(2);
  op.options.volume_preserving = params.size(2) == op.features, op.options.softplus = softplus;
  op.options.soft_clip = soft_clip;
  op.x = tokens_of("x", x, x, op.features);
  op.params = tokens_of("params", params, x, op.options.volume_preserving ? op.features : 2 * op.features);
  return op;
}

template <typename Run>
void share(const FlowAffine& op, const Run& run) {
  const int64_t count = op.batch * op.tokens;
  parallel_items(count, kWork * count * op.features, 0, [&](int64_t begin, int64_t end, void*) { run(begin, end); });
}

std::tuple<Tensor, Tensor> flow_affine_fwd_cpu(Tensor x, Tensor params, bool softplus, double soft_clip) {
  FlowAffine op = call_of(x, params, softplus, soft_clip);
  Tensor z = torch::stable::new_empty(x, x.sizes()), logdet = torch::stable::new_empty(x, {op.batch, op.tokens});
  op.out = z.data_ptr(), op.sums = logdet.data_ptr();
  share(op, [&](int64_t begin, int64_t end) { FA_ISA_CALL(flow_affine_fwd, op, begin, end); });
  return {z, logdet};
}

std::tuple<Tensor, Tensor> flow_affine_bwd_cpu(Tensor dz, MaybeTensor dlogdet, Tensor z, Tensor params, bool softplus,
                                               double soft_clip) {
  FlowAffine op = call_of(z, params, softplus, soft_clip);
  op.grad_out = tokens_of("dz", dz, z, op.features), op.grad_sums = tokens_of("dlogdet", dlogdet, z, 0);
  Tensor dx = torch::stable::new_empty(z, z.sizes()), dparams = torch::stable::new_empty(z, params.sizes());
  op.grad_x = dx.data_ptr(), op.grad_params = dparams.data_ptr();
  share(op, [&](int64_t begin, int64_t end) { FA_ISA_CALL(flow_affine_bwd, op, begin, end); });
  return {dx, dparams};
}

std::tuple<Tensor, Tensor> flow_affine_inv_cpu(Tensor z, Tensor params, MaybeTensor params_uncond, MaybeTensor guidance,
                                               MaybeTensor previous, int64_t rule, bool guide_scale, bool guide_mean,
                                               bool softplus, double soft_clip) {
  FlowAffine op = call_of(z, params, softplus, soft_clip);
  op.options.rule = GuidanceRule(rule), op.options.guide_scale = guide_scale, op.options.guide_mean = guide_mean;
  op.params_uncond = tokens_of("params_uncond", params_uncond, z, params.size(2));
  op.guidance = tokens_of("guidance", guidance, z, 0);
  op.previous = tokens_of("previous", previous, z, op.features);
  Tensor x = torch::stable::new_empty(z, z.sizes());
  Tensor statistics = torch::stable::new_empty(z, {op.batch, op.tokens, int64_t(kFlowStatistics)});
  op.out = x.data_ptr(), op.sums = statistics.data_ptr();
  share(op, [&](int64_t begin, int64_t end) { FA_ISA_CALL(flow_affine_inv, op, begin, end); });
  return {x, statistics};
}

}  // namespace
}  // namespace flowattn

STABLE_TORCH_LIBRARY_IMPL(flowattn, CPU, m) {
  m.impl("flow_affine_fwd", TORCH_BOX(&flowattn::flow_affine_fwd_cpu));
  m.impl("flow_affine_bwd", TORCH_BOX(&flowattn::flow_affine_bwd_cpu));
  m.impl("flow_affine_inv", TORCH_BOX(&flowattn::flow_affine_inv_cpu));
}
