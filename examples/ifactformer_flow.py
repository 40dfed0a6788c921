"""Predict a turbulent flow: IFactFormer-m learns one step of a two-dimensional flow and is rolled out on unseen ones.

    pip install flowattn matplotlib
    python examples/ifactformer_flow.py

A pseudo-spectral solver in numpy computes decaying vortices on a periodic square of 64 x 64 points; the model sees the
velocity on every second point. It learns the step from two frames to the next, then feeds its own frames back. Writes
out/ifactformer_flow.png: true and predicted vorticity side by side, and the error against time.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

from flowattn.models.ifactformer import IFactFormerM

POINTS, KEPT = 64, 32  # of the solver, and of the frames the model sees
VISCOSITY, STEP, STEPS_A_FRAME = 2e-2, 0.02, 8
FRAMES = 18
NOISE = 0.01  # added to what the model sees in training: in a rollout it sees its own errors


class Flow:
    """Incompressible flow on a periodic square of side 2 pi: dw/dt = -u . grad w + viscosity laplace w, by RK4."""

    def __init__(self, points):
        k = np.fft.fftfreq(points, 1 / points)
        self.kx, self.ky = k[:, None], k[None, : points // 2 + 1].copy()
        self.ky[0, -1] = points // 2
        square = self.kx**2 + self.ky**2
        self.laplace = -square
        self.inverse = np.where(square > 0, 1 / np.maximum(square, 1), 0)
        self.alias_free = (np.abs(self.kx) < points / 3) & (self.ky < points / 3)  # products fill the rest with noise

    def velocity(self, w):
        """(u, v) (.., points, points) of the vorticity's coefficients."""
        stream = w * self.inverse
        return np.fft.irfft2(1j * self.ky * stream), np.fft.irfft2(-1j * self.kx * stream)

    def vorticity(self, u, v):
        return np.fft.irfft2(1j * self.kx * np.fft.rfft2(v) - 1j * self.ky * np.fft.rfft2(u))

    def rate(self, w):
        u, v = self.velocity(w)
        moved = u * np.fft.irfft2(1j * self.kx * w) + v * np.fft.irfft2(1j * self.ky * w)
        return VISCOSITY * self.laplace * w - np.fft.rfft2(moved) * self.alias_free

    def step(self, w, dt):
        a = self.rate(w)
        b = self.rate(w + dt / 2 * a)
        c = self.rate(w + dt / 2 * b)
        return w + dt / 6 * (a + 2 * b + 2 * c + self.rate(w + dt * c))

    def start(self, flows, rng):
        """Random vortices, a few across the square, with a root mean square velocity of 1."""
        noise = np.fft.rfft2(rng.standard_normal((flows, len(self.kx), len(self.kx))))
        radius = np.sqrt(-self.laplace)
        w = noise * np.exp(-((radius - 2) ** 2)) * self.alias_free
        u, v = self.velocity(w)
        return w / np.sqrt((u**2 + v**2).mean((1, 2), keepdims=True))


def simulate(flows, seed):
    """Velocities (flows, FRAMES, KEPT, KEPT, 2) as float32."""
    solver, frames = Flow(POINTS), []
    w = solver.start(flows, np.random.default_rng(seed))
    for frame in range(FRAMES):
        for _ in range(STEPS_A_FRAME if frame else 2 * STEPS_A_FRAME):  # the first frame has forgotten the start
            w = solver.step(w, STEP)
        u, v = solver.velocity(w)
        every = POINTS // KEPT
        frames.append(np.stack([u, v], -1)[:, ::every, ::every])
        print(f"\rsolving {flows} flows: frame {frame + 1}/{FRAMES}", end="", flush=True)
    print()
    return torch.tensor(np.stack(frames, 1), dtype=torch.float32)


def train(model, flows, positions, steps, batch=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    start, mean = time.perf_counter(), 0.0
    for step in range(steps):
        which, first = torch.randint(len(flows), (batch,)), torch.randint(FRAMES - 2, (batch,))
        window = flows[which[:, None], first[:, None] + torch.arange(3)]
        shift = torch.randint(KEPT, (2,)).tolist()  # the square is periodic: every shifted flow is a flow
        window = window.roll(shift, (2, 3))
        target, last = window[:, 2], window[:, 1]
        given = window[:, :2] + NOISE * torch.randn_like(window[:, :2])
        error = model(given, positions) - target
        loss = error.square().mean() / (target - last).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 10 == 9:
            part = mean / (1 - 0.98 ** (step + 1))
            print(f"\rstep {step + 1}/{steps}, {100 * part:.1f} % of the change left", end="", flush=True)
    print(f", {time.perf_counter() - start:.0f} s")
    return model.eval()


def errors(predicted, true):
    """Relative L2 error of each frame, averaged over the flows."""
    return ((predicted - true).flatten(2).norm(dim=2) / true.flatten(2).norm(dim=2)).mean(0)


def plot(path, predicted, true, curves, shown):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    solver, time_of = Flow(KEPT), STEP * STEPS_A_FRAME
    figure = plt.figure(figsize=(2.3 * len(shown), 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.6, 2.8))
    grid = upper.subplots(2, len(shown))
    for row, (frames, name) in zip(grid, ((true, "true"), (predicted, "predicted"))):
        for axes, frame in zip(row, shown):
            field = solver.vorticity(*frames[frame].double().numpy().transpose(2, 0, 1))
            limit = np.abs(solver.vorticity(*true[0].double().numpy().transpose(2, 0, 1))).max() * 0.8
            axes.imshow(field.T, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", interpolation="bicubic")
            axes.set_title(f"{name}, t = {(frame + 1) * time_of:.2f}", fontsize=9)
            axes.set_xticks([]), axes.set_yticks([])
    axes = lower.subplots()
    times = time_of * np.arange(1, len(true) + 1)
    for curve, name, colour in zip(curves, ("IFactFormer-m", "no change"), ("#1f6f8b", "#c3ccd3")):
        axes.plot(times, curve, label=name, color=colour)
    axes.set(xlabel="time since the last frame given", ylabel="relative error of the velocity", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--flows", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    torch.manual_seed(0)
    flows, unseen = simulate(options.flows, seed=0), simulate(8, seed=1)
    positions = [torch.arange(KEPT) / KEPT] * 2  # in sides of the square, whose frequencies the encodings then resolve
    model = IFactFormerM(2, 2, 2, 48, 4, 16, steps=4, increment=True)
    model = train(model, flows, positions, options.steps)
    with torch.no_grad():
        predicted = model.rollout(unseen[:, :2], positions, FRAMES - 2)
    true = unseen[:, 2:]
    curves = errors(predicted, true), errors(unseen[:, 1:2].expand_as(true), true)
    for frame in (0, 7, FRAMES - 3):
        print(f"frame {frame + 1}: error {curves[0][frame]:.3f}, without a model {curves[1][frame]:.3f}")
    plot(options.out / "ifactformer_flow.png", predicted[0], true[0], curves, (0, 3, 7, 11, FRAMES - 3))


if __name__ == "__main__":
    main()
