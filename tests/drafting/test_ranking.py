"""Ranking by the draft's distribution and the noise, after the target's processors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.drafting.interface import Prefill
from speclm.drafting.mixture import ROUNDS_PER_UPDATE, Mixture
from speclm.drafting.ranking import (
    LevelRanking,
    ScoreAdjuster,
    chain_expansions,
    mixture_log_probs,
    path_expansions,
    truncate,
)
from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.sampling import TokenChooser
from speclm.sampling.chooser import Truncation
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import GrownRow
from tests.models import generate, prompts, shared_model

LOGITS = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
NOISE = torch.empty(2, 11).exponential_(generator=torch.Generator().manual_seed(1))

mixtures = st.builds(
    Mixture,
    weight=st.floats(0.0, 1.0),
    draft_exponent=st.floats(0.25, 4.0),
    noise_exponent=st.floats(0.25, 4.0),
    plain_exponent=st.floats(0.25, 4.0),
)


def rank_log_probs(logits, *, temperature, noise, mixture=None):
    log_probs = (logits / temperature).log_softmax(-1)
    return mixture_log_probs(log_probs, noise[:, None], mixture or Mixture())


def test_greedy_ranks_by_the_drafts_own_distribution_in_single_precision():
    ranking = begun(temperature=0.3)
    assert torch.equal(ranking.rank(LOGITS, depth=0, noise=None), LOGITS.log_softmax(-1))
    assert ranking.rank(LOGITS.bfloat16(), depth=0, noise=None).dtype == torch.float32


def test_the_order_is_that_of_the_ranks_and_needs_no_sums_without_noise():
    ranking, noise = begun(), position_noise()
    assert ranking.order(LOGITS, depth=0, noise=None) is LOGITS
    ranks = ranking.rank(LOGITS, depth=0, noise=noise)
    assert torch.equal(ranking.order(LOGITS, depth=0, noise=noise), ranks)


@given(mixture=mixtures, temperature=st.floats(0.3, 2.0))
def test_sampled_ranking_is_a_distribution(mixture, temperature):
    ranked = rank_log_probs(LOGITS, temperature=temperature, noise=NOISE, mixture=mixture)
    assert torch.allclose(ranked.exp().sum(-1), torch.ones(2, 3), atol=1e-5)


@given(mixture=mixtures, temperature=st.floats(0.5, 2.0))
def test_sampled_ranking_is_the_mixture_by_hand(mixture, temperature):
    distribution = (LOGITS.double() / temperature).softmax(-1)
    coupled = (
        distribution**mixture.draft_exponent / NOISE.double()[:, None] ** mixture.noise_exponent
    )
    plain = distribution**mixture.plain_exponent
    expected = mixture.weight * coupled / coupled.sum(-1, keepdim=True)
    expected += (1 - mixture.weight) * plain / plain.sum(-1, keepdim=True)
    ranked = rank_log_probs(LOGITS, temperature=temperature, noise=NOISE, mixture=mixture)
    assert torch.allclose(ranked.exp().double(), expected, atol=2e-5)


def test_draft_with_the_targets_distribution_ranks_the_targets_token_first():
    generator = torch.Generator().manual_seed(2)
    noise = torch.empty(500, 11).exponential_(generator=generator)
    logits = torch.randn(500, 1, 11, generator=generator)
    chosen = (logits[:, 0].softmax(-1) / noise).argmax(-1)
    coupled = rank_log_probs(logits, temperature=1.0, noise=noise)[:, 0].argmax(-1)
    plain = logits[:, 0].argmax(-1)
    assert (coupled == chosen).float().mean() > 0.9
    assert (plain == chosen).float().mean() < 0.6


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(top_k=4),
        Truncation(top_p=0.7),
        Truncation(min_p=0.2),
        Truncation(top_k=5, top_p=0.8, min_p=0.05),
        Truncation(top_k=500),
        Truncation(top_p=0.0),
        Truncation(top_k=3, top_p=0.0),
        Truncation(min_p=1.0),
    ],
)
def test_drafts_are_cut_as_the_targets_distribution_would_be(truncation):
    warpers = [
        kind(getattr(truncation, name))
        for name, kind in (
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
        )
        if getattr(truncation, name) is not None
    ]
    expected = LOGITS.log_softmax(-1).flatten(0, 1)
    for warper in warpers:
        expected = warper(None, expected)
    found = truncate(LOGITS.log_softmax(-1), truncation)
    assert torch.equal(found.flatten(0, 1).isinf(), expected.isinf())
    ranked = mixture_log_probs(found, NOISE[:, None], Mixture())
    assert torch.equal(ranked.isinf(), found.isinf())
    assert torch.allclose(ranked.exp().sum(-1), torch.ones(2, 3), atol=1e-5)


def test_where_the_cut_is_far_away_nothing_is_cut():
    flat = torch.zeros(1, 1, 4000).log_softmax(-1)
    assert torch.equal(truncate(flat, Truncation(top_p=0.9)), flat)
    assert torch.equal(truncate(flat, Truncation(top_k=2000)), flat)


def begun(mixture: Mixture | None = None, *, temperature: float = 1.0) -> LevelRanking:
    ranking = LevelRanking(mixture)
    tokens = torch.zeros(2, 1, dtype=torch.long)
    ranking.begin(
        Prefill(
            tokens=tokens,
            num_padding=tokens[:, 0],
            first_tokens=tokens[:, 0],
            temperature=temperature,
            max_new_tokens=9,
        )
    )
    return ranking


def position_noise() -> PositionNoise:
    torch.manual_seed(3)
    return PositionNoise(batch=2, vocab_size=11, device=torch.device("cpu"))


def observed(ranking: LevelRanking) -> list[tuple[int, list[int]]]:
    return [(rows.level, rows.tokens.tolist()) for rows in ranking.estimator._state.pending]


def test_levels_are_ranked_with_the_noise_of_their_depth():
    ranking, noise = begun(), position_noise()
    for depth in range(3):
        found = ranking.rank(LOGITS, depth=depth, noise=noise)
        expected = rank_log_probs(LOGITS, temperature=1.0, noise=noise.at_depth(depth))
        assert torch.equal(found, expected)


def test_a_smaller_vocabulary_is_ranked_with_the_noise_of_its_tokens():
    columns = torch.tensor([2, 3, 5, 7])
    ranking, noise = begun(), position_noise()
    found = ranking.rank(LOGITS[:, :, :4], depth=0, noise=noise, columns=columns)
    expected = rank_log_probs(
        LOGITS[:, :, :4], temperature=1.0, noise=noise.at_depth(0)[:, columns]
    )
    assert torch.equal(found, expected)


def test_accepted_paths_are_observed_where_a_distribution_is_at_hand():
    ranking, noise = begun(), position_noise()
    for depth in range(2):
        ranking.rank(LOGITS, depth=depth, noise=noise)
    accepted = Accepted.from_host(
        [[0, 2, 4], [0, 1]], [[7, 8, 9], [3, 4]], device=torch.device("cpu")
    )
    ranking.learn(accepted, [[(0, 1), (1, 0)], [None]])
    # Row 0 took 7 at the root, 8 below it, and 9 at a node without a distribution; row 1 took 3.
    assert observed(ranking) == [(0, [7, 3]), (1, [8])]
    below = ranking.estimator._state.pending[1]
    assert torch.equal(below.log_probs, LOGITS[:1, 1].log_softmax(-1))
    assert torch.equal(below.noise, noise.at_depth(1)[:1])


def test_tokens_that_the_draft_does_not_have_are_marked():
    ranking = begun()
    columns = torch.tensor([2, 3, 5, 7])
    ranking.rank(LOGITS[:, :, :4], depth=0, noise=position_noise(), columns=columns)
    accepted = Accepted.from_host([[0], [0]], [[7], [4]], device=torch.device("cpu"))
    ranking.learn(accepted, [[], []])
    assert observed(ranking) == [(0, [3, -1])]


def test_rows_that_emit_nothing_and_rounds_without_a_draft_are_not_observed():
    ranking = begun()
    accepted = Accepted.from_host([[0], []], [[7], []], device=torch.device("cpu"))
    ranking.learn(accepted, [[], []])
    assert observed(ranking) == []
    ranking.rank(LOGITS, depth=0, noise=position_noise())
    ranking.learn(accepted, [[], []])
    ranking.learn(accepted, [[], []])  # the levels were used up
    assert observed(ranking) == [(0, [7])]


def test_greedy_rounds_are_not_observed():
    ranking = begun(temperature=0.0)
    ranking.rank(LOGITS, depth=0, noise=None)
    accepted = Accepted.from_host([[0], [0]], [[7], [4]], device=torch.device("cpu"))
    ranking.learn(accepted, [[], []])
    assert observed(ranking) == []


@pytest.mark.parametrize("mixture", [None, Mixture(weight=0.5)])
def test_parameters_move_unless_they_are_fixed(mixture):
    ranking, noise = begun(mixture), position_noise()
    start = ranking.estimator.at(0)
    for step in range(ROUNDS_PER_UPDATE):
        noise.seek([step, step], live=[True, True])
        ranking.rank(LOGITS, depth=0, noise=noise)
        chosen = (LOGITS[:, 0].softmax(-1) / noise.at_depth(0)).argmax(-1).tolist()
        accepted = Accepted.from_host(
            [[0], [0]], [[token] for token in chosen], device=torch.device("cpu")
        )
        ranking.learn(accepted, [[], []])
    if mixture is None:
        assert ranking.estimator.at(0).weight > start.weight
    else:
        assert ranking.estimator.at(0) == mixture


def test_expansions_of_chains_and_grown_trees():
    accepted = Accepted.from_host([[0, 2, 3], []], [[7, 8, 9], []], device=torch.device("cpu"))
    assert chain_expansions(accepted) == [[(0, 0), (1, 0)], []]
    grown = GrownRow([5, 7, 8], [0, 0, 2], [None, (0, 1), None], [0.0, 0.0, 0.0])
    assert path_expansions(accepted, [grown, grown]) == [[(0, 1), None], []]


def test_what_is_learned_changes_no_token():
    target = shared_model("llama")
    proposer = DraftModelProposer(target, target=target, num_draft_tokens=2, depth=2)
    spec = SpecModel(target, proposer, adaptive=False)
    settings = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 40}
    for _ in range(3):
        found, state = generate(spec, prompts(9, 5), **settings)
        expected, plain_state = generate(target, prompts(9, 5), **settings)
        assert torch.equal(found, expected)
        assert torch.equal(state, plain_state)
    assert proposer._ranking.estimator.at(0).weight > Mixture().weight


VOCAB = 12
TOKENS = torch.tensor([[0, 1, 2], [3, 1, 1]])
ROOTS = torch.tensor([4, 2])
SCORES = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
NODES = (torch.tensor([[5, 6, 1], [1, 7, 2]]), torch.zeros(2, 3, dtype=torch.long))
BELOW = (torch.tensor([[8, 1, 2], [1, 2, 2]]), torch.tensor([[2, 0, 0], [1, 1, 2]]))


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise AssertionError("a draft may not call it")


def begun_adjuster(*processors, vocab_size=None):
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
    adjuster = begun_adjuster(TemperatureLogitsWarper(0.5), Unknown(), build())
    adjuster.adjust(SCORES[:, :1], depth=0, nodes=None, columns=None)
    adjuster.extend([[9], [5]])
    text = torch.cat([TOKENS, ROOTS[:, None], torch.tensor([[9], [5]])], dim=1)
    adjuster.adjust(SCORES[:, :1], depth=0, nodes=None, columns=None)
    adjuster.adjust(SCORES, depth=1, nodes=NODES, columns=None)
    found = adjuster.adjust(SCORES, depth=2, nodes=BELOW, columns=None)
    tokens, parents = BELOW
    for row in range(2):
        for node in range(3):
            path = [NODES[0][row, parents[row, node]], tokens[row, node]]
            whole = torch.cat([text[row], torch.stack(path)])[None]
            expected = build()(whole, SCORES[row, node][None].clone())
            assert torch.equal(found[row, node], expected[0])


def test_padding_is_ignored_at_every_node_of_its_row():
    ignored = torch.tensor([2, 1])  # as Transformers passes it for a padded batch
    adjuster = begun_adjuster(RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=ignored))
    adjuster.adjust(SCORES[:, :1], depth=0, nodes=None, columns=None)
    found = adjuster.adjust(SCORES, depth=1, nodes=NODES, columns=None)
    text = torch.cat([TOKENS, ROOTS[:, None]], dim=1)
    for node in range(3):
        whole = torch.cat([text, NODES[0][:, node, None]], dim=1)
        alone = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=ignored)
        assert torch.equal(found[:, node], alone(whole, SCORES[:, node].clone()))


def test_rows_of_different_lengths_are_told_apart_where_only_lengths_are_read():
    adjuster = begun_adjuster(length())
    adjuster.extend([[9, 8], []])
    found = adjuster.adjust(SCORES, depth=0, nodes=None, columns=None)
    assert found[:, 0, 3].isinf().tolist() == [False, True]


def test_a_draft_that_does_not_see_its_path_is_spared_what_reads_the_order():
    adjuster = begun_adjuster(ngrams(), bad_words(), penalty())
    adjuster.adjust(SCORES[:, :1], depth=0, nodes=None, columns=None)
    found = adjuster.adjust(SCORES[:, :1], depth=1, nodes=None, columns=None)
    text = torch.cat([TOKENS, ROOTS[:, None]], dim=1)
    assert torch.equal(found[:, 0], penalty()(text, SCORES[:, 0].clone()))


def test_columns_of_a_smaller_vocabulary_get_what_their_tokens_get():
    columns = torch.tensor([1, 3, 7])
    adjuster = begun_adjuster(SuppressTokensLogitsProcessor([3]), vocab_size=VOCAB)
    found = adjuster.adjust(SCORES[..., :3], depth=0, nodes=None, columns=columns)
    assert torch.equal(found[..., [0, 2]], SCORES[..., [0, 2]])
    assert found[..., 1].isinf().all()


def test_nothing_is_done_without_known_processors():
    adjuster = begun_adjuster(TemperatureLogitsWarper(0.5), Unknown())
    assert not adjuster.is_needed
    assert adjuster.adjust(SCORES, depth=0, nodes=None, columns=None) is SCORES


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
