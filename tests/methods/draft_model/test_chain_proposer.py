"""Drafting with models that take chains alone, for targets of any kind."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Prefill, Proposer
from speclm.errors import OptionError, UnsupportedModelError, VocabularyMismatchError
from speclm.methods.draft_model.chain_proposer import ChainDraftConfig, ChainDraftProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.testing import check_proposer
from tests.grids import turns
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model

NEW_TOKENS = 14
FULL = {"num_draft_tokens": 5, "min_confidence": 0.0}
HYBRID, ALIBI, TREES = "qwen3_next", "bloom", "llama"


def require_equal(
    target: PreTrainedModel, proposer: Proposer, lengths: tuple[int, ...], **settings: Any
) -> SpecModel:
    inputs = prompts(*lengths)
    settings = {"max_new_tokens": NEW_TOKENS, **settings}
    expected = generate(target, inputs, **settings)
    spec = SpecModel(target, proposer)
    found = generate(spec, inputs, **settings)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    return spec


@pytest.mark.parametrize(
    ("family", "lengths", "cell"),
    turns(
        [HYBRID, ALIBI],
        [(9,), (7, 1, 10)],
        [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}],
    ),
)
def test_draft_that_is_the_target_is_always_right(family, cell, lengths):
    target = shared_model(family)
    proposer = ChainDraftProposer(build_model(family), target=target, **FULL)
    spec = require_equal(target, proposer, lengths, **cell)
    if not cell["do_sample"]:
        rounds = spec.last_speculation.rows[0].accepted_lengths
        assert max(rounds) == FULL["num_draft_tokens"]
        assert spec.last_speculation.rounds <= 6  # with one now and then to catch up


@pytest.mark.parametrize(
    ("pair", "case"),
    turns(
        [(TREES, HYBRID), (HYBRID, ALIBI), (TREES, ALIBI)],
        tuple(product([{"do_sample": False}, {"do_sample": True}], [(7, 1, 10), (9,)])),
    ),
)
def test_draft_of_another_family_changes_no_token(pair, case):
    (base, draft), (cell, lengths) = pair, case
    target = shared_model(base)
    proposer = ChainDraftProposer(build_model(draft, seed=3), target=target, **FULL)
    require_equal(target, proposer, lengths, **cell)


@pytest.mark.parametrize("family", [HYBRID, ALIBI])
def test_rows_that_end_early_do_not_disturb_the_others(family):
    target = shared_model(family)
    inputs = prompts(7, 4, 10)
    free = generate(target, inputs, max_new_tokens=NEW_TOKENS)[0][:, 10:].tolist()
    ends = [free[0][4], free[1][9]]
    proposer = ChainDraftProposer(build_model(family), target=target, **FULL)
    spec = require_equal(target, proposer, (7, 4, 10), eos_token_id=ends)
    rows = spec.last_speculation.rows
    assert max(max(row.accepted_lengths, default=0) for row in rows) > 1
    assert len({len(row.accepted_lengths) for row in rows}) > 1


def test_joined_with_ngrams_it_changes_no_token():
    target = shared_model(HYBRID)
    draft = ChainDraftProposer(build_model(HYBRID), target=target, **FULL)
    for lengths in ((9,), (7, 1, 10)):
        require_equal(target, CombinedProposer([NgramProposer(), draft]), lengths, do_sample=False)


@pytest.mark.parametrize("family", [HYBRID, ALIBI])
@torch.no_grad()
def test_after_any_rounds_it_drafts_what_a_new_one_drafts(family):
    target, draft = shared_model(family), build_model(family, seed=2)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 19), generator=torch.Generator().manual_seed(0))
    used, fresh = (ChainDraftProposer(draft, target=target, **FULL) for _ in range(2))
    used.begin(prompt_of(tokens[:, :8]))
    done = 8
    for num_accepted, drafts in (
        (0, False),
        (0, True),
        (2, True),
        (1, False),
        (1, True),
        (0, True),
    ):
        if drafts:
            used.propose(tokens[:, done - 1], noise=None)
        new = tokens[:, done : done + num_accepted + 1]
        path = torch.arange(num_accepted + 1).expand(2, -1)
        used.commit(Accepted(path=path, tokens=new))
        done += num_accepted + 1
    # Accepted tokens that were not drafted would be wrong in its state: they are here.
    fresh.begin(prompt_of(tokens[:, :done]))
    found, wanted = (each.propose(tokens[:, done - 1], noise=None) for each in (used, fresh))
    assert found.tokens.shape == wanted.tokens.shape


def prompt_of(tokens: Tensor) -> Prefill:
    return Prefill(
        tokens=tokens[:, :-1],
        num_padding=torch.zeros(len(tokens), dtype=torch.long),
        first_tokens=tokens[:, -1],
        temperature=0.0,
        max_new_tokens=32,
    )


@pytest.mark.parametrize("family", [HYBRID, pytest.param(ALIBI, marks=pytest.mark.slow)])
def test_it_keeps_the_contract_of_proposers(family):
    draft, target = build_model(family, seed=1), shared_model(TREES)
    check_proposer(
        lambda: ChainDraftProposer(draft, target=target, **FULL),
        vocab_size=VOCAB_SIZE,
        max_length=32,
    )


def test_rejection_draws_a_chain_of_full_length():
    target = shared_model(HYBRID)
    spec = SpecModel(target, ChainDraftProposer(build_model(HYBRID), target=target, **FULL))
    torch.manual_seed(0)
    output = spec.generate(
        **prompts(9, 4), do_sample=True, max_new_tokens=NEW_TOKENS, acceptance="rejection"
    )
    assert output.shape == (2, 9 + NEW_TOKENS)
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.tau > 2  # the draft is the target


def test_drafts_stop_before_the_last_learned_position():
    target = shared_model(TREES)
    draft = build_model("bloom")
    proposer = ChainDraftProposer(draft, target=target, **FULL)
    proposer.view.model.config.max_position_embeddings = 14
    spec = require_equal(target, proposer, (9,), do_sample=False)
    depths = spec.last_speculation.rows[0]
    assert depths.accepted_lengths[-1] == 0


@pytest.mark.parametrize("family", [HYBRID, ALIBI])
def test_folder_of_a_model_that_takes_chains_alone_drafts_chains(family, tmp_path):
    build_model(family, seed=1).save_pretrained(tmp_path)
    spec = SpecModel.from_pretrained(shared_model(TREES), tmp_path, num_draft_tokens=3)
    assert isinstance(spec.proposer, ChainDraftProposer)
    assert spec.proposer.config == ChainDraftConfig(num_draft_tokens=3)


def test_model_that_can_draft_nothing_is_refused():
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = FalconMambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    with pytest.raises(UnsupportedModelError, match="neither trees nor chains"):
        SpecModel.from_pretrained(shared_model(TREES), FalconMambaForCausalLM(config).eval())


def test_other_vocabularies_and_unknown_options_are_refused():
    target = shared_model(TREES)
    with pytest.raises(VocabularyMismatchError, match="vocabulary of 90"):
        ChainDraftProposer(build_model("bloom", vocab_size=90), target=target)
    with pytest.raises(OptionError, match="unknown option 'width'"):
        ChainDraftProposer(build_model("bloom"), target=target, width=2)
    with pytest.raises(OptionError, match=r"min_confidence is 2\.0"):
        ChainDraftProposer(build_model("bloom"), target=target, min_confidence=2.0)
    with pytest.raises(OptionError, match="num_draft_tokens is 0"):
        ChainDraftProposer(build_model("bloom"), target=target, num_draft_tokens=0)
