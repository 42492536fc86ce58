import jaxtyping
import numpy as np
import pytest
import torch

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.target.features import TargetFeatures
from speclm.testing import ScriptedProposer
from speclm.tree.topology import from_parents
from tests.grids import turns
from tests.methods.eagle.eagle_heads import heads_for
from tests.methods.medusa.test_proposer import random_heads
from tests.models import FAMILIES, build_model, generate, prompts, shared_model
from tests.proposers import HittingProposer

CPU = torch.device("cpu")


class Fixed(Proposer):
    """Drafts the given tokens below the given parents, and keeps what it is told."""

    def __init__(self, tokens, parents):
        self.tokens, self.parents, self.told = tokens, parents, []

    def begin(self, prompt: Prefill) -> None:
        self.told = []

    def propose(self, roots, *, noise) -> Draft:
        guesses = torch.tensor(self.tokens).reshape(len(roots), -1)
        return Draft(
            tokens=torch.cat([roots[:, None], guesses], dim=1),
            topology=from_parents(self.parents, device=CPU),
        )

    def commit(self, accepted: Accepted) -> None:
        self.told.append((accepted.paths, accepted.emitted))


def begun(parts, num_rows: int = 1, **options) -> CombinedProposer:
    joined = CombinedProposer(parts, **options)
    rows = torch.zeros(num_rows, dtype=torch.long)
    joined.begin(
        Prefill(
            tokens=rows[:, None],
            num_padding=rows,
            first_tokens=rows,
            temperature=0.0,
            max_new_tokens=999,
        )
    )
    return joined


def paths_of(draft: Draft, row: int = 0) -> list[tuple[int, ...]]:
    found = []
    for path in draft.topology.path_indices[row].tolist():
        nodes = [node for node in path if node > 0]
        if nodes:
            found.append(tuple(draft.tokens[row, nodes].tolist()))
    return found


def test_equal_guesses_after_equal_paths_are_one_node():
    first = Fixed([[5, 6, 7]], [[0, 0, 1, 2]])
    second = Fixed([[5, 8, 9, 6]], [[0, 0, 1, 0, 1]])
    joined = begun([first, second])
    draft = joined.propose(torch.tensor([3]), noise=None)
    assert sorted(paths_of(draft)) == [(5,), (5, 6), (5, 6, 7), (5, 8), (9,)]


def test_each_part_is_told_all_tokens_and_its_own_part_of_the_path():
    first = Fixed([[5, 6, 7]], [[0, 0, 1, 2]])
    second = Fixed([[9, 5, 6]], [[0, 0, 0, 2]])
    joined = begun([first, second])
    joined.propose(torch.tensor([3]), noise=None)
    joined.commit(Accepted.from_host([[0, 1, 2, 3]], [[5, 6, 7, 1]], device=CPU))
    assert first.told == [([[0, 1, 2, 3]], [[5, 6, 7, 1]])]
    assert second.told == [([[0, 2, 3]], [[5, 6, 7, 1]])]


def test_rows_are_joined_apart_and_padding_is_left_out():
    first = Fixed([[5, 6], [7, 0]], [[0, 0, 1], [0, 0]])
    second = Fixed([[6], [7]], [[0, 0]])
    draft = begun([first, second], num_rows=2).propose(torch.tensor([1, 2]), noise=None)
    assert sorted(paths_of(draft, 0)) == [(5,), (5, 6), (6,)]
    assert paths_of(draft, 1) == [(7,)]


def test_likeliest_nodes_of_all_parts_are_kept_when_there_are_too_many():
    first = Fixed([[5, 6, 4]], [[0, 0, 1, 2]])
    second = Fixed([[9, 8, 7]], [[0, 0, 1, 2]])
    draft = begun([first, second], num_draft_tokens=4).propose(torch.tensor([1]), noise=None)
    assert sorted(paths_of(draft)) == [(5,), (5, 6), (9,), (9, 8)]


def test_part_that_is_never_right_loses_its_nodes():
    first, second = Fixed([[5, 6]], [[0, 0, 1]]), Fixed([[9, 8]], [[0, 0, 1]])
    joined = begun([first, second], num_draft_tokens=2)
    for _ in range(64):
        draft = joined.propose(torch.tensor([1]), noise=None)
        path = [0, *(1 + draft.tokens[0, 1:].tolist().index(t) for t in (9,) if t in draft.tokens)]
        joined.commit(Accepted.from_host([path], [[9, 8][: len(path)]], device=CPU))
    assert paths_of(joined.propose(torch.tensor([1]), noise=None)) == [(9,), (9, 8)]


def test_ngrams_go_on_below_the_nodes_of_other_parts():
    other = Fixed([[5]], [[0, 0]])
    joined = CombinedProposer([NgramProposer(), other])
    row = torch.tensor([[5, 6, 7, 3]])
    joined.begin(
        Prefill(
            tokens=row,
            num_padding=torch.tensor([0]),
            first_tokens=torch.tensor([2]),
            temperature=0.0,
            max_new_tokens=9,
        )
    )
    assert (5, 6, 7) in paths_of(joined.propose(torch.tensor([2]), noise=None))


def test_features_are_asked_for_when_a_part_needs_them():
    base = shared_model("llama")
    medusa = MedusaProposer(random_heads(), target=base)
    assert CombinedProposer([NgramProposer()]).features == TargetFeatures.NONE
    assert CombinedProposer([NgramProposer(), medusa]).features == TargetFeatures.LAST_HIDDEN


class Keeping(Proposer):
    """Asks for given layers, and keeps what it is given."""

    def __init__(self, *layers: int) -> None:
        self.wanted, self.given = TargetFeatures(layers), []

    @property
    def features(self) -> TargetFeatures:
        return self.wanted

    def begin(self, prompt: Prefill) -> None:
        self.given = [prompt.features]

    def propose(self, roots, *, noise) -> Draft:
        return Draft(roots[:, None], from_parents([[0]], device=CPU))

    def commit(self, accepted: Accepted) -> None:
        self.given.append(accepted.features)


@torch.no_grad()
def test_each_part_is_given_the_hidden_states_that_it_asked_for():
    base = build_model("llama", num_hidden_layers=4)
    parts = [Keeping(3, 1), Keeping(-1), Keeping(), Keeping(1, 2)]
    joined = CombinedProposer(parts)
    assert joined.features == TargetFeatures((1, 2, 3, -1))
    inputs = prompts(6)
    output, _ = generate(SpecModel(base, joined), inputs, max_new_tokens=4, do_sample=False)
    states = base(output, output_hidden_states=True).hidden_states
    for part in parts:
        if not part.wanted.layers:
            assert part.given[0] is None
            continue
        expected = torch.cat([states[layer] for layer in part.wanted.layers], dim=-1)
        found = torch.cat(part.given, dim=1)
        assert torch.allclose(found, expected[:, : found.shape[1]], rtol=1e-4, atol=1e-3)
        assert found.shape[1] >= 8


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_heads_that_read_different_layers_join(settings):
    base = build_model("llama", num_hidden_layers=4)
    options = {**settings, "max_new_tokens": 16}
    inputs = prompts(4, 9, 6)
    expected = generate(base, inputs, **options)
    reference = [row[9:] for row in expected[0].tolist()]
    eagle = EagleProposer(
        heads_for(base, "eagle3", layers=(1, 2, 3)), target=base, min_probability=0.0
    )
    parts = [
        HittingProposer(eagle, reference),
        MedusaProposer(random_heads(), target=base),
        NgramProposer(),
    ]
    # Probabilities of random heads mean nothing.
    spec = SpecModel(base, CombinedProposer(parts, min_probability=0.001))
    found = generate(spec, inputs, **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.tau > 1.5


@pytest.mark.parametrize(
    ("settings", "lengths", "family"),
    turns([{}, {"do_sample": True}], [(9,), (4, 9, 6)], FAMILIES),
)
def test_all_proposers_joined_give_the_tokens_of_plain_decoding(family, settings, lengths):
    base = shared_model(family)
    options = {**settings, "max_new_tokens": 24}
    inputs = prompts(*lengths)
    expected = generate(base, inputs, **options)
    reference = [row[inputs["input_ids"].shape[1] :] for row in expected[0].tolist()]
    parts = [
        NgramProposer(),
        ScriptedProposer(reference, depth=3, wrong_at=[2, 7]),
        MedusaProposer(random_heads(), target=base),
        DraftModelProposer(base, target=base, depth=4, min_confidence=0.0),
    ]
    spec = SpecModel(base, CombinedProposer(parts))
    found = generate(spec, inputs, **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.tau > 2


def test_parts_have_to_be_different_ones():
    ngram = NgramProposer()
    with pytest.raises(OptionError, match="given twice"):
        CombinedProposer([ngram, CombinedProposer([ngram])])


def test_no_part_is_an_error():
    with pytest.raises(OptionError, match="no proposers"):
        CombinedProposer([])


@pytest.mark.parametrize("parts", ["ngram", 3, None, {}])
def test_parts_that_are_no_list_are_refused(parts, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match="expected a list of proposers"):
        CombinedProposer(parts)
    with pytest.raises(OptionError, match="num_draft_tokens is 'a', a str"):
        CombinedProposer([NgramProposer()], num_draft_tokens="a")


def test_description_says_what_parts_hold_and_forgetting_reaches_all_of_them():
    class Learner(Fixed):
        num_forgotten = 0

        def forget(self):
            self.num_forgotten += 1

    lookup, learner = LookupProposer(shared_model("llama")), Learner([[5]], [[0, 0]])
    joined = CombinedProposer([lookup, learner])
    lookup.memory.store([1], [2], np.zeros((1, 8), int), np.zeros((1, 8)))
    assert "memory of 1 tokens and 1 pairs" in joined.describe()
    joined.forget()
    assert "memory of 0 tokens and 0 pairs" in joined.describe()
    assert learner.num_forgotten == 1
