"""ARFlow's attention over a sequence of images: softmax inside each, a decayed linear state from one to the next."""

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.reference.chunk_hybrid_attention import chunk_hybrid_attention as reference

_OP = "chunk_hybrid_attention"
_fwd, _bwd = op("chunk_hybrid_attention_fwd"), op("chunk_hybrid_attention_bwd")
_fwd_triton, _bwd_triton = op("chunk_hybrid_attention_fwd_triton"), op("chunk_hybrid_attention_bwd_triton")


def chunk_hybrid_attention(q, k, v, gate, *, chunk, initial_state=None, output_final_state=False):
    """Attend fully inside chunks and linearly to the chunks before: o_n = softmax(Q_n K_n^T) V_n + (Q_n exp(G)) S_n.

    K stands for D ** -0.5 k, G for the running sum of g = logsigmoid(gate) / 16 inside the chunk. After a chunk
    S_{n+1} = exp(mean g) S_n + K_n^T V_n; S_0 is the initial state.

    Shapes: q (B, T, H, D), k (B, T, Hkv, D), v (B, T, Hkv, M) with Hkv | H, gate (B, T, H) raw logits;
        returns (B, T, H, M). T is a multiple of `chunk`, the tokens of one image.
    Dtypes: q, k, v float16, bfloat16, float32, or (CPU and reference) float64, all equal; gate any of them. Scores,
        softmax, decays and the state are float32 (float64 for float64 inputs).
    Layout: last dim of q, k, v contiguous, any other strides, no copy.
    initial_state (B, H, D, M), float32 (float64); output_final_state: also return that after the last chunk, so that a
        sequence may be cut between any two chunks.

    Gradients: q, k, v, gate, initial_state, through the final state too. Deterministic. Host sync: none.
    Cost: T (chunk + D) (D + M) multiply-adds a head; memory O(T), scores are never stored.
    Source: ARFlow (Hui et al. 2025); head widths and the number of chunks are free here, and the final state is that
        of all chunks.

    >>> q, v, gate = torch.zeros(1, 4, 1, 2), torch.arange(4.0).view(1, 4, 1, 1), torch.zeros(1, 4, 1)
    >>> chunk_hybrid_attention(q, q, v, gate, chunk=2).flatten().tolist()
    [0.5, 0.5, 2.5, 2.5]
    """
    call = _prepare(
        q, k, v, gate, chunk=chunk, initial_state=initial_state, output_final_state=output_final_state
    )  # fmt: skip
    backend = _TABLE.choose(*call)
    if backend.name != "triton":  # whose kernels read gates of any width
        call = (*call[:3], call[3].to(checks.state_dtype(q)), *call[4:])
    if backend.name == "reference":
        with torch.autocast(q.device.type, enabled=False):  # its products stay in float32
            o, final = reference(*call)
    elif checks.needs_grad(*call[:5]):
        o, final = _ChunkHybridAttention.apply(backend, *call)
    else:
        o, _, final = backend.fwd(*call)
    return (o, final) if output_final_state else o


class _ChunkHybridAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, gate, state, chunk):
        o, lse, final = backend.fwd(q, k, v, gate, state, chunk)
        ctx.save_for_backward(q, k, v, gate, state, lse)
        ctx.bwd, ctx.chunk = backend.bwd, chunk
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, gate, state, lse = ctx.saved_tensors
        if do is None:
            do = q.new_zeros(v.shape[-1:]).expand(*q.shape[:3], v.shape[-1])
        elif do.stride(-1) != 1:
            do = do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dq, dk, dv, dgate, dstate = ctx.bwd(do, dfinal, q, k, v, gate, state, lse, ctx.chunk)
        dk, dv = (x if x.shape == y.shape else x.unflatten(2, (y.shape[2], -1)).sum(3) for x, y in ((dk, k), (dv, v)))
        return None, dq, dk, dv, dgate, None if state is None else dstate, None


def _prepare(q, k, v, gate, *, chunk, initial_state=None, output_final_state=False):
    """The public signature, checked, as the arguments of the private op."""
    names, tensors = ("q", "k", "v"), checks.autocast(q, k, v)
    for name, x in zip(names, tensors):
        checks.require(x.dim() == 4, _OP, f"{name} must have shape (B, T, H, width)", tuple(x.shape))
    q, k, v = tensors
    checks.float_dtype(_OP, "q", q)
    checks.float_dtype(_OP, "gate", gate)
    checks.same_dtype_device(_OP, names, tensors)
    checks.last_dim_contiguous(_OP, names, tensors)
    (batch, length, heads, width), heads_kv = q.shape, k.shape[2]
    checks.require(heads_kv > 0 and heads % heads_kv == 0, _OP, "the heads of k must divide the heads of q",
                   (heads, heads_kv))  # fmt: skip
    checks.require(
        k.shape == (batch, length, heads_kv, width), _OP, "k must have the batch, tokens and width of q",
        (tuple(q.shape), tuple(k.shape)),
    )  # fmt: skip
    checks.require(
        v.shape[:3] == k.shape[:3], _OP, "v must have the batch, tokens and heads of k",
        (tuple(k.shape), tuple(v.shape)),
    )  # fmt: skip
    checks.require(width > 0 and v.shape[3] > 0, _OP, "head widths must be positive", (width, v.shape[3]))
    checks.require(gate.shape == (batch, length, heads), _OP, f"gate must have shape {(batch, length, heads)}",
                   tuple(gate.shape))  # fmt: skip
    checks.require(gate.device == q.device, _OP, f"gate must be on the device of q, {q.device}", gate.device)
    checks.require(chunk >= 1, _OP, "chunk must be >= 1", chunk)
    checks.require(length % chunk == 0, _OP, f"the tokens must be a multiple of chunk={chunk}", length)
    if initial_state is not None:
        shape = (batch, heads, width, v.shape[3])
        initial_state = checks.scan_state(_OP, "initial_state", initial_state, shape, q).contiguous()
    if gate.dtype == torch.float64:
        gate = gate.to(checks.state_dtype(q))
    return q, k, v, gate, initial_state, chunk


def _refuse_cpu(q, *rest):
    return _native.refuse_cpu(q)


def _refuse_triton(q, k, v, *rest):
    reason = dispatch.refuse_triton(q)
    if reason is None and max(q.shape[3], v.shape[3]) > 128:
        reason = f"head widths must be at most 128; got {max(q.shape[3], v.shape[3])}"
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    return reason


def _probe(device):
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x, x[..., 0]


def _prepare_probe(*args, chunk=1, **kwargs):
    """`explain` and `flowattn.info` may leave the chunk out."""
    return _prepare(*args, chunk=chunk, **kwargs)


_TABLE = dispatch.Table(
    _OP,
    _prepare_probe,
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, _bwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)


@fake("chunk_hybrid_attention_fwd")
def _fwd_fake(q, k, v, gate, state, chunk):
    batch, length, heads, width = q.shape
    wide = checks.state_dtype(q)
    lse = q.new_empty((batch, heads, length), dtype=wide)
    final = q.new_empty((batch, heads, width, v.shape[3]), dtype=wide)
    return q.new_empty((batch, length, heads, v.shape[3])), lse, final


@fake("chunk_hybrid_attention_bwd")
def _bwd_fake(do, dfinal, q, k, v, gate, state, lse, chunk):
    batch, length, heads, width = q.shape
    dv = q.new_empty((batch, length, heads, v.shape[3]))
    shape = (0 if state is None else batch, heads, width, v.shape[3])
    dstate = q.new_empty(shape, dtype=checks.state_dtype(q))
    return q.new_empty(q.shape), q.new_empty(q.shape), dv, gate.new_empty(gate.shape), dstate
