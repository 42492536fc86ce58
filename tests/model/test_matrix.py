"""The promise over settings, batches, prompts and proposers: what `base.generate` leaves behind.

A cell is one setting with one batch and one proposer. It compares token ids, the generator's state
and, where they are asked for, scores and logits with those of regular generation under the same
seed, and counts forwards.
"""

import math
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from speclm import SpecModel
from tests.grids import grid
from tests.models import prompts
from tests.outcomes import Outcome, lengths, live_steps, observe, require_close, require_same
from tests.proposers import DEPTH, PROPOSERS, WRONG_AT, build_proposer
from tests.settings import EOS, NEW_TOKENS, SETTINGS, tiny_draft, tiny_model
from tests.stand_ins import replaying

BATCHES = {"one row": (6,), "padded rows": (7, 3, 5)}
ENGINE = replaying()
REAL_PER_CASE = 2  # proposers besides the scripted one, which is in all
IDLE = {"greedy", "default", "temperature 1", "invalid values removed", "scores, greedy"}
CASES = [(name, batch) for name in SETTINGS for batch in BATCHES]
CELLS = [
    (name, batch, kind)
    for index, (name, batch) in enumerate(CASES)
    for kind in (
        "scripted",
        *(
            PROPOSERS[1 + (REAL_PER_CASE * index + offset) % (len(PROPOSERS) - 1)]
            for offset in range(REAL_PER_CASE)
        ),
    )
]


def runs(name: str, batch: str, kind: str) -> bool:
    """Return whether `make test` has a cell: a scripted one a setting, and half of the real ones.

    Scripted rows are padded, but for every fourth setting. Real ones take turns with the batches.
    """
    index = CASES.index((name, batch))
    setting = index // len(BATCHES)
    if kind == "scripted":
        return (batch == "one row") == (setting % 4 == 3)
    is_first = kind == PROPOSERS[1 + REAL_PER_CASE * index % (len(PROPOSERS) - 1)]
    return is_first and setting % 2 == 0 and index % 2 == setting // 2 % 2


def make_inputs(name: str, batch: str) -> dict[str, Tensor]:
    """Return the prompts of a setting, other ones for each."""
    shape = BATCHES[batch]
    if SETTINGS[name].is_one_token:
        shape = (1,) * len(shape)
    return prompts(*shape, vocab_size=60, seed=CASES.index((name, batch)))


def make_arguments(name: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, **SETTINGS[name].build(inputs)}


@cache
def plain(name: str, batch: str) -> Outcome:
    base = tiny_model(SETTINGS[name].model)
    inputs = make_inputs(name, batch)
    return observe(base, inputs, make_arguments(name, inputs), base=base)


def without(name: str, batch: str) -> Outcome:
    """Return what a call leaves behind that only says whether to sample."""
    inputs = make_inputs(name, batch)
    arguments = make_arguments(name, inputs)
    config = arguments.get("generation_config")
    is_sampled = config.do_sample if config else arguments["do_sample"]
    bare = {"do_sample": is_sampled, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    return observe(tiny_model("ends"), inputs, bare, base=tiny_model("ends"))


@cache
def spec_model(model: str) -> SpecModel:
    return SpecModel(tiny_model(model), None)


def speculative(name: str, batch: str, kind: str) -> tuple[Outcome, SpecModel]:
    spec = spec_model(SETTINGS[name].model)
    inputs = make_inputs(name, batch)
    reference = plain(name, batch).new_tokens(inputs)
    spec.proposer = build_proposer(
        kind,
        reference,
        target=spec.base,
        draft=tiny_draft(spec.config.vocab_size),
        seed=CASES.index((name, batch)),
    )
    arguments = make_arguments(name, inputs)
    if is_replayed(name, batch, kind):
        arguments["engine"] = ENGINE
    return observe(spec, inputs, arguments, base=spec.base), spec


def is_replayed(name: str, batch: str, kind: str) -> bool:
    """Return whether a cell verifies by replays over fixed shapes: half of each kind."""
    index = [cell for cell in CELLS if cell[2] == kind].index((name, batch, kind))
    return index // 2 % 2 == 0


@pytest.mark.parametrize(("name", "batch", "kind"), grid(CELLS, runs=runs))
def test_cell_leaves_behind_what_regular_generation_does(name, batch, kind):
    inputs = make_inputs(name, batch)
    expected = plain(name, batch)
    found, spec = speculative(name, batch, kind)
    require_same(found, expected)
    # The scripted proposer is compared in rows that have ended, too.
    live = None if kind == "scripted" else live_steps(expected.new_tokens(inputs), EOS)
    require_close(found.scores, expected.scores, live=live)
    require_close(found.logits, expected.logits, live=live)
    assert spec.last_speculation.fallbacks == []
    # An engine proves its forward in one of the usual kind, and replays are no forwards.
    is_replayed_here = is_replayed(name, batch, kind)
    num_proofs = 2 * is_replayed_here
    assert found.num_forwards <= expected.num_forwards + num_proofs
    if is_replayed_here and spec.last_speculation.rounds:
        assert spec.last_speculation.engine == "graph"
    if kind == "scripted":
        num_steps = expected.sequences.shape[1] - inputs["input_ids"].shape[1]
        num_errors = sum(step < num_steps for step in WRONG_AT)
        assert found.num_forwards <= (math.ceil(num_steps / (DEPTH + 1)) + num_errors + num_proofs)


@pytest.mark.slow
def test_nearly_every_setting_changes_the_output():
    unchanged = set()
    for name, setting in SETTINGS.items():
        if setting.model != "ends":
            continue
        pairs = [(plain(name, batch), without(name, batch)) for batch in BATCHES]
        if all(one.sequences.tolist() == other.sequences.tolist() for one, other in pairs):
            unchanged.add(name)
    assert unchanged == IDLE


def test_the_matrix_is_as_wide_as_it_says():
    assert len(CELLS) >= 400
    assert len(set(CELLS)) == len(CELLS)
    run = [cell for cell in CELLS if runs(*cell)]
    assert len(run) == len(SETTINGS) + (len(SETTINGS) + 1) // 2
    assert {name for name, _, _ in run} == set(SETTINGS)
    assert {kind for _, _, kind in run} == set(PROPOSERS)


@pytest.mark.slow
def test_rows_of_the_matrix_end_at_varied_positions():
    ends: dict[int, int] = {}
    for name, batch in CASES:
        if SETTINGS[name].model == "ends":
            for length in lengths(plain(name, batch).new_tokens(make_inputs(name, batch)), EOS):
                ends[length] = ends.get(length, 0) + 1
    assert set(range(1, NEW_TOKENS + 1)) <= set(ends), ends
    assert ends[NEW_TOKENS] < sum(ends.values()) / 2
