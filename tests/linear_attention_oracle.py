"""linear_attention token by token in float64, and the comparison of results and gradients with it."""

import torch
import torch.nn.functional as F

import flowattn as fa

MAPS = {
    "identity": lambda x: x,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "relu_eps": lambda x: F.relu(x) + 1e-6,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Largest RMS error over RMS truth: results and states; gradients of q, k, v and states; gradients of decays.
TOLERANCE = {
    F64: (1e-12, 1e-11, 1e-11),
    F32: (2e-6, 5e-6, 2e-5),
    BF16: (4e-3, 8e-3, 1e-2),
    F16: (1e-3, 2e-3, 1e-2),
}


def loop(q, k, v, g, weight, s, z):
    """One sequence: q, k (T, H, D), v (T, H, M), g (T, H), weight (T,); the sums before the first token."""
    ys, cs = [], []
    for t in range(q.shape[0]):
        s, z = g[t].exp()[:, None, None] * s, g[t].exp()[:, None] * z
        s = s + weight[t] * k[t][:, :, None] * v[t][:, None, :]
        z = z + weight[t] * k[t]
        ys.append(torch.einsum("hd,hdm->hm", q[t], s))
        cs.append((q[t] * z).sum(-1))
    empty = q.new_zeros(0, q.shape[1])
    return torch.stack(ys) if ys else v[:0], torch.stack(cs) if cs else empty, s, z


def pairs(q, k, v, g, weight):
    """(y, c) of a sequence in both directions: key j reaches query i by the gates (j, i] or, from the right, [i, j)."""
    length = k.shape[0]
    reach = [[g[j + 1 : i + 1].sum(0) if j <= i else g[i:j].sum(0) for j in range(length)] for i in range(length)]
    gates = torch.stack([torch.stack(row) for row in reach]) if length else g.new_zeros(0, 0, q.shape[1])
    scores = torch.einsum("ihd,jhd->hij", q, k) * gates.permute(2, 0, 1).exp() * weight
    return torch.einsum("hij,jhm->ihm", scores, v), scores.sum(-1).transpose(0, 1)


def oracle(
    q, k, v, *, causal=True, feature_map="identity", normalize=False, scale=None, decay=None, eps=1e-6, key_mask=None,
    token_scale=None, initial_state=None, reverse=False, cu_seqlens=None,
):  # fmt: skip
    """(out, s, z) of batched tensors (B, T, H, D), or packed ones (1, T, H, D) with cu_seqlens, in float64."""
    phi = MAPS[feature_map]
    q, k, v = phi(q.double()), phi(k.double()), v.double()
    batch, length, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    weight = q.new_ones(k.shape[:2]) if key_mask is None else key_mask.double()
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, length) for b in range(batch)] if ends is None else [(0, *pair) for pair in zip(ends, ends[1:])]
    out = v.new_zeros(batch, length, heads, v.shape[3])
    scale = scale if scale is not None else 1.0 if normalize else width**-0.5
    ss, zs, rows = [], [], []
    for i, (b, begin, end) in enumerate(spans):
        span = slice(begin, end)
        keys = slice(begin, end if causal or decay is not None or ends is not None else k.shape[1])
        s = q.new_zeros(heads, width, v.shape[3]) if initial_state is None else initial_state[0][i].double()
        z = q.new_zeros(heads, width)
        if initial_state is not None and initial_state[1] is not None:
            z = initial_state[1][i].double()
        g = None
        if decay is not None:
            g = decay.double().expand(end - begin, heads) if decay.dim() == 1 else decay[b, span].double()
        parts = [q[b, span], k[b, keys], v[b, keys], g, weight[b, keys]]
        if causal:
            parts[3] = q.new_zeros(end - begin, heads) if g is None else g
            parts = [x.flip(0) for x in parts] if reverse else parts
            y, c, s, z = loop(*parts, s, z)
            y, c = (y.flip(0), c.flip(0)) if reverse else (y, c)
        elif g is not None:
            y, c = pairs(*parts)
        else:
            s = s + torch.einsum("j,jhd,jhm->hdm", parts[4], parts[1], parts[2])
            z = z + torch.einsum("j,jhd->hd", parts[4], parts[1])
            y, c = torch.einsum("ihd,hdm->ihm", parts[0], s), torch.einsum("ihd,hd->ih", parts[0], z)
        y = scale * y
        if normalize:
            y = y / (scale * c + eps)[..., None]
        rows.append((b, span, y if token_scale is None else y * token_scale.double()[b, span, None, None]))
        ss.append(s)
        zs.append(z)
    for b, span, y in rows:
        out = out.index_put((torch.tensor(b), torch.arange(length)[span]), y)
    none = q.new_zeros(0, heads, width)
    return (
        out,
        torch.stack(ss) if ss else none[..., None].expand(0, heads, width, v.shape[3]),
        (torch.stack(zs) if zs else none),
    )


def assert_near(name, got, true, tolerance):
    assert got.shape == true.shape, f"{name}: {tuple(got.shape)} instead of {tuple(true.shape)}"
    if not true.numel():
        return
    got, true = got.detach().cpu().double(), true.detach().cpu()
    assert got.isfinite().all(), f"{name} is not finite"
    ratio = (got - true).square().mean().sqrt() / (true.square().mean().sqrt() + 1e-8)
    assert ratio <= tolerance, f"{name}: RMS error {ratio:.3g} of the RMS truth, allowed {tolerance:.3g}"


def check(q, k, v, *, place="cpu", grad_state=True, learn=(), **options):
    """Compare fa.linear_attention with the oracle: output, states, and gradients of q, k, v, states and `learn`."""
    tensors = {"q": q, "k": k, "v": v}
    tensors |= {name: options.pop(name) for name in ("decay", "token_scale") if options.get(name) is not None}
    state = options.pop("initial_state", None)
    if state is not None:
        tensors |= {name: x for name, x in zip(("s0", "z0"), state) if x is not None}
    directed = options.get("causal", True) or "decay" not in tensors
    results = []
    for truth in (False, True):
        leaves = {}
        for name, x in tensors.items():
            x = x.detach().to(place) if not truth else x.detach().double()
            fixed = name in ("decay", "token_scale") and name not in learn
            leaves[name] = x if fixed else x.requires_grad_()
        call = {name: leaves[name] for name in ("decay", "token_scale") if name in leaves} | options
        if state is not None:
            call["initial_state"] = (leaves["s0"], leaves.get("z0"))
        inputs = [leaves[name] for name in "qkv"]
        if truth:
            out, s, z = oracle(*inputs, **call)
        else:
            call |= {name: call[name].to(place) for name in ("cu_seqlens", "key_mask") if call.get(name) is not None}
            out = fa.linear_attention(*inputs, output_final_state=directed, **call)
            out, (s, z) = out if directed else (out, (None, None))
        generator = torch.Generator().manual_seed(1)
        outputs = {"o": out}
        if directed:
            outputs |= {"s": s, **({"z": z} if options.get("normalize") else {})}
        grads = {name: torch.randn(x.shape, generator=generator, dtype=F64) for name, x in outputs.items()}
        grads["o"] = grads["o"].to(q.dtype)
        if not grad_state:
            grads = {"o": grads["o"]}
        wanted = [x for x in leaves.values() if x.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[name] for name in grads], wanted,
            [grads[name].to(outputs[name]) for name in grads], allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        names = [name for name, x in leaves.items() if x.requires_grad]
        results.append((outputs, dict(zip(names, gradients))))
    (got, got_grads), (true, true_grads) = results
    forward, backward, of_decay = TOLERANCE[q.dtype]
    assert got["o"].dtype == q.dtype
    for name, x in got.items():
        assert_near(name, x, true[name], forward)
    for name, x in got_grads.items():
        assert_near(f"d{name}", x, true_grads[name], of_decay if name == "decay" else backward)
