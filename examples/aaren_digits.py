"""Classify handwritten digits that arrive row by row: Aaren against a causal Transformer of the same size.

    pip install "flowattn[examples]"
    python examples/aaren_digits.py

scikit-learn ships 1797 scanned digits of 8 x 8 pixels (UCI ML repository). Each becomes a stream of 8 tokens, its rows;
after every token the models answer. Writes out/aaren_digits.png (--out): accuracy against the rows seen, and the memory
and time of one streamed token against the length of the stream before it; prints the same as the README's table.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from flowattn.models.aaren import Aaren

WIDTH, HEADS, LAYERS, HIDDEN = 64, 4, 2, 128
STREAM_LENGTHS = (64, 256, 1024, 4096, 16384)


class TransformerLayer(nn.Module):
    """The same layer with a query for each token, and a cache of keys and values as its state."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x, cache=None):
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = self.norm1(x + self.out_proj(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.ffn(x)), (k, v)


class Transformer(nn.Module):
    """The interface of Aaren, as far as this example needs it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer() for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return x

    def init_state(self, batch, length=0):
        return [tuple(torch.zeros(batch, HEADS, length, WIDTH // HEADS) for _ in range(2)) for _ in self.layers]

    def step(self, x, state):
        x, after = x.unsqueeze(1), []
        for layer, cache in zip(self.layers, state):
            x, cache = layer(x, cache)
            after.append(cache)
        return x.squeeze(1), after


class Classifier(nn.Module):
    """A row of pixels and its number -> tokens -> `body` -> logits after every token."""

    def __init__(self, body, length=8):
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(8, WIDTH), body, nn.Linear(WIDTH, 10)
        angle = torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))  # (T, WIDTH)

    def forward(self, images):
        return self.head(self.body(self.embed(images) + self.positions))


def load():
    """(images (N, 8, 8) in [0, 1], labels) for training and test: the last 360 digits."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def train(name, body, data, epochs):
    torch.manual_seed(0)
    model = Classifier(body)
    images, labels = data
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            logits = model(images[batch])[:, 3:]  # answers after four rows and more
            loss = F.cross_entropy(logits.flatten(0, 1), labels[batch].repeat_interleave(logits.shape[1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"\r{name}: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}", end="", flush=True)
    print()
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model, data):
    """Share of right answers after each token (T,)."""
    images, labels = data
    return (model(images).argmax(-1) == labels[:, None]).float().mean(0)


@torch.no_grad()
def stream_costs(body, state_after, repeats=20):
    """(bytes of state, median milliseconds of one step) after streams of each length."""
    sizes, times, x = [], [], torch.randn(1, WIDTH)
    for length in STREAM_LENGTHS:
        state = state_after(length)
        body.step(x, state)
        steps = []
        for _ in range(repeats):
            start = time.perf_counter()
            body.step(x, state)
            steps.append((time.perf_counter() - start) * 1e3)
        times.append(statistics.median(steps))
        sizes.append(sum(part.numel() * part.element_size() for layer in state for part in layer))
    return sizes, times


@torch.no_grad()
def aaren_state(body, length):
    return body(torch.randn(1, length, WIDTH), output_state=True)[1]


def table(results):
    """The README's table."""
    stream = [f"{length} tokens before" for length in STREAM_LENGTHS]
    yield f"| | parameters | training | right after 4 rows | after all 8 | {' | '.join(stream)} |"
    yield "|---" * (5 + len(stream)) + "|"
    for name, (count, seconds, right, sizes, times) in results.items():
        costs = (f"{size / 1024:,.1f} KiB, {milliseconds:.2f} ms" for size, milliseconds in zip(sizes, times))
        yield f"| {name} | {count} | {seconds:.0f} s | {right[3]:.1%} | {right[7]:.1%} | {' | '.join(costs)} |"


def plot(path, results):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, (_, _, right, sizes, times) in results.items():
        axes[0].plot(range(1, len(right) + 1), right, label=name)
        axes[1].loglog(STREAM_LENGTHS, [size / 1024 for size in sizes], "o-", label=name)
        axes[2].loglog(STREAM_LENGTHS, times, "o-", label=name)
    titles = ("accuracy on 360 unseen digits", "state of one stream [KiB]", "time of one streamed token [ms]")
    for axis, title, label in zip(axes, titles, ("rows seen", "tokens before", "tokens before")):
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/aaren_digits.png"))
    arguments = parser.parse_args()
    seen, unseen = load()
    results = {}
    for name, make in (("Aaren", lambda: Aaren(WIDTH, HEADS, LAYERS, HIDDEN)), ("Transformer", Transformer)):
        torch.manual_seed(0)
        body = make()
        model, seconds = train(name, body, seen, arguments.epochs)
        right = accuracy(model, unseen)
        if name == "Aaren":
            body.fuse_inference()
            costs = stream_costs(body, lambda length, body=body: aaren_state(body, length))
        else:
            costs = stream_costs(body, lambda length, body=body: body.init_state(1, length))
        results[name] = (sum(p.numel() for p in body.parameters()), seconds, right.tolist(), *costs)
    print(f"{torch.get_num_threads()} threads; state of one stream and time of its next token:\n")
    print("\n".join(table(results)), end="\n\n")
    plot(arguments.out, results)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
