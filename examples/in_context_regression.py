"""In-context linear regression by linear attention: four exact identities, and a layer that learns the third.

    pip install flowattn matplotlib
    python examples/in_context_regression.py

A prompt holds N pairs (x_i, y_i = w . x_i) with its own w, and a query x_q. One layer of linear attention over them
answers it: as one step of gradient descent, as least squares, as the optimum of its own weights, and, along a linear
dynamical system, as a step of gradient descent at every time. Prints how far each is from the formula, in float64,
trains a layer from random weights on random prompts, and writes out/in_context_regression.png.
Sources: von Oswald et al., Transformers learn in-context by gradient descent (2023); Zhang et al., Trained Transformers
learn linear models in-context (2023); Zheng et al., On mesa-optimization in autoregressively trained Transformers
(2024).
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch

import flowattn as fa


def prompts(batch, pairs, covariance, generator, dtype=torch.float64):
    """x (B, N, d) of the given covariance (its diagonal), y (B, N), queries (B, d), and the w (B, d) behind them."""
    d = len(covariance)
    x, queries = (torch.randn(batch, n, d, generator=generator, dtype=dtype) for n in (pairs, 1))
    w = torch.randn(batch, d, generator=generator, dtype=dtype)
    x, queries = x * covariance.to(dtype).sqrt(), (queries * covariance.to(dtype).sqrt()).squeeze(1)
    return x, torch.einsum("bnd,bd->bn", x, w), queries, w


def attend(query, keys, values, scale):
    """One query (B, D) over keys (B, N, D) and values (B, N, M): linear attention with one head."""
    out = fa.linear_attention(query[:, None, None], keys[:, :, None], values[:, :, None], causal=False, scale=scale)
    return out[:, 0, 0]


def gradient_step(x, y, queries, rate):
    """(attention, x_q . w after one gradient step of size `rate` from 0 on sum (w . x_i - y_i)^2 / 2N)."""
    answer = attend(queries, x, y[..., None], rate / x.shape[1]).squeeze(-1)
    w = torch.zeros_like(queries, requires_grad=True)
    loss = (torch.einsum("bnd,bd->bn", x, w) - y).square().sum() / (2 * x.shape[1])
    stepped = -rate * torch.autograd.grad(loss, w)[0]
    return answer, (queries * stepped).sum(-1)


def least_squares(x, y, queries, w):
    """(attention with queries (X^T X)^-1 x_q, x_q . w)."""
    preconditioned = torch.linalg.solve(x.mT @ x, queries).contiguous()
    return attend(preconditioned, x, y[..., None], 1.0).squeeze(-1), (queries * w).sum(-1)


def tokens(x, y, queries):
    """Pairs as tokens (x_i, y_i) (B, N, d + 1), the query as (x_q, 0)."""
    return torch.cat([x, y[..., None]], -1), torch.nn.functional.pad(queries, (0, 1))


def layer(weights, x, y, queries):
    """The last entry at the query of linear self-attention with weights (W_KQ, W_PV), each (d + 1, d + 1)."""
    pairs, query = tokens(x, y, queries)
    w_kq, w_pv = weights
    return attend(query @ w_kq.T, pairs, pairs @ w_pv.T, 1 / x.shape[1])[:, -1]


def gamma(covariance, pairs):
    return (1 + 1 / pairs) * covariance + covariance.sum() / pairs


def optimal_weights(covariance, pairs):
    """The weights that gradient flow on the loss of such prompts converges to."""
    inverse = 1 / gamma(covariance, pairs)
    c = inverse.square().sum()
    w_kq = torch.diag(torch.nn.functional.pad(inverse, (0, 1))) * c**-0.25
    w_pv = torch.zeros_like(w_kq)
    w_pv[-1, -1] = c**0.25
    return w_kq, w_pv


def optimum(x, y, queries, covariance):
    """(the layer at its optimal weights, x_q . Gamma^-1 sum y_i x_i / N)."""
    summed = torch.einsum("bn,bnd->bd", y, x) / x.shape[1]
    expected = (queries * summed / gamma(covariance, x.shape[1])).sum(-1)
    return layer(optimal_weights(covariance, x.shape[1]), x, y, queries), expected


def mesa(dynamics, start, length, rate):
    """(causal attention along x_(t+1) = W x_t, one gradient step on sum |x_(i+1) - W x_i|^2 from W = 0) (B, T - 2, d).

    At time t keys are x_(t-1), values x_t, queries x_t, and the result counts rate / (t - 1).
    """
    xs = [start]
    for _ in range(length - 1):
        xs.append(torch.einsum("bij,bj->bi", dynamics, xs[-1]))
    xs = torch.stack(xs, 1)
    before, now = xs[:, :-1], xs[:, 1:]
    steps = torch.arange(1, length, dtype=xs.dtype)  # t - 1 for t = 2 .. length
    scales = (rate / steps).expand(len(xs), -1).contiguous()
    q, k, v = (x[:, :, None] for x in (now, before, now))
    answer = fa.linear_attention(q, k, v, scale=1.0, token_scale=scales).squeeze(2)
    expected = []
    for t in range(1, length):
        w = torch.zeros_like(dynamics, requires_grad=True)
        loss = (xs[:, 1 : t + 1] - torch.einsum("bij,bnj->bni", w, xs[:, :t])).square().sum() / 2
        stepped = -rate / t * torch.autograd.grad(loss, w)[0]
        expected.append(torch.einsum("bij,bj->bi", stepped, xs[:, t]))
    return answer, torch.stack(expected, 1)


def identities(seed=0):
    """name -> (attention, formula), each in float64."""
    generator = torch.Generator().manual_seed(seed)
    covariance = torch.tensor([1.0, 0.7, 0.4, 0.2], dtype=torch.float64)
    x, y, queries, w = prompts(64, 12, covariance, generator)
    rotation = torch.linalg.qr(torch.randn(8, 4, 4, generator=generator, dtype=torch.float64)).Q
    start = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return {
        "one gradient step": gradient_step(x, y, queries, 0.3),
        "least squares": least_squares(x, y, queries, w),
        "optimum of training": optimum(x, y, queries, covariance),
        "mesa-optimiser": mesa(rotation, start, 20, 0.5),
    }


def train(steps, covariance, pairs, batch=256, seed=0):
    """(weights, losses): the layer from random weights, Adam on the squared error of fresh prompts."""
    generator = torch.Generator().manual_seed(seed)
    d = len(covariance) + 1
    weights = [(0.3 * torch.randn(d, d, generator=generator)).requires_grad_() for _ in range(2)]
    optimizer = torch.optim.Adam(weights, 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        x, y, queries, w = prompts(batch, pairs, covariance, generator, torch.float32)
        loss = (layer(weights, x, y, queries) - (queries * w).sum(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"\rtraining: step {step + 1}/{steps}, loss {sum(losses[-100:]) / 100:.4f}", end="", flush=True)
    print(f", {time.perf_counter() - start:.1f} s")
    return [x.detach() for x in weights], losses


def plot(path, results, losses, floor, predictions):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for axis, (name, (got, expected)) in zip(axes.flat, results.items()):
        axis.plot(expected.flatten(), got.flatten(), ".", markersize=4)
        axis.axline((0, 0), slope=1, linewidth=0.8, color="grey")
        axis.set(title=f"{name}: error {(got - expected).abs().max():.1e}", xlabel="formula", ylabel="linear attention")
    window = max(len(losses) // 100, 1)
    smooth = torch.tensor(losses).unfold(0, window, window).mean(-1)
    axes[1, 1].semilogy(torch.arange(len(smooth)) * window, smooth, label="trained layer")
    axes[1, 1].axhline(floor, linestyle="--", color="grey", label="optimal weights")
    axes[1, 1].set(title="squared error on fresh prompts", xlabel="step")
    axes[1, 1].legend()
    trained, optimal, true = predictions
    axes[1, 2].plot(optimal, trained, ".", markersize=4, label="against the optimal weights")
    axes[1, 2].plot(true, trained, ".", markersize=4, alpha=0.4, label="against w . x")
    axes[1, 2].axline((0, 0), slope=1, linewidth=0.8, color="grey")
    axes[1, 2].set(title="predictions of the trained layer", xlabel="prediction or truth")
    axes[1, 2].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("out/in_context_regression.png"))
    arguments = parser.parse_args()
    results = identities()
    for name, (got, expected) in results.items():
        print(f"{name:<20} largest error {(got - expected).abs().max():.1e} of values up to {expected.abs().max():.2f}")
    covariance, pairs = torch.tensor([1.0, 0.7, 0.4, 0.2]), 40
    weights, losses = train(arguments.steps, covariance, pairs)
    x, y, queries, w = prompts(2000, pairs, covariance, torch.Generator().manual_seed(1), torch.float32)
    trained, (optimal, _), true = (
        layer(weights, x, y, queries),
        optimum(x, y, queries, covariance),
        (queries * w).sum(-1),
    )
    errors = [(prediction - true).square().mean().item() for prediction in (trained, optimal)]
    print(f"squared error on 2000 unseen prompts: trained {errors[0]:.4f}, optimal weights {errors[1]:.4f}")
    print(f"trained against optimal predictions: {(trained - optimal).square().mean().sqrt():.4f} root mean square")
    plot(arguments.out, results, losses, errors[1], (trained[:300], optimal[:300], true[:300]))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
