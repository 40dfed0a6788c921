"""What the tests of Flow-Attention share: its definition with loops over tokens, in float64, and comparisons."""

import pytest
import torch

import flowattn as fa

BACKENDS = ("cpu", "triton", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
both_forms = pytest.mark.parametrize("causal", (False, True), ids=("whole", "causal"))
SIGMA_1 = torch.sigmoid(torch.ones((), dtype=torch.float64)).item()

# Largest rms error, as a share of the rms of the truth: of y and the state, of the gradients.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (5e-3, 1.5e-2),
    torch.float16: (1e-3, 5e-3),
}


def rms_ratio(got, true):
    true = true.detach().double()
    error = (got.detach().double().to(true.device) - true).square().mean().sqrt()
    return (error / (true.square().mean().sqrt() + 1e-8)).item()


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, name
    assert got.isfinite().all(), name
    if true.numel():
        assert rms_ratio(got, true) <= tolerance, f"{name}: {rms_ratio(got, true):.3g}"


def takes(backend, dtype):
    """Whether this backend computes this dtype here: Triton has no float64, its interpreter no bfloat16 product."""
    if backend == "triton":
        return dtype != torch.float64 and (dtype != torch.bfloat16 or torch.cuda.is_available())
    return True


def inputs(
    shape=(2, 37, 3, 20), sources=None, width_v=12, heads_kv=None, dtype=torch.float32, device="cpu", spread=1.0
):
    batch, length, heads, width = shape
    sources = length if sources is None else sources
    heads_kv = heads if heads_kv is None else heads_kv
    shapes = (shape, (batch, sources, heads_kv, width), (batch, sources, heads_kv, width_v))
    return tuple((spread * torch.randn(s)).to(device, dtype) for s in shapes)


def random_state(batch, heads, width, width_v, dtype, device):
    vectors = [(torch.rand(batch, heads, width) * 5 + 1).to(device, dtype) for _ in range(4)]
    e, s = (torch.rand(batch, heads) * 7 + 1).to(device, dtype), torch.randn(batch, heads, width, width_v)
    return fa.FlowState(*vectors, e, torch.arange(5, 5 + batch, device=device), s.to(device, dtype))


def floats(state):
    return [x for x in state if x.is_floating_point()]


def outcome(tensors, state=None, **options):
    """y, the final state and all gradients for fixed output gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if state is not None:
        state = fa.FlowState(*(x.clone().requires_grad_() if x.is_floating_point() else x for x in state))
        options |= {"initial_state": state, "output_final_state": True}
        leaves += floats(state)
    outs = fa.flow_attention(*leaves[:3], **options)
    outs = [outs[0], *floats(outs[1])] if state is not None else [outs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, tensors[0].dtype).to(x.dtype) for x in outs]
    return len(outs), (*outs, *torch.autograd.grad(outs, leaves, grads))


def check(backend, tensors, state=None, **options):
    """Results and gradients of `backend` against the reference in float64 on the same, rounded, inputs."""
    dtype = tensors[0].dtype
    count, got = outcome(tensors, state, **options)
    with fa.use_backend("reference"):
        wide = None if state is None else fa.FlowState(*(x.double() if x.is_floating_point() else x for x in state))
        _, true = outcome([x.double() for x in tensors], wide, **options)
    assert got[0].dtype == dtype
    for i, (x, y) in enumerate(zip(got, true)):
        assert_near(f"result {i}", x, y, TOLERANCE[dtype][i >= count])


# --- the definition, for one head


def phi(x, feature_map):
    return x.clamp(min=0) + 1e-6 if feature_map == "relu" else torch.sigmoid(x)


def flow(x, total, eps, extra):
    return ((x + eps) * (total + eps)).sum() + extra


def whole(q, k, v, *, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0):
    """One head: q (L, D), k (S, D), v (S, M) -> (L, M)."""
    q, k, v = phi(q.double(), feature_map), phi(k.double(), feature_map), v.double()
    (sinks, _), sources = q.shape, k.shape[0]
    incoming = [flow(q[i], k.sum(0), eps, extra_eps) for i in range(sinks)]
    outgoing = [flow(k[s], q.sum(0), eps, extra_eps) for s in range(sources)]
    k_sum = sum(k[s] / outgoing[s] for s in range(sources))
    q_sum = sum(q[i] / incoming[i] for i in range(sinks))
    conserved = torch.stack([flow(k[s], q_sum, eps, extra_eps) for s in range(sources)])
    if clamp is not None:
        conserved = conserved.clamp(-clamp, clamp)
    weights = sources * torch.softmax(conserved, 0)
    rows = []
    for i in range(sinks):
        allocation = torch.sigmoid(flow(q[i], k_sum, eps, extra_eps) * sinks / sources)
        rows.append(allocation / incoming[i] * sum((q[i] @ k[s]) * weights[s] * v[s] for s in range(sources)))
    return torch.stack(rows)


def causal(q, k, v, *, feature_map="sigmoid", clamp=1.0, eps=1e-6, extra_eps=0.0):
    """One head: q, k (T, D), v (T, M) -> (T, M)."""
    q, k, v = phi(q.double(), feature_map), phi(k.double(), feature_map), v.double()
    k1, q1, k2, q2 = (torch.zeros_like(q[0]) for _ in range(4))
    total, state, rows = 0.0, torch.zeros(q.shape[1], v.shape[1], dtype=torch.float64), []
    for i in range(q.shape[0]):
        n = i + 1
        k1, q1 = k1 + k[i], q1 + q[i]
        incoming, outgoing = flow(q[i], k1, eps, extra_eps), flow(k[i], q1, eps, extra_eps)
        k2, q2 = k2 + n / outgoing * k[i], q2 + n / incoming * q[i]
        x = torch.exp((flow(k[i], q2, eps, 0) / n + extra_eps / n).clamp(-clamp, clamp))
        total = total + x
        state = state + torch.outer(k[i], n * x / total * v[i])
        allocation = torch.sigmoid((flow(q[i], k2, eps, extra_eps)) / n)
        rows.append(allocation / incoming * (q[i] @ state))
    return torch.stack(rows)


def heads(form, q, k, v, **options):
    """`form` for every row and head of (B, T, H, ...) tensors."""
    group = q.shape[2] // k.shape[2]
    return torch.stack(
        [
            torch.stack([form(q[b, :, h], k[b, :, h // group], v[b, :, h // group], **options)
                         for h in range(q.shape[2])], 1)
            for b in range(q.shape[0])
        ]
    )  # fmt: skip
