"""Train a small Flowformer language model on Python's own documentation, beside softmax attention of the same size.

    pip install flowattn matplotlib
    python examples/flowformer_lm.py

The text is pydoc_data.topics, which every Python ships: what help("LAMBDA") and its kin print. Both models are
FlowformerLM with 4 layers of width 128 and read characters; one has its attention exchanged. Writes
out/flowformer_lm.png: the loss on held-out text, and against the length of the context the speed of reading it, the
speed of the next token, and the memory that this token needs of those before.
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

from flowattn.models.flowformer import FlowformerLM

CONTEXT, BATCH = 256, 16
LENGTHS = (128, 512, 2048, 8192)


class Cache(NamedTuple):
    """Keys and values of the tokens so far (B, T, H, D), and their number (B,)."""

    k: torch.Tensor
    v: torch.Tensor
    n: torch.Tensor


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with the parameters and the calls of FlowAttentionLayer."""

    def __init__(self, layer):
        super().__init__()
        self.num_heads = layer.num_heads
        for name, projection in layer.named_children():
            setattr(self, name, projection)

    def _heads(self, x):
        projections = (self.query_projection, self.key_projection, self.value_projection)
        return (projection(x).unflatten(-1, (self.num_heads, -1)) for projection in projections)

    def forward(self, x, initial_state=None, output_final_state=False):
        """Reads whole contexts from their start alone."""
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        y = self.out_projection(y.transpose(1, 2).flatten(2))
        return (y, Cache(k, v, torch.full(x.shape[:1], x.shape[1]))) if output_final_state else y

    def step(self, x, cache):
        q, k, v = self._heads(x.unsqueeze(1))
        k, v = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        return self.out_projection(y.transpose(1, 2).flatten(1)), Cache(k, v, cache.n + 1)


def load():
    """(ids for training, ids held out, the characters): every tenth topic is held out."""
    names = sorted(topics)
    characters = sorted(set("".join(topics.values())))
    index = {character: i for i, character in enumerate(characters)}
    parts = ("".join(topics[name] for i, name in enumerate(names) if (i % 10 == 0) == held) for held in (False, True))
    seen, unseen = (torch.tensor([index[character] for character in part]) for part in parts)
    return seen, unseen, characters


def make(vocabulary, softmax):
    torch.manual_seed(0)
    model = FlowformerLM(vocabulary, LENGTHS[-1] + 1, preset="micro", dropout=0.0)
    if softmax:
        for block in model.transformer.h:
            block.attn = SoftmaxAttention(block.attn)
    return model


def pieces(ids, count, generator=None):
    """`count` stretches of CONTEXT + 1 characters, at random or evenly spread."""
    last = len(ids) - CONTEXT - 1
    starts = torch.linspace(0, last, count).long()
    if generator is not None:
        starts = torch.randint(last, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(name, model, seen, unseen, steps):
    """[(step, loss on held-out text)] of a model trained in place."""
    generator, test = torch.Generator().manual_seed(0), pieces(unseen, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    start, curve = time.perf_counter(), []
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve.append((step, loss_of(model, test).item()))
            passed = time.perf_counter() - start
            print(f"\r{name}: step {step}, held-out loss {curve[-1][1]:.3f}, {passed:.0f} s", end="", flush=True)
        if step == steps:
            break
        optimizer.zero_grad()
        loss_of(model, pieces(seen, BATCH, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print()
    return curve


def seconds(call, repeats):
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def costs(model, vocabulary):
    """(tokens read a second, tokens written a second, bytes of state) by length of the context."""
    rows = []
    for length in LENGTHS:
        ids = torch.randint(vocabulary, (1, length))
        _, state = model(ids, output_state=True)
        size = sum(part.numel() * part.element_size() for layer in state for part in layer)
        read = length / seconds(lambda ids=ids: model(ids), 2)
        written = 1 / seconds(lambda ids=ids, state=state: model.step(ids[:, 0], state), 10)
        rows.append((read, written, size))
    return rows


def sample(model, characters, start="Lambda expressions ", length=120):
    ids = torch.tensor([[characters.index(character) for character in start]])
    return "".join(characters[i] for i in model.generate(ids, length)[0])


def plot(path, results):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for name, (curve, rows) in results.items():
        read, written, sizes = zip(*rows)
        axes[0].plot(*zip(*curve), "o-", label=name)
        for axis, values in zip(axes[1:], (read, written, [size / 1024 for size in sizes])):
            axis.loglog(LENGTHS, values, "o-", label=name)
    titles = ("loss on held-out text [nats a character]", "tokens read a second", "tokens written a second")
    for axis, title in zip(axes, (*titles, "state of one stream [KiB]")):
        axis.set(title=title, xlabel="step" if axis is axes[0] else "tokens of context")
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("out/flowformer_lm.png"))
    arguments = parser.parse_args()
    seen, unseen, characters = load()
    print(f"{len(seen)} characters to learn from, {len(unseen)} held out, {len(characters)} different ones")
    results = {}
    for name, softmax in (("Flow-Attention", False), ("softmax attention", True)):
        model = make(len(characters), softmax)
        curve = train(name, model, seen, unseen, arguments.steps)
        results[name] = (curve, costs(model.eval(), len(characters)))
        for length, (read, written, size) in zip(LENGTHS, results[name][1]):
            speeds = f"reads {read:7.0f} tokens/s, writes {written:5.0f} tokens/s"
            print(f"  {length:5} tokens of context: {speeds}, state {size / 1024:7.0f} KiB")
        if not softmax:
            print(f"  {sample(model, characters)!r}")
    plot(arguments.out, results)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
