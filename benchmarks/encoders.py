"""What the benchmarks of whole encoders share: batches of padded token ids, the floor, ours and Hugging Face's forward.

A batch is padded to its longest sequence, and results are compared at real tokens. Models have random weights.
"""

import copy
from typing import NamedTuple

import torch

from benchmarks.harness import Bound, Case, Unsupported
from flowattn.models.bert import PaddingFreeEncoder

ROUND = 128  # rows of a capacity are a multiple of it
ATOL = {torch.float32: 1e-5, torch.float16: 2e-3}  # another order of sums than plain torch's, over all layers


class Forward(NamedTuple):
    """What a provider needs besides token ids and mask."""

    model: object  # of Hugging Face
    mask: torch.Tensor
    capacity: int  # rows of the forms that must not ask for the number of tokens


def make_case(config, batch, longest, dtype, device, attention, position_flops=lambda lengths: 0):
    """A forward of a model of `config`; `position_flops`: lengths -> what a layer adds to those of a BERT layer."""
    from transformers import AutoModel

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, attn_implementation=attention).to(dtype).eval()
    lengths = torch.randint(-(-longest // 5), longest + 1, (batch,))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    ids = torch.randint(config.vocab_size, mask.shape).to(device)
    lengths = lengths.tolist()
    tokens, width = sum(lengths), config.hidden_size
    layer = 2 * tokens * width * (4 * width + 2 * config.intermediate_size) + 4 * width * sum(n * n for n in lengths)
    words = model.get_input_embeddings().weight.numel()
    weights = (sum(p.numel() for p in model.parameters()) - words) * dtype.itemsize
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).last_hidden_state[mask]
        truth = copy.deepcopy(model).double()(ids, attention_mask=mask).last_hidden_state[mask]
    return Case(
        name=f"B{batch} S{longest} L{config.num_hidden_layers} {str(dtype).removeprefix('torch.')}",
        inputs=(ids, mask),
        grad_output=None,
        truth={"fwd": (truth,)},
        plain={"fwd": (plain,)},
        bytes={"fwd": weights + (tokens + mask.numel()) * width * dtype.itemsize},  # embeddings in, padded states out
        flops={"fwd": config.num_hidden_layers * (layer + position_flops(lengths))},
        context=Forward(model, mask, -(-tokens // ROUND) * ROUND),
        atol=ATOL[dtype],
        resident=weights,
    )


def at_tokens(case, call):
    """A Bound of (ids, mask) -> an output with last_hidden_state, compared at the real tokens."""
    return Bound(lambda *inputs: call(*inputs).last_hidden_state, collect=lambda x: x[case.context.mask])


def flowattn_eager(case):
    """As it is called without further thought; asks for the number of tokens."""
    return at_tokens(case, PaddingFreeEncoder.from_hf(case.context.model))


def flowattn_capacity(case):
    """The same kernels without the question, so that the harness can capture them."""
    encoder, capacity = PaddingFreeEncoder.from_hf(case.context.model), case.context.capacity
    return at_tokens(case, lambda ids, mask: encoder(ids, mask, capacity=capacity))


def flowattn_captured(case):
    """PaddingFreeEncoder.capture: its wall time has the copies of the inputs and the count of tokens in it."""
    model, mask, capacity = case.context
    if not mask.is_cuda:
        raise Unsupported("it is a CUDA graph")
    return at_tokens(case, PaddingFreeEncoder.from_hf(model).capture(*mask.shape, min(capacity, mask.numel())))


def hugging_face(case):
    model = case.context.model
    return at_tokens(case, lambda ids, mask: model(ids, attention_mask=mask))


def hugging_face_compiled(case):
    if not case.context.mask.is_cuda:
        raise Unsupported("it is compared on a GPU")
    if case.context.mask.shape[0] < 16 or case.context.mask.shape[1] <= 256:
        raise Unsupported("every shape compiles for half a minute: it is compared at the largest ones")
    torch._dynamo.reset()  # each case gets its own kernels for its own shape, outside the recompile limit
    model = torch.compile(case.context.model, dynamic=False)
    return at_tokens(case, lambda ids, mask: model(ids, attention_mask=mask))
