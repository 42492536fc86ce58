"""Texts that outgrow the length up to which their keys are rotated alike."""

from functools import cache
from itertools import product

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from speclm import SpecModel
from speclm.target.rotary import RotarySwitch, rotary_switch
from speclm.testing import ScriptedProposer
from tests.grids import grid
from tests.models import VOCAB_SIZE, build_model, generate, prompts, randomise, shared_model
from tests.proposers import RandomTreeProposer

SWITCH = 24
NAMES = ("dynamic", "longrope", "phi3")
LENGTHS = ((9,), (SWITCH - 1,), (SWITCH,), (SWITCH + 1,), (17, 12), (30, 3, 22))
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 5,
    "long_factor": [4.0] * 5,
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}


@cache
def spec_of(name: str) -> SpecModel:
    return SpecModel(model_of(name), None)


def model_of(name: str) -> PreTrainedModel:
    if name == "dynamic":
        return build_model(
            "llama", rope_parameters=DYNAMIC, max_position_embeddings=SWITCH, head_dim=10
        )
    if name == "longrope":
        return build_model("llama", rope_parameters=LONG, head_dim=10)
    llama = shared_model("llama").config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(llama, name) for name in (*names, *heads)}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = Phi3Config(
        **sizes,
        **special,
        max_position_embeddings=128,
        original_max_position_embeddings=SWITCH,
        rope_parameters=LONG,
    )
    return randomise(Phi3ForCausalLM(config))


def run(name: str, lengths: tuple[int, ...], num_new: int, *, do_sample: bool) -> SpecModel:
    spec = spec_of(name)
    inputs, settings = prompts(*lengths), {"max_new_tokens": num_new, "do_sample": do_sample}
    reset = prompts(3)  # a module keeps the frequencies of the longest text until a short one
    generate(spec.base, reset, max_new_tokens=1)
    expected = generate(spec.base, inputs, **settings)
    reference = expected[0][:, inputs["input_ids"].shape[1] :].tolist()
    for proposer in (
        ScriptedProposer(reference, depth=5, wrong_at=(7, 8)),
        RandomTreeProposer(reference, vocab_size=VOCAB_SIZE, seed=2),
    ):
        spec.proposer = proposer
        generate(spec.base, reset, max_new_tokens=1)
        found = generate(spec, inputs, **settings)
        assert found[0].tolist() == expected[0].tolist()
        assert torch.equal(found[1], expected[1])
    return spec


def runs(name: str, lengths: tuple[int, ...], num_new: int, do_sample: bool) -> bool:
    """Return whether `make test` has a cell: a text below the switch, and each length once.

    Gradual switches have all lengths, the others every second one each.
    """
    if num_new == 6:
        return name == "dynamic" and lengths == (9,) and do_sample
    if name != "dynamic" and LENGTHS.index(lengths) % 2 != (name == "phi3"):
        return False
    return do_sample == (len(lengths) > 1 or lengths[0] % 2 == 0)


@pytest.mark.parametrize(
    ("name", "lengths", "num_new", "do_sample"),
    grid(product(NAMES, LENGTHS, [6, 20], [False, True]), runs=runs),
)
def test_tokens_are_those_of_regular_generation_wherever_the_switch_is(
    name, lengths, num_new, do_sample
):
    spec = run(name, lengths, num_new, do_sample=do_sample)
    last = spec.last_speculation
    may_read_again = max(lengths) <= SWITCH < max(lengths) + num_new
    if name == "phi3" and may_read_again:
        assert f"may outgrow {SWITCH} positions" in last.fallbacks[0]
        return
    assert last.fallbacks == []
    if name != "dynamic":
        assert last.rounds < num_new - 1
    elif max(lengths) > SWITCH:
        assert last.rounds == num_new - 1  # every position is rotated in its own way
    elif max(lengths) + num_new <= SWITCH:
        assert last.rounds < num_new - 1


@pytest.mark.parametrize("length", [SWITCH - 3, SWITCH - 2, SWITCH - 1])
def test_a_longer_text_before_leaves_nothing_behind_for_a_draft_with_the_prompt(length):
    spec, inputs = spec_of("dynamic"), prompts(length)
    outputs = []
    for proposer in (None, ScriptedProposer):
        generate(spec.base, prompts(SWITCH + 20), max_new_tokens=4, do_sample=False)
        if proposer is not None:
            spec.proposer = proposer(outputs[0][:, length:].tolist(), depth=SWITCH - length)
        model = spec.base if proposer is None else spec
        outputs.append(generate(model, inputs, max_new_tokens=12, do_sample=False)[0])
    assert outputs[1].tolist() == outputs[0].tolist()


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_longest_row_takes_the_others_over_the_switch_after_it_has_ended(name):
    spec, inputs = spec_of(name), prompts(17, 4)
    reset, settings = prompts(3), {"max_new_tokens": 20, "do_sample": False}
    generate(spec.base, reset, max_new_tokens=1)
    free = generate(spec.base, inputs, **settings)[0][:, 17:].tolist()
    settings["eos_token_id"] = next(token for token in free[0][:4] if token not in free[1])
    generate(spec.base, reset, max_new_tokens=1)
    expected = generate(spec.base, inputs, **settings)[0]
    for wrong_at in ((), (5,), (6, 9)):
        spec.proposer = ScriptedProposer(expected[:, 17:].tolist(), depth=5, wrong_at=wrong_at)
        generate(spec.base, reset, max_new_tokens=1)
        found = generate(spec, inputs, **settings)[0]
        assert found.tolist() == expected.tolist()


def test_switches_are_read_from_configs_and_modules():
    assert rotary_switch(shared_model("llama")) is None
    assert rotary_switch(shared_model("bloom")) is None
    assert rotary_switch(model_of("dynamic")) == RotarySwitch(
        SWITCH - 1, is_gradual=True, reads_again=False
    )
    assert rotary_switch(model_of("longrope")) == RotarySwitch(
        SWITCH, is_gradual=False, reads_again=False
    )
    assert rotary_switch(model_of("phi3")) == RotarySwitch(
        SWITCH, is_gradual=False, reads_again=True
    )


def test_drafts_end_before_a_switch_and_begin_after_it_unless_it_is_gradual():
    once = RotarySwitch(10, is_gradual=False, reads_again=False)
    gradual = RotarySwitch(10, is_gradual=True, reads_again=False)
    for switch in (once, gradual):
        assert not switch.excludes_drafts(root=6, depth=3)
        assert switch.excludes_drafts(root=6, depth=4)
    assert not once.excludes_drafts(root=10, depth=4)
    assert gradual.excludes_drafts(root=10, depth=1)
    assert not once.is_met(10, 30)
    assert gradual.is_met(10, 30)
    assert once.is_met(9, 10)
    assert not gradual.is_met(3, 9)
