import torch

from speclm.drafting.interface import Draft
from speclm.drafting.sources import DraftSource
from speclm.tree.topology import from_parents


def draft(tokens, parents, probs=None) -> Draft:
    return Draft(
        tokens=torch.tensor(tokens),
        topology=from_parents(parents, device=torch.device("cpu")),
        node_probs=probs,
    )


def tokens_at(source: DraftSource, row: int, *path: int) -> list[int] | None:
    state = source.root(row)
    for token in path:
        state = source.advance(state, token)
        if state is None:
            return None
    return [token for token, _ in source.candidates(state, None)]


def test_trees_of_each_row_are_followed_by_their_tokens():
    source = DraftSource()
    source.take(draft([[1, 5, 6, 7], [2, 8, 9, 0]], [[0, 0, 1, 0], [0, 0, 1, 3]]))
    assert tokens_at(source, 0) == [5, 7]
    assert tokens_at(source, 0, 5) == [6]
    assert tokens_at(source, 0, 5, 6) == []
    assert tokens_at(source, 0, 9) is None
    assert tokens_at(source, 1) == [8]  # the last node of row 1 is padding


def test_trees_of_one_shape_are_read_for_every_row():
    source = DraftSource()
    source.take(draft([[1, 5], [2, 8]], [[0, 0]]))
    assert [tokens_at(source, row) for row in range(2)] == [[5], [8]]


def test_equal_siblings_count_once():
    source = DraftSource()
    source.take(draft([[1, 5, 5]], [[0, 0, 0]]))
    assert tokens_at(source, 0) == [5]


def test_likelier_tokens_have_keys_of_higher_rates():
    source = DraftSource()
    source.take(draft([[1, 5, 6, 7]], [[0, 0, 0, 0]], [[1.0, 0.96, 0.4, 0.001]]))
    keys = [key for _, key in source.candidates(source.root(0), None)]
    rates = [source.start_rates[key] for key in keys]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3


def test_path_is_what_the_proposer_drafted_itself():
    source = DraftSource()
    source.take(draft([[1, 5, 6, 7]], [[0, 0, 1, 0]]))
    assert source.path(0, [5, 6, 3]) == [0, 1, 2]
    assert source.path(0, [7, 6, 3]) == [0, 3]
    assert source.path(0, [4]) == [0]
    assert source.path(0, []) == []


def test_dropped_trees_say_nothing():
    source = DraftSource()
    source.take(draft([[1, 5]], [[0, 0]]))
    assert source.root(0) is not None
    source.drop()
    assert source.root(0) is None
