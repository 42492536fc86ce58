import pytest
import torch

from speclm.bench.overhead import FixedProposer, fixed_tree, import_seconds, round_overheads
from speclm.model import SpecModel


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_overheads_are_taken_for_every_round_that_was_not_accepted(tiny_base, shape):
    prompt = torch.arange(5, 15)[None]
    overheads = round_overheads(tiny_base, prompt, shape=shape, num_rounds=4, num_repeats=2)
    assert 0 < len(overheads) <= 8
    assert all(abs(seconds) < 5 for seconds in overheads)


def test_fixed_tree_has_the_nodes_asked_for():
    device = torch.device("cpu")
    assert fixed_tree("chain", num_nodes=8, device=device).max_depth == 7
    tree = fixed_tree("tree", num_nodes=8, device=device)
    assert (tree.num_nodes, tree.max_depth) == (8, 3)


def test_fixed_proposer_changes_no_token(tiny_base):
    device = torch.device("cpu")
    topology = fixed_tree("tree", num_nodes=8, device=device)
    proposer = FixedProposer(topology, range(7))
    prompt = torch.arange(5, 15)[None]
    mask = torch.ones_like(prompt)
    arguments = {"do_sample": False, "max_new_tokens": 6, "attention_mask": mask}
    found = SpecModel(tiny_base, proposer).generate(prompt, **arguments)
    assert torch.equal(found, tiny_base.generate(prompt, **arguments))
    assert len(proposer.times) >= 1


def test_import_is_timed_in_a_process_of_its_own():
    (seconds,) = import_seconds(num_runs=1)
    assert 0 < seconds < 60
