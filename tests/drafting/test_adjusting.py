"""Scores of drafts are processed as the target's, as far as its processors are known."""

import pytest
import torch
from transformers.generation import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

from speclm import SpecModel
from speclm.drafting.interface import Prefill
from speclm.drafting.ranking import ScoreAdjuster
from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.sampling import TokenChooser
from tests.models import prompts, shared_model

VOCAB = 12
TOKENS = torch.tensor([[0, 1, 2], [3, 1, 1]])
ROOTS = torch.tensor([4, 2])
LOGITS = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
NODES = (torch.tensor([[5, 6, 1], [1, 7, 2]]), torch.zeros(2, 3, dtype=torch.long))
BELOW = (torch.tensor([[8, 1, 2], [1, 2, 2]]), torch.tensor([[2, 0, 0], [1, 1, 2]]))


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise AssertionError("a draft may not call it")


def begun(*processors, vocab_size=None):
    adjuster = ScoreAdjuster(vocab_size)
    chooser = TokenChooser(list(processors), is_greedy=True)
    padding = torch.zeros(2, dtype=torch.long)
    adjuster.begin(Prefill(TOKENS, padding, ROOTS, 0.0, 9, chooser=chooser))
    return adjuster


def ngrams():
    return NoRepeatNGramLogitsProcessor(2)


def penalty():
    return RepetitionPenaltyLogitsProcessor(1.7)


def bad_words():
    return NoBadWordsLogitsProcessor([[7], [5, 8], [1, 9]])


def length():
    return MinLengthLogitsProcessor(6, 3, device="cpu")


@pytest.mark.parametrize("build", [ngrams, penalty, bad_words, length])
def test_each_node_gets_what_the_target_gives_to_its_text(build):
    adjuster = begun(TemperatureLogitsWarper(0.5), Unknown(), build())
    adjuster.adjust(LOGITS[:, :1], depth=0, nodes=None, columns=None)
    adjuster.extend([[9], [5]])
    text = torch.cat([TOKENS, ROOTS[:, None], torch.tensor([[9], [5]])], dim=1)
    adjuster.adjust(LOGITS[:, :1], depth=0, nodes=None, columns=None)
    adjuster.adjust(LOGITS, depth=1, nodes=NODES, columns=None)
    found = adjuster.adjust(LOGITS, depth=2, nodes=BELOW, columns=None)
    tokens, parents = BELOW
    for row in range(2):
        for node in range(3):
            path = [NODES[0][row, parents[row, node]], tokens[row, node]]
            whole = torch.cat([text[row], torch.stack(path)])[None]
            expected = build()(whole, LOGITS[row, node][None].clone())
            assert torch.equal(found[row, node], expected[0])


def test_rows_of_different_lengths_are_told_apart_where_only_lengths_are_read():
    adjuster = begun(length())
    adjuster.extend([[9, 8], []])
    found = adjuster.adjust(LOGITS, depth=0, nodes=None, columns=None)
    assert found[:, 0, 3].isinf().tolist() == [False, True]


def test_a_draft_that_does_not_see_its_path_is_spared_what_reads_the_order():
    adjuster = begun(ngrams(), bad_words(), penalty())
    adjuster.adjust(LOGITS[:, :1], depth=0, nodes=None, columns=None)
    found = adjuster.adjust(LOGITS[:, :1], depth=1, nodes=None, columns=None)
    text = torch.cat([TOKENS, ROOTS[:, None]], dim=1)
    assert torch.equal(found[:, 0], penalty()(text, LOGITS[:, 0].clone()))


def test_columns_of_a_smaller_vocabulary_get_what_their_tokens_get():
    columns = torch.tensor([1, 3, 7])
    adjuster = begun(SuppressTokensLogitsProcessor([3]), vocab_size=VOCAB)
    found = adjuster.adjust(LOGITS[..., :3], depth=0, nodes=None, columns=columns)
    assert torch.equal(found[..., [0, 2]], LOGITS[..., [0, 2]])
    assert found[..., 1].isinf().all()


def test_nothing_is_done_without_known_processors():
    adjuster = begun(TemperatureLogitsWarper(0.5), Unknown())
    assert not adjuster.is_needed
    assert adjuster.adjust(LOGITS, depth=0, nodes=None, columns=None) is LOGITS


SETTINGS = {
    "suppressed": {"suppress_tokens": list(range(0, 120, 2))},
    "penalty": {"repetition_penalty": 1.8},
    "n-grams": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[token] for token in range(1, 120, 2)] + [[4, 6], [120, 2]]},
}


CHAIN = {
    DraftModelProposer: {"branches": 1, "min_probability": 0.0},
    ChainDraftProposer: {"num_draft_tokens": 3},
}


@pytest.mark.parametrize("kind", CHAIN)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_draft_that_equals_the_target_is_right_under_the_targets_processors(kind, setting):
    base = shared_model("llama")
    proposer = kind(base, target=base, depth=3, min_confidence=0.0, **CHAIN[kind])
    spec = SpecModel(base, proposer)
    arguments = {"do_sample": False, "max_new_tokens": 13, **SETTINGS[setting]}
    expected = base.generate(**prompts(6, 4), **arguments)
    assert torch.equal(spec.generate(**prompts(6, 4), **arguments), expected)
    for row in spec.last_speculation.rows:
        assert row.accepted_lengths[:-1] == [3, 3]  # the last one meets the end
