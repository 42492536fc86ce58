"""The network of a draft model: its room, its window and its copies."""

from copy import deepcopy

import torch
from torch import Tensor

from speclm.methods.draft_model.network import DraftNetwork
from speclm.target import TargetView
from tests.models import build_model, prompts, shared_model


@torch.no_grad()
def logits_of(network: DraftNetwork, view: TargetView, tokens: Tensor) -> Tensor:
    """Return logits after the last of some tokens, which are fed together after a prompt."""
    cache, (batch, width) = view.new_cache(torch.zeros(len(tokens), dtype=torch.long)), tokens.shape
    view.prefill(prompts(*[5] * batch)["input_ids"], cache)
    views = network.views(cache, num_new=width)
    rotation = tuple(part.narrow(1, 5, width) for part in network.rotation(5 + width))
    bias = torch.full((1, 1, width, 5 + width), -torch.inf).triu_(6)
    hidden = network.forward(tokens, views, rotation=rotation, bias=bias, cache=cache)
    return network.logits(hidden, views, batch=batch)[:, -1]


def test_room_that_was_made_in_inference_mode_is_usable_outside_of_it():
    view = TargetView(shared_model("llama"))
    network, tokens = DraftNetwork(view.model), torch.tensor([[3]])
    with torch.inference_mode():
        first = logits_of(network, view, tokens).clone()
    assert torch.equal(logits_of(network, view, tokens), first)


def test_room_is_kept_for_a_few_shapes():
    view = TargetView(shared_model("llama"))
    network, widths = DraftNetwork(view.model), [1, 2, 1, *range(2, 12), 1]
    found = [logits_of(network, view, torch.full((1, width), 3)) for width in widths]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[-1])
    assert len(network._buffers) <= 8


def test_window_is_the_smallest_of_the_layers():
    assert DraftNetwork(shared_model("llama")).window is None
    assert DraftNetwork(build_model("mistral", sliding_window=20)).window == 20
    mixed = build_model("qwen2", sliding_window=12, max_window_layers=2)
    assert DraftNetwork(mixed).window == 12


def test_copies_hold_no_network_of_another_model():
    assert deepcopy(DraftNetwork(shared_model("llama"))) is None
