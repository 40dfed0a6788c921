"""Hugging Face transformers: `attn_implementation="flowattn"` for any model, `padding_free(model)` for encoders.

Importing this module registers both functions that transformers asks for under the name "flowattn".
"""

import inspect

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from flowattn import checks
from flowattn.models.bert import PaddingFreeEncoder
from flowattn.ops.packing import pack, pack_plan, unpack
from flowattn.ops.varlen_attention import varlen_attention

_OP = "flowattn attention"
_OTHERS = 'use attn_implementation="sdpa" or "eager" instead'
_UNDO = "del model.base_model.forward restores the original"

# What a base model returns, by model_type; the others a BaseModelOutputWithPoolingAndCrossAttentions.
_OUTPUTS = {
    "albert": BaseModelOutputWithPooling,
    "deberta": BaseModelOutput,
    "deberta-v2": BaseModelOutput,
    "distilbert": BaseModelOutput,
}

# Mask or position ids -> what was derived from it, so that one forward pass plans once and not in every layer.
_plans = WeakTensorKeyDictionary()

# The mask patterns that padding, causality, a window and document boundaries express: transformers builds its mask
# functions from these, and the attention function learns of them through its other arguments.
_PATTERNS = {
    "and_masks", "bidirectional_mask_function", "causal_mask_function", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence", "sliding_window_bidirectional_overlay", "sliding_window_overlay",
}  # fmt: skip


def register(name="flowattn"):
    """Make `attn_implementation=name` available to every transformers model that uses the attention interface."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    position_ids=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """Attention for transformers' AttentionInterface: query (B, H, Lq, D), key and value (B, Hkv, Lk, D).

    Returns (out (B, Lq, H, Dv), None). Padding takes part in nothing: keys are packed by the 2-D mask, and so are the
    queries under a causal mask or a window, where positions count real tokens only (with holes in a mask a window thus
    reaches over them, as in flash attention). A plain bidirectional call leaves the queries alone, so that one mask
    serves self- and cross-attention.
    Lq < Lk (a KV cache) aligns the last query with the last key. Without a mask, cu_seq_lens_* and max_length_* (all
    four), or else restarting position_ids, isolate the documents of a packed batch.
    No host sync under a mask; restarting position_ids cost one for each position tensor outside torch.compile.
    """
    for option in ("position_bias", "s_aux", "cache"):
        _supported(kwargs.get(option) is None, f"{option} is not supported", "a value", _OTHERS)
    _supported(not kwargs.get("output_attentions"), "output_attentions is not supported", True, 'use "eager" instead')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    width = -1 if sliding_window is None else sliding_window - 1  # the window counts the query itself
    options = {"scale": scaling, "causal": causal, "window": (width, width), "softcap": softcap or 0.0}
    options |= {"dropout_p": dropout, "deterministic": bool(kwargs.get("deterministic"))}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, heads, width), views
    batch, lq, lk = q.shape[0], q.shape[1], k.shape[1]

    if attention_mask is not None:
        return _masked(q, k, v, attention_mask, causal or width >= 0, options), None

    plan = None
    if all(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        # A length on the device stays there: the padded length is a valid hint too.
        max_q, max_k = (x if isinstance(x, int) else y for x, y in ((max_length_q, lq), (max_length_k, lk)))
        cu_q, cu_k = cu_seq_lens_q, cu_seq_lens_k
    elif (plan := _documents(position_ids, batch, lq, lk, causal)) is not None:
        cu_q, cu_k, max_q, max_k = plan.cu_seqlens, None, lq, lk
    else:
        cu_q, max_q, max_k = _even(batch, lq, q.device), lq, lk
        cu_k = None if lq == lk else _even(batch, lk, q.device)
    out = varlen_attention(_rows(q), _rows(k), _rows(v), cu_q, cu_k, max_q, max_k, plan=plan, **options)
    return out.unflatten(0, (batch, lq)), None


def attention_mask(
    batch_size,
    q_length=None,
    kv_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    cache_position=None,
    use_vmap=False,
    device=None,
    **kwargs,
):
    """Mask builder for transformers' AttentionMaskInterface: the 2-D mask of the keys (B, kv_length), or None.

    None means that there is no mask. A mask is returned whether or not it masks anything, for asking would cost a host
    sync. Where the keys are a preallocated cache that reaches beyond the last query, the mask of the queries stands in
    front: (B, q_length + kv_length).
    cache_position: positions of the queries, instead of q_length and q_offset (the first 5.x releases).
    """
    if not torch.compiler.is_compiling():
        unknown = sorted(set(_patterns(mask_function)) - _PATTERNS)
        rule = "masks may combine padding, causality, a window and documents"
        _supported(not unknown, rule, ", ".join(unknown), _OTHERS)
    _supported(not use_vmap, "custom mask functions are not supported", "one", _OTHERS)
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    bidirectional = mask_function is bidirectional_mask_function
    reaches_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    plain = bidirectional or reaches_end or q_length == kv_length
    columns = None  # of the mask, one for each key
    if attention_mask is not None:
        # generate() builds the masks of a static cache ahead, and the model then passes them through here again.
        if not plain and attention_mask.shape[1] == q_length + kv_length:
            return attention_mask
        start = 0 if attention_mask.shape[1] == kv_length else kv_offset
        missing = start + kv_length - attention_mask.shape[1]
        attention_mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)))
        columns = attention_mask[:, start : start + kv_length]
    if plain:
        return None if columns is None else _planned(columns)

    device = device if columns is None else columns.device
    keys = torch.arange(kv_length, device=device) + kv_offset < q_offset + q_length
    keys = keys.expand(batch_size, kv_length) if columns is None else keys & columns
    if q_length == 1:
        return _planned(keys)
    queries = keys.new_ones(batch_size, q_length)
    if columns is not None:
        queries = columns.index_select(1, torch.arange(q_length, device=device) + (q_offset - kv_offset))
    return _planned(torch.cat([queries, keys], 1))


def _supported(condition, rule, value, hint):
    checks.require(condition, _OP, rule, value, hint, NotImplementedError)


def _patterns(mask_function):
    """Names of the functions that a composed mask function is built from."""
    yield mask_function.__qualname__.split(".")[0]
    for cell in mask_function.__closure__ or ():
        content = cell.cell_contents
        for part in content if isinstance(content, tuple) else (content,):
            if inspect.isfunction(part):
                yield from _patterns(part)


def _planned(mask):
    """Let plans be kept for this mask: nobody but the attention function sees it, so it never changes."""
    if not torch.compiler.is_compiling():
        _plans[mask] = {}
    return mask


def _masked(q, k, v, mask, aligned, options):
    """Attention under a 2-D mask; `aligned`: the result depends on the positions of the queries among the keys."""
    batch, lq, lk = q.shape[0], q.shape[1], k.shape[1]
    _supported(mask.dim() == 2, "a prepared mask must be 2-D, non-zero = keep", tuple(mask.shape), _OTHERS)
    checks.require(mask.shape[1] in (lk, lq + lk), _OP, f"the mask must cover {lk} keys", mask.shape[1])
    aligned = aligned and lq > 1  # a single query is real and the last one
    kept = None if torch.compiler.is_compiling() else _plans.get(mask)  # compiled, equal plans are one by CSE
    plans = kept.get((lq, lk, aligned)) if kept else None
    if plans is None:
        plans = _plan(mask, lq, lk, aligned)
        if kept is not None:
            kept[lq, lk, aligned] = plans
    queries, keys = plans
    k, v = pack(k, keys), pack(v, keys)
    if not aligned:
        out = varlen_attention(_rows(q), k, v, _even(batch, lq, q.device), keys.cu_seqlens, lq, lk, **options)
        return out.unflatten(0, (batch, lq))
    cu_k = None if queries is keys else keys.cu_seqlens
    return unpack(
        varlen_attention(pack(q, queries), k, v, queries.cu_seqlens, cu_k, lq, lk, plan=queries, **options), queries
    )


def _plan(mask, lq, lk, aligned):
    """(plan of the queries or None, plan of the keys), in capacity mode: no host sync."""
    key_mask = mask[:, -lk:] if lk else mask[:, :0]
    keys = pack_plan(key_mask, capacity=key_mask.numel())
    if not aligned:
        return None, keys
    if mask.shape[1] == lk == lq:
        return keys, keys
    query_mask = mask[:, :lq] if mask.shape[1] > lk else mask[:, -lq:]
    return pack_plan(query_mask, capacity=query_mask.numel()), keys


def _documents(position_ids, batch, lq, lk, causal):
    """The plan of the documents that restarting position_ids (1 or B, L) delimit, or None where nothing restarts.

    As in transformers' own masks a document starts wherever positions do not go on by one. A bidirectional batch is
    taken for packed only if it has one row: encoders number the columns of several rows as they like.
    """
    if position_ids is None or position_ids.dim() != 2 or lq != lk or position_ids.shape[1] != lq:
        return None
    if lq < 2 or not (causal or batch == 1):
        return None
    compiling, rows = torch.compiler.is_compiling(), batch * lq
    # Inference tensors count no writes, so that a kept plan might be stale.
    kept = None if compiling or position_ids.is_inference() else _plans.setdefault(position_ids, {})
    key = (batch, position_ids._version) if kept is not None else None
    if kept and key in kept:
        return kept[key]
    starts = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    starts = starts.expand(batch, lq).flatten()
    index = torch.arange(rows, device=starts.device)
    # Compiled, the number of documents is no shape: as many as rows, the surplus ones empty.
    first = torch.where(starts, index, rows).sort().values if compiling else index[starts]
    plan = None
    if first.shape[0] > batch:
        cu = torch.cat([first, first.new_full((1,), rows)])
        plan = pack_plan(cu_seqlens=cu, max_seqlen=lq, capacity=rows)
    if kept is not None:
        kept[key] = plan
    return plan


def _even(batch, length, device):
    """cu_seqlens of `batch` sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _rows(x):
    """(B, L, heads, width) -> (B * L, heads, width), a view where the strides allow it."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def padding_free(model):
    """Make a BERT, RoBERTa, DistilBERT, ALBERT or DeBERTa model, or a ...For... wrapper of one, run padding-free.

    Returns the model. Only the base model's forward is replaced: its modules, parameters and state-dict keys stay, and
    so do the outputs at real tokens. Padding positions are 0 and never computed; the pooler pools the first real token
    of each row (see models.bert.PaddingFreeEncoder). Deleting `model.base_model.forward` undoes it. One host sync a
    forward on a GPU.
    """
    base = getattr(model, "base_model", model)
    if not isinstance(getattr(base.forward, "__self__", None), _PaddingFreeForward):
        base.forward = _PaddingFreeForward(base).forward
    return model


class _PaddingFreeForward:
    """A base model's forward, through a PaddingFreeEncoder.

    An object with a bound method and not a closure, so that deepcopy and pickle take a model along with its encoder. It
    is no module, so that the encoder's references to the model's modules do not enter the state dict.
    """

    def __init__(self, base):
        self.encoder, self.config = PaddingFreeEncoder.from_hf(base), base.config

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        for option in ("output_attentions", "past_key_values", "encoder_hidden_states", "cu_seq_lens_q"):
            value = kwargs.get(option)
            _supported(
                value is None or value is False, f"{option} is not supported under padding_free", "a value", _UNDO
            )
        wanted = kwargs.get("output_hidden_states")
        out = self.encoder(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=self.config.output_hidden_states if wanted is None else wanted,
        )
        result = {"last_hidden_state": out.last_hidden_state, "hidden_states": out.hidden_states}
        kind = _OUTPUTS.get(self.config.model_type, BaseModelOutputWithPoolingAndCrossAttentions)
        if kind is not BaseModelOutput:
            result["pooler_output"] = out.pooler_output
        result = kind(**result)
        return_dict = kwargs.get("return_dict")
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


register()
