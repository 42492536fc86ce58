"""Models that read images: the tokens of `base.generate`, with images in the prompt and without."""

import logging
from functools import cache, partial

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from speclm.target import TargetFeatures, TargetView
from speclm.testing import ScriptedProposer
from tests.exactness import MODES, WRONG_AT, planted, require_exact
from tests.grids import grid, turns
from tests.models import VOCAB_SIZE, build_model, generate
from tests.multimodal import IMAGE_TOKEN, WRAPPERS, build_wrapper, prompt, shared_wrapper

NEW_TOKENS = 10
MAX_FORWARDS = 7  # with an error planted at every third token or so
TEXT = {"greedy": [(9,)], "sampled": [(9,), (4,)]}
IMAGES = {"greedy": [(2, 3, 4)], "sampled": [(3, 5), (2, 4)]}

WITH_PREFIXES = {"paligemma"}  # which see an image and what follows it as one block
SPECULATING = [name for name in WRAPPERS if name not in WITH_PREFIXES]
WITH_AXES = [name for name in SPECULATING if name.startswith("qwen")]  # of positions
FEW_WITH_AXES = ("qwen2_5_vl", "qwen3_5")  # which stand for the others
TOLERANCE = 2e-4


@cache
def shared_spec(name):
    return SpecModel(shared_wrapper(name), None)


def require_few_forwards(spec, inputs, **settings):
    """Assert the promise, and that nearly right drafts save forwards."""
    num_siblings = int(spec.self_check.verification is Verification.TREES)
    require_exact(
        spec,
        inputs,
        proposer=partial(ScriptedProposer, wrong_at=WRONG_AT, depth=4, num_siblings=num_siblings),
        max_new_tokens=NEW_TOKENS,
        **settings,
    )
    stats = spec.last_speculation
    assert stats is not None
    assert 1 <= stats.rounds < MAX_FORWARDS


@pytest.mark.parametrize(("name", "mode"), turns(WRAPPERS, MODES))
def test_text_without_images_is_speculated(name, mode):
    require_few_forwards(shared_spec(name), prompt(name, *TEXT[mode]), **MODES[mode])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_inputs_that_say_there_are_no_images_change_nothing(name):
    inputs = prompt(name, (9,), (4,))
    kinds = torch.zeros_like(inputs["input_ids"])
    if name == "gemma3":
        none = {"token_type_ids": kinds}
    else:
        none = {"mm_token_type_ids": kinds, "image_grid_thw": None}
    require_few_forwards(shared_spec(name), {**inputs, **none}, **MODES["sampled"])


@pytest.mark.parametrize(("name", "mode"), turns(SPECULATING, MODES))
def test_images_are_speculated(name, mode):
    require_few_forwards(shared_spec(name), prompt(name, *IMAGES[mode]), **MODES[mode])


@pytest.mark.slow  # a check of the models, on which the other tests rest
@pytest.mark.parametrize("name", SPECULATING)
def test_images_change_what_is_said(name):
    model, inputs = shared_wrapper(name), prompt(name, (4, 5))
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) + 1.0}
    found, expected = (
        model.generate(**each, do_sample=False, max_new_tokens=NEW_TOKENS)
        for each in (inputs, others)
    )
    assert found.tolist() != expected.tolist()
    assert len(set(found[0, inputs["input_ids"].shape[1] :].tolist())) > 3


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name in WITH_PREFIXES])
def test_images_that_later_forwards_ask_for_are_left_to_the_base_in_one_line(name, caplog):
    spec = SpecModel(shared_wrapper(name), None)
    caplog.set_level(logging.INFO, logger="speclm")
    for mode in MODES.values():
        require_exact(
            spec,
            prompt(name, (3, 5), (2, 4)),
            plainly="model input 'token_type_ids'",
            max_new_tokens=NEW_TOKENS,
            **mode,
        )
    lines = [record.getMessage() for record in caplog.records if record.name == "speclm"]
    assert sum("regular generation with" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_several_texts_for_one_image_are_speculated(name):
    require_few_forwards(
        shared_spec(name), prompt(name, (4, 5)), num_return_sequences=2, **MODES["sampled"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_AXES)
def test_images_take_fewer_positions_than_slots(name):
    model = build_wrapper(name)
    model.generate(**prompt(name, (4, 5)), max_new_tokens=1)
    assert int(model.model.rope_deltas.min()) < 0  # or the tests of shifted positions are void


@pytest.mark.parametrize("name", grid(WITH_AXES, runs=lambda name: name in FEW_WITH_AXES))
def test_state_of_the_last_images_neither_leaks_nor_changes(name):
    model, inputs = build_wrapper(name), prompt(name, (4, 5))
    model.generate(**inputs, max_new_tokens=2)
    before = model.model.rope_deltas
    spec = SpecModel(model, NgramProposer())
    assert spec.self_check.verification is not Verification.REGULAR
    assert model.model.rope_deltas is before
    expected = model.model.rope_deltas.clone()
    spec.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert spec.last_speculation.fallbacks == []
    assert torch.equal(model.model.rope_deltas, expected)
    require_few_forwards(spec, prompt(name, (9,), (4,)), **MODES["sampled"])


@pytest.mark.parametrize(
    "name",
    grid(
        ["llava-window", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"],
        runs=lambda name: name not in {"qwen2_5_vl", "qwen3_vl"},  # as qwen3_5, which recurs too
    ),
)
def test_cache_after_images_is_extended_and_continued(name):
    spec, inputs = shared_spec(name), prompt(name, (4, 5))
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    expected, _ = generate(spec.base, inputs, **settings)
    spec.proposer = planted(expected.sequences[:, inputs["input_ids"].shape[1] :].tolist())
    found, _ = generate(spec, inputs, **settings)
    assert spec.last_speculation.fallbacks == []
    assert torch.equal(found.sequences, expected.sequences)
    caches = found[CACHE_NAME], expected[CACHE_NAME]
    for layer, other in zip(*(each.layers for each in caches), strict=True):
        if not isinstance(layer, CacheLayerMixin):
            continue  # a recurrent state, which the next turn tests
        torch.testing.assert_close(layer.keys, other.keys, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(layer.values, other.values, atol=TOLERANCE, rtol=TOLERANCE)

    tokens = torch.cat([found.sequences, prompt(name, (4,), seed=1)["input_ids"]], dim=1)
    settings = {"do_sample": True, "max_new_tokens": NEW_TOKENS}
    longer = {"input_ids": tokens}
    expected, state = generate(spec.base, longer, **{CACHE_NAME: caches[1]}, **settings)
    spec.proposer = planted(expected[:, tokens.shape[1] :].tolist())
    found, state_found = generate(spec, longer, **{CACHE_NAME: caches[0]}, **settings)
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.rounds < MAX_FORWARDS
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)


def test_images_after_a_cache_are_speculated():
    spec, inputs = shared_spec("gemma3"), prompt("gemma3", (4, 5))
    first = prompt("gemma3", (3, 4), seed=1)
    outputs = []
    for _ in range(2):
        cache = DynamicCache(config=spec.config.get_text_config())
        spec.base.generate(**first, **{CACHE_NAME: cache}, max_new_tokens=1)
        outputs.append(cache)
    length = outputs[0].get_seq_length()
    both = {
        name: torch.cat([first[name][:, :length], inputs[name]], dim=1)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    given = {**both, "pixel_values": inputs["pixel_values"]}
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = spec.base.generate(**given, **{CACHE_NAME: outputs[0]}, **settings)
    spec.proposer = planted(expected[:, given["input_ids"].shape[1] :].tolist())
    found = spec.generate(**given, **{CACHE_NAME: outputs[1]}, **settings)
    assert spec.last_speculation.fallbacks == []
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "lengths"), turns(["llava", "qwen2_5_vl", "qwen3_5", "gemma3"], [(6,), (3, 4)])
)
def test_tokens_of_an_image_may_be_drafted_and_said_within_the_text(name, lengths):
    spec, inputs = shared_spec(name), prompt(name, lengths)
    require_exact(
        spec,
        inputs,
        proposer=lambda _: ScriptedProposer([[IMAGE_TOKEN] * NEW_TOKENS], depth=3),
        is_faster=False,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    favoured = {"sequence_bias": [[[IMAGE_TOKEN], 20.0]], "do_sample": True}
    require_few_forwards(spec, inputs, **favoured)
    tokens, _ = generate(spec.base, inputs, max_new_tokens=NEW_TOKENS, **favoured)
    assert IMAGE_TOKEN in tokens[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("image_token", [IMAGE_TOKEN, VOCAB_SIZE + 5])
def test_models_of_text_draft_after_images(image_token):
    # Gemma 3 takes an image's token that its vocabulary lacks; a draft model cannot read it.
    model = build_wrapper("gemma3", image_token=image_token)
    inputs = prompt("gemma3", (4, 5), image_token=image_token)
    for proposer in (NgramProposer(), DraftModelProposer(build_model("llama"), target=model)):
        require_exact(
            SpecModel(model, proposer),
            inputs,
            proposer=lambda _, proposer=proposer: proposer,
            is_faster=False,
            do_sample=True,
            max_new_tokens=NEW_TOKENS,
        )


def test_wrapper_may_draft_for_a_model_of_text():
    target, draft = build_model("llama"), shared_wrapper("qwen2_5_vl")
    require_exact(
        SpecModel(target, None),
        prompt("llama", (6,)),
        proposer=lambda _: DraftModelProposer(draft, target=target),
        is_faster=False,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )


@pytest.mark.parametrize(
    "name",
    grid(
        ["llava", "qwen2_5_vl", "qwen3_5", "gemma3"], runs=lambda name: name in {"llava", "qwen3_5"}
    ),
)
def test_heads_read_hidden_states_after_images(name):
    model = shared_wrapper(name)
    view = TargetView(model)
    assert (view.vocab_size, view.hidden_size, view.num_layers) == (VOCAB_SIZE, 40, 2)
    config = MedusaHeadsConfig(hidden_size=40, vocab_size=VOCAB_SIZE, num_heads=2, num_layers=1)
    require_exact(
        shared_spec(name),
        prompt(name, (3, 5), (2, 4)),
        proposer=lambda _: MedusaProposer(MedusaHeads(config), target=model),
        is_faster=False,
        do_sample=True,
        max_new_tokens=NEW_TOKENS,
    )
    tokens = prompt(name, (5,))["input_ids"]
    with torch.no_grad(), view.decoding(TargetFeatures.LAST_HIDDEN):
        logits = view.run(input_ids=tokens).logits
        assert view.features is not None
        found = view.head_logits(view.features)
    torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_softcap_of_a_wrapped_model_is_in_the_logits_of_hidden_states():
    view = TargetView(build_wrapper("gemma3", final_logit_softcapping=2.0))
    tokens = prompt("gemma3", (5,))["input_ids"]
    with torch.no_grad(), view.decoding(TargetFeatures.LAST_HIDDEN):
        logits = view.run(input_ids=tokens).logits
        assert view.features is not None
        found = view.head_logits(view.features)
    torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_embeddings_next_to_images_are_left_to_the_base():
    spec, inputs = shared_spec("llava"), prompt("llava", (4, 5))
    embeddings = spec.base.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {**inputs, "inputs_embeds": embeddings}
    settings = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(spec.generate(**given, **settings), spec.base.generate(**given, **settings))
    assert "inputs_embeds" in spec.last_speculation.fallbacks[0]


def test_shifted_positions_with_rope_that_grows_are_left_to_the_base():
    rope = {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [1, 2, 2], "rope_theta": 1e4}
    spec = SpecModel(build_wrapper("qwen2_5_vl", rope_parameters=rope), None)
    settings = {"do_sample": False, "max_new_tokens": 4}
    require_exact(spec, prompt("qwen2_5_vl", (4, 5)), plainly="rope scaling", **settings)
    require_exact(spec, prompt("qwen2_5_vl", (5,)), is_faster=False, **settings)
