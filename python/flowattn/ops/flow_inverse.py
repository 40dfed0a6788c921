"""One block of a Transformer autoregressive flow, data to noise and noise to data."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from flowattn import _native, checks, dispatch
from flowattn.ops import flow_affine, flow_block, flow_solvers, implicit
from flowattn.ops.flow_decode import TritonNetwork, refuse_decode
from flowattn.ops.flow_network import NativeNetwork, ReferenceNetwork
from flowattn.ops.flow_solvers import InverseStatus, Problem, Rule, Windows
from flowattn.reference import flow_affine as columns
from flowattn.reference import flow_inverse as reference

_FORWARD, _INVERSE = "flow_forward", "flow_inverse"
METHODS = ("auto", "sequential", "jacobi", "gs_jacobi", "frontier")
CRITERIA = ("max", "fro", "rel_mse")
TRANSIENT = 1e4  # bound of iterates that are not final, as a multiple of the largest |z| of their sample
WINDOW = 32  # of the frontier method, tokens


class InverseInfo(NamedTuple):
    """How an inverse ended; tensors (B,), or (blocks, B) from a model, on the device of z.

    A sample whose status is NONFINITE has NaN from token first_bad on, in the order of the block.
    """

    status: torch.Tensor  # InverseStatus
    sweeps: torch.Tensor  # passes over a window of tokens; steps of the sequential method
    rows: torch.Tensor  # tokens that went through the network, counting repetitions
    update: torch.Tensor  # largest |x_new - x_old| of the last sweep; 0 for the sequential method
    residual: torch.Tensor  # largest |z - F(x)|; for tokens accepted in the last sweep that of the iterate before
    first_bad: torch.Tensor  # first token that is not finite, -1 if all are
    max_log_scale: torch.Tensor
    clamped: torch.Tensor  # entries that `clamp` cut
    not_positive: torch.Tensor  # scales <= 0, which guidance_rule="sigma_linear" can give
    method: str | tuple
    cache_bytes: int


class BlockPlan(NamedTuple):
    """What method="auto" does: made by flow_planning.plan from measured sweeps."""

    method: str = "sequential"
    segments: int | None = None
    window: int = WINDOW
    guess: str = "z"


def flow_forward(x, block, *, permutation=None, cond=None, prefix=None, logdet_reduction="sum"):
    """Map data to noise through one block in one parallel pass: z_t = (x_t - mu_t(x_<t)) / sigma_t(x_<t).

    Shapes: x (B, T, D); returns z (B, T, D) and logdet (B,), or (B, T) with logdet_reduction="none".
    block: a FlowBlock, or a module with flow_block(): the blocks of models.tarflow and models.starflow.
    permutation: the order in which the block runs over the tokens: None, "reverse", or int64 indices (T,) or (B, T);
        z comes back in the order of x.
    cond (B, C): added to every hidden state. prefix (B, P, C): conditioning tokens in front of the sequence.
    logdet_reduction: of log|det dz/dx|: "sum" over T and D, "mean" over both, "none".
    Dtypes: x float16, bfloat16, float32 or float64; products run in the weights' type, the rest in float32 (float64).
    Gradients: x, all weights, cond, prefix. Host sync: none.
    Cost: one causal Transformer pass over the T - 1 steps that matter (T with a start vector).
    Source: Zhai et al., Normalizing Flows are Capable Generative Models (2024), section 3.
    """
    block = flow_block.block_of(_FORWARD, block)
    flow_block.check_block(_FORWARD, block, x)
    permutation = flow_block.permutation_of(_FORWARD, permutation, x)
    rule = f"logdet_reduction must be one of {flow_affine.REDUCTIONS}"
    checks.require(logdet_reduction in flow_affine.REDUCTIONS, _FORWARD, rule, repr(logdet_reduction))
    work = x.to(checks.state_dtype(x))
    ordered = flow_block.permute(work, permutation).contiguous()
    conditions = flow_block.conditions(_FORWARD, block, work, permutation, cond, None, prefix, None, 1.0, False)
    if block.steps(x.shape[1]) == 0 or x.shape[0] == 0:
        z, logdet = ordered, work.new_zeros(x.shape[:2])
    else:
        raw, first = reference.parallel(block, ordered, conditions), block.first
        affine = {"scale": block.spec.scale, "soft_clip": block.spec.soft_clip, "logdet_reduction": "none"}
        z, logdet = flow_affine.flow_affine_forward(ordered[:, first:], raw, **affine)
        if first:
            z = torch.cat([ordered[:, :first], z], 1)
            logdet = torch.nn.functional.pad(logdet, (first, 0))
    if logdet_reduction == "none":
        logdet = flow_block.unpermute(logdet.unsqueeze(-1), permutation).squeeze(-1)
    else:
        logdet = flow_affine.reduce_logdet(logdet, x.shape[2], logdet_reduction)
    return flow_block.unpermute(z, permutation).to(x.dtype), logdet


def flow_inverse(
    z,
    block,
    *,
    method="auto",
    plan=None,
    permutation=None,
    cond=None,
    cond_uncond=None,
    prefix=None,
    prefix_uncond=None,
    known=None,
    segments=8,
    window=WINDOW,
    max_sweeps=None,
    guess="auto",
    atol=None,
    rtol=None,
    criterion="max",
    commit="exact",
    guidance=0.0,
    guidance_rule="log_linear",
    guidance_what="ab",
    anneal=False,
    attn_temp_uncond=1.0,
    clamp=None,
    on_nonfinite="flag",
    cache=None,
    return_logdet=False,
    return_info=False,
):
    """Map noise to data through one block: solve x_t = z_t sigma_t(x_<t) + mu_t(x_<t) for all tokens t.

    Shapes, block, permutation, cond, prefix: as flow_forward; z (B, T, D) in, x (B, T, D) out. z is not modified.
    Dtypes: z float16, bfloat16, float32 or float64; x has the same. Tokens, scales and means are float32 (float64),
        products run in the weights' type, on a CPU in float32. Autocast is ignored.

    method: "sequential": token by token over a static cache, exact. "jacobi": sweeps over all tokens at once.
        "gs_jacobi": segment by segment, `segments` of equal length or a list of their last steps, each swept to
        tolerance over the finished ones. "frontier": sweeps over `window` tokens, which start at the first token that
        has not settled. "auto": what `plan` says (see flow_planning), else sequential. Each sample stops by itself.
    max_sweeps: of a segment, or of the whole inverse; beyond it tokens are taken as they are, status CAP_REACHED. By
        default only the exact limit holds, one sweep a token.
    guess: where sweeps start: "z", "zero", or a tensor like z (in its order); "auto" is the plan's, else "z".
    atol, rtol: a token has settled when no feature moved by more than atol + rtol max|x|; by default 1e-5
        each (1e-3 for half-precision weights on a GPU, 1e-12 for float64).
    criterion: "max", per sample; "fro", ||update|| <= atol B D, and "rel_mse", mean(update^2) <= rtol mean(x^2), over
        the batch and with segments or jacobi only: the rules of the published samplers.
    commit: "exact" recomputes keys and values from accepted tokens; "stale" keeps those of the iterate before.

    guidance: w, a number or (B,): a second stream with cond_uncond, prefix_uncond and attention temperature
        attn_temp_uncond runs in the same batch and both are combined; see flow_affine_inverse for guidance_rule and
        guidance_what. anneal=True uses w t / (T - 1) for token t in the order of the block. Nothing runs twice where
        w = 0 or where the streams are equal.
    known (B, n, D): the first n tokens of the result in the order of the block, given; their keys and values come from
        one pass. clamp: cut tokens to [-clamp, clamp]; never done unless asked for, and counted in the info.
    on_nonfinite: "flag": a sample that overflows becomes NaN from that token on, and its status says so; "nan_fill":
        the whole sample does; "raise": RuntimeError, which needs a host sync. Other samples are not touched.
    cache: a FlowCache to use again. return_logdet: also log|det dx/dz| (B,), under guidance that of the guided map; it
        costs one parallel pass. return_info: also an InverseInfo.

    Gradients: z, weights, cond, prefix, start vector, guidance, by the implicit function theorem: the memory is that of
        one forward, and the backward solves the transposed system by the same kind of sweeps (it syncs with the host).
        Call it under no_grad where none are wanted. No double backward, and none with clamp.
    Host sync: on a CPU none to speak of; on a GPU none that waits: sweeps look at a flag that has arrived already.
    Cost: T - 1 steps of one token, or sweeps of a window; keys and values take 2 L T Hkv d numbers a sample and stream.
    Source: Zhai et al. 2024, section 3; Song et al., Accelerating Feedforward Computation via Parallel Nonlinear
        Equation Solving (2021); Liu and Qin, Accelerate TarFlow Sampling with GS-Jacobi Iteration (2025).
    """
    block, z, call = _checked(
        z, block, method=method, plan=plan, permutation=permutation, cond=cond, cond_uncond=cond_uncond, prefix=prefix,
        prefix_uncond=prefix_uncond, known=known, segments=segments, window=window, max_sweeps=max_sweeps, guess=guess,
        atol=atol, rtol=rtol, criterion=criterion, commit=commit, guidance=guidance, guidance_rule=guidance_rule,
        guidance_what=guidance_what, anneal=anneal, attn_temp_uncond=attn_temp_uncond, clamp=clamp,
        on_nonfinite=on_nonfinite, cache=cache,
    )  # fmt: skip
    wants_grad = torch.is_grad_enabled() and checks.needs_grad(
        z, cond, cond_uncond, prefix, prefix_uncond, call.guidance, call.known, *block.tensors()
    )
    if wants_grad and clamp is not None:
        checks.fail(_INVERSE, "clamp has no gradient", clamp, "call it under no_grad", error=NotImplementedError)
    with torch.no_grad():
        x, info = _solve(block, call)
    logdet = None
    if (wants_grad or return_logdet) and block.steps(z.shape[1]) and z.shape[0]:
        with torch.autocast(z.device.type, enabled=False):
            if wants_grad:
                solved = (info.status, info.residual, _INVERSE, z.shape[1])
                x = implicit.attach(x, lambda u: _once(block, call, u)[0], *solved)
            if return_logdet:
                logdet = _once(block, call, x)[1]
    if wants_grad and not x.requires_grad:  # an identity
        x = x + (call.z - call.z.detach())
    logdet = call.z.new_zeros(z.shape[0]) if logdet is None else logdet
    x = flow_block.unpermute(x, call.permutation).to(z.dtype)
    if z.dtype == torch.float16:
        info = _overflowed(x, call.permutation, info)
    extras = ((logdet,) if return_logdet else ()) + ((info,) if return_info else ())
    return (x, *extras) if extras else x


class _Call(NamedTuple):
    """A checked call, in the order of the block and in the working type."""

    z: torch.Tensor
    permutation: torch.Tensor | None
    conditions: flow_block.Conditions
    guidance: torch.Tensor | None  # (B, T), None with one stream
    rule: str
    what: str
    known: torch.Tensor | None
    plan: BlockPlan
    segments: object
    start: object  # guess
    stop: Rule
    clamp: float | None
    on_nonfinite: str
    cache: object


def _checked(z, block, **options):
    """(block, z, _Call) of the arguments of flow_inverse, or an error."""
    o, name = SimpleNamespace(**options), _INVERSE
    block = flow_block.block_of(name, block)
    flow_block.check_block(name, block, z)
    checks.require(o.method in METHODS, name, f"method must be one of {METHODS}", repr(o.method))
    checks.require(o.criterion in CRITERIA, name, f"criterion must be one of {CRITERIA}", repr(o.criterion))
    checks.require(o.commit in ("exact", "stale"), name, 'commit must be "exact" or "stale"', repr(o.commit))
    modes = ("flag", "nan_fill", "raise")
    checks.require(o.on_nonfinite in modes, name, f"on_nonfinite must be one of {modes}", repr(o.on_nonfinite))
    checks.require(o.clamp is None or o.clamp > 0, name, "clamp must be None or > 0", o.clamp)
    checks.require(o.max_sweeps is None or o.max_sweeps >= 0, name, "max_sweeps must be >= 0", o.max_sweeps)
    checks.require(o.window >= 1, name, "window must be >= 1", o.window)
    if isinstance(o.segments, int):
        checks.require(o.segments >= 1, name, "segments must be >= 1", o.segments)
    flow_affine.check_guidance(name, o.guidance_rule, o.guidance_what)

    plan = (o.plan or BlockPlan()) if o.method == "auto" else BlockPlan(o.method, None, o.window, "z")
    if plan.method == "frontier":
        rule = 'criterion must be "max" for method="frontier"'
        checks.require(o.criterion == "max", name, rule, repr(o.criterion))
    permutation = flow_block.permutation_of(name, o.permutation, z)
    work = flow_block.permute(z.to(checks.state_dtype(z)), permutation).contiguous()
    guided = isinstance(o.guidance, torch.Tensor) or o.guidance != 0
    conditioned = (o.cond, o.cond_uncond, o.prefix, o.prefix_uncond)
    conditions = flow_block.conditions(name, block, work, permutation, *conditioned, o.attn_temp_uncond, guided)
    guidance = None
    if conditions.streams == 2:
        guidance = flow_affine.guidance_of(name, o.guidance, work)
        if o.anneal:
            ramp = torch.arange(z.shape[1], device=z.device, dtype=work.dtype) / max(z.shape[1] - 1, 1)
            guidance = guidance * ramp
    known = o.known
    if known is not None:
        fits = known.dim() == 3 and known.shape[0] == z.shape[0] and known.shape[2] == z.shape[2]
        rule = f"known must have shape ({z.shape[0]}, n, {z.shape[2]}) with n <= {z.shape[1]}"
        checks.require(fits and known.shape[1] <= z.shape[1], name, rule, tuple(known.shape))
        known = known.to(work.dtype)
    guess = o.guess if not isinstance(o.guess, str) or o.guess != "auto" else plan.guess
    if isinstance(guess, torch.Tensor):
        checks.require(guess.shape == z.shape, name, f"guess must have shape {tuple(z.shape)}", tuple(guess.shape))
        guess = flow_block.permute(guess.to(work.dtype), permutation)
    else:
        checks.require(guess in ("z", "zero"), name, 'guess must be "auto", "z", "zero" or a tensor', repr(guess))
    half = block.proj_in.weight.dtype in reference.HALF and z.device.type != "cpu"
    default = 1e-12 if work.dtype == torch.float64 else 1e-3 if half else 1e-5
    published = {"fro": 1e-6, "rel_mse": 5e-3}.get(o.criterion, default)
    atol, rtol = (published if x is None else x for x in (o.atol, o.rtol))
    stop = Rule(atol, rtol, o.criterion, o.commit, o.max_sweeps)
    segments = plan.segments if o.method == "auto" else o.segments
    return block, z, _Call(
        work, permutation, conditions, guidance, o.guidance_rule, o.guidance_what, known, plan, segments, guess, stop,
        o.clamp, o.on_nonfinite, o.cache,
    )  # fmt: skip


def _solve(block, call):
    """(x in the order of the block, InverseInfo), without gradients."""
    z, plan, first = call.z, call.plan, block.first
    batch, tokens, _ = z.shape
    given = 0 if call.known is None else call.known.shape[1]
    begin = min(max(given - first, 0), block.steps(tokens))
    x = z.clone()
    if plan.method != "sequential" and not isinstance(call.start, torch.Tensor):
        x = x if call.start == "z" else torch.zeros_like(x)
    elif plan.method != "sequential":
        x = call.start.clone()
    x[:, :first] = z[:, :first]
    if given:
        x[:, :given] = call.known
    network = None
    if block.steps(tokens) and batch:
        network = _TABLE.choose(z, block).fwd(block, z, call.conditions, call.cache)
    if network is None or begin == network.steps:
        info = _trivial(x, call)
        return _finish(x, info, first, call)
    scale = z.abs().nan_to_num(0.0, 0.0, 0.0).amax((1, 2)).clamp(min=1.0)
    affine = (call.rule, call.what, block.spec.scale, block.spec.soft_clip)
    problem = Problem(network, z, call.guidance, *affine, call.clamp, TRANSIENT * scale)
    with torch.autocast(z.device.type, enabled=False):
        network.prefill(x, begin)
        if plan.method == "sequential":
            found = flow_solvers.sequential(problem, x, begin)
        else:
            windows = _windows(plan, call.segments, network.steps, z.device)
            front = torch.full((batch,), begin, dtype=torch.int64, device=z.device)
            found = flow_solvers.sweep(problem, x, front, windows, call.stop)
    info = InverseInfo(*found[1:], plan.method, network.cache_bytes)
    return _finish(found.tokens, info, first, call)


def _windows(plan, segments, steps, device):
    if plan.method == "frontier":
        return Windows(plan.window)
    return flow_solvers.segments_of(steps, 1 if plan.method == "jacobi" else segments, device)


def _trivial(x, call):
    """The info of a block that has nothing to solve."""
    zero, count = x.new_zeros(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return InverseInfo(count, count, count, zero, zero, count - 1, zero, count, count, call.plan.method, 0)


def _finish(x, info, first, call):
    """Samples with a token that is not finite: marked, and NaN from there on."""
    if first and x.shape[1]:  # a token that passes through unchanged never went past a solver
        through = ~x[:, 0].isfinite().all(-1)
        first_bad = torch.where(through, 0, info.first_bad)
        status = torch.where(through, InverseStatus.NONFINITE.value, info.status)
        info = info._replace(first_bad=first_bad, status=status)
    bad = info.status == InverseStatus.NONFINITE
    if call.on_nonfinite == "raise" and bool(bad.any()):
        which = bad.nonzero().flatten().tolist()
        raise RuntimeError(
            f"{_INVERSE}: samples {which} are not finite; got first bad tokens {info.first_bad.tolist()}"
        )
    behind = torch.arange(x.shape[1], device=x.device) >= info.first_bad.unsqueeze(1)
    lost = bad.unsqueeze(1) & (behind | (call.on_nonfinite == "nan_fill"))
    return x.masked_fill(lost.unsqueeze(-1), float("nan")), info


def _overflowed(x, permutation, info):
    """A float16 result may be infinite where the float32 one is not."""
    bad = ~flow_block.permute(x.detach(), permutation).isfinite().all(-1)
    first = bad.int().argmax(1) if x.shape[1] else info.first_bad
    status = torch.where(bad.any(1), InverseStatus.NONFINITE.value, info.status)
    return info._replace(status=status, first_bad=torch.where(bad.any(1), first, info.first_bad))


def _once(block, call, u):
    """(z sigma(u) + mu(u), its log-determinant (B,)): one sweep over all tokens, differentiable."""
    first, streams = block.first, call.conditions.streams
    raw = reference.parallel(block, u, call.conditions)
    own, other = (raw, None) if streams == 1 else raw.chunk(2)
    guidance = None if other is None else call.guidance[:, first:]
    affine = (call.rule, call.what, block.spec.scale, block.spec.soft_clip)
    x, found = columns.flow_affine_inverse(call.z[:, first:], own, other, guidance, None, *affine)
    given = call.z[:, :first] if call.known is None else call.known
    kept = max(given.shape[1] - first, 0)
    return torch.cat([given, x[:, kept:]], 1), found[..., columns.LOG_SCALE][:, kept:].sum(1)


def _refuse_cpu(z, block):
    return _native.refuse_cpu(z)


def _prepare(z, block, **options):
    block = flow_block.block_of(_INVERSE, block)
    flow_block.check_block(_INVERSE, block, z)
    return z.to(checks.state_dtype(z)), block


def _probe(device):
    def linear(rows, columns):
        return flow_block.Linear(torch.zeros(rows, columns, device=device), None)

    norm = flow_block.Norm(torch.ones(4, device=device), None)
    layer = flow_block.FlowLayer(norm, linear(12, 4), linear(4, 4), norm, linear(8, 4), linear(4, 8))
    block = flow_block.FlowBlock(flow_block.FlowSpec(1, 1, 4), linear(4, 2), (layer,), linear(4, 4))
    return torch.zeros(1, 2, 2, device=device), block


_TABLE = dispatch.Table(
    _INVERSE,
    _prepare,
    dispatch.Backend("cpu", _refuse_cpu, NativeNetwork),
    dispatch.Backend("triton", refuse_decode, TritonNetwork),
    dispatch.Backend("reference", dispatch.never, ReferenceNetwork),
    probe=_probe,
)
