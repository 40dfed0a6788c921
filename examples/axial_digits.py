"""Draw handwritten digits: an Axial Transformer trained on 1437 scans, sampled pixel by pixel.

    pip install flowattn scikit-learn matplotlib
    python examples/axial_digits.py

scikit-learn ships 1797 scanned digits of 8 x 8 pixels with 17 grey levels (UCI ML repository). The model learns
p(image | digit) one pixel after the other and is scored in bits a pixel on the 360 digits it has not seen. Cached
sampling draws the same digits as running the whole model for each pixel. Writes out/axial_digits.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits

from flowattn.models.axial_transformer import AxialTransformer

LEVELS = 17
ROWS = 8  # of drawn digits


def load():
    """(images (N, 8, 8, 1), labels) for training and test: the last 360 digits."""
    data = load_digits()
    images, labels = torch.tensor(data.images).long().unsqueeze(-1), torch.tensor(data.target)
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def make_model():
    return AxialTransformer(
        (8, 8), 1, levels=LEVELS, dim=64, heads=4, exterior_layers=0, outer_layers=4, inner_layers=4, hidden_factor=2,
        dropout=0.2, num_classes=10,
    )  # fmt: skip


def augmented(images):
    """Shifted by up to a pixel each way: the scans are centred, but only 1437."""
    rows, columns = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((rows, columns), (1, 2)) if torch.rand(()) < 0.3 else images


def train(model, data, epochs):
    images, labels = data
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            loss = model.loss(augmented(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total / (len(images) // 64)
        print(f"\repoch {epoch + 1}/{epochs}, {mean:.3f} bits a pixel", end="", flush=True)
    print(f", {time.perf_counter() - start:.0f} s")
    return model.eval()


def gumbel(*shape):
    return -torch.log(-torch.log(torch.rand(shape).clamp(1e-20, 1 - 1e-7)))


def draw(model):
    """(digits (ROWS * 10, 8, 8, 1), seconds of cached and of naive sampling); both must draw the same."""
    labels = torch.arange(10).repeat(ROWS)
    noise = gumbel(len(labels), 8, 8, 1, LEVELS)
    results, seconds = [], []
    for method in ("cached", "naive"):
        start = time.perf_counter()
        results.append(model.sample(noise, labels, method=method))
        seconds.append(time.perf_counter() - start)
    assert torch.equal(*results), "cached sampling must equal naive sampling"
    return results[0], seconds


def plot(path, real, labels, drawn, bits):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scans = torch.stack([real[(labels == d).nonzero()[:3, 0]] for d in range(10)], 1)  # (3, 10, 8, 8, 1)

    def tiled(images):
        images = torch.nn.functional.pad(images.squeeze(-1), (1, 1, 1, 1))
        return images.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)

    figure, (left, right) = plt.subplots(
        2, 1, figsize=(6.4, 7.4), layout="constrained", gridspec_kw={"height_ratios": (3, ROWS)}
    )
    pictures = ((left, scans, "scanned"), (right, drawn.unflatten(0, (ROWS, 10)), f"drawn, {bits:.2f} bits a pixel"))
    for axes, images, title in pictures:
        axes.imshow(tiled(images), cmap="gray_r", vmin=0, vmax=LEVELS - 1, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10)
        axes.axis("off")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    torch.manual_seed(0)
    training, (images, labels) = load()
    model = train(make_model(), training, options.epochs)
    bits = model.bits_per_dim(images, labels).item()
    pixels = torch.bincount(training[0].flatten(), minlength=LEVELS).float()
    share = pixels / pixels.sum()
    apart = -share[images.flatten()].log2().mean().item()
    print(f"unseen digits: {bits:.3f} bits a pixel (grey levels alone: {apart:.3f})")
    drawn, (cached, naive) = draw(model)
    print(f"{len(drawn)} digits: {cached:.2f} s cached, {naive:.2f} s naive, the same digits")
    plot(options.out / "axial_digits.png", images, labels, drawn, bits)


if __name__ == "__main__":
    main()
