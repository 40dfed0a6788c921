"""PaddingFreeEncoder against the transformers models it is built from."""

import copy

import pytest
import torch

import flowattn as fa
from flowattn.models import _layers, bert
from flowattn.models._layers import FusedProjection
from flowattn.models.bert import PaddingFreeEncoder
from flowattn.reference.dropout import keep_mask

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # float32, two layers of width 32
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 24, "pad_token_id": 1}  # fmt: skip
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**TINY, intermediate_size=48),
    "bert-tanh": lambda: transformers.BertConfig(**TINY, intermediate_size=48, hidden_act="gelu_new"),
    "roberta": lambda: transformers.RobertaConfig(**TINY, intermediate_size=48, type_vocab_size=2),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**TINY, intermediate_size=48, type_vocab_size=2),
    "camembert": lambda: transformers.CamembertConfig(**TINY, intermediate_size=48, type_vocab_size=2),
    "albert": lambda: transformers.AlbertConfig(
        **TINY, intermediate_size=48, embedding_size=16, attention_probs_dropout_prob=0.1
    ),
    "albert-groups": lambda: transformers.AlbertConfig(
        **TINY | {"num_hidden_layers": 5},
        intermediate_size=48,
        embedding_size=16,
        num_hidden_groups=2,
        inner_group_num=2,
    ),
    "distilbert": lambda: transformers.DistilBertConfig(**TINY, hidden_dim=48),
}
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0]],
    "empty-row": [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0]],
}


def build(name, implementation="sdpa", configs=CONFIGS):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(configs[name](), attn_implementation=implementation).eval()
    with torch.no_grad():  # the initial biases are 0 and the initial weights small: neither would show in the output
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(mask, batch=3, length=7):
    ids = torch.randint(2, 60, (batch, length))
    if mask is not None:
        mask = torch.tensor(mask)
        ids = ids.where(mask != 0, 1)
    return ids, mask, torch.ones(batch, length, dtype=torch.bool) if mask is None else mask != 0


def same(ours, theirs, real):
    assert torch.equal(ours[~real], torch.zeros_like(ours[~real]))
    torch.testing.assert_close(ours[real], theirs[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name, mask):
    model = build(name)
    ids, mask, real = inputs(MASKS[mask])
    extras = {} if name == "distilbert" else {"token_type_ids": torch.randint(0, 2, ids.shape)}
    encoder = PaddingFreeEncoder.from_hf(model)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, **extras)
        ours = encoder(ids, mask, **extras)
    same(ours.last_hidden_state, theirs.last_hidden_state, real)
    if name == "distilbert":
        assert ours.pooler_output is None
        return
    first = real[:, 0]  # elsewhere transformers pools a padding position
    torch.testing.assert_close(ours.pooler_output[first], theirs.pooler_output[first], atol=TOLERANCE, rtol=0)
    tokens = ours.last_hidden_state[torch.arange(3), real.int().argmax(1)]  # the first real token of each row
    expected = encoder.pooler(tokens[:, None]).where(real.any(1)[:, None], 0.0)
    torch.testing.assert_close(ours.pooler_output, expected, atol=TOLERANCE, rtol=0)


def test_roberta_positions_follow_the_ids():
    """A padding id that the mask keeps and a real id that it drops: positions count ids, attention follows the mask."""
    model = build("roberta")
    ids = torch.tensor([[5, 1, 6, 7, 8], [1, 5, 6, 1, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]])
    with torch.no_grad():
        same(PaddingFreeEncoder.from_hf(model)(ids, mask)[0], model(ids, attention_mask=mask)[0], mask != 0)


@pytest.mark.parametrize("name", ("bert", "roberta", "distilbert", "albert"))
def test_position_ids_and_inputs_embeds(name):
    model = build(name)
    ids, mask, real = inputs(MASKS["holes"])
    embeds = torch.randn(3, 7, model.get_input_embeddings().embedding_dim)
    positions = torch.randint(2, 20, (1, 7))
    encoder = PaddingFreeEncoder.from_hf(model)
    with torch.no_grad():
        for given in ({"input_ids": ids, "position_ids": positions}, {"inputs_embeds": embeds}):
            theirs = model(attention_mask=mask, **given)
            same(encoder(attention_mask=mask, **given).last_hidden_state, theirs.last_hidden_state, real)


@pytest.mark.parametrize("name", ("bert", "albert", "albert-groups"))
def test_hidden_states_of_every_layer(name):
    model = build(name)
    ids, mask, real = inputs(MASKS["left"])
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        ours = PaddingFreeEncoder.from_hf(model)(ids, mask, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 1 + len(PaddingFreeEncoder.from_hf(model).layers)
    for a, b in zip(ours, theirs):
        same(a, b, real)


@pytest.mark.parametrize("name", ("bert", "roberta", "distilbert", "albert", "albert-groups"))
def test_gradient_of_every_parameter(name):
    model = build(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    twin = copy.deepcopy(model)  # from_hf shares parameters, so the original runs as a copy
    ids, mask, real = inputs(MASKS["right"])
    weights = torch.randn(3, 7, 32)

    def backward(out):
        loss = (out.last_hidden_state * weights)[real].sum()
        (loss + out.pooler_output.square().sum() if name != "distilbert" else loss).backward()

    backward(twin(ids, attention_mask=mask))
    backward(PaddingFreeEncoder.from_hf(model)(ids, mask))
    reached = 0
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        if theirs.grad is None:
            assert ours.grad is None, key
            continue
        reached += 1
        scale = theirs.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            ours.grad / scale, theirs.grad / scale, atol=TOLERANCE, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert reached == len(list(model.parameters()))


@pytest.mark.parametrize("mask", ("right", "holes", "empty-row"))
def test_capacity_mode_is_bitwise_the_exact_mode(mask):
    model = build("bert")
    ids, mask, _ = inputs(MASKS[mask])
    encoder = PaddingFreeEncoder.from_hf(model)
    with torch.no_grad():
        exact = encoder(ids, mask)
        for capacity in (int(mask.sum()), int(mask.sum()) + 3, ids.numel()):
            bounded = encoder(ids, mask, capacity=capacity)
            assert torch.equal(bounded.last_hidden_state, exact.last_hidden_state)
            assert torch.equal(bounded.pooler_output, exact.pooler_output)


def test_capacity_mode_gradients():
    model = build("bert")
    encoder = PaddingFreeEncoder.from_hf(model)
    ids, mask, _ = inputs(MASKS["right"])
    grads = []
    for capacity in (None, 21):
        out = encoder(ids, mask, capacity=capacity)
        loss = out.last_hidden_state.square().sum() + out.pooler_output.sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for exact, bounded in zip(*grads):
        torch.testing.assert_close(bounded, exact, atol=TOLERANCE, rtol=1e-5)


def test_all_rows_empty():
    encoder = PaddingFreeEncoder.from_hf(build("bert"))
    for capacity in (None, 6):
        out = encoder(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), capacity=capacity)
        assert torch.equal(out.last_hidden_state, torch.zeros(2, 3, 32))
        assert torch.equal(out.pooler_output, torch.zeros(2, 32))


def test_packs_and_unpacks_once(monkeypatch):
    calls = {"pack_plan": 0, "pack": 0, "unpack": 0}

    def counted(name, call):
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        return wrapper

    for module, name in ((bert, "pack_plan"), (_layers, "pack"), (bert, "unpack")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    ids, mask, _ = inputs(MASKS["right"])
    with torch.no_grad():
        PaddingFreeEncoder.from_hf(build("bert"))(ids, mask)
    assert calls == {"pack_plan": 1, "pack": 1, "unpack": 1}  # what is packed are the ids, not an activation


def test_forward_packed_is_forward_before_unpacking():
    encoder = PaddingFreeEncoder.from_hf(build("roberta"))
    ids, mask, real = inputs(MASKS["holes"])
    types = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        packed = encoder.forward_packed(ids, fa.pack_plan(mask), types)
        assert torch.equal(packed, encoder(ids, mask, types).last_hidden_state[real])


def test_parameters_are_shared_and_keys_unchanged():
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    encoder = PaddingFreeEncoder.from_hf(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}


def test_projection_follows_its_layers():
    """The fused matrix is that of the layers whatever is done to them: in-place updates, new storage, other modules."""
    layers = [torch.nn.Linear(8, width) for width in (4, 4, 6)]
    fused = FusedProjection(*layers)
    x = torch.randn(5, 8)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in fused.layers], -1))

    check()
    weights = _layers.joined([layer.weight for layer in layers])  # with gradients: a copy
    assert weights.data_ptr() != layers[0].weight.data_ptr()
    with torch.no_grad():
        assert _layers.joined([layer.weight for layer in layers]).data_ptr() == layers[0].weight.data_ptr()
        layers[1].weight.add_(1.0)
    check()
    layers[0].weight.data = torch.randn(4, 8)
    check()
    fused.layers[2] = torch.nn.Sequential(layers[2], torch.nn.Tanh())
    check()


def philox_dropout(probabilities, p=0.5, training=True, inplace=False):
    """torch.nn.functional.dropout for (B, H, L, L) probabilities, with the mask that varlen_attention would draw."""
    if p == 0 or not training:
        return probabilities
    rng, (batch, heads, lq, lk) = torch.randint(2**63 - 1, (2,)), probabilities.shape
    keep = torch.stack([keep_mask(rng, p, b, heads, lq, lk) for b in range(batch)])
    return probabilities * keep / (1 - p)


@pytest.mark.parametrize("name", ("bert", "roberta", "distilbert", "albert"))
def test_attention_dropout_in_training(name, monkeypatch):
    """Outputs and gradients are those of transformers' eager attention under the same dropout mask."""
    config = CONFIGS[name]()
    for option in ("hidden_dropout_prob", "dropout"):
        if hasattr(config, option):
            setattr(config, option, 0.0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").train()
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout)), "no dropout to test"
    twin, results = copy.deepcopy(model), []
    ids, mask, real = inputs(MASKS["right"])  # only padding on the right leaves every token its column
    weights = torch.randn(3, 7, 32)
    monkeypatch.setattr(torch.nn.functional, "dropout", philox_dropout)
    for run in (PaddingFreeEncoder.from_hf(model), lambda ids, mask: twin(ids, attention_mask=mask)):
        torch.manual_seed(3)
        out = run(ids, mask).last_hidden_state
        used = model if not results else twin
        layers = getattr(used, "encoder", getattr(used, "transformer", None))
        results.append((out, *torch.autograd.grad((out * weights)[real].sum(), list(layers.parameters()))))
    same(results[0][0], results[1][0], real)
    for ours, theirs in zip(*(result[1:] for result in results)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.equal(PaddingFreeEncoder.from_hf(model.eval())(ids, mask).last_hidden_state, results[0][0])


def test_wrapper_and_errors():
    wrapper = transformers.BertForSequenceClassification(CONFIGS["bert"]()).eval()
    assert PaddingFreeEncoder.from_hf(wrapper).embeddings.words is wrapper.bert.embeddings.word_embeddings
    encoder = PaddingFreeEncoder.from_hf(wrapper)
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 3\); got \(2, 4\)"):
        encoder(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds; got both"):
        encoder(ids, inputs_embeds=torch.ones(2, 3, 32))
    with pytest.raises(ValueError, match="without token types"):
        PaddingFreeEncoder.from_hf(build("distilbert"))(ids, token_type_ids=ids)
    with pytest.raises(NotImplementedError, match="supports bert, roberta, .*distilbert; got 'gpt2'|; got gpt2"):
        PaddingFreeEncoder.from_hf(
            transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
        )
    decoder = transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=48, is_decoder=True))
    with pytest.raises(NotImplementedError, match="config.is_decoder must be False; got True"):
        PaddingFreeEncoder.from_hf(decoder)


def test_compiles_in_one_graph(native):
    encoder = PaddingFreeEncoder.from_hf(build("bert"))
    ids, mask, _ = inputs(MASKS["right"])
    compiled = torch.compile(lambda ids, mask: encoder(ids, mask, capacity=21), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask)[0], encoder(ids, mask)[0], atol=TOLERANCE, rtol=0)
    loss = compiled(ids, mask)[0].square().sum()
    expected = torch.autograd.grad(encoder(ids, mask)[0].square().sum(), list(encoder.layers.parameters()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(encoder.layers.parameters())), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_cuda_graph_replays_another_mask():
    encoder = PaddingFreeEncoder.from_hf(build("bert").cuda())
    ids, mask, _ = inputs(MASKS["right"])
    ids, mask = ids.cuda(), mask.cuda()
    with torch.no_grad():
        encoder(ids, mask, capacity=21)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = encoder(ids, mask, capacity=21).last_hidden_state
        mask.copy_(torch.tensor(MASKS["holes"]))
        graph.replay()
        torch.testing.assert_close(out, encoder(ids, mask).last_hidden_state, atol=1e-3, rtol=0)


def test_capture_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="capture: needs an encoder on a GPU; got cpu .call the"):
        PaddingFreeEncoder.from_hf(build("bert").cpu()).capture(2, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("bert", "roberta", "distilbert", "albert"))
def test_captured_forward_is_the_eager_one(name):
    """Replayed for batches of other sizes, lengths and masks, a smaller one after a larger one too."""
    encoder = PaddingFreeEncoder.from_hf(build(name).cuda())
    captured = encoder.capture(3, 7, capacity=16)
    has_types = encoder.embeddings.types is not None
    for mask, batch, length in (("holes", 3, 7), ("empty-row", 3, 7), ("left", 3, 7), ("right", 2, 4)):
        ids, mask, _ = inputs([row[:length] for row in MASKS[mask][:batch]], batch, length)
        types = torch.randint(0, 2, ids.shape) if has_types and mask[0, 0] else None
        given = [None if x is None else x.cuda() for x in (ids, mask, types)]
        with torch.no_grad():
            ours, eager = captured(*given), encoder(*given)
        torch.testing.assert_close(ours.last_hidden_state, eager.last_hidden_state, atol=1e-3, rtol=0)
        if eager.pooler_output is not None:
            torch.testing.assert_close(ours.pooler_output, eager.pooler_output, atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_captured_forward_refuses_what_does_not_fit():
    model = build("bert").cuda()
    encoder = PaddingFreeEncoder.from_hf(model)
    captured = encoder.capture(2, 4, capacity=6)
    ones = torch.ones(2, 4, dtype=torch.long, device="cuda")
    with pytest.raises(ValueError, match=r"input_ids must have at most the shape \(2, 4\); got \(3, 4\)"):
        captured(ones[:1].expand(3, 4))
    with pytest.raises(ValueError, match="the batch may have at most 6 tokens; got 8 .capture again"):
        captured(ones)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        captured(ones, ones[:1])
    with pytest.raises(ValueError, match="capacity must lie in 1..8"):
        encoder.capture(2, 4, capacity=9)
    model.train()
    with pytest.raises(ValueError, match="dropout must be off"):
        encoder.capture(2, 4)
