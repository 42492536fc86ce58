import copy

import pytest
import torch

from speclm.bench import assisted_decoder, plain_decoder, prompt_lookup_decoder, speculative_decoder
from speclm.bench.decoders import until_end
from speclm.methods.ngram.proposer import NgramProposer


def test_tokens_end_with_the_first_end_of_sequence():
    assert until_end([5, 2, 7, 2], frozenset({2})) == [5, 2]
    assert until_end([5, 7], frozenset({2})) == [5, 7]


@pytest.mark.parametrize("setting", ["greedy", "t1.0"])
@pytest.mark.parametrize("batch", [1, 4])
def test_speculative_method_gives_the_tokens_of_plain(tiny_base, calls_of, setting, batch):
    plain, ours = plain_decoder(tiny_base), speculative_decoder("ngram", tiny_base, NgramProposer())
    for call in calls_of(setting, batch=batch):
        assert ours.run(call).tokens == plain.run(call).tokens


def test_method_seeds_every_call(tiny_base, calls_of):
    (call, *_) = calls_of("t1.0")
    plain = plain_decoder(tiny_base)
    first = plain.run(call).tokens
    torch.rand(7)
    assert plain.run(call).tokens == first


def test_outcome_counts_tokens_and_time(tiny_base, calls_of):
    (call,) = calls_of(batch=4)
    outcome = speculative_decoder("none", tiny_base, None).run(call)
    assert outcome.num_tokens == sum(map(len, outcome.tokens))
    assert outcome.tokens_per_second == outcome.num_tokens / outcome.seconds
    assert outcome.stats is not None
    assert len(outcome.stats.rows) == 4
    assert plain_decoder(tiny_base).run(call).stats is None


def test_baselines_decode_greedily_like_plain_and_take_one_prompt(tiny_base, calls_of):
    (call, *_) = calls_of()
    expected = plain_decoder(tiny_base).run(call).tokens
    for method in (
        prompt_lookup_decoder(tiny_base),
        assisted_decoder(tiny_base, copy.deepcopy(tiny_base)),
    ):
        assert method.run(call).tokens == expected
        assert method.can_run(1)
        assert not method.can_run(2)
        assert not method.promises_identity


def test_assistant_is_left_as_it_was(tiny_base, calls_of):
    (call, *_) = calls_of()
    assistant = copy.deepcopy(tiny_base)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    before = assistant.generation_config.to_dict()
    method = assisted_decoder(tiny_base, assistant)
    method.run(call)
    assert assistant.generation_config.to_dict() == before
