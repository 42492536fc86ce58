"""The promise over families, layouts and trees: the tokens of `base.generate`, in fewer forwards.

Settings are those that change what the loop does; all of them are in tests/model/test_matrix.py.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from speclm import SpecModel
from speclm.drafting.interface import Proposer
from speclm.generation import loop
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.testing import ScriptedProposer
from tests.grids import grid, turns
from tests.models import (
    FAMILIES,
    VOCAB_SIZE,
    build_model,
    generate,
    prompts,
    randomise,
    shared_model,
)
from tests.outcomes import reading
from tests.proposers import RandomTreeProposer

NEW_TOKENS = 20
DEPTH = 4
WRONG_AT = (3, 4, 11)

CELLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "default": {"do_sample": True},
    "temperature and top-p": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "all at once": {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "suppress_tokens": [3, 4],
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
}
LAYOUTS = {"one row": (9,), "padded rows": (11, 5, 2, 14), "one token": (1,)}
# Each of both, at half the time.
HALF = (("greedy", "padded rows"), ("default", "one row"))
WARPED_HALF = (("greedy", "one row"), ("temperature and top-p", "padded rows"))
PROPOSERS = ("random tree", "ngram", "draft = target", "other draft", "none")


@cache
def plain(family: str, cell: str, layout: str, new: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
    """Return the output of `base.generate` and the generator's state behind it."""
    inputs = prompts(*LAYOUTS[layout])
    return generate(shared_model(family), inputs, max_new_tokens=new, **CELLS[cell])


def new_tokens(output: Tensor, prompt: Tensor) -> list[list[int]]:
    return output[:, prompt.shape[1] :].tolist()


def require_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1], expected[1]), "the generator was left in another state"


def require_speculation(spec: SpecModel, *, tokens: int, errors: int) -> None:
    stats = spec.last_speculation
    assert stats.fallbacks == []
    num_forwards = 1 + stats.rounds  # the prompt's own verifies a draft as well
    assert num_forwards <= math.ceil(tokens / (DEPTH + 1)) + errors


def make_proposer(kind: str, family: str, reference: list[list[int]]) -> Proposer | None:
    target = shared_model(family)
    build: dict[str, Callable[[], Proposer | None]] = {
        "random tree": lambda: RandomTreeProposer(reference, vocab_size=VOCAB_SIZE),
        "ngram": NgramProposer,
        "draft = target": lambda: DraftModelProposer(target, target=target),
        "other draft": lambda: DraftModelProposer(
            shared_model("llama", 7), target=target, depth=3, min_probability=0.0
        ),
        "none": lambda: None,
    }
    return build[kind]()


@cache
def spec_model(family: str) -> SpecModel:
    return SpecModel(shared_model(family), None)


@pytest.fixture
def spec(request: pytest.FixtureRequest) -> SpecModel:
    return spec_model(request.node.callspec.params["family"])


@pytest.mark.parametrize(("cell", "layout", "family"), turns(CELLS, LAYOUTS, FAMILIES))
def test_scripted_draft_gives_the_tokens_of_plain_decoding_in_few_rounds(
    family, cell, layout, spec
):
    inputs = prompts(*LAYOUTS[layout])
    expected = plain(family, cell, layout)
    reference = new_tokens(expected[0], inputs["input_ids"])
    spec.proposer = ScriptedProposer(reference, depth=DEPTH, wrong_at=WRONG_AT)
    found = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **CELLS[cell])
    require_equal(found, expected)
    require_speculation(spec, tokens=NEW_TOKENS, errors=len(WRONG_AT))


@pytest.mark.parametrize(("kind", "half", "family"), turns(PROPOSERS, WARPED_HALF, FAMILIES))
def test_any_proposer_gives_the_tokens_of_plain_decoding(family, kind, half, spec):
    cell, layout = half
    inputs = prompts(*LAYOUTS[layout])
    expected = plain(family, cell, layout)
    spec.proposer = make_proposer(kind, family, new_tokens(expected[0], inputs["input_ids"]))
    found = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **CELLS[cell])
    require_equal(found, expected)
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize(("kind", "half"), turns(["scripted", *PROPOSERS], WARPED_HALF))
def test_prompts_too_long_for_a_draft_give_the_tokens_of_plain_decoding(kind, half, monkeypatch):
    cell, layout = half
    inputs = prompts(*LAYOUTS[layout])
    expected = plain("llama", cell, layout)
    reference = new_tokens(expected[0], inputs["input_ids"])
    spec = spec_model("llama")
    spec.proposer = (
        ScriptedProposer(reference, depth=DEPTH)
        if kind == "scripted"
        else make_proposer(kind, "llama", reference)
    )
    longest = inputs["input_ids"].shape[1]
    for bound in (longest - 1, longest):
        monkeypatch.setattr(loop, "MAX_MERGED_PROMPT", bound)
        found = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **CELLS[cell])
        require_equal(found, expected)
        stats = spec.last_speculation
        num_first = [row.prefill_tokens for row in stats.rows]
        if bound < longest:
            assert num_first == [1] * len(reference)
        elif kind == "scripted":
            assert num_first == [DEPTH + 1] * len(reference)


@pytest.mark.parametrize(
    ("kind", "half", "family"),
    turns(["scripted", *PROPOSERS], [("greedy", (1, 4, 1)), ("default", (1,))], FAMILIES),
)
def test_prompts_of_one_token_begin_with_any_proposer(family, kind, half, spec):
    cell, lengths = half
    inputs = prompts(*lengths)
    settings = {**CELLS[cell], "max_new_tokens": 8}
    expected = generate(spec.base, inputs, **settings)
    reference = new_tokens(expected[0], inputs["input_ids"])
    spec.proposer = (
        ScriptedProposer(reference, depth=DEPTH)
        if kind == "scripted"
        else make_proposer(kind, family, reference)
    )
    require_equal(generate(spec, inputs, **settings), expected)
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize(("seed", "family"), turns(range(4), FAMILIES))
def test_adversarial_trees_over_many_seeds(family, seed, spec):
    inputs = prompts(3, 12, 7, seed=seed)
    settings = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 40}
    expected = generate(spec.base, inputs, seed=seed, **settings)
    reference = new_tokens(expected[0], inputs["input_ids"])
    spec.proposer = RandomTreeProposer(
        reference, vocab_size=VOCAB_SIZE, num_nodes=5 + 9 * seed, seed=seed
    )
    require_equal(generate(spec, inputs, seed=seed, **settings), expected)
    assert spec.last_speculation.rounds < 39


@pytest.mark.parametrize(("at", "half", "family"), turns([0, 1, 5, 6, 13], HALF, FAMILIES))
def test_rows_end_at_an_eos_token_that_occurs_early(at, half, family, spec):
    cell, layout = half
    inputs = prompts(*LAYOUTS[layout])
    unbounded = new_tokens(plain(family, cell, layout)[0], inputs["input_ids"])
    eos = unbounded[-1][at]
    settings = {**CELLS[cell], "eos_token_id": eos, "max_new_tokens": NEW_TOKENS}
    expected = generate(spec.base, inputs, **settings)
    spec.proposer = ScriptedProposer(unbounded, depth=DEPTH, wrong_at=WRONG_AT)
    require_equal(generate(spec, inputs, **settings), expected)
    require_speculation(spec, tokens=NEW_TOKENS, errors=len(WRONG_AT))
    assert unbounded[-1].index(eos) <= at


@pytest.mark.parametrize("cell", grid(["greedy", "default"], runs=lambda cell: cell == "default"))
def test_a_fast_row_waits_for_a_slow_one_when_it_is_too_far_ahead(cell):
    inputs = prompts(4, 6)
    settings = {**CELLS[cell], "max_new_tokens": 80}
    spec = spec_model("llama")
    expected = generate(spec.base, inputs, **settings)
    reference = new_tokens(expected[0], inputs["input_ids"])
    slow = [token ^ 1 for token in reference[1]]
    spec.proposer = ScriptedProposer([reference[0], slow], depth=16, num_siblings=0)
    require_equal(generate(spec, inputs, **settings), expected)
    lengths = [row.accepted_lengths for row in spec.last_speculation.rows]
    assert spec.last_speculation.rounds == len(lengths[1]) == 79
    assert [row.prefill_tokens for row in spec.last_speculation.rows] == [17, 1]
    assert sum(lengths[0]) + len(lengths[0]) == 80 - 17


# One whose layers see all of the cache, and one of which some see a window.
@pytest.mark.parametrize("family", grid(FAMILIES, runs=lambda family: family in {"llama", "qwen2"}))
def test_generation_over_several_blocks_of_the_cache(family, spec):
    inputs = prompts(250, 200)
    settings = {"do_sample": True, "max_new_tokens": 30}
    expected = generate(spec.base, inputs, **settings)
    reference = new_tokens(expected[0], inputs["input_ids"])
    spec.proposer = RandomTreeProposer(reference, vocab_size=VOCAB_SIZE, num_nodes=20)
    require_equal(generate(spec, inputs, **settings), expected)


def gpt2_of_32_positions() -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 40, "n_layer": 2, "n_head": 4}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **special, n_positions=32)))


@pytest.mark.parametrize("lengths", [(20,), (20, 13)])
@pytest.mark.parametrize("kind", ["ngram", "past the end"])
def test_drafts_may_reach_beyond_the_last_learned_position(lengths, kind):
    model = gpt2_of_32_positions()
    inputs = prompts(*lengths)
    settings = {"do_sample": False, "max_new_tokens": 12}  # up to the last position
    expected = generate(model, inputs, **settings)
    reference = [row + [1] * 20 for row in new_tokens(expected[0], inputs["input_ids"])]
    proposer = NgramProposer() if kind == "ngram" else ScriptedProposer(reference, depth=8)
    spec = SpecModel(model, proposer)
    require_equal(generate(spec, inputs, **settings), expected)
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize("lengths", [(20,), (20, 13)])
def test_more_tokens_may_be_allowed_than_learned_positions_when_rows_end_before(lengths):
    model = gpt2_of_32_positions()
    inputs = prompts(*lengths)
    tokens = new_tokens(model.generate(**inputs, max_new_tokens=11), inputs["input_ids"])
    settings = {"max_new_tokens": 40, "eos_token_id": [row[-1] for row in tokens]}
    expected = generate(model, inputs, **settings)
    spec = SpecModel(model, ScriptedProposer([row + [1] * 40 for row in tokens], depth=8))
    require_equal(generate(spec, inputs, **settings), expected)
    assert spec.last_speculation.fallbacks == []
    del settings["eos_token_id"]
    for endless in (model, spec):
        with pytest.raises(IndexError):
            endless.generate(**inputs, **settings)


def test_rotary_positions_go_on_beyond_the_last_that_the_config_names(monkeypatch):
    spec = spec_model("llama")
    inputs = prompts(20, 13)
    settings = {"max_new_tokens": 30}
    expected = generate(spec.base, inputs, **settings)
    reference = new_tokens(expected[0], inputs["input_ids"])
    monkeypatch.setattr(spec.base.config, "max_position_embeddings", 32)
    spec.proposer = ScriptedProposer(reference, depth=8)
    require_equal(generate(spec, inputs, **settings), expected)
    assert spec.last_speculation.rounds < 20


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_prompts_are_read_without_what_is_meant_for_steps(family, monkeypatch):
    base, is_step, seen = build_model(family), [], []

    @contextmanager
    def optimised(self):
        is_step.append(True)
        yield
        is_step.pop()

    monkeypatch.setattr(type(base), "_optimize_model_for_decode", optimised)
    spec = SpecModel(base, NgramProposer())
    hook = base.register_forward_hook(reading(lambda *_: seen.append(bool(is_step))))
    for model in (base, spec):
        seen.clear()
        generate(model, prompts(7), max_new_tokens=8)
        assert seen[0] is False
        assert all(seen[1:])
        assert len(seen) > 1
    hook.remove()
