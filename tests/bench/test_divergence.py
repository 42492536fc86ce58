import pytest
import torch

from speclm.bench import Divergence, plain_decoder
from speclm.bench.decoders import Call
from speclm.bench.divergence import (
    _log_noise,
    _logits_by_size,
    _process,
    explain,
    first_difference,
)
from speclm.target.chain_session import ChainReader
from tests.models import prompts, shared_model


@pytest.mark.parametrize(
    ("plain", "other", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_first_difference(plain, other, position):
    assert first_difference(plain, other) == position


@pytest.mark.parametrize(("gap", "is_explained"), [(0.4, True), (0.41, False)])
def test_gap_of_four_differences_is_rounding(gap, is_explained):
    found = Divergence(0, 0, 5, 1, 2, gap=gap, logit_difference=0.1)
    assert found.is_explained is is_explained


def test_equal_outputs_have_no_divergence(tiny_base, calls_of):
    (call, *_) = calls_of()
    assert explain(tiny_base, call, index=0, plain=[[1, 2]], other=[[1, 2]]) == []


@pytest.mark.parametrize("setting", ["greedy", "t0.7"])
def test_a_wrong_token_is_located_and_not_explained(tiny_base, calls_of, setting):
    (call,) = calls_of(setting, batch=4)
    plain = plain_decoder(tiny_base).run(call).tokens
    other = [list(row) for row in plain]
    other[2][3] = (other[2][3] + 1) % 4096
    (found,) = explain(tiny_base, call, index=9, plain=plain, other=other)
    assert (found.call, found.row, found.position) == (9, 2, 3)
    assert (found.plain_token, found.token) == (plain[2][3], other[2][3])
    assert found.logit_difference < 1e-3
    assert not found.is_explained


def test_a_missing_token_is_not_explained(tiny_base, calls_of):
    (call, *_) = calls_of()
    (plain,) = plain_decoder(tiny_base).run(call).tokens
    (found,) = explain(tiny_base, call, index=0, plain=[plain], other=[plain[:-1]])
    assert found.token == -1
    assert not found.is_explained


@torch.no_grad()
@pytest.mark.parametrize("setting", ["greedy", "t0.7"])
def test_scores_are_those_that_decided_plain_decoding(tiny_base, calls_of, setting):
    (call,) = calls_of(setting, batch=4)
    plain = plain_decoder(tiny_base).run(call).tokens
    for row, position in [(0, 0), (1, 2), (3, 5)]:
        decoded = plain[row][:position]
        for logits in _logits_by_size(tiny_base, call, row, decoded):
            scores = _process(tiny_base, call, logits)
            if call.is_sampled:
                scores = scores - _log_noise(tiny_base, call, row, position)
            assert int(scores.argmax()) == plain[row][position]


def test_chains_are_compared_at_their_full_length_from_the_first_token_on(monkeypatch):
    fed = []
    feed = ChainReader.feed

    def recorded(self, tokens):
        fed.append(tokens.shape[1])
        return feed(self, tokens)

    monkeypatch.setattr(ChainReader, "feed", recorded)
    base, inputs = shared_model("bloom"), prompts(5)
    call = Call(**inputs, options={"max_new_tokens": 3}, seed=1, eos_token_ids=frozenset())
    plain = plain_decoder(base).run(call).tokens
    wrong = [[*plain[0][:1], plain[0][1] ^ 1, *plain[0][2:]]]
    explain(base, call, index=0, plain=plain, other=wrong)
    assert fed[-4:] == [2, 4, 8, 16]
