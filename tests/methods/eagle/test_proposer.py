"""EAGLE heads as a proposer: the same tokens, and features that training would see."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.testing import check_proposer
from tests.grids import grid, turns
from tests.methods.eagle import eagle_heads
from tests.models import VOCAB_SIZE, build_model, generate, prompts

KINDS = ("eagle", "eagle3")
LAYERS = (1, 2, 3)
FULL = {"depth": 6, "width": 3, "min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}


def base_of(family: str = "llama") -> PreTrainedModel:
    return build_model(family, num_hidden_layers=4)


def heads_for(
    model: PreTrainedModel, kind: str, *, draft_vocab_size: int | None = None
) -> EagleHeads:
    return eagle_heads.heads_for(model, kind, layers=LAYERS, draft_vocab_size=draft_vocab_size)


def require_equal(spec: SpecModel, inputs: dict[str, Tensor], **settings: Any) -> None:
    expected = generate(spec.base, inputs, **settings)
    found = generate(spec, inputs, **settings)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize(
    ("kind", "lengths", "cell"),
    turns(
        KINDS,
        [(9,), (1,), (7, 2, 10)],
        [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}],
    ),
)
def test_tokens_are_those_of_plain_decoding(kind, cell, lengths):
    model = base_of()
    proposer = EagleProposer(heads_for(model, kind), target=model, **FULL)
    inputs = prompts(*lengths)
    require_equal(SpecModel(model, proposer), inputs, max_new_tokens=14, **cell)


@pytest.mark.parametrize("kind", grid(KINDS, runs=lambda kind: kind == "eagle3"))
def test_it_keeps_the_contract_of_proposers(kind):
    model = base_of()
    heads = heads_for(model, kind)
    width = model.config.hidden_size * len(LAYERS if kind == "eagle3" else (1,))
    whole = {**FULL, "num_draft_tokens": 64}  # a cut would fall between near ties
    check_proposer(
        lambda: EagleProposer(heads, target=model, **whole),
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        max_length=32,
    )


def test_heads_of_other_models_and_unknown_options_are_refused():
    model = base_of()
    heads = heads_for(model, "eagle3")
    with pytest.raises(VocabularyMismatchError, match="vocabulary of 160"):
        EagleProposer(heads, target=build_model("llama", num_hidden_layers=4, vocab_size=200))
    with pytest.raises(OptionError, match="features of width 40"):
        EagleProposer(heads, target=build_model("llama", num_hidden_layers=4, hidden_size=60))
    with pytest.raises(OptionError, match="unknown option 'trees'"):
        EagleProposer(heads, target=model, trees="auto")
    with pytest.raises(OptionError, match=r"feature_layers is .*expected at most 1"):
        EagleProposer(heads, target=build_model("llama"))
