import dataclasses
import re
import textwrap

import pytest
import torch

from speclm import SpecModel
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.target.features import TargetFeatures
from speclm.tree import chain
from tests.models import prompts, shared_model


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


def test_the_example_runs_and_generates_the_tokens_of_the_base():
    (code,) = re.findall(r"```python\n(.*?)```", Proposer.__doc__, flags=re.DOTALL)
    base = shared_model("llama")
    names = {
        "base": base,
        "chain": chain,
        "Draft": Draft,
        "Proposer": Proposer,
        "ProposerConfig": ProposerConfig,
        "SpecModel": SpecModel,
    }
    exec(textwrap.dedent(code), names)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    found = names["model"].generate(**prompts(6), **arguments)
    assert torch.equal(found, base.generate(**prompts(6), **arguments))
