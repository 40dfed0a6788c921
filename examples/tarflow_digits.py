"""Train a small TarFlow on handwritten digits, then sample it by every method of flow_inverse.

    pip install flowattn scikit-learn matplotlib
    python examples/tarflow_digits.py

scikit-learn ships 1797 scanned digits of 8 x 8 pixels (UCI ML repository). The model is a normalizing flow, so the
likelihood it reports is exact. Writes the weights to out/tarflow_digits.pt (kept for the next run; --retrain trains
anew) and out/tarflow.png: samples, and for each method the sweeps per block and the time, beside the metric that
predicts the sweeps.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits

from flowattn import InverseStatus
from flowattn.models.tarflow import TarFlow
from flowattn.ops.flow_planning import shares

LEVELS = 17  # a pixel is an integer 0..16
NOISE = 2 / LEVELS / math.sqrt(12)  # standard deviation of the uniform noise that makes pixels continuous
METHODS = ("sequential", "jacobi", "gs_jacobi", "frontier", "auto")
BATCHES = (1, 32)


def make_model():
    torch.manual_seed(0)
    return TarFlow(1, 8, 2, channels=96, num_blocks=4, layers_per_block=2, num_classes=10, head_dim=32)


def load():
    """((pixels (N, 1, 8, 8), labels) of the training digits, the same of the last 360)."""
    data = load_digits()
    pixels, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)
    return (pixels[:-360], labels[:-360]), (pixels[-360:], labels[-360:])


def continuous(pixels):
    """Pixels plus uniform noise, in [-1, 1]: a density of these bounds the probability of the integers from below."""
    return 2 * (pixels + torch.rand_like(pixels)) / LEVELS - 1


@torch.no_grad()
def bits_per_dimension(model, data, draws=4):
    """-log2 of the probability of a pixel, with labels known; uniform noise makes it an upper bound."""
    pixels, labels = data
    nats = torch.stack([model.log_prob(continuous(pixels), labels).mean() for _ in range(draws)]).mean()
    return (-nats.item() / pixels[0].numel() - math.log(2 / LEVELS)) / math.log(2)


def train(model, seen, epochs):
    pixels, labels = seen
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-2)
    batches = len(pixels) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * batches)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(pixels)).split(128)[:batches]:
            y = torch.where(torch.rand(len(batch)) < 0.1, -1, labels[batch])  # a label dropped: for guidance
            shifted = torch.roll(pixels[batch], int(torch.randint(-1, 2, ())), 3)
            loss = model.loss(continuous(shifted), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        done = (epoch + 1) * 30 // epochs
        bar = "#" * done + "." * (30 - done)
        seconds = time.perf_counter() - start
        print(
            f"\rtraining [{bar}] epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}, {seconds:.0f} s",
            end="",
            flush=True,
        )
    print()


def fastest(call, repeats=3):
    """Milliseconds of the best of a few calls after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


@torch.no_grad()
def measure(model, seen):
    """Sweeps per block of each method, and milliseconds per batch size; every method must give the same images."""
    pixels, labels = seen
    sweeps, times = {}, {method: [] for method in METHODS}
    for batch in BATCHES:
        y, z = labels[:batch], model.noise(batch, torch.Generator().manual_seed(1))
        found = model.calibrate(continuous(pixels[:batch]), y)
        expected = model.inverse(z, y, method="sequential")
        for method in METHODS:
            x, info = model.inverse(z, y, method=method, window=8, segments=2, return_info=True)
            if (info.status != InverseStatus.CONVERGED).any() or (x - expected).abs().max() > 1e-3:
                sys.exit(f"tarflow_digits: {method} must give the sequential images; got status {info.status.tolist()}")
            milliseconds = fastest(lambda: model.inverse(z, y, method=method, window=8, segments=2))  # noqa: B023
            times[method].append(milliseconds)
            sweeps[method] = info.sweeps.amax(1).tolist()
            means = " ".join(info.method) if method == "auto" else method
            print(f"  batch {batch:2}, {means}: {milliseconds:.2f} ms, sweeps per block {sweeps[method]}")
    return sweeps, times, shares([block.crm for block in found])


@torch.no_grad()
def draw_samples(model):
    """(10 x 8 digits as they come, the same denoised by Tweedie's formula), each one image."""
    y = torch.arange(10).repeat_interleave(8)
    x = model.sample(80, y, generator=torch.Generator().manual_seed(2), guidance=0.5)
    sheets = []
    for images in (x, model.denoise(x, y, noise_std=NOISE)):
        grid = torch.nn.functional.pad(images.clamp(-1, 1), (1, 0, 1, 0), value=0.0)
        sheets.append(grid.view(10, 8, 9, 9).permute(1, 2, 0, 3).reshape(72, 90))
    return sheets


def plot(path, samples, sweeps, times, crm, bits):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis, image, title in zip(axes[:, 0], samples, ("samples, guidance 0.5", "the same, denoised")):
        axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    blocks = range(len(crm))
    shown = [method for method in METHODS if method != "auto"]
    for i, method in enumerate(shown):
        places = [block + (i - 1.5) * 0.2 for block in blocks]
        axes[0, 1].bar(places, sweeps[method], 0.2, label=method)
    axes[0, 1].set(title=f"sweeps per block, batch {BATCHES[-1]}", xlabel="block", xticks=blocks)
    axes[0, 1].set_ylim(0, 1.35 * max(max(sweeps[method]) for method in shown))  # room for the legend
    axes[0, 1].legend(ncols=2)
    axes[1, 1].bar(blocks, crm, 0.6)
    axes[1, 1].set(title="share of the convergence-ranking metric [%]", xlabel="block", xticks=blocks)
    for axis, i, batch in zip(axes[:, 2], range(2), BATCHES):
        axis.barh(METHODS, [times[method][i] for method in METHODS])
        axis.set(title=f"time of {batch} digit{'s' * (batch > 1)} [ms]")
        axis.invert_yaxis()
    figure.suptitle(f"TarFlow on 8 x 8 digits: {bits:.3f} bits per pixel on 360 unseen ones")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--retrain", action="store_true", help="train anew even where weights are saved")
    parser.add_argument("--out", type=Path, default=Path("out/tarflow.png"))
    arguments = parser.parse_args()
    seen, unseen = load()
    model, weights = make_model(), arguments.out.with_name("tarflow_digits.pt")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if weights.exists() and not arguments.retrain:
        model.load_state_dict(torch.load(weights))
        print(f"weights from {weights}")
    else:
        train(model, seen, arguments.epochs)
        torch.save(model.state_dict(), weights)
    model.eval()
    bits = [bits_per_dimension(model, data) for data in (seen, unseen)]
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters; {bits[0]:.3f} bits per pixel, {bits[1]:.3f} unseen"
    )
    sweeps, times, crm = measure(model, seen)
    print("  share of the convergence-ranking metric: " + ", ".join(f"{share:.0f} %" for share in crm))
    plot(arguments.out, draw_samples(model), sweeps, times, crm, bits[1])
    print(f"wrote {arguments.out} and {weights}")


if __name__ == "__main__":
    main()
