"""First-order linear recurrences as a scan."""

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.linear_scan import linear_scan as reference

_OP = "linear_scan"
_fwd, _bwd = op("linear_scan_fwd"), op("linear_scan_bwd")


def linear_scan(
    gates,
    tokens,
    initial_state=None,
    *,
    gate="linear",
    reverse=False,
    cu_seqlens=None,
    reset=None,
    output_final_state=False,
):
    """Run a gated sum over time: h_t = a_t * h_{t-1} + b_t, with a = gates (or exp(gates)) and b = tokens.

    Shapes: tokens (B, T, H, D) or (B, T, D); packed, with cu_seqlens, (T, H, D), (1, T, H, D) or (T, D). Returns h in
        the shape of tokens. gates: the shape of tokens (one gate an element); that without D (one gate a head, or a
        token of (B, T, D)); (H, D) or (H,) (constant in time), (D,) where tokens have no head dim. Where two readings
        fit, the earlier one holds. Nothing is broadcast in memory.
    Dtypes: tokens float16, bfloat16, float32 or (CPU and reference) float64; gates the same or float32. h, its carries
        and products run in float32 (float64); only the stored h is rounded.
    Layout: last dim contiguous, any other strides, no copy.
    initial_state: h before the first token, (S, H, D) or (S, D), float32 (float64 for float64 tokens); S = B, or the
        number of packed sequences. None is 0; then the first gate acts on nothing and has gradient 0.
    gate: "linear": a = gates, any real number, above 1 too; "log": a = exp(gates).
    reverse: from the last token to the first, h_t = a_t * h_{t+1} + b_t, within each sequence; the initial state then
        stands behind the last token, and the final state is h of the first.
    cu_seqlens (S+1,) int32 or int64: sequence s owns rows cu[s]..cu[s+1]; rows from cu[S] on give 0, gradient 0.
    reset (B, T), packed (T,), bool: the scan forgets everything before (reverse: after) such a token, its initial
        state too.
    output_final_state: also return the last h of each sequence, shaped and typed as initial_state.

    A sequence without tokens returns its initial state. On the CPU a bad cu_seqlens raises ValueError; on a GPU it
    gives wrong results, but reads nothing out of bounds.
    Gradients: gates, tokens, initial_state, through the final state too. Deterministic, on the CPU for any number of
    threads, on a GPU in every schedule. No division, and products of gates run in float64 where they are needed, so no
    overflow that the recurrence has not. Host sync: none, except in the reference.
    Cost: reads gates and tokens once, writes h once; backward reads gates, h and its gradient, writes two gradients.
    On the CPU sequences beyond 4096 tokens are cut into chunks where there are fewer rows than threads.
    Source: Blelloch, Prefix Sums and Their Applications (1990), section 1.4, first-order recurrences.

    >>> h = linear_scan(torch.tensor([0.5]), torch.ones(1, 3, 1, 1))
    >>> h.flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    shape, lead = tokens.shape, _time_dims(tokens, cu_seqlens)
    call = _prepare(gates, tokens, initial_state, gate=gate, reverse=reverse, cu_seqlens=cu_seqlens, reset=reset)
    backend = _TABLE.choose(*call)
    if backend.name == "reference":
        out, final = reference(*call)
    elif checks.needs_grad(*call[:3]):
        out, final = _LinearScan.apply(backend, *call)
    else:
        out, final = backend.fwd(*call)
    out = out.reshape(shape)
    return (out, final.reshape(final.shape[0], *shape[lead:])) if output_final_state else out


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, gates, tokens, initial, cu_seqlens, reset, log_gate, reverse):
        out, final = backend.fwd(gates, tokens, initial, cu_seqlens, reset, log_gate, reverse)
        ctx.save_for_backward(gates, out, initial, cu_seqlens, reset)
        ctx.bwd, ctx.options = backend.bwd, (log_gate, reverse)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    def backward(ctx, dout, dfinal):
        gates, out, initial, cu_seqlens, reset = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(out.shape[-1:]).expand_as(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        if dfinal is not None:
            dfinal = dfinal.contiguous()
        dgates, dtokens, dinitial = ctx.bwd(dout, dfinal, gates, out, initial, cu_seqlens, reset, *ctx.options)
        return None, dgates, dtokens, None if initial is None else dinitial, None, None, None, None


def _prepare(
    gates, tokens, initial_state=None, *, gate="linear", reverse=False, cu_seqlens=None, reset=None,
    output_final_state=False,
):  # fmt: skip
    """The public signature, checked, as the arguments of the private op: gates and tokens (B, T, H, D)."""
    checks.float_dtype(_OP, "tokens", tokens)
    state_dtype = checks.state_dtype(tokens)
    checks.require(
        gates.device == tokens.device, _OP, f"gates must be on the device of tokens, {tokens.device}", gates.device
    )
    rule = f"gates must have the dtype of tokens, {tokens.dtype}, or {state_dtype}"
    checks.require(gates.dtype in (tokens.dtype, state_dtype), _OP, rule, gates.dtype, error=TypeError)
    checks.require(gate in ("linear", "log"), _OP, 'gate must be "linear" or "log"', repr(gate))
    gates, tokens, row = _with_all_dims(gates, tokens, cu_seqlens)
    checks.last_dim_contiguous(_OP, ("gates", "tokens"), (gates, tokens))
    cu_seqlens, reset, states = checks.scan_sequences(_OP, tokens, cu_seqlens, reset)
    if initial_state is not None:
        initial_state = checks.scan_state(_OP, "initial_state", initial_state, (states, *row), tokens)
        initial_state = initial_state.reshape(states, *tokens.shape[2:])
    log_gate = gate == "log"
    if log_gate and gates.shape[:2] == (1, 1):  # constant in time: one exp for all tokens
        gates, log_gate = torch.exp(gates.to(state_dtype)), False
    if gates.shape[-1] == tokens.shape[-1] and _mergeable(gates) and _mergeable(tokens):
        # A gate an element: heads are only more elements, and one wide row is faster than several narrow ones.
        gates, tokens = (x.flatten(2).unsqueeze(2) for x in (gates, tokens))
        initial_state = None if initial_state is None else initial_state.flatten(1).unsqueeze(1)
    return gates, tokens, initial_state, cu_seqlens, reset, log_gate, bool(reverse)


def _time_dims(tokens, cu_seqlens):
    """How many leading dims of tokens are batch and time: packed tensors may come without a batch."""
    return 1 if cu_seqlens is not None and tokens.dim() < 4 else 2


def _with_all_dims(gates, tokens, cu_seqlens):
    """gates and tokens as views (B, T, H, D), in gates 1 for what is constant; and the shape of one state."""
    lead = _time_dims(tokens, cu_seqlens)
    shape = tuple(tokens.shape)
    time, row = shape[:lead], shape[lead:]
    rule = "tokens must have shape (B, T, H, D) or (B, T, D), packed (T, H, D), (1, T, H, D) or (T, D)"
    checks.require(len(row) in (1, 2), _OP, rule, shape)
    options = [(shape, shape), (shape[:-1], (*shape[:-1], 1)), (row, (1,) * lead + row)]
    if len(row) == 2:
        options.append((row[:-1], (1,) * lead + (row[0], 1)))
    full = [full for fits, full in options if tuple(gates.shape) == fits]
    rule = f"gates must have one of the shapes {[fits for fits, _ in options]}"
    checks.require(full, _OP, rule, tuple(gates.shape))
    without_batch, heads = (1,) * (2 - lead), (1,) * (2 - len(row))
    gates = gates.reshape(*without_batch, *full[0][:lead], *heads, *full[0][lead:])
    return gates, tokens.reshape(*without_batch, *time, *heads, *row), row


def _mergeable(x):
    return x.shape[2] > 1 and (x.stride(2) == x.shape[3] or x.shape[3] == 1 == x.stride(2))


def _refuse_cpu(gates, tokens, *rest):
    return _native.refuse_cpu(tokens)


def _refuse_cuda(gates, tokens, *rest):
    reason = _native.refuse_cuda(tokens)
    return "no float64" if reason is None and tokens.dtype == torch.float64 else reason


def _probe(device):
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cuda", _refuse_cuda, _fwd, _bwd),
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("linear_scan_fwd")
def _fwd_fake(gates, tokens, initial, cu_seqlens, reset, log_gate, reverse):
    states = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return tokens.new_empty(tokens.shape), tokens.new_empty(
        (states, *tokens.shape[2:]), dtype=checks.state_dtype(tokens)
    )


@fake("linear_scan_bwd")
def _bwd_fake(dout, dfinal, gates, out, initial, cu_seqlens, reset, log_gate, reverse):
    states = 0 if initial is None else initial.shape[0]
    dinitial = out.new_empty((states, *out.shape[2:]), dtype=checks.state_dtype(out))
    return gates.new_empty(gates.shape), out.new_empty(out.shape), dinitial
