import dataclasses

import pytest
import torch

from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.target.features import TargetFeatures
from speclm.tree import chain


def test_interface_cannot_be_instantiated():
    with pytest.raises(TypeError, match="abstract"):
        Proposer()


@pytest.mark.parametrize("missing", ["begin", "propose", "commit"])
def test_every_method_has_to_be_written(missing):
    methods = {
        name: lambda self: None for name in ("begin", "propose", "commit") if name != missing
    }
    incomplete = type("Incomplete", (Proposer,), methods)
    with pytest.raises(TypeError, match=missing):
        incomplete()


def test_defaults_need_no_features_of_the_target():
    assert Proposer.features == TargetFeatures.NONE
    assert Proposer.config == ProposerConfig()


def test_what_passes_between_loop_and_proposer_is_frozen():
    draft = Draft(tokens=torch.tensor([[1, 2]]), topology=chain(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        draft.node_probs = [[1.0, 1.0]]
    prompt = Prefill(
        tokens=torch.tensor([[1, 2]]),
        num_padding=torch.tensor([0]),
        first_tokens=torch.tensor([3]),
        temperature=0.0,
        max_new_tokens=5,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.temperature = 1.0
