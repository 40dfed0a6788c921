"""The inverse of any autoregressive affine flow, from its parameter network alone."""

import torch

from flowattn import checks
from flowattn.ops import implicit
from flowattn.ops.flow_affine import affine_inverse
from flowattn.ops.flow_inverse import InverseInfo
from flowattn.ops.flow_solvers import InverseStatus, _Poll
from flowattn.reference import flow_affine as columns

_NAME = "fixed_point_inverse"


def fixed_point_inverse(
    params_fn, z, *, groups=None, max_sweeps=None, guess="zero", atol=None, rtol=None, return_info=False
):
    """Solve x = z exp(a(x)) + m(x) where a and m of a feature depend on earlier features only: x by repeated passes.

    Shapes: z (B, D) or (B, T, D); params_fn(x) -> (a, m), both of the shape of x, for x of the shape of z. Returns
        x in that shape. Dtypes: z float32 or float64, or half types, for which x is computed in float32.
    params_fn: any callable, a masked autoregressive net for example. A flow written the other way round,
        z = exp(s) x + t, has a = -s and m = -t exp(-s).
    groups: how many passes are exact whatever the start: the length of the longest chain of dependences; by default the
        number of features, T D. Fewer do where the net has fewer steps of order.
    max_sweeps: stop earlier, status CAP_REACHED. guess: "zero", "z" or a tensor. atol, rtol: a sample is done when no
        feature moves by more than atol + rtol max|x|; 1e-5 each (1e-12 for float64). Every sample stops by itself.
    return_info: also an InverseInfo. A sample with a feature that is not finite at the end is NaN and NONFINITE; while
        iterates overflow, the finite features before them are kept and go on.
    Gradients: z and whatever params_fn's results depend on, by the implicit function theorem, at the memory of one
        pass. No double backward. Host sync: as flow_inverse.
    Source: Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (2021).

    >>> shift = lambda x: (torch.zeros_like(x), torch.nn.functional.pad(x[:, :-1], (1, 0)))
    >>> fixed_point_inverse(shift, torch.ones(1, 4))
    tensor([[1., 2., 3., 4.]])
    """
    checks.float_dtype(_NAME, "z", z)
    checks.require(z.dim() in (2, 3), _NAME, "z must have shape (B, D) or (B, T, D)", tuple(z.shape))
    exact = z[0].numel() if groups is None and z.shape[0] else groups or 0
    checks.require(exact >= 0, _NAME, "groups must be >= 0", groups)
    rule = 'guess must be "zero", "z" or a tensor like z'
    fits = guess.shape == z.shape if isinstance(guess, torch.Tensor) else guess in ("zero", "z")
    checks.require(fits, _NAME, rule, tuple(guess.shape) if isinstance(guess, torch.Tensor) else repr(guess))
    work = z.to(checks.state_dtype(z))
    default = 1e-12 if work.dtype == torch.float64 else 1e-5
    atol, rtol = (default if x is None else x for x in (atol, rtol))
    sweeps = exact if max_sweeps is None else min(exact, max_sweeps)

    def once(x, previous=None):
        a, m = params_fn(x)
        if a.shape != x.shape or m.shape != x.shape:
            checks.fail(_NAME, f"params_fn must return two of {tuple(x.shape)}", (tuple(a.shape), tuple(m.shape)))
        params = torch.cat([a, m], -1).to(work.dtype)
        flat = [t.unsqueeze(1) if z.dim() == 2 else t for t in (work, params)]
        old = previous if previous is None or z.dim() == 3 else previous.unsqueeze(1)
        new, found = affine_inverse(*flat, None, None, old, "log_linear", "ab", "exp", 0.0)
        return new.reshape(z.shape), found

    with torch.no_grad():
        start = {"zero": torch.zeros_like(work), "z": work}.get(guess) if isinstance(guess, str) else guess.to(work)
        x, info = _iterate(once, start, sweeps, exact, atol, rtol)
    if torch.is_grad_enabled() and z.numel() and (z.requires_grad or once(x)[0].requires_grad):
        x = implicit.attach(x, lambda u: once(u)[0], info.status, info.residual, _NAME, exact)
    x = x.to(z.dtype)
    return (x, info) if return_info else x


def _iterate(once, x, sweeps, exact, atol, rtol):
    batch, zero = x.shape[0], x.new_zeros(x.shape[0])
    count = torch.zeros(batch, dtype=torch.int64, device=x.device)
    active, update, residual, highest, bad = count == 0, zero, zero, zero - torch.inf, count > 0
    poll, wide = _Poll(x.device), (batch,) + (1,) * (x.dim() - 1)
    for _ in range(sweeps):
        new, found = once(x, x)
        size, moved, left = (found[..., c].amax(1) for c in (columns.SIZE, columns.UPDATE, columns.RESIDUAL))
        wrong = found[..., columns.NOT_FINITE].sum(1) > 0
        update, residual = torch.where(active, moved, update), torch.where(active, left, residual)
        highest = torch.where(active, found[..., columns.MAX_LOG_SCALE].amax(1), highest)
        bad = torch.where(active, wrong, bad)
        x = torch.where(active.view(wide) & new.isfinite(), new, x)
        count = count + active
        active = active & ((moved > atol + rtol * size) | wrong)
        if poll(~active.any()):
            break
    capped = active & (count < exact)
    status = torch.where(capped, InverseStatus.CAP_REACHED.value, InverseStatus.CONVERGED.value)
    lost = bad | ~x.isfinite().flatten(1).all(1)
    status = torch.where(lost, InverseStatus.NONFINITE.value, status)
    x = x.masked_fill(lost.view(wide), float("nan"))
    first_bad, none = torch.where(lost, 0, -1), torch.zeros_like(count)
    residual = torch.where(count >= exact, 0.0, residual)  # exact by the order of the features: rounding is left
    rest = (update, residual, first_bad, highest, none, none, "jacobi", 0)
    return x, InverseInfo(status, count, count, *rest)
