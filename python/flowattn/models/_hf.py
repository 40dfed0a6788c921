"""Hugging Face models as the arguments of PaddingFreeEncoder, one function an architecture; modules are shared."""

from torch import nn

from flowattn import checks
from flowattn.models._layers import FusedProjection, PackedEmbeddings, PostNormLayer, SelfAttention
from flowattn.models.deberta import (
    ConvolvedLayer,
    DisentangledAttention,
    InterleavedAttention,
    InterleavedProjection,
    RelativePositions,
)

_NAME = "PaddingFreeEncoder"


def convert(model):
    """{"embeddings", "layers", "pooler", "positions"} of a base model, or of the base of a ...For... wrapper."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    family = getattr(config, "model_type", type(base).__name__)
    rule = f"supports {', '.join(FAMILIES)}"
    checks.require(family in FAMILIES, _NAME, rule, family, error=NotImplementedError)
    for option, supported in _OPTIONS.items():
        _require(f"config.{option}", getattr(config, option, supported), supported)
    return FAMILIES[family](base)


# Config options that must have this value where the config has them at all.
_OPTIONS = {
    "is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute", "talking_head": False,
}  # fmt: skip


def _require(option, value, supported):
    rule = f"{option} must be {supported!r}"
    checks.require(value == supported, _NAME, rule, repr(value), error=NotImplementedError)


def _embeddings(embeddings, **others):
    return PackedEmbeddings(
        embeddings.word_embeddings, embeddings.LayerNorm, embeddings.dropout,
        types=getattr(embeddings, "token_type_embeddings", None), positions=embeddings.position_embeddings, **others,
    )  # fmt: skip


def _bert(model, padding_idx=None):
    return {
        "embeddings": _embeddings(model.embeddings, padding_idx=padding_idx),
        "layers": [_bert_layer(layer, _bert_attention(layer.attention.self)) for layer in model.encoder.layer],
        "pooler": model.pooler,
    }


def _roberta(model):
    return _bert(model, model.embeddings.padding_idx)


def _bert_attention(own):
    qkv = FusedProjection(own.query, own.key, own.value)
    return SelfAttention(own.num_attention_heads, qkv, own.dropout)


def _bert_layer(layer, attention):
    """DeBERTa has the same layer around its attention."""
    return PostNormLayer(
        attention=attention,
        out=layer.attention.output.dense,
        out_dropout=layer.attention.output.dropout,
        attention_norm=layer.attention.output.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
    )


def _distilbert(model):
    layers = [_distilbert_layer(block) for block in model.transformer.layer]
    return {"embeddings": _embeddings(model.embeddings), "layers": layers}


def _distilbert_layer(block):
    attention, ffn = block.attention, block.ffn
    qkv = FusedProjection(attention.q_lin, attention.k_lin, attention.v_lin)
    return PostNormLayer(
        attention=SelfAttention(attention.n_heads, qkv, attention.dropout),
        out=attention.out_lin,
        out_dropout=nn.Identity(),
        attention_norm=block.sa_layer_norm,
        up=ffn.lin1,
        activation=ffn.activation,
        down=ffn.lin2,
        down_dropout=ffn.dropout,
        output_norm=block.output_layer_norm,
    )


def _albert(model):
    """A few layers, each used several times in a row; embeddings narrower than the layers."""
    encoder, config = model.encoder, model.config
    groups = [[_albert_layer(layer) for layer in group.albert_layers] for group in encoder.albert_layer_groups]
    count = config.num_hidden_layers
    order = [int(i / (count / config.num_hidden_groups)) for i in range(count)]  # with the original's rounding
    pooler = None
    if model.pooler is not None:
        pooler = nn.Sequential(model.pooler, model.pooler_activation, nn.Flatten(1))
    return {
        "embeddings": _embeddings(model.embeddings, after=encoder.embedding_hidden_mapping_in),
        "layers": [layer for group in order for layer in groups[group]],
        "pooler": pooler,
    }


def _albert_layer(layer):
    attention = layer.attention
    qkv = FusedProjection(attention.query, attention.key, attention.value)
    return PostNormLayer(
        attention=SelfAttention(attention.num_attention_heads, qkv, attention.attention_dropout),
        out=attention.dense,
        out_dropout=attention.output_dropout,
        attention_norm=attention.LayerNorm,
        up=layer.ffn,
        activation=layer.activation,
        down=layer.ffn_output,
        down_dropout=nn.Identity(),
        output_norm=layer.full_layer_layer_norm,
    )


def _deberta(model):
    """v1: one interleaved projection, a row of the tables for each distance."""
    _require("z_steps", model.z_steps if model.z_steps > 1 else 0, 0)
    encoder = model.encoder
    layers = [_bert_layer(layer, _deberta_attention(layer.attention.self)) for layer in encoder.layer]
    positions = None
    if encoder.relative_attention:
        positions = RelativePositions(encoder.rel_embeddings, encoder.max_relative_positions)
    return {"embeddings": _deberta_embeddings(model.embeddings), "layers": layers, "positions": positions}


def _deberta_embeddings(embeddings):
    """Positions and token types are optional; narrow embeddings are widened before the LayerNorm."""
    return _embeddings(embeddings, before_norm=embeddings.embed_proj, ignore_types=True)


def _deberta_attention(own):
    options = {"terms": 1 + len(own.pos_att_type)}
    if own.relative_attention:
        options |= {
            "position_keys": own.pos_proj if "c2p" in own.pos_att_type else None,
            "position_queries": own.pos_q_proj if "p2c" in own.pos_att_type else None,
            "position_dropout": own.pos_dropout,
        }
    heads = own.num_attention_heads
    qkv = InterleavedProjection(heads, own.in_proj, own.q_bias, own.v_bias)
    return InterleavedAttention(heads, qkv, own.dropout, **options)


def _deberta_v2(model):
    """v2 and v3: three projections, which the tables may share, logarithmic rows, a normalised position embedding."""
    _require("z_steps", model.z_steps if model.z_steps > 1 else 0, 0)
    encoder, positions = model.encoder, None
    layers = [_bert_layer(layer, _deberta_v2_attention(layer.attention.self)) for layer in encoder.layer]
    if encoder.conv is not None:
        layers[0] = _deberta_v2_convolved(layers[0], encoder.conv)
    if encoder.relative_attention:
        logarithmic = encoder.position_buckets > 0
        positions = RelativePositions(
            encoder.rel_embeddings,
            span=encoder.position_buckets if logarithmic else encoder.max_relative_positions,
            max_distance=encoder.max_relative_positions if logarithmic else None,
            norm=encoder.LayerNorm if "layer_norm" in encoder.norm_rel_ebd else None,
        )
    return {"embeddings": _deberta_embeddings(model.embeddings), "layers": layers, "positions": positions}


def _deberta_v2_attention(own):
    content, position = "c2p" in own.pos_att_type, "p2c" in own.pos_att_type
    options = {"terms": 1 + content + position}
    if own.relative_attention:
        names = ("key_proj", "query_proj") if own.share_att_key else ("pos_key_proj", "pos_query_proj")
        options |= {
            "position_keys": getattr(own, names[0]) if content else None,
            "position_queries": getattr(own, names[1]) if position else None,
            "position_dropout": own.pos_dropout,
        }
    qkv = FusedProjection(own.query_proj, own.key_proj, own.value_proj)
    return DisentangledAttention(own.num_attention_heads, qkv, own.dropout, **options)


def _deberta_v2_convolved(layer, convolution):
    from transformers.activations import ACT2FN  # installed, or there would be no such model

    conv, odd = convolution.conv, "an odd number"
    _require("config.conv_kernel_size", odd if conv.kernel_size[0] % 2 else conv.kernel_size[0], odd)
    activation = ACT2FN[convolution.conv_act]
    return ConvolvedLayer(layer, conv, convolution.LayerNorm, convolution.dropout, activation)


# config.model_type -> the function that converts its base model
FAMILIES = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "albert": _albert,
    "deberta": _deberta,
    "deberta-v2": _deberta_v2,
}
