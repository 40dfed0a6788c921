"""Padding-free (variable-length) multi-head attention."""

import torch

from flowattn import _native, checks, dispatch
from flowattn._library import fake, op
from flowattn.ops import attention_scores
from flowattn.reference.varlen_attention import varlen_attention as reference

_OP = "varlen_attention"
_PLAIN = 6  # options of the private ops before the score options: max_seqlen_q .. top_left
_fwd, _bwd = op("varlen_attention_fwd"), op("varlen_attention_bwd")
_fwd_disentangled, _bwd_disentangled = op("varlen_attention_disentangled_fwd"), op("varlen_attention_disentangled_bwd")
_fwd_triton, _bwd_triton = op("varlen_attention_fwd_triton"), op("varlen_attention_bwd_triton")
_fwd_disentangled_triton = op("varlen_attention_disentangled_fwd_triton")
_bwd_disentangled_triton = op("varlen_attention_disentangled_bwd_triton")


def varlen_attention(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    *,
    scale=None,
    causal=False,
    causal_align="bottom_right",
    window=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    dropout_p=0.0,
    deterministic=False,
    return_lse=False,
    plan=None,
):
    """Attend within each sequence of a packed batch: o_i = sum_j dropout(softmax_j(scale * q_i . k_j + bias_ij)) v_j.

    Shapes: q (Tq, H, D); k (Tk, Hkv, D) with Hkv | H; v (Tk, Hkv, Dv); returns (Tq, H, Dv). A leading dim of size 1 is
        accepted and returned alike. cu_seqlens_q and cu_seqlens_k (B+1,): sequence b owns rows cu[b]..cu[b+1];
        cu_seqlens_k=None means cu_seqlens_q. Rows from cu[B] on are ignored: output 0, gradient 0.
    Dtypes: q, k, v alike, float16, bfloat16, float32 or (CPU and reference) float64; cu_seqlens int32, or int64, which
        costs a conversion. Scores, softmax and sums run in float32.
    Layout: last dim contiguous, any other strides, so q, k, v may be views of one projection; no copy is made.
    scale: multiplies q . k; default D ** -0.5.
    causal, window: query i sees key j where i + s - left <= j <= i + s + right, -1 = unbounded, causal = right 0, with
        s = Lk - Lq (causal_align="bottom_right") or 0 ("top_left").
    softcap > 0: scores become softcap * tanh(score / softcap), before any bias is added.
    alibi_slopes: float32 (H,) or (B, H): adds -slope * |i + s - j|. No gradient.
    bias: added to the scores, in the dtype of q or float32, with gradient. A RelativeBias, a DisentangledBias (Triton
        rounds its tables to the dtype of q), or dense (H, S, S) or (B, H, S, S), any strides, S at least the longest
        sequence (Triton takes what is missing as 0). B or H of size 1 is broadcast and its gradient summed in place;
        that of a tensor expanded beforehand has the expanded size.
    dropout_p: drops probabilities and divides the others by 1 - dropout_p; the LSE is that without dropout. Two int64
        numbers from the device's default generator decide, together with the sequence's place in the batch, the head
        and i and j (docs/design.md): not the lengths of other sequences, the plan, the backend or the direction.
    max_seqlen_q, max_seqlen_k: host ints that choose tile shapes; any value is correct, None picks from the shapes.
    plan: the PackPlan of these sequences; its tile list, sorted by work, is then used on a GPU.
    deterministic: bitwise repeatable gradients, also with torch.use_deterministic_algorithms(True).
    return_lse: also return the log-sum-exp of the scores (H, Tq), float32, natural log, differentiable.

    A query that sees no key gives 0 and LSE -inf, with zero gradients. Empty sequences and B = 0 are legal.
    On the CPU a bad cu_seqlens raises ValueError; on a GPU it is never read out of bounds, the result is unspecified.
    Gradients: q, k, v, bias. No host sync except in the reference.
    Cost: 2 H (D + Dv) FLOPs a visible pair forward, 2.5 times that backward; memory O(T), and for the gradient of
        a dense bias its size in float32. Each table of a DisentangledBias adds 2 H D to 4 H D FLOPs a pair forward,
        three times that backward, where on the CPU up to 8 float32 copies of it are summed; on a GPU 4 H D, five
        times that backward, and float32 partial sums of 4 reach H D numbers, several of them where H reach is small.
    Source: FlashAttention-2 (Dao 2023), Algorithms 1 and 2; ByteTransformer (Zhai et al. 2023) for the packed layout.

    >>> q = torch.randn(5, 2, 8)
    >>> out = varlen_attention(q, q, q, torch.tensor([0, 2, 5], dtype=torch.int32))
    >>> out.shape
    torch.Size([5, 2, 8])
    """
    batched = q.dim() == 4
    *call, scores = _prepare(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=scale, causal=causal,
        causal_align=causal_align, window=window, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias,
        dropout_p=dropout_p, plan=plan,
    )  # fmt: skip
    backend = _TABLE.choose(*call, scores)
    if scores:
        rng = torch.randint(2**63 - 1, (2,), device=q.device) if dropout_p else None
        scores = (*scores[:6], rng, *scores[6:])
        if len(scores) > 7 and backend.name != "reference":
            backend = _DISENTANGLED[backend.name]
    if backend.name == "reference":
        out, lse = _reference(*call, *scores)
    elif checks.needs_grad(*call[:3], *scores[2:4], *scores[7:]):
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        q, k, v, cu_q, cu_k, *options = call
        cu_k = None if cu_k is cu_q else cu_k  # Dynamo refuses an autograd.Function that is given one tensor twice
        out, lse = _VarlenAttention.apply(backend, deterministic, q, k, v, cu_q, cu_k, *options, *scores)
    else:
        out, lse = backend.fwd(*call, *scores)
    if batched:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    return (out, lse) if return_lse else out


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, deterministic, q, k, v, cu_q, cu_k, tiles, *options):
        ctx.bwd, ctx.options, scores = backend.bwd, (*options[:_PLAIN], deterministic), options[_PLAIN:]
        out, lse = backend.fwd(q, k, v, cu_q, cu_q if cu_k is None else cu_k, tiles, *options)
        saved = (q, k, v, out, lse, cu_q, cu_k, tiles)
        if scores:
            ctx.softcap, slopes, bias, table, lut, ctx.dropout_p, rng, *positions = scores
            saved = (*saved, slopes, bias, table, lut, rng, *positions)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_q, cu_k, tiles, *scores = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        if dout.stride(-1) != 1:
            dout = dout.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty one as it is
        call = (dout, dlse, q, k, v, out, lse, cu_q, cu_q if cu_k is None else cu_k, tiles, *ctx.options)
        grads = [None] * len(ctx.needs_input_grad)
        if not scores:
            grads[2:5] = ctx.bwd(*call)[:3]
            return tuple(grads)
        slopes, bias, table, lut, rng, *positions = scores
        scores = (ctx.softcap, slopes, bias, table, lut, ctx.dropout_p, rng, *positions)
        # The inputs that may be learned besides q, k and v, and where they stand among the arguments of forward.
        learned, first = (positions, len(grads) - 2) if positions else ((bias, table), len(grads) - 5)
        want = ctx.needs_input_grad[first : first + 2]
        dq, dk, dv, *dlearned = ctx.bwd(*call, *scores, any(want))
        grads[2:5] = dq, dk, dv
        for place, x, dx in zip((first, first + 1), learned, dlearned):
            grads[place] = dx.to(x.dtype) if ctx.needs_input_grad[place] else None
        return tuple(grads)


def _prepare(
    q, k, v, cu_q, cu_k=None, max_q=None, max_k=None, *, scale=None, causal=False, causal_align="bottom_right",
    window=(-1, -1), softcap=0.0, alibi_slopes=None, bias=None, dropout_p=0.0, deterministic=False, return_lse=False,
    plan=None,
):  # fmt: skip
    """Check the public arguments; return those of the private op up to top_left, then a tuple of its score options."""
    q, k, v = _check_tensors(q, k, v)
    (total_q, _, width), total_k = q.shape, k.shape[0]
    cu_q_given, cu_q = cu_q, checks.cu_seqlens(_OP, "cu_seqlens_q", cu_q, total_q, q.device)
    if cu_k is None or cu_k is cu_q_given:
        cu_k = cu_q
        if total_q != total_k:
            checks.fail(_OP, "q and k must have the same rows without cu_seqlens_k", (total_q, total_k))
    else:
        cu_k = checks.cu_seqlens(_OP, "cu_seqlens_k", cu_k, total_k, q.device)
        if cu_k.shape != cu_q.shape:
            checks.fail(_OP, "cu_seqlens_q and cu_seqlens_k must have one length", (cu_q.shape[0], cu_k.shape[0]))
    if causal_align not in ("bottom_right", "top_left"):
        checks.fail(_OP, "causal_align must be bottom_right or top_left", repr(causal_align))
    left, right = window
    if left < -1 or right < -1:
        checks.fail(_OP, "window must hold -1 (unbounded) or widths >= 0", window)
    scores = ()  # nothing: the defaults of the private ops
    if softcap or dropout_p or alibi_slopes is not None or bias is not None:
        scores = attention_scores.prepare(_OP, q, cu_q.shape[0] - 1, softcap, alibi_slopes, bias, dropout_p)
    tiles = None
    if plan is not None:
        if plan.cu_seqlens.shape != cu_q.shape or plan.indices.shape[0] != total_q:
            got = (tuple(plan.cu_seqlens.shape), plan.indices.shape[0])
            checks.fail(_OP, f"plan must be the plan of q, {cu_q.shape[0] - 1} sequences in {total_q} rows", got)
        tiles = plan.tiles
    return (
        q, k, v, cu_q, cu_k, tiles, total_q if max_q is None else max_q, total_k if max_k is None else max_k,
        width**-0.5 if scale is None else float(scale), left, 0 if causal else right, causal_align == "top_left",
        scores,
    )  # fmt: skip


def _check_tensors(q, k, v):
    """q, k, v as (T, heads, width), in autocast's dtype."""
    if q.dim() == 4:
        if not q.shape[0] == k.shape[0] == v.shape[0] == 1:
            checks.fail(_OP, "a leading dim of q, k, v must be 1", (q.shape[0], k.shape[0], v.shape[0]))
        q, k, v = q[0], k[0], v[0]
    names, tensors = ("q", "k", "v"), checks.autocast(q, k, v)
    for name, x in zip(names, tensors):
        if x.dim() != 3:
            checks.fail(_OP, f"{name} must have shape (T, heads, width)", tuple(x.shape))
    q, k, v = tensors
    checks.float_dtype(_OP, "q", q)
    checks.same_dtype_device(_OP, names, tensors)
    checks.last_dim_contiguous(_OP, names, tensors)
    (_, heads, width), (total_k, heads_kv, width_k) = q.shape, k.shape
    if width_k != width:
        checks.fail(_OP, f"k must have the width of q, {width}", width_k)
    if v.shape[0] != total_k or v.shape[1] != heads_kv:
        checks.fail(_OP, "v must have the rows and heads of k", (tuple(k.shape), tuple(v.shape)))
    if heads_kv == 0 or heads % heads_kv != 0:
        checks.fail(_OP, "the heads of k must divide the heads of q", (heads, heads_kv))
    if width == 0 or v.shape[2] == 0:
        checks.fail(_OP, "head widths must be positive", (width, v.shape[2]))
    return tensors


def _reference(
    q, k, v, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, softcap=0.0, slopes=None, bias=None,
    table=None, lut=None, dropout_p=0.0, rng=None, position_keys=None, position_queries=None,
):  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):  # its products stay in float32
        return reference(
            q, k, v, cu_q, cu_k, scale, left, right, top_left, softcap=softcap, alibi_slopes=slopes, bias=bias,
            rel_table=table, rel_lut=lut, dropout_p=dropout_p, rng=rng, position_keys=position_keys,
            position_queries=position_queries,
        )  # fmt: skip


def _refuse_cpu(q, *rest):
    return _native.refuse_cpu(q)


def _refuse_cuda(q, k, v, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, scores):
    reason = _native.refuse_cuda(q)
    if reason is None and scores:
        reason = "has no softcap, alibi_slopes, bias or dropout"
    if reason is None and _native.capability(q.device) != (9, 0):
        reason = "needs a Hopper GPU (compute capability 9.0)"
    if reason is None and q.dtype not in (torch.float16, torch.bfloat16):
        reason = f"needs float16 or bfloat16; got {q.dtype}"
    if reason is None and scale <= 0:
        reason = f"needs scale > 0; got {scale}"
    if reason is None and any(not _fits_chunks(x) for x in (q, k, v)):
        reason = "needs widths up to 64 and rows at multiples of 16 bytes"
    return reason


def _fits_chunks(x):
    """Whether a bulk copy can read heads of x as tiles of width 64."""
    strides = [stride for stride, size in zip(x.stride()[:2], x.shape) if size > 1]
    chunked = x.shape[2] <= 64 and x.shape[2] % 8 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return chunked and (torch.compiler.is_compiling() or x.data_ptr() % 16 == 0)


def _refuse_triton(q, k, v, *rest):
    reason = dispatch.refuse_triton(q)
    if reason is None and max(q.shape[2], v.shape[2]) > 256:
        reason = f"head width must be at most 256; got {max(q.shape[2], v.shape[2])}"
    if reason is None and q.dtype == torch.float64:
        reason = "no float64"
    return reason


def _probe(device):
    x = torch.zeros(2, 1, 64, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return x, x, x, torch.tensor([0, 2], dtype=torch.int32, device=device)


_TABLE = dispatch.Table(
    _OP,
    _prepare,
    dispatch.Backend("cuda", _refuse_cuda, _fwd, _bwd_triton),
    dispatch.Backend("cpu", _refuse_cpu, _fwd, _bwd),
    dispatch.Backend("triton", _refuse_triton, _fwd_triton, _bwd_triton),
    dispatch.Backend("reference", dispatch.never, None),
    probe=_probe,
)
# What serves a DisentangledBias in the rows that do not refuse it.
_DISENTANGLED = {
    "cpu": dispatch.Backend("cpu", _refuse_cpu, _fwd_disentangled, _bwd_disentangled),
    "triton": dispatch.Backend("triton", _refuse_triton, _fwd_disentangled_triton, _bwd_disentangled_triton),
}


@fake("varlen_attention_disentangled_fwd")
@fake("varlen_attention_fwd")
def _fwd_fake(q, k, v, *rest):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), lse


@fake("varlen_attention_bwd")
def _bwd_fake(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, deterministic,
    softcap=0.0, slopes=None, bias=None, table=None, lut=None, dropout_p=0.0, rng=None, want_dbias=False,
):  # fmt: skip
    learned = (q.new_empty(0 if x is None or not want_dbias else x.shape, dtype=lse.dtype) for x in (bias, table))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *learned


@fake("varlen_attention_disentangled_bwd")
def _bwd_disentangled_fake(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, tiles, max_q, max_k, scale, left, right, top_left, deterministic,
    softcap=0.0, slopes=None, bias=None, table=None, lut=None, dropout_p=0.0, rng=None, position_keys=None,
    position_queries=None, want_dbias=False,
):  # fmt: skip
    positions = (position_keys, position_queries)
    learned = (q.new_empty(0 if x is None or not want_dbias else x.shape, dtype=lse.dtype) for x in positions)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *learned
