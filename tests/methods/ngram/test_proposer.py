import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance import Accepted
from speclm.drafting.interface import Draft, Prefill
from speclm.drafting.levels import least_probability
from speclm.errors import OptionError
from speclm.methods.ngram.proposer import NgramProposer


def begin(proposer, *prompts, firsts, ends=()):
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[99] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    proposer.begin(
        Prefill(
            tokens=torch.tensor(rows, dtype=torch.long).reshape(len(prompts), width),
            num_padding=torch.tensor(padding),
            first_tokens=torch.tensor(firsts),
            temperature=0.0,
            max_new_tokens=100,
            eos_token_ids=frozenset(ends),
        )
    )


def commit(proposer, *emitted):
    width = max(1, *map(len, emitted))
    tokens = torch.tensor([row + [-1] * (width - len(row)) for row in emitted])
    path = torch.arange(width).expand_as(tokens).masked_fill(tokens < 0, -1)
    proposer.commit(Accepted(path=path, tokens=tokens))


def propose(proposer, *roots) -> Draft:
    return proposer.propose(torch.tensor(roots), noise=None)


def paths(draft, row=0):
    """Token paths from below the root to every node of a row."""
    topology = draft.topology
    row_of_shape = row if topology.parents.shape[0] > 1 else 0
    indices = [
        [node for node in path if node >= 0]
        for path in topology.path_indices[row_of_shape].tolist()
    ]
    return [tuple(draft.tokens[row, path[1:]].tolist()) for path in indices if len(path) > 1]


def test_it_copies_what_followed_the_prompt_before():
    proposer = NgramProposer(num_draft_tokens=3)
    begin(proposer, [1, 2, 3, 4, 5, 6, 1], firsts=[2])
    draft = propose(proposer, 2)
    assert draft.tokens.tolist() == [[2, 3, 4, 5]]
    assert draft.topology.depths.tolist() == [[0, 1, 2, 3]]


def test_root_alone_where_nothing_matches():
    proposer = NgramProposer()
    begin(proposer, [1, 2, 3], firsts=[4])
    draft = propose(proposer, 4)
    assert draft.tokens.tolist() == [[4]]
    assert draft.topology.num_nodes == 1


def test_rows_without_a_match_share_one_node_topology():
    proposer = NgramProposer()
    begin(proposer, [1, 2, 3], [5, 6], firsts=[4, 7])
    draft = propose(proposer, 4, 7)
    assert draft.tokens.tolist() == [[4], [7]]
    assert draft.topology.parents.tolist() == [[0]]


def test_longest_match_wins_over_a_more_recent_shorter_one():
    proposer = NgramProposer(num_draft_tokens=1)
    begin(proposer, [8, 1, 2, 30, 9, 2, 40, 8, 1], firsts=[2])
    assert paths(propose(proposer, 2)) == [(30,)]


def test_continuations_of_distinct_matches_become_branches():
    proposer = NgramProposer(min_probability=0.05)
    begin(proposer, [7, 1, 2, 8, 1, 3, 9], firsts=[1])
    assert {path[0] for path in paths(propose(proposer, 1))} == {2, 3}


def test_committed_tokens_are_looked_up_too():
    proposer = NgramProposer(num_draft_tokens=2)
    begin(proposer, [1, 2], firsts=[3])
    commit(proposer, [4, 5, 6])
    commit(proposer, [3])
    assert propose(proposer, 3).tokens.tolist() == [[3, 4, 5]]


def test_nothing_is_copied_from_behind_the_end_of_a_text():
    proposer = NgramProposer(num_draft_tokens=3)
    begin(proposer, [1, 2, 3, 4, 5, 6, 1], firsts=[2], ends=[4])
    assert propose(proposer, 2).tokens.tolist() == [[2, 3, 4]]


def test_copy_goes_on_around_a_period():
    proposer = NgramProposer(num_draft_tokens=7)
    begin(proposer, [1, 2, 3] * 5 + [1], firsts=[2])
    assert propose(proposer, 2).tokens.tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]]


def test_padding_is_not_part_of_the_text():
    proposer = NgramProposer()
    begin(proposer, [5, 6], [1, 2, 3, 4, 1], firsts=[99, 2])
    draft = propose(proposer, 99, 2)
    assert paths(draft, 0) == []
    assert paths(draft, 1)[0] == (3,)


def test_waiting_row_drafts_the_root_alone():
    proposer = NgramProposer(num_draft_tokens=2)
    begin(proposer, [1, 2, 3, 1], [1, 2, 3, 1], firsts=[2, 2])
    commit(proposer, [3, 1], [])
    draft = propose(proposer, 1, 2)
    assert paths(draft, 0) == [(2,), (2, 3)]
    assert paths(draft, 1) == []
    assert draft.tokens[:, 0].tolist() == [1, 2]


def test_failing_copies_shorten_the_drafts():
    proposer = NgramProposer()
    text = [token for word in range(40) for token in (word, 100 + word, 200 + word, 300 + word)]
    begin(proposer, text, firsts=[0])
    before = len(paths(propose(proposer, 0)))
    for word in range(1, 40):  # it never continues as the prompt did
        propose(proposer, word - 1)
        commit(proposer, [500 + word, word])
    assert len(paths(propose(proposer, 39))) < before


def test_begin_forgets_the_last_generation():
    proposer = NgramProposer()
    begin(proposer, [1, 2, 3, 1], firsts=[2])
    begin(proposer, [7, 8], firsts=[2])
    assert propose(proposer, 2).tokens.tolist() == [[2]]


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=3),
    rounds=st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=4), max_size=4),
    num_draft_tokens=st.integers(1, 12),
)
def test_drafts_are_trees_without_twins_and_a_row_does_not_see_the_others(
    rows, rounds, num_draft_tokens
):
    together = NgramProposer(num_draft_tokens=num_draft_tokens, min_probability=0.01)
    price = least_probability(0.01, num_rows=len(rows))  # nodes are dearer in a batch
    alone = NgramProposer(num_draft_tokens=num_draft_tokens, min_probability=price)
    begin(together, *rows, firsts=[0] * len(rows))
    begin(alone, rows[0], firsts=[0])
    root = 0
    for emitted in rounds:
        commit(together, *[emitted] * len(rows))
        commit(alone, emitted)
        root = emitted[-1] if emitted else root
        draft = propose(together, *[root] * len(rows))
        assert draft.tokens[:, 0].tolist() == [root] * len(rows)
        assert draft.topology.num_nodes <= num_draft_tokens + 1
        assert paths(draft) == paths(propose(alone, root))
        assert len(set(paths(draft))) == len(paths(draft))


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_draft_tokens", 0), ("max_ngram", 17), ("min_probability", 0.0)],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(OptionError, match=rf"{option} is {value}.*expected"):
        NgramProposer(**{option: value})


@pytest.mark.parametrize("name", ["num_draft_tokens", "max_ngram", "min_probability"])
@pytest.mark.parametrize("wrong", ["a", None, [1]])
def test_options_of_the_wrong_type_are_named(name, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=f"is .*, a {type(wrong).__name__}, expected a") as caught:
        NgramProposer(**{name: wrong})
    assert str(caught.value).startswith(name)
