import pytest
import torch

from benchmarks.round import overhead
from benchmarks.round.overhead import (
    FixedProposer,
    fixed_tree,
    position_overheads,
    round_overheads,
)
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model import SpecModel


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_overheads_are_taken_round_by_round(tiny_base, shape, do_sample):
    prompt = torch.arange(5, 15)[None].expand(2, -1)
    options = {"do_sample": do_sample}
    overheads = round_overheads(tiny_base, prompt, shape=shape, num_rounds=4, options=options)
    assert 0 < len(overheads) <= 4
    assert all(abs(seconds) < 5 for seconds in overheads)


@pytest.mark.parametrize("setting", ["greedy", "t1.0"])
def test_deciding_by_position_is_timed_and_changes_no_token(tiny_base, calls_of, setting):
    calls = calls_of(setting)
    overheads = position_overheads(SpecModel(tiny_base, NgramProposer()), calls)
    assert len(overheads) == len(calls)
    assert all(abs(seconds) < 5 for seconds in overheads)


def test_fixed_tree_has_the_nodes_asked_for():
    device = torch.device("cpu")
    assert fixed_tree("chain", num_nodes=8, device=device).max_depth == 7
    tree = fixed_tree("tree", num_nodes=8, device=device)
    assert (tree.num_nodes, tree.max_depth) == (8, 3)


@pytest.mark.parametrize("max_merged", [1024, 4])
def test_fixed_proposer_changes_no_token_and_follows_the_cache(tiny_base, max_merged, monkeypatch):
    monkeypatch.setattr("speclm.generation.loop.MAX_MERGED_PROMPT", max_merged)
    prompt = torch.arange(5, 15)[None]
    arguments = {
        "do_sample": False,
        "max_new_tokens": 13,
        "attention_mask": torch.ones_like(prompt),
        "eos_token_id": 4096,
        "pad_token_id": 0,
    }
    expected = tiny_base.generate(prompt, **arguments)
    drafted = expected[0, 10:17].tolist()  # the first draft is kept whole, later ones few or none
    topology = fixed_tree("chain", num_nodes=8, device=prompt.device)
    for tokens in (drafted, range(7)):
        proposer = FixedProposer(tiny_base, topology, tokens)
        model = SpecModel(tiny_base, proposer)
        assert torch.equal(model.generate(prompt, **arguments), expected)
        assert len(proposer.bare_seconds) == len(proposer.round_seconds) + 1
        num_rounds = model.last_speculation.rounds
        assert num_rounds - 1 <= len(proposer.bare_seconds) <= num_rounds


def test_import_is_timed_in_processes_of_its_own(monkeypatch):
    assert "import speclm\n" in overhead.IMPORT
    monkeypatch.setattr(overhead, "IMPORT", "print(0.25)")
    assert overhead.import_seconds(num_runs=2) == [0.25, 0.25]
