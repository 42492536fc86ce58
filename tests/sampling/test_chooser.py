"""Choosing a token as `generate` chooses it."""

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from speclm.sampling import TokenChooser, first_text_dependent
from speclm.sampling.chooser import CONTEXT_FREE, LENGTH_DEPENDENT, Truncation, pick

LOGITS = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
WARPERS = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)]


class OwnTemperature(TemperatureLogitsWarper):
    """May look at anything."""


def test_greedy_is_the_argmax_of_processed_scores():
    banned = LOGITS.argmax(-1).unique().tolist()
    chooser = TokenChooser([SuppressTokensLogitsProcessor(banned)], is_greedy=True)
    scores = LOGITS.clone()
    scores[:, banned] = -torch.inf
    assert torch.equal(chooser.choose(LOGITS, None), scores.argmax(-1))


@pytest.mark.parametrize("warpers", [[], WARPERS])
@pytest.mark.parametrize("seed", range(5))
def test_sampling_equals_multinomial_under_the_same_seed(warpers, seed):
    scores = LOGITS
    for warper in warpers:
        scores = warper(None, scores)
    torch.manual_seed(seed)
    expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    noise = torch.empty(LOGITS.shape).exponential_(1)
    found = TokenChooser(warpers, is_greedy=False).choose(LOGITS, noise)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_are_chosen_independently():
    chooser = TokenChooser(WARPERS, is_greedy=False)
    noise = torch.empty(LOGITS.shape).exponential_(generator=torch.Generator().manual_seed(1))
    together = chooser.choose(LOGITS, noise)
    for row in range(len(LOGITS)):
        alone = chooser.choose(LOGITS[row : row + 1], noise[row : row + 1])
        assert alone.tolist() == [together[row].item()]


def test_halves_are_processed_in_single_precision():
    chooser = TokenChooser(WARPERS, is_greedy=False)
    noise = torch.empty(LOGITS.shape).exponential_(generator=torch.Generator().manual_seed(1))
    halves = LOGITS.bfloat16()
    assert torch.equal(chooser.choose(halves, noise), chooser.choose(halves.float(), noise))


@pytest.mark.parametrize("greedy", [True, False])
def test_nan_is_reported_in_its_row_alone(greedy):
    logits = LOGITS.clone()
    logits[2, 7] = torch.nan
    noise = None if greedy else torch.ones_like(logits)
    chosen = TokenChooser([], is_greedy=greedy).choose(logits, noise)
    assert chosen[2] == -1
    assert (chosen[[0, 1, 3, 4, 5]] >= 0).all()


def test_the_callers_logits_are_left_alone():
    kept = LOGITS.clone()
    TokenChooser(WARPERS, is_greedy=True).choose(LOGITS, None)
    assert torch.equal(LOGITS, kept)


def test_the_first_processor_that_may_read_the_text_is_found():
    assert first_text_dependent([*WARPERS, MinLengthLogitsProcessor(2, 0)]) is None
    assert first_text_dependent([]) is None
    repetition, own = RepetitionPenaltyLogitsProcessor(1.2), OwnTemperature(0.5)
    assert first_text_dependent([*WARPERS, repetition, own]) is repetition
    assert first_text_dependent([own]) is own


def test_biases_read_the_text_where_they_are_for_more_than_one_token():
    single, pair = NoBadWordsLogitsProcessor([[3]]), NoBadWordsLogitsProcessor([[3], [1, 2]])
    assert first_text_dependent([single]) is None
    assert first_text_dependent([pair]) is pair


def test_length_dependent_processors_see_the_length_of_each_row():
    likeliest = int(LOGITS[0].argmax())
    chooser = TokenChooser([MinLengthLogitsProcessor(4, likeliest)], is_greedy=True)
    assert chooser.reads_lengths
    found = chooser.choose(LOGITS[:1].expand(3, -1), None, lengths=[3, 4, 5])
    assert (found == likeliest).tolist() == [False, True, True]


def test_classes_told_by_name_are_processors():
    assert all(
        issubclass(processor, LogitsProcessor) for processor in CONTEXT_FREE | LENGTH_DEPENDENT
    )


def test_keys_tell_settings_apart_by_class_and_numbers():
    def key(*warpers):
        return TokenChooser(list(warpers), is_greedy=False).key

    warm, nucleus = TemperatureLogitsWarper, TopPLogitsWarper
    assert key(warm(0.7), nucleus(0.9)) == key(warm(0.7), nucleus(0.9))
    found = {key(warm(0.7)), key(warm(0.8)), key(nucleus(0.9)), key(warm(0.7), nucleus(0.9))}
    assert len(found) == 4


def test_truncation_is_told_in_numbers():
    def truncation(*warpers):
        return TokenChooser(list(warpers), is_greedy=False).truncation

    assert truncation(TemperatureLogitsWarper(0.8)) is None
    assert truncation(*WARPERS) == Truncation(top_k=20, top_p=0.9)
    assert truncation(MinPLogitsWarper(0.1)) == Truncation(min_p=0.1)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_known_processors_keep_single_precision_whatever_the_default_is(default):
    known = [
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.1),
        TopHLogitsWarper(0.5),
        TypicalLogitsWarper(0.9),
        EpsilonLogitsWarper(0.01),
        EtaLogitsWarper(0.01, device="cpu"),
        LogitNormalization(),
        InfNanRemoveLogitsProcessor(),
        SuppressTokensLogitsProcessor([3]),
        MinLengthLogitsProcessor(3, 7, device="cpu"),
        MinNewTokensLengthLogitsProcessor(1, 3, 7, device="cpu"),
        ForcedBOSTokenLogitsProcessor(4),
        ForcedEOSTokenLogitsProcessor(3, 7, device="cpu"),
        SuppressTokensAtBeginLogitsProcessor([4], 2, device="cpu"),
        ExponentialDecayLengthPenalty((1, 1.2), 7, 1),
    ]
    # Those of biases fail under other defaults, in regular generation too.
    assert {type(processor) for processor in known} == CONTEXT_FREE | LENGTH_DEPENDENT
    torch.set_default_dtype(default)
    try:
        processed = {type(p): p(torch.ones(6, 2).long(), LOGITS.clone()) for p in known}
    finally:
        torch.set_default_dtype(torch.float32)
    assert {scores.dtype for scores in processed.values()} == {torch.float32}


def test_a_probability_over_noise_that_are_both_zero_in_half_precision_win_as_in_multinomial():
    scores = torch.tensor([[0.0, -40.0, 0.0]], dtype=torch.float16)
    noise = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float16)
    assert pick(scores, noise).tolist() == [1]
