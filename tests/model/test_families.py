"""The promise for every family: the tokens of `base.generate`, verified as the table says."""

import json
from pathlib import Path

import pytest
import torch.nn.functional as F
import transformers
from packaging.version import Version

from speclm import SpecModel
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from tests.families import FAMILIES, ROWS, build_family, is_known
from tests.families.cells import CELLS, MAX_FORWARDS, compare, shared_plain, shared_spec
from tests.models import generate, prompts

VERIFIED = [name for name, row in FAMILIES.items() if row.backend is not Verification.REGULAR]
WITHOUT_TREES = [name for name, row in FAMILIES.items() if row.backend is not Verification.TREES]
# A caller cannot pass a cache to Mamba 2 under the name of the others.
GO_ON = [name for name in VERIFIED if name in WITHOUT_TREES and name != "mamba2"]
DECODED_PLAINLY = [name for name in FAMILIES if name not in VERIFIED]

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "families.jsonl"


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


def test_verdicts_of_the_compatibility_page_are_those_of_today():
    rows = recorded()
    if not rows:
        pytest.skip(f"no records of Transformers {transformers.__version__}")
    found = {row["family"]: row["backend"] for row in rows}
    assert found == {name: shared_spec(name).self_check.verification.value for name in FAMILIES}
    assert all(cell["identical"] for row in rows for cell in row["cells"].values())


@pytest.mark.parametrize("name", FAMILIES)
def test_self_check_gives_the_backend_of_the_table(name):
    row, check = FAMILIES[name], shared_spec(name).self_check
    assert check.verification is row.backend, check.reason
    assert row.reason in check.reason
    assert row.reason or row.backend is Verification.TREES


@pytest.mark.parametrize("name", WITHOUT_TREES)
def test_wider_tolerances_of_half_precision_let_no_other_family_take_trees(name):
    check = SpecModel(build_family(name).bfloat16(), None).self_check
    assert check.verification is not Verification.TREES


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", VERIFIED)
def test_tokens_are_those_of_plain_decoding_in_few_forwards(name, cell):
    compared = compare(shared_spec(name), cell, reference=shared_plain(name, cell))
    assert compared.found.tolist() == compared.expected.tolist()
    assert compared.has_equal_state
    assert compared.stats.fallbacks == []
    assert compared.stats.num_plain_rounds == 0
    assert compared.num_forwards <= MAX_FORWARDS


@pytest.mark.parametrize("name", DECODED_PLAINLY)
def test_plain_decoding_is_plain_and_its_reason_is_in_the_counters(name):
    reference = shared_plain(name, "padded rows")
    compared = compare(shared_spec(name), "padded rows", reference=reference)
    assert compared.found.tolist() == compared.expected.tolist()
    assert compared.has_equal_state
    assert compared.stats.fallbacks == [shared_spec(name).self_check.reason]


@pytest.mark.parametrize("name", GO_ON)
def test_chains_continue_from_the_cache_that_they_left(name):
    spec, inputs = shared_spec(name), prompts(9, 4)
    spec.proposer = NgramProposer()
    texts, states = [], []
    for model in (spec.base, spec):
        settings = {"max_new_tokens": 5, "do_sample": True, "return_dict_in_generate": True}
        first, _ = generate(model, inputs, **settings)
        mask = F.pad(inputs["attention_mask"], (0, 6), value=1)
        turn = {"input_ids": F.pad(first.sequences, (0, 1), value=3), "attention_mask": mask}
        second, state = generate(model, turn, past_key_values=first.past_key_values, **settings)
        texts.append(second.sequences.tolist())
        states.append(state.tolist())
    assert spec.last_speculation.fallbacks == []
    assert texts[0] == texts[1]
    assert states[0] == states[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_models_say_something_varied_that_settings_change(name):
    outputs = {}
    for cell, (lengths, _) in CELLS.items():
        width = prompts(*lengths)["input_ids"].shape[1]
        outputs[cell] = shared_plain(name, cell)[0][:, width:].tolist()
        assert all(len(set(row)) > 2 for row in outputs[cell])
    first_tokens = {tuple(rows[0]) for rows in outputs.values()}
    assert len(first_tokens) == len(CELLS)
