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
from tests.proposers import HittingProposer

KINDS = ("eagle", "eagle3")
LAYERS = (1, 2, 3)
TOLERANCE = 1e-5  # of the largest number
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


@pytest.mark.parametrize("kind", KINDS)
def test_accepted_paths_of_all_lengths_leave_the_features_that_training_sees(kind, monkeypatch):
    model = base_of()
    heads = heads_for(model, kind, draft_vocab_size=40 if kind == "eagle3" else None)
    inputs, settings = prompts(7, 3, 10), {"max_new_tokens": 16, "do_sample": False}
    expected = generate(model, inputs, **settings)[0]
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    eagle = EagleProposer(heads, target=model, **FULL)
    proposer = HittingProposer(eagle, expected[:, 10:].tolist())
    seen: list[int] = []
    original = EagleProposer._catch_up

    def checked(self: EagleProposer, device: torch.device) -> None:
        original(self, device)
        for row, start in enumerate(padding):
            length = self._cache.host_lengths[row] + 1  # tokens whose features are joined
            wanted = last_output(model, heads, expected[row, start:length])
            assert (self._hidden[row] - wanted).abs().max() < TOLERANCE * wanted.abs().max()
            seen.append(length)

    monkeypatch.setattr(EagleProposer, "_catch_up", checked)
    require_equal(SpecModel(model, proposer), inputs, **settings)
    assert len(set(seen)) > 6


@torch.no_grad()
def last_output(model: PreTrainedModel, heads: EagleHeads, tokens: Tensor) -> Tensor:
    """Return the heads' output behind a text, from one pass as in training."""
    states = model(input_ids=tokens[None], output_hidden_states=True).hidden_states
    layers = LAYERS if heads.config.kind == "eagle3" else (-1,)
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-1]
    embeddings = model.get_input_embeddings()(tokens[None, 1:])
    positions = torch.arange(len(tokens) - 1)[None]
    return heads(heads.fuse(features), embeddings, position_ids=positions)[0, -1]


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
