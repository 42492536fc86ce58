"""Features are the hidden states that the model itself would return."""

import pytest
import torch

from speclm.errors import UnsupportedModelError
from speclm.target import TargetFeatures, TargetView
from speclm.tree.topology import from_parents
from tests.models import build_model, prompts

TOLERANCE = 1e-4


@pytest.mark.parametrize("layers", [(-1,), (1, 2, 3), (0, 2, -1)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_next"])
@torch.no_grad()
def test_features_of_a_prompt_are_its_hidden_states(family, layers):
    types = {"layer_types": ["linear_attention", "full_attention"] * 2}
    model = build_model(family, num_hidden_layers=4, **(types if family == "qwen3_next" else {}))
    tokens = prompts(7)["input_ids"]
    expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    view = TargetView(model)
    with view.decoding(TargetFeatures(layers)):
        view.run(input_ids=tokens)
        found = view.features
        model(input_ids=tokens[:, :3])  # another caller's
        assert view.features is found
    assert view.features is None
    width = model.config.hidden_size
    assert found.shape == (1, 7, width * len(layers))
    for place, layer in enumerate(layers):
        part = found[..., place * width : (place + 1) * width]
        assert torch.allclose(part, expected[layer], atol=TOLERANCE)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_features_of_a_tree_are_those_of_its_paths():
    model = build_model("llama", num_hidden_layers=4)
    view, tokens = TargetView(model), prompts(6)["input_ids"]
    draft = torch.tensor([[int(tokens[0, -1]), 5, 6, 7]])
    topology = from_parents([[0, 0, 0, 2]], device=torch.device("cpu"))
    with view.decoding(TargetFeatures((1, 2, 3))):
        cache = view.new_cache(torch.tensor([0]))
        view.forward_tree(draft, topology, cache, prompt=tokens[:, :-1])
        found = view.features[:, -4:]
    path = torch.cat([tokens, torch.tensor([[6, 7]])], dim=1)
    states = model(input_ids=path, output_hidden_states=True).hidden_states
    expected = torch.cat(states[1:4], dim=-1)[:, [-3, -2, -1]]
    assert torch.allclose(found[:, [0, 2, 3]], expected, atol=TOLERANCE)


def test_layers_that_a_target_lacks_are_refused():
    view = TargetView(build_model("llama"))
    with pytest.raises(UnsupportedModelError, match="features of layer 2 are requested"):
        view.decoding(TargetFeatures((2,))).__enter__()
