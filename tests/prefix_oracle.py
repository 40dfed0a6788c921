"""What the tests of prefix_attention share: the definition in float64, and the tolerances against it."""

import torch

import flowattn as fa

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Largest errors: out by max |v|; dv and dw0 by max |go| + max |dv|; ds by max |go| max |v| sqrt(D), the size of go . v.
# Half precision: one rounding of the result (8e-3, 1e-3), twice that in ds, whose delta uses the rounded output.
TOLERANCE = {
    torch.float64: {"out": 1e-12, "lse": 1e-12, "dv": 1e-12, "ds": 1e-12},
    torch.float32: {"out": 2e-6, "lse": 1e-6, "dv": 5e-6, "ds": 1e-5},
    torch.bfloat16: {"out": 8e-3, "lse": 1e-6, "dv": 1e-2, "ds": 2e-2},
    torch.float16: {"out": 1e-3, "lse": 1e-6, "dv": 2e-3, "ds": 4e-3},
}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(batch=2, length=37, heads=3, width=24, dtype=torch.float64, spread=3.0):
    scores = (torch.randn(batch, length, heads) * spread).to(dtype)
    return scores, torch.randn(batch, length, heads, width).to(dtype)


def gradients(outputs, leaves, grad_outputs=None):
    """torch.autograd.grad with zeros for leaves that no result depends on."""
    return torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True, materialize_grads=True)


def random_state(states=2, heads=3, width=24, dtype=torch.float64):
    m, u = torch.randn(states, heads, dtype=dtype), torch.rand(states, heads, dtype=dtype) + 0.1
    return fa.PrefixState(m, u, torch.randn(states, heads, width, dtype=dtype))


def oracle(scores, values, *, mask=None, reset=None, state=None, reverse=False):
    """(out, lse) by the definition: a softmax over the visible tokens of every prefix, the state as one token more."""
    if reverse:
        scores, values, mask, reset = (None if x is None else x.flip(1) for x in (scores, values, mask, reset))
    batch, length, heads, _ = values.shape
    keep = scores != float("-inf")
    if mask is not None:
        keep = keep & (mask if mask.dim() == 3 else mask[..., None])
    segment = torch.zeros(batch, length, device=values.device) if reset is None else reset.long().cumsum(1)
    same = segment[:, :, None] == segment[:, None, :]
    visible = (same & torch.ones(length, length, dtype=torch.bool, device=values.device).tril())[..., None] & keep[
        :, None
    ]  # (B, t, i, H)
    logits = scores.double()[:, None].masked_fill(~visible, float("-inf"))
    content = values.double().masked_fill(~keep[..., None], 0.0)
    if state is not None:
        m, u, w = (x.double() for x in state)
        reached = (segment == 0)[:, :, None, None].expand(batch, length, 1, heads)
        logits = torch.cat([(m + u.log())[:, None, None].masked_fill(~reached, float("-inf")), logits], 2)
        content = torch.cat([(w / u[..., None])[:, None], content], 1)
    none = (logits == float("-inf")).all(2)
    lse = logits.masked_fill(none[:, :, None], 0.0).logsumexp(2).masked_fill(none, float("-inf"))
    weights = logits.masked_fill(none[:, :, None], 0.0).softmax(2).masked_fill(none[:, :, None], 0.0)
    out = torch.einsum("btih,bihd->bthd", weights, content)
    return (out.flip(1), lse.flip(1)) if reverse else (out, lse)


def assert_near(name, got, true, tolerance, scale=1.0):
    assert got.shape == true.shape, name
    finite = true.isfinite()
    assert torch.equal(got.isfinite(), finite), name
    error = (got.double() - true.double())[finite].abs()
    bound = tolerance * torch.as_tensor(scale).double()
    worst = (error / (bound[finite] if bound.dim() else bound)).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{name}: {worst:.2f} times the tolerance {tolerance}"


def check_against_oracle(scores, values, state=None, lse_gradient=True, **options):
    """Outputs and every gradient of the public function against the oracle's, with the tolerances of the dtype."""
    tolerance, width = TOLERANCE[values.dtype], max(1, values.shape[-1])
    results = []
    for truth in (False, True):
        cast = (lambda x: x.double()) if truth else (lambda x: x)
        s, v = (cast(x).detach().clone().requires_grad_() for x in (scores, values))
        leaves, start = [s, v], None
        if state is not None:
            u, w = (cast(x).detach().clone().requires_grad_() for x in state[1:])
            leaves, start = [s, v, u, w], fa.PrefixState(cast(state.m), u, w)
        if truth:
            out, lse = oracle(s, v, state=start, **options)
        else:
            out, lse = fa.prefix_attention(s, v, initial_state=start, return_lse=True, **options)
        generator = torch.Generator(values.device).manual_seed(1)
        go = torch.randn(out.shape, generator=generator, device=values.device).to(values.dtype).to(out.dtype)
        gl = torch.randn(lse.shape, generator=generator, device=values.device).to(lse.dtype) * lse_gradient
        loss = (out * go).sum() + (lse.masked_fill(lse == float("-inf"), 0.0) * gl).sum()
        results.append((out, lse, *gradients(loss, leaves)))
    (out, lse, ds, dv, *dstate), (true_out, true_lse, true_ds, true_dv, *true_dstate) = results
    assert out.dtype == values.dtype and lse.dtype == wide(values.dtype)
    if values.numel() == 0:
        return
    largest = values.double().abs().max()
    if state is not None:
        largest = torch.maximum(largest, (state.w / state.u[..., None]).abs().max())
    assert_near("out", out, true_out, tolerance["out"], largest)
    assert_near("lse", lse, true_lse, tolerance["lse"], true_lse.abs().clamp(min=1))
    assert_near("dv", dv, true_dv, tolerance["dv"], go.abs().max() + true_dv.abs().max())
    ds_scale = go.double().abs().max() * largest * width**0.5
    assert_near("ds", ds, true_ds, tolerance["ds"], ds_scale)
    if state is not None:
        (du, dw), (true_du, true_dw) = dstate, true_dstate
        assert_near("dw0", dw, true_dw, tolerance["dv"], go.abs().max() + true_dw.abs().max())
        assert_near("du0", du, true_du, tolerance["ds"], ds_scale / state.u.min())
