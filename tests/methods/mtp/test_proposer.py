"""Generation with MTP layers: the tokens of regular generation, in fewer forwards."""

import math
import pickle

import pytest
import torch

from speclm import SpecModel
from speclm.methods.mtp.proposer import MtpProposer
from speclm.testing import check_proposer
from speclm.tree.plan import TreePlan
from tests.grids import turns
from tests.methods.mtp.mtp_bases import ROWS, make_base
from tests.models import VOCAB_SIZE, generate, prompts
from tests.proposers import HittingProposer

FULL = {"min_probability": 0.0, "min_confidence": 0.0, "width": 2, "depth": 5}
CELLS = {
    "greedy": ((11, 5, 14), {"do_sample": False}, None, {}),
    "sampled": ((9,), {"do_sample": True, "temperature": 0.8}, TreePlan(3, 5), {}),
    "sampled rows": ((7, 3, 1), {"do_sample": True, "top_k": 20}, None, {"tree": [3, 2, 1]}),
}


def load(folder, **options):
    """Return a model that drafts with its MTP layers in every round."""
    return SpecModel.from_pretrained(str(folder), "mtp", heads_kwargs=options, adaptive=False)


@pytest.mark.parametrize(("name", "cell"), turns(tuple(ROWS), tuple(CELLS)))
def test_tokens_and_generator_are_those_of_regular_generation(name, cell, tmp_path):
    lengths, settings, plan, tree = CELLS[cell]
    make_base(tmp_path, name)
    spec = load(tmp_path, **FULL, **tree)
    inputs = prompts(*lengths)
    expected = generate(spec.base, inputs, max_new_tokens=10, **settings)
    spec.proposer.plan = plan
    spec.proposer = HittingProposer(spec.proposer, expected[0][:, max(lengths) :].tolist())
    found = generate(spec, inputs, max_new_tokens=10, **settings)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.tau > 1


def test_it_keeps_the_contract_of_proposers(tmp_path):
    make_base(tmp_path, "glm4_moe")  # three layers
    spec = load(tmp_path)
    whole = {**FULL, "depth": 4, "num_draft_tokens": 64}  # a cut would fall between near ties
    check_proposer(
        lambda: MtpProposer(spec.proposer.heads, target=spec.base, **whole),
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.base.config.hidden_size,
        max_length=32,
    )


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "glm4_moe"])
def test_forwards_fall_to_one_for_each_draft_where_the_layers_are_right(name, tmp_path):
    make_base(tmp_path, name, is_right=True)
    num_new = 21
    for repeats in (True, False):
        spec = load(tmp_path, **{**FULL, "depth": 4}, repeats_last=repeats)
        levels = 4 if repeats else len(spec.proposer.heads.layers)
        for lengths in ((9,), (4, 1, 12)):
            inputs = prompts(*lengths)
            expected = generate(spec.base, inputs, max_new_tokens=num_new, do_sample=False)
            found = generate(spec, inputs, max_new_tokens=num_new, do_sample=False)
            assert torch.equal(found[0], expected[0])
            # The first token comes without a draft, and a near tie may end one.
            assert spec.last_speculation.rounds <= 2 + math.ceil((num_new - 1) / (levels + 1))


def test_drawn_drafts_and_planned_trees_are_accepted(tmp_path):
    make_base(tmp_path, "deepseek_v3", is_right=True)
    spec = load(tmp_path, width=2, depth=3)
    inputs = prompts(9, 5)
    spec.generate(**inputs, max_new_tokens=16, do_sample=True, acceptance="rejection")
    assert spec.last_speculation.tau > 2
    expected = generate(spec.base, inputs, max_new_tokens=24, do_sample=True)
    found = generate(
        pickle.loads(pickle.dumps(spec)), inputs, max_new_tokens=24, do_sample=True, tree="auto"
    )
    assert torch.equal(found[0], expected[0])
