"""BERT, RoBERTa and DistilBERT encoders that spend nothing on padding: packed once, unpacked once."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from flowattn import checks
from flowattn.ops.encoder_fusions import bias_gelu, bias_residual_layer_norm
from flowattn.ops.packing import pack, pack_plan, unpack
from flowattn.ops.varlen_attention import varlen_attention

_NAME = "PaddingFreeEncoder"


class EncoderOutput(NamedTuple):
    """Padded results: last_hidden_state (B, S, d), zeros at padding; pooler_output (B, d) or None.

    hidden_states: None, or one (B, S, d) tensor for the embeddings and one for each layer.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple | None = None


class PackedEmbeddings(nn.Module):
    """LayerNorm(word + token type + position) at the packed rows, from the modules of a Hugging Face embedding layer.

    padding_idx: None numbers positions by padded column (BERT, DistilBERT); an id numbers them as RoBERTa does, from
    padding_idx + 1 over the input ids that differ from it. As in RoBERTa the ids decide, not the attention mask.
    """

    def __init__(self, embeddings, padding_idx=None):
        super().__init__()
        self.words, self.positions = embeddings.word_embeddings, embeddings.position_embeddings
        self.types = getattr(embeddings, "token_type_embeddings", None)
        self.norm, self.dropout = embeddings.LayerNorm, embeddings.dropout
        self.padding_idx = padding_idx

    def forward(self, plan, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        x = self.words(pack(input_ids, plan)) if inputs_embeds is None else pack(inputs_embeds, plan)
        if token_type_ids is not None:
            rule = "token_type_ids must be None for a model without token types"
            checks.require(self.types is not None, _NAME, rule, tuple(token_type_ids.shape))
            x = x + self.types(pack(token_type_ids.expand(plan.batch, plan.padded_len), plan))
        elif self.types is not None:
            x = x + self.types.weight[0]
        x = x + self.positions(self._positions(input_ids, plan, position_ids))
        return self.dropout(self.norm(x))

    def _positions(self, input_ids, plan, position_ids):
        if position_ids is not None:
            return pack(position_ids.expand(plan.batch, plan.padded_len), plan)
        if self.padding_idx is None:
            return plan.position_ids
        if input_ids is None:
            return plan.position_ids + self.padding_idx + 1
        real = input_ids != self.padding_idx
        return pack(real.cumsum(1) * real + self.padding_idx, plan)


class FusedProjection(nn.Module):
    """Several Linear layers of one input as one matmul: x (T, d) -> (T, sum of the widths).

    The layers keep their Parameter objects; only the memory behind them moves, end to end into one storage, so that
    inference reads them as one matrix without a copy. Where that no longer holds (after .to(device), say), and where a
    gradient is needed, the matrix is concatenated for the call. A layer that is no plain Linear any more (adapters,
    quantization) is called as a module of its own.
    """

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if self._plain():
            for name in ("weight", "bias"):
                parts = [getattr(layer, name) for layer in layers]
                joined = torch.cat([part.detach() for part in parts]).split([part.shape[0] for part in parts])
                for part, rows in zip(parts, joined):
                    part.data = rows

    def forward(self, x):
        if not self._plain():
            return torch.cat([layer(x) for layer in self.layers], -1)
        weight, bias = (_joined([getattr(layer, name) for layer in self.layers]) for name in ("weight", "bias"))
        return linear(x, weight, bias)

    def _plain(self):
        return all(map(_plain, self.layers))


def _plain(layer):
    """False for what adapters and quantization put in the place of a Linear."""
    return type(layer) is nn.Linear


def _joined(parts):
    """The rows of `parts` as one tensor: a view where they lie end to end in one storage, else a copy."""
    if torch.compiler.is_compiling() or checks.needs_grad(*parts):
        return torch.cat(parts)
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != end or not part.is_contiguous():
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


# Class names of activation modules that bias_gelu computes, and its `approximate`.
FUSED_GELUS = {"GELUActivation": "none", "NewGELUActivation": "tanh", "GELUTanh": "tanh", "PytorchGELUTanh": "tanh"}


def _activated(up, activation, x):
    """activation(up(x)), the bias and the activation in one pass where it is a GELU."""
    approximate = FUSED_GELUS.get(type(activation).__name__)
    if approximate is None or not _plain(up):
        return activation(up(x))
    return bias_gelu(linear(x, up.weight), up.bias, approximate=approximate)


def _residual_norm(down, dropout, norm, x, residual):
    """norm(residual + dropout(down(x))), all but the product in one pass where no dropout stands between."""
    drops = dropout.training and getattr(dropout, "p", 0.0) > 0
    if drops or not _plain(down) or type(norm) is not nn.LayerNorm:
        return norm(residual + dropout(down(x)))
    projected = linear(x, down.weight)
    return bias_residual_layer_norm(projected, down.bias, residual, norm.weight, norm.bias, eps=norm.eps)


class PostNormLayer(nn.Module):
    """x1 = LN(x + drop(out(attention(x)))); LN(x1 + drop(down(activation(up(x1))))), on packed rows (T, d)."""

    def __init__(
        self, *, heads, projections, attention_dropout, out, out_dropout, attention_norm, up, activation, down,
        down_dropout, output_norm,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.qkv = heads, FusedProjection(*projections)
        self.attention_dropout, self.out, self.out_dropout = attention_dropout, out, out_dropout
        self.attention_norm, self.output_norm = attention_norm, output_norm
        self.up, self.activation, self.down, self.down_dropout = up, activation, down, down_dropout

    @classmethod
    def from_bert(cls, layer):
        attention, own = layer.attention.output, layer.attention.self
        return cls(
            heads=own.num_attention_heads, projections=(own.query, own.key, own.value), attention_dropout=own.dropout,
            out=attention.dense, out_dropout=attention.dropout, attention_norm=attention.LayerNorm,
            up=layer.intermediate.dense, activation=layer.intermediate.intermediate_act_fn, down=layer.output.dense,
            down_dropout=layer.output.dropout, output_norm=layer.output.LayerNorm,
        )  # fmt: skip

    @classmethod
    def from_distilbert(cls, block):
        attention, ffn = block.attention, block.ffn
        return cls(
            heads=attention.n_heads, projections=(attention.q_lin, attention.k_lin, attention.v_lin),
            attention_dropout=attention.dropout, out=attention.out_lin, out_dropout=nn.Identity(),
            attention_norm=block.sa_layer_norm, up=ffn.lin1, activation=ffn.activation, down=ffn.lin2,
            down_dropout=ffn.dropout, output_norm=block.output_layer_norm,
        )  # fmt: skip

    def forward(self, x, plan):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, D) each, views
        # The flag of the shared module: train() and eval() of the original model reach it, those of this one may not.
        dropout_p = self.attention_dropout.p if self.attention_dropout.training else 0.0
        attended = varlen_attention(
            q, k, v, plan.cu_seqlens, max_seqlen_q=plan.max_seqlen, max_seqlen_k=plan.max_seqlen, dropout_p=dropout_p,
            plan=plan,
        )  # fmt: skip
        x = _residual_norm(self.out, self.out_dropout, self.attention_norm, attended.flatten(1), x)
        return _residual_norm(
            self.down, self.down_dropout, self.output_norm, _activated(self.up, self.activation, x), x
        )


class PaddingFreeEncoder(nn.Module):
    """A BERT-like encoder on the real tokens alone.

    The embeddings, every matmul, LayerNorm and attention run on T packed rows instead of B * S; the batch is packed
    once and unpacked once. At real tokens the result is that of the original model, at padding it is 0. Any mask
    pattern is right: right and left padding, holes, empty rows.

    `pooler_output` pools the first real token of each sequence, and is 0 for a sequence without one. The original pools
    column 0, which is the same token unless a row is padded on the left; there it pools a padding position.

    Dropout follows the modules' training flags, that of the attention probabilities too.
    """

    def __init__(self, embeddings, layers, pooler=None):
        super().__init__()
        self.embeddings, self.layers, self.pooler = embeddings, nn.ModuleList(layers), pooler

    @classmethod
    def from_hf(cls, model):
        """Build from a transformers model (BERT, RoBERTa and its namesakes, DistilBERT) or a ...For... wrapper of one.

        The modules and Parameter objects are shared, not copied: training either model trains both, and the original's
        state dict stays what it was. The q, k and v parameters of a layer move into one storage (see FusedProjection).
        """
        base = getattr(model, "base_model", model)
        config = getattr(base, "config", None)
        family = getattr(config, "model_type", type(base).__name__)
        checks.require(family in FAMILIES, _NAME, f"supports {', '.join(FAMILIES)}", family, error=NotImplementedError)
        for option, supported in (
            ("is_decoder", False),
            ("add_cross_attention", False),
            ("position_embedding_type", "absolute"),
        ):
            value = getattr(config, option, supported)
            checks.require(
                value == supported,
                _NAME,
                f"config.{option} must be {supported!r}",
                repr(value),
                error=NotImplementedError,
            )
        return cls(*FAMILIES[family](base))

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
        states = [x]
        for layer in self.layers:
            x = layer(x, plan)
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


def _bert(model):
    layers = [PostNormLayer.from_bert(layer) for layer in model.encoder.layer]
    return PackedEmbeddings(model.embeddings), layers, model.pooler


def _roberta(model):
    layers = [PostNormLayer.from_bert(layer) for layer in model.encoder.layer]
    return PackedEmbeddings(model.embeddings, model.embeddings.padding_idx), layers, model.pooler


def _distilbert(model):
    layers = [PostNormLayer.from_distilbert(block) for block in model.transformer.layer]
    return PackedEmbeddings(model.embeddings), layers


# config.model_type -> the arguments of PaddingFreeEncoder from a base model
FAMILIES = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "distilbert": _distilbert,
}
