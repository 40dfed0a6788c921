"""Gradients through a solution x = G(x) of an autoregressive map, by the implicit function theorem."""

import warnings

import torch

_warned = set()


def attach(x, once, status, residual, name, sweeps):
    """x (B, ...) with a gradient: x solves x = once(x), and `once` is differentiable in x and all it is made of.

    With g = dL/dx, the gradient of once's other arguments is their vector-Jacobian product with lam, where
    lam = g + (dG/dx)^T lam. dG/dx is strictly triangular in the order of the tokens, so that repeating this converges
    in at most `sweeps` of them, the length of a chain of dependences. One graph of `once` serves them all.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = once(leaf)

    def solve(grad):
        if grad is None:
            return None
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: the gradient has no gradient; got create_graph=True")
        _warn(name, status, residual)
        if not leaf.numel():
            return grad
        small = 1e-13 if grad.dtype == torch.float64 else 1e-6
        lam = grad
        for _ in range(sweeps):
            (moved,) = torch.autograd.grad(out, leaf, lam, retain_graph=True)
            new = grad + moved
            done = (new - lam).abs().amax() <= small * new.abs().amax()
            lam = new
            if done:
                break
        return lam

    with torch.enable_grad():
        linked = out * 1  # the hook's own tensor: `out` must stay free of it for the products inside
        linked.register_hook(solve)
        return x.detach() + (linked - linked.detach())


def _warn(name, status, residual):
    """Once a function: the theorem holds at a solution only."""
    if name in _warned or not bool((status != 0).any()):
        return
    _warned.add(name)
    worst = residual.abs().nan_to_num(float("inf")).max().item()
    text = f"{name}: gradient at a point that is not a solution; got statuses {status.tolist()}, residual {worst:.3g}"
    warnings.warn(text + " (raise max_sweeps, or look at return_info=True)", RuntimeWarning, stacklevel=2)
