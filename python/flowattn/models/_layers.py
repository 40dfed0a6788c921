"""The parts of a padding-free encoder, on packed rows: embeddings, fused projections, attention, post-norm layer."""

import torch
from torch import nn
from torch.nn.functional import linear

from flowattn import checks
from flowattn.ops.encoder_fusions import bias_gelu, bias_residual_layer_norm
from flowattn.ops.packing import pack
from flowattn.ops.varlen_attention import varlen_attention


class PackedEmbeddings(nn.Module):
    """dropout(norm(word + token type + position)) at the packed rows, each part in its own module or None.

    before_norm, after: projections of models whose embeddings are narrower than their layers.
    ignore_types: a model without token types takes token_type_ids all the same, as DeBERTa does.
    padding_idx: None numbers positions by padded column (BERT, DistilBERT); an id numbers them as RoBERTa does, from
    padding_idx + 1 over the input ids that differ from it. As in RoBERTa the ids decide, not the attention mask.
    """

    def __init__(
        self, words, norm, dropout, *, types=None, positions=None, padding_idx=None, before_norm=None, after=None,
        ignore_types=False,
    ):  # fmt: skip
        super().__init__()
        self.words, self.types, self.positions = words, types, positions
        self.before_norm, self.norm, self.dropout, self.after = before_norm, norm, dropout, after
        self.padding_idx, self.ignore_types = padding_idx, ignore_types

    def checked_types(self, token_type_ids):
        """token_type_ids, or None where the model ignores them; ValueError where it has no use for them."""
        if token_type_ids is None or self.types is not None:
            return token_type_ids
        rule = "token_type_ids must be None for a model without token types"
        checks.require(self.ignore_types, "PaddingFreeEncoder", rule, tuple(token_type_ids.shape))
        return None

    def forward(self, plan, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        x = self.words(pack(input_ids, plan)) if inputs_embeds is None else pack(inputs_embeds, plan)
        token_type_ids = self.checked_types(token_type_ids)
        if token_type_ids is not None:
            x = x + self.types(pack(token_type_ids.expand(plan.batch, plan.padded_len), plan))
        elif self.types is not None:
            x = x + self.types.weight[0]
        if self.positions is not None:
            x = x + self.positions(self._positions(input_ids, plan, position_ids))
        x = x if self.before_norm is None else self.before_norm(x)
        x = self.dropout(self.norm(x))
        return x if self.after is None else self.after(x)

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
        weight, bias = (joined([getattr(layer, name) for layer in self.layers]) for name in ("weight", "bias"))
        return linear(x, weight, bias)

    def _plain(self):
        return all(map(plain, self.layers))


def plain(layer):
    """False for what adapters and quantization put in the place of a Linear."""
    return type(layer) is nn.Linear


def joined(parts):
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


def activated(up, activation, x):
    """activation(up(x)), the bias and the activation in one pass where it is a GELU."""
    approximate = FUSED_GELUS.get(type(activation).__name__)
    if approximate is None or not plain(up):
        return activation(up(x))
    return bias_gelu(linear(x, up.weight), up.bias, approximate=approximate)


def residual_norm(down, dropout, norm, x, residual):
    """norm(residual + dropout(down(x))), all but the product in one pass where no dropout stands between."""
    eps = norm_eps(norm)
    if dropout_p(dropout) > 0 or not plain(down) or eps is None:
        return norm(residual + dropout(down(x)))
    return bias_residual_layer_norm(linear(x, down.weight), down.bias, residual, norm.weight, norm.bias, eps=eps)


def norm_eps(norm):
    """The eps of a LayerNorm, None for any other module. DeBERTa v1 has a class of its own for the same formula."""
    if type(norm) is nn.LayerNorm:
        return norm.eps
    return norm.variance_epsilon if type(norm).__name__ == "DebertaLayerNorm" else None


def dropout_p(dropout):
    """The probability that a dropout module applies now.

    Its own flag decides: train() and eval() of the original model reach it, those of a module built on it may not.
    """
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0


class SelfAttention(nn.Module):
    """Multi-head attention within the sequences of a plan: packed rows (T, d) -> (T, heads * D).

    qkv: a module x -> (T, 3 * heads * D), all queries first, then keys, then values.
    """

    def __init__(self, heads, qkv, dropout):
        super().__init__()
        self.heads, self.qkv, self.dropout = heads, qkv, dropout

    def project(self, x):
        """q, k, v (T, H, D) each, views of one projection."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)

    def forward(self, x, plan, positions=None):
        return self.attend(*self.project(x), plan)

    def attend(self, q, k, v, plan, **options):
        longest = plan.max_seqlen
        out = varlen_attention(
            q, k, v, plan.cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=dropout_p(self.dropout),
            plan=plan, **options,
        )  # fmt: skip
        return out.flatten(1)


class PostNormLayer(nn.Module):
    """x1 = LN(x + drop(out(attention(x)))); LN(x1 + drop(down(activation(up(x1))))), on packed rows (T, d)."""

    def __init__(self, *, attention, out, out_dropout, attention_norm, up, activation, down, down_dropout, output_norm):
        super().__init__()
        self.attention, self.out, self.out_dropout = attention, out, out_dropout
        self.attention_norm, self.output_norm = attention_norm, output_norm
        self.up, self.activation, self.down, self.down_dropout = up, activation, down, down_dropout

    def forward(self, x, plan, positions=None):
        attended = self.attention(x, plan, positions)
        x = residual_norm(self.out, self.out_dropout, self.attention_norm, attended, x)
        return residual_norm(self.down, self.down_dropout, self.output_norm, activated(self.up, self.activation, x), x)
