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
    return cu.to(torch.int32).contiguous()  # neither copies what is right already; the kernels read it at stride 1


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on for their device (float64 is left alone)."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def state_dtype(tensor):
    """The dtype of states and running sums over this tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scan_sequences(op, tokens, cu, reset):
    """Check what cuts tokens (B, T, ...) into sequences: (cu_seqlens int32 or None, reset (B, T) or None, states)."""
    batch, length = tokens.shape[:2]
    if cu is not None:
        require(batch == 1, op, "packed tensors must have a leading dim of 1 or none", batch)
        cu = cu_seqlens(op, "cu_seqlens", cu, length, tokens.device)
    if reset is not None:
        require(reset.dtype == torch.bool, op, "reset must be bool", reset.dtype, error=TypeError)
        require(reset.device == tokens.device, op, f"reset must be on the device {tokens.device}", reset.device)
        if cu is not None and reset.dim() == 1:
            reset = reset.unsqueeze(0)
        require(reset.shape == (batch, length), op, f"reset must have shape {(batch, length)}", tuple(reset.shape))
    return cu, reset, batch if cu is None else cu.shape[0] - 1


def scan_state(op, name, state, shape, tokens):
    """Check a state tensor; return it with a contiguous last dim."""
    dtype = state_dtype(tokens)
    require(isinstance(state, torch.Tensor), op, f"{name} must be a tensor", type(state).__name__, error=TypeError)
    require(state.dtype == dtype, op, f"{name} must be {dtype}", state.dtype, "states are kept wide", error=TypeError)
    require(state.device == tokens.device, op, f"{name} must be on the device {tokens.device}", state.device)
    require(state.shape == shape, op, f"{name} must have shape {tuple(shape)}", tuple(state.shape))
    return state if state.shape[-1] <= 1 or state.stride(-1) == 1 else state.contiguous()
