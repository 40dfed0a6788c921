"""Argument checks shared by the public functions. Messages read `op: rule; got value (what to do)`."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition, op, rule, value, hint="", error=ValueError):
    if not condition:
        raise error(f"{op}: {rule}; got {value}" + (f" ({hint})" if hint else ""))


def float_dtype(op, name, tensor):
    rule = f"{name} must be float16, bfloat16, float32 or float64"
    require(tensor.dtype in FLOATS, op, rule, tensor.dtype, error=TypeError)


def same_dtype_device(op, names, tensors):
    first = tensors[0]
    for name, tensor in zip(names[1:], tensors[1:]):
        rule = f"{name} must have the dtype of {names[0]}, {first.dtype}"
        require(tensor.dtype == first.dtype, op, rule, tensor.dtype, error=TypeError)
        rule = f"{name} must be on the device of {names[0]}, {first.device}"
        require(tensor.device == first.device, op, rule, tensor.device)


def last_dim_contiguous(op, names, tensors):
    for name, tensor in zip(names, tensors):
        contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
        rule, got = f"the last dim of {name} must be contiguous", f"stride {tensor.stride(-1)}"
        require(contiguous, op, rule, got, "call .contiguous() on it")


def cu_seqlens(op, name, cu, total, device):
    """Check packed-sequence offsets and return them as int32; the values only where that costs no device sync."""
    require(isinstance(cu, torch.Tensor), op, f"{name} must be a tensor", type(cu).__name__, error=TypeError)
    require(cu.dtype in (torch.int32, torch.int64), op, f"{name} must be int32 or int64", cu.dtype, error=TypeError)
    require(cu.dim() == 1 and cu.shape[0] >= 1, op, f"{name} must have shape (B+1,)", tuple(cu.shape))
    rule = f"{name} must be on the device of q, {device}"
    require(cu.device == device, op, rule, cu.device, "move it with .to(device)")
    if cu.device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu.tolist()
        rule = f"{name} must start at 0, never decrease and end at or before the {total} packed rows"
        legal = values[0] == 0 and values[-1] <= total and values == sorted(values)
        require(legal, op, rule, values if len(values) < 20 else f"{values[:20]}...")
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
