import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance import Accepted

CPU = torch.device("cpu")


@st.composite
def rows_of_tokens(draw):
    return draw(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=4))


def build(rows):
    """Accepted with the given tokens; the path takes every second node."""
    width = max(1, *map(len, rows))
    tokens = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    path = (torch.arange(width) * 2).expand_as(tokens).masked_fill(tokens < 0, -1)
    return Accepted(path=path, tokens=tokens)


def test_lengths_and_bonus_of_mixed_rows():
    accepted = build([[4, 5, 6], [], [7]])
    assert accepted.num_tokens.tolist() == [3, 0, 1]
    assert accepted.accepted_length.tolist() == [2, 0, 0]
    assert accepted.bonus.tolist() == [6, -1, 7]
    assert accepted.paths == [[0, 2, 4], [], [0]]
    assert accepted.emitted == [[4, 5, 6], [], [7]]


@given(rows=rows_of_tokens(), data=st.data())
def test_cut_keeps_a_prefix_of_each_row(rows, data):
    limits = [data.draw(st.integers(0, 6)) for _ in rows]
    accepted = build(rows)
    cut = accepted.cut(limits)
    expected = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    assert cut.emitted == expected
    assert cut.paths == [[2 * step for step in range(len(row))] for row in expected]
    assert cut.num_tokens.tolist() == list(map(len, expected))
    assert cut.bonus.tolist() == [row[-1] if row else -1 for row in expected]
    assert accepted.emitted == rows


def test_cut_that_cuts_nothing_returns_itself():
    accepted = build([[1, 2], [3]])
    assert accepted.cut([2, 5]) is accepted


@given(rows_of_tokens())
def test_host_lists_and_tensors_agree_when_built_from_the_host(rows):
    paths = [list(range(len(row))) for row in rows]
    accepted = Accepted.from_host(paths, rows, device=CPU)
    again = Accepted(path=accepted.path, tokens=accepted.tokens)
    assert again.paths == accepted.paths == paths
    assert again.emitted == accepted.emitted == rows


def test_round_that_emits_nothing_at_all():
    accepted = Accepted.from_host([[], []], [[], []], device=CPU)
    assert accepted.path.shape == (2, 0)
    assert accepted.num_tokens.tolist() == [0, 0]
    assert accepted.bonus.tolist() == [-1, -1]
