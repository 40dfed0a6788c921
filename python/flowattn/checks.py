"""Argument checks shared by the public functions. Messages read `op: rule; got value (what to do)`."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op, rule, value, hint="", error=ValueError):
    raise error(f"{op}: {rule}; got {value}" + (f" ({hint})" if hint else ""))


def require(condition, op, rule, value, hint="", error=ValueError):
    """For rules whose text costs nothing to make; a hot path tests first and then calls `fail`."""
    if not condition:
        fail(op, rule, value, hint, error)


def float_dtype(op, name, tensor):
    if tensor.dtype not in FLOATS:
        fail(op, f"{name} must be float16, bfloat16, float32 or float64", tensor.dtype, error=TypeError)


def same_dtype_device(op, names, tensors):
    first = tensors[0]
    for name, tensor in zip(names, tensors):
        if tensor.dtype != first.dtype:
            fail(op, f"{name} must have the dtype of {names[0]}, {first.dtype}", tensor.dtype, error=TypeError)
        if tensor.device != first.device:
            fail(op, f"{name} must be on the device of {names[0]}, {first.device}", tensor.device)


def last_dim_contiguous(op, names, tensors):
    for name, tensor in zip(names, tensors):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            got = f"stride {tensor.stride(-1)}"
            fail(op, f"the last dim of {name} must be contiguous", got, "call .contiguous() on it")


def cu_seqlens(op, name, cu, total, device):
    """Check packed-sequence offsets and return them as int32; the values only where that costs no device sync."""
    if not isinstance(cu, torch.Tensor):
        fail(op, f"{name} must be a tensor", type(cu).__name__, error=TypeError)
    if cu.dtype not in (torch.int32, torch.int64):
        fail(op, f"{name} must be int32 or int64", cu.dtype, error=TypeError)
    if cu.dim() != 1 or cu.shape[0] < 1:
        fail(op, f"{name} must have shape (B+1,)", tuple(cu.shape))
    if cu.device != device:
        fail(op, f"{name} must be on the device of q, {device}", cu.device, "move it with .to(device)")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu.tolist()
        if values[0] != 0 or values[-1] > total or values != sorted(values):
            rule = f"{name} must start at 0, never decrease and end at or before the {total} packed rows"
            fail(op, rule, values if len(values) < 20 else f"{values[:20]}...")
    return cu if cu.dtype == torch.int32 else cu.to(torch.int32)


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on for their device (float64 is left alone)."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
