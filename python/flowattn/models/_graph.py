"""The forward of a padding-free encoder as one CUDA graph."""

import torch
from torch import nn

from flowattn import checks

_NAME = "PaddingFreeEncoder.capture"
_LARGER = "capture again with larger sizes"


class CapturedEncoder:
    """Replays the forward of an encoder from fixed buffers: one launch a batch instead of hundreds.

    Calling it copies a batch of at most (batch_size, padded_len), in tokens at most capacity, into the buffers, replays
    and returns an EncoderOutput of views of the batch's size: the next call overwrites them, so clone what must last.
    Weights are read at replay, so in-place updates count; modules and options must stay what they were.
    """

    def __init__(self, encoder, batch_size, padded_len, capacity=None):
        weight = next(encoder.parameters())
        checks.require(
            weight.is_cuda, _NAME, "needs an encoder on a GPU", weight.device, "call the encoder itself",
            NotImplementedError,
        )  # fmt: skip
        rule = "batch_size and padded_len must be positive"
        checks.require(batch_size > 0 and padded_len > 0, _NAME, rule, (batch_size, padded_len))
        active = [m for m in encoder.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        checks.require(not active, _NAME, "dropout must be off", "a training model", "call eval() on the model")
        rows = batch_size * padded_len
        self.shape, self.capacity = (batch_size, padded_len), rows if capacity is None else capacity
        rule = f"capacity must lie in 1..{rows}, the padded size"
        checks.require(0 < self.capacity <= rows, _NAME, rule, capacity)
        self._ids, self._types = torch.zeros(2, *self.shape, dtype=torch.long, device=weight.device).unbind(0)
        self._mask = (torch.arange(rows, device=weight.device) < self.capacity).view(self.shape)
        inputs = (self._ids, self._mask, None if encoder.embeddings.types is None else self._types)
        self._graph, self._embeddings = torch.cuda.CUDAGraph(), encoder.embeddings
        with torch.no_grad(), torch.cuda.device(weight.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled, workspaces made
                encoder(*inputs, capacity=self.capacity)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._out = encoder(*inputs, capacity=self.capacity)

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        """Encode input_ids (b, s) under attention_mask (b, s), non-zero = real token, None = all.

        Costs one host sync where capacity is less than the padded size and the mask is on the GPU: its tokens are
        counted. ValueError for a batch, a length or a number of tokens beyond what was captured.
        """
        batch, length = shape = tuple(input_ids.shape)
        fits = len(shape) == 2 and batch <= self.shape[0] and length <= self.shape[1]
        checks.require(fits, _NAME, f"input_ids must have at most the shape {self.shape}", shape, _LARGER)
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None:
                checks.require(given.shape == shape, _NAME, f"{name} must have shape {shape}", tuple(given.shape))
        token_type_ids = self._embeddings.checked_types(token_type_ids)
        if self.capacity < self._mask.numel():
            tokens = batch * length if attention_mask is None else int(attention_mask.count_nonzero())
            rule = f"the batch may have at most {self.capacity} tokens"
            checks.require(tokens <= self.capacity, _NAME, rule, tokens, _LARGER)
        here = (slice(batch), slice(length))
        self._mask.zero_()[here] = True if attention_mask is None else attention_mask.to(self._mask.device) != 0
        self._ids[here] = input_ids.to(self._ids.device)
        self._types.zero_()
        if token_type_ids is not None:
            self._types[here] = token_type_ids.to(self._types.device)
        self._graph.replay()
        hidden, pooled, _ = self._out
        pooled = None if pooled is None else pooled[:batch]
        return self._out._replace(last_hidden_state=hidden[here], pooler_output=pooled)
