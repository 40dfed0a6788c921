"""Fused token-wise ops of an encoder layer: bias + GELU; bias + residual + LayerNorm, with packing on either side."""

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference import encoder_fusions as reference

_GELU_OP, _NORM_OP = "bias_gelu", "bias_residual_layer_norm"
_gelu_fwd, _gelu_bwd = op("bias_gelu_fwd"), op("bias_gelu_bwd")
_norm_fwd, _norm_bwd = op("bias_residual_layer_norm_fwd"), op("bias_residual_layer_norm_bwd")


def bias_gelu(x, bias, *, approximate="none"):
    """Add a bias and apply GELU in one pass: y = u Phi(u), u = x + bias.

    Shapes: x (..., d); bias (d,) or None; returns x's shape, contiguous.
    Dtypes: x float16, bfloat16, float32 or (CPU and reference) float64; bias x's dtype or float32. Computed in float32.
    Layout: last dim contiguous; leading dims that collapse to evenly spaced rows (a packed (T, d) always does); no copy
        is made. Zero-length tensors are legal.
    approximate: "none" for the normal distribution function Phi (BERT's `gelu`), within 1e-7 of it; "tanh" for
        Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2 (`gelu_new`).
    Under autocast x is cast to its dtype.
    Gradients: x and bias, computed again from x, the only tensor that is saved; the bias's is summed in float32 and
        always bitwise repeatable.
    Cost: reads x and writes y once; backward reads x and dy and writes dx once.
    Source: Hendrycks and Gimpel 2016.

    >>> bias_gelu(torch.tensor([[-1.0, 0.0, 1.0]]), torch.ones(3))
    tensor([[0.0000, 0.8413, 1.9545]])
    """
    call = _prepare_gelu(x, bias, approximate=approximate)
    backend = _GELU.choose(*call)
    if backend.bwd is not None and checks.needs_grad(*call[:2]):
        y = _BiasGelu.apply(backend, *call)
    else:
        y = backend.fwd(*call)
    return y.view(x.shape)


def bias_residual_layer_norm(
    x, bias, residual, weight, ln_bias, *, eps=1e-12, return_sum=False, pack_from=None, unpack_to=None
):
    """Add a bias and a residual and normalise each row: y = weight (z - mean) / sqrt(var + eps) + ln_bias,
    z = x + bias + residual.

    Shapes: x (..., d); residual like x, or None; bias, weight and ln_bias (d,) or None (0, 1 and 0); returns x's shape,
        contiguous. d = 0 and zero rows are legal.
    Dtypes: x and residual alike, float16, bfloat16, float32 or (CPU and reference) float64; bias, weight and ln_bias
        each x's dtype or float32. Sums and statistics run in float32, the variance as a second pass over z - mean.
    Layout: last dim contiguous; leading dims that collapse to evenly spaced rows; no copy is made.
    eps: added to the variance, as in BERT by default; DeBERTa uses 1e-7.
    return_sum: also return z, in y's shape and x's dtype (a pre-norm layer's next residual).
    pack_from: a PackPlan; x and residual are then padded (B, S, d), their real tokens are gathered on load and y is
        packed (R, d), with zeros in the unused rows of a plan with capacity.
    unpack_to: a PackPlan; x and residual are then packed (R, d) and y is written padded (B, S, d), 0 at padding.
    Under autocast x and residual are cast to its dtype, unlike torch's layer_norm, which then returns float32.

    Gradients: x, bias, residual, weight, ln_bias, in one pass over x, residual and the incoming gradient. The gradients
        of x and residual are one tensor, computed and stored once. Always bitwise repeatable: sums over rows are
        float32 partial sums of fixed runs of rows, added in order.
    Saved: the inputs and two floats a row, not z. Either way forward and backward move 7 tensors of x's size; this way
        the forward writes only y, and the gradient does not see z rounded.
    Cost: reads x and residual and writes y once; backward reads them and dy and writes one gradient.
    Source: Ba, Kiros and Hinton 2016; ByteTransformer (Zhai et al. 2023) for the fusion with unpacking.

    >>> x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> bias_residual_layer_norm(x, None, None, torch.ones(4), torch.zeros(4))
    tensor([[-1.0690, -0.5345,  0.0000,  1.6036]])
    """
    call, inverse, shape = _prepare_norm_all(x, bias, residual, weight, ln_bias, eps, return_sum, pack_from, unpack_to)
    backend = _NORM.choose(*call)
    if backend.bwd is not None and checks.needs_grad(*call[:5]):
        y, z = _BiasResidualLayerNorm.apply(backend, inverse, *call)
    else:
        y, z, *_ = backend.fwd(*call)
    return (y.view(shape), z.view(shape)) if return_sum else y.view(shape)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, bias, tanh):
        ctx.save_for_backward(x, bias)
        ctx.bwd, ctx.tanh = backend.bwd, tanh
        return backend.fwd(x, bias, tanh)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        want_dbias = ctx.needs_input_grad[2]
        dx, dbias = ctx.bwd(_dense(dy), x, bias, ctx.tanh, want_dbias)
        return None, dx, dbias if want_dbias else None, None


class _BiasResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, inverse, x, bias, residual, weight, ln_bias, index, eps, want_sum):
        y, z, stats = backend.fwd(x, bias, residual, weight, ln_bias, index, eps, want_sum)
        ctx.save_for_backward(x, bias, residual, weight, ln_bias, stats, inverse)
        ctx.bwd, ctx.rows, ctx.want_sum = backend.bwd, y.shape, want_sum
        ctx.set_materialize_grads(False)
        if not want_sum:
            ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx, dy, dz):
        x, *_ = saved = ctx.saved_tensors
        dy = x.new_zeros(ctx.rows) if dy is None else _dense(dy)
        dz = _dense(dz) if ctx.want_sum and dz is not None else None  # a compiled graph fills in empty zeros
        _, _, need_x, need_bias, need_residual, need_weight, need_ln_bias, *_ = ctx.needs_input_grad
        want_params = need_bias or need_weight or need_ln_bias
        dx, dbias, dweight, dln_bias = ctx.bwd(dy, dz, *saved, want_params)
        return (
            None, None, dx if need_x else None, dbias if need_bias else None, dx if need_residual else None,
            dweight if need_weight else None, dln_bias if need_ln_bias else None, None, None, None,
        )  # fmt: skip


def _dense(grad):
    """An incoming gradient whose last dim is contiguous (that of a sum is expanded)."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _rows(name, argument, x):
    """x (..., d) as evenly spaced rows (N, d), without a copy."""
    checks.require(isinstance(x, torch.Tensor), name, f"{argument} must be a tensor", type(x).__name__, error=TypeError)
    checks.require(x.dim() >= 1, name, f"{argument} must have shape (..., d)", ())
    checks.float_dtype(name, argument, x)
    checks.last_dim_contiguous(name, (argument,), (x,))
    if x.dim() == 2:
        return x
    if x.dim() == 1:
        return x.unsqueeze(0)
    kept = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()) if size != 1]
    if x.numel() and any(outer[1] != inner[0] * inner[1] for outer, inner in zip(kept, kept[1:])):
        rule = f"the leading dims of {argument} must collapse to evenly spaced rows"
        checks.require(False, name, rule, f"shape {tuple(x.shape)}, strides {x.stride()}", "call .contiguous() on it")
    return x.flatten(0, -2)


def _parameter(name, argument, parameter, x):
    """A vector over the last dim of x, or None. A call checks four of them, so no text is made for those that fit."""
    if parameter is None:
        return None
    allowed = (x.dtype, torch.float32)
    if parameter.dtype not in allowed:
        (parameter,) = checks.autocast(parameter)
    fits = parameter.shape == x.shape[-1:] and parameter.dtype in allowed and parameter.device == x.device
    if not fits:
        width, rule = x.shape[-1], f"{argument} must have the dtype of x, {x.dtype}, or float32"
        shape = tuple(parameter.shape)
        checks.require(shape == (width,), name, f"{argument} must have shape ({width},)", shape)
        checks.require(parameter.dtype in allowed, name, rule, parameter.dtype, error=TypeError)
        checks.require(False, name, f"{argument} must be on the device of x, {x.device}", parameter.device)
    checks.last_dim_contiguous(name, (argument,), (parameter,))
    return parameter


def _prepare_gelu(x, bias, *, approximate="none"):
    rows = _rows(_GELU_OP, "x", x)
    checks.require(approximate in ("none", "tanh"), _GELU_OP, "approximate must be 'none' or 'tanh'", repr(approximate))
    (rows,) = checks.autocast(rows)
    return rows, _parameter(_GELU_OP, "bias", bias, rows), approximate == "tanh"


def _prepare_norm(x, bias, residual, weight, ln_bias, *, eps=1e-12, return_sum=False, pack_from=None, unpack_to=None):
    """The call tuple for dispatch.explain: the public signature, checked."""
    return _prepare_norm_all(x, bias, residual, weight, ln_bias, eps, return_sum, pack_from, unpack_to)[0]


def _prepare_norm_all(x, bias, residual, weight, ln_bias, eps, return_sum, pack_from, unpack_to):
    """Check everything; the arguments of the private op, the inverse of its index, and the shape of the result."""
    name, rows = _NORM_OP, _rows(_NORM_OP, "x", x)
    if residual is None:
        (rows,) = checks.autocast(rows)
    else:
        if residual.shape != x.shape:
            rule = f"residual must have the shape of x, {tuple(x.shape)}"
            checks.require(False, name, rule, tuple(residual.shape))
        rows, residual = checks.autocast(rows, _rows(name, "residual", residual))
        checks.same_dtype_device(name, ("x", "residual"), (rows, residual))
    parameters = (("bias", bias), ("weight", weight), ("ln_bias", ln_bias))
    bias, weight, ln_bias = (_parameter(name, argument, value, rows) for argument, value in parameters)
    checks.require(eps >= 0, name, "eps must be >= 0", eps)
    index = inverse = None
    shape = x.shape
    plan = unpack_to if pack_from is None else pack_from
    if plan is not None:
        both = pack_from is not None and unpack_to is not None
        checks.require(not both, name, "takes at most one of pack_from and unpack_to", "both")
        packed, padded = (plan.indices.shape[0], x.shape[-1]), (plan.batch, plan.padded_len, x.shape[-1])
        given, shape = (packed, padded) if pack_from is None else (padded, packed)
        rule = f"x must have the plan's {'packed' if pack_from is None else 'padded'} shape {given}"
        checks.require(tuple(x.shape) == given, name, rule, tuple(x.shape))
        device = plan.indices.device
        checks.require(x.device == device, name, f"x must be on the plan's device, {device}", x.device)
        index, inverse = (plan.inverse, plan.indices) if pack_from is None else (plan.indices, plan.inverse)
    return (rows, bias, residual, weight, ln_bias, index, float(eps), return_sum), inverse, shape


def _refuse_cuda(x, *rest):
    reason = _native.refuse_cuda(x)
    return "no float64" if reason is None and x.dtype == torch.float64 else reason


def _refuse_cpu(x, *rest):
    return _native.refuse_cpu(x)


_GELU = dispatch.Table(
    _GELU_OP,
    _prepare_gelu,
    dispatch.Backend("cuda", _refuse_cuda, _gelu_fwd, _gelu_bwd),
    dispatch.Backend("cpu", _refuse_cpu, _gelu_fwd, _gelu_bwd),
    dispatch.Backend("reference", dispatch.never, reference.bias_gelu),
    probe=lambda device: (torch.zeros(1, 8, device=device), None),
)
_NORM = dispatch.Table(
    _NORM_OP,
    _prepare_norm,
    dispatch.Backend("cuda", _refuse_cuda, _norm_fwd, _norm_bwd),
    dispatch.Backend("cpu", _refuse_cpu, _norm_fwd, _norm_bwd),
    dispatch.Backend("reference", dispatch.never, reference.bias_residual_layer_norm),
    probe=lambda device: (torch.zeros(1, 8, device=device), *[None] * 4),
)


def _gradient_fake(parameter, wanted, x):
    """The gradient of a parameter that is given and wanted, else an empty vector."""
    if wanted and parameter is not None:
        return parameter.new_empty(parameter.shape)
    return x.new_empty((0,))


@fake("bias_gelu_fwd")
def _gelu_fwd_fake(x, bias, tanh):
    return x.new_empty(x.shape)


@fake("bias_gelu_bwd")
def _gelu_bwd_fake(dy, x, bias, tanh, want_dbias):
    return x.new_empty(x.shape), _gradient_fake(bias, want_dbias, x)


@fake("bias_residual_layer_norm_fwd")
def _norm_fwd_fake(x, bias, residual, weight, ln_bias, index, eps, want_sum):
    rows, width = x.shape if index is None else (index.shape[0], x.shape[1])
    stats = x.new_empty((rows, 2), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty((rows, width)), x.new_empty((rows if want_sum else 0, width)), stats


@fake("bias_residual_layer_norm_bwd")
def _norm_bwd_fake(dy, dz, x, bias, residual, weight, ln_bias, stats, inverse, want_params):
    gradients = (_gradient_fake(parameter, want_params, x) for parameter in (bias, weight, ln_bias))
    return x.new_empty(x.shape), *gradients
