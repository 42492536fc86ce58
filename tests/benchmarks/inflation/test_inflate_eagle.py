from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from benchmarks.inflation.inflate import EXTRA_LOGIT, bytes_read, inflate_llama
from benchmarks.inflation.inflate_eagle import inflate_eagle
from benchmarks.inflation.shapes import InflatedShape
from speclm.errors import OptionError, UnsupportedModelError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.model import SpecModel
from speclm.target import TargetView
from tests.models import build_model, prompts

# Sums over more, scaled terms round otherwise; relative to the largest logit.
TOLERANCE = 1e-6
BASE_TOLERANCE = 1e-5
NUM_LAYERS, HIDDEN, DRAFTED = 7, 40, 40
SHAPE = InflatedShape(
    hidden_size=96,
    intermediate_size=112,
    num_layers=10,
    num_heads=12,
    num_kv_heads=4,
    head_dim=20,
    vocab_size=240,
    is_tied=False,
)
HEADS = {
    "eagle": {"kind": "eagle"},
    "eagle with biases": {"kind": "eagle", "fc_bias": True, "attention_bias": True},
    "eagle3": {"kind": "eagle3"},
    "eagle3, all tokens": {"kind": "eagle3", "draft_vocab_size": 160},
    "eagle3.1": {"kind": "eagle3", "fc_norm": True, "norm_output": True, "num_layers": 2},
    "normed together": {
        "kind": "eagle3",
        "norm_before_fc": True,
        "norm_before_residual": True,
        "attention_output_bias": True,
        "has_own_embeddings": True,
    },
    "smaller": {"kind": "eagle3", "intermediate_size": 24, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def base():
    return build_model("llama", num_hidden_layers=NUM_LAYERS, head_dim=10)


def random_heads(base, **numbers):
    kind = numbers.pop("kind")
    drafted = numbers.pop("draft_vocab_size", DRAFTED) if kind == "eagle3" else None
    config = EagleConfig.from_model_config(base.config, kind=kind, draft_vocab_size=drafted)
    heads = EagleHeads(replace(config, **numbers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * drawn + (1 if "norm" in name else 0))
    if heads.draft_columns is not None:
        heads.set_draft_columns_(torch.arange(3, 3 * DRAFTED + 3, 3))
    return heads.eval()


def logits(heads, base, features, tokens):
    view, positions = TargetView(base), torch.arange(features.shape[1])[None]
    embeddings = heads.embed(tokens, embedding=view.stored_embeddings)
    first = heads(heads.fuse(features), embeddings, position_ids=positions)
    second = heads(first, embeddings, position_ids=positions + 1)
    return torch.stack([heads.logits(x, lm_head=view.head_logits) for x in (first, second)])


def features_of(model, heads, tokens):
    found = model.model(tokens, output_hidden_states=True)
    if heads.config.kind == "eagle":
        return [found.last_hidden_state]
    layers = heads.config.layers_to_read(model.config.num_hidden_layers)
    return [found.hidden_states[layer] for layer in layers]


@pytest.mark.parametrize("numbers", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_logits_are_those_of_the_small_heads_at_every_step(base, numbers):
    heads = random_heads(base, **numbers)
    wide = inflate_llama(base, SHAPE)
    inflated = inflate_eagle(heads, SHAPE, base=InflatedShape.of(base))
    tokens = prompts(9)["input_ids"]
    features = features_of(base, heads, tokens)
    padded = [functional.pad(part, (0, SHAPE.hidden_size - HIDDEN)) for part in features]
    for part, theirs in zip(padded, features_of(wide, inflated, tokens), strict=True):
        assert torch.allclose(part, theirs, atol=BASE_TOLERANCE * part.abs().max())
    results = [
        logits(mine, model, torch.cat(parts, dim=-1), tokens)
        for mine, model, parts in ((heads, base, features), (inflated, wide, padded))
    ]
    expected, found = results[0], results[1][..., : results[0].shape[-1]]
    extra = results[1][..., expected.shape[-1] :]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (extra < EXTRA_LOGIT / 2).all()
    assert torch.isfinite(extra).all()
    assert inflated.config.hidden_size == SHAPE.hidden_size
    assert inflated.dtype == heads.dtype
    assert not inflated.training


def test_heads_get_the_share_of_the_new_shape_that_they_have_of_the_old(base):
    config = inflate_eagle(random_heads(base, kind="eagle3"), SHAPE, base=InflatedShape.of(base))
    config = config.config
    assert (config.intermediate_size, config.head_dim) == (112, 20)
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 4)
    assert (config.vocab_size, config.draft_vocab_size) == (240, 60)
    assert config.feature_layers == (2, 3, 4)
    smaller = random_heads(base, **HEADS["smaller"])
    config = inflate_eagle(smaller, SHAPE, base=InflatedShape.of(base)).config
    assert (config.intermediate_size, config.num_key_value_heads) == (56, 2)


def test_gained_columns_are_tokens_that_the_base_gains(base):
    heads = random_heads(base, kind="eagle3")
    columns = inflate_eagle(heads, SHAPE, base=InflatedShape.of(base)).draft_columns
    assert columns[:DRAFTED].tolist() == heads.draft_columns.tolist()
    assert columns[DRAFTED:].tolist() == list(range(160, 180))


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_inflated_heads_keep_tokens_and_tau(base, kind):
    heads = random_heads(base, kind=kind)
    wide = inflate_llama(base, SHAPE)
    wide_heads = inflate_eagle(heads, SHAPE, base=InflatedShape.of(base))
    inputs, results = prompts(7, 12), []
    for target, guesser in ((base, heads), (wide, wide_heads)):
        options = {"width": 12, "branches": 12, "num_draft_tokens": 40, "min_probability": 0.0}
        spec = SpecModel(target, EagleProposer(guesser, target=target, depth=2, **options))
        tokens = spec.generate(**inputs, max_new_tokens=16, do_sample=False)
        results.append((tokens.tolist(), spec.last_speculation.tau))
    assert results[0] == results[1]
    assert results[0][1] > 1


def test_added_weights_are_random_and_depend_on_the_seed(base):
    heads, small = random_heads(base, kind="eagle3"), InflatedShape.of(base)
    first, again, other = (inflate_eagle(heads, SHAPE, base=small, seed=s) for s in (0, 0, 1))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if not any(part in name for part in ("o_proj", "down_proj", "norm", "bias")):
            assert not torch.equal(weight, other.get_parameter(name)), name


def test_bytes_read_hold_the_bases_output_layer_but_no_embeddings(base):
    heads = random_heads(base, kind="eagle", has_own_embeddings=True)
    own = sum(p.numel() for n, p in heads.named_parameters() if "embed" not in n)
    assert bytes_read(heads, base=base) == 4 * (own + 160 * 40)
    heads = random_heads(base, kind="eagle3")
    assert bytes_read(heads, base=base) == 4 * sum(p.numel() for p in heads.parameters())


@pytest.mark.parametrize(
    ("numbers", "change", "words"),
    [
        ({"has_qk_norm": True}, {}, "has_qk_norm is on.*depend on head_dim"),
        ({}, {"hidden_size": 32}, "hidden_size is 32, expected at least the model's 40"),
        ({}, {"num_heads": 3, "num_kv_heads": 3}, "num_kv_heads is 3, expected at least 4"),
        (
            {"target_hidden_size": 24, "has_own_embeddings": True},
            {},
            "40 wide and read 24 values of 160 tokens, expected 40, 40 and 160",
        ),
    ],
)
def test_heads_that_cannot_be_widened_are_refused(base, numbers, change, words):
    heads = random_heads(base, kind="eagle3", **numbers)
    with pytest.raises(OptionError, match=words):
        inflate_eagle(heads, replace(SHAPE, **change), base=InflatedShape.of(base))


def test_rope_that_depends_on_head_dim_is_refused_when_heads_widen(base):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    heads = random_heads(base, kind="eagle3", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="'yarn', which depends on head_dim"):
        inflate_eagle(heads, SHAPE, base=InflatedShape.of(base))
