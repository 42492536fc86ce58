"""The rows of a batch: where they end, how far they may run ahead, what is returned."""

import pytest
import torch

from speclm.acceptance import Accepted
from speclm.config import MAX_LEAD
from speclm.generation.sequences import Rows

CPU = torch.device("cpu")


def accepted(*rows: list[int]) -> Accepted:
    """Return what a round accepted along a chain in every row."""
    return Accepted.from_host([list(range(len(row))) for row in rows], list(rows), device=CPU)


def started(batch: int, *, max_new_tokens: int = 100, eos: tuple[int, ...] = (9,)) -> Rows:
    rows = Rows(batch=batch, max_new_tokens=max_new_tokens, eos_token_ids=eos)
    for row in range(batch):
        rows.extend(row, [1])
    return rows


def test_tokens_are_appended_row_by_row():
    rows = started(2)
    taken = rows.admit(accepted([2, 3], [4]))
    assert taken.emitted == [[2, 3], [4]]
    assert rows.tokens == [[1, 2, 3], [1, 4]]
    assert rows.num_tokens == [3, 2]
    assert rows.num_steps == 3
    assert rows.most_remaining == 98
    assert rows.is_live == [True, True]


def test_row_is_cut_behind_its_end_token():
    rows = started(2)
    taken = rows.admit(accepted([2, 9, 5, 6], [3, 4, 5]))
    assert taken.emitted == [[2, 9], [3, 4, 5]]
    assert taken.paths == [[0, 1], [0, 1, 2]]
    assert taken.bonus.tolist() == [9, 5]
    assert rows.is_live == [False, True]


@pytest.mark.parametrize("end", [8, 9])
def test_any_end_token_ends_a_row(end):
    rows = started(1, eos=(8, 9))
    rows.admit(accepted([end]))
    assert not rows.any_live


def test_first_token_may_end_a_row():
    rows = Rows(batch=2, max_new_tokens=5, eos_token_ids=[9])
    rows.extend(0, [9])
    rows.extend(1, [3])
    assert rows.is_live == [False, True]


def test_ended_rows_are_given_nothing():
    rows = started(2)
    rows.admit(accepted([9], [2]))
    taken = rows.admit(accepted([5, 6], [3]))
    assert taken.emitted == [[], [3]]
    assert taken.paths == [[], [0]]
    assert taken.bonus.tolist() == [-1, 3]
    assert rows.tokens == [[1, 9], [1, 2, 3]]


def test_rows_end_at_the_bound():
    rows = started(2, max_new_tokens=3)
    assert rows.admit(accepted([2, 3, 4], [5])).emitted == [[2, 3], [5]]
    assert rows.is_live == [False, True]
    assert rows.most_remaining == 1
    rows.admit(accepted([7], [6, 7]))
    assert rows.tokens == [[1, 2, 3], [1, 5, 6]]
    assert not rows.any_live
    assert rows.most_remaining == 0


def test_bound_of_zero_has_no_live_row():
    assert not Rows(batch=2, max_new_tokens=0, eos_token_ids=[]).any_live


def test_fast_row_waits_for_the_slowest_live_row():
    rows = started(3, max_new_tokens=1000)
    rows.admit(accepted([2], [2], [9]))
    for _ in range(2):
        rows.admit(accepted([3] * MAX_LEAD, [3], [3]))
    ahead = rows.num_tokens[0] - (rows.num_tokens[1] - 1)
    assert ahead == MAX_LEAD
    taken = rows.admit(accepted([4, 4], [4, 4], []))
    assert [len(row) for row in taken.emitted] == [1, 2, 0]
    rows.admit(accepted([5], [9], []))  # an ended row holds nobody back
    assert len(rows.admit(accepted([6] * 50, [], [])).emitted[0]) == 50


def test_sequences_are_padded_on_the_right():
    rows = started(2)
    rows.admit(accepted([2, 3], [9]))
    prompt = torch.tensor([[7, 7], [0, 7]])
    assert rows.sequences(prompt, 0).tolist() == [[7, 7, 1, 2, 3], [0, 7, 1, 9, 0]]
