from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.inflation.inflate import bytes_read, inflate_llama, inflate_medusa
from benchmarks.inflation.shapes import InflatedShape, draft_shape
from benchmarks.inflation.widening import EXTRA_LOGIT
from speclm.bench import make_calls, setting_options
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import OptionError, UnsupportedModelError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.model import SpecModel
from tests.models import build_model, generate, prompts

# Sums over more, scaled terms round otherwise; relative to the largest logit.
TOLERANCE = 1e-5
# Of bfloat16, whose scaled norm weights and queries are rounded anew; mean, relative likewise.
COARSE_TOLERANCE = 0.02

OLD = InflatedShape(
    hidden_size=40,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    vocab_size=160,
    is_tied=False,
)
WIDER = replace(
    OLD, hidden_size=96, intermediate_size=112, num_layers=4, num_heads=8, num_kv_heads=4
)
ALL_LARGER = replace(WIDER, num_heads=12, head_dim=40, vocab_size=224)
CHANGES = {
    "nothing": {},
    "width": {"hidden_size": 64},
    "mlp": {"intermediate_size": 64},
    "layers": {"num_layers": 5},
    "larger groups": {"num_heads": 8},
    "smaller groups": {"num_kv_heads": 4},
    "odd groups": {"num_heads": 15, "num_kv_heads": 5},
    "uneven copies": {"num_heads": 9, "num_kv_heads": 3},
    "head_dim doubled": {"head_dim": 40},
    "head_dim tripled": {"head_dim": 60},
    "vocabulary": {"vocab_size": 200},
}


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_logits(found, expected):
    num_tokens = expected.shape[-1]
    scale = expected.abs().max()
    assert (found[..., :num_tokens] - expected).abs().max() <= TOLERANCE * scale
    extra = found[..., num_tokens:]
    assert (extra < EXTRA_LOGIT / 2).all()
    assert torch.isfinite(extra).all()


def bundled(name):
    return AutoModelForCausalLM.from_pretrained(assets()[name], dtype=torch.float32)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_logits_are_those_of_the_small_model(change):
    model = build_model("llama", num_attention_heads=4, num_key_value_heads=2)
    old = InflatedShape.of(model)
    inflated = inflate_llama(model, replace(old, **change))
    inputs = prompts(12)
    assert InflatedShape.of(inflated) == replace(old, **change)
    assert_same_logits(logits_of(inflated, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("was_tied", "is_tied"), [(True, True), (True, False), (False, False)])
def test_all_changes_together_keep_the_logits(kv_heads, was_tied, is_tied):
    model = build_model(
        "llama", num_key_value_heads=kv_heads, tie_word_embeddings=was_tied, mlp_bias=True
    )
    inflated = inflate_llama(model, replace(ALL_LARGER, is_tied=is_tied), seed=3)
    inputs = prompts(5, 12)
    seen = inputs["attention_mask"].bool()
    expected = logits_of(model, inputs)[seen]
    assert_same_logits(logits_of(inflated, inputs)[seen], expected)
    is_shared = inflated.lm_head.weight is inflated.model.embed_tokens.weight
    assert is_shared == is_tied


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_wider_heads_keep_scaled_rope(rope_type):
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    if rope_type == "linear":
        rope = {name: rope[name] for name in ("rope_type", "rope_theta", "factor")}
    model = build_model("llama", rope_parameters=rope)
    inflated = inflate_llama(model, ALL_LARGER)
    assert_same_logits(logits_of(inflated, prompts(12)), logits_of(model, prompts(12)))


def test_greedy_tokens_are_the_same_and_extra_tokens_are_never_drawn():
    model = build_model("llama")
    inflated = inflate_llama(model, ALL_LARGER)
    inputs = prompts(4, 9)
    expected, _ = generate(model, inputs, max_new_tokens=20, do_sample=False)
    found, _ = generate(inflated, inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(found, expected)
    options = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    drawn, _ = generate(inflated, inputs, max_new_tokens=60, **options)
    assert drawn.max() < OLD.vocab_size


def test_extra_weights_are_random_and_depend_on_the_seed():
    model = build_model("llama")
    first, again, other = (inflate_llama(model, ALL_LARGER, seed=seed) for seed in (0, 0, 1))
    silent = ("o_proj", "down_proj", "norm", "bias", "embed_tokens")
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if not any(part in name for part in silent):
            assert not torch.equal(weight, other.get_parameter(name)), name
            # Entries of an old query head that no old pair of entries lies in are the only zeros.
            limit = 0.25 if "q_proj" in name else 0
            assert (weight == 0).float().mean() <= limit, name


def test_dtype_is_kept_and_the_source_is_left_alone():
    model = build_model("llama").to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    inflated = inflate_llama(model, ALL_LARGER)
    assert {weight.dtype for weight in inflated.parameters()} == {torch.bfloat16}
    assert inflated.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    expected = logits_of(model, prompts(12)).float()
    found = logits_of(inflated, prompts(12))[..., : OLD.vocab_size].float()
    assert (found - expected).abs().mean() < COARSE_TOLERANCE * expected.abs().max()


def test_draft_model_inflated_with_its_base_keeps_tokens_and_tau(tokenizer):
    base, draft = bundled("base"), bundled("draft")
    shape = replace(
        InflatedShape.of(base),
        hidden_size=320,
        num_layers=10,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=5000,
        is_tied=False,
    )
    options = setting_options("greedy")
    (call,) = make_calls(load_prompts("sql_dev", limit=1), base, tokenizer, options=options)
    wide = inflate_llama(base, shape)
    wide_draft = inflate_llama(draft, draft_shape(draft, base, shape))
    results = []
    for target, guesser in ((base, draft), (wide, wide_draft)):
        model = SpecModel(target, DraftModelProposer(guesser, target=target))
        tokens = model.generate(**call.arguments, max_new_tokens=40)
        results.append((tokens.tolist(), model.last_speculation.tau))
    assert results[0] == results[1]
    assert results[0][1] > 2


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("has_own_lm_head", [True, False])
def test_medusa_logits_are_those_of_the_small_heads(has_own_lm_head, num_layers, has_bias):
    model = build_model("llama")
    heads = random_heads(has_own_lm_head, num_layers=num_layers, has_bias=has_bias)
    wide = inflate_llama(model, ALL_LARGER)
    wide_heads = inflate_medusa(heads, ALL_LARGER)
    with torch.no_grad():
        hidden = model.model(**prompts(12)).last_hidden_state[0]
        wide_hidden = wide.model(**prompts(12)).last_hidden_state[0]
        expected = heads(hidden, lm_head=model.lm_head)
        found = wide_heads(wide_hidden, lm_head=wide.lm_head)
    assert not wide_hidden[:, OLD.hidden_size :].any()
    assert_same_logits(found, expected)


@pytest.mark.parametrize("has_own_lm_head", [True, False])
def test_medusa_keeps_tau_and_never_proposes_extra_tokens(has_own_lm_head):
    model = build_model("llama")
    heads = random_heads(has_own_lm_head)
    wide = inflate_llama(model, ALL_LARGER)
    inputs = prompts(7, 12)
    results = []
    for target, guesser in ((model, heads), (wide, inflate_medusa(heads, ALL_LARGER))):
        spec = SpecModel(target, MedusaProposer(guesser, target=target, tree=[100]))
        tokens = spec.generate(**inputs, max_new_tokens=24, do_sample=False)
        results.append((tokens.tolist(), spec.last_speculation.tau))
    assert results[0] == results[1]
    assert results[0][1] > 1


def random_heads(has_own_lm_head, *, num_layers=1, has_bias=True):
    config = MedusaHeadsConfig(
        hidden_size=OLD.hidden_size,
        vocab_size=OLD.vocab_size,
        num_heads=3,
        num_layers=num_layers,
        has_own_lm_head=has_own_lm_head,
        has_bias=has_bias,
    )
    heads = MedusaHeads(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return heads


def test_bytes_read_leave_out_an_embedding_that_is_no_output_matrix():
    tied = build_model("llama", tie_word_embeddings=True, attention_bias=False)
    untied = build_model("llama", attention_bias=False)
    expected = 4 * InflatedShape.of(tied).num_weights_read
    assert bytes_read(tied, base=tied) == bytes_read(untied, base=untied) == expected
    assert bytes_read(untied.to(torch.bfloat16), base=untied) == expected / 2


def test_bytes_read_by_heads_hold_the_output_layer_of_the_base():
    model = build_model("llama")
    residual = 4 * 3 * (OLD.hidden_size**2 + OLD.hidden_size)
    output = 4 * OLD.vocab_size * OLD.hidden_size
    own, shared = (random_heads(has_own_lm_head) for has_own_lm_head in (True, False))
    assert bytes_read(own, base=model) == residual + 3 * output
    assert bytes_read(shared, base=model) == residual + output
    assert bytes_read(own, base=model, num_heads=2) == (residual + 3 * output) * 2 // 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, expected at least the model's 40"),
        ({"intermediate_size": 8}, "intermediate_size is 8"),
        ({"num_layers": 1}, "num_layers is 1"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"head_dim": 30}, "head_dim is 30, expected a multiple of the model's 20"),
        ({"num_heads": 2}, "num_kv_heads is 2, expected at least 4"),
        ({"is_tied": True}, "pass is_tied=False"),
    ],
)
def test_shapes_without_room_are_refused(change, words):
    with pytest.raises(OptionError, match=words):
        inflate_llama(build_model("llama"), replace(OLD, **change))


def test_heads_that_do_not_fit_are_refused():
    heads = random_heads(True)
    with pytest.raises(OptionError, match="keeps hidden_size 40"):
        inflate_medusa(heads, replace(OLD, vocab_size=200))
    with pytest.raises(OptionError, match="hidden_size is 20"):
        inflate_medusa(heads, replace(OLD, hidden_size=20))


def test_models_that_are_no_llama_are_refused():
    with pytest.raises(UnsupportedModelError, match="Qwen2ForCausalLM, expected a Llama"):
        inflate_llama(build_model("qwen2"), OLD)


def test_rope_that_depends_on_head_dim_is_refused_when_heads_widen():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    model = build_model("llama", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="'yarn', which depends on head_dim"):
        inflate_llama(model, ALL_LARGER)
