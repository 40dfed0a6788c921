"""Selective scan (Mamba's state space recurrence), in one direction and in both."""

from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.selective_scan import selective_scan as reference

_OP = "selective_scan"
_MAX_STATES = 256
_WIDE_SHARED = 128 << 10  # bytes that the CUDA backward takes, at most, for more than 64 states
# Tokens between the states that the forward keeps for the backward: N / CHUNK float32 numbers for each element of u.
CHUNK = 64
CUDA_CHUNK = 32  # a tile of the CUDA kernels
_fwd, _bwd = op("selective_scan_fwd"), op("selective_scan_bwd")
_fwd_triton, _bwd_triton = op("selective_scan_fwd_triton"), op("selective_scan_bwd_triton")


class SelectiveInputs(NamedTuple):
    """The tensors of one direction of `bi_selective_scan`, as in `selective_scan`."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    skip: torch.Tensor | None = None
    z: torch.Tensor | None = None
    delta_bias: torch.Tensor | None = None


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    skip=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    initial_state=None,
    layout="BDL",
    reverse=False,
    cu_seqlens=None,
    return_states_at=None,
    output_final_state=False,
):
    """Run a state space model whose step size and projections depend on the token (Mamba's scan).

    With d_t = delta_t + delta_bias, through softplus if asked for, in each channel, over a state x of N numbers:

        x_t = exp(d_t A) x_{t-1} + d_t u_t B_t ,   y_t = <C_t, x_t> + skip u_t ,   out_t = y_t silu(z_t)

    Shapes: layout "BDL": u, delta, z (B, D, L), B and C (B, N, L) or (B, G, N, L); "BLD": u, delta, z (B, L, D), B and
        C (B, L, N) or (B, L, G, N). D channels, L tokens, 1 <= N <= 256; channel c reads group c // (D // G). A (D, N);
        skip (Mamba's D) and delta_bias (D,). Packed, with cu_seqlens, without the batch dim or with one of 1. Returns
        out in the shape of u.
    Dtypes: u, delta, B, C, z alike, float16, bfloat16, float32 or (CPU and reference) float64; A, skip, delta_bias and
        states float32 (float64 for float64 u). Everything is computed in float32 (float64); only results are rounded.
        Under autocast the former five are cast to its dtype.
    Layout: any strides, no copy.
    delta_softplus: softplus as in torch, the identity from 20 on.
    initial_state: x before the first token, (S, D, N), S = B or the number of packed sequences; None is 0.
    reverse: from the last token to the first, within each sequence; equal to flip, scan, flip, without the copies. The
        initial state then stands behind the last token.
    cu_seqlens (S+1,) int32 or int64: sequence s owns tokens cu[s]..cu[s+1]; those from cu[S] on give 0, gradient 0.
    output_final_state: also return x after the last token of each sequence, (S, D, N).
    return_states_at: a sequence of P different token numbers, of the packed tokens where there are any: also return x
        after each, (B, P, D, N), without B where u has none; 0 for a token of no sequence.

    A sequence without tokens returns its initial state. On the CPU a bad cu_seqlens raises ValueError.
    Gradients: all tensors, through the states too. Deterministic, on the CPU for any number of threads. Host sync:
    none, except in the reference.
    Cost: reads u, delta, z, B and C once, writes out once; B L D N exponentials. Where a gradient is needed it keeps
        the state before every 64 tokens (32 with CUDA kernels); the backward recomputes the others. x of all tokens is
        never in memory.
    Source: Gu and Dao, Mamba (2023), equation 2 and algorithm 2, with the simplified discretisation of its code.

    >>> u, B = torch.ones(1, 1, 3), torch.ones(1, 1, 3)
    >>> selective_scan(u, u, -torch.ones(1, 1), B, B).flatten()
    tensor([1.0000, 1.3679, 1.5032])
    """
    batched = u.dim() == 3
    call = _prepare(
        u, delta, A, B, C, skip, z, delta_bias, delta_softplus=delta_softplus, initial_state=initial_state,
        layout=layout, reverse=reverse, cu_seqlens=cu_seqlens, return_states_at=return_states_at,
    )  # fmt: skip
    backend = _TABLE.choose(*call)
    if backend.name == "reference":
        out, final, states = reference(*call)
    elif checks.needs_grad(*call[:9]):
        out, final, states = _SelectiveScan.apply(backend, *call)
    else:
        out, final, states, _ = backend.fwd(*call, 0)
    if not batched:
        out, states = out.squeeze(0), states.squeeze(0)
    extras = [final] if output_final_state else []
    if return_states_at is not None:
        extras.append(states)
    return (out, *extras) if extras else out


def bi_selective_scan(
    forward,
    reverse,
    *,
    delta_softplus=False,
    initial_states=(None, None),
    layout="BDL",
    cu_seqlens=None,
    output_final_state=False,
):
    """Run one selective scan from the first token to the last and one from the last to the first: (out, out).

    forward, reverse: a `SelectiveInputs` each, or a tuple in its order, all in the order of the tokens; the two have
        parameters of their own and may have other widths. Nothing is flipped: a direction is the sign of an index.
    initial_states: x before the first token, and x behind the last. output_final_state: also return the pair of final
        states. The rest, dtypes, gradients and cost are those of `selective_scan`, twice.
    Source: Wang et al., Is Mamba Effective for Time Series Forecasting? (2024), algorithm 1; Zhu et al., Vision Mamba
    (2024), algorithm 1.

    >>> u, B = torch.ones(1, 1, 3), torch.ones(1, 1, 3)
    >>> inputs = SelectiveInputs(u, u, -torch.ones(1, 1), B, B)
    >>> forward, reverse = bi_selective_scan(inputs, inputs)
    >>> torch.equal(reverse, forward.flip(2))
    True
    """
    options = {"delta_softplus": delta_softplus, "layout": layout, "cu_seqlens": cu_seqlens}
    (out_forward, final_forward), (out_reverse, final_reverse) = (
        selective_scan(*inputs, initial_state=state, reverse=direction, output_final_state=True, **options)
        for inputs, state, direction in zip((forward, reverse), initial_states, (False, True))
    )
    outs = out_forward, out_reverse
    return (outs, (final_forward, final_reverse)) if output_final_state else outs


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *call):
        u, delta, A, B, C, skip, z, delta_bias, initial, cu_seqlens, slots, num_slots, *options = call
        chunk = CUDA_CHUNK if backend.name == "cuda" else CHUNK
        ctx.options = (*options, chunk)
        out, final, states, carries = backend.fwd(*call, chunk)
        ctx.save_for_backward(u, delta, A, B, C, skip, z, delta_bias, cu_seqlens, slots, carries)
        ctx.bwd, ctx.has_initial = backend.bwd, initial is not None
        ctx.set_materialize_grads(False)
        return out, final, states

    @staticmethod
    def backward(ctx, dout, dfinal, dstates):
        *inputs, cu_seqlens, slots, carries = ctx.saved_tensors
        if dout is None:
            dout = inputs[0].new_zeros(1).expand_as(inputs[0])
        dfinal, dstates = (None if x is None else x.contiguous() for x in (dfinal, dstates))
        gradients = ctx.bwd(dout, dfinal, dstates, *inputs, ctx.has_initial, cu_seqlens, slots, carries, *ctx.options)
        du, ddelta, dA, dB, dC, dskip, dz, dbias, dinitial = gradients
        _, _, _, _, _, skip, z, bias = inputs
        optional = [dx if there else None for dx, there in ((dskip, skip is not None), (dz, z is not None),
                    (dbias, bias is not None), (dinitial, ctx.has_initial))]  # fmt: skip
        return None, du, ddelta, dA, dB, dC, *optional, *[None] * 6


def _prepare(
    u, delta, A, B, C, skip=None, z=None, delta_bias=None, *, delta_softplus=False, initial_state=None, layout="BDL",
    reverse=False, cu_seqlens=None, return_states_at=None, output_final_state=False,
):  # fmt: skip
    """The public signature, checked, as the arguments of the private op, with batch and group dims."""
    checks.require(layout in ("BDL", "BLD"), _OP, 'layout must be "BDL" or "BLD"', repr(layout))
    time_last = layout == "BDL"
    names, given = ("u", "delta", "B", "C", "z"), (u, delta, B, C, z)
    there = checks.autocast(*(x for x in given if x is not None))
    checks.float_dtype(_OP, "u", there[0])
    checks.same_dtype_device(_OP, names, there)
    u, delta, B, C, z = (*there, None)[:5]
    packed = cu_seqlens is not None and u.dim() == 2
    if packed:
        u, delta, B, C, z = (None if x is None else x.unsqueeze(0) for x in (u, delta, B, C, z))
    rule = "u must have shape (B, {})".format("D, L" if time_last else "L, D")
    checks.require(u.dim() == 3, _OP, rule + ", or without B where it is packed", tuple(u.shape))
    for name, x in (("delta", delta), ("z", z)):
        fits = x is None or x.shape == u.shape
        checks.require(fits, _OP, f"{name} must have the shape of u, {tuple(u.shape)}", fits or tuple(x.shape))
    channels = u.shape[1] if time_last else u.shape[2]
    A = _parameter("A", A, u, (channels, None))
    skip, delta_bias = _parameter("skip", skip, u, (channels,)), _parameter("delta_bias", delta_bias, u, (channels,))
    states = A.shape[1]
    checks.require(1 <= states <= _MAX_STATES, _OP, f"A must have 1 to {_MAX_STATES} columns", states)
    B, C = _with_groups("B", B, u, states, time_last), _with_groups("C", C, u, states, time_last)
    groups = B.shape[1 if time_last else 2]
    checks.require(C.shape == B.shape, _OP, f"C must have the shape of B, {tuple(B.shape)}", tuple(C.shape))
    fits = groups > 0 and channels % groups == 0
    checks.require(fits, _OP, f"the groups of B must divide the {channels} channels", groups)
    tokens = u.transpose(1, 2) if time_last else u
    cu_seqlens, _, rows = checks.scan_sequences(_OP, tokens, cu_seqlens, None)
    if initial_state is not None:
        initial_state = checks.scan_state(_OP, "initial_state", initial_state, (rows, channels, states), u)
    slots, num_slots = _slots(return_states_at, tokens.shape[1], u.device)
    return (
        u, delta, A, B, C, skip, z, delta_bias, initial_state, cu_seqlens, slots, num_slots, bool(delta_softplus),
        bool(reverse), time_last,
    )  # fmt: skip


def _parameter(name, x, u, shape):
    if x is None:
        return None
    dtype = checks.state_dtype(u)
    checks.require(x.dtype == dtype, _OP, f"{name} must be {dtype}", x.dtype, "call .float() on it", TypeError)
    checks.require(x.device == u.device, _OP, f"{name} must be on the device of u, {u.device}", x.device)
    fits = x.dim() == len(shape) and x.shape[0] == shape[0]
    text = f"({shape[0]}, N)" if len(shape) == 2 else f"({shape[0]},)"
    checks.require(fits, _OP, f"{name} must have shape {text}", tuple(x.shape))
    return x.contiguous()


def _with_groups(name, x, u, states, time_last):
    """B or C with a dim of groups."""
    if x.dim() == 3:
        x = x.unsqueeze(1 if time_last else 2)
    batch, length = u.shape[0], u.shape[2 if time_last else 1]
    shape = (batch, "G", states, length) if time_last else (batch, length, "G", states)
    fits = x.dim() == 4 and all(want == "G" or size == want for size, want in zip(x.shape, shape))
    text = "({}, {}, {}, {})".format(*shape)
    checks.require(fits, _OP, f"{name} must have shape {text}, or that without G", tuple(x.shape))
    return x


def _slots(positions, length, device):
    """For each token -1, or which of the wanted states is the one after it; and how many are wanted."""
    if positions is None:
        return None, 0
    positions = [int(t) for t in positions]
    rule = f"return_states_at must hold different tokens of 0..{length - 1}"
    fits = len(set(positions)) == len(positions) and all(0 <= t < length for t in positions)
    checks.require(fits, _OP, rule, positions)
    numbers = {t: number for number, t in enumerate(positions)}
    numbers = [numbers.get(t, -1) for t in range(length)]
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True), len(positions)


def _refuse_cpu(u, *rest):
    return _native.refuse_cpu(u)


def _refuse_cuda(u, delta, A, *rest):
    reason = _native.refuse_cuda(u)
    if reason is None and u.dtype == torch.float64:
        return "takes no float64"
    if reason is None and A.shape[1] > 64:
        shared = torch.cuda.get_device_properties(u.device).shared_memory_per_block_optin
        if shared < _WIDE_SHARED:
            return f"more than 64 states take {_WIDE_SHARED} bytes of shared memory a block; this GPU has {shared}"
    return reason


def _refuse_triton(u, *rest):
    if u.dtype == torch.float64:
        return "takes no float64"
    return dispatch.refuse_triton(u)


def _probe(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    u, B = (torch.zeros(1, size, 2, dtype=dtype, device=device) for size in (64, 16))
    return u, u, torch.zeros(64, 16, device=device), B, B


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cuda", _refuse_cuda, _fwd, _bwd),
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, _bwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("selective_scan_fwd")
def _fwd_fake(
    u, delta, A, B, C, skip, z, delta_bias, initial, cu_seqlens, slots, num_slots, softplus, reverse, time_last, chunk
):
    batch, (channels, states) = u.shape[0], A.shape
    tokens, rows = u.shape[2 if time_last else 1], batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = {"dtype": checks.state_dtype(u)}
    chunks = batch * tokens // chunk + rows if chunk else 0
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, channels, states), **wide),
        u.new_empty((batch, num_slots, channels, states), **wide),
        u.new_empty((chunks, states, channels), **wide),
    )


@fake("selective_scan_bwd")
def _bwd_fake(
    dout, dfinal, dstates, u, delta, A, B, C, skip, z, delta_bias, has_initial, cu_seqlens, slots, carries, softplus,
    reverse, time_last, chunk,
):  # fmt: skip
    channels, states = A.shape
    rows = (u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) if has_initial else 0
    wide = {"dtype": checks.state_dtype(u)}
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        u.new_empty((channels, states), **wide),
        B.new_empty(B.shape),
        B.new_empty(B.shape),
        u.new_empty((channels if skip is not None else 0,), **wide),
        u.new_empty(u.shape if z is not None else (0,)),
        u.new_empty((channels if delta_bias is not None else 0,), **wide),
        u.new_empty((rows, channels, states), **wide),
    )
