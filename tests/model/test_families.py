"""The promise for every family: the tokens of `base.generate`, verified as the table says."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest
import torch.nn.functional as F
import transformers
from packaging.version import Version

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from tests.families import FAMILIES, ONCE, ROWS, build_family, is_known
from tests.families.attention_rows import ATTENTION_ROWS
from tests.families.cells import (
    CELLS,
    COMBINED,
    DISTINCT,
    MAX_FORWARDS,
    compare,
    shared_plain,
    shared_spec,
)
from tests.grids import grid
from tests.models import generate, prompts

VERIFIED = [name for name, row in FAMILIES.items() if row.backend is not Verification.REGULAR]
WITHOUT_TREES = [name for name, row in FAMILIES.items() if row.backend is not Verification.TREES]
# A caller cannot pass a cache to Mamba 2 under the name of the others.
GO_ON = [name for name in VERIFIED if name in WITHOUT_TREES and name != "mamba2"]
BY_ATTENTION = {row.name for row in ATTENTION_ROWS}  # the others have a state: no tree fits it

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "families.jsonl"
RENAMED = {"plain decoding": Verification.REGULAR.value}  # since they were recorded


def recorded() -> list[dict]:
    """Return the rows of the table that were recorded under the installed Transformers."""
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    return [
        row
        for row in rows
        if row["kind"] == "table" and row["transformers"] == transformers.__version__
    ]


def test_rows_are_left_out_by_older_versions_alone():
    installed = Version(transformers.__version__)
    for row in ROWS:
        assert is_known(row.model_type) == (installed >= Version(row.since)), row.name


def test_verdicts_of_the_compatibility_page_are_those_of_the_table():
    rows = recorded()
    if not rows:
        pytest.skip(f"no records of Transformers {transformers.__version__}")
    found = {row["family"]: RENAMED.get(row["backend"], row["backend"]) for row in rows}
    assert found == {name: row.backend.value for name, row in FAMILIES.items()}
    assert all(cell["identical"] for row in rows for cell in row["cells"].values())


def require_tokens(name: str, cell: str) -> None:
    """Assert regular generation's tokens, in few forwards where the family is verified."""
    compared = compare(shared_spec(name), cell, reference=shared_plain(name, cell))
    assert compared.found.tolist() == compared.expected.tolist()
    assert compared.has_equal_state
    if FAMILIES[name].backend is Verification.REGULAR:
        assert compared.stats.fallbacks == [shared_spec(name).self_check.reason]
        return
    assert compared.stats.fallbacks == []
    assert compared.stats.num_plain_rounds == 0
    assert compared.num_forwards <= MAX_FORWARDS


def require_varied(name: str, cells: Collection[str]) -> None:
    """Assert that a model says several tokens, and begins otherwise in each cell."""
    first_tokens = set()
    for cell in cells:
        lengths, _ = CELLS[cell]
        width = prompts(*lengths)["input_ids"].shape[1]
        rows = shared_plain(name, cell)[0][:, width:].tolist()
        assert all(len(set(row)) > 2 for row in rows)
        first_tokens.add(tuple(rows[0]))
    assert len(first_tokens) == len(cells)


# One test, so that a family is built and checked once.
@pytest.mark.parametrize("name", FAMILIES, scope=ONCE)
def test_family_is_verified_as_the_table_says_and_keeps_its_tokens(name):
    row, check = FAMILIES[name], shared_spec(name).self_check
    assert check.verification is row.backend, check.reason
    assert row.reason in check.reason
    assert row.reason or row.backend is Verification.TREES
    require_tokens(name, COMBINED)
    require_varied(name, [COMBINED])


@pytest.mark.parametrize("name", grid(FAMILIES, runs=lambda name: name in DISTINCT))
def test_family_keeps_its_tokens_under_other_settings(name):
    for cell in CELLS:
        require_tokens(name, cell)
    require_varied(name, CELLS)


@pytest.mark.parametrize("name", grid(WITHOUT_TREES, runs=lambda name: name in BY_ATTENTION))
def test_wider_tolerances_of_half_precision_let_no_other_family_take_trees(name):
    check = SpecModel(build_family(name).bfloat16(), None).self_check
    assert check.verification is not Verification.TREES


@pytest.mark.parametrize("name", grid(GO_ON, runs=lambda name: name in DISTINCT))
def test_chains_continue_from_the_cache_that_they_left(name):
    spec, inputs = shared_spec(name), prompts(9, 4)
    spec.proposer = NgramProposer()
    texts, states = [], []
    for model in (spec.base, spec):
        settings = {"max_new_tokens": 5, "do_sample": True, "return_dict_in_generate": True}
        first, _ = generate(model, inputs, **settings)
        mask = F.pad(inputs["attention_mask"], (0, 6), value=1)
        turn = {"input_ids": F.pad(first.sequences, (0, 1), value=3), "attention_mask": mask}
        second, state = generate(model, turn, **{CACHE_NAME: first[CACHE_NAME]}, **settings)
        texts.append(second.sequences.tolist())
        states.append(state.tolist())
    assert spec.last_speculation.fallbacks == []
    assert texts[0] == texts[1]
    assert states[0] == states[1]
