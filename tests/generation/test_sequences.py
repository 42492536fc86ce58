"""The rows of a batch: where they end, how far they may run ahead, what is returned."""

import random

import pytest
import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.config import MAX_LEAD
from speclm.generation.sequences import Sequences, StopStrings
from speclm.testing import ScriptedProposer
from tests.models import prompts
from tests.outcomes import observe, require_same
from tests.settings import GREEDY, SAMPLED, tiny_model, tokenizer

CPU = torch.device("cpu")


def accepted(*rows: list[int]) -> Accepted:
    """Return what a round accepted along a chain in every row."""
    return Accepted.from_host([list(range(len(row))) for row in rows], list(rows), device=CPU)


def started(batch: int, *, max_new_tokens: int = 100, eos: tuple[int, ...] = (9,)) -> Sequences:
    rows = Sequences(batch=batch, max_new_tokens=max_new_tokens, eos_token_ids=eos)
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
    rows = Sequences(batch=2, max_new_tokens=5, eos_token_ids=[9])
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
    assert not Sequences(batch=2, max_new_tokens=0, eos_token_ids=[]).any_live


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
    assert rows.to_tensor(prompt, 0).tolist() == [[7, 7, 1, 2, 3], [0, 7, 1, 9, 0]]


@pytest.mark.parametrize(
    ("length", "words"),
    [(0, ["name FR", "city"]), (2, ["name FR", "city"]), (40, ["name FR", "city"]), (2, [""])],
)
def test_rows_stop_where_the_criterion_stops_them_token_by_token(length, words):
    dice = random.Random(length)
    common = tokenizer().encode("SELECT name FROM city", add_special_tokens=False)
    criterion = StopStringCriteria(tokenizer=tokenizer(), stop_strings=words)
    prompt = torch.tensor([[dice.choice(common) for _ in range(length)] for _ in range(4)])
    prompt = prompt.view(4, length).long()
    before = [[dice.choice(common) for _ in range(row)] for row in range(4)]
    emitted = [[dice.choice(common) for _ in range(9)] for _ in range(4)]
    expected = {}
    for row, new in enumerate(emitted):
        for count in range(len(new), 0, -1):
            text = torch.tensor([prompt[row].tolist() + before[row] + new[:count]])
            if bool(criterion(text, None)):
                expected[row] = count
    assert StopStrings([criterion], prompt).first_stops(before, emitted) == expected
    assert expected


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_a_batch_run_ahead_of_each_other_and_end_by_themselves(mode):
    base, inputs = tiny_model("text"), prompts(7, 4, 5, vocab_size=60)
    free = observe(base, inputs, {"max_new_tokens": 24, **mode}, base=base).new_tokens(inputs)
    word = tokenizer().decode(free[1][9:11])
    arguments = {"max_new_tokens": 24, "tokenizer": tokenizer(), "stop_strings": [word], **mode}
    expected = observe(base, inputs, arguments, base=base)
    assert expected.new_tokens(inputs) != free
    # Rows whose drafts are wrong at other tokens, which a lockstep would have wait for each other.
    spec = SpecModel(base, RaggedProposer(free, depth=4))
    require_same(observe(spec, inputs, arguments, base=base), expected)
    assert spec.last_speculation.rounds < 24
    assert len({tuple(row.accepted_lengths) for row in spec.last_speculation.rows}) > 1


def test_without_an_end_token_rows_end_together():
    base, inputs = tiny_model("text without eos"), prompts(7, 4, vocab_size=60)
    free = observe(base, inputs, {"max_new_tokens": 20, **GREEDY}, base=base).new_tokens(inputs)
    words = [tokenizer().decode(free[0][4:6]), tokenizer().decode(free[1][11:13])]
    arguments = {"max_new_tokens": 20, "tokenizer": tokenizer(), "stop_strings": words, **GREEDY}
    expected = observe(base, inputs, arguments, base=base)
    spec = SpecModel(base, ScriptedProposer(free, depth=4))
    require_same(observe(spec, inputs, arguments, base=base), expected)


class RaggedProposer(ScriptedProposer):
    """Is wrong at every token of the first row, and right in all others."""

    def propose(self, roots, *, noise):
        draft = super().propose(roots, noise=noise)
        draft.tokens[0, 1:] = (draft.tokens[0, 1:] + 1) % 60
        return draft
