"""BERT, RoBERTa, DistilBERT, ALBERT and DeBERTa encoders that spend nothing on padding: packed once, unpacked once."""

from typing import NamedTuple

import torch
from torch import nn

from flowattn import checks
from flowattn.models._graph import CapturedEncoder
from flowattn.models._hf import convert
from flowattn.ops.packing import pack_plan, unpack

_NAME = "PaddingFreeEncoder"


class EncoderOutput(NamedTuple):
    """Padded results: last_hidden_state (B, S, d), zeros at padding; pooler_output (B, d) or None.

    hidden_states: None, or one (B, S, d) tensor for the embeddings and one for each layer.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple | None = None


class PaddingFreeEncoder(nn.Module):
    """A BERT-like encoder on the real tokens alone.

    The embeddings, every matmul, LayerNorm and attention run on T packed rows instead of B * S; the batch is packed
    once and unpacked once. At real tokens the result is that of the original model, at padding it is 0. Any mask
    pattern is right: right and left padding, holes, empty rows. Only DeBERTa differs under a mask with holes between
    real tokens: its distances, and the windows of its convolution, count the real tokens and not the columns.

    `pooler_output` pools the first real token of each sequence, and is 0 for a sequence without one. The original pools
    column 0, which is the same token unless a row is padded on the left; there it pools a padding position.

    Dropout follows the modules' training flags, that of the attention probabilities too.
    """

    def __init__(self, embeddings, layers, pooler=None, positions=None):
        """positions: a module without inputs; each layer is called with the packed rows, the plan and its result."""
        super().__init__()
        self.embeddings, self.layers, self.pooler = embeddings, nn.ModuleList(layers), pooler
        self.positions = positions

    @classmethod
    def from_hf(cls, model):
        """Build from a transformers model or a ...For... wrapper of one: BERT, RoBERTa and its namesakes, DistilBERT,
        ALBERT, DeBERTa v1, v2 and v3.

        The modules and Parameter objects are shared, not copied: training either model trains both, and the original's
        state dict stays what it was. The q, k and v parameters of a layer move into one storage (see FusedProjection).
        NotImplementedError for other models, and for decoders, talking heads and more than one enhanced mask decoder
        step (z_steps) of these.
        """
        return cls(**convert(model))

    def capture(self, batch_size, padded_len, capacity=None):
        """The forward as a CUDA graph for batches of at most (batch_size, padded_len): a CapturedEncoder.

        capacity: rows that are computed whatever the mask, at least the tokens of any batch that will come; default
            batch_size * padded_len, which saves nothing on padding. For inference; needs a GPU and eval mode.

        captured = encoder.capture(16, 512, capacity=16 * 320)
        captured(input_ids, attention_mask).last_hidden_state
        """
        return CapturedEncoder(self, batch_size, padded_len, capacity)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        *,
        position_ids=None,
        inputs_embeds=None,
        capacity=None,
        output_hidden_states=False,
    ):
        """Encode a padded batch.

        Shapes: input_ids, attention_mask (non-zero = real token; None = all), token_type_ids and position_ids (B, S);
            inputs_embeds (B, S, d) instead of input_ids; returns an EncoderOutput.
        position_ids: default as the original model: the column (BERT, DistilBERT), or a count of the input ids that are
            not the padding id (RoBERTa).
        capacity: None reads the token count back (one host sync on a GPU); an int >= the number of real tokens
            (B * S always is) computes that many rows and never syncs, as CUDA graphs and
            torch.compile(fullgraph=True) need.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        rule = "takes exactly one of input_ids and inputs_embeds"
        checks.require((input_ids is None) != (inputs_embeds is None), _NAME, rule, "none" if given is None else "both")
        shape = given.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.bool, device=given.device)
        rule = f"attention_mask must have shape {tuple(shape)}"
        checks.require(attention_mask.shape == shape, _NAME, rule, tuple(attention_mask.shape))
        plan = pack_plan(attention_mask.bool(), capacity=capacity)
        states = self._run(plan, (input_ids, token_type_ids, position_ids, inputs_embeds), output_hidden_states)
        padded = tuple(unpack(x, plan) for x in states)
        return EncoderOutput(padded[-1], self.pool(states[-1], plan), padded if output_hidden_states else None)

    def forward_packed(self, input_ids, plan, token_type_ids=None, *, position_ids=None, inputs_embeds=None):
        """Encode padded (B, S) inputs under a PackPlan of their mask; return the packed rows (T, d), for pooling."""
        return self._run(plan, (input_ids, token_type_ids, position_ids, inputs_embeds))[0]

    def _run(self, plan, inputs, keep_all=False):
        """[last packed hidden state], or the packed embeddings and the output of every layer."""
        x = self.embeddings(plan, *inputs)
        states, positions = [x], None if self.positions is None else self.positions()
        for layer in self.layers:
            x = layer(x, plan, positions)
            states = [*states, x] if keep_all else [x]
        return states

    def pool(self, packed, plan):
        """The pooler on the first token of each sequence: packed (T, d) -> (B, d), 0 for empty sequences; or None."""
        if self.pooler is None:
            return None
        starts, ends = plan.cu_seqlens[:-1], plan.cu_seqlens[1:]
        if packed.shape[0] == 0:
            return packed.new_zeros(plan.batch, packed.shape[1])
        first = packed[starts.clamp(max=packed.shape[0] - 1).long()]
        return self.pooler(first.unsqueeze(1)).masked_fill((starts == ends)[:, None], 0.0)
