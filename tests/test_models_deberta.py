"""PaddingFreeEncoder of DeBERTa v1, v2 and v3 against the transformers models it is built from."""

import copy

import pytest
import torch
from test_models_bert import MASKS, TINY, TOLERANCE, build, inputs, philox_dropout, same

import flowattn as fa
from flowattn.models import _layers
from flowattn.models.bert import PaddingFreeEncoder
from flowattn.ops.attention_scores import deberta_lut

transformers = pytest.importorskip("transformers")

BASE = TINY | {"intermediate_size": 48, "relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0,
               "position_biased_input": False}  # fmt: skip
V3 = BASE | {"position_buckets": 4, "max_relative_positions": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
CONV = {"conv_kernel_size": 3, "conv_act": "gelu"}


def v1(**options):
    return lambda: transformers.DebertaConfig(**BASE | options)


def v2(**options):
    return lambda: transformers.DebertaV2Config(**V3 | options)


CONFIGS = {
    "v1": v1(),
    "v1-c2p": v1(pos_att_type="c2p"),
    "v1-p2c": v1(pos_att_type="p2c"),
    "v1-short-span": v1(max_relative_positions=3),
    "v1-types-positions": v1(type_vocab_size=2, position_biased_input=True),
    "v1-narrow-embeddings": v1(embedding_size=16),
    "v1-no-relative-attention": v1(relative_attention=False, position_biased_input=True),
    "v1-no-terms": v1(pos_att_type=[]),
    "v3": v2(),
    "v2-own-projections": v2(share_att_key=False),
    "v2-c2p": v2(share_att_key=False, pos_att_type="c2p"),
    "v2-p2c": v2(pos_att_type="p2c"),
    "v2-no-buckets": v2(position_buckets=-1, max_relative_positions=-1, norm_rel_ebd="none"),
    "v2-types-positions": v2(type_vocab_size=2, position_biased_input=True),
    "v2-narrow-embeddings": v2(embedding_size=16),
    "v2-convolution": v2(**CONV),
    "v2-grouped-convolution": v2(conv_kernel_size=5, conv_groups=4, conv_act="tanh"),
    "v2-no-relative-attention": v2(relative_attention=False, pos_att_type=None, position_biased_input=True),
}
TRAINED = ("v1", "v1-types-positions", "v3", "v2-own-projections", "v2-convolution")


def make(name):
    return build(name, "eager", CONFIGS)


@pytest.mark.parametrize("mask", ("none", "right", "left"))
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name, mask):
    model = make(name)
    ids, mask, real = inputs(MASKS[mask])
    types = {"token_type_ids": torch.randint(0, 2, ids.shape)} if model.config.type_vocab_size else {}
    encoder = PaddingFreeEncoder.from_hf(model)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, output_hidden_states=True, **types)
        ours = encoder(ids, mask, output_hidden_states=True, **types)
    assert ours.pooler_output is None and len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip((ours[0], *ours.hidden_states), (theirs[0], *theirs.hidden_states)):
        same(a, b, real)


@pytest.mark.parametrize("name", ("v1-short-span", "v3", "v2-no-buckets"))
def test_long_sequences(name):
    """Several tiles of queries and keys, distances far beyond the table, one batch of very different lengths."""
    model = make(name)
    lengths = torch.tensor([300, 1, 70])
    ids, mask, real = inputs((torch.arange(300) < lengths[:, None]).int().tolist(), 3, 300)
    with torch.no_grad():
        same(PaddingFreeEncoder.from_hf(model)(ids, mask)[0], model(ids, attention_mask=mask)[0], real)


@pytest.mark.parametrize("name", ("v1", "v3", "v2-convolution"))
def test_holes_count_real_tokens(name):
    """Under a mask with holes the result is that of the same tokens without the columns between them."""
    model = make(name)
    ids, mask, real = inputs(MASKS["holes"])
    with torch.no_grad():
        ours = PaddingFreeEncoder.from_hf(model)(ids, mask)[0]
        for row in range(3):
            theirs = model(ids[row, real[row]][None])[0][0]
            torch.testing.assert_close(ours[row, real[row]], theirs, atol=TOLERANCE, rtol=0)


def test_token_types_without_token_types():
    """The tokenizer of DeBERTa returns them, and models without ignore them."""
    model = make("v3")
    ids, mask, real = inputs(MASKS["right"])
    types = torch.ones_like(ids)
    with torch.no_grad():
        same(PaddingFreeEncoder.from_hf(model)(ids, mask, types)[0], model(ids, mask, types)[0], real)


def gradients(model, run, ids, mask, real, weights):
    out = run(ids, mask)[0]
    (out * weights)[real].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", ("right", "left"))
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_of_every_parameter(name, mask):
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)  # from_hf shares parameters, so the original runs as a copy
    ids, mask, real = inputs(MASKS[mask])
    weights = torch.randn(3, 7, 32)
    theirs = gradients(twin, lambda ids, mask: twin(ids, attention_mask=mask), ids, mask, real, weights)
    ours = gradients(model, PaddingFreeEncoder.from_hf(model), ids, mask, real, weights)
    for key, want in theirs.items():
        scale = want.abs().max().clamp(min=1)
        torch.testing.assert_close(ours[key] / scale, want / scale, atol=TOLERANCE, rtol=0, msg=lambda m, k=key: k + m)
        assert want.any(), key


@pytest.mark.parametrize("name", ("v1", "v3"))
def test_attention_dropout_in_training(name, monkeypatch):
    """Outputs and gradients are those of transformers under the same dropout mask."""
    config = CONFIGS[name]()
    config.hidden_dropout_prob = 0.0
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").train()
    twin, results = copy.deepcopy(model), []
    ids, mask, real = inputs(MASKS["right"])
    weights = torch.randn(3, 7, 32)
    monkeypatch.setattr(torch.nn.functional, "dropout", philox_dropout)
    runs = (model, PaddingFreeEncoder.from_hf(model)), (twin, lambda ids, mask: twin(ids, attention_mask=mask))
    for used, run in runs:
        torch.manual_seed(3)
        out = run(ids, mask)[0]
        results.append((out, *torch.autograd.grad((out * weights)[real].sum(), list(used.encoder.parameters()))))
    same(results[0][0], results[1][0], real)
    for ours, theirs in zip(*(result[1:] for result in results)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ("v1", "v3"))
def test_attention_in_triton(name, device, monkeypatch):
    """Output and gradients through the GPU's attention kernels, on a CPU in the interpreter."""
    if name == "v1" and device == "cpu":
        pytest.skip("slow in the interpreter, which v3 goes through")

    def in_triton(*args, **options):
        with fa.use_backend("triton"):
            return fa.varlen_attention(*args, **options)

    monkeypatch.setattr(_layers, "varlen_attention", in_triton)
    model = make(name).to(device)
    ids, mask, real = (x.to(device) for x in inputs(MASKS["right"]))
    ours, theirs = PaddingFreeEncoder.from_hf(model)(ids, mask)[0], model(ids, attention_mask=mask)[0]
    atol = TOLERANCE if device == "cpu" else 1e-3  # torch's own products may be in tf32
    torch.testing.assert_close(ours[real], theirs[real], atol=atol, rtol=0)
    weights, parameters = torch.randn_like(ours), list(model.encoder.parameters())
    pairs = [torch.autograd.grad((out * weights)[real].sum(), parameters) for out in (ours, theirs)]
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b, atol=10 * atol, rtol=10 * atol)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("v1", "v3"))
def test_captured_forward_is_the_eager_one(name):
    encoder = PaddingFreeEncoder.from_hf(make(name).cuda())
    captured = encoder.capture(3, 7, capacity=16)
    for mask in ("right", "left"):
        ids, mask, _ = (x.cuda() for x in inputs(MASKS[mask]))
        with torch.no_grad():
            ours, eager = captured(ids, mask), encoder(ids, mask)
        torch.testing.assert_close(ours.last_hidden_state, eager.last_hidden_state, atol=1e-3, rtol=0)


@pytest.mark.parametrize("buckets, most", [(4, 8), (256, 512), (32, 40), (2, 9)])
def test_log_buckets(buckets, most):
    """Bit for bit the rounding of transformers, also far beyond max_relative_positions."""
    rule = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2").make_log_bucket_position
    lut, reach = deberta_lut(buckets, most), 2 * most
    distance = torch.arange(-3 * reach, 3 * reach + 1)  # i - j, while the lut counts j - i
    want = (rule(distance, buckets, most).long() + buckets).clamp(0, 2 * buckets - 1)
    assert torch.equal(lut[(-distance).clamp(-reach, reach) + reach].long(), want)


@pytest.mark.parametrize("name", ("v1", "v3", "v2-convolution"))
def test_capacity_mode_is_the_exact_mode(name):
    encoder = PaddingFreeEncoder.from_hf(make(name))
    ids, mask, _ = inputs(MASKS["right"])
    with torch.no_grad():
        exact = encoder(ids, mask)[0]
        for capacity in (int(mask.sum()), ids.numel()):
            assert torch.equal(encoder(ids, mask, capacity=capacity)[0], exact)


def test_compiles_in_one_graph(native):
    encoder = PaddingFreeEncoder.from_hf(make("v2-convolution"))
    ids, mask, _ = inputs(MASKS["right"])
    compiled = torch.compile(lambda ids, mask: encoder(ids, mask, capacity=21), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask)[0], encoder(ids, mask)[0], atol=TOLERANCE, rtol=0)
    parameters = list(encoder.parameters())
    results = [torch.autograd.grad(run(ids, mask)[0].square().sum(), parameters) for run in (compiled, encoder)]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_positions_follow_a_model_that_moves():
    """from_hf shares the embedding; the lut, which the original does not have, goes where that is."""
    positions = PaddingFreeEncoder.from_hf(make("v3")).positions
    positions.embedding = positions.embedding.to("meta")
    positions.norm = positions.norm.to("meta")
    assert [x.device.type for x in positions()] == ["meta", "meta"]


def test_empty_batches():
    encoder = PaddingFreeEncoder.from_hf(make("v2-convolution"))
    for capacity in (None, 6):
        out = encoder(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3), capacity=capacity)
        assert torch.equal(out.last_hidden_state, torch.zeros(2, 3, 32))
        out.last_hidden_state.sum().backward()


def test_unsupported_options():
    cases = (
        (v1(talking_head=True), "config.talking_head must be False; got True"),
        (v2(conv_kernel_size=4), "config.conv_kernel_size must be 'an odd number'; got 4"),
    )
    for config, message in cases:
        with pytest.raises(NotImplementedError, match=message):
            PaddingFreeEncoder.from_hf(transformers.AutoModel.from_config(config()))
    model = make("v1")
    model.z_steps = 2
    with pytest.raises(NotImplementedError, match="z_steps must be 0; got 2"):
        PaddingFreeEncoder.from_hf(model)


def test_padding_free_replaces_the_forward():
    padding_free = pytest.importorskip("flowattn.integrations.transformers").padding_free
    model = make("v3")
    ids, mask, real = inputs(MASKS["right"])
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask)
        ours = padding_free(model)(ids, attention_mask=mask)
    assert type(ours) is type(theirs)
    same(ours.last_hidden_state, theirs.last_hidden_state, real)


@pytest.mark.parametrize("name, wrapper", [("v1", "DebertaForMaskedLM"), ("v3", "DebertaV2ForTokenClassification")])
def test_padding_free_wrapper(name, wrapper):
    padding_free = pytest.importorskip("flowattn.integrations.transformers").padding_free
    model = getattr(transformers, wrapper)(CONFIGS[name]()).eval()
    ids, mask, real = inputs(MASKS["right"])
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask).logits
        ours = padding_free(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[real], theirs[real], atol=TOLERANCE, rtol=0)
