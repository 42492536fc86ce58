"""Stop strings end each row by itself, at the token at which regular generation ends it."""

import random

import pytest
import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from speclm import SpecModel
from speclm.generation.stop_strings import StopStrings
from speclm.testing import ScriptedProposer
from tests.models import prompts
from tests.outcomes import observe, require_same
from tests.settings import GREEDY, SAMPLED, tiny_model, tokenizer


@pytest.mark.parametrize("length", [0, 2, 40])
def test_rows_stop_where_the_criterion_stops_them_token_by_token(length):
    dice = random.Random(length)
    common = tokenizer().encode("SELECT name FROM city", add_special_tokens=False)
    criterion = StopStringCriteria(tokenizer=tokenizer(), stop_strings=["name FR", "city"])
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
