"""The benchmark that compares ways to rank candidates."""

from pathlib import Path

import pytest
import torch

from benchmarks.trees import ranking
from speclm import SpecModel
from speclm.bench.decoders import Call
from speclm.bench.records import read_records
from speclm.drafting.interface import Draft
from speclm.drafting.mixture import Mixture
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.tree import from_parents
from tests.models import prompts, shared_model

ROOT = Path(__file__).parents[3]


@pytest.fixture
def call() -> Call:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 24}
    return Call(**prompts(9, 5), options=options, seed=3, eos_token_ids=frozenset())


def test_text_is_followed_as_far_as_the_tree_goes():
    topology = from_parents([[0, 0, 0, 1, 2]], device=torch.device("cpu"))
    draft = Draft(torch.tensor([[1, 5, 6, 7, 8]]), topology)
    assert ranking.follow(draft, 0, [6, 8, 9]) == ([0, 2, 4], [6, 8, 9])
    assert ranking.follow(draft, 0, [6, 7, 9]) == ([0, 2], [6, 7])
    assert ranking.follow(draft, 0, [4, 7]) == ([0], [4])
    assert ranking.follow(draft, 0, [5]) == ([0], [5])


@pytest.mark.parametrize("mixture", [None, Mixture()])
def test_replayed_rounds_emit_as_many_tokens_as_generate(call, mixture):
    target = shared_model("llama")
    proposer = DraftModelProposer(target, target=target, depth=3, width=2, mixture=mixture)
    spec = SpecModel(target, proposer, adaptive=False)
    torch.manual_seed(call.seed)
    spec.generate(**call.arguments)
    (texts,) = ranking.plain_texts(target, [call])
    fresh = DraftModelProposer(target, target=target, depth=3, width=2, mixture=mixture)
    found = ranking.replay(fresh, call, texts, is_coupled=True)
    accepted = [n for row in spec.last_speculation.rows for n in row.accepted_lengths]
    assert sorted(found) == sorted(1 + length for length in accepted)


def test_methods_are_measured_once(call, tmp_path):
    target, path = shared_model("llama"), tmp_path / "ranking.jsonl"

    def make(num_nodes, shape, mixture):
        return DraftModelProposer(
            target, target=target, num_draft_tokens=num_nodes, depth=shape[2], mixture=mixture
        )

    def run():
        options = {"nodes": [4], "shape": (1, 2, 3), "settings": {"prompts": "own"}}
        return list(ranking.measure(target, make, [call], path=path, **options))

    methods = [record.settings["method"] for record in run()]
    assert methods == ["top-k", "fixed mixture", "estimated mixture"]
    assert run() == []
    top_k, fixed, _ = read_records(path)
    assert 1.0 <= top_k["tau"] < fixed["tau"] <= 4.0
