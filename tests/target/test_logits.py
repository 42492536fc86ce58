"""Logits from hidden states, of models whose head is not all there is, or hard to find."""

import pytest
import torch
from transformers import PreTrainedModel

from speclm.errors import UnsupportedModelError
from speclm.target import TargetView
from speclm.target.logits import find_decoder, logits_from
from tests.families import FAMILIES, build_type, shared_family
from tests.models import prompts, shared_model

TOLERANCE = 1e-4  # of logits whose spread is about 3, in float32


@torch.no_grad()
def require_own_logits(model: PreTrainedModel) -> None:
    """Compare with the model's logits those from what its decoder returned."""
    read: list[torch.Tensor] = []
    hook = find_decoder(model).register_forward_hook(lambda *seen: read.append(seen[2][0]))
    expected = model(input_ids=prompts(5)["input_ids"]).logits
    hook.remove()
    assert torch.allclose(logits_from(model, read[0]), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_from_the_decoders_output_are_the_models(name):
    require_own_logits(shared_family(name))


def test_decoder_is_found_where_the_head_has_its_name():
    model = build_type("modernbert-decoder", {"bos_token_id": 1, "eos_token_id": 2})
    assert model.get_decoder() is model.get_output_embeddings()
    assert find_decoder(model) is model.model


def test_model_that_is_one_with_its_head_is_refused(monkeypatch):
    model = shared_model("llama")
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    monkeypatch.setattr(type(model), "children", lambda self: iter(()))
    with pytest.raises(UnsupportedModelError, match=r"no decoder next to its head.* n-grams"):
        find_decoder(model)
    with TargetView(model).decoding():
        pass  # it generates all the same, where nobody asks for hidden states
