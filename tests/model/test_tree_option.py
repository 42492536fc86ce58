import json

import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError, TopologyError, UnknownNameError
from speclm.model.call import normalize_tree
from speclm.tree.plan import TreePlan
from tests.grids import turns
from tests.models import build_model, generate, prompts, shared_model
from tests.proposers import build_proposer

CHAIN = TreePlan.of(((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)))
SAMPLED = {"do_sample": True, "temperature": 0.9}


def reference_of(inputs, **settings):
    plain, state = generate(shared_model("llama"), inputs, max_new_tokens=20, **settings)
    return plain, state, plain[:, inputs["input_ids"].shape[1] :].tolist()


def spec_of(kind, reference, **options):
    base, draft = shared_model("llama"), shared_model("llama", 7)
    proposer = build_proposer(kind, reference, target=base, draft=draft)
    return SpecModel(base, proposer, **options)


@pytest.mark.parametrize(
    ("drafted", "setting"),
    turns(
        [
            ("twin draft", [1, 1, 1, 1]),
            ("twin draft", [[0], [2], [0, 1], [0, 0]]),
            ("twin draft", TreePlan(3, 5, min_probability=0.0, min_confidence=0.0)),
            ("random Medusa", [3, 2, 1]),
            ("Medusa that hits", TreePlan(2, 3)),
            ("ngram", TreePlan(2, 3, min_probability=0.01)),
            ("random tree", TreePlan(2, 3)),
            ("joined", TreePlan(3, 5)),
        ],
        [({"do_sample": False}, (9, 4, 12)), (SAMPLED, (9,)), (SAMPLED, (9, 4, 12))],
    ),
    ids=str,
)
def test_tokens_do_not_depend_on_the_tree_of_a_call(drafted, setting):
    (kind, tree), (settings, lengths) = drafted, setting
    inputs = prompts(*lengths)
    plain, state, reference = reference_of(inputs, **settings)
    model = spec_of(kind, reference)

    found, state_after = generate(model, inputs, max_new_tokens=20, tree=tree, **settings)

    assert torch.equal(found, plain)
    assert torch.equal(state_after, state)
    assert model.proposer.plan is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    turns(
        ["twin draft", "Medusa that hits", "ngram", "random tree", "joined"],
        [{"do_sample": False}, SAMPLED],
    ),
)
def test_tokens_do_not_depend_on_trees_that_are_planned(kind, settings):
    inputs = prompts(9, 4, 12)
    plain, state, reference = reference_of(inputs, **settings)
    model = spec_of(kind, reference, tree="auto", adaptive=False)

    for _ in range(4):
        found, state_after = generate(model, inputs, max_new_tokens=20, **settings)

        assert torch.equal(found, plain)
        assert torch.equal(state_after, state)
    assert "nodes on" in model.last_speculation.tree  # a plan was made
    assert model.proposer.plan is None


def test_planned_trees_pause_like_others_where_they_do_not_pay():
    inputs = prompts(9)
    plain, _, _ = reference_of(inputs, do_sample=False)
    model = spec_of("other draft", [[]], tree="auto")

    for _ in range(3):
        found, _ = generate(model, inputs, max_new_tokens=20, do_sample=False)
        assert torch.equal(found, plain)


def test_drawn_drafts_are_left_to_the_proposer():
    model = spec_of("twin draft", [[]], tree="auto")

    generate(model, prompts(9), max_new_tokens=10, acceptance="rejection", **SAMPLED)

    assert model.last_speculation.tree == ""


@pytest.mark.parametrize("kind", ["random tree", "Medusa that hits", "joined", "twin draft"])
def test_no_draft_exceeds_the_plan_of_a_call(kind):
    inputs = prompts(9)
    _, _, reference = reference_of(inputs, do_sample=False)
    model = spec_of(kind, reference)

    generate(model, inputs, max_new_tokens=20, do_sample=False, tree=TreePlan(2, 3))

    total = model.last_speculation.total
    assert len(total.offered) <= 2
    assert total.num_draft_tokens <= 3 * model.last_speculation.rounds
    assert total.num_draft_tokens > 0


def test_a_static_tree_is_drafted_whole_in_every_round():
    inputs = prompts(9)
    _, _, reference = reference_of(inputs, do_sample=False)
    model = spec_of("twin draft", reference, tree=[1, 1, 1])

    generate(model, inputs, max_new_tokens=24, do_sample=False)

    assert model.last_speculation.tau == 4.0  # the draft model is the target
    assert model.last_speculation.num_plain_rounds == 0
    assert len(model.last_speculation.total.offered) == 3


def test_a_static_tree_draws_its_nodes_where_the_rule_wants_that():
    inputs = prompts(9, 5)
    model = spec_of("twin draft", [[]])

    generate(model, inputs, max_new_tokens=15, tree=[2, 1], acceptance="rejection", **SAMPLED)

    assert model.last_speculation.tau > 1.5


def test_the_tree_of_a_model_is_the_default_of_its_calls():
    model = spec_of("twin draft", [[]], tree=[1, 1, 1, 1])
    assert model.tree == CHAIN

    model.tree = None
    assert model.tree is None

    base = shared_model("llama")
    loaded = SpecModel.from_pretrained(base, build_model("llama", seed=7), tree=[1, 1, 1, 1])
    assert loaded.tree == CHAIN


def test_trees_are_taken_in_every_form(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": CHAIN.paths}))

    for tree in ([1, 1, 1, 1], CHAIN.paths, CHAIN, path, str(path)):
        assert normalize_tree(tree) == CHAIN
    assert normalize_tree("auto") == "auto"
    assert normalize_tree(None) is None
    assert normalize_tree("mc_sim_7b_63").num_draft_tokens == 63


def test_descriptions_that_are_no_tree_are_refused(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(OptionError, match=r"broken.*cannot be read.*speclm tune"):
        normalize_tree(broken)
    with pytest.raises(UnknownNameError, match="no preset"):
        normalize_tree("best")
    with pytest.raises(TopologyError, match="hangs in the air"):
        normalize_tree([[0, 0]])


def test_a_static_tree_needs_a_proposer_that_ranks():
    inputs = prompts(5)
    with pytest.raises(OptionError, match=r"CombinedProposer.*cannot fill.*tree='auto'"):
        generate(spec_of("joined", [[]]), inputs, max_new_tokens=3, tree=[1, 1])
    with pytest.raises(OptionError, match="no proposer to fill it"):
        generate(spec_of("none", [[]]), inputs, max_new_tokens=3, tree=[1, 1])
    with pytest.raises(OptionError, match=r"rank 400.*vocabulary has 160"):
        generate(spec_of("twin draft", [[]]), inputs, max_new_tokens=3, tree=[[0], [400]])
